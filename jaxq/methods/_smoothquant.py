"""SmoothQuant: difficulty moves from activations, where channels differ, to weights, where they hardly do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq.methods import _limits, _matrix

# Neither a channel's magnitude nor its scale is taken smaller than this.
_FLOOR = np.float32(1e-5)


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
    _limits.check_numbers("smoothquant", alpha=alpha)
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


def fold_scale_into_previous(
    s: jax.typing.ArrayLike,
    kernel_or_gain: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Divides the outputs of what comes before by `s`: a norm's gain and bias, or a linear's kernel and bias.

    Args:
      s: float `[n]`, not zero.
      kernel_or_gain: float `[..., n]`: a gain `[n]`, or a kernel with its output channels last.
      bias: float `[n]`, or None.

    Returns:
      `(kernel_or_gain / s, bias / s)`, each in its own dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import fold_scale_into_previous
      >>> fold_scale_into_previous(jnp.array([1.0, 4.0]), jnp.array([1.0, 2.0]))[0].tolist()
      [1.0, 0.5]
    """
    s = _scale(s, "fold_scale_into_previous")

    def divided(v: jax.typing.ArrayLike, name: str) -> jax.Array:
        v = jnp.asarray(v)
        if v.ndim < 1 or v.shape[-1:] != s.shape:
            raise ValueError(
                f"fold_scale_into_previous: the last axis of {name} must be that of s: {name} is "
                f"{_matrix.describe(v)}, s is {_matrix.describe(s)}."
            )
        return (
            v.astype(jnp.float32) / s.reshape((1,) * (v.ndim - 1) + s.shape)
        ).astype(v.dtype)

    return divided(kernel_or_gain, "kernel_or_gain"), None if bias is None else divided(
        bias, "bias"
    )


def fold_scale_into_next(s: jax.typing.ArrayLike, w: jax.typing.ArrayLike) -> jax.Array:
    """Multiplies the input channels of a weight by `s`.

    Args:
      s: float `[in]`.
      w: float `[..., in, out]`.

    Returns:
      `w * s[:, None]`, in the dtype of w.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import fold_scale_into_next
      >>> fold_scale_into_next(jnp.array([1.0, 4.0]), jnp.ones((2, 1))).tolist()
      [[1.0], [4.0]]
    """
    s, w = (
        _scale(s, "fold_scale_into_next"),
        _matrix.as_weight(w, "fold_scale_into_next"),
    )
    if w.shape[-2] != s.shape[0]:
        raise ValueError(
            f"fold_scale_into_next: w must be [..., {s.shape[0]}, out] to meet s, got {_matrix.describe(w)}."
        )
    return (
        w.astype(jnp.float32) * s.reshape((1,) * (w.ndim - 2) + (s.shape[0], 1))
    ).astype(w.dtype)


def as_weights(
    weights: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike], caller: str
) -> list[jax.Array]:
    """One or several matrices that read the same input, as a list.

    Raises:
      ValueError: there is none, or their numbers of input channels differ.
    """
    if isinstance(weights, list | tuple):
        if not weights:
            raise ValueError(
                f"{caller}: weights is empty; pass the matrices [in, out] that read the input."
            )
        out = [
            _matrix.as_weight(w, caller, f"weights[{i}]") for i, w in enumerate(weights)
        ]
    else:
        out = [_matrix.as_weight(weights, caller, "weights")]  # pyright: ignore[reportArgumentType]
    if any(w.shape[:-1] != out[0].shape[:-1] for w in out):
        shapes = ", ".join(_matrix.describe(w) for w in out)
        raise ValueError(
            f"{caller}: weights must be matrices [in, out] that read the same input, or stacks of them, got {shapes}."
        )
    return out


def _scale(s: jax.typing.ArrayLike, caller: str) -> jax.Array:
    s = jnp.asarray(s)
    if s.ndim != 1 or not jnp.issubdtype(s.dtype, jnp.floating):
        raise ValueError(
            f"{caller}: s must be a vector of floats, one a channel, got {_matrix.describe(s)}."
        )
    _matrix.raise_if_not_finite(s, "s", caller)
    return s.astype(jnp.float32)
