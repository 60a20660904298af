"""What every number format is: a finite set of numbers, each with a code.

A format knows nothing of scales, axes or storage. There are integers and fixed point
(`IntegerFormat`, `SignMagnitudeFormat`, `FixedPointFormat`), floating point (`FloatFormat`, `DoubleFormat`,
`ExponentFormat`) and tables (`CodebookFormat`). All are frozen dataclasses, compared and hashed
by value, so two equal formats make one compiled program.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """A finite set of numbers and the code of each.

    Attributes:
      name: registry name, ml_dtypes' spelling where ml_dtypes has the format.
      bits: width of one code, 1 to 64.
      code_dtype: dtype of unpacked codes: int8 or int16 for signed integers, else the narrowest unsigned one.

    Example:
      >>> import jaxq
      >>> fmt = jaxq.formats.get("float4_e2m1fn")
      >>> fmt.bits, fmt.max
      (4, 6.0)
      >>> fmt.values()[8:].tolist()
      [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
      >>> fmt.decode(fmt.encode(2.4)).item()
      2.0
    """

    kind: ClassVar[str]

    name: str

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """Width of one code in bits."""

    @abc.abstractmethod
    def encode(
        self,
        x: jax.typing.ArrayLike,
        *,
        rounding: str = "nearest_even",
        saturate: bool = True,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Codes of the format's numbers nearest to `x`.

        Args:
          x: float array of any shape; computed in float32.
          rounding: "nearest_even", "nearest_away", "toward_zero" or "stochastic" (needs `key`).
          saturate: True gives the largest finite number on overflow and for infinities, False what the format
            defines: its infinity, its NaN, or the largest number where it has neither.
          key: PRNG key for stochastic rounding.

        Returns:
          Codes, `code_dtype`, shape of `x`.

        Raises:
          ValueError: unknown rounding mode, missing or unused key.
        """

    @abc.abstractmethod
    def decode(self, codes: jax.Array) -> jax.Array:
        """The float32 (float64 of float64) numbers behind `codes`, exactly; same shape."""

    def round(
        self,
        x: jax.typing.ArrayLike,
        *,
        rounding: str = "nearest_even",
        saturate: bool = True,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """`decode(encode(x))`, float32; floating point formats do it in one step, and in float64 for float64 `x`."""
        return self.decode(
            self.encode(x, rounding=rounding, saturate=saturate, key=key)
        )

    @abc.abstractmethod
    def codes(self) -> np.ndarray:
        """Every code that stands for something, in the order of its bit pattern; `code_dtype`, `[num_codes]`.

        Raises:
          ValueError: the format has more than 16 bits.
        """

    @property
    def code_dtype(self) -> np.dtype:
        return np.dtype(f"uint{max(8, 1 << (self.bits - 1).bit_length())}")

    def _raise_if_too_many_codes(self) -> None:
        if self.bits > 16:
            raise ValueError(
                f"{self.name} has 2^{self.bits} codes: too many to list. Ask for max, min, bits."
            )

    def values(self) -> np.ndarray:
        """The distinct finite numbers of the format, ascending; float32 `[num_values]`.

        Raises:
          ValueError: the format has more than 16 bits.
        """
        with jax.ensure_compile_time_eval():
            decoded = np.asarray(self.decode(jnp.asarray(self.codes())))
        return np.unique(decoded[np.isfinite(decoded)]) + np.float32(
            0
        )  # -0 and 0 are one number

    @property
    @abc.abstractmethod
    def max(self) -> float:
        """Largest finite number."""

    @property
    @abc.abstractmethod
    def min(self) -> float:
        """Smallest (most negative) finite number."""

    @property
    @abc.abstractmethod
    def smallest_positive(self) -> float:
        """Smallest number above zero."""

    @property
    def max_exponent(self) -> int:
        """`floor(log2(max))`: the `emax` of the OCP microscaling specification."""
        return int(np.frexp(self.max)[1]) - 1

    @property
    def mantissa_bits(self) -> int:
        """Explicit mantissa bits at `max`; what `mx_even` rounds a block's maximum to."""
        return 0

    @property
    def zero_code(self) -> int:
        """The code padding is filled with: the number zero, or the first code where there is no zero."""
        return 0

    def __str__(self) -> str:
        return self.name
