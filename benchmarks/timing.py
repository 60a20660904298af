"""Times of several functions in one process, measured in turns.

One round calls every function once. So a disturbance of the machine affects all
functions. A ratio is the median over rounds of the ratio within a round, so a slow
moment of the machine cancels. The least time is what the machine can do when nothing
disturbs it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

Times = dict[str, list[float]]

_LEAST_ROUNDS = 5


def interleaved(
    functions: dict[str, Callable[[], Any]], *, rounds: int = 30, seconds: float = 30.0
) -> Times:
    """The time of every call in seconds, by the function's name.

    Args:
        functions: by name. A function must return only when its result is computed.
            Each function is called twice before the measurement.
        rounds: the largest number of rounds.
        seconds: no round starts after this time, except the first five.
    """
    for function in functions.values():
        function()
        function()
    times: Times = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for i in range(rounds):
            if i >= _LEAST_ROUNDS and time.perf_counter() - begin > seconds:
                break
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def summary(times: Times, base: str) -> dict[str, dict[str, float]]:
    """Figures of each function, relative to the function `base`.

    `median_ms` and `min_ms` are milliseconds. `time_over_base` is the median ratio of
    the function's time to that of `base`. `rounds` is the number of calls.
    """
    figures = {}
    for name, seconds in times.items():
        ratios = [
            own / reference for own, reference in zip(seconds, times[base], strict=True)
        ]
        figures[name] = {
            "median_ms": 1e3 * statistics.median(seconds),
            "min_ms": 1e3 * min(seconds),
            "time_over_base": statistics.median(ratios),
            "rounds": len(seconds),
        }
    return figures
