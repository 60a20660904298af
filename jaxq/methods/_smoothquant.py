"""SmoothQuant: moves outliers from the activations into the weights.

The input channels of a layer differ widely in magnitude. The rows of its weight differ
little. A scale `s [in]` for each channel balances the two: `x w = (x / s) (s w)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq.methods import _matrix
from jaxq.methods._explicit_axes import on_explicit_axes
from jaxq.methods._folding import as_weights
from jaxq.methods._method import Folding, Method
from jaxq.methods._method_options import SHARE, check_values, why_not_stochastic
from jaxq.observers import LayerStats
from jaxq.processes import to_numpy
from jaxq.qtensor import QuantSpec

# The least magnitude of a channel, and the least scale, that the formula uses.
_LEAST_SCALE = np.float32(1e-5)
_OPTIONS = {"alpha": SHARE}


class SmoothQuantInfo(NamedTuple):
    """Diagnostics of `smoothquant`; every array is `[in]`.

    Attributes:
      absmax_x: float32, largest magnitude of each input channel, divided by its scale.
      absmax_w: float32, largest magnitude of each row of all weights, multiplied by its
        scale.
      dead: bool, channels that are zero in the inputs or in all weights. Their scale is
        1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import smoothquant
      >>> _, info = smoothquant(jnp.array([4.0, 0.0]), jnp.array([[1.0], [1.0]]))
      >>> info.absmax_x.tolist(), info.absmax_w.tolist(), info.dead.tolist()
      ([2.0, 0.0], [2.0, 1.0], [False, True])
    """

    absmax_x: jax.Array
    absmax_w: jax.Array
    dead: jax.Array


@on_explicit_axes
def smoothquant(
    absmax_x: jax.typing.ArrayLike,
    weights: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike],
    *,
    alpha: float = 0.5,
) -> tuple[jax.Array, SmoothQuantInfo]:
    """Finds the scales of an input that one or more linear layers share.

    `s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`, and `(x / s) (s w) = x w`. The caller
    divides the outputs of the previous layer by `s` (`fold_scale_into_previous`), and
    multiplies the rows of every weight by `s` (`fold_scale_into_next`). At alpha = 0.5
    both sides get the same largest magnitude in each channel. At alpha = 1 all channels
    of the input get the same magnitude.

    Args:
      absmax_x: float `[in]` (or stacked like the weights), largest magnitude of each
        input channel over the calibration batches.
      weights: `[in, out]`, or a sequence of `[in, out_i]` that read the same input (q,
        k and v; gate and up), or stacks of such matrices with the same axes in front.
      alpha: 0 to 1. 0.5 suits most models; 0.75 to 0.9 suits those with strong
        outliers.

    Returns:
      `(s, info)`: float32 `[in]` with the axes of a stack in front, and a
      `SmoothQuantInfo`.

    Raises:
      TypeError: an argument is not a float array.
      ValueError: alpha is out of range, `weights` is empty, sizes differ, or (outside
        jit) a statistic is negative or a number is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import smoothquant
      >>> w = jnp.array([[2.0], [1.0], [-2.0], [1.0]])
      >>> s, _ = smoothquant(jnp.array([2.0, 16.0, 2.0, 9.0]), w)
      >>> s.tolist()
      [1.0, 4.0, 1.0, 3.0]

    References:
      Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for
      Large Language Models", 2023, section 4, equation 4.
    """
    check_values("smoothquant", _OPTIONS, alpha=alpha)
    matrices = as_weights(weights, "smoothquant")
    x = _matrix.as_statistic(
        absmax_x,
        "absmax_x",
        "smoothquant",
        shape=(matrices[0].shape[-2],),
        meaning="one magnitude for each input",
        w=matrices[0],
    )
    if not isinstance(x, Tracer) and bool((to_numpy(x) < 0).any()):
        raise ValueError(
            "smoothquant: absmax_x must hold magnitudes, which are not negative. Its "
            f"smallest number is {float(x.min())}."
        )
    row_maxima = [
        jnp.max(jnp.abs(m), axis=-1, initial=0.0).astype(jnp.float32) for m in matrices
    ]
    w = jnp.stack(row_maxima).max(axis=0)  # [in]
    dead = ~((x > 0) & (w > 0) & jnp.isfinite(x) & jnp.isfinite(w))
    s = jnp.maximum(x, _LEAST_SCALE) ** alpha
    s = s / jnp.maximum(w, _LEAST_SCALE) ** (1 - alpha)
    s = jnp.where(dead, 1.0, jnp.maximum(s, _LEAST_SCALE))
    return s, SmoothQuantInfo(x / s, w * s, dead)


def _find_smoothing_scale(
    source: jax.Array | None,
    weights: Sequence[jax.Array],
    stats: LayerStats,
    spec: QuantSpec,
    options: Mapping[str, Any],
) -> jax.Array:
    """The scale `[..., in]` of weights that read one input; see `Folding.find`."""
    scale, _ = smoothquant(stats.absmax, weights, **options)
    return scale


def _why_not_smoothed(source: jax.Array | None, weights: Sequence[jax.Array]) -> str:
    """Why no scale can be moved; empty if one can. Only a norm takes scales."""
    if source is None:
        return ""
    return "not smoothed: no previous norm can take the scales"


METHOD = Method(
    "smoothquant",
    solve=None,
    options=_OPTIONS,
    why_not=why_not_stochastic,
    needs=("absmax",),
    folding=Folding(_find_smoothing_scale, _why_not_smoothed, at_run_time=True),
    judged=False,
)
