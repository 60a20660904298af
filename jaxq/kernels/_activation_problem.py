"""The static facts of one quantization of rows, as kernels see it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jaxq import formats
from jaxq.kernels._problem import KERNEL_SCALES, SYMBOLIC
from jaxq.qtensor import Geometry, QuantSpec

FORMATS = ("int8", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True)
class ActivationProblem:
    """`codes[m, k], scales[m, num_groups] = quantize(x[m, k])`, as kernels see it.

    Attributes:
      m: number of rows.
      k: numbers in a row.
      group: numbers that share a scale: k, or a divisor of k.
      x_dtype: "float32", "bfloat16" or "float16".
      spec: how to quantize: int8 or float8 codes of 8 bits, symmetric, by the largest
        magnitude, rounded to nearest even. Scales are in 16 or 32 bits.
      geometry: the geometry of the array whose rows these are.
    """

    m: int
    k: int
    group: int
    x_dtype: str
    spec: QuantSpec
    geometry: Geometry

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to compute."""
        return 0 in (self.m, self.k)

    @property
    def num_groups(self) -> int:
        return self.k // self.group

    @property
    def scale_dtype(self) -> str:
        assert isinstance(self.spec.scale, str)
        return self.spec.scale

    @property
    def codes_dtype(self) -> str:
        return self.spec.fmt.code_dtype.name


def why_not_spec(spec: QuantSpec) -> str | None:
    """Returns why no kernel quantizes rows by this spec, or None if one may."""
    if spec.fmt.name not in FORMATS:
        return f"a kernel writes codes of {', '.join(FORMATS)}, not of {spec.fmt.name}"
    if spec.order is not formats.Packing.NONE:
        return f"a kernel writes one code in a byte, not the packing {spec.order.value}"
    if not spec.symmetric or spec.offset is not None:
        return "a kernel computes no zero points and no offsets"
    if not spec.rule.is_default or spec.clipping != "absmax":
        return (
            "a kernel computes scales from the largest magnitude, not by "
            f"scale_rule={spec.scale_rule!r} and clipping={spec.clipping!r}"
        )
    if spec.rounding != "nearest_even" or spec.headroom_factor != 1:
        return "a kernel rounds to nearest even, without headroom"
    if spec.codes_from != "stored":
        return "a kernel divides by the stored scale"
    if spec.scale not in KERNEL_SCALES:
        return f"a kernel stores scales in {', '.join(KERNEL_SCALES)}"
    return None


def activation_problem(
    shape: Sequence[int], dtype: str, spec: QuantSpec, geometry: Geometry
) -> ActivationProblem | str:
    """Returns the problem of `quantize_array`, or why no kernel computes it.

    Args:
      shape: shape of the array, `[*batch, *geometry.shape]`.
      dtype: dtype of the array.
      spec: how to quantize.
      geometry: the geometry of the array.
    """
    if not all(isinstance(size, int) for size in shape):
        return SYMBOLIC
    reason = why_not_spec(spec)
    if reason is not None:
        return reason
    *kept, group = geometry.block_shape
    if geometry.flat or any(block != 1 for block in kept):
        return "a kernel computes scales of single rows, and blocks cross rows"
    first_kept = len(geometry.shape) - geometry.num_contracted
    if geometry.order != tuple(range(-len(geometry.shape), 0)):
        return f"the contracted axes must be the last axes, after axis {first_kept - 1}"
    k = geometry.contracted_size
    group = group or k
    if group and k % group:
        return f"the last group of {k} numbers in groups of {group} is not full"
    m = math.prod(shape) // max(k, 1)
    return ActivationProblem(m, k, group, dtype, spec, geometry)
