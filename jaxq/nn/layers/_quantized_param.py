"""The nnx Variable that holds a quantized weight, and how it enters a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxq.qtensor import QTensor
from jaxq.sharding import WEIGHT_SHARDING, WEIGHT_SHARDING_RULES

# What to do about a float weight in a quantized model, for errors.
FLOAT_STATE = (
    "Update the model with the state of a model that was quantized by the same recipe, "
    "or quantize the float model again. To run floats, use the float model."
)


class QuantizedParam(nnx.Variable):
    """An nnx Variable that holds a QTensor.

    It is not an `nnx.Param`. An optimizer of `nnx.Param` therefore does not update it,
    and `nnx.grad` over `nnx.Param` does not differentiate it.

    A float array cannot replace the QTensor, because the model would then no longer be
    quantized.

    Raises:
      ValueError: `nnx.update` or an assignment would replace the QTensor by an array.

    Example:
      >>> import jaxq
      >>> from flax import nnx
      >>> qmodel, _ = jaxq.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), "int8")
      >>> isinstance(qmodel.kernel, jaxq.nn.QuantizedParam)
      True
    """

    def update_from_state(self, variable_state: Any) -> None:
        self._check(variable_state.get_raw_value())
        super().update_from_state(variable_state)

    def set_raw_value(self, value: Any, **kwargs: Any) -> None:
        self._check(value)
        super().set_raw_value(value, **kwargs)

    def set_value(self, value: Any, **kwargs: Any) -> None:
        self._check(value)
        super().set_value(value, **kwargs)

    def _check(self, value: Any) -> None:
        """Raises a ValueError if an array would replace a QTensor."""
        # Flax also sets marks of its own, which are not arrays.
        is_array = isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
        if is_array and isinstance(self.get_raw_value(), QTensor):
            raise ValueError(
                f"QuantizedParam: {value.dtype}{list(value.shape)} cannot replace "
                f"{self.get_raw_value()!r}. {FLOAT_STATE}"
            )

    def __jax_array__(self) -> Any:
        value = self.get_value()
        # A QTensor has this method only to raise an error that names the remedy.
        as_array = getattr(value, "__jax_array__", None)
        return value if as_array is None else as_array()


def quantized_param(weight: QTensor, variable: nnx.Variable) -> QuantizedParam:
    """A `QuantizedParam` in the place of a float variable.

    It keeps the mesh axes of the float variable (`nnx.with_partitioning`), which
    `jaxq.sharding` reads. They have another name, because Flax would apply
    `out_sharding` to every leaf of the QTensor.
    """
    metadata = variable.get_metadata()
    kept = {
        WEIGHT_SHARDING: metadata.get("out_sharding"),
        WEIGHT_SHARDING_RULES: metadata.get("sharding_rules"),
    }
    return QuantizedParam(weight, **{k: v for k, v in kept.items() if v})


def float_param(weight: jax.Array, variable: nnx.Variable) -> nnx.Variable:
    """A float variable in the place of a `QuantizedParam`, with its mesh axes.

    Args:
      weight: the floats.
      variable: a `QuantizedParam`. A float variable in its place keeps its type.
    """
    if not isinstance(variable, QuantizedParam):
        return variable.replace(weight)
    metadata = variable.get_metadata()
    kept = {
        "out_sharding": metadata.get(WEIGHT_SHARDING),
        "sharding_rules": metadata.get(WEIGHT_SHARDING_RULES),
    }
    kept = {name: value for name, value in kept.items() if value}
    # Flax would move the weight, and needs a mesh context for that.
    return nnx.Param(weight, eager_sharding=False, **kept)


def replace_variables(model: nnx.Module, replaced: Mapping[int, Any]) -> None:
    """Replaces variables everywhere in a model, so that shared variables stay shared.

    Args:
      model: changed in place. Its layers already hold the new variables.
      replaced: the new variables or modules, by the `id` of the old ones. The old ones
        must still be alive, so that no other object has their `id`.

    Raises:
      ValueError: a container that cannot be changed, such as a tuple, holds an old
        variable.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> from jaxq.nn.layers import replace_variables
      >>> layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
      >>> old = layer.kernel
      >>> new = jaxq.nn.QuantizedParam(jaxq.quantize(old[...], "int8"))
      >>> replace_variables(layer, {id(old): new})
      >>> layer.kernel is new
      True
    """
    for _, node in list(nnx.iter_graph(model)):
        if isinstance(node, nnx.Pytree):
            for name, value in list(vars(node).items()):
                if id(value) in replaced:
                    setattr(node, name, replaced[id(value)])
    left = [
        "/".join(map(str, path))
        for path, node in nnx.iter_graph(model)
        if id(node) in replaced
    ]
    if left:
        raise ValueError(
            f"A quantized weight is also held as {', '.join(left)}, in a container "
            "that cannot be changed. Use nnx.List or an attribute, or skip the layer "
            "in the recipe."
        )
