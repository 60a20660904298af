"""The parameters of a model on a mesh, read from files part by part."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxq.files import TensorFile
from jaxq.sharding import Rules, array_from_parts, shardings_of


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

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of the parameter."""
        if not self.is_transposed:
            return self.file.read_part(self.name, index)
        return self.file.read_part(self.name, index[::-1]).T


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
        read = functools.partial(_read_part, layers, dtype)
        at = shardings[path].get_value()
        values[path] = array_from_parts(shape, dtype, at, read)
    return values


def _read_part(
    layers: Sources, dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """A part of a parameter, of layers that are stacked or not."""
    if None in layers:
        return layers[None].read(index).astype(dtype)
    part = None
    numbers = range(len(layers))[index[0]]
    for place, number in enumerate(numbers):
        layer = layers[number].read(index[1:])
        if part is None:
            part = np.empty((len(numbers), *layer.shape), dtype)
        part[place] = layer.astype(dtype)
    assert part is not None
    return part
