"""Metrics of two arrays: how far a quantized array is from the original.

All metrics accumulate in float32, work under jit, and take two arrays of one shape.
Numbers are multiplied by powers of two before they are subtracted and before they are
squared. So no difference and no square overflows, and the squares of small numbers are
not lost. This includes the subnormal numbers of float32, which XLA on CPU reads as
zeros. float64 arrays are multiplied by a power of two before they are rounded to
float32, also numpy arrays without x64. A NaN in an array gives NaN.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.debug_checks import allow_nonfinite

__all__ = ["cosine", "kl_divergence", "mse", "sqnr", "top1_agreement", "worst_block"]


def mse(reference: jax.typing.ArrayLike, x: jax.typing.ArrayLike) -> jax.Array:
    """Returns the mean squared error, `mean((reference - x)^2)`.

    Args:
      reference: the original array, any shape.
      x: the array to compare, the same shape.

    Returns:
      float32 scalar, in squared units of the input.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jaxq
      >>> float(jaxq.metrics.mse([1.0, 2.0], [1.0, 4.0]))
      2.0
    """
    a, b, exponent = _scaled_pair(*_arrays(reference, x, "mse"))
    noise, unit = squares(a - b)
    mean = noise / max(a.size, 1)
    # Beyond these limits the result is infinite or 0 in float32.
    exponent = jnp.clip(exponent + _exponent(unit), -252, 252)
    # 2^(2 exponent) itself may be 0 or infinite in float32.
    for _ in range(2):
        mean = _times_power_of_two(mean, exponent)
    return mean


@allow_nonfinite()
def sqnr(reference: jax.typing.ArrayLike, x: jax.typing.ArrayLike) -> jax.Array:
    """Returns the signal to quantization noise ratio in dB.

    The ratio is `10 log10(sum(reference^2) / sum((reference - x)^2))`. It is infinite
    if the arrays are equal.

    Args:
      reference: the original array, any shape.
      x: the array to compare, the same shape.

    Returns:
      float32 scalar.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jaxq
      >>> round(float(jaxq.metrics.sqnr([1.0, 1.0], [1.0, 0.9])), 2)
      23.01
    """
    a, b, _ = _scaled_pair(*_arrays(reference, x, "sqnr"))
    return decibels(squares(a), squares(a - b))


def cosine(reference: jax.typing.ArrayLike, x: jax.typing.ArrayLike) -> jax.Array:
    """Returns the cosine of the angle between two arrays, read as vectors.

    Args:
      reference: the original array, any shape.
      x: the array to compare, the same shape.

    Returns:
      float32 scalar from -1 to 1. It is NaN if one array is all zero.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jaxq
      >>> float(jaxq.metrics.cosine([1.0, 0.0], [0.0, 2.0]))
      0.0
    """
    # Each array has a scale of its own.
    a, b = (_scaled_pair(v, v)[0] * _UNSCALED for v in _arrays(reference, x, "cosine"))
    ratio = jnp.sum(a * b) / (jnp.sqrt(jnp.sum(a * a)) * jnp.sqrt(jnp.sum(b * b)))
    # Rounding may give 1.0000001. `where` keeps NaN.
    return jnp.where(jnp.abs(ratio) > 1, jnp.sign(ratio), ratio)


@allow_nonfinite()
def worst_block(
    reference: jax.typing.ArrayLike,
    x: jax.typing.ArrayLike,
    *,
    size: int = 64,
    axis: int = -1,
) -> jax.Array:
    """Returns the largest relative error of any block of neighbours along an axis.

    The relative error of a block is `norm(reference - x) / norm(reference)`. A mean
    over the array can hide one block with a large error, but this metric shows it. If
    the reference is zero in a whole block, the block's error is 0 if `x` is zero there
    too, and infinite if it is not.

    Args:
      reference: the original array, any shape.
      x: the array to compare, the same shape.
      size: number of neighbours in a block. The last block may be shorter.
      axis: axis along which the blocks run.

    Returns:
      float32 scalar.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jaxq
      >>> reference, x = [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]
      >>> float(jaxq.metrics.worst_block(reference, x, size=1))
      1.0
    """
    a, b, _ = _scaled_pair(*_arrays(reference, x, "worst_block"))
    a, b = (jnp.atleast_1d(v) for v in (a, b))
    axis %= a.ndim
    num = a.shape[axis]
    padding = [(0, -num % size if i == axis else 0) for i in range(a.ndim)]
    shape = (*a.shape[:axis], -(-num // size), size, *a.shape[axis + 1 :])
    a, b = (jnp.pad(v, padding).reshape(shape) for v in (a, b))
    noise, noise_unit = squares(a - b, axis=axis + 1)
    signal, signal_unit = squares(a, axis=axis + 1)
    signal_norm = jnp.sqrt(jnp.where(signal > 0, signal, 1.0))
    error = jnp.sqrt(noise) / signal_norm * (noise_unit / signal_unit)
    error = jnp.where((signal == 0) & (noise > 0), np.float32(np.inf), error)
    # XLA's maximum may drop NaN, so NaN needs a test of its own.
    has_nan = jnp.isnan(error).any()
    return jnp.where(has_nan, np.float32(np.nan), jnp.max(error, initial=0.0))


def kl_divergence(
    reference_logits: jax.typing.ArrayLike, logits: jax.typing.ArrayLike
) -> jax.Array:
    """Returns the mean over rows of `KL(softmax(reference) || softmax(logits))`.

    The softmax is along the last axis. An entry with reference probability 0 (a logit
    of -inf) counts as 0, which is the limit.

    Args:
      reference_logits: `[..., vocab]`.
      logits: the same shape.

    Returns:
      float32 scalar, in nats.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jaxq
      >>> float(jaxq.metrics.kl_divergence([[0.0, 1.0]], [[5.0, 6.0]]))
      0.0
    """
    a, b = _arrays(reference_logits, logits, "kl_divergence")
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    log_p, log_q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    p = jnp.exp(log_p)
    return jnp.mean(jnp.sum(jnp.where(p == 0, 0.0, p * (log_p - log_q)), axis=-1))


def top1_agreement(
    reference_logits: jax.typing.ArrayLike, logits: jax.typing.ArrayLike
) -> jax.Array:
    """Returns the fraction of rows for which both models rank the same entry first.

    Args:
      reference_logits: `[..., vocab]`.
      logits: the same shape.

    Returns:
      float32 scalar from 0 to 1. It is NaN if an array has a NaN.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jaxq
      >>> reference, logits = [[0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, 1.0]]
      >>> float(jaxq.metrics.top1_agreement(reference, logits))
      0.5
    """
    a, b = jnp.asarray(reference_logits), jnp.asarray(logits)
    _check_same_shape(a, b, "top1_agreement")
    agree = jnp.argmax(a, axis=-1) == jnp.argmax(b, axis=-1)
    has_nan = jnp.isnan(a).any() | jnp.isnan(b).any()
    return jnp.where(has_nan, np.float32(np.nan), jnp.mean(agree.astype(jnp.float32)))


@allow_nonfinite()
def decibels(
    signal: tuple[jax.Array, jax.Array], noise: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Returns `10 log10(signal / noise)` of two sums of squares from `squares`.

    It is infinite if the noise is zero.
    """
    (signal_sum, signal_unit), (noise_sum, noise_unit) = signal, noise
    log_ratio = (
        jnp.log10(signal_sum)
        - jnp.log10(noise_sum)
        + 2 * (jnp.log10(signal_unit) - jnp.log10(noise_unit))
    )
    return jnp.where(noise_sum == 0, np.float32(np.inf), 10 * log_ratio)


def squares(v: jax.Array, axis: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of squares as a pair: `sum((v / unit)^2)` and `unit`.

    The sum of squares is the first times `unit^2`. The unit is a power of two near the
    largest magnitude, or 1 if that is 0, infinite or NaN. Without
    `axis` both are scalars. With `axis` both are arrays without this axis.
    """
    largest = jnp.max(jnp.abs(v), axis=axis, keepdims=axis is not None, initial=0.0)
    is_usable = (largest > 0) & jnp.isfinite(largest)
    exponent = jnp.where(is_usable, _exponent(largest), 0)
    # The inverse of a power of two is exact, and it is normal in this range.
    exponent = jnp.clip(exponent, -126, 126)
    total = jnp.sum((v * _exp2(-exponent)) ** 2, axis=axis)
    unit = _exp2(exponent)
    return total, unit if axis is None else unit.squeeze(axis)


# `_scaled_pair` scales numbers to magnitudes below 2^61. This is far from the largest
# number, so that differences do not overflow. It is farther from the smallest one, so
# that small numbers beside large ones are kept.
_SCALED_EXPONENT = 60
_UNSCALED = np.float32(2.0**-_SCALED_EXPONENT)


def _scaled_pair(
    a: jax.Array | np.ndarray, b: jax.Array | np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Multiplies two arrays by one power of two.

    Args:
      a: any array.
      b: an array of the same shape.

    Returns:
      The arrays times `2^-exponent` in float32, with a largest finite magnitude from
      2^60 to 2^61; and the exponent, int32 scalar.
    """
    return _scaled_float32_pair(*_as_float32(a), *_as_float32(b))


def _as_float32(v: jax.Array | np.ndarray) -> tuple[jax.Array, Any]:
    """(m, e) with `v = m * 2^e`: a float32 array and an int32 scalar.

    The largest finite magnitude of m is below 1 for a float64 array. For other arrays,
    e is 0.
    """
    if v.dtype != np.float64:
        return jnp.asarray(v, jnp.float32), np.int32(0)
    # Without x64, `jnp` would round a numpy array to float32 first.
    xp: Any = np if isinstance(v, np.ndarray) else jnp
    largest = xp.max(xp.where(xp.isfinite(v), xp.abs(v), 0.0), initial=0.0)
    exponent = xp.asarray(xp.frexp(largest)[1], np.int32)
    return jnp.asarray(xp.ldexp(v, -exponent), jnp.float32), exponent


@jax.jit
def _scaled_float32_pair(
    a: jax.Array, exponent_a: jax.Array, b: jax.Array, exponent_b: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_scaled_pair` of `a * 2^exponent_a` and `b * 2^exponent_b`."""
    infinity = np.uint32(0x7F800000)
    zero_exponent = np.int32(-1 << 20)

    def largest_exponent(v: jax.Array, own_exponent: jax.Array) -> jax.Array:
        pattern = _magnitude_pattern(v)
        finite = jnp.where(pattern < infinity, pattern, np.uint32(0))
        largest = jnp.max(finite, initial=0)
        digits, place = _significand(largest)
        exponent = place + _exponent(digits) + own_exponent
        return jnp.where(largest == 0, zero_exponent, exponent)

    largest = jnp.maximum(
        largest_exponent(a, exponent_a), largest_exponent(b, exponent_b)
    )
    exponent = jnp.where(largest == zero_exponent, 0, largest - _SCALED_EXPONENT)

    def scaled(v: jax.Array, own_exponent: jax.Array) -> jax.Array:
        pattern = _magnitude_pattern(v)
        digits, place = _significand(pattern)
        # Numbers that would be subnormal become 0. Only zeros have a larger power.
        power = jnp.minimum(place + own_exponent - exponent, _SCALED_EXPONENT)
        factor = jnp.where(power >= -126, _exp2(jnp.maximum(power, -126)), 0.0)
        magnitude = digits * factor
        sign = lax.bitcast_convert_type(v, jnp.int32) < 0
        value = jnp.where(sign, -magnitude, magnitude)
        return jnp.where(pattern < infinity, value, v)

    return scaled(a, exponent_a), scaled(b, exponent_b), exponent


def _magnitude_pattern(v: jax.Array) -> jax.Array:
    """The bits of |v| as uint32."""
    return lax.bitcast_convert_type(v, jnp.uint32) & np.uint32(0x7FFFFFFF)


def _significand(pattern: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(m, e) with `|v| = m * 2^e`: a whole float32 below 2^24, and int32.

    `pattern` has the bits of |v|. The pair is exact for subnormal numbers too.
    """
    biased = pattern >> 23
    implicit_bit = jnp.where(biased > 0, np.uint32(1 << 23), np.uint32(0))
    digits = (pattern & np.uint32(0x7FFFFF)) | implicit_bit
    place = jnp.maximum(biased, np.uint32(1)).astype(jnp.int32) - 150
    return digits.astype(jnp.float32), place


def _exponent(v: jax.Array) -> jax.Array:
    """`floor(log2 |v|)` of normal float32 numbers; int32."""
    return (_magnitude_pattern(v) >> 23).astype(jnp.int32) - 127


def _exp2(exponent: jax.Array) -> jax.Array:
    """`2^exponent` as float32, for exponents from -126 to 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _times_power_of_two(v: jax.Array, exponent: jax.Array) -> jax.Array:
    """`v * 2^exponent` for |exponent| <= 252; 2^exponent itself may overflow."""
    half = exponent >> 1
    return v * _exp2(half) * _exp2(exponent - half)


def _arrays(reference, x, caller: str) -> tuple[Any, Any]:
    """Both as arrays, after a check that their shapes are equal.

    numpy arrays stay numpy arrays, so that float64 is kept without x64.
    """
    a, b = (
        np.asarray(v) if isinstance(v, np.ndarray | np.generic) else jnp.asarray(v)
        for v in (reference, x)
    )
    _check_same_shape(a, b, caller)
    return a, b


def _check_same_shape(a: Any, b: Any, caller: str) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"{caller}: shapes differ, {list(a.shape)} and {list(b.shape)}. Pass two "
            "arrays of one shape."
        )
