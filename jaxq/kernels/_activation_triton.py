"""Quantization of rows with Triton, for GPUs.

A group is a row of its own: `[m, k]` is `[m * num_groups, group]` in memory. Each
program has `bm` such rows in registers. It reads each number once, finds the largest
magnitude of each row, and computes scales and codes. Edges are masked.

The bits are those of `quantize` on a CPU. Two operations of Triton have other results,
so the kernel does not rely on them:

- Its division is not rounded to nearest. `nearest_reciprocal` corrects it.
- Its maximum and minimum drop NaN. Magnitudes are compared as integers.

XLA's own reciprocal on a GPU is `rcp.approx`, which can be off by one last place. A
code that XLA computes there can differ by one step where a quotient lies that close to
the middle of two codes.

The kernel has run in the interpreter and has been compiled for an H200. It has not been
timed on a device.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxq.kernels._activation_problem import ActivationProblem
from jaxq.kernels._triton_programs import why_not_offsets
from jaxq.qtensor import row_codes, row_quotients, row_scale

# Numbers that a program holds: 64 registers in each of 512 threads.
_MOST_NUMBERS = 32768
_FRACTION_BITS = 23
_FRACTION = np.int32(0x7FFFFF)
_MAGNITUDE = np.int32(0x7FFFFFFF)


def why_not(problem: ActivationProblem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot quantize the rows, or None if it can."""
    del device_kind
    if problem.group > _MOST_NUMBERS:
        return (
            f"a program of the GPU kernel holds {_MOST_NUMBERS} numbers in registers, "
            f"and {problem.group} numbers share a scale"
        )
    return why_not_offsets(problem.m * problem.k)  # the codes


def default_tiles(problem: ActivationProblem) -> dict[str, int]:
    """Returns the number of rows of a program, "bm", and its number of "warps"."""
    length = pl.next_power_of_2(problem.group)
    bm = max(1, 4096 // length)
    warps = max(4, min(16, bm * length // 1024))
    return {"bm": bm, "warps": warps}


def quantize_activation(
    x: jax.Array,
    *,
    problem: ActivationProblem,
    tiles: dict[str, int],
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Quantizes rows.

    Args:
      x: `[m, k]`.
      problem: static facts of the rows. `why_not` must accept it.
      tiles: "bm" and "warps", as `default_tiles` returns them.
      interpret: True to run on a CPU.

    Returns:
      (codes, scales): `[m, k]` in the code dtype of the format, and `[m, num_groups]`
      in the dtype of the scales.
    """
    p, bm = problem, tiles["bm"]
    num_rows = p.m * p.num_groups
    axes = jax.typeof(x).manual_axis_type
    codes, scales = pl.pallas_call(
        functools.partial(_program, p, bm),
        out_shape=[
            jax.ShapeDtypeStruct(
                (num_rows, p.group), p.codes_dtype, manual_axis_type=axes
            ),
            jax.ShapeDtypeStruct((num_rows,), p.scale_dtype, manual_axis_type=axes),
        ],
        grid=(pl.cdiv(num_rows, bm),),
        compiler_params=plt.CompilerParams(num_warps=tiles["warps"], num_stages=1),
        interpret=interpret,
        name="jaxq_quantize_activation",
    )(x.reshape(num_rows, p.group))
    return codes.reshape(p.m, p.k), scales.reshape(p.m, p.num_groups)


def _program(p: ActivationProblem, bm: int, x_ref, codes_ref, scale_ref) -> None:
    """One program. It quantizes `bm` rows of `group` numbers."""
    length = pl.next_power_of_2(p.group)
    rows = pl.ds(pl.program_id(0) * bm, bm)
    # `length` may be longer than a row, and the mask leaves out what is behind it. jax
    # refuses such a slice if its start is a constant.
    columns = pl.ds(pl.program_id(0) * 0, length)
    row_mask = pl.program_id(0) * bm + jnp.arange(bm) < p.m * p.num_groups
    shape = (bm, length)
    mask = lax.broadcast_in_dim(row_mask, shape, (0,))
    mask &= lax.broadcast_in_dim(jnp.arange(length) < p.group, shape, (1,))
    x = plt.load(x_ref.at[rows, columns], mask=mask, other=0).astype(jnp.float32)
    patterns = lax.bitcast_convert_type(x, jnp.int32) & _MAGNITUDE
    magnitude = lax.bitcast_convert_type(jnp.max(patterns, axis=1), jnp.float32)
    scale = row_scale(magnitude, p.spec, p.geometry)  # [bm]
    plt.store(scale_ref.at[rows], scale, mask=row_mask)
    quotients = row_quotients(x, scale[:, None], nearest_reciprocal)
    encode = _whole_codes if p.spec.fmt.kind == "integer" else row_codes
    plt.store(codes_ref.at[rows, columns], encode(quotients, p.spec), mask=mask)


def nearest_reciprocal(x: jax.Array) -> jax.Array:
    """`1 / x` rounded to nearest, if the division is off by two last places at most.

    Args:
      x: float32, infinite, NaN, or from 2^-126 to 2^120.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = bits >> _FRACTION_BITS
    one = np.float32(1).view(np.int32)
    mantissa = lax.bitcast_convert_type((bits & _FRACTION) | one, jnp.float32)
    divisor = (bits & _FRACTION) | np.int32(1 << _FRACTION_BITS)
    # The quotient 2^47 / divisor is from 2^23 to 2^24, so it is a mantissa.
    quotient = ((1 / mantissa) * np.float32(2**24)).astype(jnp.int32)
    quotient = nearest_quotient(quotient, divisor)
    power = lax.bitcast_convert_type((254 - exponent) << _FRACTION_BITS, jnp.float32)
    inverse = quotient.astype(jnp.float32) * np.float32(2.0**-24) * power
    is_normal = (exponent > 0) & (exponent < 255)
    return jnp.where(is_normal, inverse, jnp.where(x == np.inf, np.float32(0), x))


def nearest_quotient(quotient: jax.Array, divisor: jax.Array) -> jax.Array:
    """`2^47 / divisor` rounded to nearest, from a quotient that is off by four at most.

    Args:
      quotient: int32, about 2^23 to 2^24.
      divisor: int32, from 2^23 to 2^24.
    """
    for _ in range(4):
        # 2^47 - quotient * divisor. The difference is small, so it is exact in int32,
        # which counts modulo 2^32. A tie is impossible: 2^48 has no odd factor.
        remainder = -(quotient * divisor)
        quotient += (2 * remainder > divisor).astype(jnp.int32)
        quotient -= (2 * remainder < -divisor).astype(jnp.int32)
    return quotient


def _whole_codes(quotients: jax.Array, spec) -> jax.Array:
    """`row_codes` of an integer format. Triton has no operation that rounds."""
    most = np.float32(spec.fmt.max)  # symmetric specs use the narrow range
    clipped = jnp.minimum(jnp.maximum(quotients, -most), most)
    whole = clipped.astype(jnp.int32)  # toward zero
    rest = clipped - whole.astype(jnp.float32)  # exact
    is_odd = (whole & 1) == 1
    half = np.float32(0.5)
    whole += ((rest > half) | ((rest == half) & is_odd)).astype(jnp.int32)
    whole -= ((rest < -half) | ((rest == -half) & is_odd)).astype(jnp.int32)
    is_number = quotients == quotients
    return jnp.where(is_number, whole, 0).astype(spec.fmt.code_dtype)
