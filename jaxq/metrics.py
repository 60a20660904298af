"""Numbers about two arrays: how far a quantized one is from the original.

All of them accumulate in float32, each sum of squares over the largest magnitude in it, so that 1e30 and 1e-30 neither
overflow nor vanish, also side by side; all jit, and take arrays of any one shape. A NaN anywhere gives NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["cosine", "kl_divergence", "mse", "sqnr", "top1_agreement", "worst_block"]


def mse(reference: jax.typing.ArrayLike, x: jax.typing.ArrayLike) -> jax.Array:
    """Mean squared error, `mean((reference - x)^2)`; float32 scalar in squared units of the input.

    Example:
      >>> import jaxq
      >>> float(jaxq.metrics.mse([1.0, 2.0], [1.0, 4.0]))
      2.0
    """
    a, b = _pair(reference, x, "mse")
    noise, unit = squares(a - b)
    return noise / max(a.size, 1) * unit * unit


def sqnr(reference: jax.typing.ArrayLike, x: jax.typing.ArrayLike) -> jax.Array:
    """Signal to quantization noise ratio, `10 log10(sum(reference^2) / sum((reference - x)^2))` in dB.

    Infinite for equal arrays.

    Example:
      >>> import jaxq
      >>> round(float(jaxq.metrics.sqnr([1.0, 1.0], [1.0, 0.9])), 2)
      23.01
    """
    a, b = _pair(reference, x, "sqnr")
    return decibels(squares(a), squares(a - b))


def cosine(reference: jax.typing.ArrayLike, x: jax.typing.ArrayLike) -> jax.Array:
    """Cosine of the angle between two arrays seen as vectors, -1 to 1; NaN if one is zero.

    Example:
      >>> import jaxq
      >>> float(jaxq.metrics.cosine([1.0, 0.0], [0.0, 2.0]))
      0.0
    """
    a, b = _pair(reference, x, "cosine")
    a, b = (v / _unit(v) for v in (a, b))
    return jnp.sum(a * b) / (jnp.sqrt(jnp.sum(a * a)) * jnp.sqrt(jnp.sum(b * b)))


def worst_block(
    reference: jax.typing.ArrayLike,
    x: jax.typing.ArrayLike,
    *,
    size: int = 64,
    axis: int = -1,
) -> jax.Array:
    """Largest relative error `norm(reference - x) / norm(reference)` of any `size` neighbours along an axis.

    A good mean hides one ruined block; this does not. Blocks where the reference is all zero count as 0 if x is zero
    there too, else as infinite. The tail is a block of its own.

    Example:
      >>> import jaxq
      >>> float(jaxq.metrics.worst_block([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], size=1))
      1.0
    """
    a, b = _pair(reference, x, "worst_block")
    a, b = (jnp.atleast_1d(v) for v in (a, b))
    axis, num = axis % a.ndim, a.shape[axis]
    widths = [(0, -num % size if i == axis else 0) for i in range(a.ndim)]
    cut = (*a.shape[:axis], -(-num // size), size, *a.shape[axis + 1 :])
    a, b = (jnp.pad(v, widths).reshape(cut) for v in (a, b))
    (noise, noise_unit), (signal, unit) = (
        squares(a - b, axis=axis + 1),
        squares(a, axis=axis + 1),
    )
    relative = (
        jnp.sqrt(noise)
        / jnp.sqrt(jnp.where(signal > 0, signal, 1.0))
        * (noise_unit / unit)
    )
    relative = jnp.where((signal == 0) & (noise > 0), np.float32(np.inf), relative)
    lost = jnp.isnan(relative).any()  # a maximum may drop NaN
    return jnp.where(lost, np.float32(np.nan), jnp.max(relative, initial=0.0))


def kl_divergence(
    reference_logits: jax.typing.ArrayLike, logits: jax.typing.ArrayLike
) -> jax.Array:
    """Mean over rows of `KL(softmax(reference) || softmax(logits))` along the last axis, in nats.

    Entries the reference gives no probability (logits of -inf) count as 0, as in the limit.

    Args:
      reference_logits: `[..., vocab]`.
      logits: the same shape.

    Example:
      >>> import jaxq
      >>> float(jaxq.metrics.kl_divergence([[0.0, 1.0]], [[5.0, 6.0]]))
      0.0
    """
    a, b = (jnp.asarray(v, jnp.float32) for v in (reference_logits, logits))
    _same_shape(a, b, "kl_divergence")
    log_p, log_q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    p = jnp.exp(log_p)
    return jnp.mean(jnp.sum(jnp.where(p == 0, 0.0, p * (log_p - log_q)), axis=-1))


def top1_agreement(
    reference_logits: jax.typing.ArrayLike, logits: jax.typing.ArrayLike
) -> jax.Array:
    """Fraction of rows whose largest entry stands at the same index in both; 0 to 1.

    Example:
      >>> import jaxq
      >>> float(jaxq.metrics.top1_agreement([[0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, 1.0]]))
      0.5
    """
    a, b = jnp.asarray(reference_logits), jnp.asarray(logits)
    _same_shape(a, b, "top1_agreement")
    return jnp.mean(
        (jnp.argmax(a, axis=-1) == jnp.argmax(b, axis=-1)).astype(jnp.float32)
    )


def _pair(reference, x, caller: str) -> tuple[jax.Array, jax.Array]:
    """Both arrays in float32, of one shape."""
    a, b = jnp.asarray(reference, jnp.float32), jnp.asarray(x, jnp.float32)
    _same_shape(a, b, caller)
    return a, b


def decibels(
    signal: tuple[jax.Array, jax.Array], noise: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Ten times the logarithm of a ratio of sums as `squares` gives them; infinite where there is no noise."""
    ratio = (
        jnp.log10(signal[0])
        - jnp.log10(noise[0])
        + 2 * (jnp.log10(signal[1]) - jnp.log10(noise[1]))
    )
    return jnp.where(noise[0] == 0, np.float32(np.inf), 10 * ratio)


def squares(v: jax.Array, axis: int | None = None) -> tuple[jax.Array, jax.Array]:
    """`sum((v / unit)^2)` and the unit, the largest magnitude (1 if that is 0 or infinite)."""
    unit = _unit(v, axis)
    return jnp.sum((v / unit) ** 2, axis=axis), unit if axis is None else unit.squeeze(
        axis
    )


def _unit(v: jax.Array, axis: int | None = None) -> jax.Array:
    unit = jnp.max(jnp.abs(v), axis=axis, keepdims=axis is not None, initial=0.0)
    return jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1.0)


def _same_shape(a: jax.Array, b: jax.Array, caller: str) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"{caller}: shapes differ, {list(a.shape)} and {list(b.shape)}."
        )
