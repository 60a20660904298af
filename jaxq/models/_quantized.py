"""Fills a model with the quantized weights of a checkpoint of another library."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxq.files import TensorHeader
from jaxq.io import Checkpoint, fill_model
from jaxq.models._tensor_map import Parts, TensorPart
from jaxq.processes import put
from jaxq.qtensor import QTensor, kept_slice
from jaxq.sharding import Rules, shardings_of


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
    mesh: Mesh | None = None,
    rules: Rules = None,
) -> Any:
    """A model of shapes with the parameters of a checkpoint, read one by one.

    A weight that is quantized in the checkpoint is quantized in the model.

    Args:
        model: the result of `nnx.eval_shape`.
        tensors: where each parameter is, by path.
        checkpoint: open.
        dtype: of the float parameters, and of the products with quantized weights.
        mesh: of devices, or None. Each parameter is put on it after it was read.
        rules: as in `jaxq.sharding.place`.

    Raises:
        ValueError: a parameter cannot be read or split from a quantized tensor;
            stacked layers or experts are quantized in different ways; or a shard would
            cut a group of codes.
    """
    by_name = {"/".join(map(str, path)): parts for path, parts in tensors.items()}

    def read(name: str, value_of: Callable[[str], Any]) -> Any:
        """A parameter of the model. `value_of` gives the tensors of the file."""
        slices = {
            number: _parameter(value_of(part.name), part, dtype, checkpoint.path)
            for number, part in by_name[name].items()
        }
        return _joined(slices, name, checkpoint.path)

    shardings: dict[str, Any] = {}
    if mesh is not None:
        shapes = {
            name: _shape(read, name, parts, checkpoint)
            for name, parts in by_name.items()
        }
        shardings = shardings_of(shapes, mesh, rules, caller="jaxq.models.load")
    values: dict[str, Any] = {}
    for name in by_name:
        value = read(name, checkpoint.__getitem__)
        if mesh is not None:
            # Every process has read the same file.
            put_leaf = functools.partial(put, compares=False)
            value = jax.tree.map(put_leaf, value, shardings[name])
        values[name] = value
    return fill_model(model, values, checkpoint.path)


def _shape(
    read: Callable[..., Any], name: str, parts: Parts, checkpoint: Checkpoint
) -> Any:
    """The result of `read` with shapes in place of arrays. No weight is read."""
    names = {part.name for part in parts.values()}
    shapes = {tensor: checkpoint.eval_shape(tensor) for tensor in names}
    return jax.eval_shape(lambda values: read(name, values.__getitem__), shapes)


def _parameter(value: Any, part: TensorPart, dtype: np.dtype, path: Path) -> Any:
    """A parameter, or one slice of it, with the axes of the model.

    Args:
        value: of the tensor, an array or a QTensor.
        part: where the parameter is in the tensor.
        dtype: of the result.
        path: of the checkpoint, for errors.
    """
    if not isinstance(value, QTensor):
        everything = tuple(slice(None) for _ in part.shape)
        value = part.of_model(value[part.file_index(everything)])
        # Gains with an offset are float32 in the model.
        return jnp.asarray(value, None if part.offset else dtype)
    if not part.is_whole:
        value = _one_of_several(value, part, path)
    value = value.astype(dtype)
    return value.T if part.is_transposed else value  # [in, out]


def _one_of_several(value: QTensor, part: TensorPart, path: Path) -> QTensor:
    """One of the projections that a quantized tensor holds. Its codes do not change.

    Args:
        value: of the tensor.
        part: where the projection is in the tensor.
        path: of the checkpoint, for errors.

    Raises:
        ValueError: a block of the tensor has numbers of two projections.
    """
    where = slice(part.start, part.stop, part.step)
    try:
        return kept_slice(value, part.axis - len(part.shape), where)
    except ValueError as error:
        raise ValueError(
            f"jaxq.models.load: {path}: {part.name} holds several projections, and it "
            f"cannot be split: {error} Use a checkpoint in floats, which "
            'jaxq.io.export(..., format="hf") writes.'
        ) from error


def _joined(slices: dict[tuple[int, ...], Any], name: str, path: Path) -> Any:
    """The slices of a parameter, stacked along its axes of layers and experts."""
    while () not in slices:
        rows: dict[tuple[int, ...], list[Any]] = {}
        for number in sorted(slices):
            rows.setdefault(number[:-1], []).append(slices[number])
        slices = {number: _stacked(row, name, path) for number, row in rows.items()}
    return slices[()]


def _stacked(values: list[Any], name: str, path: Path) -> Any:
    """The values of all layers or experts, stacked along a leading axis."""
    structures = {jax.tree.structure(value) for value in values}
    if len(structures) > 1:
        raise ValueError(
            f"jaxq.models.load: {path}: {name} is not quantized in the same way in all "
            "layers and experts, so they cannot be stacked. With scan_layers=False, "
            "layers are not stacked."
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)
