"""The parameters of a model, read from files whole or shard by shard."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxq.files import TensorFile
from jaxq.models._tensor_map import Parts
from jaxq.serialization import Index, read_shards
from jaxq.sharding import Rules, shardings_of


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
        read = functools.partial(_read, parts, files, dtype)
        at = shardings[path].get_value()
        values[path] = read_shards(shape, dtype, at, read)
    return values


def read_whole(
    parts: Parts, files: Mapping[str, TensorFile], dtype: np.dtype
) -> np.ndarray:
    """A parameter, whose layers and experts are stacked or not."""
    if () in parts:
        return parts[()].read(files).astype(dtype)
    # The largest index on each leading axis, of layers or of experts.
    sizes = [number + 1 for number in max(parts)]
    stack = None
    for number, part in parts.items():
        value = part.read(files)
        if stack is None:
            stack = np.empty((*sizes, *value.shape), dtype)
        stack[number] = value.astype(dtype)
    assert stack is not None
    return stack


def _read(
    parts: Parts,
    files: Mapping[str, TensorFile],
    dtype: np.dtype,
    indices: Sequence[Index],
) -> Iterator[tuple[int, np.ndarray]]:
    """Shards of a parameter, whose layers and experts are stacked or not."""
    if () in parts:
        for place, shard in parts[()].read_parts(files, indices):
            yield place, shard.astype(dtype)
        return
    sizes = [number + 1 for number in max(parts)]
    # The numbers of the layers and experts of each shard, by axis.
    numbers = [
        [range(size)[axis] for size, axis in zip(sizes, index, strict=False)]
        for index in indices
    ]
    missing = [np.prod([len(axis) for axis in axes]) for axes in numbers]
    shards: dict[int, np.ndarray] = {}
    for number, part in parts.items():
        places = [
            place
            for place, axes in enumerate(numbers)
            if all(i in axis for i, axis in zip(number, axes, strict=True))
        ]
        within = [indices[place][len(sizes) :] for place in places]
        for i, value in part.read_parts(files, within):
            place = places[i]
            axes = numbers[place]
            if place not in shards:
                lead = [len(axis) for axis in axes]
                shards[place] = np.empty((*lead, *value.shape), dtype)
            own = tuple(axis.index(n) for n, axis in zip(number, axes, strict=True))
            shards[place][own] = value.astype(dtype)
            missing[place] -= 1
            if not missing[place]:
                yield place, shards.pop(place)
