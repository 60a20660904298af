"""Fills a model with the quantized weights of a checkpoint of another library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.files import TensorHeader
from jaxq.io import Checkpoint, fill_model
from jaxq.qtensor import QTensor


def headers_of(checkpoint: Checkpoint) -> dict[str, TensorHeader]:
    """The headers that the parameters would have in a float checkpoint.

    Raises:
        ValueError: the tensors of a quantized weight do not fit its settings.
    """
    headers = {}
    for name in checkpoint:
        shape = checkpoint.eval_shape(name)
        dtype = _DTYPES.get(np.dtype(shape.dtype).name, str(shape.dtype))
        headers[name] = TensorHeader(dtype, tuple(shape.shape), 0, 0)
    return headers


# Names of float dtypes in safetensors files.
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def filled_with_quantized(
    model: Any,
    destinations: Mapping[str, Any],
    checkpoint: Checkpoint,
    dtype: np.dtype,
) -> Any:
    """A model of shapes with the parameters of a checkpoint, read one by one.

    A weight that is quantized in the checkpoint is quantized in the model.

    Args:
        model: the result of `nnx.eval_shape`.
        destinations: the path and the layer of each parameter by its name.
        checkpoint: open.
        dtype: of the float parameters, and of the products with quantized weights.

    Raises:
        ValueError: a parameter cannot be read; or stacked layers are quantized in
            different ways.
    """
    values: dict[str, Any] = {}
    layers: dict[str, list[Any]] = {}
    for name, (path, layer, _) in destinations.items():
        value = _parameter(checkpoint[name], path[-1] == "kernel", dtype)
        key = "/".join(map(str, path))
        if layer is None:
            values[key] = value
        else:
            layers.setdefault(key, []).append(value)
    for key in list(layers):
        values[key] = _stacked(layers.pop(key), key, checkpoint.path)
    return fill_model(model, values, checkpoint.path)


def _parameter(value: Any, is_kernel: bool, dtype: np.dtype) -> Any:
    """A parameter with the axes of the model."""
    if isinstance(value, QTensor):
        value = value.astype(dtype)
        return value.T if is_kernel else value  # [in, out]
    return jnp.asarray(value.T if is_kernel else value, dtype)


def _stacked(layers: list[Any], name: str, path: Path) -> Any:
    """The values of all layers, stacked along a leading axis."""
    structures = {jax.tree.structure(value) for value in layers}
    if len(structures) > 1:
        raise ValueError(
            f"jaxq.models.load: {path}: {name} is not quantized in the same way in all "
            "layers, so its layers cannot be stacked. Use scan_layers=False."
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
