"""`scaled_matmul_operand`: a QTensor as an operand of `jax.nn.scaled_matmul`."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.qtensor import PerTensor, QTensor

_CALLER = "jaxq.io.scaled_matmul_operand"
_CODES = ("float4_e2m1fn", "float8_e4m3fn", "float8_e5m2")
_SCALES = ("float8_e8m0fnu", "float8_e4m3fn")


class ScaledMatmulOperand(NamedTuple):
    """One operand of `jax.nn.scaled_matmul`, and a factor for its result.

    Attributes:
      codes: float4 or float8 numbers `[B, N, K]`, with the contracted axis last.
      scales: float8 `[B, N, K / block]`.
      global_scale: float32 `[B, 1, 1]`, the factor that `jax.nn.scaled_matmul` does not
        take: the second scale of NVFP4, and 1 for MXFP8 and MXFP4.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.ones((64, 8)), "mxfp8")
      >>> codes, scales, global_scale = jaxq.io.scaled_matmul_operand(qt)
      >>> codes.shape, scales.shape, global_scale.tolist()
      ((1, 8, 64), (1, 8, 2), [[[1.0]]])
    """

    codes: jax.Array
    scales: jax.Array
    global_scale: jax.Array


def scaled_matmul_operand(qt: QTensor) -> ScaledMatmulOperand:
    """The numbers and scales of a QTensor as `jax.nn.scaled_matmul` takes them.

    Both operands of `jax.nn.scaled_matmul` have the contracted axis last, as a QTensor
    stores its codes. So weights and activations need the same function, and no codes
    move. Multiply the product by `global_scale` of both operands.

    Args:
      qt: of the preset "mxfp8", "mxfp8_e5m2", "mxfp4" or "nvfp4", with one block size
        along the contracted axes. Batch axes are flattened into B, and kept axes into
        N. For activations `[tokens, K]`, quantize with `contracting=-1`.

    Returns:
      The operand. It also works under jit.

    Raises:
      TypeError: `qt` is not a QTensor.
      ValueError: `qt` has another format, granularity or scale; or its last block is
        not full.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> def matmul(x, w):  # jax 0.10 runs this on GPU only
      ...     a = jaxq.io.scaled_matmul_operand(x)
      ...     b = jaxq.io.scaled_matmul_operand(w)
      ...     product = jax.nn.scaled_matmul(a.codes, b.codes, a.scales, b.scales)
      ...     return product * a.global_scale * b.global_scale  # [1, tokens, out]
      >>> x = jaxq.quantize(jnp.ones((4, 64)), "nvfp4", contracting=-1)
      >>> w = jaxq.quantize(jnp.ones((64, 8)), "nvfp4")
      >>> jax.eval_shape(matmul, x, w).shape
      (1, 4, 8)
    """
    if not isinstance(qt, QTensor):
        raise TypeError(f"{_CALLER}: expected a QTensor, got {type(qt).__name__}.")
    problem = _problem(qt)
    if problem:
        raise ValueError(
            f"{_CALLER}: {qt!r} cannot be an operand: {problem}. Quantize with "
            "'mxfp8', 'mxfp4' or 'nvfp4'."
        )
    geometry = qt.meta.geometry
    codes = qt.stored_codes()[..., : geometry.contracted_size]
    scale, second = qt.scale, None
    if isinstance(scale, QTensor):
        second = scale.scale
        scale = _as_floats(scale.codes(), scale.spec.fmt.name)
    num_batch = math.prod(qt.batch_shape)
    num_rows = math.prod(geometry.shape[axis] for axis in geometry.kept)
    global_scale = jnp.ones((num_batch, 1, 1), jnp.float32)
    if second is not None:
        assert not isinstance(second, QTensor)
        global_scale = second.reshape(num_batch, 1, 1)
    return ScaledMatmulOperand(
        _as_floats(codes, qt.spec.fmt.name).reshape(
            num_batch, num_rows, geometry.contracted_size
        ),
        scale.reshape(num_batch, num_rows, geometry.num_blocks[-1]),
        global_scale,
    )


def _problem(qt: QTensor) -> str | None:
    """Why a QTensor cannot be an operand."""
    geometry = qt.meta.geometry
    if qt.spec.fmt.name not in _CODES:
        return f"its format is none of {', '.join(_CODES)}"
    leaves = (qt.zero_point, qt.offset, qt.codebook, qt.input_scale)
    if any(leaf is not None for leaf in leaves):
        return "it has a zero point, an offset, a codebook or an input_scale"
    *kept_blocks, block = geometry.block_shape
    if geometry.flat or any(
        kept_block != 1 and geometry.shape[axis] != 1
        for axis, kept_block in zip(geometry.kept, kept_blocks, strict=True)
    ):
        return "its blocks are not groups along the contracted axis"
    if geometry.contracted_size % (block or 1):
        return f"the last of its blocks of {block} is not full"
    scale = qt.scale
    if not isinstance(scale, QTensor):
        if scale.dtype.name in _SCALES:
            return None
        return f"its scales are {scale.dtype.name}, none of {', '.join(_SCALES)}"
    is_simple = scale.spec.fmt.name == "float8_e4m3fn" and scale.spec.scale == "float32"
    if not is_simple or scale.spec.granularity != PerTensor() or scale.spec.offset:
        return "its scales are quantized, but not to float8_e4m3fn with one scale"
    return None


def _as_floats(codes: jax.Array, name: str) -> jax.Array:
    """Bit patterns, uint8, as numbers of a float dtype."""
    dtype = jnp.dtype(name)
    return lax.bitcast_convert_type(codes.astype(f"uint{jnp.finfo(dtype).bits}"), dtype)
