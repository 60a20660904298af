"""Counts of 64 bits, and comparisons of float32 by their bits.

A float32 count stops growing at 2^24. An int32 count overflows at 2^31. So a `Count`
has 64 bits in two uint32 words, with or without `jax_enable_x64`.

XLA on CPU flushes subnormal numbers to zero, and its maximum may drop NaN. So numbers
are compared as integers of the same order as the floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

# The bits of infinity. The bits of every finite magnitude are a smaller integer. The
# bits of every NaN are a larger integer.
INFINITY = np.uint32(0x7F800000)
# How often `combine_halves` halves an array. One byte can hold the sum of 2^7 ones.
_HALVINGS = 7
# XLA on CPU flushes smaller magnitudes to zero.
SMALLEST_NORMAL = np.float32(2.0**-126)


class Count(NamedTuple):
    """Whole numbers `high * 2^32 + low`. Both words are uint32 of the same shape."""

    low: jax.Array
    high: jax.Array


def zero_counts(shape: tuple[int, ...]) -> Count:
    return Count(jnp.zeros(shape, jnp.uint32), jnp.zeros(shape, jnp.uint32))


def as_count(words: jax.Array) -> Count:
    """uint32 numbers as counts."""
    return Count(words, jnp.zeros_like(words))


def plus(a: Count, b: Count) -> Count:
    """`a + b`, exactly."""
    low = a.low + b.low
    carry = (low < a.low).astype(jnp.uint32)
    return Count(low, a.high + b.high + carry)


def minus(a: Count, b: Count) -> Count:
    """`a - b`, exactly. `b` must not be larger than `a`."""
    borrow = (a.low < b.low).astype(jnp.uint32)
    return Count(a.low - b.low, a.high - b.high - borrow)


def sum_counts(counts: Count, add: Callable[[jax.Array], jax.Array]) -> Count:
    """The exact sum of counts.

    Args:
      counts: the counts to sum.
      add: a sum over uint32 arrays of at most 2^16 terms: `jnp.sum`, `jnp.cumsum` or
        `lax.psum`. It is called on each quarter of the 64 bits. Sums of 2^16 numbers of
        16 bits cannot overflow. The carries are added after the sums.
    """
    mask = np.uint32(0xFFFF)
    low, high = counts
    carry, words = np.uint32(0), []
    for quarter in (low & mask, low >> 16, high & mask, high >> 16):
        total = add(quarter) + carry
        words.append(total & mask)
        carry = total >> 16
    return Count(words[0] | (words[1] << 16), words[2] | (words[3] << 16))


def map_words(fn: Callable[..., jax.Array], *counts: Count) -> Count:
    """Applies `fn` to the low words and to the high words, to index or pad counts."""
    words = zip(*counts, strict=True)
    return Count(*(fn(*word) for word in words))


def as_float(count: Count) -> jax.Array:
    """A count as float32: the nearest number, or a neighbour of the nearest."""
    high = count.high.astype(jnp.float32) * np.float32(2.0**32)
    return high + count.low.astype(jnp.float32)


def is_zero(count: Count) -> jax.Array:
    return (count.low | count.high) == 0


def combine_halves(
    x: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Combines the two halves of an array, `_HALVINGS` times.

    `[..., n]` becomes `[..., m]`, where m is about n / 2^7. Each result combines at
    most 2^7 numbers. XLA's own reduction of integers on CPU reads one number at a time.
    This function reads as many numbers as a register holds.
    """
    whole = x.shape[-1] >> _HALVINGS << _HALVINGS
    if whole == 0:
        return x
    head, tail = x[..., :whole], x[..., whole:]
    for _ in range(_HALVINGS):
        middle = head.shape[-1] // 2
        head = combine(head[..., :middle], head[..., middle:])
    return jnp.concatenate([head, tail], axis=-1) if tail.size else head


def largest(x: jax.Array, initial: Any) -> jax.Array:
    """The maximum of integers and `initial`, along the last axis."""
    return jnp.max(combine_halves(x, jnp.maximum), axis=-1, initial=initial)


def count_true(*conditions: jax.Array) -> tuple[jax.Array, ...]:
    """How often each condition is True along the last axis, in one pass.

    Args:
      *conditions: one to four arrays of bool `[..., n]`.

    Returns:
      uint32 `[...]` for each condition.
    """
    # Each condition uses one byte of a word. A byte can hold the sum of 2^7 ones.
    packed = conditions[0].astype(jnp.uint32)
    for i, condition in enumerate(conditions[1:], 1):
        packed = packed | (condition.astype(jnp.uint32) << (8 * i))
    sums = combine_halves(packed, jnp.add)
    return tuple(
        jnp.sum((sums >> (8 * i)) & np.uint32(255), axis=-1, dtype=jnp.uint32)
        for i in range(len(conditions))
    )


def count_indices(
    row: jax.Array, index: jax.Array, keep: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """How often each index occurs in each row.

    Args:
      row: int32, from 0 to num_rows - 1.
      index: int32 of the same shape, from 0 to num_bins - 1.
      keep: bool of the same shape. An entry that is False is not counted.
      shape: (num_rows, num_bins).

    Returns:
      uint32 `[num_rows, num_bins]`.

    Raises:
      ValueError: num_rows * num_bins is 2^31 or more.
    """
    num_rows, num_bins = shape
    size = num_rows * num_bins
    if size >= 2**31:
        raise ValueError(
            f"observers: {num_rows} rows of {num_bins} bins are too many for one "
            "state. A state must have fewer than 2^31 bins in total. Use fewer bins."
        )
    # Entries that are not counted get an index beyond the end, and "drop" ignores it.
    place = jnp.where(keep, row * np.int32(num_bins) + index, np.int32(size))
    zeros = jnp.zeros(size, jnp.uint32)
    counts = zeros.at[place.reshape(-1)].add(np.uint32(1), mode="drop")
    return counts.reshape(shape)


def varying_like(tree: Any, x: Any) -> Any:
    """`tree` with arrays that vary over the same mesh axes as `x`.

    Inside `shard_map` the type of an array says over which mesh axes the array varies.
    The carry of a loop must have its final type from the start. `jnp.where` between two
    equal arrays gives them the type of the condition, and XLA removes it.
    """
    if not isinstance(x, Tracer):
        return tree
    condition = jnp.any(x == x)
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, leaf), tree)


def magnitude_pattern(x: jax.Array) -> jax.Array:
    """The bits of `|x|` as uint32. They sort in the order of the magnitudes."""
    return lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7FFFFFFF)


def ordered_bits(x: jax.Array) -> jax.Array:
    """Maps float32 to int32 and keeps the order, also of subnormals. -0 is below 0."""
    pattern = lax.bitcast_convert_type(x, jnp.int32)
    return pattern ^ ((pattern >> 31) & np.int32(0x7FFFFFFF))


def from_ordered_bits(key: jax.Array) -> jax.Array:
    """The inverse of `ordered_bits`."""
    pattern = key ^ ((key >> 31) & np.int32(0x7FFFFFFF))
    return lax.bitcast_convert_type(pattern, jnp.float32)


def larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """`max(a, b)`, also correct for subnormal numbers."""
    return from_ordered_bits(jnp.maximum(ordered_bits(a), ordered_bits(b)))


def smaller(a: jax.Array, b: jax.Array) -> jax.Array:
    """`min(a, b)`, also correct for subnormal numbers."""
    return from_ordered_bits(jnp.minimum(ordered_bits(a), ordered_bits(b)))


def significand(pattern: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(m, e) with `|x| = m * 2^(e - 150)`, also for subnormal numbers.

    Args:
      pattern: uint32, the bits of |x|.

    Returns:
      m: uint32 below 2^24.
      e: int32, at least 1.
    """
    biased = pattern >> 23
    implicit_bit = jnp.where(biased > 0, np.uint32(1 << 23), np.uint32(0))
    digits = (pattern & np.uint32(0x7FFFFF)) | implicit_bit
    return digits, jnp.maximum(biased, np.uint32(1)).astype(jnp.int32)


def times_power_of_two(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """`x * 2^exponent` for |exponent| <= 252. It is exact if the result is normal."""
    # 2^exponent itself may not be a float32, so the exponent is split in two.
    half = exponent >> 1
    for part in (half, exponent - half):
        x = x * lax.bitcast_convert_type((part + 127) << 23, jnp.float32)
    return x
