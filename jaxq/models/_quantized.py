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
from jaxq.models._tensor_map import Parts, TensorPart
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
    tensors: Mapping[tuple, Parts],
    checkpoint: Checkpoint,
    dtype: np.dtype,
) -> Any:
    """A model of shapes with the parameters of a checkpoint, read one by one.

    A weight that is quantized in the checkpoint is quantized in the model.

    Args:
        model: the result of `nnx.eval_shape`.
        tensors: where each parameter is, by path.
        checkpoint: open.
        dtype: of the float parameters, and of the products with quantized weights.

    Raises:
        ValueError: a parameter cannot be read or is a part of a quantized tensor; or
            stacked layers or experts are quantized in different ways.
    """
    values: dict[str, Any] = {}
    for path, parts in tensors.items():
        key = "/".join(map(str, path))
        slices = {
            number: _parameter(checkpoint, part, dtype)
            for number, part in parts.items()
        }
        values[key] = _joined(slices, key, checkpoint.path)
    return fill_model(model, values, checkpoint.path)


def _parameter(checkpoint: Checkpoint, part: TensorPart, dtype: np.dtype) -> Any:
    """A parameter, or one slice of it, with the axes of the model."""
    value = checkpoint[part.name]
    if not isinstance(value, QTensor):
        everything = tuple(slice(None) for _ in part.shape)
        value = np.asarray(value)[part.file_index(everything)]
        if part.offset:  # such gains are float32 in the model
            return jnp.asarray(part.of_model(value))
        return jnp.asarray(part.of_model(value), dtype)
    if not part.is_whole:
        raise ValueError(
            f"jaxq.models.load: {checkpoint.path}: {part.name} is quantized, and it "
            "holds several projections. Splitting it is not supported. Use a "
            "checkpoint in floats."
        )
    value = value.astype(dtype)
    return value.T if part.is_transposed else value  # [in, out]


def _joined(slices: dict[tuple[int, ...], Any], name: str, path: Path) -> Any:
    """The slices of a parameter, stacked along its axes of layers and experts."""
    while () not in slices:
        rows: dict[tuple[int, ...], list[Any]] = {}
        for number in sorted(slices):
            rows.setdefault(number[:-1], []).append(slices[number])
        slices = {number: _stacked(row, name, path) for number, row in rows.items()}
    return slices[()]


def _stacked(layers: list[Any], name: str, path: Path) -> Any:
    """The values of all layers, stacked along a leading axis."""
    structures = {jax.tree.structure(value) for value in layers}
    if len(structures) > 1:
        raise ValueError(
            f"jaxq.models.load: {path}: {name} is not quantized in the same way in all "
            "layers, so its layers cannot be stacked. Use scan_layers=False."
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
