"""Moving scales between a layer and the previous layer, for several methods.

AWQ, SmoothQuant and cross-layer equalization multiply the rows of a weight by a scale.
They divide the outputs of the previous layer by the same scale:
`x w = (x / s) (s w)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxq.methods import _matrix
from jaxq.methods._explicit_axes import on_explicit_axes


@on_explicit_axes
def fold_scale_into_previous(
    s: jax.typing.ArrayLike,
    kernel_or_gain: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Divides the outputs of the previous layer by `s`.

    That layer is a norm with a gain and a bias, or a linear layer with a kernel and a
    bias.

    Args:
      s: float `[n]`, not zero.
      kernel_or_gain: float `[..., n]`: a gain `[n]`, or a kernel with its output
        channels last.
      bias: float `[n]`, or None.

    Returns:
      `(kernel_or_gain / s, bias / s)`, each in its own dtype.

    Raises:
      ValueError: `s` is not a vector of floats, it has a number that is not finite, or
        the last axis of the other arrays has another size.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import fold_scale_into_previous
      >>> s, gain = jnp.array([1.0, 4.0]), jnp.array([1.0, 2.0])
      >>> gain, _ = fold_scale_into_previous(s, gain)
      >>> gain.tolist()
      [1.0, 0.5]
    """
    s = _as_scale(s, "fold_scale_into_previous")

    def divide(array: jax.typing.ArrayLike, name: str) -> jax.Array:
        array = jnp.asarray(array)
        if array.ndim < 1 or array.shape[-1:] != s.shape:
            raise ValueError(
                f"fold_scale_into_previous: the last axis of {name} must have the size "
                f"of s, got {name}: {_matrix.dtype_and_shape(array)}, s: "
                f"{_matrix.dtype_and_shape(s)}."
            )
        scale = s.reshape((1,) * (array.ndim - 1) + s.shape)
        return (array.astype(jnp.float32) / scale).astype(array.dtype)

    scaled = divide(kernel_or_gain, "kernel_or_gain")
    return scaled, None if bias is None else divide(bias, "bias")


@on_explicit_axes
def fold_scale_into_next(s: jax.typing.ArrayLike, w: jax.typing.ArrayLike) -> jax.Array:
    """Multiplies the input channels of a weight by `s`.

    Args:
      s: float `[in]`.
      w: float `[..., in, out]`.

    Returns:
      `w * s[:, None]`, in the dtype of w.

    Raises:
      TypeError: `w` is not a float array.
      ValueError: `s` is not a vector of floats, `w` is not a matrix, their sizes
        differ, or a number is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import fold_scale_into_next
      >>> fold_scale_into_next(jnp.array([1.0, 4.0]), jnp.ones((2, 1))).tolist()
      [[1.0], [4.0]]
    """
    s = _as_scale(s, "fold_scale_into_next")
    w = _matrix.as_weight(w, "fold_scale_into_next")
    if w.shape[-2] != s.shape[0]:
        raise ValueError(
            f"fold_scale_into_next: w must be [..., {s.shape[0]}, out], since s has "
            f"{s.shape[0]} numbers, got {_matrix.dtype_and_shape(w)}."
        )
    scale = s.reshape((1,) * (w.ndim - 2) + (s.shape[0], 1))
    return (w.astype(jnp.float32) * scale).astype(w.dtype)


def as_weights(
    weights: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike], caller: str
) -> list[jax.Array]:
    """Returns one or several matrices that read the same input as a list.

    Args:
      weights: `[..., in, out]`, or a sequence of `[..., in, out_i]`.
      caller: the name that error messages begin with.

    Raises:
      TypeError: a weight is not a float array.
      ValueError: the sequence is empty, a weight is not a matrix, or the axes before
        the last one differ.
    """
    if isinstance(weights, list | tuple):
        if not weights:
            raise ValueError(
                f"{caller}: weights is empty. Pass the matrices [in, out] that read "
                "the input."
            )
        matrices = [
            _matrix.as_weight(w, caller, f"weights[{i}]") for i, w in enumerate(weights)
        ]
    else:
        matrices = [_matrix.as_weight(weights, caller, "weights")]  # pyright: ignore
    if any(w.shape[:-1] != matrices[0].shape[:-1] for w in matrices):
        shapes = ", ".join(_matrix.dtype_and_shape(w) for w in matrices)
        raise ValueError(
            f"{caller}: weights must be matrices [in, out] that read the same input, "
            f"or stacks of them, got {shapes}."
        )
    return matrices


def why_not_one_to_one(source: jax.Array, weights: Sequence[jax.Array]) -> str:
    """Why the outputs of a linear layer cannot take scales; empty if they can.

    Args:
      source: the weight of the linear layer `[..., in, hidden]`.
      weights: the weights `[..., hidden, out]` that read its outputs.
    """
    # Grouped-query attention: an output of `v_proj` is read by several heads.
    if source.shape[-1] != weights[0].shape[-2]:
        return "not scaled: an output of the previous linear layer feeds several inputs"
    return ""


def _as_scale(s: jax.typing.ArrayLike, caller: str) -> jax.Array:
    """`s` as a finite float32 vector."""
    s = jnp.asarray(s)
    if s.ndim != 1 or not jnp.issubdtype(s.dtype, jnp.floating):
        raise ValueError(
            f"{caller}: s must be a vector of floats, one number for each channel, got "
            f"{_matrix.dtype_and_shape(s)}."
        )
    _matrix.check_finite_outside_jit(s, "s", caller)
    return s.astype(jnp.float32)
