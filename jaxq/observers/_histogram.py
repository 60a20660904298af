"""A histogram whose range grows, and whose result does not depend on the order.

There are `bins` bins on each side of 0. Their width is a power of two: the smallest one
for which the bins hold the largest magnitude so far. If a batch exceeds the bins, pairs
of neighbouring bins are joined. The result is the same as if all numbers had been
counted in the wider bins from the start. So two states merge exactly, also if their
widths differ.

Bin j holds `j <= |x| / width < j + 1`. The index j is the significand of x, shifted to
the right. So nothing is divided or rounded, and no subnormal number is flushed to zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.observers import _numbers
from jaxq.observers._numbers import Count
from jaxq.observers._observer import Observer, Totals, enclose
from jaxq.observers._range import no_range, range_across, range_of

# Sums over the bins have at most 2^16 terms (see `sum_counts`), and the products of
# bins in `entropy` fit int32.
MOST_BINS = 1 << 15


class HistogramState(NamedTuple):
    """Extremes, and counts per bin. The width of the bins follows from the extremes.

    Attributes:
      totals: how many numbers were observed.
      low: float32 `[*channels]`, the smallest finite number.
      high: float32 `[*channels]`, the largest finite number.
      counts: `[*channels, 2, bins]`. Index 0 counts the positive numbers by magnitude,
        index 1 the negative numbers. Zero counts as positive.
    """

    totals: Totals
    low: jax.Array
    high: jax.Array
    counts: Count


@dataclasses.dataclass(frozen=True)
class Histogram(Observer):
    """See `histogram`."""

    kind: ClassVar[str] = "histogram"

    bins: int = 2048

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.bins, int) or not 2 <= self.bins <= MOST_BINS:
            raise ValueError(
                f"{self.kind}: bins must be a whole number from 2 to {MOST_BINS}, got "
                f"{self.bins!r}."
            )

    def table(self, state: HistogramState) -> tuple[jax.Array, jax.Array]:
        """Edges and counts of all bins, ascending, for a plot.

        Returns:
          edges: float32 `[*channels, 2 * bins + 1]`, from `-bins * width` to
            `bins * width`.
          counts: float32 `[*channels, 2 * bins]`. A number on an edge belongs to the
            bin that is farther from 0.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> obs = jaxq.observers.histogram(2)
          >>> state = obs.update(obs.init(jnp.zeros(3)), jnp.array([0.5, 1.0, -1.5]))
          >>> edges, counts = obs.table(state)
          >>> edges.tolist(), counts.tolist()
          ([-2.0, -1.0, 0.0, 1.0, 2.0], [1.0, 0.0, 1.0, 1.0])
        """
        edge_numbers = jnp.arange(-self.bins, self.bins + 1, dtype=jnp.float32)
        shape = (*state.low.shape, edge_numbers.size)
        exponent = self._exponent(state.low, state.high)[..., None]
        edges = _numbers.times_power_of_two(
            jnp.broadcast_to(edge_numbers, shape), jnp.broadcast_to(exponent, shape)
        )
        return edges, _numbers.as_float(ascending(state.counts))

    def _state_maker(self):
        # mse and entropy add settings that only `bounds` reads.
        return Histogram(bins=self.bins, axis=self.axis)

    def _init(self, totals, shape):
        counts = _numbers.zero_counts((*shape, 2, self.bins))
        return HistogramState(totals, *no_range(shape), counts)

    def _update(self, state, x, keep):
        low, high = range_of(x, keep)
        low, high = _numbers.smaller(state.low, low), _numbers.larger(state.high, high)
        exponent = self._exponent(low, high)
        old_exponent = self._exponent(state.low, state.high)
        old = _join_bins(state.counts, exponent - old_exponent)
        new = _numbers.as_count(self._count(x, keep, exponent))
        return state._replace(low=low, high=high, counts=_numbers.plus(old, new))

    def _across(self, state, axis_name):
        low, high = range_across(state.low, state.high, axis_name)
        exponent = self._exponent(low, high)
        own_exponent = self._exponent(state.low, state.high)
        own = _join_bins(state.counts, exponent - own_exponent)
        counts = _numbers.sum_counts(own, lambda words: lax.psum(words, axis_name))
        return state._replace(low=low, high=high, counts=counts)

    def _bounds(self, state: Any, fmt, range_kind):
        return enclose(state.low, state.high, fmt, range_kind)

    def _exponent(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """The exponent of the bin width `2^exponent`; int32 `[*channels]`.

        An empty state has the smallest exponent, -149.
        """
        low_pattern = _numbers.magnitude_pattern(low)
        pattern = jnp.maximum(low_pattern, _numbers.magnitude_pattern(high))
        # The extremes of an empty state are infinite.
        pattern = jnp.where(pattern < _numbers.INFINITY, pattern, np.uint32(0))
        digits, place = _numbers.significand(pattern)
        # The index of the largest magnitude is digits >> shift, and it must be at most
        # bins - 1. If bins is not a power of two, an index with as many bits as
        # bins - 1 can still be too large.
        last = np.uint32(self.bins - 1)
        length = np.int32(32) - lax.clz(digits).astype(jnp.int32)
        shift = jnp.maximum(length - np.int32((self.bins - 1).bit_length()), 0)
        index = lax.shift_right_logical(digits, shift.astype(jnp.uint32))
        shift = shift + (index > last).astype(jnp.int32)
        return place - 150 + shift

    def _count(self, x: jax.Array, keep: jax.Array, exponent: jax.Array) -> jax.Array:
        """Counts one batch `[*channels, n]` in bins of width `2^exponent`.

        Returns:
          uint32 `[*channels, 2, bins]`.
        """
        digits, place = _numbers.significand(_numbers.magnitude_pattern(x))
        shift = jnp.clip(exponent[..., None] + 150 - place, 0, 31).astype(jnp.uint32)
        index = lax.shift_right_logical(digits, shift).astype(jnp.int32)
        return count_signed(x, index, keep, self.bins)


def histogram(
    bins: int = 2048, *, axis: int | tuple[int, ...] | None = None
) -> Histogram:
    """A histogram whose bins grow by powers of two.

    Its bounds are the extremes. `table(state)` gives edges and counts. The observers
    `mse` and `entropy` find a better range in the same kind of state.

    Args:
      bins: bins on each side of 0, 2 to 32768. The bins reach at most about twice as
        far as the largest magnitude.
      axis: see `Observer`.

    Raises:
      ValueError: `bins` is not a whole number from 2 to 32768.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> obs = jaxq.observers.histogram(4)
      >>> state = obs.update(obs.init(jnp.zeros(3)), jnp.array([0.0, 1.5, -3.0]))
      >>> state = obs.update(state, jnp.array([7.0]))
      >>> edges, counts = obs.table(state)
      >>> edges.tolist()
      [-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0]
      >>> counts.tolist()
      [0.0, 0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 1.0]
    """
    return Histogram(bins=bins, axis=axis)


def count_signed(
    x: jax.Array, index: jax.Array, keep: jax.Array, num_bins: int
) -> jax.Array:
    """How often each index occurs with a positive and with a negative number.

    Args:
      x: float32 `[*channels, n]`. Only the signs are read. 0 and -0 count as positive.
      index: int32 `[*channels, n]`, from 0 to num_bins - 1.
      keep: bool `[*channels, n]`. An entry that is False is not counted.
      num_bins: the number of indices.

    Returns:
      uint32 `[*channels, 2, num_bins]`.
    """
    channels = x.shape[:-1]
    num_channels = int(np.prod(channels))
    negative = (_numbers.ordered_bits(x) < -1).astype(jnp.int32)  # -1 is the key of -0
    channel = jnp.arange(num_channels, dtype=jnp.int32).reshape(*channels, 1)
    row = jnp.broadcast_to(channel * 2, x.shape) + negative
    counts = _numbers.count_indices(row, index, keep, (2 * num_channels, num_bins))
    return counts.reshape(*channels, 2, num_bins)


def by_sign(counts: Count) -> tuple[Count, Count]:
    """The counts `[..., bins]` of positive and of negative numbers."""
    positive = _numbers.map_words(lambda words: words[..., 0, :], counts)
    negative = _numbers.map_words(lambda words: words[..., 1, :], counts)
    return positive, negative


def of_magnitudes(counts: Count) -> Count:
    """Adds the counts `[..., 2, bins]` of both signs; the result is `[..., bins]`."""
    return _numbers.plus(*by_sign(counts))


def ascending(counts: Count) -> Count:
    """Sorts counts `[..., 2, bins]`, most negative bin first: `[..., 2 * bins]`."""

    def join(words):
        return jnp.concatenate([words[..., 1, ::-1], words[..., 0, :]], axis=-1)

    return _numbers.map_words(join, counts)


def _join_bins(counts: Count, times: jax.Array) -> Count:
    """Joins pairs of neighbouring bins, `times` times in each channel.

    Args:
      counts: `[*channels, 2, bins]`.
      times: int32 `[*channels]`.
    """
    bins = counts.low.shape[-1]
    # After this many joins all numbers are in the first bin.
    times = jnp.minimum(times, (bins - 1).bit_length())
    counts = _numbers.varying_like(counts, times)

    def join(carry):
        num_done, counts = carry
        even, odd = (
            _numbers.map_words(
                lambda words, i=i: _pad(words, bins % 2)[..., i::2], counts
            )
            for i in (0, 1)
        )
        pairs = _numbers.plus(even, odd)
        joined = _numbers.map_words(
            lambda words: _pad(words, bins - words.shape[-1]), pairs
        )
        more = (num_done < times)[..., None, None]
        return num_done + 1, _numbers.map_words(
            lambda new, old: jnp.where(more, new, old), joined, counts
        )

    def unfinished(carry):
        return jnp.any(carry[0] < times)

    return lax.while_loop(unfinished, join, (times * 0, counts))[1]


def _pad(words: jax.Array, size: int) -> jax.Array:
    """`[..., n]` with `size` zeros at the end."""
    return jnp.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, size)])
