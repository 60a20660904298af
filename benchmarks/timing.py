"""Times of several functions in one process, taken in turns, so that what disturbs one disturbs all.

One round calls every function once. Ratios are medians over rounds of the ratio within a round, so a slow spell of the
machine cancels; the least time is kept beside the median, as what the machine can do when left alone.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

Times = dict[str, list[float]]


def interleaved(
    functions: dict[str, Callable[[], Any]], *, rounds: int = 30, seconds: float = 30.0
) -> Times:
    """Seconds of every call, by name; each function must block until its result is there.

    Args:
      functions: by name; called twice unmeasured first.
      rounds: how often each is called at most.
      seconds: no round starts after this, but there are at least five.
    """
    for fn in functions.values():
        fn()
        fn()
    times: Times = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for i in range(rounds):
            if i >= 5 and time.perf_counter() - begin > seconds:
                break
            for name, fn in functions.items():
                start = time.perf_counter()
                fn()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def summary(times: Times, base: str) -> dict[str, dict[str, float]]:
    """For each name: median and least milliseconds, and the median ratio of `base`'s time to its own (speed)."""
    return {
        name: {
            "median_ms": 1e3 * statistics.median(taken),
            "min_ms": 1e3 * min(taken),
            "time_over_base": statistics.median(
                t / b for t, b in zip(taken, times[base], strict=True)
            ),
            "rounds": len(taken),
        }
        for name, taken in times.items()
    }
