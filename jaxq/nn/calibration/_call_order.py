"""The order in which a batch reaches the layers of a model.

The model is traced with abstract values, so no layer is computed. During the trace, the
probes (nnx) or the interceptor (linen) record each call of a layer with `record_call`.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxq.nn.calibration._programs import cached_program

# Set during such a trace: the inputs of the calls of each layer, by path.
_TRACED_INPUTS: contextvars.ContextVar[dict[str, list[Any]] | None] = (
    contextvars.ContextVar("calls", default=None)
)


def record_call(path: str, x: Any) -> bool:
    """Records the input of a layer's call, if `trace_call_order` is running.

    Returns:
      True if `trace_call_order` is running. The caller then collects no statistics.
    """
    calls = _TRACED_INPUTS.get()
    if calls is None:
        return False
    calls.setdefault(path, []).append(x)
    return True


def trace_call_order(
    trace: Callable[..., None], *args: Any
) -> dict[str, tuple[int, ...]]:
    """Traces `trace(*args)` to find the order in which layers are called.

    Args:
      trace: runs the model. Each call of a layer must call `record_call`. Later calls
        with an equal function and equal shapes do not trace again.
      *args: arguments of `trace`. Their arrays become tracers.

    Returns:
      A dict from the path of each layer to one number for each call, in the order of
      the first calls. Two calls have the same number if they read the same array.
    """
    return dict(jax.eval_shape(_program(trace), *args).calls)


@jax.tree_util.register_static
class _CallOrder(NamedTuple):
    """(path, numbers of the inputs) of each layer, as a static result of a trace."""

    calls: tuple[tuple[str, tuple[int, ...]], ...]


@cached_program
def _program(trace: Callable[..., None]) -> Callable[..., _CallOrder]:
    """A jitted function that finds the order of the calls in `trace`."""

    @jax.jit
    def find(*args: Any) -> _CallOrder:
        calls: dict[str, list[Any]] = {}
        token = _TRACED_INPUTS.set(calls)
        try:
            trace(*args)
        finally:
            _TRACED_INPUTS.reset(token)
        # `calls` keeps all inputs alive, so no two of them have the same id.
        numbers: dict[int, int] = {}
        order = []
        for path, inputs in calls.items():
            own = tuple(numbers.setdefault(id(x), len(numbers)) for x in inputs)
            order.append((path, own))
        return _CallOrder(tuple(order))

    return find
