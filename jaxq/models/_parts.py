"""The parameters of a model on a mesh, read from files shard by shard."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxq.files import TensorFile
from jaxq.serialization import Index, read_shards
from jaxq.sharding import Rules, shardings_of


class Source(NamedTuple):
    """A tensor of a file that holds a parameter, or one layer of it.

    Attributes:
      file: the open file.
      name: of the tensor.
      is_transposed: the file has [out, in], and the model has [in, out].
    """

    file: TensorFile
    name: str
    is_transposed: bool

    def read(self, indices: Sequence[Index]) -> Iterator[tuple[int, np.ndarray]]:
        """The place in `indices` and the numbers of each part of the parameter."""
        if not self.is_transposed:
            yield from self.file.read_parts(self.name, indices)
            return
        stored = [index[::-1] for index in indices]
        for place, part in self.file.read_parts(self.name, stored):
            yield place, part.T


# The tensor of each layer of a parameter. The key is None if layers are not stacked.
Sources = dict[int | None, Source]


def read_on_mesh(
    shapes: nnx.State,
    sources: Mapping[tuple, Sources],
    mesh: Mesh,
    rules: Rules,
) -> dict[tuple, jax.Array]:
    """The parameters of a model on a mesh, by path.

    Args:
      shapes: the state of the model, with shapes.
      sources: where each parameter is, by path.
      mesh: of devices.
      rules: as in `jaxq.sharding.place`.
    """
    state = shardings_of(shapes, mesh, rules, caller="jaxq.models.load")
    shardings = dict(nnx.to_flat_state(state))
    flat = dict(nnx.to_flat_state(shapes))
    values = {}
    for path, layers in sources.items():
        shape, dtype = flat[path].shape, flat[path].dtype
        read = functools.partial(_read, layers, dtype)
        at = shardings[path].get_value()
        values[path] = read_shards(shape, dtype, at, read)
    return values


def _read(
    layers: Sources, dtype: np.dtype, indices: Sequence[Index]
) -> Iterator[tuple[int, np.ndarray]]:
    """Shards of a parameter, of layers that are stacked or not."""
    if None in layers:
        for place, shard in layers[None].read(indices):
            yield place, shard.astype(dtype)
        return
    numbers = [range(len(layers))[index[0]] for index in indices]
    shards: dict[int, np.ndarray] = {}
    for number in range(len(layers)):
        places = [i for i, inside in enumerate(numbers) if number in inside]
        parts = layers[number].read([indices[place][1:] for place in places])
        for i, part in parts:
            place = places[i]
            first = numbers[place].start
            if place not in shards:
                shards[place] = np.empty((len(numbers[place]), *part.shape), dtype)
            shards[place][number - first] = part.astype(dtype)
            if number == numbers[place][-1]:
                yield place, shards.pop(place)
