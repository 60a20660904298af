"""Quantizing a weight by a named method, and judging the result.

`solve` checks the request, runs the method on one matrix and the statistics of its
inputs, and compares the result with rounding to nearest on inputs that the method has
not seen. If the method does worse, `solve` falls back to rounding to nearest.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats, ops
from jaxq.methods import _matrix
from jaxq.methods._method import Method, Solution
from jaxq.methods._notes import join_notes
from jaxq.methods._registry import check_options, get, names
from jaxq.methods._rtn import round_to_nearest
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, QuantSpec, dequantize

FALLBACKS = ("rtn", "none", "raise")

# Statistics that calibration collects only on request: (what they are, the remedy).
_OPTIONAL_STATISTICS = {"hessian": ("second moments", "calibrate with hessian=True")}


class Solved(NamedTuple):
    """A weight that a method has quantized.

    Attributes:
      qt: the result.
      method: the method that made the result. It is "rtn" if the requested method fell
        back to rounding to nearest.
      note: why it fell back, or another remark for the report; empty if there is none.
      loss: mean squared error of the layer's output on held-out inputs, divided by that
        of rounding to nearest. None if there are no such inputs, and for methods whose
        weight is the rounded one.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> int8 = jaxq.presets()["int8"]
      >>> solved = jaxq.methods.solve("rtn", jnp.ones((4, 2)), None, int8)
      >>> solved.method, solved.loss
      ('rtn', None)
    """

    qt: QTensor
    method: str
    note: str
    loss: float | None


def solve(
    method: str,
    w: jax.Array,
    stats: LayerStats | None,
    spec: QuantSpec,
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
      spec: what to quantize to.
      options: keyword arguments of the method.
      fallback: what happens if the method does worse than rounding: "rtn" takes the
        rounded weight, "none" keeps the method's result, "raise" raises.
      key: PRNG key for methods that draw random numbers; None takes
        `jax.random.key(0)`.
      name: what errors call the weight.
      nearest: `w` rounded to nearest, if the caller has it already: what
        `quantize(w, ..., contracting=-2)` gives for the method's own granularity
        (`Method.nearest_spec`). None rounds the weight here when it is needed.

    Returns:
      A `Solved`.

    Raises:
      ValueError: there is no such method; `fallback` or an option is invalid; the
        method needs statistics that are not there; it cannot quantize to `spec`; `w` or
        the statistics have a number that is not finite; `fallback="raise"` and the
        method does worse than rounding to nearest.

    Example:
      >>> import jax, jaxq
      >>> w = jax.random.normal(jax.random.key(0), (64, 8))
      >>> jaxq.methods.solve("clip", w, None, jaxq.presets()["int4"]).method
      'clip'
    """
    formats.check_choice("solve: method", method, names())
    formats.check_choice("solve: fallback", fallback, FALLBACKS)
    record, options = get(method), dict(options or {})
    _check_request(record, w, stats, spec, options, name)
    held_out = _held_out_rows(record, stats)
    if nearest is not None:
        _check_nearest(nearest, w, name)
    elif record.solve is None or record.takes_nearest or held_out is not None:
        nearest = round_to_nearest(w, record.nearest_spec(spec, options))
    if record.solve is None:
        assert nearest is not None
        return Solved(nearest, method, "", None)
    if record.takes_nearest:
        options["nearest"] = nearest
    key = jax.random.key(0) if key is None else key
    solution = record.solve(w, stats, spec, key=key, **options)
    if solution.rounded:
        if fallback == "raise":
            raise ValueError(f"{name}: {method}: {solution.note}. Pass fallback='rtn'.")
        return Solved(solution.qt, "rtn", solution.note, None)
    if not record.judged or stats is None:
        return Solved(solution.qt, method, solution.note, None)
    if held_out is None:
        note = join_notes(solution.note, "not judged: too few rows to hold some out")
        return Solved(solution.qt, method, note, None)
    assert nearest is not None
    return _judge(method, solution, nearest, w, held_out, fallback, name)


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
    if reason := record.why_not(spec, options):
        raise ValueError(f"{caller}: {reason}")
    if stats is not None:
        _check_stats(stats, needs, w, caller, name)
    _matrix.raise_if_not_finite(w, name, record.name)


def _check_stats(
    stats: LayerStats, needs: tuple[str, ...], w: jax.Array, caller: str, name: str
) -> None:
    """Raises a ValueError unless these are statistics of this weight's input."""
    expected = (*w.shape[:-2], w.shape[-2])
    if tuple(stats.mean.shape) != expected:
        raise ValueError(
            f"{name}: its statistics are for inputs {list(stats.mean.shape)}, expected "
            f"{list(expected)}. Pass the statistics of this layer's inputs."
        )
    for field in needs:
        if getattr(stats, field) is None:
            meaning, remedy = _OPTIONAL_STATISTICS[field]
            raise ValueError(f"{caller} needs {meaning}; {remedy}.")
    hessian = stats.hessian if "hessian" in needs else None
    if hessian is not None and not bool(jnp.isfinite(hessian).all()):
        largest = float(np.max(stats.absmax))
        raise ValueError(
            f"{name}: the second moments of its inputs are not finite: magnitudes up "
            f"to {largest:.3g} are too large to be squared in float32. Scale its "
            "inputs down, or use another method."
        )


def _check_nearest(nearest: QTensor, w: jax.Array, name: str) -> None:
    """Raises a ValueError if `nearest` has another shape or contracts another axis."""
    geometry = nearest.meta.geometry
    if nearest.shape != w.shape or geometry.contracted != (-2,):
        raise ValueError(
            f"{name}: nearest must have the shape of the weight {_matrix.describe(w)} "
            f"and contracting=-2, got {nearest!r}. Pass quantize(w, spec, "
            "contracting=-2), or leave nearest out."
        )


def _held_out_rows(record: Method, stats: LayerStats | None) -> jax.Array | None:
    """The held-out inputs; None if there are none or the method is not judged."""
    if not record.judged or stats is None or int(np.sum(stats.num_held_out)) == 0:
        return None
    return stats.held_out


def _judge(
    method: str,
    solution: Solution,
    nearest: QTensor,
    w: jax.Array,
    held_out: jax.Array,
    fallback: str,
    name: str,
) -> Solved:
    """Keeps the method's result if it is not worse than rounding to nearest."""
    qt, note = solution.qt, solution.note
    if qt.meta.activation is not None:
        # The method quantizes inputs, so rounding is judged with quantized inputs too.
        # Rounding treats all columns of the input alike and keeps none in floats.
        nearest = nearest.with_activation(qt.meta.activation)
    method_error = np.asarray(output_error(w, qt, held_out))  # [...]
    nearest_error = np.asarray(output_error(w, nearest, held_out))  # [...]
    if not np.all(np.isfinite(method_error + nearest_error)):
        raise ValueError(
            f"{name}: the error of its output on held-out inputs is not finite "
            f"({method}: {method_error}; rtn: {nearest_error}). Scale its inputs down."
        )
    worse = method_error > nearest_error  # [...]
    if not worse.any() or fallback == "none":
        return Solved(qt, method, note, _error_ratio(method_error, nearest_error))
    ratio = _error_ratio(method_error[worse], nearest_error[worse])
    verdict = (
        f"{method} is worse than rtn on held-out inputs ({ratio:.3g} times its error)"
    )
    if not worse.all():
        verdict += f" in {worse.sum()} of {worse.size} matrices"
    if fallback == "raise":
        raise ValueError(f"{name}: {verdict}. Pass fallback='rtn' or 'none'.")
    can_mix = jax.tree.structure(qt) == jax.tree.structure(nearest)
    if can_mix and not worse.all():
        best_error = np.minimum(method_error, nearest_error)
        return Solved(
            _where_worse(worse, nearest, qt),
            method,
            join_notes(f"{verdict}, so rtn there", note),
            _error_ratio(best_error, nearest_error),
        )
    # Results of different structure (a codebook, no codebook) cannot share one stack,
    # so the stack is kept or rounded as a whole.
    if method_error.sum() <= nearest_error.sum():
        loss = _error_ratio(method_error, nearest_error)
        return Solved(qt, method, join_notes(verdict, note), loss)
    return Solved(nearest, "rtn", join_notes(f"{verdict}, so rtn", note), 1.0)


def _error_ratio(error: np.ndarray, reference: np.ndarray) -> float:
    """The sum of errors over the sum of reference errors; 1 if the reference is 0."""
    total = reference.sum()
    return float(error.sum() / total) if total else 1.0


def _where_worse(worse: np.ndarray, nearest: QTensor, qt: QTensor) -> QTensor:
    """A stack with the matrices of `nearest` where `worse` is True, else of `qt`."""

    def choose(rounded: jax.Array, solved: jax.Array) -> jax.Array:
        axes = (1,) * (rounded.ndim - worse.ndim)
        return jnp.where(worse.reshape(worse.shape + axes), rounded, solved)

    return jax.tree.map(choose, nearest, qt)


@jax.jit
def output_error(w: jax.Array, qt: QTensor, x: jax.Array) -> jax.Array:
    """The squared error of a layer's outputs, `sum (x W - x Q)^2`, of each matrix.

    If `qt` quantizes its inputs, `x` is quantized for the product with it.

    Args:
      w: float `[..., in, out]`.
      qt: the quantized weight, of the same shape.
      x: float32 `[..., tokens, in]`. Rows of zeros add nothing.

    Returns:
      float32 `[...]`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq.methods import output_error
      >>> w = jnp.eye(4)
      >>> float(output_error(w, jaxq.quantize(w, "int8"), jnp.ones((2, 4)))) < 1e-6
      True
    """
    if qt.meta.activation is not None:
        product = functools.partial(ops.matmul, preferred_element_type=jnp.float32)
        for _ in range(w.ndim - 2):
            product = jax.vmap(product)
        exact = jnp.matmul(
            x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        return jnp.sum(jnp.square(exact - product(x, qt)), axis=(-2, -1))
    weight = dequantize(qt.with_activation(None), dtype=jnp.float32)
    # The small difference comes first. The difference of two large products would lose
    # most of its digits.
    delta = w.astype(jnp.float32) - weight  # [..., in, out]
    error = jnp.matmul(x, delta, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(error), axis=(-2, -1))
