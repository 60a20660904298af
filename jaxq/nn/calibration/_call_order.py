"""The order in which a batch reaches the layers of a model.

The model is traced, and nothing is computed. While it is traced, whatever watches the
layers (a probe, an interceptor) records each call here.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import jax

# Set while the order is traced: the inputs that each layer was called with, by path.
_TRACED_INPUTS: contextvars.ContextVar[dict[str, list[Any]] | None] = (
    contextvars.ContextVar("calls", default=None)
)


def record_call(path: str, x: Any) -> bool:
    """Records the input of a layer's call, if the order is traced.

    Returns:
      True if the order is traced. Then no statistics are needed.
    """
    calls = _TRACED_INPUTS.get()
    if calls is None:
        return False
    calls.setdefault(path, []).append(x)
    return True


def trace_call_order(
    trace: Callable[..., None], *args: Any
) -> dict[str, tuple[int, ...]]:
    """The layers that `trace(*args)` calls, in order, with the numbers of their inputs.

    Two layers that read the same array have the same number.

    Args:
      trace: calls layers that are watched by `record_call`.
      *args: arrays, which are traced.
    """
    calls: dict[str, list[Any]] = {}
    token = _TRACED_INPUTS.set(calls)
    try:
        jax.eval_shape(trace, *args)
    finally:
        _TRACED_INPUTS.reset(token)
    # `calls` keeps all inputs alive, so no two of them have the same id.
    numbers: dict[int, int] = {}
    return {
        path: tuple(numbers.setdefault(id(x), len(numbers)) for x in inputs)
        for path, inputs in calls.items()
    }
