"""Numbers about two arrays: how far a quantized one is from the original.

All of them accumulate in float32 after dividing by the reference's largest magnitude, so that 1e30 and 1e-30 neither
overflow nor vanish; all jit, and take arrays of any one shape.
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
    a, b, unit = _scaled(reference, x, "mse")
    return jnp.mean((a - b) ** 2) * unit * unit


def sqnr(reference: jax.typing.ArrayLike, x: jax.typing.ArrayLike) -> jax.Array:
    """Signal to quantization noise ratio, `10 log10(sum(reference^2) / sum((reference - x)^2))` in dB.

    Infinite for equal arrays, NaN where either holds a NaN.

    Example:
      >>> import jaxq
      >>> round(float(jaxq.metrics.sqnr([1.0, 1.0], [1.0, 0.9])), 2)
      23.01
    """
    a, b, _ = _scaled(reference, x, "sqnr")
    noise, signal = jnp.sum((a - b) ** 2), jnp.sum(a**2)
    return jnp.where(noise == 0, np.float32(np.inf), 10 * (jnp.log10(signal) - jnp.log10(noise)))


def cosine(reference: jax.typing.ArrayLike, x: jax.typing.ArrayLike) -> jax.Array:
    """Cosine of the angle between two arrays seen as vectors, -1 to 1; NaN if one is zero.

    Example:
      >>> import jaxq
      >>> float(jaxq.metrics.cosine([1.0, 0.0], [0.0, 2.0]))
      0.0
    """
    a, b, _ = _scaled(reference, x, "cosine")
    b = b / jnp.max(jnp.abs(b))
    return jnp.sum(a * b) / (jnp.sqrt(jnp.sum(a * a)) * jnp.sqrt(jnp.sum(b * b)))


def worst_block(reference: jax.typing.ArrayLike, x: jax.typing.ArrayLike, *, size: int = 64) -> jax.Array:
    """Largest relative error `norm(reference - x) / norm(reference)` of any `size` neighbours along the last axis.

    A good mean hides one ruined block; this does not. Blocks where the reference is all zero count as 0 if x is zero
    there too, else as infinite. The tail is a block of its own.

    Example:
      >>> import jaxq
      >>> float(jaxq.metrics.worst_block([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], size=1))
      1.0
    """
    a, b, _ = _scaled(reference, x, "worst_block")
    extra = -a.shape[-1] % size if a.ndim else 0
    a, b = (jnp.pad(jnp.atleast_1d(v), [(0, 0)] * (max(v.ndim, 1) - 1) + [(0, extra)]) for v in (a, b))
    a, b = a.reshape(-1, size), b.reshape(-1, size)
    unit = jnp.max(jnp.abs(a), axis=1, keepdims=True)  # small blocks must not vanish beside large ones
    noise = jnp.linalg.norm(a - b, axis=1)
    signal = jnp.linalg.norm(a / jnp.where(unit > 0, unit, 1.0), axis=1) * unit[:, 0]
    relative = noise / jnp.where(signal > 0, signal, 1.0)
    return jnp.max(jnp.where(signal > 0, relative, jnp.where(noise > 0, np.float32(np.inf), 0.0)), initial=0.0)


def kl_divergence(reference_logits: jax.typing.ArrayLike, logits: jax.typing.ArrayLike) -> jax.Array:
    """Mean over rows of `KL(softmax(reference) || softmax(logits))` along the last axis, in nats.

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
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def top1_agreement(reference_logits: jax.typing.ArrayLike, logits: jax.typing.ArrayLike) -> jax.Array:
    """Fraction of rows whose largest entry stands at the same index in both; 0 to 1.

    Example:
      >>> import jaxq
      >>> float(jaxq.metrics.top1_agreement([[0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, 1.0]]))
      0.5
    """
    a, b = jnp.asarray(reference_logits), jnp.asarray(logits)
    _same_shape(a, b, "top1_agreement")
    return jnp.mean((jnp.argmax(a, axis=-1) == jnp.argmax(b, axis=-1)).astype(jnp.float32))


def _scaled(reference, x, caller: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both arrays over the reference's largest magnitude (over 1 if that is 0), and that magnitude; float32."""
    a, b = jnp.asarray(reference, jnp.float32), jnp.asarray(x, jnp.float32)
    _same_shape(a, b, caller)
    unit = jnp.max(jnp.abs(a), initial=0.0)
    unit = jnp.where(unit > 0, unit, 1.0)
    return a / unit, b / unit, unit


def _same_shape(a: jax.Array, b: jax.Array, caller: str) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{caller}: shapes differ, {list(a.shape)} and {list(b.shape)}.")
