"""Precisions as numbers, so that they can be traced, and policies made of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats

Number = Any  # an int, or an int32 array (a tracer in a sweep)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Precision:
    """A floating point grid, described by numbers: a pytree whose leaves `jax.vmap` and `jax.jit` may trace.

    Args:
      exponent_bits: 1 to 8 (11 under float64), an int or an int32 array.
      mantissa_bits: explicit ones, 0 to 23 (52 under float64), an int or an int32 array.
      bias: exponent bias; None gives `2^(exponent_bits - 1) - 1`.
      largest: largest finite number; None gives the IEEE one, `(2 - 2^-mantissa_bits) * 2^bias`.
      overflow: what lies beyond `largest`, infinities included: "infinity", "nan", or "saturate" for `largest`. Static.
      rounding: "nearest_even", "nearest_away" or "toward_zero". Static.

    NaN stays NaN, and subnormals of the grid are kept. Rounding has a straight-through gradient.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> bits = jnp.array([1, 4, 10])
      >>> f = lambda m: jaxq.emulate(jnp.exp, jaxq.emulation.Policy(result=jaxq.emulation.Precision(8, m)))(1.0)
      >>> jax.vmap(f)(bits).tolist()
      [3.0, 2.75, 2.71875]
    """

    exponent_bits: Number
    mantissa_bits: Number
    bias: Number = None
    largest: Number = None
    overflow: str = dataclasses.field(default="infinity", metadata={"static": True})
    rounding: str = dataclasses.field(default="nearest_even", metadata={"static": True})

    def __post_init__(self):
        formats.check_choice("Precision: overflow", self.overflow, formats.OVERFLOWS)
        modes = [mode for mode in formats.ROUNDING_MODES if mode != "stochastic"]
        formats.check_choice("Precision: rounding", self.rounding, modes)
        e, m = self.exponent_bits, self.mantissa_bits
        if (_is_int(e) and not 1 <= e <= 11) or (_is_int(m) and not 0 <= m <= 52):
            raise ValueError(
                f"Precision: exponent_bits must be 1 to 11 and mantissa_bits 0 to 52, got {e!r} and {m!r}."
            )

    @classmethod
    def of(cls, name: str | formats.Format) -> Precision:
        """The precision of a floating point format.

        Formats with infinities overflow to infinity. The others saturate, as the conversions of FP8 hardware do:
        `dataclasses.replace(precision, overflow="nan")` gives what a plain cast does.

        Raises:
          ValueError: an unknown name, or a format that is not floating point with a zero.
        """
        fmt = formats.get(name)
        if isinstance(fmt, formats.DoubleFormat):
            return cls(11, 52)
        if not isinstance(fmt, formats.FloatFormat):
            raise ValueError(
                f"Precision: {fmt.name} is no floating point format with a sign and a zero, which arithmetic needs. "
                "For integers and tables quantize the operands: see jaxq.fake_quant."
            )
        if fmt.flavour == "ieee":
            return cls(fmt.exponent_bits, fmt.mantissa_bits, fmt.bias)
        return cls(fmt.exponent_bits, fmt.mantissa_bits, fmt.bias, fmt.max, "saturate")

    def is_surely(self, other: Precision | None) -> bool:
        """Whether `other` is this precision; False where that is not known yet, unless both hold the same tracers."""
        if other is None or (self.overflow, self.rounding) != (
            other.overflow,
            other.rounding,
        ):
            return False
        names = ("exponent_bits", "mantissa_bits", "bias", "largest")
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return all(
            a is b
            or (isinstance(a, int | float) and isinstance(b, int | float) and a == b)
            for a, b in pairs
        )

    def changes(self, dtype: Any) -> bool:
        """Whether rounding to this precision can change a number of `dtype`; True where that is not known yet."""
        if not all(
            _is_int(n) for n in (self.exponent_bits, self.mantissa_bits, self._bias)
        ):
            return True
        info = jnp.finfo(dtype)
        if self.largest is not None and not (
            isinstance(self.largest, float) and self.largest >= float(info.max)
        ):
            return True
        exponents = self._bias >= info.maxexp - 1 and 1 - self._bias <= info.minexp
        return (
            not (exponents and self.mantissa_bits >= info.nmant)
            or self.overflow != "infinity"
        )

    def changes_sums(self, dtype: Any) -> bool:
        """Whether a sum in `dtype` can come out otherwise than rounded to nearest."""
        return self.changes(dtype) or self.rounding != "nearest_even"

    @property
    def _bias(self) -> Number:
        if self.bias is not None:
            return self.bias
        return (1 << (self.exponent_bits - 1)) - 1

    def _largest(self, dtype: Any) -> jax.typing.ArrayLike:
        """`largest` as a number of `dtype`, from its bits where it is traced: a power of two is not exact on floats."""
        if self.largest is not None:
            return self.largest
        info = jnp.finfo(dtype)
        most = info.maxexp - 1
        if _is_int(self._bias) and _is_int(self.mantissa_bits):
            return min(
                (2 - 2.0**-self.mantissa_bits) * 2.0**self._bias, float(info.max)
            )
        unsigned = jnp.dtype(f"uint{info.bits}")
        exponent = (jnp.minimum(jnp.asarray(self._bias), most) + most).astype(unsigned)
        places = (
            info.nmant - jnp.minimum(jnp.asarray(self.mantissa_bits), info.nmant)
        ).astype(unsigned)
        fraction = (np.array((1 << info.nmant) - 1, unsigned) >> places) << places
        return lax.bitcast_convert_type((exponent << info.nmant) | fraction, dtype)

    def round(self, x: jax.Array) -> jax.Array:
        """`x` rounded to the grid: shape and dtype of `x`, straight-through gradient.

        float16 and bfloat16 arrays come back rounded to the grid and to their dtype.
        """
        carrier = carrier_of(x.dtype)
        if carrier is None or not self.changes(carrier):
            return x
        return straight_through(
            x, self._rounded(lax.stop_gradient(x).astype(carrier)).astype(x.dtype)
        )

    def add(self, total: jax.Array, term: jax.Array) -> jax.Array:
        """`total + term`, float32 or float64, rounded once: what the floating point sum leaves over (Knuth's TwoSum)
        says on which side of it the true sum lies.
        """
        y = total + term
        a, b, near = map(lax.stop_gradient, (total, term, y))
        part = near - a
        left = (a - (near - part)) + (b - part)
        left = jnp.where(jnp.isfinite(left), left, jnp.zeros((), y.dtype))
        half = (near + 2 * left) - near == 2 * left  # a tie between two floats
        beyond = jnp.sign(left) * jnp.sign(near) * jnp.where(half, 2, 1).astype(y.dtype)
        return straight_through(y, self._rounded(near, beyond.astype(jnp.int32)))

    def _rounded(self, x: jax.Array, beyond: jax.Array | None = None) -> jax.Array:
        least = jnp.finfo(x.dtype).minexp
        low = 1 - self._bias
        return formats.round_to_float(
            x,
            mantissa_bits=self.mantissa_bits,
            min_exponent=max(low, least) if _is_int(low) else jnp.maximum(low, least),
            largest=self._largest(x.dtype),
            overflow=self.overflow,
            rounding=self.rounding,
            beyond=beyond,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """How `emulate` rounds: what goes into a primitive, what it adds up in, what comes out.

    Args:
      operands: precision of the floating point inputs of every arithmetic primitive: a name, a `Precision`, or None
        to leave them.
      accumulate: precision of the running sum in dot products, convolutions and sums. None or "float32": as wide as
        the array's dtype, products exact where they fit. Anything narrower adds one term after the other, in the
        order of memory, and rounds each time.
      result: precision of what an arithmetic primitive gives.
      chunk: length of the partial sums in a narrow `accumulate`, whose totals are added in the array's own dtype.
        Static. None: one running sum.
      primitives: policies for primitives of their own by name ("dot_general", "exp", ...), in place of this one.

    Primitives that only move, compare or choose numbers do not round. Arrays of float16 and bfloat16 are rounded to
    their dtype after every primitive whatever the policy: XLA alone may keep more inside one program.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> policy = jaxq.emulation.Policy(accumulate="bfloat16")
      >>> float(jaxq.emulate(jnp.sum, policy)(jnp.ones(1024)))  # 256 + 1 rounds to 256
      256.0

    References:
      Wang et al., "Training Deep Neural Networks with 8-bit Floating Point Numbers", 2018 (chunked accumulation);
      DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.3 (promotion every 128 terms).
    """

    operands: Any = None
    accumulate: Any = None
    result: Any = None
    chunk: int | None = dataclasses.field(default=None, metadata={"static": True})
    primitives: dict[str, Policy] | None = None

    def __post_init__(self):
        for name in ("operands", "accumulate", "result"):
            value = getattr(self, name)
            if isinstance(value, str | formats.Format):
                try:
                    object.__setattr__(self, name, Precision.of(value))
                except ValueError as error:
                    raise ValueError(f"Policy: {name}: {error}") from None
        if self.chunk is not None and (
            not isinstance(self.chunk, int) or self.chunk < 1
        ):
            raise ValueError(
                f"Policy: chunk must be a positive int or None, got {self.chunk!r}."
            )

    def of(self, primitive: str) -> Policy:
        """The policy of one primitive."""
        return (self.primitives or {}).get(primitive, self)

    def changes(self, dtype: Any) -> bool:
        """Whether anything computed in `dtype` can come out otherwise."""
        parts = [
            p
            for p in (self.operands, self.result, *(self.primitives or {}).values())
            if p is not None
        ]
        sums = self.accumulate is not None and self.accumulate.changes_sums(dtype)
        return sums or any(p.changes(dtype) for p in parts)


def carrier_of(dtype: Any) -> np.dtype | None:
    """The dtype that numbers of `dtype` are computed in: float64 of float64, float32 of the narrower floats.

    None for what is not rounded: integers, complex numbers, random keys.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return jnp.dtype(np.float64 if dtype == np.float64 else np.float32)


@jax.custom_jvp
def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the gradient of `x`."""
    del x
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return straight_through(*primals), tangents[
        0
    ]  # again, for the derivative's own derivative


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer)
