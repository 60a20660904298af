"""Rounding of real numbers to integers or to a floating point grid, in all four modes.

Rounding to a floating point grid uses integer arithmetic on bit patterns. Float
arithmetic is not possible: XLA flushes subnormal numbers on CPU, and it removes a
cast to a narrower type if a cast back follows. XLA does neither to integers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.formats._names import check_choice

MODES = ("nearest_even", "nearest_away", "toward_zero", "stochastic")
OVERFLOWS = ("infinity", "nan", "saturate")


def check_rounding(rounding: str, key: jax.Array | None) -> None:
    """Checks the rounding mode, and that a key is given only for stochastic rounding.

    Raises:
      ValueError: `rounding` is not one of `MODES`, `rounding` is "stochastic" and `key`
        is None, or `key` is given for another mode.
    """
    check_choice("rounding", rounding, MODES)
    if rounding == "stochastic" and key is None:
        raise ValueError(
            "rounding='stochastic' needs a PRNG key: pass key=jax.random.key(seed)."
        )
    if rounding != "stochastic" and key is not None:
        raise ValueError(
            f"key= was given but rounding={rounding!r} does not use it. Pass "
            "rounding='stochastic' (in a QuantSpec: "
            "spec.replace(rounding='stochastic')), or remove key=."
        )


def round_to_integer(
    x: jax.Array, rounding: str, key: jax.Array | None = None
) -> jax.Array:
    """Rounds `x` to whole numbers and keeps its dtype.

    NaN and infinities stay as they are. Stochastic rounding computes `floor(x + u)`
    with u uniform in [0, 1). Its mean over keys is `x` (Gupta et al., 2015).
    """
    if rounding == "nearest_even":
        return jnp.round(x)
    if rounding == "nearest_away":
        # trunc(x + 0.5) turns 0.49999997 into 1, because the sum is rounded. The
        # fraction x - trunc(x) is exact, so the comparison uses the fraction.
        whole = jnp.trunc(x)
        return whole + jnp.where(jnp.abs(x - whole) >= 0.5, jnp.sign(x), 0.0)
    if rounding == "toward_zero":
        return jnp.trunc(x)
    below = jnp.floor(x)
    return below + (random_uniform(key, x.shape) < x - below).astype(x.dtype)


def round_to_float(
    x: jax.Array,
    *,
    mantissa_bits: jax.typing.ArrayLike,
    min_exponent: jax.typing.ArrayLike,
    largest: jax.typing.ArrayLike,
    overflow: str = "infinity",
    has_nan: bool = True,
    signed_zero: bool = True,
    rounding: str = "nearest_even",
    key: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Rounds `x` to a floating point grid.

    The grid holds `+-m * 2^(e - mantissa_bits)` with `0 <= m < 2^(mantissa_bits + 1)`
    and `e >= min_exponent`, up to `largest`. The numbers that describe the grid may be
    traced, for a sweep over widths under `vmap`.

    Args:
      x: float32 or float64, any shape.
      mantissa_bits: number of explicit mantissa bits, 0 to 23 (float64: 0 to 52).
      min_exponent: exponent of the grid's smallest normal number, at least -126
        (float64: -1022).
      largest: largest finite number of the grid, in the dtype of `x`.
      overflow: what replaces larger results and infinities: "infinity", "nan", or
        "saturate" for `largest`.
      has_nan: False turns NaN into the zero of the opposite sign.
      signed_zero: False turns -0 into 0.
      rounding: one of `MODES`.
      key: PRNG key for stochastic rounding.
      residual: None rounds `x`. An int32 array rounds a true value whose nearest float
        is `x`. 0 means that the true value is `x`. 1 and 2 mean that it is farther from
        zero than `x`; -1 and -2 mean that it is nearer to zero. The distance is less
        than half of the last place for 1 and -1, and exactly half for 2 and -2.

    Returns:
      Array of the dtype of `x`. Its shape is the common shape of `x` and of the arrays
      that describe the grid.
    """
    carrier = _Carrier(jnp.dtype(x.dtype))
    pattern = lax.bitcast_convert_type(x, carrier.unsigned)
    magnitude = pattern & carrier.bits((1 << (carrier.width - 1)) - 1)
    sign = pattern ^ magnitude
    dropped = _constant_shift(mantissa_bits, min_exponent, carrier)
    if dropped is not None and residual is None:
        # All patterns drop the same number of bits. A carry out of the mantissa
        # increments the exponent field, so few operations suffice.
        shift = jnp.asarray(dropped, carrier.signed)
        body = shift_right(magnitude, shift, rounding, key) << dropped
    else:
        grid = _Grid(mantissa_bits, min_exponent, rounding, key)
        body = _round_magnitude(magnitude, residual, grid, carrier)

    limit = lax.bitcast_convert_type(jnp.asarray(largest, x.dtype), carrier.unsigned)
    over = body > limit
    if rounding == "toward_zero":
        # Rounding toward zero never turns a finite number into infinity (IEEE 754-2019,
        # section 7.4).
        over = magnitude == carrier.infinity
        body = jnp.minimum(body, limit)
    replacement = {
        "infinity": carrier.infinity,
        "nan": carrier.nan,
        "saturate": limit,
    }
    body = jnp.where(over, replacement[overflow], body)
    is_nan = magnitude > carrier.infinity
    body = jnp.where(is_nan, carrier.nan if has_nan else carrier.bits(0), body)
    if not has_nan:
        sign = jnp.where(is_nan, sign ^ carrier.bits(1 << (carrier.width - 1)), sign)
    if not signed_zero:
        sign = jnp.where(body == 0, carrier.bits(0), sign)
    return lax.bitcast_convert_type(body | sign, x.dtype)


@dataclasses.dataclass(frozen=True)
class _Carrier:
    """The bit layout of the dtype that holds the numbers, float32 or float64."""

    dtype: np.dtype

    @property
    def width(self) -> int:
        return jnp.finfo(self.dtype).bits

    @property
    def fraction_bits(self) -> int:
        return jnp.finfo(self.dtype).nmant

    @property
    def bias(self) -> int:
        return int(jnp.finfo(self.dtype).maxexp) - 1

    @property
    def unsigned(self) -> np.dtype:
        return jnp.dtype(f"uint{self.width}")

    @property
    def signed(self) -> np.dtype:
        return jnp.dtype(f"int{self.width}")

    @property
    def infinity(self) -> Any:
        return self.bits((2 * self.bias + 1) << self.fraction_bits)

    @property
    def nan(self) -> Any:
        return self.bits((4 * self.bias + 3) << (self.fraction_bits - 1))

    def bits(self, value: Any) -> Any:
        """`value` as a bit pattern: a numpy scalar, or an array if it is traced."""
        return _convert(value, self.unsigned)

    def integer(self, value: Any) -> Any:
        """`value` as a signed integer: a numpy scalar, or an array if it is traced."""
        return _convert(value, self.signed)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The grid to round to, and how to round. See the arguments of `round_to_float`."""

    mantissa_bits: Any
    min_exponent: Any
    rounding: str
    key: jax.Array | None


def _convert(value: Any, dtype: np.dtype) -> Any:
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    return np.asarray(value, dtype)


def _constant_shift(
    mantissa_bits: Any, min_exponent: Any, carrier: _Carrier
) -> int | None:
    """The number of low bits to drop if it is the same for all numbers, else None.

    The number of bits differs if the grid has subnormal numbers that are normal in the
    carrier. The number is unknown if the grid is traced.
    """
    static = all(isinstance(n, int | np.integer) for n in (mantissa_bits, min_exponent))
    if not static or mantissa_bits <= 0:
        return None
    info = jnp.finfo(carrier.dtype)
    if min_exponent > info.minexp:
        return None
    return int(info.nmant - mantissa_bits)


def _round_magnitude(
    magnitude: jax.Array, residual: jax.Array | None, grid: _Grid, carrier: _Carrier
) -> jax.Array:
    """Rounds bit patterns without sign to a grid, by a shift for each number.

    Overflow, infinities and NaN are left to the caller.
    """
    fraction_bits = carrier.fraction_bits
    biased = (magnitude >> fraction_bits).astype(carrier.signed)
    implicit = jnp.where(biased > 0, carrier.bits(1 << fraction_bits), carrier.bits(0))
    significand = (magnitude & carrier.bits((1 << fraction_bits) - 1)) | implicit
    # Below the grid's normal range the grid is coarser: more bits are dropped.
    lowest = carrier.integer(grid.min_exponent) + carrier.integer(carrier.bias)
    biased = jnp.maximum(biased, carrier.integer(1))
    shift = (
        carrier.integer(fraction_bits)
        - carrier.integer(grid.mantissa_bits)
        + jnp.maximum(0, lowest - biased)
    )
    if residual is None:
        rounded = shift_right(significand, shift, grid.rounding, grid.key)
    else:
        # Two more bits hold the distance of the true value from x.
        extended = (significand << 2) + residual.astype(carrier.unsigned)
        rounded = shift_right(extended, shift + 2, grid.rounding, grid.key)
    # The implicit bit in the shifted number adds one to the exponent field, and a carry
    # adds one more. So the exponent field starts one lower.
    places = jnp.minimum(shift, fraction_bits + 1).astype(carrier.unsigned)
    body = ((biased - 1).astype(carrier.unsigned) << fraction_bits) + (
        rounded << places
    )
    if grid.rounding == "stochastic":
        # A number far below the grid becomes the smallest positive number or zero.
        smallest = _smallest_positive(lowest, grid, carrier)
        body = jnp.where(shift > fraction_bits + 1, smallest, body)
    return jnp.where(rounded == 0, carrier.bits(0), body)


def _smallest_positive(lowest: Any, grid: _Grid, carrier: _Carrier) -> jax.Array:
    """Bit pattern of the grid's smallest positive number, `2^(min_exponent - m)`.

    `lowest` is the biased exponent of the grid's smallest normal number.
    """
    fraction_bits = carrier.fraction_bits
    exponent = lowest - carrier.integer(grid.mantissa_bits)
    normal = exponent.astype(carrier.unsigned) << fraction_bits
    place = jnp.clip(
        exponent + carrier.integer(fraction_bits - 1), 0, fraction_bits - 1
    )
    subnormal = carrier.bits(1) << place.astype(carrier.unsigned)
    return jnp.where(exponent > 0, normal, subnormal)


def shift_right(
    significand: jax.Array, shift: jax.Array, rounding: str, key: jax.Array | None
) -> jax.Array:
    """Returns `significand / 2^shift`, rounded to an integer.

    Args:
      significand: unsigned integers. One bit above the highest set bit must be free,
        for a carry.
      shift: signed integers, 0 or more. They may be larger than the width of the dtype.
      rounding: one of `MODES`.
      key: PRNG key for stochastic rounding.
    """
    dtype = significand.dtype
    width = jnp.iinfo(dtype).bits
    one = np.ones((), dtype)
    if rounding == "stochastic":
        # A uniform integer in [0, 2^shift) is added before the low bits are dropped. If
        # the shift exceeds the width, the significand moves first.
        extra = jnp.clip(shift - (width - 1), 0, width - 1).astype(dtype)
        places = jnp.minimum(shift, width - 1).astype(dtype)
        shape = jnp.broadcast_shapes(significand.shape, shift.shape)
        noise = random_bits(key, shape, dtype) & ((one << places) - one)
        return ((significand >> extra) + noise) >> places
    # A shift by width - 2 empties any significand.
    places = jnp.minimum(shift, width - 2).astype(dtype)
    if rounding == "toward_zero":
        return significand >> places
    half = (one << places) >> one
    if rounding == "nearest_away":
        return (significand + half) >> places
    # Ties go to even: add half, less one if the last bit that stays is even.
    last_bit = (significand >> places) & one
    to_even = jnp.where(places == 0, np.zeros((), dtype), half - one + last_bit)
    return (significand + to_even) >> places


def random_bits(
    key: jax.Array | None, shape: tuple[int, ...], dtype: np.dtype
) -> jax.Array:
    """Returns uniform bit patterns, from a hash of the key and of each element's index.

    The hash is two rounds of Wellons' lowbias32 (hash prospector, 2018), one round for
    each of two words drawn from `key`. It costs a few integer operations per element.
    `jax.random.bits` takes longer on CPU than the whole rounding. An element's bits
    depend on the key and its index only, so sharded arrays get the same bits.
    """
    assert key is not None
    words = jax.random.bits(key, (2,), np.uint32)
    index = jnp.zeros(shape, np.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        position = lax.broadcasted_iota(np.uint32, shape, axis)
        index = index + position * np.uint32(stride % 2**32)
        stride *= shape[axis]
    bits = _mix(_mix(index ^ words[0]) ^ words[1])
    if dtype == np.uint64:
        low = _mix(bits ^ words[0]).astype(np.uint64)
        return bits.astype(np.uint64) << np.uint64(32) | low
    return bits.astype(dtype)


def random_uniform(key: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """Returns uniform multiples of 2^-24 in [0, 1), float32."""
    bits = random_bits(key, shape, np.dtype(np.uint32))
    return (bits >> 8).astype(np.float32) * np.float32(2.0**-24)


def _mix(x: jax.Array) -> jax.Array:
    """Permutes the 32-bit words so that every bit depends on every other bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)
