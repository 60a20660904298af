"""What methods know of a layer's inputs: statistics of fixed size that grow with every batch of rows.

Rows are tokens. Some, drawn evenly from all, are kept as they are for methods that fit a layer's outputs; an eighth is
held out of everything else, for judging what was fitted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.observers._observer import Observer

NUM_SAMPLES = 512
NUM_HELD_OUT = 256
_HELD_OUT = 8  # of so many parts of the data one is held out


class LayerStats(NamedTuple):
    """Statistics of the inputs of one layer, K numbers a row; stacked layers and experts lead in every array.

    Attributes:
      count: float32, rows in the statistics; 0 where the layer was never reached.
      mean: float32 `[K]`.
      absmean: float32 `[K]`, mean magnitude.
      low: float32 `[K]`, the least number of each channel.
      high: float32 `[K]`, the greatest.
      hessian: float32 `[K, K]`, `2 / count * sum x xT`, that of the squared error of the layer's output; or None.
      samples: float32 `[NUM_SAMPLES, K]`, rows drawn from all that counted, each as likely as any other; the first
        `num_samples` are filled, the rest are zeros.
      sample_ranks: float32 `[NUM_SAMPLES]`, what they were drawn by, falling; -1 where nothing is.
      held_out: float32 `[NUM_HELD_OUT, K]`, the same of rows that nothing else has seen.
      held_out_ranks: float32 `[NUM_HELD_OUT]`.
      num_calls: int32, how often the layer was called.
      observed: state of an observer (`jaxq.observers`) of all numbers, those of held-out rows too, for a static range;
        None without one.
    """

    count: jax.Array
    mean: jax.Array
    absmean: jax.Array
    low: jax.Array
    high: jax.Array
    hessian: jax.Array | None
    samples: jax.Array
    sample_ranks: jax.Array
    held_out: jax.Array
    held_out_ranks: jax.Array
    num_calls: jax.Array
    observed: Any = None

    @property
    def absmax(self) -> jax.Array:
        """float32 `[K]`, the largest magnitude of each channel."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))

    @property
    def num_samples(self) -> jax.Array:
        """int32, how many rows of `samples` are filled."""
        return jnp.sum(self.sample_ranks >= 0, axis=-1, dtype=jnp.int32)

    @property
    def num_held_out(self) -> jax.Array:
        """int32, how many rows of `held_out` are filled."""
        return jnp.sum(self.held_out_ranks >= 0, axis=-1, dtype=jnp.int32)


def empty_stats(
    k: int, *, hessian: bool = True, observer: Observer | None = None
) -> LayerStats:
    """The statistics of no rows of k numbers."""
    vector = jnp.zeros((k,), jnp.float32)
    far = jnp.full((k,), np.inf, jnp.float32)
    return LayerStats(
        count=jnp.zeros((), jnp.float32),
        mean=vector,
        absmean=vector,
        low=far,
        high=-far,
        hessian=jnp.zeros((k, k), jnp.float32) if hessian else None,
        samples=jnp.zeros((NUM_SAMPLES, k), jnp.float32),
        sample_ranks=jnp.full((NUM_SAMPLES,), -1, jnp.float32),
        held_out=jnp.zeros((NUM_HELD_OUT, k), jnp.float32),
        held_out_ranks=jnp.full((NUM_HELD_OUT,), -1, jnp.float32),
        num_calls=jnp.zeros((), jnp.int32),
        observed=None
        if observer is None
        else observer.init(jax.ShapeDtypeStruct((1, k), jnp.float32)),
    )


def update_stats(
    stats: LayerStats,
    x: jax.Array,
    counts: jax.Array,
    parts: jax.Array,
    observer: Observer | None = None,
) -> LayerStats:
    """The statistics with more rows in them.

    Args:
      stats: so far.
      x: floats `[t, K]`.
      counts: bool `[t]`, False for rows that do not.
      parts: int32 `[t]`, which part of the data each row is of: one in eight is held out, another one at every call.
      observer: whose state `stats.observed` is.
    """
    x = x.astype(jnp.float32)
    held = (parts + stats.num_calls) % _HELD_OUT == _HELD_OUT - 1
    used = (counts & ~held)[:, None]  # [t, 1]
    rows = jnp.where(used, x, 0.0)
    added = jnp.sum(used, dtype=jnp.float32)
    count = stats.count + added
    share = added / jnp.maximum(count, 1)

    def mean(old: jax.Array, total: jax.Array) -> jax.Array:
        return old + (total / jnp.maximum(added, 1) - old) * share

    hessian = stats.hessian
    if hessian is not None:
        hessian = mean(
            hessian, 2 * jnp.dot(rows.T, rows, precision=lax.Precision.HIGHEST)
        )
    ranks = _scattered(stats.num_calls, x.shape[0])
    samples, sample_ranks = _keep(
        stats.samples, stats.sample_ranks, x, jnp.where(used[:, 0], ranks, -1)
    )
    # A row that is not finite is always kept, so that it is found.
    ranks = jnp.where(jnp.isfinite(x).all(-1), ranks, np.inf)
    held_out, held_out_ranks = _keep(
        stats.held_out, stats.held_out_ranks, x, jnp.where(counts & held, ranks, -1)
    )
    return LayerStats(
        count=count,
        mean=mean(stats.mean, jnp.sum(rows, 0)),
        absmean=mean(stats.absmean, jnp.sum(jnp.abs(rows), 0)),
        low=jnp.minimum(stats.low, jnp.min(jnp.where(used, x, np.inf), 0)),
        high=jnp.maximum(stats.high, jnp.max(jnp.where(used, x, -np.inf), 0)),
        hessian=hessian,
        samples=samples,
        sample_ranks=sample_ranks,
        held_out=held_out,
        held_out_ranks=held_out_ranks,
        num_calls=stats.num_calls + 1,
        observed=None
        if observer is None
        else observer.update(stats.observed, x, where=counts[:, None]),
    )


def _scattered(call: jax.Array, size: int) -> jax.Array:
    """Numbers in [0, 1) as good as random, float32 `[size]`, others at every call: the finalizer of MurmurHash3.

    A layer's statistics are a program of their own in every model; a random generator would be most of it.
    """
    h = jnp.arange(size, dtype=jnp.uint32) + call.astype(jnp.uint32) * np.uint32(
        0x9E3779B9
    )
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * np.uint32(factor)
    return (h ^ (h >> 16)).astype(jnp.float32) * np.float32(2**-32)


def _keep(
    kept: jax.Array, ranks: jax.Array, x: jax.Array, new_ranks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of the rows kept and the new ones those of highest rank, and the ranks; a rank of -1 is none."""
    size = kept.shape[0]
    best, place = lax.top_k(jnp.concatenate([ranks, new_ranks]), size)
    old = (place < size)[:, None]
    rows = jnp.where(
        old, kept[jnp.minimum(place, size - 1)], x[jnp.maximum(place - size, 0)]
    )
    return jnp.where(best[:, None] >= 0, rows, 0.0), best
