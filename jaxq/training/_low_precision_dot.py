"""`dot_general` of low-precision training, in the form that Flax layers call it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxq.meshes import apply_out_sharding, call_on_auto_axes, explicit_spec
from jaxq.ops import einsum_numbers
from jaxq.qtensor import FLOATS, describe, is_traced
from jaxq.training._low_precision_product import Bounds, low_precision_product
from jaxq.training._precision_recipe import LowPrecision, as_low_precision

CALLER = "training.dot_general"


def dot_general(
    recipe: str | LowPrecision, *, key: jax.Array | None = None
) -> LowPrecisionDot:
    """A `lax.dot_general` whose products are quantized, forward and backward.

    Pass it to Flax layers as `dot_general=`. It has no state, so it takes recipes with
    current scaling. Stochastic recipes need `key`, and every call then draws the same
    random numbers. `jaxq.training.low_precision` gives each layer and step its own.

    Args:
      recipe: a name of `low_precision_recipes()`, or a `LowPrecision`.
      key: PRNG key for recipes that round stochastically. None for other recipes.

    Returns:
      A function with the arguments of `lax.dot_general`. The left operand is the input
      `x` and the right operand is the weight `w`. Two such functions are equal if their
      recipes and keys are equal, so `jax.jit` compiles once.

    Raises:
      TypeError: `recipe` is neither a name nor a `LowPrecision`, or `key` is traced.
      ValueError: no recipe has this name; the recipe has delayed scaling; the recipe
        rounds stochastically and `key` is None; or the recipe needs no key and `key`
        is given.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> dot = jaxq.training.dot_general("fp8")
      >>> layer = nnx.Linear(64, 8, dot_general=dot, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 64))).shape
      (2, 8)

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
    """
    recipe = as_low_precision(recipe, CALLER)
    if recipe.delayed is not None:
        raise ValueError(
            f"{CALLER}: delayed scaling needs a state. Use "
            "jaxq.training.low_precision(model, recipe), which keeps the state in the "
            "model, or jaxq.training.linen.dot_general_cls(recipe)."
        )
    if recipe.needs_key and key is None:
        raise ValueError(
            f"{CALLER}: the recipe rounds stochastically. Use "
            "jaxq.training.low_precision(model, recipe), which draws new random "
            "numbers in every step. Or pass key= for the same numbers in every call."
        )
    if key is None:
        return LowPrecisionDot(recipe)
    if not recipe.needs_key:
        raise ValueError(f"{CALLER}: the recipe needs no random numbers. Omit key=.")
    if is_traced(key):
        raise TypeError(
            f"{CALLER}: key is traced. Make the function outside jit, with a concrete "
            "key."
        )
    words: Any = key
    if not jnp.issubdtype(words.dtype, jax.dtypes.prng_key):
        words = jax.random.wrap_key_data(words)
    data = np.asarray(jax.random.key_data(words)).ravel().tolist()
    return LowPrecisionDot(recipe, tuple(data), str(jax.random.key_impl(words)))


@dataclasses.dataclass(frozen=True)
class LowPrecisionDot:
    """The function that `dot_general` returns.

    Attributes:
      recipe: how operands are quantized.
      key_data: the words of the PRNG key, or None.
      key_impl: the name of the key's algorithm, or None.
    """

    recipe: LowPrecision
    key_data: tuple[int, ...] | None = None
    key_impl: str | None = None

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """As `lax.dot_general`. `precision` has no effect."""
        key = None
        if self.key_data is not None:
            words = jnp.asarray(self.key_data, jnp.uint32)
            key = jax.random.wrap_key_data(words, impl=self.key_impl)
        return multiply_arrays(
            self.recipe,
            lhs,
            rhs,
            dimension_numbers,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            key=key,
        )


def multiply_arrays(
    recipe: LowPrecision,
    lhs: Any,
    rhs: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> jax.Array:
    """`lax.dot_general` by a recipe.

    Args:
      recipe: how operands are quantized.
      lhs: the input, float32, bfloat16 or float16.
      rhs: the weight, likewise.
      dimension_numbers: as in `lax.dot_general`.
      precision: has no effect.
      preferred_element_type: dtype of the result. None uses the dtype that the operands
        promote to.
      out_sharding: as in `jaxq.dot_general`.
      key: PRNG key, or None.
      bounds: the bounds of delayed scaling, or None.

    Raises:
      TypeError: an operand is not a float array.
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    check_operands(lhs, rhs, CALLER)
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    left = _Axes.of(lhs.ndim, lhs_contracted, lhs_batch)
    right = _Axes.of(rhs.ndim, rhs_contracted, rhs_batch)
    dtype = preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype)

    def product(lhs, rhs, key, bounds):
        x, w = left.as_rows(lhs), right.as_rows(rhs)
        y: Any = low_precision_product(recipe, x, w, key, bounds)
        sizes = [lhs.shape[axis] for axis in (*left.batch, *left.free)]
        sizes += [rhs.shape[axis] for axis in right.free]
        return y.reshape(sizes).astype(dtype)

    left_names, right_names = explicit_spec(lhs), explicit_spec(rhs)
    names = [left_names[axis] for axis in (*left.batch, *left.free)]
    names += [right_names[axis] for axis in right.free]
    y = call_on_auto_axes(product, PartitionSpec(*names), lhs, rhs, key, bounds)
    return apply_out_sharding(y, out_sharding)


def einsum_arrays(
    recipe: LowPrecision,
    subscripts: str,
    lhs: Any,
    rhs: Any,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> jax.Array:
    """`jnp.einsum` of two operands by a recipe. The arguments are as above.

    Raises:
      ValueError: `subscripts` break a rule of `jaxq.einsum`.
    """
    dims, order = einsum_numbers(subscripts, jnp.ndim(lhs), jnp.ndim(rhs))
    y = multiply_arrays(
        recipe,
        lhs,
        rhs,
        dims,
        preferred_element_type=preferred_element_type,
        key=key,
        bounds=bounds,
    )
    return apply_out_sharding(jnp.transpose(y, order), out_sharding)


def check_operands(lhs: jax.Array, rhs: jax.Array, caller: str) -> None:
    """Raises a TypeError unless both operands are floats of at most 32 bits."""
    for x in (lhs, rhs):
        if x.dtype.name not in FLOATS:
            raise TypeError(
                f"{caller}: operands must be float32, bfloat16 or float16, got "
                f"{describe(x.dtype.name, x.shape)}."
            )


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The roles of the axes of an operand, as non-negative numbers."""

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contracted: tuple[int, ...]

    @classmethod
    def of(cls, ndim: int, contracted: Sequence[int], batch: Sequence[int]) -> _Axes:
        contracted = tuple(axis % ndim for axis in contracted)
        batch = tuple(axis % ndim for axis in batch)
        free = tuple(a for a in range(ndim) if a not in contracted and a not in batch)
        return cls(batch, free, contracted)

    def as_rows(self, x: jax.Array) -> jax.Array:
        """`[m, k]`, or `[b, m, k]` if there are batch axes."""
        sizes = [
            math.prod(x.shape[axis] for axis in axes)
            for axes in (self.batch, self.free, self.contracted)
        ]
        x = jnp.transpose(x, (*self.batch, *self.free, *self.contracted))
        return x.reshape(sizes if self.batch else sizes[1:])
