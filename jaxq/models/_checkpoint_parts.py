"""A model as the parts of a checkpoint, for `jaxq.io.export`."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxq.io import CheckpointParts
from jaxq.models._checkpoint import destinations_of
from jaxq.models.llama import Llama
from jaxq.nn.layers import input_transforms

_CALLER = "jaxq.io.export"


def checkpoint_parts(model: Llama) -> CheckpointParts:
    """The config and the parameters of a model, quantized or not.

    Raises:
        ValueError: the parameters are not those of a `Llama` with this config; or a
            layer transforms its inputs, which the files cannot express.
    """
    transforms = input_transforms(model)
    if transforms:
        layer, name = next(iter(transforms.items()))
        raise ValueError(
            f"{_CALLER}: {len(transforms)} layers transform their inputs, for example "
            f"{layer} by {name}. The files cannot express that. Use jaxq.save."
        )
    destinations = destinations_of(model.config)
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    expected = {destination.path for destination in destinations.values()}
    different = sorted(".".join(map(str, path)) for path in flat.keys() ^ expected)
    if different:
        raise ValueError(
            f"{_CALLER}: the parameters differ from those of a Llama in "
            f"{', '.join(different)}. Use jaxq.save for a model with other parameters."
        )

    def read(name: str) -> Any:
        path, layer, _ = destinations[name]
        value = flat[path].get_value()
        if layer is not None:
            # A QTensor has batch axes, and its leaves are sliced.
            value = jax.tree.map(lambda leaf: leaf[layer], value)
        return value.T if path[-1] == "kernel" else value  # [out, in]

    return CheckpointParts(model.config.to_hf(), tuple(destinations), read)
