"""`ragged_dot`: rows sorted by expert times a stack of quantized weights.

A mixture of experts uses this product.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.kernels import ragged_matmul
from jaxq.meshes import all_explicit_mesh
from jaxq.ops._decision import (
    ragged_activation,
    ragged_rows_dtype,
    ragged_x_dtype,
    result_dtype,
)
from jaxq.ops._input_scale import scale_rows_by_group
from jaxq.ops._operands import check_one_mesh
from jaxq.ops._ragged_activation import multiply_quantized_rows
from jaxq.ops._ragged_parts import multiply_ragged_parts
from jaxq.ops._trained import multiply_trained
from jaxq.ops._weight_rows import row_meta, weight_rows
from jaxq.qtensor import FLOATS, QTensor, TrainedWeight, check_leaves, describe


def ragged_dot(
    x: jax.Array,
    weights: QTensor | TrainedWeight,
    group_sizes: jax.Array,
    *,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.ragged_dot` with quantized weights.

    The first `group_sizes[0]` rows of x are multiplied by `weights[0]`, the next
    `group_sizes[1]` rows by `weights[1]`, and so on. The product is differentiable in x
    and in the scales.

    TPU and GPU have a Pallas kernel. It reads only the weights of experts that have
    rows. `jaxq.explain(x, weights, group_sizes=group_sizes)` names the kernel, or says
    why none runs. Then, on other platforms and in gradients, XLA decodes a few rows of
    every expert at a time.

    If the weights have an activation spec (`with_activation`), each row of x is
    quantized first. A static range is the range of the row's expert. This gives the
    numbers of `x_rows @ weights[i]` for each expert i. The two differ by the order of
    float32 sums. int8 and float8 codes with one scale per row are multiplied by integer
    weights without rounding. Other products of codes run in float32.

    Args:
      x: float32, bfloat16 or float16 `[m, k]`, sorted by expert.
      weights: QTensor or `TrainedWeight` `[e, k, n]`, quantized with
        `contracting=-2, batch=0`.
      group_sizes: integers `[e]`, the number of rows of each expert. A negative number
        counts as zero. Rows beyond the sum of `group_sizes` give zeros.
      preferred_element_type: dtype of the result. None uses the same dtype as
        `jaxq.dot_general`. The product is accumulated in float32.

    Returns:
      `[m, n]`.

    Raises:
      TypeError: x is not a float32, bfloat16 or float16 matrix, `group_sizes` are not
        integers, or `weights` is not a QTensor.
      ValueError: `weights` is not `[e, k, n]` quantized with `contracting=-2, batch=0`,
        `weights` has blocks that cross rows (`PerFlat`), `x` is not `[m, k]`, or
        `group_sizes` is not `[e]`. Or `weights` has an activation spec with scales that
        rows of several experts would share, has an outlier threshold, or is a
        `TrainedWeight` with an activation spec.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> experts = jnp.ones((2, 64, 8))
      >>> experts = jaxq.quantize(experts, "int4", contracting=-2, batch=0)
      >>> jaxq.ops.ragged_dot(jnp.ones((5, 64)), experts, jnp.array([2, 3])).shape
      (5, 8)
    """
    if isinstance(weights, TrainedWeight):
        return _ragged_trained(
            jnp.asarray(x),
            weights,
            jnp.asarray(group_sizes),
            preferred_element_type,
        )
    if not isinstance(x, QTensor):  # `check_ragged` raises otherwise
        x = jnp.asarray(x)
    group_sizes = jnp.asarray(group_sizes)
    x_dtype = check_ragged(x, weights, group_sizes, "ragged_dot")
    check_one_mesh((x, weights, group_sizes), "ragged_dot")
    out_dtype = jnp.dtype(preferred_element_type or result_dtype(x, weights))
    sizes = _row_counts(group_sizes)
    product = _PRODUCTS[x_dtype]
    mesh = all_explicit_mesh((x, weights))
    if mesh is not None:
        y = multiply_ragged_parts(x, weights, sizes, product, mesh)
    else:
        y = product(x, weights, sizes)
    return y.astype(out_dtype)


def _row_counts(group_sizes: jax.Array) -> jax.Array:
    """The number of rows of each expert, int32. Products need numbers from 0 on."""
    return jnp.maximum(group_sizes.astype(jnp.int32), 0)


def _product(
    x: jax.Array, weights: QTensor, sizes: jax.Array, *, x_dtype: str
) -> jax.Array:
    """The product on one device, float32 `[m, n]`."""
    x, weights = scale_rows_by_group(x, weights, sizes)
    if weights.meta.activation is None:
        return _multiply(x.astype(x_dtype), weights, sizes)
    rows_dtype = ragged_rows_dtype(x, weights)
    return multiply_quantized_rows(x, weights, sizes, _multiply, x_dtype, rows_dtype)


# The product for each dtype in which x is multiplied. They are compared by identity.
_PRODUCTS = {dtype: functools.partial(_product, x_dtype=dtype) for dtype in FLOATS}


def _multiply(x: jax.Array, weights: QTensor, sizes: jax.Array) -> jax.Array:
    """The product of rows with weights without activation spec, float32 `[m, n]`."""
    rows = jax.vmap(lambda weight: weight_rows(weight)[0])(weights)
    return ragged_matmul(x, rows, sizes, row_meta(weights.meta))


def check_ragged(x: Any, weights: Any, group_sizes: Any, caller: str) -> str:
    """Checks the operands of `ragged_dot`.

    Args:
      x: array or `jax.ShapeDtypeStruct`.
      weights: a QTensor; the leaves may be shapes.
      group_sizes: array or `jax.ShapeDtypeStruct`.
      caller: name of the function, for errors.

    Returns:
      The dtype in which x is multiplied.

    Raises:
      TypeError: as in `ragged_dot`.
      ValueError: as in `ragged_dot`.
    """
    if not isinstance(weights, QTensor):
        raise TypeError(
            f"{caller}: weights must be a QTensor, got {type(weights).__name__}. "
            "Use jax.lax.ragged_dot for arrays."
        )
    if isinstance(x, QTensor):
        raise TypeError(
            f"{caller}: x must be a float32, bfloat16 or float16 matrix, got {x!r}. "
            "Pass the rows as floats. weights.with_activation quantizes them."
        )
    check_leaves(weights, caller)
    shown = (
        f"x: {describe(x.dtype.name, x.shape)}, "
        f"group_sizes: {describe(group_sizes.dtype.name, group_sizes.shape)}"
    )
    if x.ndim != 2 or x.dtype.name not in FLOATS:
        raise TypeError(
            f"{caller}: x must be a float32, bfloat16 or float16 matrix ({shown}). "
            "Use x.astype and x.reshape."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(
            f"{caller}: group_sizes must be integers ({shown}). Pass the number of "
            "rows of each expert."
        )
    x_dtype = ragged_x_dtype(x, weights)
    num_experts, k, _ = weights.shape
    if x.shape[1] != k or group_sizes.shape != (num_experts,):
        raise ValueError(
            f"{caller}: x must be [m, {k}] and group_sizes [{num_experts}] for "
            f"{weights!r}, got {shown}."
        )
    ragged_activation(x, weights)
    return x_dtype


def _ragged_trained(
    x: jax.Array,
    weights: TrainedWeight,
    group_sizes: jax.Array,
    preferred_element_type: Any,
) -> jax.Array:
    """`ragged_dot` with trained weights."""
    if weights.meta.activation is not None:
        raise ValueError(
            f"ragged_dot: {weights!r} has an activation spec, and rows of experts are "
            "not quantized in training yet. Prepare the experts without activation=, "
            "and use with_activation after conversion."
        )
    out_dtype = jnp.dtype(preferred_element_type or result_dtype(x, weights))

    def multiply(
        inputs: tuple[jax.Array, jax.Array], weights: QTensor | jax.Array
    ) -> jax.Array:
        x, group_sizes = inputs
        if isinstance(weights, QTensor):
            return ragged_dot(x, weights, group_sizes, preferred_element_type=out_dtype)
        y = jax.lax.ragged_dot(
            x,
            weights.astype(x.dtype),
            _row_counts(group_sizes),
            preferred_element_type=jnp.float32,
        )
        return y.astype(out_dtype)

    return multiply_trained((x, group_sizes), weights, multiply, has_batch=True)
