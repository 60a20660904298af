"""Statistics of the inputs of one layer, as quantization methods need them.

The statistics have a fixed size, and every batch of rows updates them. A row is a
token. A random sample of the rows is kept for methods that fit a layer's outputs. One
row in eight is held out of all other statistics. Held-out rows measure how well the
result of a method works on rows that the method did not use.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxq.meshes import call_on_auto_axes
from jaxq.observers._observer import Observer

NUM_SAMPLES = 512
NUM_HELD_OUT = 256
# One of this many parts of the data is held out.
_HELD_OUT_PERIOD = 8
# The rank of a row that is not kept. The rank of a kept row is 0 or more.
_NO_RANK = -1


class LayerStats(NamedTuple):
    """Statistics of the inputs of one layer, whose rows have K numbers.

    For stacked layers and for experts, every array has leading axes.

    Attributes:
      count: float32, the number of rows; 0 if no row reached the layer.
      mean: float32 `[K]`.
      absmean: float32 `[K]`, the mean magnitude of each channel.
      low: float32 `[K]`, the smallest number of each channel.
      high: float32 `[K]`, the largest number of each channel.
      hessian: float32 `[K, K]`, `2 / count * sum of x xT`, the Hessian of the squared
        error of the layer's output; or None.
      samples: float32 `[NUM_SAMPLES, K]`, a uniform random sample of the rows. The
        first `num_samples` rows are filled. All later rows are zeros.
      sample_ranks: float32 `[NUM_SAMPLES]`, descending. The random number of each row
        of `samples`: the rows with the largest numbers are kept. -1 for an empty row.
      held_out: float32 `[NUM_HELD_OUT, K]`, a sample of the rows that no other
        statistic includes.
      held_out_ranks: float32 `[NUM_HELD_OUT]`, as `sample_ranks`.
      num_calls: int32, how often the layer was called.
      observed: the state of an observer (`jaxq.observers`) for static activation
        quantization. It includes all rows, also the held-out rows. None if there is no
        observer.
      patches: the `LayerStats` of the patches of a convolution's input, with a leading
        axis for the groups of features: the rows that its kernel multiplies as a
        matrix. None for other layers, and if they were not collected.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> x = jnp.array([[1.0, -2.0], [3.0, 0.0]])
      >>> counts, parts = jnp.ones(2, bool), jnp.zeros(2, int)
      >>> stats = jaxq.observers.empty_stats(2)
      >>> stats = jaxq.observers.update_stats(stats, x, counts, parts)
      >>> stats.mean.tolist(), stats.absmax.tolist(), int(stats.num_samples)
      ([2.0, -1.0], [3.0, 2.0], 2)
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
    patches: Any = None

    @property
    def absmax(self) -> jax.Array:
        """float32 `[K]`, the largest magnitude of each channel; 0 without a row."""
        magnitude = jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))
        return jnp.where(self.low <= self.high, magnitude, 0)

    @property
    def extremes(self) -> tuple[jax.Array, jax.Array]:
        """float32 `[K]` each: the smallest and the largest number of each channel.

        They include the rows of `held_out`, which `low` and `high` leave out. A static
        range covers these rows too, so it must be judged with these extremes.
        """
        is_filled = self.held_out_ranks[..., None] >= 0
        low = jnp.min(self.held_out, axis=-2, where=is_filled, initial=jnp.inf)
        high = jnp.max(self.held_out, axis=-2, where=is_filled, initial=-jnp.inf)
        return jnp.minimum(self.low, low), jnp.maximum(self.high, high)

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
    """The statistics before the first row.

    Args:
      k: how many numbers a row has.
      hessian: whether the statistics include the Hessian, which has k * k numbers.
      observer: the observer that makes the state `observed`, or None.
    """
    zeros = jnp.zeros((k,), jnp.float32)
    infinity = jnp.full((k,), np.inf, jnp.float32)
    observed = None
    if observer is not None:
        observed = observer.init(jax.ShapeDtypeStruct((1, k), jnp.float32))
    return LayerStats(
        count=jnp.zeros((), jnp.float32),
        mean=zeros,
        absmean=zeros,
        low=infinity,
        high=-infinity,
        hessian=jnp.zeros((k, k), jnp.float32) if hessian else None,
        samples=jnp.zeros((NUM_SAMPLES, k), jnp.float32),
        sample_ranks=jnp.full((NUM_SAMPLES,), _NO_RANK, jnp.float32),
        held_out=jnp.zeros((NUM_HELD_OUT, k), jnp.float32),
        held_out_ranks=jnp.full((NUM_HELD_OUT,), _NO_RANK, jnp.float32),
        num_calls=jnp.zeros((), jnp.int32),
        observed=observed,
    )


@functools.partial(jax.jit, static_argnames="observer")
def update_stats(
    stats: LayerStats,
    x: jax.Array,
    counts: jax.Array,
    parts: jax.Array,
    observer: Observer | None = None,
) -> LayerStats:
    """The statistics after one more batch of rows.

    Args:
      stats: the statistics so far.
      x: floats `[t, K]`.
      counts: bool `[t]`. A row is ignored if its entry is False, for example because
        it is padding.
      parts: int32 `[t]`, the part of the data that each row belongs to. One part in
        eight is held out. Each call holds out another part.
      observer: the observer that made the state `stats.observed`, or None.
    """
    update = functools.partial(_update_stats, observer)
    # Every device has all statistics, also on a mesh with explicit axes.
    specs = jax.tree.map(lambda _: PartitionSpec(), stats)
    return call_on_auto_axes(update, specs, stats, x, counts, parts)


def _update_stats(
    observer: Observer | None,
    stats: LayerStats,
    x: jax.Array,
    counts: jax.Array,
    parts: jax.Array,
) -> LayerStats:
    """As `update_stats`, on a mesh without explicit axes."""
    x = x.astype(jnp.float32)
    is_held_out = (parts + stats.num_calls) % _HELD_OUT_PERIOD == _HELD_OUT_PERIOD - 1
    used = (counts & ~is_held_out)[:, None]  # [t, 1]
    rows = jnp.where(used, x, 0.0)
    num_added = jnp.sum(used, dtype=jnp.float32)
    count = stats.count + num_added
    share = num_added / jnp.maximum(count, 1)

    def running_mean(old: jax.Array, total: jax.Array) -> jax.Array:
        return old + (total / jnp.maximum(num_added, 1) - old) * share

    hessian = stats.hessian
    if hessian is not None:
        products = jnp.dot(rows.T, rows, precision=lax.Precision.HIGHEST)
        hessian = running_mean(hessian, 2 * products)  # [K, K]
    ranks = _random_ranks(stats.num_calls, x.shape[0])
    sample_ranks = jnp.where(used[:, 0], ranks, _NO_RANK)
    samples = _keep_highest(stats.samples, stats.sample_ranks, x, sample_ranks)
    # A row that is not finite gets the highest rank, so that it is kept and reported.
    ranks = jnp.where(jnp.isfinite(x).all(-1), ranks, np.inf)
    held_out_ranks = jnp.where(counts & is_held_out, ranks, _NO_RANK)
    held_out = _keep_highest(stats.held_out, stats.held_out_ranks, x, held_out_ranks)
    observed = None
    if observer is not None:
        observed = observer.update(stats.observed, x, where=counts[:, None])
    return LayerStats(
        count=count,
        mean=running_mean(stats.mean, jnp.sum(rows, 0)),
        absmean=running_mean(stats.absmean, jnp.sum(jnp.abs(rows), 0)),
        low=jnp.minimum(stats.low, jnp.min(jnp.where(used, x, np.inf), 0)),
        high=jnp.maximum(stats.high, jnp.max(jnp.where(used, x, -np.inf), 0)),
        hessian=hessian,
        samples=samples[0],
        sample_ranks=samples[1],
        held_out=held_out[0],
        held_out_ranks=held_out[1],
        num_calls=stats.num_calls + 1,
        observed=observed,
        patches=stats.patches,
    )


def merge_stats(
    a: LayerStats, b: LayerStats, observer: Observer | None = None
) -> LayerStats:
    """The statistics of the rows of both, for example of two parts of the data.

    Counts, means, extremes and second moments are those of all rows, up to rounding.
    The samples are a sample of all rows.

    Args:
      a: statistics with any leading axes.
      b: statistics of the same shapes, made with the same observer.
      observer: the observer that made the states `observed`, or None.

    Returns:
      The merged statistics.

    Raises:
      ValueError: the shapes or the fields differ; or there are states of an observer,
        and `observer` is None.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq.observers import empty_stats, merge_stats, update_stats
      >>> def stats(x):
      ...     counts, parts = jnp.ones(len(x), bool), jnp.zeros(len(x), int)
      ...     return update_stats(empty_stats(1), x, counts, parts)
      >>> both = merge_stats(stats(jnp.ones((3, 1))), stats(jnp.zeros((1, 1))))
      >>> float(both.count), float(both.mean[0])
      (4.0, 0.75)
    """
    shapes = [jax.tree.map(jnp.shape, stats) for stats in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "merge_stats: the two statistics have different shapes or fields. Collect "
            "both for the same layer and with the same settings."
        )
    if a.observed is not None and observer is None:
        raise ValueError(
            "merge_stats: the statistics have the state of an observer. Pass "
            "observer=, the observer that made both."
        )
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)  # of the rows that `b` has

    def mean(left: jax.Array, right: jax.Array) -> jax.Array:
        missing_axes = (1,) * (left.ndim - share.ndim)
        return left + (right - left) * share.reshape(*share.shape, *missing_axes)

    samples = _merge_rows(a.samples, a.sample_ranks, b.samples, b.sample_ranks)
    held_out = _merge_rows(a.held_out, a.held_out_ranks, b.held_out, b.held_out_ranks)
    observed, patches, hessian = None, None, None
    if a.hessian is not None and b.hessian is not None:
        hessian = mean(a.hessian, b.hessian)
    if observer is not None and a.observed is not None:
        merge = observer.merge
        for _ in range(count.ndim):
            merge = jax.vmap(merge)
        observed = merge(a.observed, b.observed)
    if a.patches is not None:
        patches = merge_stats(a.patches, b.patches)
    return LayerStats(
        count=count,
        mean=mean(a.mean, b.mean),
        absmean=mean(a.absmean, b.absmean),
        low=jnp.minimum(a.low, b.low),
        high=jnp.maximum(a.high, b.high),
        hessian=hessian,
        samples=samples[0],
        sample_ranks=samples[1],
        held_out=held_out[0],
        held_out_ranks=held_out[1],
        num_calls=a.num_calls + b.num_calls,
        observed=observed,
        patches=patches,
    )


def _merge_rows(
    rows: jax.Array, ranks: jax.Array, more_rows: jax.Array, more_ranks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rows of highest rank of two samples `[..., size, K]`, and their ranks."""
    size = rows.shape[-2]
    all_ranks = jnp.concatenate([ranks, more_ranks], axis=-1)
    all_rows = jnp.concatenate([rows, more_rows], axis=-2)
    best, place = lax.top_k(all_ranks, size)
    return jnp.take_along_axis(all_rows, place[..., None], axis=-2), best


def scaled_stats(stats: LayerStats, factors: jax.Array) -> LayerStats:
    """The statistics of the same inputs, multiplied by one factor for each channel.

    Args:
      stats: statistics with any leading axes.
      factors: `[..., K]`, above 0, with the same leading axes.

    Returns:
      The statistics of `x * factors`. `observed` is None: a range of all channels does
      not say how each channel was distributed.
    """
    rows = factors[..., None, :]
    hessian = stats.hessian
    if hessian is not None:
        hessian = hessian * rows * factors[..., :, None]
    return stats._replace(
        mean=stats.mean * factors,
        absmean=stats.absmean * factors,
        low=stats.low * factors,
        high=stats.high * factors,
        hessian=hessian,
        samples=stats.samples * rows,
        held_out=stats.held_out * rows,
        observed=None,
    )


def _random_ranks(call: jax.Array, size: int) -> jax.Array:
    """Pseudo-random numbers in [0, 1), float32 `[size]`, different at each call.

    They are computed by the finalizer of MurmurHash3. The update of the statistics is
    compiled for every layer. A random generator of jax would be the largest part of the
    compiled program.
    """
    offset = call.astype(jnp.uint32) * np.uint32(0x9E3779B9)
    h = jnp.arange(size, dtype=jnp.uint32) + offset
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * np.uint32(factor)
    return (h ^ (h >> 16)).astype(jnp.float32) * np.float32(2**-32)


def _keep_highest(
    kept: jax.Array, ranks: jax.Array, x: jax.Array, new_ranks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rows of highest rank among the kept and the new rows, and their ranks.

    The ranks are random numbers. So the rows are a uniform sample of the stream.

    Args:
      kept: float32 `[size, K]`.
      ranks: float32 `[size]`, descending; -1 for an empty row.
      x: float32 `[t, K]`.
      new_ranks: float32 `[t]`; -1 for a row that is not a candidate.
    """
    size = kept.shape[0]
    best, place = lax.top_k(jnp.concatenate([ranks, new_ranks]), size)
    was_kept = (place < size)[:, None]
    old_rows = kept[jnp.minimum(place, size - 1)]
    new_rows = x[jnp.maximum(place - size, 0)]
    rows = jnp.where(was_kept, old_rows, new_rows)
    return jnp.where(best[:, None] >= 0, rows, 0.0), best
