"""Floating point of any width up to 32 bits, by integer arithmetic on float32 bit patterns; and float64.

No float operation touches a subnormal: XLA flushes them on CPU, so encode works on the bits alone.
Casts follow IEEE 754 rounding; the tables of which formats have infinities, NaN and -0 follow ml_dtypes and the OCP
8-bit floating point specification (2023).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.formats._format import Format
from jaxq.formats._names import check_choice
from jaxq.formats._rounding import (
    check_rounding,
    random_bits,
    round_to_float,
    shift_right,
)

FLAVOURS = ("ieee", "fn", "fnuz", "finite")


@dataclasses.dataclass(frozen=True)
class FloatFormat(Format):
    """Sign, `exponent_bits`, `mantissa_bits`: `(-1)^S 2^(E-bias) (1 + m/2^M)`, subnormals `2^(1-bias) m/2^M`.

    | flavour | infinities | NaN | -0 |
    |---|---|---|---|
    | "ieee" | exponent all ones, mantissa 0 | exponent all ones, mantissa not 0 | yes |
    | "fn" | none | all ones | yes |
    | "fnuz" | none | the code of -0 | no |
    | "finite" | none | none: NaN encodes as the zero of the other sign | yes |

    Args:
      name: registry name.
      exponent_bits: 1 to 8.
      num_mantissa_bits: 0 to 23.
      bias: exponent bias; None gives 2^(exponent_bits-1) - 1, and one more for "fnuz".
      flavour: which codes are infinities and NaN, as above.
    """

    kind: ClassVar[str] = "float"

    exponent_bits: int
    num_mantissa_bits: int
    bias: int | None = None
    flavour: str = "ieee"

    def __post_init__(self):
        e, m = self.exponent_bits, self.num_mantissa_bits
        check_choice("FloatFormat: flavour", self.flavour, FLAVOURS)
        if not (1 <= e <= 8 and 0 <= m <= 23):
            raise ValueError(
                f"FloatFormat: exponent_bits must be 1 to 8 and mantissa_bits 0 to 23, which float32 holds; "
                f"got exponent_bits={e}, mantissa_bits={m}."
            )
        if self.flavour == "ieee" and (m == 0 or e == 1):
            raise ValueError(
                f"FloatFormat: flavour 'ieee' keeps the top exponent for infinity and NaN, which takes at least 2 "
                f"exponent bits and 1 mantissa bit; got e{e}m{m}. Use flavour='finite' or 'fn'."
            )
        if self.bias is None:
            object.__setattr__(
                self, "bias", (1 << (e - 1)) - 1 + (self.flavour == "fnuz")
            )
        low, high = 1 - self._bias - m, (self._top >> m) - self._bias
        if high > 127 or (low < -126 and not self._cuts_float32):
            raise ValueError(
                f"FloatFormat: e{e}m{m} with bias {self.bias} reaches from 2^{low} to 2^{high}, beyond float32's "
                "2^-126 to 2^127. Choose a bias nearer to the default."
            )

    @property
    def _bias(self) -> int:
        assert self.bias is not None
        return self.bias

    @property
    def _cuts_float32(self) -> bool:
        """True where a code is the upper bits of a float32 (bfloat16, tfloat32 and the like)."""
        return self.exponent_bits == 8 and self.bias == 127 and self.flavour == "ieee"

    @property
    def _nan_code(self) -> int:
        sign_bit = 1 << (self.bits - 1)
        if self.flavour == "ieee":
            return self._top + 1 + (1 << (self.num_mantissa_bits - 1))
        return self._top + 1 if self.flavour == "fn" else sign_bit

    @property
    def _top(self) -> int:
        """Code of the largest finite number, without its sign."""
        all_ones = (1 << (self.exponent_bits + self.num_mantissa_bits)) - 1
        if self.flavour == "ieee":
            return all_ones - (1 << self.num_mantissa_bits)
        return all_ones - (self.flavour == "fn")

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.num_mantissa_bits

    @property
    def mantissa_bits(self) -> int:
        return self.num_mantissa_bits

    @property
    def max(self) -> float:
        m = self.num_mantissa_bits
        fraction = self._top & ((1 << m) - 1)
        exponent = self._top >> m
        if exponent == 0:
            return fraction * 2.0 ** (1 - self._bias - m)
        return (1 + fraction * 2.0**-m) * 2.0 ** (exponent - self._bias)

    @property
    def min(self) -> float:
        return -self.max

    @property
    def smallest_positive(self) -> float:
        return (
            2.0 ** (1 - self._bias - self.num_mantissa_bits)
            if self.num_mantissa_bits
            else 2.0 ** (1 - self._bias)
        )

    def codes(self) -> np.ndarray:
        self._raise_if_too_many_codes()
        return np.arange(1 << self.bits, dtype=np.uint32).astype(self.code_dtype)

    def round(self, x, *, rounding="nearest_even", saturate=True, key=None):
        check_rounding(rounding, key)
        x = jnp.asarray(x)
        carrier = x.dtype if x.dtype == np.float64 else jnp.dtype(np.float32)
        overflow = {"ieee": "infinity", "finite": "saturate"}.get(self.flavour, "nan")
        return round_to_float(
            x.astype(carrier),
            mantissa_bits=self.num_mantissa_bits,
            min_exponent=1 - self._bias,
            largest=self.max,
            overflow="saturate" if saturate else overflow,
            has_nan=self.flavour != "finite",
            signed_zero=self.flavour != "fnuz",
            rounding=rounding,
            key=key,
        )

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        check_rounding(rounding, key)
        m, bias, top = self.num_mantissa_bits, self._bias, self._top
        pattern = lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32)
        magnitude = pattern & np.uint32(0x7FFFFFFF)
        sign = pattern >> 31
        biased32 = (magnitude >> 23).astype(jnp.int32)
        significand = (magnitude & np.uint32(0x7FFFFF)) | jnp.where(
            biased32 > 0, np.uint32(1 << 23), np.uint32(0)
        )
        exponent = jnp.maximum(biased32, 1) - 127
        # Low bits to drop: the mantissa's surplus, and more below the format's normal range.
        shift = (23 - m) + jnp.maximum(0, (1 - bias) - exponent)
        code = shift_right(significand, shift, rounding, key)
        # The implicit bit left in `code` lifts the exponent by one; a carry out of the mantissa does the rest.
        code = code + (
            (jnp.clip(exponent + bias, 1, 1 << self.exponent_bits) - 1) << m
        ).astype(jnp.uint32)

        is_nan, over = magnitude > np.uint32(0x7F800000), code > top
        if (
            rounding == "toward_zero"
        ):  # no finite number overflows toward zero (IEEE 754-2019, 7.4)
            over, code = (
                magnitude == np.uint32(0x7F800000),
                jnp.minimum(code, np.uint32(top)),
            )
        has_infinity, has_nan = self.flavour == "ieee", self.flavour != "finite"
        code = jnp.where(
            over, np.uint32(top if saturate or not has_infinity else top + 1), code
        )
        sign = jnp.where((code == 0) & (self.flavour == "fnuz"), np.uint32(0), sign)
        lost = is_nan if saturate or has_infinity or not has_nan else is_nan | over
        # Where no code is NaN, ml_dtypes turns one into the zero of the opposite sign, and so do we.
        nan_code = (
            np.uint32(self._nan_code) if has_nan else (sign ^ 1) << (self.bits - 1)
        )
        return jnp.where(lost, nan_code, code | (sign << (self.bits - 1))).astype(
            self.code_dtype
        )

    def decode(self, codes: jax.Array) -> jax.Array:
        m, bias = self.num_mantissa_bits, self._bias
        codes = codes.astype(jnp.uint32)
        body = codes & np.uint32((1 << (self.bits - 1)) - 1)
        sign = (codes >> (self.bits - 1)) << 31
        if self._cuts_float32:
            return lax.bitcast_convert_type(sign | (body << (23 - m)), jnp.float32)
        normal = lax.bitcast_convert_type(
            (body << (23 - m)) + np.uint32((127 - bias) << 23 & 0xFFFFFFFF), jnp.float32
        )
        subnormal = body.astype(jnp.float32) * np.float32(2.0 ** (1 - bias - m))
        value = jnp.where(body >> m == 0, subnormal, normal)
        if self.flavour == "ieee":
            value = jnp.where(body == self._top + 1, np.float32(np.inf), value)
        value = lax.bitcast_convert_type(
            lax.bitcast_convert_type(value, jnp.uint32) | sign, jnp.float32
        )
        if self.flavour == "ieee":
            return jnp.where(body > self._top + 1, np.float32(np.nan), value)
        if self.flavour == "finite":
            return value
        nan = body == self._top + 1 if self.flavour == "fn" else codes == self._nan_code
        return jnp.where(nan, np.float32(np.nan), value)


@dataclasses.dataclass(frozen=True)
class ExponentFormat(Format):
    """float8_e8m0fnu: the powers of two 2^-127 to 2^127, code = exponent + 127, NaN = 255; no zero, no sign.

    The scale type of the OCP microscaling specification (2023). Zero, negative numbers and NaN encode as NaN, numbers
    below 2^-127 as 2^-127, a half-way number as the larger power. An MX scale is not made by this rounding but
    by a `scale_rule`, which takes the exponent of the block's maximum.
    """

    kind: ClassVar[str] = "float"

    @property
    def bits(self) -> int:
        return 8

    @property
    def max(self) -> float:
        return 2.0**127

    @property
    def min(self) -> float:
        return 2.0**-127

    @property
    def smallest_positive(self) -> float:
        return 2.0**-127

    def codes(self) -> np.ndarray:
        return np.arange(256, dtype=np.uint8)

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        check_rounding(rounding, key)
        pattern = lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32)
        if rounding == "toward_zero":
            code = pattern >> 23
        elif rounding == "stochastic":
            # From 2^-127 to 2^-126 float32 is subnormal: stretch [2^22, 2^23) to a binade, so that 2^-127 stays itself.
            low = (jnp.maximum(pattern, np.uint32(1 << 22)) - np.uint32(1 << 22)) << 1
            line = jnp.where(pattern < np.uint32(1 << 23), low, pattern)
            code = (line + (random_bits(key, pattern.shape, pattern.dtype) >> 9)) >> 23
        else:  # the mantissa is the implicit bit alone, always odd: a tie goes up in both nearest modes
            code = (pattern + np.uint32(1 << 22)) >> 23
            # Between 2^-127 and 2^-126 (a subnormal of float32) ml_dtypes goes up, and so do we.
            code = jnp.where(
                pattern < np.uint32(1 << 23),
                (pattern > np.uint32(1 << 22)).astype(jnp.uint32),
                code,
            )
        not_positive = (pattern == 0) | (
            pattern > np.uint32(0x7F800000)
        )  # 0, NaN, and the sign bit
        over = ~not_positive & (code > 254)
        code = jnp.where(
            not_positive | (over & (not saturate)),
            np.uint32(255),
            jnp.minimum(code, np.uint32(254)),
        )
        return code.astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        codes = codes.astype(jnp.uint32)
        pattern = jnp.where(
            codes == 0, np.uint32(1 << 22), codes << 23
        )  # 2^-127 is a float32 subnormal
        pattern = jnp.where(codes == 255, np.uint32(0x7FC00000), pattern)
        return lax.bitcast_convert_type(pattern, jnp.float32)


@dataclasses.dataclass(frozen=True)
class DoubleFormat(Format):
    """float64: 11 exponent bits, 52 mantissa bits. Its codes and numbers exist under `jax_enable_x64` only."""

    kind: ClassVar[str] = "float"

    @property
    def bits(self) -> int:
        return 64

    @property
    def max(self) -> float:
        return float(np.finfo(np.float64).max)

    @property
    def min(self) -> float:
        return -self.max

    @property
    def smallest_positive(self) -> float:
        return 2.0**-1074

    @property
    def mantissa_bits(self) -> int:
        return 52

    def codes(self) -> np.ndarray:
        self._raise_if_too_many_codes()
        raise AssertionError

    def round(self, x, *, rounding="nearest_even", saturate=True, key=None):
        check_rounding(rounding, key)
        x = jnp.asarray(x)  # no carrier is wider: only infinities can change
        return (
            jnp.where(jnp.isinf(x), jnp.sign(x) * jnp.finfo(x.dtype).max, x)
            if saturate
            else x
        )

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        _raise_without_x64("encode")
        x = self.round(
            jnp.asarray(x).astype(jnp.float64),
            rounding=rounding,
            saturate=saturate,
            key=key,
        )
        return lax.bitcast_convert_type(x, jnp.uint64)

    def decode(self, codes: jax.Array) -> jax.Array:
        _raise_without_x64("decode")
        return lax.bitcast_convert_type(codes, jnp.float64)


def _raise_without_x64(caller: str) -> None:
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"float64.{caller}: 64-bit types are off. Set jax.config.update('jax_enable_x64', True)."
        )
