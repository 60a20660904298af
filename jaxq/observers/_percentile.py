"""Percentiles without a sort: exact on one array, by bisection; of a stream, to a bucket of floats.

Bit patterns of floats order as the floats do, so the number of rank k is found by halving the range of patterns, 31
times at most, each time counting what lies above: passes that read the array and write nothing.

Buckets are the floats that share their exponent and first mantissa bits. They are the same for every
stream, so states merge by adding counts. They are relative: outliers of any size cost no accuracy elsewhere.
"""

from __future__ import annotations

import dataclasses
import fractions
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.observers import _numbers
from jaxq.observers._histogram import count_signed
from jaxq.observers._numbers import Count
from jaxq.observers._observer import Observer, Seen, enclose, mirror
from jaxq.observers._range import no_range, range_across, range_of

METHODS = ("linear", "nearest_rank")
# The key of what is left out, below every other.
_NONE = np.int32(-(2**31))
# Decimals of a percentile: its fraction of 100 is exact in integers, of so many bits.
_DECIMALS = 6
_BITS = 28


class PercentileState(NamedTuple):
    """The extremes; counts `[*channels, 2, buckets]` of positive and of negative numbers; one batch's exact answer.

    `exact` is `[*channels, 3]`: of the magnitudes, and the lower and the upper one of the numbers. It holds
    while `batches`, which stops at 2, is 1.
    """

    seen: Seen
    low: jax.Array
    high: jax.Array
    counts: Count
    exact: jax.Array
    batches: jax.Array


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
                f"percentile: p must be above 0 and at most 100, with at most {_DECIMALS} decimals; got {self.p}."
            )
        formats.check_choice("percentile: method", self.method, METHODS)
        if not isinstance(self.mantissa_bits, int) or not 0 <= self.mantissa_bits <= 8:
            raise ValueError(
                f"percentile: mantissa_bits must be from 0 to 8, got {self.mantissa_bits!r}."
            )

    @property
    def _buckets(self) -> int:
        return 255 << self.mantissa_bits

    @property
    def _tail(self) -> fractions.Fraction:
        """The share of the magnitudes that lies above the threshold."""
        return 1 - fractions.Fraction(str(self.p)) / 100

    def _init(self, seen, shape):
        return PercentileState(
            seen,
            *no_range(shape),
            _numbers.no_count((*shape, 2, self._buckets)),
            jnp.zeros((*shape, 3), jnp.float32),
            jnp.zeros(shape, jnp.uint32),
        )

    def _update(self, state, x, keep):
        low, high = range_of(x, keep)
        index = (_numbers.magnitude_pattern(x) >> (23 - self.mantissa_bits)).astype(
            jnp.int32
        )
        new = _numbers.as_count(count_signed(x, index, keep, self._buckets))
        # A second batch ends the exact answer: no need to find it then.
        exact = lax.cond(
            jnp.all(state.batches > 0),
            lambda: state.exact,
            lambda: self._exact(x, keep, symmetric=None),
        )
        came = jnp.any(keep, axis=-1)
        batches = jnp.minimum(state.batches + came.astype(jnp.uint32), 2)
        exact = jnp.where(came[..., None], exact, state.exact)
        return PercentileState(
            state.seen,
            _numbers.smaller(state.low, low),
            _numbers.larger(state.high, high),
            _numbers.plus(state.counts, new),
            jnp.where((batches == 1)[..., None], exact, 0.0),
            batches,
        )

    def _across(self, state, axis_name):
        low, high = range_across(state.low, state.high, axis_name)
        batches = lax.psum(state.batches, axis_name)
        # At most one of them is not 0, where the sum is of use.
        exact = lax.psum(
            jnp.where((state.batches == 1)[..., None], state.exact, 0.0), axis_name
        )
        return PercentileState(
            state.seen,
            low,
            high,
            _numbers.add_up(state.counts, lambda words: lax.psum(words, axis_name)),
            jnp.where((batches == 1)[..., None], exact, 0.0),
            jnp.minimum(batches, 2),
        )

    def _bounds(self, state, fmt, symmetric):
        positive, negative = (
            Count(*(words[..., i, :] for words in state.counts)) for i in (0, 1)
        )
        nothing = Count(*(jnp.zeros_like(words) for words in positive))
        one = state.batches == 1
        largest = _numbers.larger(jnp.abs(state.low), jnp.abs(state.high))
        if symmetric:
            threshold = self._from_top(
                _numbers.plus(positive, negative), nothing, self._tail
            )
            # Not below the smallest magnitude, which is known where all numbers have one sign.
            threshold = _numbers.larger(
                threshold, _numbers.larger(state.low, -state.high)
            )
            threshold = _numbers.smaller(threshold, largest)
            return mirror(jnp.where(one, state.exact[..., 0], threshold), fmt)
        high = self._from_top(positive, negative, self._tail / 2)
        low = -self._from_top(negative, positive, self._tail / 2)
        high, low = (
            _numbers.larger(_numbers.smaller(v, state.high), state.low)
            for v in (high, low)
        )
        low, high = (
            jnp.where(one, state.exact[..., 1], low),
            jnp.where(one, state.exact[..., 2], high),
        )
        return enclose(low, high, fmt, symmetric)

    def _bounds_of(self, x, keep, fmt, symmetric):
        exact = self._exact(x, keep, symmetric=symmetric)
        if symmetric:
            return mirror(exact[..., 0], fmt)
        return enclose(exact[..., 0], exact[..., 1], fmt, symmetric)

    def _exact(
        self, x: jax.Array, keep: jax.Array, *, symmetric: bool | None
    ) -> jax.Array:
        """Of the magnitudes, or of the numbers from below and above, or (None) all three; `[*channels, k]`."""
        half = self._tail / 2
        asked = [] if symmetric is False else [("size", self._tail)]
        asked += [] if symmetric is True else [("low", half), ("high", half)]
        found = self._select(x, keep, asked)
        return jnp.stack(
            [
                -v if side == "low" else v
                for v, (side, _) in zip(found, asked, strict=True)
            ],
            axis=-1,
        )

    def _select(
        self, x: jax.Array, keep: jax.Array, asked: list[tuple[str, fractions.Fraction]]
    ) -> list[jax.Array]:
        """Of each channel of `[*channels, n]` the number above which a share of them lies, by `method`.

        For each (side, share) asked for; side says of which numbers: "high", x; "low", -x; "size", |x|. All are
        searched for at once: what takes time is to read the numbers.
        """
        number = _numbers.count_true(keep)[0]
        linear = self.method == "linear"
        spaces = jnp.where(number > 0, number - 1, 0) if linear else number
        shares = [_share(spaces, tail) for _, tail in asked]
        last = jnp.maximum(number, 1) - 1
        rank = jnp.stack(
            [jnp.minimum(share, last) for share, _ in shares]
        )  # [k, *channels], 0 of the largest
        keys = jnp.where(keep, _numbers.ordered(x), _NONE)

        def count(pivots):
            # The pivots stand in the way of XLA, which would make an array of every side's keys before the loop.
            key, pivots = lax.optimization_barrier((keys, pivots))
            pairs = zip(asked, pivots, strict=True)
            return jnp.stack(
                _numbers.count_true(
                    *(_from(side, key) >= p[..., None] for (side, _), p in pairs)
                )
            )

        def halve(carry):
            least, most = carry  # the answer lies between
            middle = (
                (least >> 1) + (most >> 1) + ((least | most) & 1)
            )  # rounded up, without overflow
            enough = count(middle) > rank
            return jnp.where(enough, middle, least), jnp.where(enough, most, middle - 1)

        most = jnp.stack(
            [_numbers.largest(_from(side, keys), _NONE) for side, _ in asked]
        )
        high = _numbers.largest(keys, _NONE)
        low = ~_numbers.largest(_from("low", keys), _NONE)
        bottom = {"high": low, "low": ~high, "size": jnp.zeros_like(low)}
        least = jnp.minimum(jnp.stack([bottom[side] for side, _ in asked]), most)
        at, _ = lax.while_loop(
            lambda carry: jnp.any(carry[0] < carry[1]), halve, (least, most)
        )
        values = list(_numbers.unordered(at))
        if not linear:
            return values
        more = count(at) > rank + 1  # there is another one of the same size
        for i, ((side, tail), (_, rest)) in enumerate(zip(asked, shares, strict=True)):
            key = _from(side, keys)
            below = _numbers.largest(
                jnp.where(key < at[i][..., None], key, _NONE), _NONE
            )
            following = jnp.where(
                more[i] | (rest == 0), values[i], _numbers.unordered(below)
            )
            share = rest.astype(jnp.float32) * np.float32(1 / tail.denominator)
            mixed = (1 - share) * values[i] + share * following
            values[i] = jnp.where(following == values[i], values[i], mixed)
        return values

    def _from_top(
        self, above: Count, below: Count, tail: fractions.Fraction
    ) -> jax.Array:
        """As `_select`, of counts by magnitude, `[*channels, buckets]` of positive numbers and of negative ones."""
        if tail == 0:  # the extremes, which the caller knows
            return jnp.full(above.low.shape[:-1], np.inf, jnp.float32)
        counts = Count(
            *(
                jnp.concatenate([u[..., ::-1], v], axis=-1)
                for u, v in zip(above, below, strict=True)
            )
        )
        sums = _numbers.as_float(
            _numbers.add_up(counts, lambda w: jnp.cumsum(w, axis=-1, dtype=w.dtype))
        )
        number = _numbers.as_float(counts)
        total = sums[..., -1:]
        rank = jnp.minimum(total * np.float32(float(tail)), total - 1)
        # The first bucket that reaches beyond the rank, and how deep in it the rank lies.
        index = jnp.argmax(sums > rank, axis=-1, keepdims=True).astype(jnp.int32)
        held = jnp.take_along_axis(number, index, axis=-1)
        before = jnp.take_along_axis(sums, index, axis=-1) - held
        depth = jnp.clip((rank - before + 0.5) / jnp.maximum(held, 1.0), 0, 1)[..., 0]
        index = index[..., 0]
        negative = index >= self._buckets
        bucket = jnp.where(negative, index - self._buckets, self._buckets - 1 - index)
        width = 1 << (23 - self.mantissa_bits)
        part = (jnp.where(negative, depth, 1 - depth) * width).astype(jnp.int32)
        magnitude = lax.bitcast_convert_type(
            bucket * np.int32(width) + jnp.minimum(part, width - 1), jnp.float32
        )
        return jnp.where(negative, -magnitude, magnitude)


def percentile(
    p: float = 99.9,
    *,
    method: str = "linear",
    mantissa_bits: int = 4,
    axis: int | tuple[int, ...] | None = None,
) -> Percentile:
    """The range that holds p percent: of |x| where symmetric, else of x, with as much left out below as above.

    With the n numbers ascending, a[0] to a[n - 1], "linear" interpolates at the position `p / 100 * (n - 1)`, as
    `numpy.percentile` does, and "nearest_rank" takes `a[ceil(p / 100 * n) - 1]`, or a[0]. Two-sided, p becomes
    `(100 - p) / 2` from either end (and "nearest_rank" counts from that end).

    `bounds_of`, and a state that has seen one batch, are exact. A state that has seen more knows counts of buckets of
    floats, each 2^-mantissa_bits of a binade wide, and interpolates in one. p = 100 is always exact.

    Args:
      p: percent, above 0 to 100, of at most six decimals.
      method: "linear" or "nearest_rank".
      mantissa_bits: 0 to 8; a state takes 4 kB times 2^mantissa_bits a channel.
      axis: see `Observer`.

    Raises:
      ValueError: p or mantissa_bits out of range, an unknown method.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> x = jnp.arange(1, 11) / 10
      >>> [round(float(jaxq.observers.percentile(90, method=m).bounds_of(x)[1]), 3) for m in ("linear", "nearest_rank")]
      [0.91, 0.9]

    References:
      Hyndman and Fan, "Sample Quantiles in Statistical Packages" (1996), definitions 7 and 1.
    """
    return Percentile(p=p, method=method, mantissa_bits=mantissa_bits, axis=axis)


def _share(number: jax.Array, part: fractions.Fraction) -> tuple[jax.Array, jax.Array]:
    """`number * part` as (floor, rest / denominator), exactly; uint32, `part` at most 1, its parts of `_BITS` bits.

    With number = a * denominator + b, `a * numerator` is whole, and `b * numerator` is divided bit by bit, so that
    nothing exceeds 32 bits.
    """
    numerator, denominator = part.numerator, np.uint32(part.denominator)
    whole, b = number // denominator, number % denominator

    def divide(step, carry):
        quotient, rest = (2 * part for part in carry)
        more = jnp.where(
            (np.uint32(numerator) >> (_BITS - 1 - step).astype(jnp.uint32)) & 1 == 1,
            b,
            0,
        )
        for extra in (0, more):
            rest = rest + extra
            quotient, rest = (
                quotient + (rest >= denominator).astype(jnp.uint32),
                rest % denominator,
            )
        return quotient, rest

    quotient, rest = lax.fori_loop(0, _BITS, divide, (b * 0, b * 0))
    return whole * np.uint32(numerator) + quotient, rest


def _from(side: str, key: jax.Array) -> jax.Array:
    """The keys of x as those of -x ("low") or of |x| ("size"); -0 and 0 trade places."""
    if side == "high":
        return key
    return jnp.where(key == _NONE, _NONE, ~key if side == "low" else key ^ (key >> 31))
