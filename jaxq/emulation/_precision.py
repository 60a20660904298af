"""`Precision`, a floating point grid, and `Policy`, the precisions of `emulate`.

A `Precision` holds its numbers of bits as arrays or ints. They may be traced, so that a
sweep over precisions needs one compilation.
"""

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
    """A floating point grid, given by numbers that `jax.vmap` and `jax.jit` may trace.

    NaN stays NaN, and the grid has subnormal numbers. Rounding has a straight-through
    gradient. A `Precision` is a pytree.

    Args:
      exponent_bits: 1 to 8 (11 for float64 arrays), an int or an int32 array.
      mantissa_bits: number of explicit mantissa bits, 0 to 23 (52 for float64 arrays),
        an int or an int32 array.
      bias: exponent bias. None uses `2^(exponent_bits - 1) - 1`.
      largest: largest finite number. None uses that of IEEE formats,
        `(2 - 2^-mantissa_bits) * 2^bias`.
      overflow: what replaces larger results and infinities: "infinity", "nan", or
        "saturate" for `largest`. It is static.
      rounding: "nearest_even", "nearest_away" or "toward_zero". It is static.

    Raises:
      ValueError: `overflow` or `rounding` is not one of the strings above, or a number
        of bits is an int that is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from jaxq.emulation import Policy, Precision
      >>> f = lambda m: jaxq.emulate(jnp.exp, Policy(result=Precision(8, m)))(1.0)
      >>> jax.vmap(f)(jnp.array([1, 4, 10])).tolist()
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
        if (_is_static_int(e) and not 1 <= e <= 11) or (
            _is_static_int(m) and not 0 <= m <= 52
        ):
            raise ValueError(
                "Precision: exponent_bits must be 1 to 11 and mantissa_bits 0 to 52, "
                f"got exponent_bits={e!r} and mantissa_bits={m!r}."
            )

    @classmethod
    def of(cls, name: str | formats.Format) -> Precision:
        """Returns the precision of a floating point format.

        Formats with infinities overflow to infinity. The other formats saturate, as
        the conversions of FP8 hardware do. To overflow to NaN, as a plain cast does,
        use `dataclasses.replace(precision, overflow="nan")`.

        Args:
          name: name of a format, or a `Format`.

        Raises:
          ValueError: no format has this name, or the format is not floating point with
            a sign and a zero.
        """
        fmt = formats.get(name)
        if isinstance(fmt, formats.DoubleFormat):
            return cls(11, 52)
        if not isinstance(fmt, formats.FloatFormat):
            raise ValueError(
                f"Precision: {fmt.name} is not a floating point format with a sign and "
                "a zero. Arithmetic needs such a format. For integers and tables, "
                "quantize the operands with jaxq.fake_quant."
            )
        if fmt.flavour == "ieee":
            return cls(fmt.exponent_bits, fmt.mantissa_bits, fmt.bias)
        return cls(fmt.exponent_bits, fmt.mantissa_bits, fmt.bias, fmt.max, "saturate")

    def surely_equals(self, other: Precision | None) -> bool:
        """Whether `other` is certainly the same precision.

        The values of tracers are unknown. So two precisions with tracers count as the
        same only if they hold the same tracers.
        """
        if other is None:
            return False
        if (self.overflow, self.rounding) != (other.overflow, other.rounding):
            return False
        names = ("exponent_bits", "mantissa_bits", "bias", "largest")
        return all(
            _surely_equal(getattr(self, name), getattr(other, name)) for name in names
        )

    def changes(self, dtype: Any) -> bool:
        """Whether rounding to this precision can change a number of `dtype`.

        It is True if a number of the precision is traced.
        """
        numbers = (self.exponent_bits, self.mantissa_bits, self._bias)
        if not all(_is_static_int(n) for n in numbers):
            return True
        info = jnp.finfo(dtype)
        if self.largest is not None:
            is_float = isinstance(self.largest, float)
            if not is_float or self.largest < float(info.max):
                return True
        has_exponents = self._bias >= info.maxexp - 1 and 1 - self._bias <= info.minexp
        has_mantissa = self.mantissa_bits >= info.nmant
        return not (has_exponents and has_mantissa) or self.overflow != "infinity"

    def changes_sums(self, dtype: Any) -> bool:
        """Whether a sum in `dtype` can differ from the sum rounded to nearest even."""
        return self.changes(dtype) or self.rounding != "nearest_even"

    @property
    def _bias(self) -> Number:
        if self.bias is not None:
            return self.bias
        return (1 << (self.exponent_bits - 1)) - 1

    def _largest(self, dtype: Any) -> jax.typing.ArrayLike:
        """`largest` as a number of `dtype`."""
        if self.largest is not None:
            return self.largest
        info = jnp.finfo(dtype)
        max_exponent = info.maxexp - 1
        if _is_static_int(self._bias) and _is_static_int(self.mantissa_bits):
            largest = (2 - 2.0**-self.mantissa_bits) * 2.0**self._bias
            return min(largest, float(info.max))
        # Traced numbers need bit patterns, since XLA's power of two is not exact.
        unsigned = jnp.dtype(f"uint{info.bits}")
        exponent = jnp.minimum(jnp.asarray(self._bias), max_exponent) + max_exponent
        exponent = exponent.astype(unsigned)
        mantissa_bits = jnp.minimum(jnp.asarray(self.mantissa_bits), info.nmant)
        places = (info.nmant - mantissa_bits).astype(unsigned)
        fraction = (np.array((1 << info.nmant) - 1, unsigned) >> places) << places
        return lax.bitcast_convert_type((exponent << info.nmant) | fraction, dtype)

    def round(self, x: jax.Array) -> jax.Array:
        """Rounds `x` to the grid, with a straight-through gradient.

        Args:
          x: float array of any shape. Arrays of other dtypes are returned unchanged.

        Returns:
          Array of the shape and dtype of `x`. float16 and bfloat16 arrays are rounded
          to the grid in float32, and then to their dtype.
        """
        carrier = carrier_of(x.dtype)
        if carrier is None or not self.changes(carrier):
            return x
        rounded = self._rounded(lax.stop_gradient(x).astype(carrier))
        return straight_through(x, rounded.astype(x.dtype))

    def add(self, total: jax.Array, term: jax.Array) -> jax.Array:
        """Returns `total + term`, rounded once to the grid; float32 or float64.

        Rounding the float sum would round twice. Knuth's TwoSum gives the exact error
        of the float sum. The error says on which side of the sum the true sum is.
        """
        y = total + term
        a, b, near = map(lax.stop_gradient, (total, term, y))
        part = near - a
        error = (a - (near - part)) + (b - part)  # near + error is the true sum
        error = jnp.where(jnp.isfinite(error), error, jnp.zeros((), y.dtype))
        # The true sum is exactly half-way between two floats if near + 2 error is the
        # neighbour of near.
        half = (near + 2 * error) - near == 2 * error
        residual = jnp.sign(error) * jnp.sign(near)
        residual = residual * jnp.where(half, 2, 1).astype(y.dtype)
        return straight_through(y, self._rounded(near, residual.astype(jnp.int32)))

    def _rounded(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """`formats.round_to_float` to this grid."""
        lowest = jnp.finfo(x.dtype).minexp
        low = 1 - self._bias
        return formats.round_to_float(
            x,
            mantissa_bits=self.mantissa_bits,
            min_exponent=max(low, lowest)
            if _is_static_int(low)
            else jnp.maximum(low, lowest),
            largest=self._largest(x.dtype),
            overflow=self.overflow,
            rounding=self.rounding,
            residual=residual,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """How `emulate` rounds the operands, the sums and the results of primitives.

    Primitives that only move, compare or select numbers do not round. float16 and
    bfloat16 arrays are rounded to their dtype after every primitive, whatever the
    policy says. Without emulation XLA may keep more bits inside one program.

    Args:
      operands: precision of the floating point inputs of every arithmetic primitive. It
        is the name of a format, a `Precision`, or None for no rounding.
      accumulate: precision of the running sum in dot products, convolutions and sums.
        None or "float32" sums in the array's dtype, at least in float32 for dot
        products and convolutions. Products are exact if that dtype holds them. A
        narrower precision adds one term after the other, in the order of memory, and
        rounds after each term.
      result: precision of the results of every arithmetic primitive.
      chunk: length of the partial sums of a narrow `accumulate`. The partial sums are
        added in the array's own dtype. None makes one running sum. It is static.
      primitives: policies of single primitives by name ("dot_general", "exp"). They
        replace this policy.

    Raises:
      ValueError: a name is not a floating point format with a sign and a zero, or
        `chunk` is not a positive int.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> policy = jaxq.emulation.Policy(accumulate="bfloat16")
      >>> float(jaxq.emulate(jnp.sum, policy)(jnp.ones(1024)))  # 256 + 1 gives 256
      256.0

    References:
      Wang et al., "Training Deep Neural Networks with 8-bit Floating Point Numbers",
      2018 (chunked accumulation); DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024,
      section 3.3 (partial sums of 128 terms).
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
        if self.chunk is None:
            return
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise ValueError(
                f"Policy: chunk must be a positive int or None, got {self.chunk!r}."
            )

    def of(self, primitive: str) -> Policy:
        """Returns the policy of one primitive."""
        return (self.primitives or {}).get(primitive, self)

    def changes(self, dtype: Any) -> bool:
        """Whether the policy can change a result that is computed in `dtype`."""
        parts = [self.operands, self.result, *(self.primitives or {}).values()]
        if self.accumulate is not None and self.accumulate.changes_sums(dtype):
            return True
        return any(part is not None and part.changes(dtype) for part in parts)


def carrier_of(dtype: Any) -> np.dtype | None:
    """Returns the dtype in which numbers of `dtype` are rounded.

    It is float64 for float64 and float32 for all other floats. It is None for dtypes
    that are not rounded: integers, complex numbers and random keys.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return jnp.dtype(np.float64 if dtype == np.float64 else np.float32)


@jax.custom_jvp
def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """Returns `rounded`, with the gradient of `x`."""
    del x
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    # The primal result is straight-through again, for second derivatives.
    return straight_through(*primals), tangents[0]


def _is_static_int(value: Any) -> bool:
    return isinstance(value, int | np.integer)


def _surely_equal(a: Any, b: Any) -> bool:
    """Whether two numbers are equal; for tracers, whether they are the same tracer."""
    if a is b:
        return True
    return isinstance(a, int | float) and isinstance(b, int | float) and a == b
