"""The parameters of a model on a mesh, read from files part by part."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxq.files import TensorFile
from jaxq.models._tensor_map import Parts
from jaxq.sharding import Rules, array_from_parts, shardings_of


def read_on_mesh(
    shapes: nnx.State,
    tensors: Mapping[tuple, Parts],
    files: Mapping[str, TensorFile],
    mesh: Mesh,
    rules: Rules,
) -> dict[tuple, jax.Array]:
    """The parameters of a model on a mesh, by path.

    Args:
      shapes: the state of the model, with shapes.
      tensors: where each parameter is, by path.
      files: the open file of each tensor.
      mesh: of devices.
      rules: as in `jaxq.sharding.place`.
    """
    state = shardings_of(shapes, mesh, rules, caller="jaxq.models.load")
    shardings = dict(nnx.to_flat_state(state))
    flat = dict(nnx.to_flat_state(shapes))
    values = {}
    for path, parts in tensors.items():
        shape, dtype = flat[path].shape, flat[path].dtype
        read = functools.partial(read_part, parts, files, dtype)
        at = shardings[path].get_value()
        values[path] = array_from_parts(shape, dtype, at, read)
    return values


def read_part(
    parts: Parts,
    files: Mapping[str, TensorFile],
    dtype: np.dtype,
    index: tuple[slice, ...] | None,
) -> np.ndarray:
    """A part of a parameter, whose layers and experts are stacked or not.

    Args:
      parts: the tensors of the parameter.
      files: the open file of each tensor.
      dtype: of the result.
      index: a slice with step 1 for each axis of the parameter. None means all.
    """
    if () in parts:
        return parts[()].read(files, index).astype(dtype)
    # The largest index on each leading axis, of layers or of experts.
    sizes = [number + 1 for number in max(parts)]
    if index is None:
        numbers, within = [range(size) for size in sizes], None
    else:
        numbers = [range(size)[part] for size, part in zip(sizes, index, strict=False)]
        within = index[len(sizes) :]
    stack = None
    for place in np.ndindex(*map(len, numbers)):
        number = tuple(axis[i] for axis, i in zip(numbers, place, strict=True))
        value = parts[number].read(files, within)
        if stack is None:
            stack = np.empty((*map(len, numbers), *value.shape), dtype)
        stack[place] = value.astype(dtype)
    assert stack is not None
    return stack
