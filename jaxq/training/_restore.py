"""Replaces the trained weights of a model by their floats."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxq.nn.layers import PromoteQTensors, replace_variables
from jaxq.nn.transform import find_layers
from jaxq.qtensor import TrainedWeight
from jaxq.sharding import value_in_box
from jaxq.sharding.boxes import QuantizedBox, boxed_like
from jaxq.training._batch_norm import restore_norms
from jaxq.training._weights import is_trained, trained_params


def restore_floats(model: Any) -> Any:
    """A copy of a model in which trained weights are floats again.

    Args:
      model: an nnx module or a tree. It need not be prepared.
    """
    if not isinstance(model, nnx.Module):
        return jax.tree.map(_floats, model, is_leaf=_is_weight)
    model = nnx.clone(model)
    # `id` identifies a module, so the modules must stay alive.
    params = [param for _, param in trained_params(model)]
    floats = {id(param): param.float_param() for param in params}
    restore_norms(model)
    replace_variables(model, floats)
    for layer in find_layers(model):
        # The hook of a quantized layer refuses float weights.
        hook = getattr(layer.layer, "promote_dtype", None)
        if isinstance(hook, PromoteQTensors) and floats:
            layer.layer.promote_dtype = hook.original
    return model


def _is_weight(x: Any) -> bool:
    return is_trained(x) or isinstance(x, QuantizedBox)


def _floats(x: Any) -> Any:
    """The floats of a trained weight, in its box of metadata. Other leaves stay."""
    weight = value_in_box(x)
    return boxed_like(weight.floats, x) if isinstance(weight, TrainedWeight) else x
