"""Flax linen Dense and DenseGeneral: their kinds, and their quantized layers.

Both read their product from the field `dot_general`. A kernel is `[in, out]`, or
`[*batch, *in, *out]` in DenseGeneral.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import linen
from jax import lax

from jaxq.nn.layers._call_inputs import InputRows, contracted_rows
from jaxq.nn.layers._linen_kind import (
    LinenKind,
    foreign_function,
    register_linen_layer,
)
from jaxq.nn.layers._linen_own_weight import call_own_code
from jaxq.nn.layers._linen_stand_in import with_own_code
from jaxq.nn.layers._roles import Roles


class QDense(linen.Dense):
    """`nn.Dense` with a quantized kernel.

    Products of int8 codes accumulate in int32, all others in float32. `init` draws the
    floats that `nn.Dense` would draw, and quantizes them. `apply` uses the QTensor in
    the variables. This QTensor may have another spec or come from another method.

    Args:
      weight: preset name or `QuantSpec` of the kernel. None keeps a float kernel, and
        bfloat16 products accumulate in float32.
      activation: preset name or `QuantSpec` for dynamic activation quantization, with
        one scale for each token. None leaves the input in floats.
      **kwargs: all fields of `nn.Dense`. Positional arguments are these fields first,
        then `weight` and `activation`.

    Raises:
      TypeError: in `apply`, the kernel in the variables is a float array.
      ValueError: in `apply`, the QTensor has another shape than the kernel;
        `activation` is given and `weight` is None; the field `dot_general` holds a
        custom function.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer = jaxq.nn.linen.QDense(8, weight="int8", activation="int8")
      >>> x = jnp.ones((2, 64))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> kernel = variables["params"]["kernel"]
      >>> kernel.spec.fmt.name, kernel.shape, kernel.bits_per_element
      ('int8', (64, 8), 8.5)
      >>> layer.apply(variables, x).shape
      (2, 8)
    """

    weight: Any = "int8"
    activation: Any = None

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return call_own_code(self, DENSE, linen.Dense.__call__, inputs)


class QDenseGeneral(linen.DenseGeneral):
    """`nn.DenseGeneral` with a quantized kernel.

    `weight`, `activation` and errors are those of `QDense`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer = jaxq.nn.linen.QDenseGeneral((4, 16), weight="int4")
      >>> x = jnp.ones((2, 64))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 4, 16)
    """

    weight: Any = "int8"
    activation: Any = None

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return call_own_code(self, GENERAL, linen.DenseGeneral.__call__, inputs)


def _dense_roles(
    layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> Roles:
    return Roles((-2,), shape)


def _general_roles(
    layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> Roles:
    num_in, num_out = _length(layer.axis), _length(layer.features)
    contracting = tuple(range(-num_in - num_out, -num_out))
    return Roles(contracting, shape, _length(layer.batch_dims))


def _length(value: Any) -> int:
    """The number of elements of a sequence. An integer counts as one element."""
    return 1 if isinstance(value, int) else len(tuple(value))


def _dense_rows(layer: Any, x: jax.Array, *args: Any, **kwargs: Any) -> InputRows:
    return x, 0


def _general_rows(layer: Any, x: jax.Array, *args: Any, **kwargs: Any) -> InputRows:
    contracted = _positive_axes(layer.axis, x.ndim)
    batch = _positive_axes(layer.batch_dims, x.ndim)
    return contracted_rows(x, contracted, batch), len(batch)


def _positive_axes(axes: Any, ndim: int) -> list[int]:
    """Axes as sorted non-negative numbers."""
    return sorted((np.atleast_1d(np.asarray(axes, int)) % ndim).tolist())


def _problem(layer: Any, *args: Any, **kwargs: Any) -> str | None:
    return foreign_function(layer, "dot_general", lax.dot_general)


DENSE = register_linen_layer(
    LinenKind(
        name="Dense",
        weight="kernel",
        roles=_dense_roles,
        methods={linen.Dense.__call__: with_own_code(linen.Dense.__call__, "kernel")},
        problem=_problem,
        read_rows=_dense_rows,
        corrects_bias=True,
    )
)
GENERAL = register_linen_layer(
    LinenKind(
        name="DenseGeneral",
        weight="kernel",
        roles=_general_roles,
        methods={
            linen.DenseGeneral.__call__: with_own_code(
                linen.DenseGeneral.__call__, "kernel"
            )
        },
        problem=_problem,
        read_rows=_general_rows,
        corrects_bias=True,
    )
)
