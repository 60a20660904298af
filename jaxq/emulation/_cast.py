"""`cast`: rounds an array to the numbers of a format and keeps the array's dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.emulation._precision import straight_through
from jaxq.meshes import compile_time_eval

_CARRIERS = ("float16", "bfloat16", "float32", "float64")


def cast(
    x: jax.typing.ArrayLike,
    fmt: str | formats.Format,
    *,
    saturate: bool = True,
    rounding: str = "nearest_even",
    key: jax.Array | None = None,
) -> jax.Array:
    """Rounds `x` to the numbers of a format, without a change of dtype.

    The result is the same bit for bit in eager and in jitted programs. The gradient is
    straight-through.

    Args:
      x: float16, bfloat16, float32 or float64 array of any shape. Python floats and
        lists are converted to float32.
      fmt: name of a format (see `jaxq.formats.get`), or a `Format`.
      saturate: True maps overflow and infinities to the largest finite number. False
        maps them to the format's infinity or NaN, if it has one.
      rounding: "nearest_even", "nearest_away", "toward_zero" or "stochastic".
        "stochastic" needs `key`.
      key: PRNG key for stochastic rounding. A number is rounded up with a probability
        that is proportional to its distance from the number below, so that the mean
        over keys is `x`.

    Returns:
      Array of the shape and dtype of `x`.

    Raises:
      TypeError: the dtype of `x` is not float16, bfloat16, float32 or float64, `x` is
        float64 and 64-bit types are off, or the dtype of `x` cannot hold the numbers
        of the format.
      ValueError: no format has this name, `rounding` is not one of the four modes,
        `rounding` is "stochastic" and `key` is None, or `key` is given for another
        mode.

    Example:
      >>> import jaxq
      >>> jaxq.cast([1.03, 500.0, -0.001], "float8_e4m3fn").tolist()
      [1.0, 448.0, -0.001953125]

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning", 2022; Gupta et al., "Deep
      Learning with Limited Numerical Precision", 2015 (stochastic rounding).
    """
    try:
        fmt = formats.get(fmt)
        formats.check_rounding(rounding, key)
    except ValueError as error:
        raise ValueError(f"cast: {error}") from None
    x = _as_carrier(x)
    _raise_if_not_held(x.dtype, fmt)
    rounded = fmt.round(
        lax.stop_gradient(x), rounding=rounding, saturate=saturate, key=key
    )
    largest = _largest_held(x.dtype, fmt)
    if saturate and largest < fmt.max:
        # The dtype of x is too narrow for the format's largest number, which would
        # become infinity. A minimum could flush subnormal numbers, so this selects.
        rounded = jnp.where(rounded < -largest, -largest, rounded)
        rounded = jnp.where(rounded > largest, largest, rounded)
    return straight_through(x, rounded.astype(x.dtype))


def _as_carrier(x: Any) -> jax.Array:
    """`x` as a jax array of one of the four float dtypes, or a TypeError."""
    if isinstance(x, float | list | tuple):
        x = jnp.asarray(x, np.float32)
    dtype = getattr(x, "dtype", None)
    if str(dtype) not in _CARRIERS:
        got = type(x).__name__ if dtype is None else dtype
        raise TypeError(
            "cast: x must be a float16, bfloat16, float32 or float64 array, got "
            f"{got}. Pass x.astype(jnp.float32)."
        )
    x = jnp.asarray(x)
    if x.dtype != dtype:
        raise TypeError(
            f"cast: x is {dtype}, but jax converts it to {x.dtype}. Pass "
            "x.astype(np.float32), or set jax_enable_x64."
        )
    return x


def _raise_if_not_held(dtype: np.dtype, fmt: formats.Format) -> None:
    """Raises a TypeError if a cast of a `dtype` array would round its numbers twice."""
    if fmt.kind == "float" and not isinstance(fmt, formats.ExponentFormat):
        # A number of the dtype, rounded to a floating point grid, is again a number of
        # the dtype.
        return
    if dtype == np.float64:
        raise TypeError(
            f"cast: a cast to {fmt.name} is computed in float32, but x is float64. "
            "Pass x.astype(jnp.float32)."
        )
    if dtype == np.float32:
        return
    numbers = fmt.values()
    with np.errstate(over="ignore"):
        narrow = numbers.astype(dtype).astype(np.float32)
    if not np.array_equal(numbers, narrow):
        raise TypeError(
            f"cast: {dtype.name} cannot hold the numbers of {fmt.name}. Pass "
            "x.astype(jnp.float32)."
        )


def _largest_held(dtype: np.dtype, fmt: formats.Format) -> float:
    """The largest number of the format that `dtype` can hold."""
    limit = min(fmt.max, float(jnp.finfo(dtype).max))
    largest = np.asarray(limit, dtype)
    if float(largest) > limit:  # the conversion rounded up
        largest = np.nextafter(largest, np.asarray(0, dtype))
    if float(largest) == fmt.max:
        return fmt.max
    with compile_time_eval():
        return float(fmt.round(largest.astype(np.float32), rounding="toward_zero"))
