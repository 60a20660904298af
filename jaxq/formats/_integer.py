"""Integers of 1 to 8 bits, two's complement, unsigned and with a sign bit; fixed point of up to 16 bits."""

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
    """The whole numbers of `num_bits` bits; the code of a number is the number.

    | | smallest | largest |
    |---|---|---|
    | signed | -2^(n-1) | 2^(n-1) - 1 |
    | signed, narrow | -(2^(n-1) - 1) | 2^(n-1) - 1 |
    | unsigned | 0 | 2^n - 1 |

    Args:
      name: registry name.
      num_bits: 1 to 8 (narrow: 2 to 8). One signed bit is 0 and -1.
      signed: two's complement, codes int8; else codes uint8.
      narrow: drop the most negative number, so that the range is symmetric about zero.
    """

    kind: ClassVar[str] = "integer"

    num_bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self):
        low = 2 if self.narrow else 1
        if not low <= self.num_bits <= 8:
            raise ValueError(
                f"IntegerFormat: {'narrow' if self.narrow else 'integer'} width must be {low} to 8 bits, "
                f"got {self.num_bits}."
            )
        if self.narrow and not self.signed:
            raise ValueError(
                "IntegerFormat: narrow range is for signed integers; unsigned ones start at 0."
            )

    @property
    def bits(self) -> int:
        return self.num_bits

    @property
    def code_dtype(self) -> np.dtype:
        return np.dtype(np.int8 if self.signed else np.uint8)

    @property
    def max(self) -> float:
        return float(
            2 ** (self.num_bits - 1) - 1 if self.signed else 2**self.num_bits - 1
        )

    @property
    def min(self) -> float:
        if not self.signed:
            return 0.0
        return -self.max if self.narrow else -self.max - 1

    @property
    def smallest_positive(self) -> float:
        return 1.0 if self.max else 0.0

    def codes(self) -> np.ndarray:
        low = int(self.min)
        return np.concatenate([np.arange(0, self.max + 1), np.arange(low, 0)]).astype(
            self.code_dtype
        )

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        del saturate  # integers have no other overflow value
        return _whole(x, self.min, self.max, rounding, key).astype(self.code_dtype)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SignMagnitudeFormat(Format):
    """The whole numbers from -(2^(n-1) - 1) to 2^(n-1) - 1: the highest bit is the sign, the rest the magnitude.

    0 and -0 are two codes; encode gives -0 for what rounds to zero from below. NaN becomes 0.

    Args:
      name: registry name.
      num_bits: 2 to 8.
    """

    kind: ClassVar[str] = "sign_magnitude"

    num_bits: int

    def __post_init__(self):
        if not 2 <= self.num_bits <= 8:
            raise ValueError(
                f"SignMagnitudeFormat: width must be 2 to 8 bits, got {self.num_bits}."
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
        del saturate
        x = jnp.asarray(x, jnp.float32)
        magnitude = jnp.abs(_whole(x, self.min, self.max, rounding, key)).astype(
            jnp.uint8
        )
        sign = (jnp.signbit(x) & ~jnp.isnan(x)).astype(jnp.uint8)
        return magnitude | (sign << (self.num_bits - 1))

    def decode(self, codes: jax.Array) -> jax.Array:
        sign = codes >> (self.num_bits - 1)
        magnitude = (codes & np.uint8((1 << (self.num_bits - 1)) - 1)).astype(
            jnp.float32
        )
        return jnp.where(sign == 0, magnitude, -magnitude)


@dataclasses.dataclass(frozen=True)
class FixedPointFormat(Format):
    """`code * 2^-fraction_bits`; Qm.n with the sign not counted in m (ARM's convention), UQm.n without a sign.

    | | smallest | largest | width |
    |---|---|---|---|
    | Qm.n | -2^m | 2^m - 2^-n | 1 + m + n |
    | UQm.n | 0 | 2^m - 2^-n | m + n |

    Args:
      name: registry name.
      integer_bits: m, 0 or more.
      fraction_bits: n, 0 or more; at most 16 bits with m and the sign.
      signed: two's complement.

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
        if (
            self.integer_bits < 0
            or self.fraction_bits < 0
            or not 1 + self.signed <= self.bits <= 16
        ):
            raise ValueError(
                f"FixedPointFormat: bits must not be negative and at most 16 with the sign; got "
                f"integer_bits={self.integer_bits}, fraction_bits={self.fraction_bits}, signed={self.signed}."
            )

    @property
    def bits(self) -> int:
        return int(self.signed) + self.integer_bits + self.fraction_bits

    @property
    def code_dtype(self) -> np.dtype:
        return np.dtype(
            f"{'int' if self.signed else 'uint'}{8 if self.bits <= 8 else 16}"
        )

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
        low, high = (
            int(self.min / self.smallest_positive),
            int(self.max / self.smallest_positive),
        )
        return np.concatenate([np.arange(0, high + 1), np.arange(low, 0)]).astype(
            self.code_dtype
        )

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        del saturate
        unit = self.smallest_positive
        x = jnp.clip(
            jnp.asarray(x, jnp.float32), self.min, self.max
        )  # first: x / unit could overflow
        return _whole(
            x * np.float32(1 / unit), self.min / unit, self.max / unit, rounding, key
        ).astype(self.code_dtype)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32) * np.float32(self.smallest_positive)


def _whole(
    x: jax.typing.ArrayLike,
    low: float,
    high: float,
    rounding: str,
    key: jax.Array | None,
) -> jax.Array:
    """`x` as whole numbers from `low` to `high`, float32; NaN, which has no code, is 0 as in XLA's own cast."""
    check_rounding(rounding, key)
    x = round_to_integer(jnp.asarray(x, jnp.float32), rounding, key)
    return jnp.where(jnp.isnan(x), 0.0, jnp.clip(x, low, high))
