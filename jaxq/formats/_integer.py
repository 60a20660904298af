"""Integer formats of 1 to 8 bits, and fixed point formats of up to 16 bits.

Integers are in two's complement, unsigned, or stored as a sign and a magnitude.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats._format import Format
from jaxq.formats._rounding import check_rounding, round_to_integer


@dataclasses.dataclass(frozen=True)
class IntegerFormat(Format):
    """The whole numbers of n bits. The code of a number is the number itself.

    | | smallest | largest |
    |---|---|---|
    | signed | -2^(n-1) | 2^(n-1) - 1 |
    | signed, narrow range | -(2^(n-1) - 1) | 2^(n-1) - 1 |
    | unsigned | 0 | 2^n - 1 |

    NaN becomes 0.

    Args:
      name: registry name.
      num_bits: n, 1 to 8, or 2 to 8 for the narrow range. The signed format of one bit
        has the numbers 0 and -1.
      signed: True uses two's complement and int8 codes. False uses uint8 codes.
      narrow: True leaves out the most negative number, so that the range is symmetric
        about zero.

    Raises:
      ValueError: `num_bits` is out of range, or `narrow` is True for an unsigned
        format.

    Example:
      >>> import jaxq
      >>> fmt = jaxq.formats.IntegerFormat("int3_narrow", 3, narrow=True)
      >>> fmt.min, fmt.max, fmt.encode([2.5, -9.0]).tolist()
      (-3.0, 3.0, [2, -3])
    """

    kind: ClassVar[str] = "integer"

    num_bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self):
        fewest = 2 if self.narrow else 1
        if not fewest <= self.num_bits <= 8:
            width = "narrow" if self.narrow else "integer"
            raise ValueError(
                f"IntegerFormat: {width} width must be {fewest} to 8 bits, got "
                f"num_bits={self.num_bits}."
            )
        if self.narrow and not self.signed:
            raise ValueError(
                "IntegerFormat: narrow range is for signed integers. Unsigned integers "
                "start at 0. Pass narrow=False."
            )

    @property
    def bits(self) -> int:
        return self.num_bits

    @property
    def code_dtype(self) -> np.dtype:
        return np.dtype(np.int8 if self.signed else np.uint8)

    @property
    def max(self) -> float:
        magnitude_bits = self.num_bits - 1 if self.signed else self.num_bits
        return float(2**magnitude_bits - 1)

    @property
    def min(self) -> float:
        if not self.signed:
            return 0.0
        return -self.max if self.narrow else -self.max - 1

    @property
    def smallest_positive(self) -> float:
        return 1.0 if self.max else 0.0

    def codes(self) -> np.ndarray:
        return _by_bit_pattern(int(self.min), int(self.max)).astype(self.code_dtype)

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        del saturate  # integers have no infinity and no NaN
        codes = _round_and_clip(x, self.min, self.max, rounding, key)
        return codes.astype(self.code_dtype)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SignMagnitudeFormat(Format):
    """The whole numbers from -(2^(n-1) - 1) to 2^(n-1) - 1, as sign and magnitude.

    The highest bit of a code is the sign. The other bits are the magnitude. 0 and -0
    are two codes. A negative number that rounds to zero gets the code of -0. NaN
    becomes 0.

    Args:
      name: registry name.
      num_bits: n, 2 to 8.

    Raises:
      ValueError: `num_bits` is not 2 to 8.

    Example:
      >>> import jaxq
      >>> fmt = jaxq.formats.get("int4_sign_magnitude")
      >>> fmt.encode([3.0, -3.0, -0.1]).tolist()
      [3, 11, 8]
    """

    kind: ClassVar[str] = "sign_magnitude"

    num_bits: int

    def __post_init__(self):
        if not 2 <= self.num_bits <= 8:
            raise ValueError(
                "SignMagnitudeFormat: width must be 2 to 8 bits, got "
                f"num_bits={self.num_bits}."
            )

    @property
    def bits(self) -> int:
        return self.num_bits

    @property
    def max(self) -> float:
        return float(2 ** (self.num_bits - 1) - 1)

    @property
    def min(self) -> float:
        return -self.max

    @property
    def smallest_positive(self) -> float:
        return 1.0

    def codes(self) -> np.ndarray:
        return np.arange(1 << self.num_bits, dtype=np.uint8)

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        del saturate  # there is no infinity and no NaN
        x = jnp.asarray(x, jnp.float32)
        whole = _round_and_clip(x, self.min, self.max, rounding, key)
        magnitude = jnp.abs(whole).astype(jnp.uint8)
        sign = (jnp.signbit(x) & ~jnp.isnan(x)).astype(jnp.uint8)
        return magnitude | (sign << (self.num_bits - 1))

    def decode(self, codes: jax.Array) -> jax.Array:
        sign = codes >> (self.num_bits - 1)
        magnitude = codes & np.uint8((1 << (self.num_bits - 1)) - 1)
        magnitude = magnitude.astype(jnp.float32)
        return jnp.where(sign == 0, magnitude, -magnitude)


@dataclasses.dataclass(frozen=True)
class FixedPointFormat(Format):
    """Fixed point: the number of a code is `code * 2^-n`. Qm.n is signed, UQm.n is not.

    | | smallest | largest | width in bits |
    |---|---|---|---|
    | Qm.n | -2^m | 2^m - 2^-n | 1 + m + n |
    | UQm.n | 0 | 2^m - 2^-n | m + n |

    As in ARM's convention, m does not count the sign. NaN becomes 0.

    Args:
      name: registry name.
      integer_bits: m, 0 or more.
      fraction_bits: n, 0 or more. The format has at most 16 bits.
      signed: True uses two's complement.

    Raises:
      ValueError: `integer_bits` or `fraction_bits` is negative, both are 0, or the
        format has more than 16 bits with the sign.

    Example:
      >>> import jaxq
      >>> q = jaxq.formats.get("q3.4")
      >>> q.encode([1.03, 7.97, -9.0]).tolist(), q.round([1.03, 7.97, -9.0]).tolist()
      ([16, 127, -128], [1.0, 7.9375, -8.0])
    """

    kind: ClassVar[str] = "fixed_point"

    integer_bits: int
    fraction_bits: int
    signed: bool = True

    def __post_init__(self):
        negative = self.integer_bits < 0 or self.fraction_bits < 0
        if negative or not 1 + self.signed <= self.bits <= 16:
            raise ValueError(
                "FixedPointFormat: integer_bits and fraction_bits must not be negative "
                "and not both 0, and the format must have at most 16 bits with the "
                f"sign; got integer_bits={self.integer_bits}, "
                f"fraction_bits={self.fraction_bits}, signed={self.signed}."
            )

    @property
    def bits(self) -> int:
        return int(self.signed) + self.integer_bits + self.fraction_bits

    @property
    def code_dtype(self) -> np.dtype:
        width = 8 if self.bits <= 8 else 16
        return np.dtype(f"int{width}" if self.signed else f"uint{width}")

    @property
    def max(self) -> float:
        return 2.0**self.integer_bits - self.smallest_positive

    @property
    def min(self) -> float:
        return -(2.0**self.integer_bits) if self.signed else 0.0

    @property
    def smallest_positive(self) -> float:
        return 2.0**-self.fraction_bits

    @property
    def mantissa_bits(self) -> int:
        return max(0, self.integer_bits + self.fraction_bits - 1)

    def codes(self) -> np.ndarray:
        low = int(self.min / self.smallest_positive)
        high = int(self.max / self.smallest_positive)
        return _by_bit_pattern(low, high).astype(self.code_dtype)

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        del saturate  # fixed point has no infinity and no NaN
        unit = self.smallest_positive
        # x is clipped before the product, because x / unit could overflow float32.
        x = jnp.clip(jnp.asarray(x, jnp.float32), self.min, self.max)
        steps = x * np.float32(1 / unit)
        codes = _round_and_clip(steps, self.min / unit, self.max / unit, rounding, key)
        return codes.astype(self.code_dtype)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32) * np.float32(self.smallest_positive)


def _by_bit_pattern(low: int, high: int) -> np.ndarray:
    """The integers from `low` to `high`, in the order of their two's complement bits.

    The bits of a negative number are larger than those of every positive number.
    """
    return np.concatenate([np.arange(0, high + 1), np.arange(low, 0)])


def _round_and_clip(
    x: jax.typing.ArrayLike,
    low: float,
    high: float,
    rounding: str,
    key: jax.Array | None,
) -> jax.Array:
    """Rounds `x` to whole numbers from `low` to `high`, float32.

    NaN has no code. It becomes 0, as in XLA's cast to an integer.
    """
    check_rounding(rounding, key)
    whole = round_to_integer(jnp.asarray(x, jnp.float32), rounding, key)
    return jnp.where(jnp.isnan(whole), 0.0, jnp.clip(whole, low, high))
