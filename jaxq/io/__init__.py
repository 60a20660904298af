"""jaxq's own files, and quantized checkpoints and arrays of other libraries.

`save` writes a tree (dicts, lists and tuples of arrays, numbers and QTensors) or a
model (its arrays by path). `load` reads it back, and can put the arrays into a float
model. `jaxq.serialization` describes how values are stored. `describe` and `template`
keep QTensors whole in the checkpoints of orbax.

`read_checkpoint` reads the quantized checkpoints of other libraries, and `export`
writes them. `quantize_checkpoint` quantizes a checkpoint that may be larger than the
memory. `layouts` has the functions for the arrays of one weight.

Without files, `to_qwix` and `from_qwix` convert to and from the arrays of qwix,
`to_numpy` and `from_numpy` to and from dicts of numpy arrays, and
`scaled_matmul_operand` to the operands of `jax.nn.scaled_matmul`.
"""

from pathlib import Path
from typing import Any

from jaxq.io import layouts as layouts
from jaxq.io._describe import describe, template
from jaxq.io._numpy import from_numpy, to_numpy
from jaxq.io._qwix import from_qwix, to_qwix
from jaxq.io._saving import load, save
from jaxq.io._saving import model_as_file as model_as_file
from jaxq.io._scaled_matmul import ScaledMatmulOperand, scaled_matmul_operand
from jaxq.io.checkpoint import (
    Checkpoint,
    export,
    quantize_checkpoint,
    read_checkpoint,
)
from jaxq.io.checkpoint import CheckpointParts as CheckpointParts
from jaxq.io.checkpoint import companion_files as companion_files
from jaxq.io.checkpoint import is_quantized as is_quantized
from jaxq.io.checkpoint import register_model as register_model

__all__ = [
    "Checkpoint",
    "ScaledMatmulOperand",
    "describe",
    "export",
    "from_numpy",
    "from_qwix",
    "layouts",
    "load",
    "quantize_checkpoint",
    "read_checkpoint",
    "save",
    "scaled_matmul_operand",
    "template",
    "to_numpy",
    "to_qwix",
]


def fill_model(model: Any, values: dict[str, Any], path: Path) -> Any:
    """A copy of an nnx model with the arrays and QTensors of a file, by path."""
    from jaxq.io._into_model import into_model  # imports Flax

    return into_model(model, values, None, caller="load", source=str(path))
