"""Judging a method's result against rounding to nearest, on held-out inputs.

The method has not seen these inputs. If its result does worse than rounding to nearest,
the weight is rounded, unless the caller chose another fallback.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import ops
from jaxq.methods._method import Method, Solution
from jaxq.methods._notes import join_notes
from jaxq.observers import LayerStats
from jaxq.processes import to_numpy
from jaxq.qtensor import QTensor, dequantize

FALLBACKS = ("rtn", "none", "raise")


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


def held_out_rows(record: Method, stats: LayerStats | None) -> jax.Array | None:
    """The held-out inputs; None if there are none or the method is not judged."""
    if not record.judged or stats is None or int(np.sum(stats.num_held_out)) == 0:
        return None
    return stats.held_out


def judge(
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
    method_error = to_numpy(output_error(w, qt, held_out))  # [...]
    nearest_error = to_numpy(output_error(w, nearest, held_out))  # [...]
    if not np.all(np.isfinite(method_error + nearest_error)):
        raise ValueError(
            f"{name}: the error of its output on held-out inputs is not finite "
            f"({method}: {method_error}; rtn: {nearest_error}). Scale its inputs down."
        )
    worse = method_error > nearest_error  # [...]
    loss = error_ratio(method_error, nearest_error)
    if not worse.any():
        return Solved(qt, method, note, loss)
    ratio = error_ratio(method_error[worse], nearest_error[worse])
    verdict = (
        f"{method} is worse than rtn on held-out inputs ({ratio:.3g} times its error)"
    )
    if not worse.all():
        verdict += f" in {worse.sum()} of {worse.size} matrices"
    remedy = (
        "Pass fallback='rtn' to round to nearest, or 'none' to keep the result of the "
        "method."
    )
    if not falls_back(fallback, f"{name}: {verdict}", remedy):
        return Solved(qt, method, note, loss)
    can_mix = jax.tree.structure(qt) == jax.tree.structure(nearest)
    if can_mix and not worse.all():
        best_error = np.minimum(method_error, nearest_error)
        return Solved(
            _where_worse(worse, nearest, qt),
            method,
            join_notes(f"{verdict}, so these matrices use rtn", note),
            error_ratio(best_error, nearest_error),
        )
    # Results of different structure (a codebook, no codebook) cannot share one stack,
    # so the stack is kept or rounded as a whole.
    if method_error.sum() <= nearest_error.sum():
        return Solved(qt, method, join_notes(verdict, note), loss)
    return Solved(nearest, "rtn", join_notes(f"{verdict}, so rtn is used", note), 1.0)


def falls_back(fallback: str, problem: str, remedy: str) -> bool:
    """True if a worse result gives way to the plain one, False if it is kept.

    Args:
      fallback: one of `FALLBACKS`: "rtn" takes the plain result, "none" keeps the worse
        one, "raise" raises.
      problem: what is worse, for the error.
      remedy: the other values of `fallback`, for the error.

    Raises:
      ValueError: `fallback` is "raise".
    """
    if fallback == "raise":
        raise ValueError(f"{problem}. {remedy}")
    return fallback == "rtn"


def error_ratio(error: np.typing.ArrayLike, reference: np.typing.ArrayLike) -> float:
    """The sum of errors over the sum of reference errors; 1 if the reference is 0."""
    total = np.sum(reference)
    return float(np.sum(error) / total) if total else 1.0


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
