"""Calibration of 16.8 million float32 numbers, beside jnp and numpy.

The last cases find the entropy threshold of a histogram.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, summary

import jaxq

SIZE = 1 << 24
P = 99.9
BINS = 2048
# The largest time, relative to jnp.percentile.
TARGETS = {"percentile of one array": 0.1, "percentile, first batch": 0.1}
# The largest time in milliseconds.
MOST_MS = {"entropy, 2048 bins": 60.0}
Cases = dict[str, Callable[[], Any]]


def run() -> dict[str, Any]:
    """Times each observer beside its peer, and checks that they agree."""
    data = np.random.default_rng(0).standard_normal(SIZE, np.float32)
    x = jnp.asarray(data)
    rows = _percentile_rows(data, x) + _histogram_rows(x) + _threshold_rows(x)
    return {"subject": "observers", "shape": [SIZE], "rows": rows, "missing": []}


def _percentile_rows(data: np.ndarray, x: jax.Array) -> list[dict[str, Any]]:
    jnp_percentile = jax.jit(lambda x: jnp.percentile(jnp.abs(x), P))
    observer = jaxq.observers.percentile(P)
    rank = int(P / 100 * (SIZE - 1))
    exact = np.partition(np.abs(data), [rank, rank + 1])[rank]
    for value in (jnp_percentile(x), observer.bounds_of(x)[1]):
        assert abs(float(value) / exact - 1) < 1e-5, (float(value), exact)
    empty = observer.init(x)
    cases: Cases = {
        "jnp.percentile": lambda: jax.block_until_ready(jnp_percentile(x)),
        "percentile of one array": lambda: jax.block_until_ready(observer.bounds_of(x)),
        "percentile, first batch": _update_of(observer, empty, x),
        "percentile, later batch": _update_of(observer, observer.update(empty, x), x),
        "numpy.percentile": lambda: np.percentile(np.abs(data), P),
    }
    return _rows(cases, "jnp.percentile", rounds=5, seconds=60.0)


def _histogram_rows(x: jax.Array) -> list[dict[str, Any]]:
    edges = jnp.linspace(0, 6, BINS + 1)
    jnp_histogram = jax.jit(lambda x: jnp.histogram(jnp.abs(x), edges)[0])
    histogram, minmax = jaxq.observers.histogram(BINS), jaxq.observers.minmax()
    one_batch = histogram.update(histogram.init(x), x)
    cases: Cases = {
        "jnp.histogram": lambda: jax.block_until_ready(jnp_histogram(x)),
        "histogram, one batch": _update_of(histogram, one_batch, x),
        "minmax, one batch": _update_of(minmax, minmax.init(x), x),
    }
    return _rows(cases, "jnp.histogram", rounds=9, seconds=20.0)


def _threshold_rows(x: jax.Array) -> list[dict[str, Any]]:
    entropy, mse = jaxq.observers.entropy(BINS), jaxq.observers.mse(bins=BINS)
    state = entropy.update(entropy.init(x), x)
    # A count is stored in two parts. Here the low part is all of it.
    counts = np.asarray(state.counts.low).sum(axis=0, dtype=np.int64)
    counts = counts.astype(np.float64)
    cases: Cases = {
        "numpy, entropy": lambda: numpy_entropy(counts, 128),
        "entropy, 2048 bins": lambda: jax.block_until_ready(entropy.bounds(state)),
        "mse, 2048 bins": lambda: jax.block_until_ready(mse.bounds(state)),
    }
    edges = np.asarray(entropy.table(state)[0])
    threshold = numpy_entropy(counts, 128) * float(edges[-1] - edges[-2])
    bound = float(entropy.bounds(state)[1])
    assert abs(bound - threshold) < 1e-6, (bound, threshold)
    return _rows(cases, "numpy, entropy", rounds=15, seconds=30.0)


def _update_of(observer: Any, state: Any, x: jax.Array) -> Callable[[], Any]:
    """A function that updates a state by one batch, and waits for the result."""
    return lambda: jax.block_until_ready(observer.update(state, x))


def numpy_entropy(counts: np.ndarray, levels: int) -> int:
    """TensorRT's threshold as a number of bins: every candidate in a few numpy calls.

    Args:
        counts: float64[bins], the histogram of absolute values.
        levels: number of quantized values of one sign.
    """
    used = int(np.nonzero(counts)[0][-1]) + 1
    divergences = np.full(used + 1, np.inf)
    for i in range(levels, used + 1):
        p, inside = counts[:i].copy(), counts[:i]
        p[-1] += counts[i:].sum()  # numbers beyond the threshold are clipped to it
        start = -(-np.arange(levels) * i // levels)
        mass = np.add.reduceat(inside, start)  # [levels]
        nonempty = np.add.reduceat((inside > 0).astype(np.int64), start)
        widths = np.diff([*start, i])
        # A level spreads its mass over those of its bins that are not empty.
        q = np.where(inside > 0, np.repeat(mass / np.maximum(nonempty, 1), widths), 0)
        in_p = p > 0
        if (q[in_p] > 0).all():
            p, q = p / p.sum(), q / q.sum()
            divergences[i] = (p[in_p] * np.log(p[in_p] / q[in_p])).sum()
    # The last of equal candidates.
    return used - int(np.argmin(divergences[::-1]))


def _rows(cases: Cases, base: str, **limits: Any) -> list[dict[str, Any]]:
    rows = []
    for name, figures in summary(interleaved(cases, **limits), base).items():
        row = {"what": name, "over": base, **figures}
        if name in TARGETS:
            row["target"] = TARGETS[name]
        if name in MOST_MS:
            row["target_ms"] = MOST_MS[name]
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    lines = [
        "| what | median ms | least ms | time over | of | target |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        target = "-"
        if "target" in row:
            target = f"<= {row['target']}"
        elif "target_ms" in row:
            target = f"<= {row['target_ms']:.0f} ms"
        times = (
            f"{row['median_ms']:.1f} | {row['min_ms']:.1f} "
            f"| {row['time_over_base']:.3f}"
        )
        lines.append(f"| {row['what']} | {times} | {row['over']} | {target} |")
    return "\n".join(lines)
