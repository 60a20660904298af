"""`Format`, the interface of every number format: a finite set of numbers with codes.

A format knows nothing of scales, axes or storage. The kinds of format are integers and
fixed point (`IntegerFormat`, `SignMagnitudeFormat`, `FixedPointFormat`), floating point
(`FloatFormat`, `DoubleFormat`, `ExponentFormat`) and tables (`CodebookFormat`). All of
them are frozen dataclasses. They are compared and hashed by value, so that two equal
formats share one compiled program.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.debug_checks import allow_nonfinite
from jaxq.meshes import compile_time_eval


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """A finite set of numbers and the code of each number.

    Attributes:
      name: registry name. It is the name in ml_dtypes if ml_dtypes has the format.
      bits: width of one code, 1 to 64.
      code_dtype: dtype of unpacked codes. Signed integers use int8 or int16. All other
        formats use the narrowest unsigned integer that holds `bits` bits.

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
        """Rounds `x` to numbers of the format and returns their codes.

        Args:
          x: float array of any shape. It is converted to float32 first.
          rounding: "nearest_even", "nearest_away", "toward_zero" or "stochastic".
            "stochastic" needs `key`.
          saturate: True maps overflow and infinities to the largest finite number.
            False maps them to the format's infinity. A format without infinity uses
            its NaN, and a format without NaN uses its largest number.
          key: PRNG key for stochastic rounding.

        Returns:
          Codes of dtype `code_dtype`, with the shape of `x`.

        Raises:
          ValueError: `rounding` is not one of the four modes, `rounding` is
            "stochastic" and `key` is None, or `key` is given for another mode.
        """

    @abc.abstractmethod
    def decode(self, codes: jax.Array) -> jax.Array:
        """Returns the exact numbers of `codes`, in the same shape.

        The dtype is float32. The exception is float64, whose numbers are float64.
        """

    def round(
        self,
        x: jax.typing.ArrayLike,
        *,
        rounding: str = "nearest_even",
        saturate: bool = True,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Rounds `x` to numbers of the format: `decode(encode(x))` in float32.

        Floating point formats round in one step. They round float64 arrays in float64.
        """
        return self.decode(
            self.encode(x, rounding=rounding, saturate=saturate, key=key)
        )

    @abc.abstractmethod
    def codes(self) -> np.ndarray:
        """Returns all codes that have a meaning, `code_dtype[num_codes]`.

        The codes come in the ascending order of their bit patterns.

        Raises:
          ValueError: the format has more than 16 bits.
        """

    @property
    def code_dtype(self) -> np.dtype:
        return np.dtype(f"uint{max(8, 1 << (self.bits - 1).bit_length())}")

    def _raise_if_too_many_codes(self) -> None:
        if self.bits > 16:
            raise ValueError(
                f"{self.name} has 2^{self.bits} codes, which are too many to list. Use "
                "its properties max, min and bits instead."
            )

    def values(self) -> np.ndarray:
        """Returns the distinct finite numbers, ascending; float32 `[num_values]`.

        Raises:
          ValueError: the format has more than 16 bits.
        """
        with compile_time_eval(), allow_nonfinite():
            decoded = np.asarray(self.decode(jnp.asarray(self.codes())))
        # -0 and 0 are one number. Adding 0 turns -0 into 0.
        return np.unique(decoded[np.isfinite(decoded)]) + np.float32(0)

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
        """`floor(log2(max))`, the `emax` of the OCP microscaling specification."""
        return int(np.frexp(self.max)[1]) - 1

    @property
    def mantissa_bits(self) -> int:
        """Explicit mantissa bits of numbers near `max`.

        One scale rule of the microscaling formats rounds the maximum of a block. It
        keeps this number of bits.
        """
        return 0

    @property
    def zero_code(self) -> int:
        """The code that fills padding: that of zero, or code 0 if there is no zero."""
        return 0

    def __str__(self) -> str:
        return self.name
