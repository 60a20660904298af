"""Which part of which tensor of a file holds each parameter of a model.

The map is the only place that knows both names. `load` and `save` read it in both
directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jaxq.files import TensorFile
from jaxq.models._naming import Naming
from jaxq.models.decoder import Decoder, DecoderConfig
from jaxq.models.encoder import Encoder, EncoderConfig

_HEAD = "lm_head"


class TensorPart(NamedTuple):
    """A part of a tensor of a file: a whole parameter, or one slice of it.

    Attributes:
        name: of the tensor.
        shape: of the tensor.
        start: where the part begins along the axis `axis` of the tensor.
        stop: where it ends.
        axis: the axis that is cut. The part is whole along all other axes.
        step: 2 if the part has every second entry along the axis.
        is_transposed: the tensor has [out, in], and the parameter has [in, out].
        offset: what is added to the numbers of the file.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    axis: int
    step: int
    is_transposed: bool
    offset: float

    @property
    def is_whole(self) -> bool:
        """Whether the part is the whole tensor."""
        return self.step == 1 and self.stop - self.start == self.shape[self.axis]

    def read(self, files: Mapping[str, TensorFile]) -> np.ndarray:
        """The numbers of the parameter.

        Args:
            files: the open file of each tensor.
        """
        if self.is_whole:
            return self.of_model(files[self.name].read(self.name))
        everything = tuple(slice(None) for _ in self.shape)
        return next(self.read_parts(files, [everything]))[1]

    def read_parts(
        self, files: Mapping[str, TensorFile], indices: Sequence[tuple[slice, ...]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The place in `indices` and the numbers of parts of the parameter.

        Args:
            files: the open file of each tensor.
            indices: of each part, a slice with step 1 for each axis of the parameter.
        """
        where = [self.file_index(index) for index in indices]
        # A file reads without steps.
        bounds = [tuple(slice(p.start, p.stop) for p in index) for index in where]
        for place, value in files[self.name].read_parts(self.name, bounds):
            steps = tuple(slice(None, None, part.step) for part in where[place])
            yield place, self.of_model(value[steps])

    def of_model(self, value: np.ndarray) -> np.ndarray:
        """Numbers of the file as numbers of the model."""
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
        everything = tuple(slice(None) for _ in self.shape)
        tensors[self.name][self.file_index(everything)] = value.astype(dtype)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of the numbers in the model."""
        shape = list(self.shape)
        shape[self.axis] = len(range(self.start, self.stop, self.step))
        return tuple(shape[::-1] if self.is_transposed else shape)

    def file_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where a part of the parameter is in the tensor."""
        sizes = zip(index, self.value_shape, strict=True)
        bounds = [part.indices(size)[:2] for part, size in sizes]
        if self.is_transposed:
            bounds.reverse()
        where = [slice(*bound) for bound in bounds]
        start, stop = bounds[self.axis]
        own = range(self.start, self.stop, self.step)[start:stop]
        where[self.axis] = slice(own.start, min(own.stop, self.stop), self.step)
        return tuple(where)


# The tensors of a parameter. The key is the index on its leading axes: of layers if
# they are stacked, and of experts if each has tensors of its own. Otherwise it is ().
Parts = dict[tuple[int, ...], TensorPart]


def tensor_map(
    config: DecoderConfig | EncoderConfig, naming: Naming
) -> dict[tuple, Parts]:
    """The tensors of every parameter of a model, by the path of the parameter.

    Args:
        config: of the model.
        naming: of the files.
    """
    if isinstance(config, EncoderConfig):
        return _encoder_map(config, naming)
    tensors: dict[tuple, Parts] = {}
    layers = _layer_shapes(config)
    for path, shape in _outer_shapes(config).items():
        prefix = "" if path[0] == _HEAD else naming.prefix
        tensors[path] = {(): _part(config, naming, prefix, path, shape)}
    for layer, has_experts in enumerate(config.expert_layers()):
        prefix = naming.layer_prefix(layer)
        for path, shape in layers[has_experts].items():
            parts = _parts(config, naming, prefix, path, shape)
            if config.scan_layers:
                stack = tensors.setdefault(("layers", *path), {})
                stack |= {(layer, *index): part for index, part in parts.items()}
            else:
                tensors["layers", layer, *path] = parts
    return tensors


def _encoder_map(config: EncoderConfig, naming: Naming) -> dict[tuple, Parts]:
    """The tensors of every parameter of an `Encoder`."""
    one_layer = dataclasses.replace(config, num_hidden_layers=1)
    model = nnx.eval_shape(lambda: Encoder(one_layer, rngs=nnx.Rngs(0)))
    tensors: dict[tuple, Parts] = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[0] != "layers":
            part = _part(config, naming, naming.prefix, path, param.shape)
            tensors[path] = {(): part}
            continue
        for layer in range(config.num_hidden_layers):
            prefix = naming.layer_prefix(layer)
            part = _part(config, naming, prefix, path[2:], param.shape)
            tensors["layers", layer, *path[2:]] = {(): part}
    return tensors


def shapes_of(tensors: Mapping[tuple, Parts]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a map, by its name in the file."""
    return {
        part.name: part.shape for parts in tensors.values() for part in parts.values()
    }


def _outer_shapes(config: DecoderConfig) -> dict[tuple, tuple[int, ...]]:
    """The shapes of the parameters outside the layers, by path."""
    flat = _flat_shapes(_one_layer(config, config.expert_layers()[0]))
    return {path: shape for path, shape in flat.items() if path[0] != "layers"}


def _layer_shapes(config: DecoderConfig) -> dict[bool, dict[tuple, tuple[int, ...]]]:
    """The shapes of a layer's parameters, by whether it has experts and by path.

    All layers of a kind have the same shapes. To build one takes the same time for any
    depth.
    """
    kinds = {}
    for has_experts in sorted(set(config.expert_layers())):
        flat = _flat_shapes(_one_layer(config, has_experts))
        kinds[has_experts] = {
            path[2:]: shape for path, shape in flat.items() if path[0] == "layers"
        }
    return kinds


def _flat_shapes(config: DecoderConfig) -> dict[tuple, tuple[int, ...]]:
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: param.shape for path, param in flat}


def _one_layer(config: DecoderConfig, has_experts: bool) -> DecoderConfig:
    """The config of a model with one layer of a kind."""
    experts = None
    if has_experts and config.experts is not None:
        experts = dataclasses.replace(config.experts, layers=None)
    return dataclasses.replace(
        config,
        num_hidden_layers=1,
        scan_layers=False,
        window_layers=None,
        rope_layers=None,
        experts=experts,
    )


def _parts(
    config: DecoderConfig,
    naming: Naming,
    prefix: str,
    path: tuple[Any, ...],
    shape: tuple[int, ...],
) -> Parts:
    """The tensors of one parameter of a layer, of all experts or of each."""
    if path[:2] != ("mlp", "experts"):
        return {(): _part(config, naming, prefix, path, shape)}
    module, last = path[2], path[3]
    if naming.experts is None:
        return {(): _fused_experts(prefix, module, last, shape)}
    parts = {}
    own_name = naming.expert_modules.get(module, module)
    ending = "bias" if last == "bias" else "weight"
    is_transposed = last == "kernel"
    own_shape = shape[:0:-1] if is_transposed else shape[1:]
    for expert in range(shape[0]):
        name = f"{prefix}{naming.experts.format(expert)}{own_name}.{ending}"
        stop = own_shape[0]
        parts[expert,] = TensorPart(name, own_shape, 0, stop, 0, 1, is_transposed, 0.0)
    return parts


def _fused_experts(
    prefix: str, module: str, last: str, shape: tuple[int, ...]
) -> TensorPart:
    """The part of a tensor of all experts, as GPT-OSS stores them.

    The columns of gate_proj and up_proj take turns in one tensor. Kernels are
    [e, in, out] in the file too.
    """
    ending = "_bias" if last == "bias" else ""
    axis = len(shape) - 1
    if module == "down_proj":
        name = f"{prefix}mlp.experts.down_proj{ending}"
        return TensorPart(name, shape, 0, shape[axis], axis, 1, False, 0.0)
    name = f"{prefix}mlp.experts.gate_up_proj{ending}"
    fused_shape = (*shape[:axis], 2 * shape[axis])
    start = 0 if module == "gate_proj" else 1
    return TensorPart(name, fused_shape, start, fused_shape[axis], axis, 2, False, 0.0)


def _part(
    config: DecoderConfig | EncoderConfig,
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
    ending = last if last in ("bias", "sinks") else "weight"
    is_kernel = last == "kernel"
    is_transposed = is_kernel and (naming.is_transposed or module == _HEAD)
    has_offset = isinstance(config, DecoderConfig) and config.unit_offset_norms
    offset = 1.0 if last == "scale" and has_offset else 0.0
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
                name, tuple(fused_shape), start, stop, axis, 1, is_transposed, offset
            )
    name = f"{prefix}{naming.modules.get(module, module)}.{ending}"
    stop = file_shape[axis]
    return TensorPart(name, file_shape, 0, stop, axis, 1, is_transposed, offset)


def _num_outputs(config: Any, module: str) -> int:
    """The number of outputs of a linear of a decoder's layer."""
    if module == "self_attn.q_proj":
        return config.num_attention_heads * config.head_dim
    if module.startswith("self_attn."):
        return config.num_key_value_heads * config.head_dim
    return config.intermediate_size
