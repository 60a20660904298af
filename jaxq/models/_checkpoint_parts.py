"""A model as the parts of a checkpoint, for `jaxq.io.export`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxq.io import CheckpointParts
from jaxq.models._naming import naming_of
from jaxq.models._tensor_map import TensorPart, tensor_map
from jaxq.models.decoder import Decoder
from jaxq.nn.layers import input_transforms
from jaxq.qtensor import QTensor

_CALLER = "jaxq.io.export"


def checkpoint_parts(model: Decoder) -> CheckpointParts:
    """The config and the parameters of a model, quantized or not.

    Raises:
        ValueError: the parameters are not those of a `Decoder` with this config; or a
            layer transforms its inputs, which the files cannot express.
    """
    transforms = input_transforms(model)
    if transforms:
        layer, name = next(iter(transforms.items()))
        raise ValueError(
            f"{_CALLER}: {len(transforms)} layers transform their inputs, for example "
            f"{layer} by {name}. The files cannot express that. Use jaxq.save."
        )
    entries = model.config.to_hf()
    tensors = tensor_map(model.config, naming_of(entries["model_type"]))
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    different = sorted(".".join(map(str, path)) for path in flat.keys() ^ set(tensors))
    if different:
        raise ValueError(
            f"{_CALLER}: the parameters differ from those of a Decoder in "
            f"{', '.join(different)}. Use jaxq.save for a model with other parameters."
        )
    # The parameters of each tensor: where each is in the model and in the tensor.
    holders: dict[str, list[tuple[tuple, tuple[int, ...], TensorPart]]] = {}
    for path, parts in tensors.items():
        for number, part in parts.items():
            holders.setdefault(part.name, []).append((path, number, part))

    def read(name: str) -> Any:
        values = []
        for path, number, _ in holders[name]:
            value = flat[path].get_value()
            # A QTensor has batch axes, and its leaves are sliced.
            values.append(_slice(value, number) if number else value)
        return _as_tensor(values, [part for _, _, part in holders[name]])

    return CheckpointParts(entries, tuple(holders), read)


def _slice(value: Any, number: tuple[int, ...]) -> Any:
    """One layer or expert of a stack."""
    return jax.tree.map(lambda leaf: leaf[number], value)


def _as_tensor(values: list[Any], parts: list[TensorPart]) -> Any:
    """The tensor of a file that holds some parameters.

    Raises:
        ValueError: several parameters are in the tensor, and one is quantized.
    """
    first = parts[0]
    if first.is_whole and not first.offset:
        return values[0].T if first.is_transposed else values[0]  # [out, in]
    if any(isinstance(value, QTensor) for value in values):
        raise ValueError(
            f"{_CALLER}: {first.name} holds several parameters, and one of them is "
            "quantized. Use jaxq.save for this model."
        )
    tensors: dict[str, np.ndarray] = {}
    for value, part in zip(values, parts, strict=True):
        array = np.asarray(value)
        part.write(tensors, array, array.dtype)
    return tensors[first.name]
