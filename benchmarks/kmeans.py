"""Time to cluster 16.8 million float32 weights into 16 centres, beside scikit-learn.

jaxq clusters all weights and finds their codes. MiniBatchKMeans does the same from one
start, in one pass over the data (max_iter=1), in batches of 262,144. With its defaults
it does not finish in a reasonable time: it makes up to 100 passes in batches of 1,024,
and draws each batch from the cumulated weights of all samples. `partial_fit` on one
batch after another draws nothing. It gets the same batches, and `predict` finds the
labels.

The quality of the centres is measured on every 16th weight. There it is compared with
plain Lloyd iterations (scikit-learn's KMeans) on the same weights.
"""

from __future__ import annotations

import time
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
    nearest = np.searchsorted(0.5 * (centres[1:] + centres[:-1]), x)
    return float(np.mean((x.astype(np.float64) - centres[nearest]) ** 2))


def run() -> dict[str, Any]:
    """Times each program in turns for a few rounds, and compares the centres."""
    w = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    weight, sample = jnp.asarray(w), w.ravel()[::16]
    functions: dict[str, Any] = {
        "jaxq": lambda: jax.block_until_ready(methods.kmeans(weight, BITS))
    }
    centres = {"jaxq": np.asarray(functions["jaxq"]()[0].codebook)}
    missing = []
    try:
        functions |= _peers(w.reshape(-1, 1))
        centres["Lloyd on the sample"] = _lloyd_centres(w, sample)
    except ImportError as error:
        missing.append(f"scikit-learn ({error})")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            begin = time.perf_counter()
            result = function()
            times[name].append(time.perf_counter() - begin)
            if name != "jaxq":
                centres[name] = result.cluster_centers_
    base = "MiniBatchKMeans" if "MiniBatchKMeans" in functions else "jaxq"
    figures = summary(times, base)
    rows = []
    for name in centres:
        row = {"what": name, **figures.get(name, {})}
        row["inertia"] = inertia(sample, centres[name])
        if name == "jaxq" and base != "jaxq":
            row["target"] = TARGET
        rows.append(row)
    if not missing:
        inertias = {row["what"]: row["inertia"] for row in rows}
        assert inertias["jaxq"] < 1.002 * inertias["Lloyd on the sample"], inertias
    return {
        "subject": "kmeans",
        "shape": [SIZE, SIZE],
        "rows": rows,
        "missing": missing,
    }


def _peers(column: np.ndarray) -> dict[str, Any]:
    """MiniBatchKMeans on a column of weights, in two ways."""
    from sklearn.cluster import MiniBatchKMeans

    def estimator(**options: Any) -> Any:
        return MiniBatchKMeans(
            1 << BITS, batch_size=BATCH, n_init=1, random_state=0, **options
        )

    def fit_batches() -> Any:
        fitted = estimator()
        for i in range(0, len(column), BATCH):
            fitted.partial_fit(column[i : i + BATCH])
        fitted.predict(column)
        return fitted

    return {
        "MiniBatchKMeans": lambda: estimator(max_iter=1).fit(column),
        "MiniBatchKMeans.partial_fit": fit_batches,
    }


def _lloyd_centres(w: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Centres of plain Lloyd iterations that start at equal distances."""
    from sklearn.cluster import KMeans

    start = np.linspace(w.min(), w.max(), 1 << BITS, dtype=np.float32)[:, None]
    lloyd = KMeans(
        1 << BITS, init=start, n_init=1, max_iter=300, tol=0, algorithm="lloyd"
    )
    return lloyd.fit(sample[:, None]).cluster_centers_


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    lines = [
        "| who | median ms | least ms | time over MiniBatchKMeans | target | inertia |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        target = f"<= {row['target']}" if "target" in row else "-"
        times = "- | - | -"
        if "median_ms" in row:
            times = (
                f"{row['median_ms']:.0f} | {row['min_ms']:.0f} "
                f"| {row['time_over_base']:.4f}"
            )
        lines.append(f"| {row['what']} | {times} | {target} | {row['inertia']:.6f} |")
    return "\n".join(lines)
