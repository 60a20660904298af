"""Flax nnx Linear and LinearGeneral: their kinds, and their quantized layers.

Both multiply with the hook `dot_general(input, kernel, ...)`. A kernel is `[in, out]`,
or `[*batch, *in, *out]` in LinearGeneral.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import lax

from jaxq.nn.layers._kind import LayerKind, foreign_hook, register_layer
from jaxq.nn.layers._own_weight import quantize_own_weight
from jaxq.nn.layers._promotion import accept_qtensors, promotion_problem
from jaxq.nn.layers._roles import Roles
from jaxq.ops import dot_general


class QLinear(nnx.Linear):
    """`nnx.Linear` with a quantized kernel.

    Products of int8 codes accumulate in int32, all others in float32.

    Args:
      in_features: size of the contracted last axis of the input.
      out_features: size of the last axis of the result.
      weight: preset name or `QuantSpec` of the kernel. None keeps a float kernel, and
        bfloat16 products accumulate in float32.
      activation: preset name or `QuantSpec` for dynamic activation quantization, with
        one scale for each token. None leaves the input in floats.
      **kwargs: as in `nnx.Linear`, `rngs` included.

    Raises:
      ValueError: `activation` is given and `weight` is None.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jaxq.nn.QLinear(64, 8, weight="int8", activation="int8", rngs=rngs)
      >>> layer(jnp.ones((2, 64))).shape
      (2, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight: Any = "int8",
        activation: Any = None,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, **kwargs)
        quantize_own_weight(self, weight, activation)


class QLinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` with a quantized kernel.

    Arguments and errors are those of `QLinear` and `nnx.LinearGeneral`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> layer = jaxq.nn.QLinearGeneral(64, (4, 16), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 64))).shape
      (2, 4, 16)
    """

    def __init__(
        self,
        in_features: Any,
        out_features: Any,
        *,
        weight: Any = "int8",
        activation: Any = None,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, **kwargs)
        quantize_own_weight(self, weight, activation)


def _linear_roles(layer: Any) -> Roles:
    return Roles((-2,), (layer.in_features, layer.out_features))


def _general_roles(layer: Any) -> Roles:
    num_in, num_out = len(layer.in_features), len(layer.out_features)
    batch = tuple(layer.batch_axis.values())
    contracting = tuple(range(-num_in - num_out, -num_out))
    shape = (*batch, *layer.in_features, *layer.out_features)
    return Roles(contracting, shape, len(batch))


def _attach(layer: Any) -> None:
    accept_qtensors(layer, "kernel")
    layer.dot_general = dot_general


def _linear_problem(layer: Any) -> str | None:
    return foreign_hook(
        layer, "dot_general", (lax.dot_general, dot_general)
    ) or promotion_problem(layer, "kernel", _linear_roles(layer).shape)


def _general_problem(layer: Any) -> str | None:
    if layer.dot_general_cls is not None:
        return f"its dot_general_cls is a custom class, {layer.dot_general_cls!r}"
    return foreign_hook(
        layer, "dot_general", (None, lax.dot_general, dot_general)
    ) or promotion_problem(layer, "kernel", _general_roles(layer).shape)


register_layer(
    LayerKind(
        name="Linear",
        cls=nnx.Linear,
        weight="kernel",
        roles=_linear_roles,
        attach=_attach,
        problem=_linear_problem,
        hook="dot_general",
        corrects_bias=True,
    )
)
register_layer(
    LayerKind(
        name="LinearGeneral",
        cls=nnx.LinearGeneral,
        weight="kernel",
        roles=_general_roles,
        attach=_attach,
        problem=_general_problem,
        hook="dot_general",
        plain_product=lax.dot_general,
        corrects_bias=True,
    )
)
