"""Floating point formats: any width up to 32 bits, powers of two, and float64.

Encoding uses integer arithmetic on float32 bit patterns. Float arithmetic would flush
subnormal numbers, because XLA does so on CPU. Rounding follows IEEE 754. Which formats
have infinities, NaN and -0 follows ml_dtypes and the OCP 8-bit floating point
specification (2023).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.debug_checks import allow_nonfinite
from jaxq.formats._format import Format
from jaxq.formats._names import check_choice
from jaxq.formats._rounding import (
    check_rounding,
    random_bits,
    round_to_float,
    shift_right,
)

FLAVOURS = ("ieee", "fn", "fnuz", "finite")

# Bit patterns of float32.
_INFINITY = np.uint32(0x7F800000)
_NAN = np.uint32(0x7FC00000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_FRACTION = np.uint32(0x7FFFFF)
_SMALLEST_NORMAL = np.uint32(1 << 23)  # 2^-126
_HALF_SMALLEST_NORMAL = np.uint32(1 << 22)  # 2^-127, a subnormal number


@dataclasses.dataclass(frozen=True)
class FloatFormat(Format):
    """Floating point with a sign, E exponent bits and M mantissa bits.

    A normal number is `(-1)^sign * 2^(exponent - bias) * (1 + mantissa / 2^M)`. A
    subnormal number is `(-1)^sign * 2^(1 - bias) * mantissa / 2^M`.

    | flavour | infinities | NaN | -0 |
    |---|---|---|---|
    | "ieee" | exponent all ones, mantissa 0 | exponent all ones, mantissa not 0 | yes |
    | "fn" | none | all ones | yes |
    | "fnuz" | none | the code that would be -0 | no |
    | "finite" | none | none: NaN becomes the zero of the opposite sign | yes |

    Args:
      name: registry name.
      exponent_bits: E, 1 to 8.
      num_mantissa_bits: M, 0 to 23.
      bias: exponent bias. None uses 2^(E-1) - 1, or 2^(E-1) for "fnuz".
      flavour: which codes are infinities and NaN, see the table.

    Raises:
      ValueError: a width is out of range, `flavour` is unknown, `flavour` is "ieee"
        with fewer than 2 exponent bits or no mantissa bit, or the format has numbers
        outside of float32's range 2^-126 to 2^127.

    Example:
      >>> import jaxq
      >>> fmt = jaxq.formats.FloatFormat("float7_e3m3fn", 3, 3, flavour="finite")
      >>> fmt.bits, fmt.max, fmt.smallest_positive
      (7, 30.0, 0.03125)
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
                "FloatFormat: exponent_bits must be 1 to 8 and mantissa_bits 0 to 23, "
                "because float32 must hold the numbers; got "
                f"exponent_bits={e}, mantissa_bits={m}."
            )
        if self.flavour == "ieee" and (m == 0 or e == 1):
            raise ValueError(
                "FloatFormat: flavour 'ieee' keeps the top exponent for infinity and "
                "NaN. It needs at least 2 exponent bits and 1 mantissa bit; got "
                f"e{e}m{m}. Use flavour='finite' or 'fn'."
            )
        if self.bias is None:
            default = (1 << (e - 1)) - 1 + (self.flavour == "fnuz")
            object.__setattr__(self, "bias", default)
        low = 1 - self._bias - m
        high = (self._top >> m) - self._bias
        if high > 127 or (low < -126 and not self._is_truncated_float32):
            raise ValueError(
                f"FloatFormat: e{e}m{m} with bias {self.bias} has numbers from "
                f"2^{low} to 2^{high}, which is beyond float32's range 2^-126 to "
                "2^127. Choose a bias nearer to the default."
            )

    @property
    def _bias(self) -> int:
        assert self.bias is not None
        return self.bias

    @property
    def _is_truncated_float32(self) -> bool:
        """Whether a code is the upper bits of a float32, as in bfloat16."""
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
        # Without mantissa bits there are no subnormal numbers.
        return 2.0 ** (1 - self._bias - self.num_mantissa_bits)

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
        top = self._top
        pattern = lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32)
        magnitude = pattern & _MAGNITUDE
        sign = pattern >> 31
        code = self._rounded_code(magnitude, rounding, key)

        is_nan = magnitude > _INFINITY
        over = code > top
        if rounding == "toward_zero":
            # Rounding toward zero never turns a finite number into infinity (IEEE
            # 754-2019, section 7.4).
            over = magnitude == _INFINITY
            code = jnp.minimum(code, np.uint32(top))
        has_infinity = self.flavour == "ieee"
        has_nan = self.flavour != "finite"
        over_code = top if saturate or not has_infinity else top + 1
        code = jnp.where(over, np.uint32(over_code), code)
        sign = jnp.where((code == 0) & (self.flavour == "fnuz"), np.uint32(0), sign)
        # Without saturation, overflow becomes NaN if there is no infinity.
        if not saturate and has_nan and not has_infinity:
            is_nan = is_nan | over
        if has_nan:
            nan_code = np.uint32(self._nan_code)
        else:
            # ml_dtypes turns NaN into the zero of the opposite sign. So does this.
            nan_code = (sign ^ 1) << (self.bits - 1)
        code = jnp.where(is_nan, nan_code, code | (sign << (self.bits - 1)))
        return code.astype(self.code_dtype)

    def _rounded_code(
        self, magnitude: jax.Array, rounding: str, key: jax.Array | None
    ) -> jax.Array:
        """Rounds float32 patterns without sign to codes without sign.

        The caller handles codes above the largest finite number.
        """
        m, bias = self.num_mantissa_bits, self._bias
        biased = (magnitude >> 23).astype(jnp.int32)
        implicit = jnp.where(biased > 0, np.uint32(1 << 23), np.uint32(0))
        significand = (magnitude & _FRACTION) | implicit
        exponent = jnp.maximum(biased, 1) - 127
        # The bits to drop: those that the mantissa lacks, and one more for each binade
        # below the format's normal range.
        shift = (23 - m) + jnp.maximum(0, (1 - bias) - exponent)
        code = shift_right(significand, shift, rounding, key)
        # `code` still has the implicit bit, which adds one to the exponent field. So
        # the field starts one lower. A carry out of the mantissa adds one more.
        field = jnp.clip(exponent + bias, 1, 1 << self.exponent_bits) - 1
        return code + (field << m).astype(jnp.uint32)

    def decode(self, codes: jax.Array) -> jax.Array:
        m, bias = self.num_mantissa_bits, self._bias
        codes = codes.astype(jnp.uint32)
        body = codes & np.uint32((1 << (self.bits - 1)) - 1)
        sign = (codes >> (self.bits - 1)) << 31
        if self._is_truncated_float32:
            return lax.bitcast_convert_type(sign | (body << (23 - m)), jnp.float32)
        # The difference of the biases may be negative: it wraps modulo 2^32.
        bias_difference = np.uint32((127 - bias) << 23 & 0xFFFFFFFF)
        normal = lax.bitcast_convert_type(
            (body << (23 - m)) + bias_difference, jnp.float32
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
    """float8_e8m0fnu: the powers of two from 2^-127 to 2^127, without zero and sign.

    It is the scale type of the OCP microscaling specification (2023). The code is the
    exponent + 127. Code 255 is NaN. Zero, negative numbers and NaN are encoded as NaN.
    Numbers below 2^-127 are encoded as 2^-127. A number half-way between two powers
    goes to the larger one.

    The scales of microscaling formats are not rounded this way. A `scale_rule` of
    `QuantSpec` computes them from the exponent of the block's maximum.

    Args:
      name: registry name.

    Example:
      >>> import jaxq
      >>> fmt = jaxq.formats.get("float8_e8m0fnu")
      >>> fmt.encode([1.0, 3.0, 0.0]).tolist(), fmt.round([1.0, 3.0]).tolist()
      ([127, 129, 255], [1.0, 4.0])
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
            code = _stochastic_exponent(pattern, key)
        else:
            # The mantissa is only the implicit bit, which is odd. So a tie goes up in
            # both nearest modes.
            code = (pattern + np.uint32(1 << 22)) >> 23
            # Between 2^-127 and 2^-126 float32 is subnormal. ml_dtypes goes up there.
            # So does this.
            above_smallest = (pattern > _HALF_SMALLEST_NORMAL).astype(jnp.uint32)
            code = jnp.where(pattern < _SMALLEST_NORMAL, above_smallest, code)
        # A pattern above infinity is NaN or has the sign bit.
        not_positive = (pattern == 0) | (pattern > _INFINITY)
        over = ~not_positive & (code > 254)
        code = jnp.where(
            not_positive | (over & (not saturate)),
            np.uint32(255),
            jnp.minimum(code, np.uint32(254)),
        )
        return code.astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        codes = codes.astype(jnp.uint32)
        # Code 0 is 2^-127, which is a subnormal number of float32.
        pattern = jnp.where(codes == 0, _HALF_SMALLEST_NORMAL, codes << 23)
        pattern = jnp.where(codes == 255, _NAN, pattern)
        return lax.bitcast_convert_type(pattern, jnp.float32)


def _stochastic_exponent(pattern: jax.Array, key: jax.Array | None) -> jax.Array:
    """Exponent codes of positive float32 patterns, rounded up at random.

    Noise of 23 bits is added to the mantissa. Between 2^-127 and 2^-126 float32 is
    subnormal and its patterns span only half of 2^23. They are stretched to 2^23, so
    that 2^-127 stays 2^-127.
    """
    excess = jnp.maximum(pattern, _HALF_SMALLEST_NORMAL) - _HALF_SMALLEST_NORMAL
    line = jnp.where(pattern < _SMALLEST_NORMAL, excess << 1, pattern)
    noise = random_bits(key, pattern.shape, pattern.dtype) >> 9
    return (line + noise) >> 23


@dataclasses.dataclass(frozen=True)
class DoubleFormat(Format):
    """float64: 11 exponent bits and 52 mantissa bits.

    `encode` and `decode` need 64-bit types, so they raise unless `jax_enable_x64` is
    set. `round` changes infinities only, because no float dtype of jax is wider.

    Args:
      name: registry name.

    Example:
      >>> import jaxq
      >>> fmt = jaxq.formats.get("float64")
      >>> fmt.bits, fmt.mantissa_bits
      (64, 52)
    """

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
        x = jnp.asarray(x)
        if not saturate:
            return x
        with allow_nonfinite():  # isinf compares with inf
            return jnp.where(jnp.isinf(x), jnp.sign(x) * jnp.finfo(x.dtype).max, x)

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        _raise_without_x64("encode")
        x = jnp.asarray(x).astype(jnp.float64)
        x = self.round(x, rounding=rounding, saturate=saturate, key=key)
        return lax.bitcast_convert_type(x, jnp.uint64)

    def decode(self, codes: jax.Array) -> jax.Array:
        _raise_without_x64("decode")
        return lax.bitcast_convert_type(codes, jnp.float64)


def _raise_without_x64(caller: str) -> None:
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"float64.{caller}: 64-bit types are off. Set "
            "jax.config.update('jax_enable_x64', True)."
        )
