"""Leaves of weights whose codes are floats: fp8 codes, E8M0 scales, NVFP4 scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.formats import Packing
from jaxq.io.layouts._stored import StoredWeight, quantized_scale
from jaxq.io.layouts._tensors import WeightTensors
from jaxq.qtensor import PerBlock, PerGroup, PerTensor, QTensor, QuantSpec

FP8 = "float8_e4m3fn"
FP4 = "float4_e2m1fn"
E8M0 = "float8_e8m0fnu"
MX_GROUP = 32
NVFP4_GROUP = 16

# MX and NVFP4 pack two neighbouring codes in a byte, the first in the low bits.
MXFP4_SPEC = QuantSpec(
    FP4,
    PerGroup(MX_GROUP, pad=True),
    scale=E8M0,
    scale_rule="mx_floor",
    packing=Packing.LOW_FIRST,
)
NVFP4_SPEC = QuantSpec(
    FP4,
    PerGroup(NVFP4_GROUP, pad=True),
    scale=QuantSpec(FP8, PerTensor()),
    packing=Packing.LOW_FIRST,
)


def fp8_spec(out_block: int, in_block: int) -> QuantSpec:
    """fp8 codes with one scale for each block of a torch weight `[out, in]`."""
    return QuantSpec(FP8, PerBlock((in_block, out_block), pad=True))


def codes_of_fp8(array: jax.Array) -> jax.Array:
    """The codes of float8 numbers, uint8."""
    return lax.bitcast_convert_type(array, jnp.uint8)


def fp8_of_codes(codes: jax.Array) -> jax.Array:
    """The inverse of `codes_of_fp8`."""
    return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)


def read_e8m0(tensors: WeightTensors, name: str, shape: tuple[int, ...]) -> jax.Array:
    """E8M0 scales, which files store as uint8 or as float8."""
    array = tensors.array(name, ("uint8", E8M0), shape)
    scale = lax.bitcast_convert_type(array, jnp.float8_e8m0fnu)
    tensors.check_finite(name, scale)
    return scale


def written_e8m0(weight: StoredWeight) -> jax.Array:
    """The E8M0 scales of a QTensor as uint8."""
    weight.refuse_unless(
        weight.spec.scale == E8M0, f"its scales are not {E8M0}, powers of two"
    )
    assert not isinstance(weight.qt.scale, QTensor)
    return lax.bitcast_convert_type(weight.qt.scale, jnp.uint8)


def nvfp4_scale(codes: jax.Array, global_scale: jax.Array) -> QTensor:
    """The scale of an NVFP4 weight.

    Args:
      codes: the codes of the fp8 scales, uint8 `[*batch, out, groups]`.
      global_scale: float32 `[*batch]`, by which the fp8 scales are multiplied.
    """
    shape = codes.shape[-2:]
    spec = QuantSpec(FP8, PerTensor())
    return quantized_scale(spec, shape, codes, global_scale[..., None, None])


def written_nvfp4(weight: StoredWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays of an NVFP4 weight.

    Returns:
      (packed codes uint8 `[*batch, out, in / 2]`, fp8 scales `[*batch, out, groups]`,
      float32 `[*batch]` by which the scales are multiplied).
    """
    require_fp4(weight, NVFP4_GROUP)
    scale = weight.quantized_scale(FP8)
    per_tensor = scale.meta.geometry.block_shape == (None, None)
    weight.refuse_unless(
        per_tensor and not isinstance(scale.scale, QTensor),
        "its scales have more than one scale of their own",
    )
    assert not isinstance(scale.scale, QTensor)
    global_scale = weight.exact("scale of scales", scale.scale, "float32")[..., 0, 0]
    data = weight.packed(Packing.LOW_FIRST, NVFP4_GROUP)
    return data, fp8_of_codes(scale.stored_codes()), global_scale


def require_fp4(weight: StoredWeight, group: int) -> None:
    """Raises unless codes are E2M1 in groups of the right size, without zero points."""
    fmt = weight.spec.fmt.name
    weight.refuse_unless(fmt == FP4, f"expected the format {FP4}, got {fmt}")
    weight.plain()
    size = weight.group_size()
    whole = weight.num_in % group == 0
    weight.refuse_unless(
        whole and (size == group or weight.num_in == group),
        f"its groups of {size} in rows of {weight.num_in} are not groups of {group}",
    )
