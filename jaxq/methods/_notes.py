"""Remarks of the report that several methods make about a layer's statistics."""

from __future__ import annotations

import numpy as np

from jaxq.observers import LayerStats
from jaxq.processes import to_numpy


def join_notes(*notes: str) -> str:
    """The notes that are not empty, separated by semicolons."""
    return "; ".join(note for note in notes if note)


def few_tokens(stats: LayerStats, num_inputs: int) -> str:
    """A remark on a layer with fewer rows than inputs; empty if there are enough."""
    count = int(np.min(stats.count))
    num_matrices = np.size(stats.count)
    if count == 0 and num_matrices > 1:
        num_unreached = np.sum(to_numpy(stats.count) == 0)
        return f"{num_unreached} of {num_matrices} matrices never reached"
    return f"only {count} rows for {num_inputs} inputs" if count < num_inputs else ""


def few_samples(stats: LayerStats, num_inputs: int) -> str:
    """A remark on a layer with fewer sample rows than inputs; empty if enough."""
    num_unreached = np.sum(to_numpy(stats.count) == 0)
    if 0 < num_unreached < np.size(stats.count):
        return few_tokens(stats, num_inputs)
    count = int(np.min(stats.num_samples))
    return (
        f"fitted to {count} rows of {num_inputs} inputs" if count < num_inputs else ""
    )
