"""Time of clustering 16.8 million float32 weights about 16 centres, beside scikit-learn.

jaxq clusters all of them and finds their codes, and so does MiniBatchKMeans from one start in one pass over the data
(max_iter=1), by batches of 262,144. By default it makes up to 100 passes by batches of 1,024, each drawn from the
cumulated weights of all samples, which does not end in reasonable time. `partial_fit` on one batch after the other
draws nothing; it is given the same batches, and labels by `predict`. How good the centres are is measured on every
16th weight, beside plain Lloyd iterations (scikit-learn's KMeans) on these alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import summary

from jaxq import methods

SIZE, BITS, ROUNDS = 4096, 4, 3
BATCH = 1 << 18
TARGET = 0.1


def inertia(x: np.ndarray, centres: np.ndarray) -> float:
    """Mean squared distance of every number to its nearest centre."""
    centres = np.sort(centres.ravel().astype(np.float64))
    member = np.searchsorted(0.5 * (centres[1:] + centres[:-1]), x)
    return float(np.mean((x.astype(np.float64) - centres[member]) ** 2))


def run() -> dict[str, Any]:
    """Times each in turns, a few rounds only; and compares the centres."""
    import time

    w = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    weight, sample = jnp.asarray(w), w.ravel()[::16]
    functions: dict[str, Any] = {
        "jaxq": lambda: jax.block_until_ready(methods.kmeans(weight, BITS))
    }
    centres = {"jaxq": np.asarray(functions["jaxq"]()[0].codebook)}
    missing = []
    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans

        column, start = (
            w.reshape(-1, 1),
            np.linspace(w.min(), w.max(), 1 << BITS, dtype=np.float32)[:, None],
        )

        def estimator(**changes: Any) -> Any:
            return MiniBatchKMeans(
                1 << BITS, batch_size=BATCH, n_init=1, random_state=0, **changes
            )

        def by_batches() -> Any:
            found = estimator()
            for i in range(0, len(column), BATCH):
                found.partial_fit(column[i : i + BATCH])
            found.predict(column)
            return found

        functions["MiniBatchKMeans"] = lambda: estimator(max_iter=1).fit(column)
        functions["MiniBatchKMeans.partial_fit"] = by_batches
        lloyd = KMeans(
            1 << BITS, init=start, n_init=1, max_iter=300, tol=0, algorithm="lloyd"
        ).fit(sample[:, None])
        centres["Lloyd on the sample"] = lloyd.cluster_centers_
    except ImportError as error:
        missing.append(f"scikit-learn ({error})")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, fn in functions.items():
            begin = time.perf_counter()
            result = fn()
            times[name].append(time.perf_counter() - begin)
            if name != "jaxq":
                centres[name] = result.cluster_centers_
    base = "MiniBatchKMeans" if "MiniBatchKMeans" in functions else "jaxq"
    figures: dict[str, dict[str, Any]] = {name: {} for name in centres} | summary(
        times, base
    )
    rows = []
    for name, row in figures.items():
        found = {"what": name, **row, "inertia": inertia(sample, centres[name])}
        rows.append(
            found | ({"target": TARGET} if name == "jaxq" and base != "jaxq" else {})
        )
    if not missing:
        by_name = {row["what"]: row["inertia"] for row in rows}
        assert by_name["jaxq"] < 1.002 * by_name["Lloyd on the sample"], by_name
    return {
        "subject": "kmeans",
        "shape": [SIZE, SIZE],
        "rows": rows,
        "missing": missing,
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table of `run`'s figures."""
    lines = [
        "| who | median ms | least ms | time over MiniBatchKMeans | target | inertia |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        target = f"<= {r['target']}" if "target" in r else "-"
        times = "- | - | -"
        if "median_ms" in r:
            times = (
                f"{r['median_ms']:.0f} | {r['min_ms']:.0f} | {r['time_over_base']:.4f}"
            )
        lines.append(f"| {r['what']} | {times} | {target} | {r['inertia']:.6f} |")
    return "\n".join(lines)
