"""A histogram that grows with what it sees, and never depends on the order it saw it in.

Bins are a power of two wide: the narrowest width with which the `bins` bins on each side of 0 hold the largest
magnitude so far. When a batch exceeds them, neighbouring bins join in pairs, which loses no count and gives what
counting everything with the wider bins from the start would have given. So two states merge exactly, whatever their
widths.

Bin j holds `j <= |x| / width < j + 1`, found by shifting significands: no division, no rounding, no subnormal flushed.
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
from jaxq.observers._observer import Observer, Seen, enclose
from jaxq.observers._range import no_range, range_across, range_of

# Sums over the bins are of 2^16 terms at most (see `add_up`), and the entropy's products of bins stay in int32.
MOST_BINS = 1 << 15


class HistogramState(NamedTuple):
    """The extremes, float32 `[*channels]`, and counts `[*channels, 2, bins]` of positive and of negative magnitudes.

    The width of the bins follows from the extremes. Zero counts as positive.
    """

    seen: Seen
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
                f"{self.kind}: bins must be a whole number from 2 to {MOST_BINS}, got {self.bins!r}."
            )

    def table(self, state: HistogramState) -> tuple[jax.Array, jax.Array]:
        """What to plot: (edges, counts), ascending.

        Returns:
          edges: float32 `[*channels, 2 * bins + 1]`, from `-bins * width` to `bins * width`.
          counts: float32 `[*channels, 2 * bins]`; of numbers from one edge to below the next one, where positive.
        """
        whole = jnp.arange(-self.bins, self.bins + 1, dtype=jnp.float32)
        shape = (*state.low.shape, whole.size)
        exponent = jnp.broadcast_to(
            self._exponent(state.low, state.high)[..., None], shape
        )
        return _numbers.times_power(
            jnp.broadcast_to(whole, shape), exponent
        ), _numbers.as_float(ascending(state.counts))

    def _keeper(self):
        return Histogram(bins=self.bins, axis=self.axis)

    def _init(self, seen, shape):
        return HistogramState(
            seen, *no_range(shape), _numbers.no_count((*shape, 2, self.bins))
        )

    def _update(self, state, x, keep):
        low, high = range_of(x, keep)
        low, high = _numbers.smaller(state.low, low), _numbers.larger(state.high, high)
        exponent = self._exponent(low, high)
        old = _coarsen(state.counts, exponent - self._exponent(state.low, state.high))
        new = _numbers.as_count(self._count(x, keep, exponent))
        return state._replace(low=low, high=high, counts=_numbers.plus(old, new))

    def _across(self, state, axis_name):
        low, high = range_across(state.low, state.high, axis_name)
        own = _coarsen(
            state.counts,
            self._exponent(low, high) - self._exponent(state.low, state.high),
        )
        return state._replace(
            low=low,
            high=high,
            counts=_numbers.add_up(own, lambda words: lax.psum(words, axis_name)),
        )

    def _bounds(self, state: Any, fmt, symmetric):
        return enclose(state.low, state.high, fmt, symmetric)

    def _exponent(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """The width is 2 to this; int32 `[*channels]`. The least there is, -149, for an empty state."""
        pattern = jnp.maximum(
            _numbers.magnitude_pattern(low), _numbers.magnitude_pattern(high)
        )
        pattern = jnp.where(pattern < _numbers.INFINITY, pattern, np.uint32(0))
        digits, place = _numbers.significand(pattern)
        last = np.uint32(self.bins - 1)
        length = np.int32(32) - lax.clz(digits).astype(jnp.int32)
        shift = jnp.maximum(length - np.int32((self.bins - 1).bit_length()), 0)
        shift = shift + (
            lax.shift_right_logical(digits, shift.astype(jnp.uint32)) > last
        ).astype(jnp.int32)
        return place - 150 + shift

    def _count(self, x: jax.Array, keep: jax.Array, exponent: jax.Array) -> jax.Array:
        """One batch `[*channels, n]` in bins of width `2^exponent`; uint32 `[*channels, 2, bins]`."""
        digits, place = _numbers.significand(_numbers.magnitude_pattern(x))
        shift = jnp.clip(exponent[..., None] + 150 - place, 0, 31).astype(jnp.uint32)
        index = lax.shift_right_logical(digits, shift).astype(jnp.int32)
        return count_signed(x, index, keep, self.bins)


def histogram(
    bins: int = 2048, *, axis: int | tuple[int, ...] | None = None
) -> Histogram:
    """A histogram that grows by powers of two; its bounds are the extremes, and `table(state)` is there to look at.

    The state of `mse` and `entropy`, which find a better range in it.

    Args:
      bins: on each side of 0, at least half of them used by what was seen; 2 to 32768.
      axis: see `Observer`.

    Raises:
      ValueError: bins out of range.

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
    """How often each index comes with a positive and with a negative number; uint32 `[*channels, 2, num_bins]`."""
    shape = x.shape[:-1]
    negative = (_numbers.ordered(x) < -1).astype(jnp.int32)  # neither zero
    channel = jnp.arange(int(np.prod(shape)), dtype=jnp.int32).reshape(*shape, 1)
    row = jnp.broadcast_to(channel * 2, x.shape) + negative
    return _numbers.tally(
        row, index, keep, (2 * int(np.prod(shape)), num_bins)
    ).reshape(*shape, 2, num_bins)


def folded(counts: Count) -> Count:
    """`[..., 2, bins]` as `[..., bins]` of magnitudes."""
    positive, negative = (
        Count(*(words[..., i, :] for words in counts)) for i in (0, 1)
    )
    return _numbers.plus(positive, negative)


def ascending(counts: Count) -> Count:
    """`[..., 2, bins]` as `[..., 2 * bins]`, from the most negative bin to the most positive."""
    return Count(
        *(
            jnp.concatenate([words[..., 1, ::-1], words[..., 0, :]], axis=-1)
            for words in counts
        )
    )


def _coarsen(counts: Count, times: jax.Array) -> Count:
    """Joins neighbouring bins `times` times, `[*channels]`; beyond what empties all but the first, no more."""
    bins = counts.low.shape[-1]
    times = jnp.minimum(times, (bins - 1).bit_length())
    counts = _numbers.varying_like(counts, times)

    def join(carry):
        done, counts = carry
        first, second = (
            Count(
                *(
                    jnp.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, bins % 2)])[
                        ..., i::2
                    ]
                    for words in counts
                )
            )
            for i in (0, 1)
        )
        pairs = _numbers.plus(first, second)
        pairs = Count(
            *(
                jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, bins - w.shape[-1])])
                for w in pairs
            )
        )
        more = (done < times)[..., None, None]
        return done + 1, Count(
            *(jnp.where(more, new, old) for new, old in zip(pairs, counts, strict=True))
        )

    return lax.while_loop(
        lambda carry: jnp.any(carry[0] < times), join, (times * 0, counts)
    )[1]
