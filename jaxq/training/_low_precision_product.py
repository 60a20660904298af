"""The product of a layer, whose three products are quantized by a recipe.

The forward pass computes `y = x w`. The backward pass computes `dx = dy w^T` and
`dw = x^T dy`. Rounding has no gradient here: the gradients are those of the float
product, computed from quantized operands.

An operand of two products is quantized once if the axis that is contracted does not
matter: with one scale for the tensor, or with square tiles.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq import kernels
from jaxq.methods import hadamard_matrix
from jaxq.qtensor import QuantSpec
from jaxq.training._factors import Factors, as_factors, is_turnable, multiply
from jaxq.training._precision_recipe import LowPrecision, ProductSpec


class Bounds(NamedTuple):
    """The largest magnitudes to represent with delayed scaling, float32 scalars."""

    x: jax.Array
    w: jax.Array


class Draw(enum.IntEnum):
    """What random numbers are for. Each has a key of its own."""

    X = 0
    W = 1
    DY_FOR_X = 2
    W_FOR_X = 3
    X_FOR_W = 4
    DY_FOR_W = 5
    FORWARD_SIGNS = 6
    INPUT_SIGNS = 7
    WEIGHT_SIGNS = 8


@dataclasses.dataclass(frozen=True)
class _Side:
    """One operand of one product.

    Attributes:
      spec: how it is quantized.
      hadamard: the size of the rotation, or None.
      axis: the contracted axis, -1 or -2.
      draw: which key rounds it stochastically.
      signs: which key draws the signs of the rotation. Both operands of a product have
        the same.
    """

    spec: QuantSpec | None
    hadamard: int | None
    axis: int
    draw: Draw
    signs: Draw

    def serves(self, other: _Side) -> bool:
        """True if this quantized operand is that of another product too."""
        is_rotated = self.hadamard is not None or other.hadamard is not None
        return self.spec == other.spec and not is_rotated and is_turnable(self.spec)


def _sides(product: ProductSpec, signs: Draw, axes, draws) -> tuple[_Side, _Side]:
    """The two operands of a product."""
    left, right = (
        _Side(spec, product.hadamard, axis, draw, signs)
        for spec, axis, draw in zip(
            (product.lhs, product.rhs), axes, draws, strict=True
        )
    )
    return left, right


class _Plan(NamedTuple):
    """The operands of the three products of a recipe."""

    x: _Side
    w: _Side
    dy_for_x: _Side
    w_for_x: _Side
    x_for_w: _Side
    dy_for_w: _Side


@functools.cache
def _plan(recipe: LowPrecision) -> _Plan:
    return _Plan(
        *_sides(recipe.forward, Draw.FORWARD_SIGNS, (-1, -1), (Draw.X, Draw.W)),
        *_sides(
            recipe.input_gradient,
            Draw.INPUT_SIGNS,
            (-1, -2),
            (Draw.DY_FOR_X, Draw.W_FOR_X),
        ),
        *_sides(
            recipe.weight_gradient,
            Draw.WEIGHT_SIGNS,
            (-2, -2),
            (Draw.X_FOR_W, Draw.DY_FOR_W),
        ),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def low_precision_product(
    recipe: LowPrecision,
    x: jax.Array,
    w: jax.Array,
    key: jax.Array | None,
    bounds: Bounds | None,
) -> jax.Array:
    """Computes `x w^T`, and its gradients, with operands that a recipe quantizes.

    Args:
      recipe: how the operands of the three products are quantized.
      x: float `[*batch, m, k]`.
      w: float `[*batch, n, k]`.
      key: PRNG key for stochastic rounding and for the signs of rotations. None rotates
        with fixed signs.
      bounds: the bounds of delayed scaling, or None.

    Returns:
      float32 `[*batch, m, n]`.
    """
    y, _ = _forward(recipe, x, w, key, bounds)
    return y


def _forward(recipe, x, w, key, bounds):
    plan = _plan(recipe)
    x_bound, w_bound = (None, None) if bounds is None else bounds
    x_factors = _quantized(x, plan.x, recipe, key, x_bound)
    w_factors = _quantized(w, plan.w, recipe, key, w_bound)
    y = multiply(x_factors, w_factors)
    y = kernels.mark_product(y, has_batch=x.ndim > 2, num_terms=x.shape[-1])
    # What the backward pass does not quantize again is saved in low precision.
    saved_x = x_factors.turned if plan.x.serves(plan.x_for_w) else x
    saved_w = w_factors.turned if plan.w.serves(plan.w_for_x) else w
    # Empty arrays tell the dtypes of the gradients.
    dtypes = jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype)
    return y, (saved_x, saved_w, key, bounds, dtypes)


def _backward(recipe, saved, dy):
    x, w, key, bounds, (x_like, w_like) = saved
    check_gradient_key(recipe, key)
    plan = _plan(recipe)
    x_bound, w_bound = (None, None) if bounds is None else bounds
    dy_for_x = _quantized(dy, plan.dy_for_x, recipe, key)
    if plan.dy_for_x.serves(plan.dy_for_w):
        dy_for_w = dy_for_x.turned
    else:
        dy_for_w = _quantized(dy, plan.dy_for_w, recipe, key)
    if not isinstance(w, Factors):
        w = _quantized(w, plan.w_for_x, recipe, key, w_bound)
    if not isinstance(x, Factors):
        x = _quantized(x, plan.x_for_w, recipe, key, x_bound)
    dx = multiply(dy_for_x, w)  # [*batch, m, k]
    dw = multiply(dy_for_w, x)  # [*batch, n, k]
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype), None, None


low_precision_product.defvjp(_forward, _backward)


def _quantized(
    x: jax.Array,
    side: _Side,
    recipe: LowPrecision,
    key: jax.Array | None,
    bound: jax.Array | None = None,
) -> Factors:
    """One operand, rotated and quantized."""
    if side.hadamard is not None:
        x = _rotated(x, side.hadamard, side.axis, draw_key(key, side.signs))
    needs_key = side.spec is not None and side.spec.needs_key
    return as_factors(
        x,
        side.spec,
        axis=side.axis,
        key=draw_key(key, side.draw) if needs_key else None,
        bound=bound,
        four_over_six=recipe.four_over_six,
    )


def check_gradient_key(recipe: LowPrecision, key: jax.Array | None) -> None:
    """Raises a ValueError if a gradient needs random numbers and there is no key."""
    if key is None and recipe.needs_key:
        raise ValueError(
            "training.low_precision: the recipe rounds gradients stochastically, "
            "and there is no key. In linen, pass rngs={'low_precision': key} to apply, "
            "with a new key in each step."
        )


def draw_key(key: jax.Array | None, draw: Draw) -> jax.Array | None:
    """The key of one operand or rotation of a call."""
    return None if key is None else jax.random.fold_in(key, int(draw))


def _rotated(x: jax.Array, size: int, axis: int, key: jax.Array | None) -> jax.Array:
    """Rotates blocks of an axis by `diag(signs) H / sqrt(size)`.

    An axis that `size` does not divide is padded with zeros. Both operands of a product
    are padded alike.

    Args:
      x: float `[*batch, rows, columns]`.
      size: of a block.
      axis: -1 or -2.
      key: PRNG key of the signs. None uses fixed signs.
    """
    rotation = jnp.asarray(hadamard_matrix(size) / math.sqrt(size), jnp.float32)
    if key is None:
        key = jax.random.key(0)
    signs = jax.random.rademacher(key, (size,), jnp.float32)
    rotation = signs[:, None] * rotation
    x = jnp.moveaxis(x, axis, -1)
    length = x.shape[-1]
    missing = -length % size
    widths = [(0, 0)] * (x.ndim - 1) + [(0, missing)]
    blocks = jnp.pad(x, widths).reshape(*x.shape[:-1], -1, size)
    rotated = jnp.einsum(
        "...i,ij->...j",
        blocks.astype(jnp.float32),
        rotation,
        precision=jax.lax.Precision.HIGHEST,
    )
    rotated = rotated.reshape(*x.shape[:-1], length + missing).astype(x.dtype)
    return jnp.moveaxis(rotated, -1, axis)
