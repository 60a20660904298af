"""Counts that neither stick nor wrap, and float32 seen as integers that order alike.

A float32 count sticks at 2^24 and an int32 one wraps at 2^31, so a `Count` is 64 bits in two uint32 words, whatever
`jax_enable_x64` says. XLA flushes subnormals on CPU, and its maxima may drop NaN there, so numbers are compared by
their bit patterns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

# The pattern of infinity: every finite magnitude is below it, every NaN above.
INFINITY = np.uint32(0x7F800000)
# How often `fold` halves: 2^7 ones fit a byte.
_HALVINGS = 7
# Below it XLA flushes to zero on CPU.
SMALLEST_NORMAL = np.float32(2.0**-126)


class Count(NamedTuple):
    """Whole numbers `high * 2^32 + low`, each word uint32 of the same shape."""

    low: jax.Array
    high: jax.Array


def no_count(shape: tuple[int, ...]) -> Count:
    """Zeros."""
    return Count(jnp.zeros(shape, jnp.uint32), jnp.zeros(shape, jnp.uint32))


def as_count(words: jax.Array) -> Count:
    """uint32 numbers as counts."""
    return Count(words, jnp.zeros_like(words))


def plus(a: Count, b: Count) -> Count:
    """`a + b`, exactly."""
    low = a.low + b.low
    return Count(low, a.high + b.high + (low < a.low).astype(jnp.uint32))


def minus(a: Count, b: Count) -> Count:
    """`a - b`, exactly, where `b` is not larger."""
    return Count(a.low - b.low, a.high - b.high - (a.low < b.low).astype(jnp.uint32))


def add_up(count: Count, add: Callable[[jax.Array], jax.Array]) -> Count:
    """A sum of counts, exactly.

    Args:
      count: what is summed.
      add: a sum over uint32 arrays, of at most 2^16 terms: `jnp.sum`, `jnp.cumsum`, `lax.psum`. It is called on each
        quarter of the 64 bits, whose sums cannot wrap, and the carries follow.
    """
    mask = np.uint32(0xFFFF)
    quarters = [count.low & mask, count.low >> 16, count.high & mask, count.high >> 16]
    carry, words = np.uint32(0), []
    for quarter in quarters:
        total = add(quarter) + carry
        words.append(total & mask)
        carry = total >> 16
    return Count(words[0] | (words[1] << 16), words[2] | (words[3] << 16))


def as_float(count: Count) -> jax.Array:
    """The nearest float32, or its neighbour."""
    return count.high.astype(jnp.float32) * np.float32(2.0**32) + count.low.astype(
        jnp.float32
    )


def is_zero(count: Count) -> jax.Array:
    return (count.low | count.high) == 0


def fold(x: jax.Array, meet: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """`[..., n]` made shorter by meeting halves with halves: `[..., m]`, each of which 2^7 numbers met in at most.

    XLA's own reduction of integers on CPU takes one number at a time; this takes as many as a register holds.
    """
    whole = x.shape[-1] >> _HALVINGS << _HALVINGS
    if whole == 0:
        return x
    head, tail = x[..., :whole], x[..., whole:]
    for _ in range(_HALVINGS):
        middle = head.shape[-1] // 2
        head = meet(head[..., :middle], head[..., middle:])
    return jnp.concatenate([head, tail], axis=-1) if tail.size else head


def largest(x: jax.Array, initial: Any) -> jax.Array:
    """The maximum of integers along the last axis."""
    return jnp.max(fold(x, jnp.maximum), axis=-1, initial=initial)


def count_true(*conditions: jax.Array) -> tuple[jax.Array, ...]:
    """How often each of up to four conditions `[..., n]` holds along the last axis, in one pass; uint32 `[...]`."""
    # A byte for each: up to 2^7 meet.
    packed = conditions[0].astype(jnp.uint32)
    for i, condition in enumerate(conditions[1:], 1):
        packed = packed | (condition.astype(jnp.uint32) << (8 * i))
    met = fold(packed, jnp.add)
    return tuple(
        jnp.sum((met >> (8 * i)) & np.uint32(255), axis=-1, dtype=jnp.uint32)
        for i in range(len(conditions))
    )


def tally(
    row: jax.Array, index: jax.Array, keep: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """How often each index occurs in each row; uint32 of `shape`, `[num_rows, num_bins]`.

    Args:
      row: int32, whole numbers below num_rows.
      index: int32 below num_bins, of the same shape.
      keep: bool; what is False is not counted.
      shape: (num_rows, num_bins).
    """
    size = shape[0] * shape[1]
    if size >= 2**31:
        raise ValueError(
            f"observers: {shape[0]} rows of {shape[1]} bins are too many for one state; use fewer bins."
        )
    place = jnp.where(keep, row * np.int32(shape[1]) + index, np.int32(size))
    counts = (
        jnp.zeros(size, jnp.uint32).at[place.reshape(-1)].add(np.uint32(1), mode="drop")
    )
    return counts.reshape(shape)


def varying_like(tree: Any, x: Any) -> Any:
    """`tree`, of the type of what depends on `x`.

    Inside `shard_map` types say along which mesh axes an array differs, and a loop's carry must have its last type from
    the start. A choice between equals depends on its condition, and XLA removes it.
    """
    if not isinstance(x, Tracer):
        return tree
    condition = jnp.any(x == x)
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, leaf), tree)


def magnitude_pattern(x: jax.Array) -> jax.Array:
    """The bits of `|x|`, uint32: they order as the magnitudes do."""
    return lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7FFFFFFF)


def ordered(x: jax.Array) -> jax.Array:
    """float32 as int32 that order alike, subnormals included, -0 just below 0."""
    pattern = lax.bitcast_convert_type(x, jnp.int32)
    return pattern ^ ((pattern >> 31) & np.int32(0x7FFFFFFF))


def unordered(key: jax.Array) -> jax.Array:
    """The float32 that `ordered` made `key` of."""
    return lax.bitcast_convert_type(
        key ^ ((key >> 31) & np.int32(0x7FFFFFFF)), jnp.float32
    )


def larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """`max(a, b)` that also tells subnormals apart."""
    return unordered(jnp.maximum(ordered(a), ordered(b)))


def smaller(a: jax.Array, b: jax.Array) -> jax.Array:
    """`min(a, b)` that also tells subnormals apart."""
    return unordered(jnp.minimum(ordered(a), ordered(b)))


def significand(pattern: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(m, e) with `|x| = m * 2^(e - 150)`: uint32 below 2^24 and int32 of at least 1; subnormals as they are."""
    biased = pattern >> 23
    implicit = jnp.where(biased > 0, np.uint32(1 << 23), np.uint32(0))
    return (pattern & np.uint32(0x7FFFFF)) | implicit, jnp.maximum(
        biased, np.uint32(1)
    ).astype(jnp.int32)


def times_power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """`x * 2^exponent`, exactly where the result is a normal number; |exponent| up to 252."""
    half = exponent >> 1
    for part in (half, exponent - half):
        x = x * lax.bitcast_convert_type((part + 127) << 23, jnp.float32)
    return x
