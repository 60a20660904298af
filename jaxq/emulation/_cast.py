"""`cast`: the values of another format on an array's own dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.emulation._precision import straight_through

_CARRIERS = ("float16", "bfloat16", "float32", "float64")


def cast(
    x: jax.typing.ArrayLike,
    fmt: str | formats.Format,
    *,
    saturate: bool = True,
    rounding: str = "nearest_even",
    key: jax.Array | None = None,
) -> jax.Array:
    """`x` rounded to the numbers of a format, in its own dtype; exact to the bit, eager and jitted.

    Args:
      x: float16, bfloat16, float32 or float64 array, the carrier.
      fmt: a name (`jaxq.formats.names()`, or any `float<n>_e<E>m<M>`, `q<m>.<n>`) or a `Format`.
      saturate: True gives the largest finite number on overflow and for infinities; False what the format defines.
      rounding: "nearest_even", "nearest_away", "toward_zero" or "stochastic" (needs `key`).
      key: PRNG key for stochastic rounding: up with a probability equal to the distance from below, so that the mean
        over keys is `x`.

    Returns:
      Array of the shape and dtype of `x`. The gradient passes straight through.

    Raises:
      TypeError: `x` is not a float array, is float64 while 64-bit types are off, or its dtype cannot hold the format's
        numbers.
      ValueError: an unknown format or rounding, a missing or unused key.

    Example:
      >>> import jaxq
      >>> jaxq.cast([1.03, 500.0, -0.001], "float8_e4m3fn").tolist()
      [1.0, 448.0, -0.001953125]

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning", 2022; Gupta et al., "Deep Learning with Limited Numerical
      Precision", 2015 (stochastic rounding).
    """
    try:
        found = formats.get(fmt)
        formats.check_rounding(rounding, key)
    except ValueError as error:
        raise ValueError(f"cast: {error}") from None
    x = jnp.asarray(x, np.float32) if isinstance(x, float | list | tuple) else x
    dtype = getattr(x, "dtype", None)
    if str(dtype) not in _CARRIERS:
        got = type(x).__name__ if dtype is None else dtype
        raise TypeError(
            f"cast: x must be a float16, bfloat16, float32 or float64 array, got {got}. Pass x.astype(jnp.float32)."
        )
    x = jnp.asarray(x)
    if x.dtype != dtype:
        raise TypeError(
            f"cast: x is {dtype}, which jax keeps as {x.dtype}. Pass x.astype(np.float32), or set jax_enable_x64."
        )
    _raise_if_not_held(x.dtype, found)
    rounded = found.round(
        lax.stop_gradient(x), rounding=rounding, saturate=saturate, key=key
    )
    held = _largest_held(x.dtype, found)
    if (
        saturate and held < found.max
    ):  # a carrier too narrow for the format's largest number must not overflow either
        # By selection: a minimum could flush subnormals.
        rounded = jnp.where(
            rounded > held, held, jnp.where(rounded < -held, -held, rounded)
        )
    return straight_through(x, rounded.astype(x.dtype))


def _raise_if_not_held(dtype: np.dtype, fmt: formats.Format) -> None:
    """Raises where numbers of the format would be rounded again on their way into `dtype`."""
    if fmt.kind == "float" and not isinstance(fmt, formats.ExponentFormat):
        return  # a number of the carrier, rounded to a grid of powers of two, is a number of the carrier again
    if dtype == np.float64:
        raise TypeError(
            f"cast: {fmt.name} is computed in float32, x is float64. Pass x.astype(jnp.float32)."
        )
    with np.errstate(over="ignore"):
        held = dtype == np.float32 or np.array_equal(
            fmt.values(), fmt.values().astype(dtype).astype(np.float32)
        )
    if not held:
        raise TypeError(
            f"cast: {dtype.name} cannot hold the numbers of {fmt.name}. Pass x.astype(jnp.float32)."
        )


def _largest_held(dtype: np.dtype, fmt: formats.Format) -> float:
    """The largest number of the format that `dtype` holds as well."""
    largest = min(fmt.max, float(jnp.finfo(dtype).max))
    held = np.asarray(largest, dtype)
    if float(held) > largest:
        held = np.nextafter(held, np.asarray(0, dtype))
    if float(held) == fmt.max:
        return fmt.max
    with jax.ensure_compile_time_eval():
        return float(fmt.round(held.astype(np.float32), rounding="toward_zero"))
