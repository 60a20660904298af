"""How long calls take, and how much memory a process or a device has used."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxq.progress import with_progress


class Timing(NamedTuple):
    """How long calls of one function took.

    Attributes:
        median: seconds.
        fastest: seconds.
        slowest: seconds.
        num_calls: how many calls were timed.

    Example:
        >>> import jax.numpy as jnp
        >>> time_calls({"sum": lambda: jnp.ones(8).sum()}, num_calls=3)["sum"].num_calls
        3
    """

    median: float
    fastest: float
    slowest: float
    num_calls: int


class PeakMemory(NamedTuple):
    """The largest memory in use so far.

    Attributes:
        num_bytes: how many bytes. None if the platform does not say.
        where: "device" for the first device. "process" for the whole process, on
            platforms whose devices use the memory of the process.

    Example:
        >>> peak_memory().where in ("device", "process")
        True
    """

    num_bytes: int | None
    where: str


def time_calls(
    functions: Mapping[str, Callable[[], Any]],
    *,
    num_calls: int = 10,
    progress: bool | None = False,
) -> dict[str, Timing]:
    """Times several functions in turns.

    Each function is called once first, which compiles it. Then each round calls every
    function once, so that a change of the machine's speed meets all of them. A call
    ends when its arrays are computed.

    Args:
        functions: functions without arguments, by name.
        num_calls: the number of rounds, at least 1.
        progress: show a progress line. None shows it if stderr is a terminal.

    Returns:
        A `Timing` for each name.

    Raises:
        ValueError: there is no function, or `num_calls` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxq
        >>> x, w = jnp.ones((4, 64)), jnp.ones((64, 8))
        >>> qt, product = jaxq.quantize(w, "int8"), jax.jit(jnp.matmul)
        >>> quantized = jax.jit(jaxq.matmul)
        >>> times = time_calls(
        ...     {"float": lambda: product(x, w), "int8": lambda: quantized(x, qt)})
        >>> times["int8"].median > 0
        True
    """
    if not functions or num_calls < 1:
        raise ValueError(
            f"time_calls: {len(functions)} functions and num_calls={num_calls}; "
            "expected at least one of each."
        )
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in with_progress(range(num_calls), "timing, round", progress):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Timing(statistics.median(own), min(own), max(own), len(own))
        for name, own in seconds.items()
    }


def peak_memory() -> PeakMemory:
    """The largest memory that the first device, or the process, has used so far.

    Returns:
        A `PeakMemory`. On CPU it is the largest resident set of the process, with
        everything that the process did before.

    Example:
        >>> peak_memory().num_bytes > 1000
        True
    """
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return PeakMemory(int(stats["peak_bytes_in_use"]), "device")
    try:
        import resource
    except ImportError:  # Windows
        return PeakMemory(None, "process")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return PeakMemory(largest * unit, "process")
