"""Quantizing a weight by a named method, and judging the result.

`solve` checks the request, runs the method on one matrix and the statistics of its
inputs, and compares the result with rounding to nearest on inputs that the method has
not seen. If the method does worse, `solve` falls back to rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxq import formats
from jaxq.methods import _matrix
from jaxq.methods._judging import (
    FALLBACKS,
    Solved,
    falls_back,
    held_out_rows,
    judge,
)
from jaxq.methods._layer_errors import names_layer
from jaxq.methods._method import Method, Solution
from jaxq.methods._notes import join_notes
from jaxq.methods._registry import check_options, get, names
from jaxq.methods._rtn import round_to_nearest
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, QuantSpec, as_spec

# Statistics that calibration collects only on request: (what they are, the remedy).
_OPTIONAL_STATISTICS = {"hessian": ("second moments", "calibrate with hessian=True")}


def solve(
    method: str,
    w: ArrayLike,
    stats: LayerStats | None,
    spec: str | QuantSpec,
    *,
    options: Mapping[str, Any] | None = None,
    fallback: str = "rtn",
    key: jax.Array | None = None,
    name: str = "w",
    nearest: QTensor | None = None,
) -> Solved:
    """Quantizes a weight by a named method, or rounds it to nearest if that is better.

    Better means a smaller error of the layer's output on the held-out rows of `stats`.
    No method sees these rows. In a stack, each matrix is judged on its own.

    Args:
      method: one of `jaxq.methods.names()`.
      w: float `[in, out]`, or a stack of such matrices `[..., in, out]`.
      stats: statistics of the layer's inputs, with the axes of the stack in front; None
        if there are none.
      spec: preset name or `QuantSpec`.
      options: keyword arguments of the method.
      fallback: what happens if the method does worse than rounding: "rtn" takes the
        rounded weight, "none" keeps the method's result, "raise" raises.
      key: PRNG key for methods that draw random numbers, and for specs that round
        stochastically; None uses `jax.random.key(0)`.
      name: the name of the weight in errors.

      nearest: `w` rounded to nearest, if the caller has it already: what
        `quantize(w, ..., contracting=-2)` gives for the method's own granularity
        (`Method.nearest_spec`). None rounds the weight here when it is needed.

    Returns:
      A `Solved`.

    Raises:
      TypeError: `w` is not float32, bfloat16 or float16, or the `solve` of the method's
        record does not return a `Solution`.
      ValueError: there is no such method or preset; `fallback` or an option is invalid;
        the method needs statistics that are not there; it cannot quantize to `spec`;
        `w` has fewer than two axes or no elements; `w` or the statistics have a number
        that is not finite; `fallback="raise"` and the method does worse than rounding
        to nearest.

    Example:
      >>> import jax, jaxq
      >>> w = jax.random.normal(jax.random.key(0), (64, 8))
      >>> jaxq.methods.solve("clip", w, None, "int4").method
      'clip'
    """
    formats.check_choice("solve: method", method, names())
    formats.check_choice("solve: fallback", fallback, FALLBACKS)
    record, options = get(method), dict(options or {})
    spec = as_spec(spec, "solve")
    w = _matrix.as_weight(w, method, name)
    _check_request(record, w, stats, spec, options, name)
    held_out = held_out_rows(record, stats)
    key = jax.random.key(0) if key is None else key
    if nearest is not None:
        _check_nearest(nearest, w, name)
    elif record.solve is None or record.takes_nearest or held_out is not None:
        nearest = round_to_nearest(w, record.nearest_spec(spec, options), key)
    if record.solve is None:
        assert nearest is not None
        return Solved(nearest, method, "", None)
    if record.takes_nearest:
        options["nearest"] = nearest
    with names_layer(name, method):
        solution = record.solve(w, stats, spec, key=key, **options)
    _check_solution(solution, method, name)
    if solution.rounded:
        # Without another result, fallback="none" takes the rounded weight too.
        falls_back(
            fallback, f"{name}: {method}: {solution.note}", "Pass fallback='rtn'."
        )
        return Solved(solution.qt, "rtn", solution.note, None)
    if not record.judged or stats is None:
        return Solved(solution.qt, method, solution.note, None)
    if held_out is None:
        reason = "too few rows for held-out inputs"
        note = f"not compared with rounding to nearest: {reason}"
        note = join_notes(solution.note, note)
        return Solved(solution.qt, method, note, None)
    assert nearest is not None
    return judge(method, solution, nearest, w, held_out, fallback, name)


def _check_request(
    record: Method,
    w: jax.Array,
    stats: LayerStats | None,
    spec: QuantSpec,
    options: Mapping[str, Any],
    name: str,
) -> None:
    """Raises a ValueError if the method cannot quantize this weight."""
    caller = f"{name}: method {record.name!r}"
    check_options(caller, record.name, options)
    needs = record.needed_statistics(options)
    if needs and stats is None:
        raise ValueError(f"{caller} needs the layer's inputs: pass calibration data.")
    reason = record.why_not(spec, options)
    if reason:
        raise ValueError(f"{caller}: {reason}")
    if stats is not None:
        _check_stats(stats, needs, w, caller, name)


def _check_stats(
    stats: LayerStats, needs: tuple[str, ...], w: jax.Array, caller: str, name: str
) -> None:
    """Raises a ValueError unless these are statistics of this weight's input."""
    expected = (*w.shape[:-2], w.shape[-2])
    if tuple(stats.mean.shape) != expected:
        raise ValueError(
            f"{name}: the statistics are for inputs of shape {list(stats.mean.shape)}, "
            f"expected {list(expected)}. Pass the statistics of this layer's inputs."
        )
    for field in needs:
        if getattr(stats, field) is None:
            meaning, remedy = _OPTIONAL_STATISTICS[field]
            raise ValueError(f"{caller} needs {meaning}; {remedy}.")
    hessian = stats.hessian if "hessian" in needs else None
    if hessian is not None and not bool(jnp.isfinite(hessian).all()):
        largest = float(np.max(stats.absmax))
        raise ValueError(
            f"{name}: the second moments of the layer's inputs are not finite. "
            f"Magnitudes up to {largest:.3g} are too large to be squared in float32. "
            "Scale the inputs down, or use another method."
        )


def _check_solution(solution: Any, method: str, name: str) -> None:
    """Raises a TypeError unless a method returned a `Solution` with a QTensor."""
    expected = "Its solve must return jaxq.methods.Solution(qt), where qt is a QTensor."
    if not isinstance(solution, Solution):
        raise TypeError(
            f"{name}: method {method!r} returned a {type(solution).__name__}. "
            f"{expected}"
        )
    if not isinstance(solution.qt, QTensor):
        raise TypeError(
            f"{name}: method {method!r} returned a Solution whose qt is a "
            f"{type(solution.qt).__name__}. {expected}"
        )


def _check_nearest(nearest: QTensor, w: jax.Array, name: str) -> None:
    """Raises a ValueError if `nearest` has another shape or contracts another axis."""
    geometry = nearest.meta.geometry
    if nearest.shape != w.shape or geometry.contracted != (-2,):
        raise ValueError(
            f"{name}: nearest must have the shape of the weight "
            f"{_matrix.dtype_and_shape(w)} and contracting=-2, got {nearest!r}. Pass "
            "quantize(w, spec, contracting=-2), or leave nearest out."
        )
