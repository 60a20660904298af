"""Calibration of 16.8 million float32 numbers, beside the usual way; and the entropy threshold of a histogram."""

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
# Time over jnp.percentile's, and milliseconds.
TARGETS = {"percentile of one array": 0.1, "percentile, first batch": 0.1}
MOST_MS = {"entropy, 2048 bins": 60.0}


def run() -> dict[str, Any]:
    """Times each observer beside its peer, and checks what they agree on."""
    data = np.random.default_rng(0).standard_normal(SIZE, np.float32)
    x = jnp.asarray(data)
    peer = jax.jit(lambda x: jnp.percentile(jnp.abs(x), P))
    percentile = jaxq.observers.percentile(P)
    exact = np.partition(
        np.abs(data), [int(P / 100 * (SIZE - 1)), int(P / 100 * (SIZE - 1)) + 1]
    )
    exact = exact[int(P / 100 * (SIZE - 1))]
    for found in (peer(x), percentile.bounds_of(x)[1]):
        assert abs(float(found) / exact - 1) < 1e-5, (float(found), exact)

    def updating(obs: Any, state: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(obs.update(state, x))

    seen = percentile.update(percentile.init(x), x)
    cases = {
        "jnp.percentile": lambda: jax.block_until_ready(peer(x)),
        "percentile of one array": lambda: jax.block_until_ready(
            percentile.bounds_of(x)
        ),
        "percentile, first batch": updating(percentile, percentile.init(x)),
        "percentile, later batch": updating(percentile, seen),
        "numpy.percentile": lambda: np.percentile(np.abs(data), P),
    }
    rows = _rows(cases, "jnp.percentile", rounds=5, seconds=60.0)

    edges = jnp.linspace(0, 6, BINS + 1)
    count = jax.jit(lambda x: jnp.histogram(jnp.abs(x), edges)[0])
    histogram, minmax = jaxq.observers.histogram(BINS), jaxq.observers.minmax()
    cases = {
        "jnp.histogram": lambda: jax.block_until_ready(count(x)),
        "histogram, one batch": updating(
            histogram, histogram.update(histogram.init(x), x)
        ),
        "minmax, one batch": updating(minmax, minmax.init(x)),
    }
    rows += _rows(cases, "jnp.histogram", rounds=9, seconds=20.0)

    entropy, mse = jaxq.observers.entropy(BINS), jaxq.observers.mse(bins=BINS)
    state = entropy.update(entropy.init(x), x)
    counts = np.asarray(state.counts.low).sum(axis=0, dtype=np.int64).astype(np.float64)
    cases = {
        "numpy, entropy": lambda: numpy_entropy(counts, 128),
        "entropy, 2048 bins": lambda: jax.block_until_ready(entropy.bounds(state)),
        "mse, 2048 bins": lambda: jax.block_until_ready(mse.bounds(state)),
    }
    best = numpy_entropy(counts, 128) * _width(state, entropy)
    assert abs(float(entropy.bounds(state)[1]) - best) < 1e-6, (
        float(entropy.bounds(state)[1]),
        best,
    )
    rows += _rows(cases, "numpy, entropy", rounds=15, seconds=30.0)
    return {"subject": "observers", "shape": [SIZE], "rows": rows, "missing": []}


def numpy_entropy(h: np.ndarray, levels: int) -> int:
    """TensorRT's threshold in bins, each candidate in a few numpy calls."""
    used = int(np.nonzero(h)[0][-1]) + 1
    found = np.full(used + 1, np.inf)
    for i in range(levels, used + 1):
        p, raw = h[:i].copy(), h[:i]
        p[-1] += h[i:].sum()
        start = -(-np.arange(levels) * i // levels)
        mass, held = (
            np.add.reduceat(raw, start),
            np.add.reduceat((raw > 0).astype(np.int64), start),
        )
        q = np.where(
            raw > 0, np.repeat(mass / np.maximum(held, 1), np.diff([*start, i])), 0
        )
        some = p > 0
        if (q[some] > 0).all():
            p, q = p / p.sum(), q / q.sum()
            found[i] = (p[some] * np.log(p[some] / q[some])).sum()
    return used - int(np.argmin(found[::-1]))


def _width(state: Any, obs: Any) -> float:
    edges = np.asarray(obs.table(state)[0])
    return float(edges[-1] - edges[-2])


def _rows(
    cases: dict[str, Callable[[], Any]], base: str, **limits: Any
) -> list[dict[str, Any]]:
    rows = []
    for name, figures in summary(interleaved(cases, **limits), base).items():
        row = {"what": name, "over": base, **figures}
        row |= {"target": TARGETS[name]} if name in TARGETS else {}
        rows.append(row | ({"target_ms": MOST_MS[name]} if name in MOST_MS else {}))
    return rows


def table(result: dict[str, Any]) -> str:
    """A markdown table of `run`'s figures."""
    lines = [
        "| what | median ms | least ms | time over | of | target |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        target = (
            f"<= {r['target']}"
            if "target" in r
            else f"<= {r['target_ms']:.0f} ms"
            if "target_ms" in r
            else "-"
        )
        times = f"{r['median_ms']:.1f} | {r['min_ms']:.1f} | {r['time_over_base']:.3f}"
        lines.append(f"| {r['what']} | {times} | {r['over']} | {target} |")
    return "\n".join(lines)
