"""Percentiles without a sort.

Percentiles of one array are exact. The bits of floats have the order of the floats. So
bisection over the bits finds the number of a given rank. It needs at most 31 passes,
and each pass counts the numbers above a pivot. The passes read the array and write
nothing.

Percentiles of a stream are interpolated in a bucket. A bucket holds the floats with the
same exponent and the same first mantissa bits. The buckets are the same for every
stream, so states merge by adding counts. The width of a bucket is proportional to its
numbers. So outliers of any size do not make the buckets of other numbers wider.

If most numbers are zero, a percentile of all numbers is 0 or close to 0, and the range
would leave out most of the other numbers. Then the range is that of the extremes.
"""

from __future__ import annotations

import dataclasses
import fractions
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.observers import _numbers
from jaxq.observers._histogram import by_sign, count_signed
from jaxq.observers._numbers import Count
from jaxq.observers._observer import Observer, RangeKind, Totals, enclose, mirror
from jaxq.observers._range import no_range, range_across, range_of

METHODS = ("linear", "nearest_rank")
# The key of a number that is ignored, below every other key.
_IGNORED = np.int32(-(2**31))
# p has at most six decimals. So `tail` is a fraction of integers of at most 28 bits.
_DECIMALS = 6
_BITS = 28


class PercentileState(NamedTuple):
    """Extremes and counts, and the exact percentiles of a single batch.

    Attributes:
      totals: how many numbers were observed.
      low: float32 `[*channels]`, the smallest finite number.
      high: float32 `[*channels]`, the largest finite number.
      counts: `[*channels, 2, buckets]`. Index 0 counts the positive numbers by
        magnitude, index 1 the negative numbers.
      exact: float32 `[*channels, 3]`: the percentile of the magnitudes, the lower
        percentile of the numbers and the upper percentile of the numbers. They are
        valid while `batches` is 1, and otherwise 0.
      batches: uint32 `[*channels]`, the number of batches; 2 means 2 or more.
    """

    totals: Totals
    low: jax.Array
    high: jax.Array
    counts: Count
    exact: jax.Array
    batches: jax.Array


class _Query(NamedTuple):
    """A percentile to find.

    Attributes:
      side: which numbers the percentile is of: "high" for x, "low" for -x, "size" for
        |x|.
      tail: the share of these numbers that is above the percentile.
    """

    side: str
    tail: fractions.Fraction


@dataclasses.dataclass(frozen=True)
class Percentile(Observer):
    """See `percentile`."""

    kind: ClassVar[str] = "percentile"

    p: float = 99.9
    method: str = "linear"
    mantissa_bits: int = 4

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "p", float(self.p))
        if not 0 < self.p <= 100 or round(self.p, _DECIMALS) != self.p:
            raise ValueError(
                "percentile: p must be above 0 and at most 100, with at most "
                f"{_DECIMALS} decimals, got {self.p}."
            )
        formats.check_choice("percentile: method", self.method, METHODS)
        if not isinstance(self.mantissa_bits, int) or not 0 <= self.mantissa_bits <= 8:
            raise ValueError(
                "percentile: mantissa_bits must be a whole number from 0 to 8, got "
                f"{self.mantissa_bits!r}."
            )

    @property
    def _num_buckets(self) -> int:
        # 255 exponents of finite numbers, subnormals included.
        return 255 << self.mantissa_bits

    @property
    def _tail(self) -> fractions.Fraction:
        """The share of the magnitudes above the threshold."""
        return 1 - fractions.Fraction(str(self.p)) / 100

    @property
    def _few(self) -> fractions.Fraction:
        """The largest share of nonzero numbers for which the extremes are the range.

        The range of the percentiles leaves out the share `tail` of all numbers. If the
        share of nonzero numbers is twice the tail, this range leaves out half of them.
        For p below 75 there are two other limits: at least half of all numbers, or p
        percent of them, are zero.
        """
        half = fractions.Fraction(1, 2)
        return min(2 * self._tail, max(self._tail, half))

    def _init(self, totals, shape):
        low, high = no_range(shape)
        return PercentileState(
            totals,
            low,
            high,
            counts=_numbers.zero_counts((*shape, 2, self._num_buckets)),
            exact=jnp.zeros((*shape, 3), jnp.float32),
            batches=jnp.zeros(shape, jnp.uint32),
        )

    def _update(self, state, x, keep):
        low, high = range_of(x, keep)
        pattern = _numbers.magnitude_pattern(x)
        bucket = (pattern >> (23 - self.mantissa_bits)).astype(jnp.int32)
        counts = _numbers.as_count(count_signed(x, bucket, keep, self._num_buckets))
        # The exact percentiles are valid for one batch. Later batches skip the search.
        exact = lax.cond(
            jnp.all(state.batches > 0),
            lambda: state.exact,
            lambda: self._exact(x, keep, ("size", "low", "high")),
        )
        not_empty = jnp.any(keep, axis=-1)
        batches = jnp.minimum(state.batches + not_empty.astype(jnp.uint32), 2)
        exact = jnp.where(not_empty[..., None], exact, state.exact)
        return PercentileState(
            state.totals,
            _numbers.smaller(state.low, low),
            _numbers.larger(state.high, high),
            counts=_numbers.plus(state.counts, counts),
            exact=jnp.where((batches == 1)[..., None], exact, 0.0),
            batches=batches,
        )

    def _across(self, state, axis_name):
        low, high = range_across(state.low, state.high, axis_name)
        batches = lax.psum(state.batches, axis_name)
        counts = _numbers.sum_counts(
            state.counts, lambda words: lax.psum(words, axis_name)
        )
        # If there is one batch in total, one device has it, and the others add 0.
        own_exact = jnp.where((state.batches == 1)[..., None], state.exact, 0.0)
        exact = lax.psum(own_exact, axis_name)
        return PercentileState(
            state.totals,
            low,
            high,
            counts=counts,
            exact=jnp.where((batches == 1)[..., None], exact, 0.0),
            batches=jnp.minimum(batches, 2),
        )

    def _bounds(self, state, fmt, range_kind):
        positive, negative = by_sign(state.counts)
        magnitudes = _numbers.plus(positive, negative)
        # The first bucket has the zeros. It also has the subnormal numbers below
        # 2^-130, and XLA on CPU reads them as zeros.
        zeros = _numbers.map_words(lambda words: words[..., 0], magnitudes)
        others = _numbers.as_float(_numbers.minus(state.totals.finite, zeros))
        share = np.float32(float(self._few))
        few = others <= share * _numbers.as_float(state.totals.finite)
        is_exact = state.batches == 1
        if range_kind is RangeKind.SYMMETRIC:
            threshold = self._threshold(state, magnitudes)
            largest = _numbers.larger(jnp.abs(state.low), jnp.abs(state.high))
            threshold = jnp.where(few, largest, threshold)
            return mirror(jnp.where(is_exact, state.exact[..., 0], threshold), fmt)
        high = self._from_top(positive, negative, self._tail / 2)
        low = -self._from_top(negative, positive, self._tail / 2)
        high, low = (
            _numbers.larger(_numbers.smaller(bound, state.high), state.low)
            for bound in (high, low)
        )
        low, high = jnp.where(few, state.low, low), jnp.where(few, state.high, high)
        low = jnp.where(is_exact, state.exact[..., 1], low)
        high = jnp.where(is_exact, state.exact[..., 2], high)
        return enclose(low, high, fmt, range_kind)

    def _threshold(self, state: PercentileState, magnitudes: Count) -> jax.Array:
        """The percentile of the magnitudes, from counts `[*channels, buckets]`."""
        nothing = _numbers.map_words(jnp.zeros_like, magnitudes)
        threshold = self._from_top(magnitudes, nothing, self._tail)
        # If all numbers have one sign, the smallest magnitude is one of the extremes.
        smallest = _numbers.larger(state.low, -state.high)
        largest = _numbers.larger(jnp.abs(state.low), jnp.abs(state.high))
        return _numbers.smaller(_numbers.larger(threshold, smallest), largest)

    def _bounds_of(self, x, keep, fmt, range_kind):
        if range_kind is RangeKind.SYMMETRIC:
            return mirror(self._exact(x, keep, ("size",))[..., 0], fmt)
        exact = self._exact(x, keep, ("low", "high"))
        return enclose(exact[..., 0], exact[..., 1], fmt, range_kind)

    def _exact(
        self, x: jax.Array, keep: jax.Array, sides: tuple[str, ...]
    ) -> jax.Array:
        """The exact percentiles of one array; float32 `[*channels, k]`.

        Args:
          x: float32 `[*channels, n]`.
          keep: bool `[*channels, n]`.
          sides: the side of each percentile, see `_Query`. "size" gives the percentile
            of the magnitudes. "low" and "high" give the ends of a range.
        """
        tails = {"size": self._tail, "low": self._tail / 2, "high": self._tail / 2}
        values = self._select(x, keep, [_Query(side, tails[side]) for side in sides])
        low, high = range_of(x, keep)
        largest = _numbers.larger(jnp.abs(low), jnp.abs(high))
        extremes = {"size": largest, "low": low, "high": high}
        is_zero = _numbers.magnitude_pattern(x) == 0
        number, others = _numbers.count_true(keep, keep & ~is_zero)  # [*channels]
        few = others <= _share(number, self._few)[0]
        results = []
        for side, value in zip(sides, values, strict=True):
            signed = -value if side == "low" else value
            results.append(jnp.where(few, extremes[side], signed))
        return jnp.stack(results, axis=-1)

    def _select(
        self, x: jax.Array, keep: jax.Array, queries: Sequence[_Query]
    ) -> list[jax.Array]:
        """The percentile of each query, by `method`; float32 `[*channels]` each.

        Each pass over x serves all queries, because reading x takes most of the time.

        Args:
          x: float32 `[*channels, n]`.
          keep: bool `[*channels, n]`.
          queries: one to three percentiles.
        """
        number = _numbers.count_true(keep)[0]  # [*channels]
        linear = self.method == "linear"
        # "linear" interpolates in the n - 1 spaces between n numbers.
        spaces = jnp.where(number > 0, number - 1, 0) if linear else number
        shares = [_share(spaces, query.tail) for query in queries]
        last = jnp.maximum(number, 1) - 1
        rank = jnp.stack([jnp.minimum(whole, last) for whole, _ in shares])
        # rank: [k, *channels], where 0 is the rank of the largest number
        keys = jnp.where(keep, _numbers.ordered_bits(x), _IGNORED)

        def count_from(pivots):
            """How many keys are at least the pivot; uint32 `[k, *channels]`."""
            # The barrier depends on the pivots, so XLA cannot move the keys of each
            # side out of the loop. It would store them as arrays.
            key, pivots = lax.optimization_barrier((keys, pivots))
            conditions = [
                _key_of_side(query.side, key) >= pivot[..., None]
                for query, pivot in zip(queries, pivots, strict=True)
            ]
            return jnp.stack(_numbers.count_true(*conditions))

        result = _bisect(count_from, rank, *_key_range(keys, queries))
        values = list(_numbers.from_ordered_bits(result))
        if not linear:
            return values
        # If another number has the same key, the next lower number is equal.
        repeated = count_from(result) > rank + 1
        for i, (query, (_, rest)) in enumerate(zip(queries, shares, strict=True)):
            key = _key_of_side(query.side, keys)
            lower_keys = jnp.where(key < result[i][..., None], key, _IGNORED)
            next_key = _numbers.largest(lower_keys, _IGNORED)
            next_value = jnp.where(
                repeated[i] | (rest == 0),
                values[i],
                _numbers.from_ordered_bits(next_key),
            )
            part = rest.astype(jnp.float32) * np.float32(1 / query.tail.denominator)
            mixed = (1 - part) * values[i] + part * next_value
            values[i] = jnp.where(next_value == values[i], values[i], mixed)
        return values

    def _from_top(
        self, above: Count, below: Count, tail: fractions.Fraction
    ) -> jax.Array:
        """The number above which a share `tail` of all numbers lies, from buckets.

        Args:
          above: counts `[*channels, buckets]` of positive numbers by magnitude.
          below: counts `[*channels, buckets]` of negative numbers by magnitude.
          tail: the share.

        Returns:
          float32 `[*channels]`, interpolated within a bucket. It is infinity if `tail`
          is 0. The caller then limits it to the largest number.
        """
        if tail == 0:
            return jnp.full(above.low.shape[:-1], np.inf, jnp.float32)

        def descending(above_words, below_words):
            return jnp.concatenate([above_words[..., ::-1], below_words], axis=-1)

        counts = _numbers.map_words(descending, above, below)
        sums = _numbers.as_float(
            _numbers.sum_counts(
                counts, lambda words: jnp.cumsum(words, axis=-1, dtype=words.dtype)
            )
        )  # [*channels, 2 * buckets]
        number = _numbers.as_float(counts)
        total = sums[..., -1:]
        rank = jnp.minimum(total * np.float32(float(tail)), total - 1)
        # The first bucket that reaches beyond the rank, and the depth of the rank in
        # this bucket.
        index = jnp.argmax(sums > rank, axis=-1, keepdims=True).astype(jnp.int32)
        bucket_number = jnp.take_along_axis(number, index, axis=-1)
        before = jnp.take_along_axis(sums, index, axis=-1) - bucket_number
        depth = (rank - before + 0.5) / jnp.maximum(bucket_number, 1.0)
        depth = jnp.clip(depth, 0, 1)[..., 0]
        return self._number_at(index[..., 0], depth)

    def _number_at(self, index: jax.Array, depth: jax.Array) -> jax.Array:
        """The number at a depth from 0 to 1 in a bucket. Bucket 0 has the largest."""
        buckets = self._num_buckets
        negative = index >= buckets
        bucket = jnp.where(negative, index - buckets, buckets - 1 - index)
        width = 1 << (23 - self.mantissa_bits)
        part = (jnp.where(negative, depth, 1 - depth) * width).astype(jnp.int32)
        pattern = bucket * np.int32(width) + jnp.minimum(part, width - 1)
        magnitude = lax.bitcast_convert_type(pattern, jnp.float32)
        return jnp.where(negative, -magnitude, magnitude)


def percentile(
    p: float = 99.9,
    *,
    method: str = "linear",
    mantissa_bits: int = 4,
    axis: int | tuple[int, ...] | None = None,
) -> Percentile:
    """The range that holds p percent of the numbers.

    A symmetric range holds p percent of |x|. Any other range holds p percent of x, and
    leaves out `(100 - p) / 2` percent at each end.

    Let a[0] to a[n - 1] be the n numbers in ascending order. "linear" interpolates at
    the position `p / 100 * (n - 1)`, as `numpy.percentile` does. "nearest_rank" takes
    `a[ceil(p / 100 * n) - 1]`. For the lower end of a range that is not symmetric, it
    counts from the smallest number up.

    If at most `2 (100 - p)` percent of the numbers are not zero, this range would leave
    out half of them or more. Then the range is that of the extremes. (For p below 75
    the extremes are the range if at least half of the numbers, or p percent of them,
    are zero.)

    `bounds_of` is exact. `bounds` is exact after one batch. After several batches
    `bounds` interpolates within a bucket. A bucket is 2^-mantissa_bits of a power of
    two wide. p = 100 is always exact.

    Args:
      p: percent, above 0 and at most 100, with at most six decimals.
      method: "linear" or "nearest_rank".
      mantissa_bits: 0 to 8. The state of each channel takes 4 kB times
        2^mantissa_bits.
      axis: see `Observer`.

    Raises:
      ValueError: `p` or `mantissa_bits` is out of range, or `method` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.observers import percentile
      >>> x = jnp.arange(1, 11) / 10
      >>> round(float(percentile(90).bounds_of(x)[1]), 3)
      0.91
      >>> round(float(percentile(90, method="nearest_rank").bounds_of(x)[1]), 3)
      0.9

    References:
      Hyndman and Fan, "Sample Quantiles in Statistical Packages" (1996), definitions 7
      and 1.
    """
    return Percentile(p=p, method=method, mantissa_bits=mantissa_bits, axis=axis)


def _bisect(
    count_from: Callable[[jax.Array], jax.Array],
    rank: jax.Array,
    least: jax.Array,
    most: jax.Array,
) -> jax.Array:
    """Finds the keys of the given ranks by bisection; int32 `[k, *channels]`.

    Args:
      count_from: how many keys are at least the pivots `[k, *channels]`.
      rank: uint32 `[k, *channels]`, 0 for the largest key.
      least: int32 `[k, *channels]`, not above the searched keys.
      most: int32 `[k, *channels]`, not below the searched keys.
    """

    def halve(bounds):
        least, most = bounds
        # The middle rounded up, without overflow.
        middle = (least >> 1) + (most >> 1) + ((least | most) & 1)
        enough = count_from(middle) > rank
        return jnp.where(enough, middle, least), jnp.where(enough, most, middle - 1)

    def unfinished(bounds):
        return jnp.any(bounds[0] < bounds[1])

    key, _ = lax.while_loop(unfinished, halve, (least, most))
    return key


def _key_range(
    keys: jax.Array, queries: Sequence[_Query]
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest key of each query's side; int32 `[k, *channels]`."""
    high = _numbers.largest(keys, _IGNORED)
    low = ~_numbers.largest(_key_of_side("low", keys), _IGNORED)
    bottom = {"high": low, "low": ~high, "size": jnp.zeros_like(low)}
    most = jnp.stack(
        [_numbers.largest(_key_of_side(q.side, keys), _IGNORED) for q in queries]
    )
    least = jnp.stack([bottom[query.side] for query in queries])
    # In an empty channel `most` is the ignored key.
    return jnp.minimum(least, most), most


def _key_of_side(side: str, key: jax.Array) -> jax.Array:
    """Turns keys of x into keys of -x ("low") or |x| ("size"). This swaps 0 and -0."""
    if side == "high":
        return key
    changed = ~key if side == "low" else key ^ (key >> 31)
    return jnp.where(key == _IGNORED, _IGNORED, changed)


def _share(number: jax.Array, part: fractions.Fraction) -> tuple[jax.Array, jax.Array]:
    """`number * part` exactly, as a whole number and a remainder.

    With number = a * denominator + b, `a * numerator` is a whole number. `b *
    numerator` may exceed 32 bits, so it is divided bit by bit.

    Args:
      number: uint32.
      part: at most 1. Numerator and denominator have at most `_BITS` bits.

    Returns:
      whole: uint32, `floor(number * part)`.
      rest: uint32, the remainder: `number * numerator` modulo the denominator.
    """
    numerator, denominator = part.numerator, np.uint32(part.denominator)
    whole, b = number // denominator, number % denominator

    def divide(step, carry):
        # Horner's rule over the bits of the numerator, the highest first.
        quotient, rest = (2 * value for value in carry)
        # With jax_disable_jit, step is an int.
        shift = jnp.asarray(_BITS - 1 - step, jnp.uint32)
        bit_is_set = (np.uint32(numerator) >> shift) & 1 == 1
        for addend in (0, jnp.where(bit_is_set, b, 0)):
            rest = rest + addend
            quotient = quotient + (rest >= denominator).astype(jnp.uint32)
            rest = rest % denominator
        return quotient, rest

    quotient, rest = lax.fori_loop(0, _BITS, divide, (b * 0, b * 0))
    return whole * np.uint32(numerator) + quotient, rest
