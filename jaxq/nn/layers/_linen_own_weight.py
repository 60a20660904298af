"""The weight of a linen layer that is quantized from the start, such as `QDense`.

`init` draws the floats that the float layer would draw, and quantizes them. `apply`
uses the QTensor in the variables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen
from flax.linen.dtypes import promote_dtype

from jaxq.nn.layers._linen_kind import LinenKind, code_of
from jaxq.nn.layers._linen_stand_in import StandIn
from jaxq.nn.layers._promotion import changed_by_promotion
from jaxq.nn.layers._roles import Roles
from jaxq.qtensor import QUANTIZED, QTensor, quantize
from jaxq.sharding import value_in_box
from jaxq.sharding.boxes import boxed_like


def call_own_code(
    layer: Any, kind: LinenKind, flax_method: Any, inputs: jax.Array
) -> jax.Array:
    """Runs Flax's method of a layer with the layer's own quantized weight.

    Args:
      layer: has the fields `weight` and `activation`.
      kind: of the layer.
      flax_method: a method that reads its product from the fields of the layer.
      inputs: of the call.
    """
    check_layer(layer, kind)

    def weight(init: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> Any:
        roles = kind.roles(layer, tuple(shape))
        return own_weight(layer, kind.weight, roles, init, dtype)

    stand_in = StandIn(layer, kind.weight, weight)
    return code_of(flax_method)(stand_in, inputs)


def check_layer(layer: Any, kind: LinenKind, *args: Any) -> None:
    """Checks the settings of a layer that is quantized from the start.

    Raises:
      ValueError: `kind.problem` returns a problem; `activation` is given and `weight`
        is None.
    """
    caller = type(layer).__name__
    problem = kind.problem(layer, *args)
    if problem is not None:
        raise ValueError(f"{caller}: {problem}.")
    if layer.weight is None and layer.activation is not None:
        raise ValueError(
            f"{caller}: activation={layer.activation!r} needs a quantized weight=, "
            "but weight is None. Pass a preset name as weight=."
        )


def own_weight(
    layer: Any, name: str, roles: Roles, init: Callable[..., Any], dtype: Any
) -> QTensor | jax.Array:
    """Returns the layer's weight from its variables, or a newly initialized weight.

    Args:
      layer: has the field `weight`, and `activation` if its inputs can be quantized.
      name: of the parameter.
      roles: of the axes of the weight.
      init: the initializer of the float weight.
      dtype: of the float weight.

    Raises:
      TypeError: the variables hold an array where a QTensor is expected.
      ValueError: the variables hold a QTensor of another shape; the `promote_dtype`
        of the layer changes the weight, or the class of the layer overrides `param`.
    """
    if layer.weight is None:
        return layer.param(name, init, roles.shape, dtype)
    problem = _own_change(layer, name, roles.shape, dtype)
    if problem is not None:
        raise ValueError(f"{type(layer).__name__}: {problem}. Or pass weight=None.")
    path = "/".join((*layer.path, name))
    if not layer.has_variable("params", name):

        def init_quantized(rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
            # A lifted layer (nn.vmap) initializes its elements one by one, so a new
            # weight has no stack axes.
            boxed = init(rng, shape, dtype)
            floats = linen.meta.unbox(boxed)
            qt = quantize(
                floats,
                layer.weight,
                contracting=roles.contracting,
                batch=tuple(range(roles.num_batch)),
                name=path,
            )
            qt = qt.with_activation(getattr(layer, "activation", None))
            return boxed_like(qt, boxed)

        return layer.param(name, init_quantized, roles.shape, dtype)
    value = value_in_box(layer.get_variable("params", name))
    _check_stored(layer, value, name, path, roles)
    return value


def _own_change(
    layer: Any, name: str, shape: tuple[int, ...], dtype: Any
) -> str | None:
    """Says why the layer's own code cannot take a QTensor as weight. None if it can."""
    if type(layer).param is not linen.Module.param:
        return (
            f"{type(layer).__name__} overrides `param`, which may change its {name}, "
            "and codes cannot be changed. Store the changed weight in a plain layer"
        )

    def promote(arrays: tuple) -> Any:
        return layer.promote_dtype(*arrays, dtype=layer.dtype)

    if layer.promote_dtype is promote_dtype:
        return None
    return changed_by_promotion(promote, name, jax.ShapeDtypeStruct(shape, dtype))


def _check_stored(layer: Any, value: Any, name: str, path: str, roles: Roles) -> None:
    """Raises unless a stored weight is a QTensor of the right shape."""
    caller = type(layer).__name__
    if not isinstance(value, QUANTIZED):
        axes = f"contracting={roles.contracting}"
        if roles.num_batch:
            axes += f", batch={tuple(range(roles.num_batch))}"
        kind = getattr(value, "dtype", type(value).__name__)
        shape = list(getattr(value, "shape", []))
        raise TypeError(
            f"{caller}: {path} is {kind}{shape}, not a QTensor. "
            f"Pass jaxq.quantize({name}, {layer.weight!r}, {axes}). Or use the float "
            "layer with jaxq.nn.linen.quantize_model, or pass weight=None."
        )
    if value.shape != roles.shape:
        raise ValueError(
            f"{caller}: {path} is {value!r}, expected the shape {list(roles.shape)}. "
            "Pass the variables of a layer with these sizes."
        )
