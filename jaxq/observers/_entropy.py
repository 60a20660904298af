"""The range that loses the least information, found in a histogram of magnitudes.

The steps are those of TensorRT: Szymon Migacz, "8-bit Inference with TensorRT" (GTC
2017). Let h be the histogram of n bins, and L the number of levels. The count of the
first bin is set to 0, as in TensorRT. This bin has the zeros, for example of a ReLU.
They need no levels, but they would decide the divergence. For each i from L to n:

1. P is h[:i]. The counts of all later bins are added to the last bin of P.
2. Q is h[:i] without the added counts, divided into L groups: bin j is in group
   floor(j L / i). The counts of a group are spread evenly over its bins that are not
   empty.
3. P and Q are normalised. The divergence D_i is the sum of P ln(P / Q) over the bins
   where P is not 0. It is infinite if Q is 0 in one of these bins.
4. The counts are a sample. So D_i is not 0 even if the true density is constant inside
   each group. Its mean is then (F - G) / (2 N), with N counts in F bins and G groups
   that are not empty. This mean is subtracted. It grows with i. Without this step a
   sample of 1000 numbers would lose its largest numbers to sampling noise.

The threshold is the width of i bins, for the i with the smallest D_i. If several D_i
are equal, the largest i is used. A threshold is invalid if it leaves out more than 1/32
of the counts that a level has on average, N / (32 L). D_i is also small if nearly all
numbers are left out, or if most of the other numbers are in one bin. If no threshold is
valid, the range is that of the extremes.

L is the number of levels of the magnitudes. Symmetric codes have the levels from 0 up:
128 for int8, 16 for uint4. With a zero point, the C codes are divided between both
sides of 0. The reach of a side is its largest magnitude, or the threshold if that is
smaller. With reaches a >= b, L is floor((C - 1) a / (a + b)) + 1. So L is C if all
numbers have one sign, and about C / 2 if both sides reach the threshold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.formats import Format
from jaxq.observers import _numbers
from jaxq.observers._histogram import Histogram, of_magnitudes
from jaxq.observers._numbers import Count
from jaxq.observers._observer import RangeKind, enclose, mirror

# A threshold is invalid if it leaves out more than this share of a level's mean count.
_MOST_LEFT_OUT = 1 / 32
# How many candidates are computed together. Each needs memory for all bins.
_NUM_TOGETHER = 64
# The largest number of floats in memory if there are many channels.
_MOST_NUMBERS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Entropy(Histogram):
    """See `entropy`."""

    kind: ClassVar[str] = "entropy"

    def _check(self, fmt, range_kind):
        if fmt.bits <= 16 and np.ptp(np.diff(np.unique(fmt.values()))) > 0:
            raise ValueError(
                "entropy: the format must have evenly spaced numbers, and the numbers "
                f"of {fmt.name} are not evenly spaced. Use an integer format, or mse, "
                "percentile or absmax."
            )
        if fmt.bits > 16 or _num_levels_range(fmt, range_kind)[1] > self.bins:
            raise ValueError(
                f"entropy: {fmt.name} has more levels than the histogram has bins, "
                f"{self.bins}. Use more bins, or minmax or absmax."
            )

    def _bounds(self, state, fmt, range_kind):
        magnitude = _numbers.larger(jnp.abs(state.low), jnp.abs(state.high))
        rows = _numbers.map_words(
            lambda words: words.reshape(-1, 2, self.bins), state.counts
        )
        search = functools.partial(best_bin, fmt=fmt, range_kind=range_kind)
        batch_size = self._channels_together(len(rows.low))
        best, used = lax.map(search, rows, batch_size=batch_size)
        best, used = best.reshape(magnitude.shape), used.reshape(magnitude.shape)
        exponent = self._exponent(state.low, state.high)
        threshold = _numbers.times_power_of_two(best.astype(jnp.float32), exponent)
        # The last bin in use ends beyond the largest magnitude. If all bins in use are
        # kept, the threshold is the largest magnitude itself. The same is done if the
        # threshold was below the normal range and was flushed to zero.
        nothing_clipped = (best >= used) | (threshold == 0)
        threshold = jnp.where(nothing_clipped, magnitude, threshold)
        if range_kind is RangeKind.SYMMETRIC:
            return mirror(threshold, fmt)
        low, high = enclose(state.low, state.high, fmt, range_kind)
        # The levels of magnitudes begin at 0. A range without 0 has other levels.
        has_zero = (low <= 0) & (high >= 0)
        threshold = jnp.where(has_zero, threshold, magnitude)
        return _numbers.larger(low, -threshold), _numbers.smaller(high, threshold)

    def _bounds_of(self, x, keep, fmt, range_kind):
        channels = x.shape[:-1]
        bounds_of_row = super()._bounds_of
        if len(channels) == 0:
            return bounds_of_row(x, keep, fmt, range_kind)
        rows = x.reshape(-1, x.shape[-1]), keep.reshape(-1, x.shape[-1])
        low, high = lax.map(
            lambda row: bounds_of_row(row[0], row[1], fmt, range_kind),
            rows,
            batch_size=self._channels_together(len(rows[0])),
        )
        return low.reshape(channels), high.reshape(channels)

    def _channels_together(self, channels: int) -> int | None:
        """How many channels one step searches. None means one, without a batch axis."""
        together = min(channels, _MOST_NUMBERS // (_NUM_TOGETHER * self.bins))
        return together if together > 1 else None


def entropy(bins: int = 2048, *, axis: int | tuple[int, ...] | None = None) -> Entropy:
    """The threshold on |x| with the smallest Kullback-Leibler divergence.

    The divergence compares the distribution of the quantized magnitudes with the true
    distribution. The levels are evenly spaced, so this observer is for integer formats.
    With `symmetric=False` the range is clipped at the threshold of the magnitudes, and
    the codes are divided between both sides of 0. A range without 0
    (`include_zero=False`) is not clipped.

    Zeros do not count. Of n other numbers at most n / (32 L) are clipped, where L is
    the number of levels, for example 128 for int8. If no such threshold is better than
    the extremes, the range is that of the extremes.

    Args:
      bins: bins of the histogram on each side of 0, 2 to 32768. It must be at least the
        number of levels. Symmetric codes have the levels from 0 up. Asymmetric codes
        have as many levels as codes.
      axis: see `Observer`.

    Raises:
      ValueError: `bins` is not a whole number from 2 to 32768. `bounds` raises if the
        format has more levels than there are bins, or if its numbers are not evenly
        spaced, as in float and codebook formats.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> x = jax.random.normal(jax.random.key(0), (20000,)).at[0].set(30.0)
      >>> float(jaxq.observers.entropy().bounds_of(x, "int8")[1]) < 10
      True

    References:
      Migacz, "8-bit Inference with TensorRT" (GTC 2017).
    """
    return Entropy(bins=bins, axis=axis)


def _num_levels_range(fmt: Format, range_kind: RangeKind) -> tuple[int, int]:
    """The smallest and the largest number of levels that magnitudes can have."""
    values = fmt.values()
    if range_kind is RangeKind.SYMMETRIC:
        from_zero = int((values >= 0).sum())
        return from_zero, from_zero
    return (len(values) - 1) // 2 + 1, len(values)


class _Histogram(NamedTuple):
    """The tables of a histogram of n bins that the search reads.

    Attributes:
      mass: float32 `[n]`, the counts.
      windows: float32 `[n, widest]`. Row j has the counts of bin j and of the next
        bins. A group that starts at bin j is the beginning of row j.
      total: the sum of all counts.
      below: `[n + 1]`. Entry j is the sum of the counts below bin j.
      num_filled_below: int32 `[n + 1]`. Entry j says how many bins below bin j are not
        empty.
      num_used: int32, the number of bins up to the last one that is not empty.
    """

    mass: jax.Array
    windows: jax.Array
    total: Count
    below: Count
    num_filled_below: jax.Array
    num_used: jax.Array


def best_bin(
    counts: Count, fmt: Format, range_kind: RangeKind
) -> tuple[jax.Array, jax.Array]:
    """The best number of bins to keep, and the number of bins in use.

    For several channels, use `jax.vmap` or `lax.map`.

    Args:
      counts: `[2, n]`, the counts of positive and of negative numbers by magnitude.
      fmt: the format to quantize to.
      range_kind: where the range may lie.

    Returns:
      Two int32 scalars.
    """
    least, most = _num_levels_range(fmt, range_kind)
    counts = _numbers.map_words(lambda words: words.at[:, 0].set(0), counts)
    reach = [
        _num_used(_numbers.map_words(lambda words, side=side: words[side], counts))
        for side in (0, 1)
    ]
    histogram = _prepare(of_magnitudes(counts), jnp.maximum(*reach), least)

    def num_levels(i):
        if range_kind is RangeKind.SYMMETRIC:
            return np.int32(most)
        reach_below = [jnp.minimum(i, side) for side in reach]
        longer, both = jnp.maximum(*reach_below), sum(reach_below)
        return (most - 1) * longer // jnp.maximum(both, 1) + 1

    def divergence(i):
        return _divergence(histogram, i, num_levels(i), most)

    return _search(divergence, least, histogram)


def _prepare(counts: Count, num_used: jax.Array, least: int) -> _Histogram:
    """The tables of the search, from counts `[n]` of magnitudes."""
    n = counts.low.shape[0]
    widest = -(-n // least)  # the largest number of bins in a group
    mass = _numbers.as_float(counts)  # [n]
    window = np.arange(n)[:, None] + np.arange(widest)  # [n, widest]
    windows = jnp.pad(mass, (0, widest))[window]

    def sums_below(words):
        return jnp.pad(jnp.cumsum(words, dtype=words.dtype), (1, 0))

    # Sums of 64 bits and their differences are exact. In float32 a small group would be
    # lost beside large ones.
    below = _numbers.sum_counts(counts, sums_below)
    filled = ~_numbers.is_zero(counts)
    return _Histogram(
        mass=mass,
        windows=windows,
        total=_numbers.map_words(lambda words: words[-1], below),
        below=below,
        num_filled_below=sums_below(filled.astype(jnp.int32)),
        num_used=num_used,
    )


def _divergence(
    h: _Histogram, i: jax.Array, num_levels: jax.Array | np.int32, most: int
) -> jax.Array:
    """D_i of the module docstring, a float32 scalar.

    It is infinite if i is smaller than L or larger than the number of bins in use.

    Args:
      h: the histogram.
      i: int32, the number of bins to keep.
      num_levels: int32, L.
      most: the largest L that any i can have.
    """
    # Group g begins at ceil(g i / L). Groups from L on are empty.
    group_numbers = jnp.arange(most + 1, dtype=jnp.int32)
    edge = jnp.minimum(
        (group_numbers * i + num_levels - 1) // num_levels, i
    )  # [most + 1]
    below = _numbers.map_words(lambda words: words[edge], h.below)
    group_counts = _numbers.minus(
        _numbers.map_words(lambda words: words[1:], below),
        _numbers.map_words(lambda words: words[:-1], below),
    )
    group_mass = _numbers.as_float(group_counts)  # [most]
    num_filled = h.num_filled_below[edge]
    group_filled = (num_filled[1:] - num_filled[:-1]).astype(jnp.float32)  # [most]

    inside = _numbers.map_words(lambda words: words[i], h.below)
    outside = _numbers.as_float(_numbers.minus(h.total, inside))
    share_inside = _numbers.as_float(inside) / _numbers.as_float(h.total)
    # In a filled bin Q is group_mass / group_filled / inside. So P / Q is the count of
    # the bin times this factor.
    p_over_q = group_filled / jnp.where(group_mass > 0, group_mass, 1.0) * share_inside

    # Step 3 without the counts beyond i.
    length = edge[1:] - edge[:-1]  # [most]
    widest = h.windows.shape[1]
    in_group = jnp.arange(widest, dtype=jnp.int32)[None] < length[:, None]
    p = jnp.where(in_group, h.windows[edge[:-1]], 0.0)  # [most, widest]
    terms = _p_log_p_over_q(p, p_over_q[:, None])

    # The last bin of P also has the counts beyond i.
    last, last_p_over_q = h.mass[i - 1], p_over_q[num_levels - 1]
    with_outside = _p_log_p_over_q(last + outside, last_p_over_q)
    extra = with_outside - _p_log_p_over_q(last, last_p_over_q)

    total = _numbers.as_float(h.total)
    num_bins = h.num_filled_below[i].astype(jnp.float32)
    num_groups = jnp.sum(group_filled > 0, dtype=jnp.float32)
    noise = (num_bins - num_groups) / (2 * _numbers.as_float(inside))
    divergence = (jnp.sum(terms) + extra) / total - noise
    q_is_zero = (outside > 0) & (last == 0)
    mean_of_level = total / jnp.float32(num_levels)
    too_many = outside > np.float32(_MOST_LEFT_OUT) * mean_of_level
    invalid = q_is_zero | too_many | (i > h.num_used) | (i < num_levels)
    return jnp.where(invalid, np.float32(np.inf), divergence)


def _search(
    divergence: Callable[[jax.Array], jax.Array], least: int, h: _Histogram
) -> tuple[jax.Array, jax.Array]:
    """The best number of bins, at least `least`, and the number of bins in use."""
    n = h.mass.shape[0]
    # Candidates above n fill the last chunk. Their divergence is infinite.
    num_chunks = -(-(n + 1 - least) // _NUM_TOGETHER)
    candidates = least + np.arange(num_chunks * _NUM_TOGETHER, dtype=np.int32)
    chunks = jnp.asarray(candidates.reshape(num_chunks, _NUM_TOGETHER))
    divergences = lax.map(jax.vmap(divergence), chunks).reshape(-1)
    # argmin returns the first of equal numbers. In reverse order this is the largest i.
    from_end = jnp.argmin(divergences[::-1]).astype(jnp.int32)
    best = candidates[-1] - from_end
    # If fewer bins are in use than there are levels, no candidate is valid. Then all
    # bins are kept.
    best = jnp.where(jnp.min(divergences) < np.inf, best, h.num_used)
    return best, h.num_used


def _num_used(counts: Count) -> jax.Array:
    """The number of bins up to the last one that is not empty."""
    position = jnp.arange(1, counts.low.shape[0] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(_numbers.is_zero(counts), 0, position))


def _p_log_p_over_q(p: jax.Array, over_q: jax.Array) -> jax.Array:
    """`p ln(p * over_q)`, and 0 if p is 0."""
    return p * jnp.log(jnp.where(p > 0, p * over_q, 1.0))
