"""SmoothQuant: difficulty moves from activations, where channels differ, to weights, where they hardly do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq.methods import _matrix
from jaxq.methods._folding import as_weights
from jaxq.methods._method import Folding, Method
from jaxq.methods._options import SHARE, check_values, why_not_stochastic
from jaxq.observers import LayerStats
from jaxq.qtensor import QuantSpec

# Neither a channel's magnitude nor its scale is taken smaller than this.
_FLOOR = np.float32(1e-5)


_OPTIONS = {"alpha": SHARE}


class SmoothQuantInfo(NamedTuple):
    """What `smoothquant` saw, each `[in]`.

    Attributes:
      absmax_x: float32, largest magnitude of each input channel after division by the scales.
      absmax_w: float32, of each row of all weights after multiplication.
      dead: bool, channels that are zero in the inputs or in all weights, whose scale is 1.
    """

    absmax_x: jax.Array
    absmax_w: jax.Array
    dead: jax.Array


def smoothquant(
    absmax_x: jax.typing.ArrayLike,
    weights: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike],
    *,
    alpha: float = 0.5,
) -> tuple[jax.Array, SmoothQuantInfo]:
    """Scales that smooth an input shared by one or more linears: `s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`.

    `(x / s) (s w) = x w`. Divide by s in whatever comes before (`fold_scale_into_previous`), multiply the rows of
    every weight by it (`fold_scale_into_next`). At alpha = 0.5 both sides end with the same largest magnitude in each
    channel; at 1 all of the difficulty lies in the weights.

    Args:
      absmax_x: float `[in]` (or stacked like weights), largest magnitude of each input channel over calibration data.
      weights: `[in, out]`, or a sequence of `[in, out_i]` that read the same input (q, k and v; gate and up); or stacks
        of such matrices with the same axes in front.
      alpha: 0 to 1; 0.5 suits most models, 0.75 to 0.9 those with strong outliers.

    Returns:
      `(s, info)`: float32 `[in]` with the axes of a stack in front, and a `SmoothQuantInfo`.

    Raises:
      TypeError: not float arrays.
      ValueError: sizes differ, no weights, alpha out of range, negative or non-finite statistics.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import smoothquant
      >>> s, _ = smoothquant(jnp.array([2.0, 16.0, 2.0, 9.0]), jnp.array([[2.0], [1.0], [-2.0], [1.0]]))
      >>> s.tolist()
      [1.0, 4.0, 1.0, 3.0]

    References:
      Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2023,
      section 4, equation 4.
    """
    check_values("smoothquant", _OPTIONS, alpha=alpha)
    matrices = as_weights(weights, "smoothquant")
    num_in = matrices[0].shape[-2]
    said = "one magnitude for each input"
    x = _matrix.as_statistic(
        absmax_x, "absmax_x", "smoothquant", shape=(num_in,), said=said, w=matrices[0]
    )
    if not isinstance(x, Tracer) and bool((np.asarray(x) < 0).any()):
        raise ValueError(
            f"smoothquant: absmax_x holds magnitudes, but its smallest number is {float(x.min())}."
        )
    w = jnp.stack(
        [
            jnp.max(jnp.abs(m), axis=-1, initial=0.0).astype(jnp.float32)
            for m in matrices
        ]
    ).max(axis=0)
    dead = ~((x > 0) & (w > 0) & jnp.isfinite(x) & jnp.isfinite(w))
    s = jnp.maximum(x, _FLOOR) ** alpha / jnp.maximum(w, _FLOOR) ** (1 - alpha)
    s = jnp.where(dead, 1.0, jnp.maximum(s, _FLOOR))
    return s, SmoothQuantInfo(x / s, w * s, dead)


def _find_smoothquant_scale(
    source: jax.Array | None,
    weights: Sequence[jax.Array],
    stats: LayerStats,
    spec: QuantSpec,
    options: Mapping[str, Any],
) -> jax.Array:
    """The scale `[..., in]` for weights that read one input; see `Folding.find`."""
    return smoothquant(stats.absmax, weights, **options)[0]


def _why_not_smoothed(source: jax.Array | None, weights: Sequence[jax.Array]) -> str:
    """Why no scale can be moved; empty if one can. Only a norm takes scales."""
    if source is None:
        return ""
    return "not smoothed: no norm before it can take its scales"


METHOD = Method(
    "smoothquant",
    solve=None,
    options=_OPTIONS,
    why_not=why_not_stochastic,
    needs=("absmax",),
    folding=Folding(_find_smoothquant_scale, _why_not_smoothed),
    judged=False,
)
