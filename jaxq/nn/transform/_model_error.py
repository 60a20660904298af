"""Two models on one calibration batch: how much their outputs differ.

The report shows the error of the quantized model's outputs. Folded or rotated float
weights must give the outputs of the original weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import metrics
from jaxq.nn.calibration import Batch, cached_program
from jaxq.nn.transform._options import Options


class Run(NamedTuple):
    """A model, ready to run batches under jit.

    Attributes:
      function: `function(arrays, batch)` returns the outputs. Later calls with an equal
        function and equal shapes compile nothing.
      arrays: a tree of the arrays of the model.
    """

    function: Callable[[Any, Any], Any]
    arrays: Any


def model_error(before: Run, after: Run, options: Options) -> tuple[float | None, str]:
    """The error of the quantized model's outputs on the first batch.

    Args:
      before: the float model.
      after: the quantized model.
      options: the batches and the mask.

    Returns:
      (signal to quantization noise ratio in dB, note). It includes all floats of the
      outputs. It is None if it cannot be measured, and the note says why.
    """
    missing = "the error of the model's outputs was not measured"
    try:
        leaves = _squares_of_outputs(before, after, options)
    except Exception as error:
        # The quantized model exists, and may have taken hours. It must not be lost if
        # there is no memory for a run, or if code of the user refuses a QTensor.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return None, f"{missing}: a run of the first batch raised {reason}"
    if not leaves:
        return None, f"{missing}: a run of the first batch returns no floats"
    signal, noise = np.sum(leaves, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(signal / noise)) if noise else np.inf, ""


def largest_difference(before: Run, after: Run, options: Options) -> float:
    """The largest relative error of an output array on the first batch.

    Products are computed in full float32 precision. The error of an array is
    `norm(before - after) / norm(before)`.

    Args:
      before: a float model.
      after: a float model that must compute the same function.
      options: the batches and the mask.
    """
    with jax.default_matmul_precision("highest"):
        leaves = _squares_of_outputs(before, after, options)
    largest = 0.0
    for signal, noise in leaves:
        if noise > 0 or np.isnan(noise):
            largest = max(largest, np.sqrt(noise / signal) if signal else np.inf)
            largest = np.nan if np.isnan(noise) else largest
    return float(largest)


def _squares_of_outputs(
    before: Run, after: Run, options: Options
) -> list[tuple[float, float]]:
    """The sums of squares (outputs, differences) of each float array of the outputs."""
    assert options.batches
    batch = options.batches[0]
    counts = None if options.mask is None else jnp.asarray(options.mask(batch))
    squares = _squares_program(before.function, after.function)
    pairs = squares(before.arrays, after.arrays, Batch.of(batch), counts)
    return [(_in_float64(*signal), _in_float64(*noise)) for signal, noise in pairs]


@cached_program
def _squares_program(
    before: Callable[[Any, Any], Any], after: Callable[[Any, Any], Any]
) -> Callable[..., list[Any]]:
    """A jitted function that compares the outputs of two models."""

    @jax.jit
    def squares(
        arrays: Any, other_arrays: Any, batch: Batch, counts: Any
    ) -> list[tuple[Any, Any]]:
        outputs = jax.tree.leaves(before(arrays, batch.whole()))
        others = jax.tree.leaves(after(other_arrays, batch.whole()))
        return [
            _squares(a, b, counts)
            for a, b in zip(outputs, others, strict=True)
            if _is_floats(a)
        ]

    return squares


def _squares(a: jax.Array, b: jax.Array, counts: jax.Array | None) -> tuple:
    """The squares of an output and of its difference to another, as in `metrics`.

    Rows of padding do not count, and neither do infinities of the output.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    keep = jnp.isfinite(a)
    if counts is not None and counts.shape == a.shape[: counts.ndim]:
        rows = counts.astype(bool)
        keep &= rows.reshape(*rows.shape, *(1 for _ in range(a.ndim - rows.ndim)))
    difference = jnp.where(keep, a - b, 0.0)
    return metrics.squares(jnp.where(keep, a, 0.0)), metrics.squares(difference)


def _in_float64(total: jax.Array, unit: jax.Array) -> float:
    """The sum of squares `total * unit^2`. It cannot overflow in float64."""
    return float(total) * float(unit) ** 2


def _is_floats(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
