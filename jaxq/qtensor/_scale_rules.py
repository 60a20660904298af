"""Scale rules: how the scale of a block follows from its numbers.

Each rule is one `ScaleRule` record in the table `SCALE_RULES`. `QuantSpec.scale_rule`
is the name of a rule and `QuantSpec.rule` is its record. Code outside this file reads
the fields of the record and never compares a name.

Shapes: blocks are arrays as `Geometry.to_blocks` arranges them, `[..., n, size, ...]`.
Scales and thresholds have size 1 inside the block, `[..., n, 1, ...]`. All arithmetic
is float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.qtensor._extremes import Extremes
from jaxq.qtensor._geometry import Geometry


@dataclasses.dataclass(frozen=True)
class ScaleRule:
    """How the scale of a block follows from its numbers.

    Attributes:
      name: the value of `QuantSpec.scale_rule`.
      scale: the function `(blocks, extremes, fmt, geometry) -> scale` that computes the
        ideal float32 scale of every block. It is called for finite and non-finite
        blocks; the caller replaces the scale of non-finite blocks.
      is_default: True for the default of `QuantSpec.scale_rule`. Asymmetric specs and
        specs with `offset="min"` allow only this rule.
      reads_block: True if the scale depends on all numbers of a block, not only on the
        range. Such a rule cannot use a given range (static range, clipping).
      signed: True if the scale has the sign of the block's extreme number. Codes then
        use the format's most negative number too.
      reach: the function `(fmt) -> number` with the largest magnitude that `x / scale`
        can have for a number x of the block, before the scale is rounded. None if there
        is no bound.
      powers_of_two: True if scales are powers of two.
      threshold: for ternary rules, the function `(blocks, extremes, geometry) ->
        threshold`. A number becomes 0 if its magnitude, multiplied by
        `extremes.shrink`, is at most the threshold. All other numbers become their
        sign. None for rules that round.
      codebook: the function `(y, signs, geometry) -> codebook` that computes a table of
        values for every block. None if codes have the values of the format.

    Example:
      >>> import jaxq
      >>> rule = jaxq.QuantSpec("ternary", scale_rule="twn").rule
      >>> rule.has_threshold, rule.own_codebook
      (True, False)
    """

    name: str
    scale: Callable[[jax.Array, Extremes, formats.Format, Geometry], jax.Array]
    is_default: bool = False
    reads_block: bool = False
    signed: bool = False
    reach: Callable[[formats.Format], float] | None = None
    powers_of_two: bool = False
    threshold: Callable[[jax.Array, Extremes, Geometry], jax.Array] | None = None
    codebook: Callable[[jax.Array, jax.Array, Geometry], jax.Array] | None = None

    @property
    def has_threshold(self) -> bool:
        """True if a threshold determines the ternary codes, and nothing is rounded."""
        return self.threshold is not None

    @property
    def own_codebook(self) -> bool:
        """True if every block gets a separate codebook."""
        return self.codebook is not None

    @property
    def is_quotient(self) -> bool:
        """True if the scale is the block's extreme number divided by `reach`."""
        return self.reach is not None and not self.powers_of_two

    def reach_of(self, fmt: formats.Format) -> float:
        """`reach` of a format. The rule must have it."""
        assert self.reach is not None
        return self.reach(fmt)

    def signs(
        self, blocks: jax.Array, extremes: Extremes, geometry: Geometry
    ) -> jax.Array:
        """The sign of each number above its block's threshold, else 0; float32."""
        assert self.threshold is not None
        threshold = self.threshold(blocks, extremes, geometry)
        return _signs_above(threshold, blocks, extremes)


def _absmax(blocks, extremes, fmt, geometry):
    """`A / max`, with A the largest magnitude of the block."""
    return extremes.magnitude * np.float32(1 / fmt.max)


def _absmean(blocks, extremes, fmt, geometry):
    """`mean |x|` (XNOR-Net, 2016, section 3.1; BitNet b1.58, 2024)."""
    return _mean_magnitude(blocks, extremes, geometry) * extremes.grow


def _signed_extreme(blocks, extremes, fmt, geometry):
    """The number of largest magnitude, with its sign, over `fmt.min` (GGUF)."""
    high_is_larger = extremes.high >= -extremes.low
    extreme = jnp.where(high_is_larger, extremes.high, extremes.low)
    return extreme * np.float32(1 / fmt.min)


def _ttq(blocks, extremes, fmt, geometry):
    """The largest magnitude. The block's codebook is divided by this number."""
    return extremes.magnitude


def _ttq_threshold(blocks, extremes, geometry):
    """`0.05 A` (Zhu et al., 2017, section 3)."""
    return np.float32(0.05) * (extremes.magnitude * extremes.shrink)


def _ternary_codebook(y, signs, geometry):
    """The mean of the numbers of each code: the codebook of least squared error.

    Args:
      y: numbers divided by their scale, arranged as blocks.
      signs: the ternary codes of `y`, float32.
      geometry: the geometry of `y` and `signs`.

    Returns:
      float32 `[*batch, *num_blocks, 3]`: the values of the codes -1, 0 and 1. A value
      is 0 if no number of the block has that code.
    """

    def mean(sign: int) -> jax.Array:
        has_sign = (signs == sign).astype(jnp.float32)
        count = _block_sum(has_sign, geometry)
        total = _block_sum(y * has_sign, geometry)
        return geometry.scale_from_blocks(total / jnp.maximum(count, 1.0))

    negative, positive = mean(-1), mean(1)
    return jnp.stack([negative, jnp.zeros_like(negative), positive], axis=-1)


def _twn(blocks, extremes, fmt, geometry):
    """The mean magnitude of the numbers above the threshold."""
    threshold = _twn_threshold(blocks, extremes, geometry)
    above = jnp.abs(_signs_above(threshold, blocks, extremes))
    magnitudes = jnp.abs(blocks.astype(jnp.float32)) * above * extremes.shrink
    count = jnp.maximum(_block_sum(above, geometry), 1.0)
    return _block_sum(magnitudes, geometry) / count * extremes.grow


def _twn_threshold(blocks, extremes, geometry):
    """`0.7 mean |x|` (Li et al., 2016, section 2)."""
    return np.float32(0.7) * _mean_magnitude(blocks, extremes, geometry)


# OCP microscaling (2023): the scale is a power of two. It is computed from the exponent
# bits of A, the block's largest magnitude. No logarithm is computed, so rounding errors
# cannot change the exponent.


def _mx_floor(blocks, extremes, fmt, geometry):
    """`2^(floor(log2 A) - floor(log2 max))`."""
    exponent, _ = _exponent_and_mantissa(_bits(extremes))
    return _power_of_two(exponent - fmt.max_exponent, extremes)


def _mx_ceil(blocks, extremes, fmt, geometry):
    """`2^(ceil(log2 A) - floor(log2 max))`."""
    exponent, mantissa = _exponent_and_mantissa(_bits(extremes))
    exponent = exponent - fmt.max_exponent + (mantissa > 0).astype(jnp.int32)
    return _power_of_two(exponent, extremes)


def _mx_even(blocks, extremes, fmt, geometry):
    """As `_mx_floor`, after A is rounded to the mantissa of the element format."""
    half_unit = np.uint32(1 << (22 - fmt.mantissa_bits))
    exponent, _ = _exponent_and_mantissa(_bits(extremes) + half_unit)
    return _power_of_two(exponent - fmt.max_exponent, extremes)


def _mx_round_up(blocks, extremes, fmt, geometry):
    """The smallest power of two that clips no number of the block."""
    exponent, mantissa = _exponent_and_mantissa(_bits(extremes))
    largest = np.asarray(fmt.max, np.float32).view(np.uint32) & _MANTISSA
    exponent = exponent - fmt.max_exponent + (mantissa > largest).astype(jnp.int32)
    return _power_of_two(exponent, extremes)


_MANTISSA = np.uint32(0x7FFFFF)  # the mantissa bits of a float32


def _bits(extremes: Extremes) -> jax.Array:
    return lax.bitcast_convert_type(extremes.magnitude, jnp.uint32)


def _exponent_and_mantissa(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The exponent (int32, without bias) and the mantissa bits of float32 numbers."""
    return (bits >> 23).astype(jnp.int32) - 127, bits & _MANTISSA


def _power_of_two(exponent: jax.Array, extremes: Extremes) -> jax.Array:
    """`2^exponent`, clipped to normal float32 numbers; 0 for a block of zeros."""
    biased = jnp.clip(exponent + 127, 1, 254).astype(jnp.uint32)
    power = lax.bitcast_convert_type(biased << 23, jnp.float32)
    return jnp.where(extremes.magnitude > 0, power, 0.0)


def _signs_above(
    threshold: jax.Array, blocks: jax.Array, extremes: Extremes
) -> jax.Array:
    """The sign of each number above its block's threshold, else 0; float32."""
    x = blocks.astype(jnp.float32)
    return jnp.where(jnp.abs(x) * extremes.shrink > threshold, jnp.sign(x), 0.0)


def _mean_magnitude(
    blocks: jax.Array, extremes: Extremes, geometry: Geometry
) -> jax.Array:
    """The mean of `|x| * shrink` over a block's numbers; padding is not counted."""
    magnitudes = jnp.abs(blocks.astype(jnp.float32)) * extremes.shrink
    total = _block_sum(magnitudes, geometry)
    share = (1 / np.maximum(geometry.counts(), 1)).astype(np.float32)
    return total * share.reshape((1,) * (total.ndim - share.ndim) + share.shape)


def _block_sum(x: jax.Array, geometry: Geometry) -> jax.Array:
    return jnp.sum(x, axis=geometry.block_axes, keepdims=True)


def _largest(fmt: formats.Format) -> float:
    return fmt.max


def _most_negative(fmt: formats.Format) -> float:
    return -fmt.min


# `x / scale` of the microscaling rules, for numbers x of magnitude A.


def _reach_of_mx_floor(fmt: formats.Format) -> float:
    return 2.0 ** (fmt.max_exponent + 1)


def _reach_of_mx_ceil(fmt: formats.Format) -> float:
    return 2.0**fmt.max_exponent


def _reach_of_mx_even(fmt: formats.Format) -> float:
    """A mantissa of at least `2 - 2^-(mantissa bits + 1)` is rounded up to 2."""
    return 2.0**fmt.max_exponent * (2.0 - 2.0 ** -(fmt.mantissa_bits + 1))


_RULES = (
    ScaleRule("absmax", _absmax, is_default=True, reach=_largest),
    ScaleRule("absmean", _absmean, reads_block=True),
    ScaleRule("mx_ceil", _mx_ceil, reach=_reach_of_mx_ceil, powers_of_two=True),
    ScaleRule("mx_even", _mx_even, reach=_reach_of_mx_even, powers_of_two=True),
    ScaleRule("mx_floor", _mx_floor, reach=_reach_of_mx_floor, powers_of_two=True),
    ScaleRule("mx_round_up", _mx_round_up, reach=_largest, powers_of_two=True),
    ScaleRule("signed_extreme", _signed_extreme, signed=True, reach=_most_negative),
    ScaleRule(
        "ttq",
        _ttq,
        reads_block=True,
        threshold=_ttq_threshold,
        codebook=_ternary_codebook,
    ),
    ScaleRule("twn", _twn, reads_block=True, threshold=_twn_threshold),
)
SCALE_RULES: dict[str, ScaleRule] = {rule.name: rule for rule in _RULES}
(DEFAULT_RULE,) = (rule.name for rule in _RULES if rule.is_default)
