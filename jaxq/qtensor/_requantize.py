"""requantize: new codes for the scales of an existing QTensor."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxq.qtensor import _scales
from jaxq.qtensor._dequantize import scale_values
from jaxq.qtensor._geometry import describe
from jaxq.qtensor._inputs import check_key
from jaxq.qtensor._leaf_dtypes import check_leaves
from jaxq.qtensor._mesh_axes import quantized_like
from jaxq.qtensor._product_operand import ProductOperand
from jaxq.qtensor._qtensor import QTensor
from jaxq.qtensor._quantize import encode, padded_blocks, without_gradient
from jaxq.qtensor._quotient import divide_for_rounding


def requantize(
    w: jax.typing.ArrayLike, like: QTensor, *, key: jax.Array | None = None
) -> QTensor:
    """Computes codes of `w` with the scales of `like`.

    All leaves of `like` other than its codes do not change.

    Args:
      w: float array of the shape of `like`.
      like: the QTensor whose scales, zero points, offsets, codebooks and input scales
        are used.
      key: PRNG key. Needed if the codes of `like` are rounded stochastically
        (`like.spec.rounding`), not allowed otherwise. Scales are not rounded again.

    Returns:
      A QTensor that differs from `like` only in its codes. For an array w,
      `requantize(w, quantize(w, spec))` equals `quantize(w, spec)`, unless the spec has
      `codes_from="ideal"`, a ternary scale rule or stochastic rounding.

    Raises:
      TypeError: `w` is quantized, `like` is not a QTensor, or one of its leaves has
        another dtype than its `meta` says.
      ValueError: the shapes of `w` and `like` differ; `w` is not a float array; `like`
        rounds stochastically and `key` is None; or `like` does not round stochastically
        and `key` is given.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> grid = jaxq.quantize(jnp.array([1.27, 0.5]), "int8")
      >>> qt = jaxq.qtensor.requantize(jnp.array([0.024, 9.0]), grid)
      >>> [round(v, 2) for v in jaxq.dequantize(qt).tolist()]
      [0.02, 1.27]
    """
    if not isinstance(like, QTensor):
        raise TypeError(
            f"requantize: like must be a QTensor, got {type(like).__name__}. Pass the "
            "result of jaxq.quantize, or quantize() of a TrainedWeight."
        )
    check_leaves(like, "requantize")
    if isinstance(w, ProductOperand):
        raise TypeError(
            f"requantize: w must be a float array, got {w!r}. Use "
            f"{w.floats_expression}."
        )
    x = jnp.asarray(w)
    if x.shape != like.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            "requantize: w must be a float array with the shape of like, "
            f"{list(like.shape)}, got w: {describe(x.dtype.name, x.shape)}."
        )
    check_key((like.spec,), key, "requantize")
    return quantized_like(_requantize, without_gradient(x), like, key)


@jax.jit
def _requantize(x: jax.Array, like: QTensor, key: jax.Array | None) -> QTensor:
    spec, geometry = like.spec, like.meta.geometry
    view = geometry.to_view(x).astype(jnp.float32)
    if like.input_scale is not None:
        view = view / geometry.contracted_to_view(like.input_scale)
    if spec.offset == "mean":
        assert like.offset is not None
        view = view - like.offset
    blocks = padded_blocks(view, spec, geometry)
    if spec.offset == "min":
        assert like.offset is not None
        blocks = blocks - geometry.scale_to_blocks(_scales.load_from_dtype(like.offset))
    block_scale = geometry.scale_to_blocks(scale_values(like))
    y = divide_for_rounding(blocks, block_scale, spec.rounding)
    if like.codebook is not None:
        codes = _nearest_entry(y, like.codebook, like)
    elif like.zero_point is not None:
        zero = geometry.scale_to_blocks(like.zero_point).astype(jnp.float32)
        codes = encode(y, zero, spec, key)
    else:
        codes = encode(y, None, spec, key)
    return like.with_stored_codes(geometry.to_storage(geometry.from_blocks(codes)))


def _nearest_entry(y: jax.Array, codebook: jax.Array, like: QTensor) -> jax.Array:
    """The code of the nearest codebook entry; the first one if two are equally near."""
    geometry, fmt = like.meta.geometry, like.spec.fmt
    index = jnp.zeros(y.shape, jnp.int32)
    least = jnp.full(y.shape, jnp.inf)
    for i in range(codebook.shape[-1]):
        entry = geometry.scale_to_blocks(codebook[..., i])
        distance = jnp.abs(y - entry)
        index = jnp.where(distance < least, i, index)
        least = jnp.minimum(distance, least)
    return (index + int(fmt.codes().min())).astype(fmt.code_dtype)
