"""Which part of which tensor of a file holds each parameter of a model.

The map is the only place that knows both names. `load` and `save` read it in both
directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jaxq.files import TensorFile
from jaxq.models._naming import Naming
from jaxq.models.decoder import Decoder, DecoderConfig

_HEAD = "lm_head"


class TensorPart(NamedTuple):
    """A part of a tensor of a file: a whole parameter, or one slice of it.

    Attributes:
        name: of the tensor.
        shape: of the tensor.
        start: where the part begins along the axis `axis` of the tensor.
        stop: where it ends.
        axis: the axis that is cut. The part is whole along all other axes.
        is_transposed: the tensor has [out, in], and the parameter has [in, out].
        offset: what is added to the numbers of the file.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    axis: int
    is_transposed: bool
    offset: float

    def read(
        self, files: Mapping[str, TensorFile], index: tuple[slice, ...] | None = None
    ) -> np.ndarray:
        """The numbers of the parameter, or of a part of it.

        Args:
            files: the open file of each tensor.
            index: a slice with step 1 for each axis of the parameter. None means all.
        """
        file = files[self.name]
        if index is None and (self.start, self.stop) == (0, self.shape[self.axis]):
            value = file.read(self.name)
        else:
            value = file.read_part(self.name, self._file_index(index))
        if self.offset:
            value = value.astype(np.float32) + np.float32(self.offset)
        return value.T if self.is_transposed else value

    def write(
        self, tensors: dict[str, np.ndarray], value: np.ndarray, dtype: np.dtype
    ) -> None:
        """Puts the numbers of a parameter into the tensors of a file.

        Args:
            tensors: by name. A tensor that is not there yet is added.
            value: the parameter, or one slice of it.
            dtype: of the tensors.
        """
        if self.name not in tensors:
            tensors[self.name] = np.empty(self.shape, dtype)
        value = value.T if self.is_transposed else value
        if self.offset:
            value = value.astype(np.float32) - np.float32(self.offset)
        whole = tensors[self.name]
        whole[self._file_index(None)] = value.astype(dtype)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of the numbers in the model."""
        shape = list(self.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape[::-1] if self.is_transposed else shape)

    def _file_index(self, index: tuple[slice, ...] | None) -> tuple[slice, ...]:
        """Where a part of the parameter is in the tensor."""
        if index is None:
            bounds = [(0, size) for size in self.value_shape]
        else:
            sizes = zip(index, self.value_shape, strict=True)
            bounds = [part.indices(size)[:2] for part, size in sizes]
        if self.is_transposed:
            bounds.reverse()
        start, stop = bounds[self.axis]
        bounds[self.axis] = (self.start + start, self.start + stop)
        return tuple(slice(*bound) for bound in bounds)


# The tensors of a parameter. The key is the index on its leading axis of layers, or ()
# if it has none.
Parts = dict[tuple[int, ...], TensorPart]


def tensor_map(config: DecoderConfig, naming: Naming) -> dict[tuple, Parts]:
    """The tensors of every parameter of a `Decoder`, by the path of the parameter.

    Args:
        config: of the model.
        naming: of the files.
    """
    # All layers have the shapes of one. To build one takes the same time for any depth.
    model = nnx.eval_shape(lambda: Decoder(_one_layer(config), rngs=nnx.Rngs(0)))
    tensors: dict[tuple, Parts] = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[0] != "layers":
            prefix = "" if path[0] == _HEAD else naming.prefix
            part = _part(config, naming, prefix, path, param.shape)
            tensors[path] = {(): part}
            continue
        within = path[2:]
        for layer in range(config.num_hidden_layers):
            prefix = naming.layer_prefix(layer)
            part = _part(config, naming, prefix, within, param.shape)
            if config.scan_layers:
                tensors.setdefault(("layers", *within), {})[layer,] = part
            else:
                tensors["layers", layer, *within] = {(): part}
    return tensors


def shapes_of(tensors: Mapping[tuple, Parts]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a map, by its name in the file."""
    return {
        part.name: part.shape for parts in tensors.values() for part in parts.values()
    }


def _one_layer(config: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(
        config,
        num_hidden_layers=1,
        scan_layers=False,
        window_layers=None,
        rope_layers=None,
    )


def _part(
    config: DecoderConfig,
    naming: Naming,
    prefix: str,
    path: tuple[Any, ...],
    shape: tuple[int, ...],
) -> TensorPart:
    """The part of a tensor that holds one parameter.

    Args:
        config: of the model.
        naming: of the files.
        prefix: of the name.
        path: of the parameter in the model, or in its layer.
        shape: of the parameter.
    """
    module, last = ".".join(map(str, path[:-1])), path[-1]
    ending = "bias" if last == "bias" else "weight"
    is_kernel = last == "kernel"
    is_transposed = is_kernel and (naming.is_transposed or module == _HEAD)
    offset = 1.0 if last == "scale" and config.unit_offset_norms else 0.0
    file_shape = shape[::-1] if is_transposed else shape
    # The axis of the outputs.
    axis = 0 if is_transposed else len(shape) - 1
    for whole, modules in naming.fused.items():
        if module in modules:
            sizes = [_num_outputs(config, name) for name in modules]
            place = modules.index(module)
            start = sum(sizes[:place])
            fused_shape = list(file_shape)
            fused_shape[axis] = sum(sizes)
            stop = start + sizes[place]
            name = f"{prefix}{whole}.{ending}"
            return TensorPart(
                name, tuple(fused_shape), start, stop, axis, is_transposed, offset
            )
    name = f"{prefix}{naming.modules.get(module, module)}.{ending}"
    stop = file_shape[axis]
    return TensorPart(name, file_shape, 0, stop, axis, is_transposed, offset)


def _num_outputs(config: DecoderConfig, module: str) -> int:
    """The number of outputs of a linear of a layer."""
    if module == "self_attn.q_proj":
        return config.num_attention_heads * config.head_dim
    if module.startswith("self_attn."):
        return config.num_key_value_heads * config.head_dim
    return config.intermediate_size
