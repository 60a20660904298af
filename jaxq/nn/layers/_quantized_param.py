"""The nnx Variable that holds a quantized weight, and how it enters a model."""

from __future__ import annotations

from typing import Any

from flax import nnx


class QuantizedParam(nnx.Variable):
    """An nnx Variable that holds a QTensor.

    It is not an `nnx.Param`. An optimizer of `nnx.Param` therefore does not update it,
    and `nnx.grad` over `nnx.Param` does not differentiate it.

    Example:
      >>> import jaxq
      >>> from flax import nnx
      >>> qmodel, _ = jaxq.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), "int8")
      >>> isinstance(qmodel.kernel, jaxq.nn.QuantizedParam)
      True
    """

    def __jax_array__(self) -> Any:
        value = self.get_value()
        # A QTensor has this method only to raise an error that names the remedy.
        as_array = getattr(value, "__jax_array__", None)
        return value if as_array is None else as_array()


def replace_variables(model: nnx.Module, replaced: dict[int, QuantizedParam]) -> None:
    """Replaces variables everywhere in a model, so that shared variables stay shared.

    Args:
      model: changed in place. Its layers already hold the new variables.
      replaced: the new variables, by the `id` of the old ones. The old ones must still
        be alive, so that no other object has their `id`.

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
