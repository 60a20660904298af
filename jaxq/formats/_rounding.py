"""Rounding a real number, in the modes every format shares: to an integer, or to a floating point grid.

Floating point grids are rounded to by integer arithmetic on bit patterns: XLA flushes subnormals on CPU and drops a
narrowing cast that is widened again, and neither touches integers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.formats._names import check_choice

MODES = ("nearest_even", "nearest_away", "toward_zero", "stochastic")
OVERFLOWS = ("infinity", "nan", "saturate")


def check_rounding(rounding: str, key: jax.Array | None) -> None:
    """Raises unless `rounding` is known and a key came exactly when it is stochastic."""
    check_choice("rounding", rounding, MODES)
    if rounding == "stochastic" and key is None:
        raise ValueError(
            "rounding='stochastic' needs a PRNG key: pass key=jax.random.key(seed)."
        )
    if rounding != "stochastic" and key is not None:
        raise ValueError(
            f"key= was given but rounding={rounding!r} does not use it. Ask for rounding='stochastic' "
            "(in a QuantSpec: spec.replace(rounding='stochastic')), or drop the key."
        )


def round_to_integer(
    x: jax.Array, rounding: str, key: jax.Array | None = None
) -> jax.Array:
    """`x` rounded to whole numbers, still float32; NaN and infinities pass through.

    Stochastic: `floor(x + u)` with u uniform in [0, 1), so the mean over keys is x (Gupta et al., 2015).
    """
    if rounding == "nearest_even":
        return jnp.round(x)
    if rounding == "nearest_away":
        # trunc(x + 0.5) would lift 0.49999997 to 1: the sum rounds. Compare the fraction, which is exact.
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
    beyond: jax.Array | None = None,
) -> jax.Array:
    """`x` rounded to `+-m * 2^(e - mantissa_bits)`, `m < 2^(mantissa_bits + 1)`, `e >= min_exponent`, up to `largest`.

    The numbers that describe the grid may be traced, for a sweep over widths under `vmap`.

    Args:
      x: float32 or float64, any shape.
      mantissa_bits: explicit ones, 0 to 23 (float64: 52).
      min_exponent: exponent of the smallest normal number, -126 (float64: -1022) or more.
      largest: largest finite number of the grid, in the dtype of `x`.
      overflow: what lies beyond it, infinities included: "infinity", "nan", or "saturate" for `largest`.
      has_nan: False turns NaN into the zero of the opposite sign.
      signed_zero: False turns -0 into 0.
      rounding: one of `MODES`.
      key: PRNG key for stochastic rounding.
      beyond: of a sum that `x` is the float nearest to, where it lies: 0 at `x`, 1 farther from zero, 2 half a last
        place farther, -1 and -2 nearer. The sum is rounded, not `x`.

    Returns:
      Array like `x`; where `mantissa_bits` or another number is an array, of their common shape.
    """
    info = jnp.finfo(x.dtype)
    width, fraction_bits, bias = info.bits, info.nmant, info.maxexp - 1
    unsigned, signed = jnp.dtype(f"uint{width}"), jnp.dtype(f"int{width}")

    def number(value: Any, dtype: Any = unsigned) -> Any:
        return (
            value.astype(dtype)
            if isinstance(value, jax.Array)
            else np.asarray(value, dtype)
        )

    pattern = lax.bitcast_convert_type(x, unsigned)
    magnitude = pattern & number((1 << (width - 1)) - 1)
    cut = _fixed_cut(mantissa_bits, min_exponent, info)
    if cut is not None and beyond is None:
        # The same place to cut at for every exponent, which a carry lifts by itself: few operations.
        body = shift_right(magnitude, jnp.asarray(cut, signed), rounding, key) << cut
    else:
        biased = (magnitude >> fraction_bits).astype(signed)
        implicit = jnp.where(biased > 0, number(1 << fraction_bits), number(0))
        significand = (magnitude & number((1 << fraction_bits) - 1)) | implicit
        lowest = number(min_exponent, signed) + number(bias, signed)
        biased = jnp.maximum(biased, number(1, signed))
        shift = (
            number(fraction_bits, signed)
            - number(mantissa_bits, signed)
            + jnp.maximum(0, lowest - biased)
        )
        if beyond is None:
            kept = shift_right(significand, shift, rounding, key)
        else:  # two places more, for what lies between x and its neighbours
            kept = shift_right(
                (significand << 2) + beyond.astype(unsigned), shift + 2, rounding, key
            )
        # The implicit bit in the shifted number lifts the exponent by one, and a carry by one more.
        places = jnp.minimum(shift, fraction_bits + 1).astype(unsigned)
        body = ((biased - 1).astype(unsigned) << fraction_bits) + (kept << places)
        if (
            rounding == "stochastic"
        ):  # from far below: the smallest positive number of the grid, or 0
            exponent = lowest - number(mantissa_bits, signed)
            smallest = jnp.where(
                exponent > 0,
                exponent.astype(unsigned) << fraction_bits,
                number(1)
                << jnp.clip(
                    exponent + number(fraction_bits - 1, signed), 0, fraction_bits - 1
                ).astype(unsigned),
            )
            body = jnp.where(shift > fraction_bits + 1, smallest, body)
        body = jnp.where(kept == 0, number(0), body)
    infinity, nan = (
        number((2 * bias + 1) << fraction_bits),
        number((4 * bias + 3) << (fraction_bits - 1)),
    )
    limit = lax.bitcast_convert_type(jnp.asarray(largest, x.dtype), unsigned)
    over = body > limit
    if (
        rounding == "toward_zero"
    ):  # no finite number overflows toward zero (IEEE 754-2019, 7.4)
        over, body = magnitude == infinity, jnp.minimum(body, limit)
    body = jnp.where(
        over, {"infinity": infinity, "nan": nan, "saturate": limit}[overflow], body
    )
    sign = pattern ^ magnitude
    is_nan = magnitude > infinity
    body = jnp.where(is_nan, nan if has_nan else number(0), body)
    if not has_nan:
        sign = jnp.where(is_nan, sign ^ number(1 << (width - 1)), sign)
    if not signed_zero:
        sign = jnp.where(body == 0, number(0), sign)
    return lax.bitcast_convert_type(body | sign, x.dtype)


def _fixed_cut(mantissa_bits: Any, min_exponent: Any, info: Any) -> int | None:
    """How many last bits of every pattern a grid as wide as the dtype leaves; None where that differs or is traced."""
    static = all(isinstance(n, int | np.integer) for n in (mantissa_bits, min_exponent))
    return (
        int(info.nmant - mantissa_bits)
        if static and mantissa_bits > 0 and min_exponent <= info.minexp
        else None
    )


def shift_right(
    significand: jax.Array, shift: jax.Array, rounding: str, key: jax.Array | None
) -> jax.Array:
    """`significand / 2^shift` rounded to an integer; unsigned, with room for one carry above its highest bit."""
    dtype, width = significand.dtype, jnp.iinfo(significand.dtype).bits
    one = np.ones((), dtype)
    if rounding == "stochastic":
        # A uniform integer in [0, 2^shift) is added before the cut. Beyond the width the significand moves first.
        extra = jnp.clip(shift - (width - 1), 0, width - 1).astype(dtype)
        places = jnp.minimum(shift, width - 1).astype(dtype)
        noise = random_bits(
            key, jnp.broadcast_shapes(significand.shape, shift.shape), dtype
        )
        return ((significand >> extra) + (noise & ((one << places) - one))) >> places
    places = jnp.minimum(shift, width - 2).astype(
        dtype
    )  # enough to empty any significand
    if rounding == "toward_zero":
        return significand >> places
    half = (one << places) >> one
    if rounding == "nearest_away":
        return (significand + half) >> places
    below_half = jnp.where(
        places == 0, np.zeros((), dtype), half - one + ((significand >> places) & one)
    )
    return (significand + below_half) >> places


def random_bits(
    key: jax.Array | None, shape: tuple[int, ...], dtype: np.dtype
) -> jax.Array:
    """Uniform bit patterns: a hash of the key's words and each element's place, a few integer operations an element.

    `jax.random.bits` would take longer on CPU than all of rounding. The hash is two rounds of
    Wellons' lowbias32 (hash prospector, 2018), one for each word drawn from `key`; an element's bits depend on its
    index alone, so sharded arrays get the same ones.
    """
    assert key is not None
    words = jax.random.bits(key, (2,), np.uint32)
    place, stride = jnp.zeros(shape, np.uint32), 1
    for axis in reversed(range(len(shape))):
        place = place + lax.broadcasted_iota(np.uint32, shape, axis) * np.uint32(
            stride % 2**32
        )
        stride *= shape[axis]
    bits = _mix(_mix(place ^ words[0]) ^ words[1])
    if dtype == np.uint64:
        return bits.astype(np.uint64) << np.uint64(32) | _mix(bits ^ words[0]).astype(
            np.uint64
        )
    return bits.astype(dtype)


def random_uniform(key: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """Uniform multiples of 2^-24 in [0, 1), float32."""
    return (random_bits(key, shape, np.dtype(np.uint32)) >> 8).astype(
        np.float32
    ) * np.float32(2.0**-24)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every bit depends on every other."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)
