"""Small quantized directories in the layouts of other libraries."""

import json

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxq.io import layouts
from tests.io.layouts.cases import CASES

# The layouts of directories. GGUF has a file of its own.
ROWS = [name for name, case in CASES.items() if case.layout != "gguf"]
# The files hold 127 times the scale, so a scale can change in its last bit.
INEXACT = {"llm_int8"}


def quantized(row, shape=(256, 64)):
    """A QTensor that the layout of a row can hold."""
    import jaxq

    w = jax.random.normal(jax.random.key(0), shape)
    return jaxq.quantize(w, layouts.get(CASES[row].layout).spec(CASES[row].config))


def tensors_of(row, module, qt=None):
    """The tensors of a quantized weight by name, and the quantization_config."""
    qt = quantized(row) if qt is None else qt
    arrays, settings = layouts.get(CASES[row].layout).from_qtensor(qt)
    separator = "_" if row == "mxfp4" else "."
    tensors = {
        f"{module}{separator}{name}": np.asarray(array)
        for name, array in arrays.items()
    }
    if CASES[row].layout == "compressed_tensors":
        group = {"targets": ["Linear"], "weights": settings.pop("weights")}
        settings["config_groups"] = {"group_0": group}
    return tensors, settings


def write(path, tensors, quantization_config, **config):
    """A directory with one weight file."""
    path.mkdir(exist_ok=True)
    # The package safetensors knows float8 as the dtypes of ml_dtypes.
    save_file(dict(tensors), path / "model.safetensors")
    entries = dict(config)
    if quantization_config is not None:
        entries["quantization_config"] = quantization_config
    (path / "config.json").write_text(json.dumps(entries))
