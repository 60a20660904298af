"""The range that loses least information, by TensorRT's steps over a histogram of magnitudes.

Szymon Migacz, "8-bit Inference with TensorRT" (GTC 2017). Of the histogram h of n bins and L levels, for every i from L
to n:

1. P is h[:i], with everything beyond added to its last bin.
2. Q is h[:i], without what was added, in L groups, bin j in group floor(j L / i); each group's mass is spread evenly
   over those of its bins that hold any.
3. Both are normalised, and D_i = sum of P ln(P / Q) where P is not 0: infinite where Q is 0 there.

The least D_i, the last of equals, gives the threshold: i bins' width.

L is how many levels magnitudes are told apart by. Symmetric codes have those from 0 up: 128 of int8, 16 of uint4. Codes
with a zero point are shared out over both sides as far as each reaches below the threshold: all n of them where numbers
have one sign, half where both sides reach it, and otherwise those of the longer side, `(n - 1) longer / (a + b) + 1`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.formats import Format
from jaxq.observers import _numbers
from jaxq.observers._histogram import Histogram, folded
from jaxq.observers._numbers import Count
from jaxq.observers._observer import mirror

# Candidates that are computed side by side; memory is this many times the bins.
_TOGETHER = 64
# Numbers that are held at once, at most, where there are many channels.
_HELD = 1 << 22


@dataclasses.dataclass(frozen=True)
class Entropy(Histogram):
    """See `entropy`."""

    kind: ClassVar[str] = "entropy"

    def _check(self, fmt, symmetric):
        if fmt.bits <= 16 and np.ptp(np.diff(np.unique(fmt.values()))) > 0:
            raise ValueError(
                f"entropy: the numbers of {fmt.name} are not evenly apart, and levels are counted as if they were. Use "
                "mse, percentile or absmax, or an integer format."
            )
        if fmt.bits > 16 or _levels(fmt, symmetric)[1] > self.bins:
            raise ValueError(
                f"entropy: {fmt.name} has more levels than the histogram has bins, {self.bins}; give it more bins, or "
                "use minmax or absmax."
            )

    def _bounds(self, state, fmt, symmetric):
        magnitude = _numbers.larger(jnp.abs(state.low), jnp.abs(state.high))
        rows = Count(*(words.reshape(-1, 2, self.bins) for words in state.counts))
        search = functools.partial(best_bin, fmt=fmt, symmetric=symmetric)
        best, used = lax.map(search, rows, batch_size=self._side_by_side(len(rows.low)))
        best, used = best.reshape(magnitude.shape), used.reshape(magnitude.shape)
        width = self._exponent(state.low, state.high)
        threshold = _numbers.times_power(best.astype(jnp.float32), width)
        # The last bin in use ends beyond the largest magnitude; and tiny widths are flushed.
        whole = (best >= used) | (threshold == 0)
        threshold = jnp.where(whole, magnitude, threshold)
        if symmetric:
            return mirror(threshold, fmt)
        zero = jnp.zeros_like(threshold)
        low, high = _numbers.smaller(state.low, zero), _numbers.larger(state.high, zero)
        return _numbers.larger(low, -threshold), _numbers.smaller(high, threshold)

    def _bounds_of(self, x, keep, fmt, symmetric):
        shape, one = x.shape[:-1], super()._bounds_of
        if len(shape) == 0:
            return one(x, keep, fmt, symmetric)
        rows = x.reshape(-1, x.shape[-1]), keep.reshape(-1, x.shape[-1])
        together = self._side_by_side(len(rows[0]))
        low, high = lax.map(
            lambda row: one(row[0], row[1], fmt, symmetric), rows, batch_size=together
        )
        return low.reshape(shape), high.reshape(shape)

    def _side_by_side(self, channels: int) -> int | None:
        """How many channels one step looks at; None for one, which then has no axis of its own and is faster."""
        together = min(channels, _HELD // (_TOGETHER * self.bins))
        return together if together > 1 else None


def entropy(bins: int = 2048, *, axis: int | tuple[int, ...] | None = None) -> Entropy:
    """The threshold on |x| with the least Kullback-Leibler divergence from the quantized to the true distribution.

    The levels are the numbers the format has from 0 up: 128 of int8, 16 of uint4. They are taken to be even steps, so
    this is for integers. `symmetric=False` cuts the range at the threshold of the magnitudes, and shares the codes out
    over both sides of it.

    Args:
      bins: of the histogram, see `histogram`; at least the number of levels, which is that of all codes without
        `symmetric`.
      axis: see `Observer`.

    Raises:
      ValueError: bins out of range; at `bounds`, fewer bins than the format has levels, or a format whose numbers are
        not evenly apart (floats, tables).

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> x = jax.random.normal(jax.random.key(0), (20000,)).at[0].set(30.0)
      >>> float(jaxq.observers.entropy().bounds_of(x, "int8")[1]) < 10
      True

    References:
      Migacz, "8-bit Inference with TensorRT" (GTC 2017).
    """
    return Entropy(bins=bins, axis=axis)


def _levels(fmt: Format, symmetric: bool) -> tuple[int, int]:
    """The least and the greatest number of levels."""
    values = fmt.values()
    from_zero, shared = int((values >= 0).sum()), (len(values) - 1) // 2 + 1
    return (from_zero, from_zero) if symmetric else (shared, len(values))


def best_bin(
    counts: Count, fmt: Format, symmetric: bool
) -> tuple[jax.Array, jax.Array]:
    """The best number of bins to keep for counts `[2, n]` of positive and of negative magnitudes, and those in use.

    Both int32 scalars; channels by `jax.vmap`.
    """
    least, most = _levels(fmt, symmetric)
    sides = [_in_use(Count(*(words[side] for words in counts))) for side in (0, 1)]
    used = jnp.maximum(*sides)
    counts = folded(counts)
    bins = counts.low.shape[0]
    widest = -(-bins // least)  # no group has more bins
    held = ~_numbers.is_zero(counts)
    mass = _numbers.as_float(counts)
    # The bins from every bin on, `[n, widest]`: a group is the beginning of a row.
    rows = jnp.pad(mass, (0, widest))[np.arange(bins)[:, None] + np.arange(widest)]

    def from_zero(words):
        return jnp.pad(jnp.cumsum(words, dtype=words.dtype), (1, 0))

    # Sums of 64 bits and their differences are exact: float32 sums would lose small groups beside large.
    below, held_below = (
        _numbers.add_up(counts, from_zero),
        from_zero(held.astype(jnp.int32)),
    )  # [n + 1]
    total = Count(*(words[-1] for words in below))

    def num_levels(i):
        if symmetric:
            return np.int32(most)
        reach = jnp.maximum(jnp.minimum(i, sides[0]), jnp.minimum(i, sides[1]))
        both = jnp.minimum(i, sides[0]) + jnp.minimum(i, sides[1])
        return (most - 1) * reach // jnp.maximum(both, 1) + 1

    def divergence(i):
        levels = num_levels(i)
        # Where groups begin, [most + 1]; those behind the last level are empty.
        edge = jnp.minimum(
            (jnp.arange(most + 1, dtype=jnp.int32) * i + levels - 1) // levels, i
        )
        at, holding = Count(*(words[edge] for words in below)), held_below[edge]
        group = _numbers.as_float(
            _numbers.minus(Count(*(w[1:] for w in at)), Count(*(w[:-1] for w in at)))
        )
        inside = Count(*(words[i] for words in below))
        outside = _numbers.as_float(_numbers.minus(total, inside))
        share = _numbers.as_float(inside) / _numbers.as_float(total)
        # P / Q is h times this, [most]
        over_q = (
            (holding[1:] - holding[:-1]).astype(jnp.float32)
            / jnp.where(group > 0, group, 1.0)
            * share
        )
        length = edge[1:] - edge[:-1]
        in_group = jnp.arange(widest, dtype=jnp.int32)[None] < length[:, None]
        terms = _p_log_p_over_q(
            jnp.where(in_group, rows[edge[:-1]], 0.0), over_q[:, None]
        )  # [most, widest]
        last, last_over_q = mass[i - 1], over_q[levels - 1]
        extra = _p_log_p_over_q(last + outside, last_over_q) - _p_log_p_over_q(
            last, last_over_q
        )
        found = (jnp.sum(terms) + extra) / _numbers.as_float(total)
        lost = (outside > 0) & (last == 0)
        return jnp.where(lost | (i > used) | (i < levels), np.float32(np.inf), found)

    # Candidates beyond the bins fill the last chunk: their divergence is infinite.
    candidates = least + np.arange(
        -(-(bins + 1 - least) // _TOGETHER) * _TOGETHER, dtype=np.int32
    )
    found = lax.map(
        jax.vmap(divergence), jnp.asarray(candidates.reshape(-1, _TOGETHER))
    ).reshape(-1)
    best = candidates[-1] - jnp.argmin(found[::-1]).astype(
        jnp.int32
    )  # the last of equals
    return jnp.where(
        jnp.min(found) < np.inf, best, used
    ), used  # with fewer bins in use than levels, all are kept


def _in_use(counts: Count) -> jax.Array:
    """The number of bins up to the last one that holds anything."""
    place = jnp.arange(1, counts.low.shape[0] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(_numbers.is_zero(counts), 0, place))


def _p_log_p_over_q(p: jax.Array, over_q: jax.Array) -> jax.Array:
    """`p ln(p * over_q)`, and 0 of 0."""
    return p * jnp.log(jnp.where(p > 0, p * over_q, 1.0))
