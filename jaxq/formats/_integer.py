"""Two's complement and unsigned integers of 1 to 8 bits."""

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
      num_bits: 1 to 8 (signed: 2 to 8).
      signed: two's complement, codes int8; else codes uint8.
      narrow: drop the most negative number, so that the range is symmetric about zero.
    """

    kind: ClassVar[str] = "integer"

    num_bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self):
        low = 2 if self.signed else 1
        if not low <= self.num_bits <= 8:
            raise ValueError(
                f"IntegerFormat: {'signed' if self.signed else 'unsigned'} width must be {low} to 8 bits, "
                f"got {self.num_bits}."
            )
        if self.narrow and not self.signed:
            raise ValueError("IntegerFormat: narrow range is for signed integers; unsigned ones start at 0.")

    @property
    def bits(self) -> int:
        return self.num_bits

    @property
    def code_dtype(self) -> np.dtype:
        return np.dtype(np.int8 if self.signed else np.uint8)

    @property
    def max(self) -> float:
        return float(2 ** (self.num_bits - 1) - 1 if self.signed else 2**self.num_bits - 1)

    @property
    def min(self) -> float:
        if not self.signed:
            return 0.0
        return -self.max if self.narrow else -self.max - 1

    @property
    def smallest_positive(self) -> float:
        return 1.0

    def codes(self) -> np.ndarray:
        low = int(self.min)
        return np.concatenate([np.arange(0, self.max + 1), np.arange(low, 0)]).astype(self.code_dtype)

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        check_rounding(rounding, key)
        del saturate  # integers have no other overflow value
        x = round_to_integer(jnp.asarray(x, jnp.float32), rounding, key)
        # NaN has no code; 0 is what XLA's cast gives, stated here so that no platform may differ.
        x = jnp.where(jnp.isnan(x), 0.0, jnp.clip(x, self.min, self.max))
        return x.astype(self.code_dtype)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32)
