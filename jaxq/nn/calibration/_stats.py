"""The statistics to collect for each layer, and checks of statistics.

Statistics start empty, or continue the statistics of earlier batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.observers import LayerStats, Observer, as_stats, empty_stats
from jaxq.processes import to_numpy


class StatsRequest(NamedTuple):
    """What to collect for the input of one layer.

    Attributes:
      observer: observes all numbers of the input. None collects no range.
      hessian: collect second moments too.
      input_scale: `[*batch, K]`: collect the statistics of the input multiplied by
        these factors. None collects those of the input itself.
      patches: collect the statistics of a convolution's patches too.
    """

    observer: Observer | None = None
    hessian: bool = True
    input_scale: np.ndarray | None = None
    patches: bool = False


class StatsRequests:
    """What to collect for each layer.

    Args:
      by_path: the request of each layer. None uses `default` for all layers.
      default: the request of each layer if `by_path` is None.
    """

    def __init__(
        self, by_path: Mapping[str, StatsRequest] | None, default: StatsRequest
    ):
        self._by_path = by_path
        self._default = default

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, StatsRequests) and self._key() == other._key()

    def __hash__(self) -> int:
        """Raises a TypeError if a request has an `input_scale`, which is an array."""
        return hash(self._key())

    def _key(self) -> Any:
        by_path = None if self._by_path is None else tuple(self._by_path.items())
        return by_path, self._default

    @property
    def paths(self) -> list[str]:
        """The paths in `by_path`. Empty if `by_path` is None."""
        return list(self._by_path or ())

    def __contains__(self, path: str) -> bool:
        return self._by_path is None or path in self._by_path

    def __getitem__(self, path: str) -> StatsRequest:
        return self._default if self._by_path is None else self._by_path[path]


def initial_stats(
    request: StatsRequest,
    k: int,
    batch: tuple[int, ...],
    *,
    windowed: bool,
    patches: tuple[int, int] | None = None,
) -> LayerStats:
    """The statistics of a layer before its first call.

    Args:
      request: what to collect.
      k: the size of a row.
      batch: the sizes of the batch axes. Each of their elements has its own statistics.
      windowed: the layer is a convolution. Its channels have no second moments.
      patches: the sizes (groups, K) of its patches. None collects no patches.
    """
    hessian = request.hessian and not windowed
    empty = empty_stats(k, hessian=hessian, observer=request.observer)
    if patches is not None:
        groups, patch_size = patches
        empty_group = empty_stats(patch_size, hessian=request.hessian)
        empty = empty._replace(
            patches=jax.tree.map(
                lambda a: jnp.broadcast_to(a, (groups, *a.shape)), empty_group
            )
        )
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (*batch, *a.shape)), empty)


def continued_stats(
    earlier: Any, empty: LayerStats, path: str, caller: str
) -> LayerStats:
    """The statistics of earlier batches, as a `LayerStats` like `empty`.

    Raises:
      ValueError: `earlier` is None, has unknown fields, or has other shapes or dtypes
        than `empty`.
    """
    stats = None if earlier is None else as_stats(earlier, empty)
    if _shapes_and_dtypes(stats) != _shapes_and_dtypes(empty):
        raise ValueError(
            f"{caller}: start has no statistics of {path}, or they have other shapes "
            "or dtypes. Pass what calibrate returned for the same layers and settings."
        )
    assert stats is not None
    return stats


def _shapes_and_dtypes(stats: Any) -> list[tuple[Any, Any]]:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(stats)]


def check_stats(stats: Mapping[str, LayerStats], caller: str) -> None:
    """Checks the statistics of all layers.

    Raises:
      ValueError: statistics of a layer are not finite, or none of its rows counted.
    """
    problems = []
    for path, layer_stats in stats.items():
        problem = _stats_problem(layer_stats)
        if problem:
            problems.append(f"{path or 'the model'}: {problem}")
    if problems:
        raise ValueError(f"{caller}: " + "; ".join(problems) + ".")


def _stats_problem(stats: LayerStats) -> str:
    """Says why statistics cannot be used. Empty if they can be used."""
    mean, absmean = to_numpy(stats.mean), to_numpy(stats.absmean)
    if not np.isfinite(mean).all() or not np.isfinite(absmean).all():
        # Batch axes come first, and channels last.
        per_channel = np.isfinite(absmean).reshape(-1, stats.mean.shape[-1]).all(0)
        channel = int(np.argmin(per_channel))
        return (
            f"channel {channel} of its input is not finite. Check the batches and the "
            "model"
        )
    if not all(
        np.isfinite(to_numpy(rows)).all() for rows in (stats.samples, stats.held_out)
    ):
        return (
            "a row of its input that is held out for judging is not finite. Check the "
            "batches and the model"
        )
    if not np.any(to_numpy(stats.count) > 0):
        return (
            "no row counted. Either the mask is False everywhere, or experts read "
            "only rows of zeros, or the statistics were lost. A plain jax.lax.scan "
            "over layers loses them. Put the layers in a list first. For a Llama with "
            "scan_layers=True, quantize "
            "jaxq.models.unrolled(model) and call jaxq.models.stacked on the result"
        )
    return ""
