"""What methods know of a layer's inputs: statistics of fixed size that grow with every batch of rows.

Rows are tokens. Some are kept as they are, for methods that fit a layer's outputs; some others are held out of
everything else, for judging what was fitted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.observers import Observer

NUM_SAMPLES = 512
NUM_HELD_OUT = 256


class LayerStats(NamedTuple):
    """Statistics of the inputs of one layer, K numbers a row; stacked layers and experts lead in every array.

    Attributes:
      count: float32, rows in the statistics; 0 where the layer was never reached.
      mean: float32 `[K]`.
      absmean: float32 `[K]`, mean magnitude.
      low: float32 `[K]`, the least number of each channel.
      high: float32 `[K]`, the greatest.
      hessian: float32 `[K, K]`, `2 / count * sum x xT`, that of the squared error of the layer's output; or None.
      samples: float32 `[NUM_SAMPLES, K]`, rows spread over the batches; the first `num_samples` are filled.
      num_samples: int32.
      held_out: float32 `[NUM_HELD_OUT, K]`, rows that nothing else has seen.
      num_held_out: int32.
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
    num_samples: jax.Array
    held_out: jax.Array
    num_held_out: jax.Array
    observed: Any = None

    @property
    def absmax(self) -> jax.Array:
        """float32 `[K]`, the largest magnitude of each channel."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))


def empty_stats(k: int, *, hessian: bool = True, observer: Observer | None = None) -> LayerStats:
    """The statistics of no rows of k numbers."""
    vector, none = jnp.zeros((k,), jnp.float32), jnp.zeros((), jnp.int32)
    far = jnp.full((k,), np.inf, jnp.float32)
    return LayerStats(
        count=jnp.zeros((), jnp.float32),
        mean=vector,
        absmean=vector,
        low=far,
        high=-far,
        hessian=jnp.zeros((k, k), jnp.float32) if hessian else None,
        samples=jnp.zeros((NUM_SAMPLES, k), jnp.float32),
        num_samples=none,
        held_out=jnp.zeros((NUM_HELD_OUT, k), jnp.float32),
        num_held_out=none,
        observed=None if observer is None else observer.init(jax.ShapeDtypeStruct((1, k), jnp.float32)),
    )


def update_stats(
    stats: LayerStats, x: jax.Array, counts: jax.Array, held: jax.Array, observer: Observer | None = None
) -> LayerStats:
    """The statistics with more rows in them.

    Args:
      stats: so far.
      x: floats `[t, K]`.
      counts: bool `[t]`, False for rows that do not.
      held: bool `[t]`, True for rows to hold out.
      observer: whose state `stats.observed` is.
    """
    x = x.astype(jnp.float32)
    used = (counts & ~held)[:, None]  # [t, 1]
    rows = jnp.where(used, x, 0.0)
    added = jnp.sum(used, dtype=jnp.float32)
    count = stats.count + added
    share = added / jnp.maximum(count, 1)

    def mean(old: jax.Array, total: jax.Array) -> jax.Array:
        return old + (total / jnp.maximum(added, 1) - old) * share

    hessian = stats.hessian
    if hessian is not None:
        hessian = mean(hessian, 2 * jnp.dot(rows.T, rows, precision=lax.Precision.HIGHEST))
    samples, num_samples = _keep(stats.samples, stats.num_samples, x, used[:, 0])
    held_out, num_held_out = _keep(stats.held_out, stats.num_held_out, x, counts & held)
    return LayerStats(
        count=count,
        mean=mean(stats.mean, jnp.sum(rows, 0)),
        absmean=mean(stats.absmean, jnp.sum(jnp.abs(rows), 0)),
        low=jnp.minimum(stats.low, jnp.min(jnp.where(used, x, np.inf), 0)),
        high=jnp.maximum(stats.high, jnp.max(jnp.where(used, x, -np.inf), 0)),
        hessian=hessian,
        samples=samples,
        num_samples=num_samples,
        held_out=held_out,
        num_held_out=num_held_out,
        observed=None if observer is None else observer.update(stats.observed, x, where=counts[:, None]),
    )


def _keep(kept: jax.Array, filled: jax.Array, x: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Puts up to an eighth of the places' number of wanted rows, evenly spread, behind the filled ones."""
    size = kept.shape[0]
    most = min(x.shape[0], size // 8)
    place = jnp.cumsum(wanted)  # of the i-th wanted row: i + 1
    total = place[-1]
    taken = jnp.minimum(total, most)
    order = jnp.arange(most)
    source = jnp.searchsorted(place, order * total // jnp.maximum(taken, 1) + 1)
    target = jnp.where(order < taken, filled + order, size)  # what is beyond the end is dropped
    kept = kept.at[target].set(x[jnp.minimum(source, x.shape[0] - 1)], mode="drop")
    return kept, jnp.minimum(filled + taken, size).astype(filled.dtype)
