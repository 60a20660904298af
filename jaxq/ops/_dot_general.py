"""`dot_general`: `lax.dot_general` with arrays or QTensors on either side.

`matmul` and `einsum` call it. `_decision.py` decides what runs. This file carries out
the plan. Letters in the shape comments: b batch axes, m free axes of x, k contracted
axes, n free axes of the weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxq import kernels
from jaxq.meshes import (
    all_explicit_mesh,
    apply_out_sharding,
    call_on_auto_axes,
    explicit_spec,
)
from jaxq.ops._activations import activation_axes, multiply_quantized
from jaxq.ops._decision import plan_dot, plan_of_term, result_dtype
from jaxq.ops._decoded import multiply_decoded
from jaxq.ops._dimension_numbers import (
    DimensionNumbers,
    as_tuples,
    batch_first,
    check_sizes,
    mirrored,
    nonnegative,
)
from jaxq.ops._input_scale import scale_operand, scale_over_mesh
from jaxq.ops._on_parts import call_on_parts, mapped_axes
from jaxq.ops._operands import (
    Operand,
    as_operands,
    check_float_partner,
    check_one_mesh,
)
from jaxq.ops._outlier_columns import split_outlier_columns
from jaxq.ops._part_layout import PartLayout, gathers_codes, part_layout
from jaxq.ops._plan import Plan, Preparation
from jaxq.ops._trained import (
    fake_quant_activation,
    multiply_trained,
    reciprocal_input_scale,
    trained_operand,
    with_average,
)
from jaxq.ops._weight_rows import weight_rows
from jaxq.qtensor import (
    QUANTIZED,
    QTensor,
    TrainedWeight,
    dequantize,
    mesh_axes,
)


def dot_general(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`lax.dot_general`, where either operand may be a QTensor or a `TrainedWeight`.

    Low-precision operands accumulate as in matrix units: integer codes in int32, all
    others in float32. The result is rounded once. `jaxq.explain` shows which path a
    product takes.

    Args:
      lhs: array, QTensor or `jaxq.qtensor.TrainedWeight`.
      rhs: array, QTensor or `TrainedWeight`. The other operand of a `TrainedWeight` is
        an array.
      dimension_numbers: `((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))`.
      precision: passed to lax if both operands are arrays; ignored otherwise.
      preferred_element_type: dtype of the result. If an operand is quantized, this must
        be a float dtype of at most 32 bits. None uses the dtype that the operands
        promote to, with two exceptions: int32 for integers narrower than int32, and
        float32 for float8. Sums rarely fit these narrow dtypes.
      out_sharding: how the result is sharded over a mesh, a `NamedSharding` or
        `PartitionSpec`. For two arrays, lax accepts explicit mesh axes only. A product
        with a QTensor is resharded along explicit axes and constrained along automatic
        axes.

    Returns:
      Array with the batch axes, then the free axes of lhs, then the free axes of rhs.

    Raises:
      TypeError: contracted or batch axes differ in size, repeat or do not exist; or
        integers or float64 numbers are multiplied by a QTensor; or two operands are
        quantized and one of them is a `TrainedWeight`; or an operand is quantized and
        `preferred_element_type` is not a float dtype of at most 32 bits.
      ValueError: the weight has an activation spec, and a block size of this spec does
        not divide the contracted axis of the activation.
      NotImplementedError: a product with a QTensor has an `out_sharding` that names
        both explicit and automatic mesh axes.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.eye(32), "int4")
      >>> dims = (((1,), (0,)), ((), ()))
      >>> y = jaxq.dot_general(
      ...     jnp.ones((2, 32)), qt, dims, preferred_element_type=jnp.float32
      ... )
      >>> y.shape, y.dtype.name
      ((2, 32), 'float32')
    """
    left, right = as_operands(lhs, rhs, caller="dot_general")
    dims = as_tuples(dimension_numbers, "dot_general")
    check_sizes(left, right, dims, "dot_general")
    check_float_partner(left, right, "dot_general")
    check_one_mesh((left, right), "dot_general")
    out_dtype = _preferred_dtype(left, right, preferred_element_type)
    trained = trained_operand((left, right), "dot_general")
    if trained is not None:
        x, weight = (right, left) if trained == 0 else (left, right)
        return _multiply_trained(
            x, weight, dims, out_dtype, out_sharding, swapped=trained == 0
        )
    plan = plan_dot(left, right, dims, out_dtype.name)
    if plan.path == "dense":
        assert not isinstance(left, QTensor)
        assert not isinstance(right, QTensor)
        y = lax.dot_general(
            left,
            right,
            dims,
            precision=precision,
            preferred_element_type=jnp.dtype(plan.accumulate),
            out_sharding=out_sharding,
        )
        return y.astype(out_dtype)
    mesh = all_explicit_mesh((left, right))
    if mesh is not None:
        plan = dataclasses.replace(plan, mapped=mapped_axes(mesh))
    y = _multiply_over_mesh(
        plan, plan.before, left, right, nonnegative(left, right, dims)
    )
    return apply_out_sharding(y.astype(out_dtype), out_sharding)


def _preferred_dtype(lhs: Any, rhs: Any, preferred: Any) -> np.dtype:
    """The dtype of the result: `preferred`, or `result_dtype` if `preferred` is None.

    Raises:
      TypeError: an operand is quantized, and `preferred` is not a float dtype of at
        most 32 bits.
    """
    if preferred is None:
        return result_dtype(lhs, rhs)
    dtype = jnp.dtype(preferred)
    is_quantized = isinstance(lhs, QUANTIZED) or isinstance(rhs, QUANTIZED)
    is_float = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 4
    if is_quantized and not is_float:
        raise TypeError(
            "dot_general: products with a QTensor are summed in float32, so "
            "preferred_element_type must be float32 or a narrower float, got "
            f"{dtype.name}."
        )
    return dtype


def _multiply_trained(
    x: jax.Array,
    weight: TrainedWeight,
    dims: DimensionNumbers,
    out_dtype: np.dtype,
    out_sharding: Any,
    *,
    swapped: bool,
) -> jax.Array:
    """The product of an array and a trained weight.

    Args:
      x: the float operand.
      weight: the trained weight.
      dims: dimension numbers of the product.
      out_dtype: dtype of the result.
      out_sharding: as in `dot_general`.
      swapped: True if the weight is the left operand.
    """
    axes = activation_axes(x.ndim, dims, swapped=swapped)

    def multiply(x: jax.Array, weight: QTensor | jax.Array) -> jax.Array:
        lhs, rhs = (weight, x) if swapped else (x, weight)
        return dot_general(
            lhs,
            rhs,
            dims,
            preferred_element_type=out_dtype,
            out_sharding=out_sharding,
        )

    def fake_input(x: jax.Array, weight: TrainedWeight) -> jax.Array:
        if weight.meta.activation is None or weight.input_scale is None:
            return fake_quant_activation(x, weight, axes)
        scaled, _ = scale_operand(x, weight, dims, swapped=swapped)
        values = fake_quant_activation(scaled, weight, axes)
        reciprocal = reciprocal_input_scale(weight)
        return scale_operand(values, reciprocal, dims, swapped=swapped)[0]

    if weight.decay is not None:
        scaled = x
        if weight.input_scale is not None:
            scaled, _ = scale_operand(x, weight, dims, swapped=swapped)
        weight = with_average(scaled, weight, axes)
    has_batch = axes.num_batch > 0
    return multiply_trained(x, weight, multiply, fake_input, has_batch=has_batch)


# Carrying out a plan.


def _multiply_over_mesh(
    plan: Plan,
    steps: tuple[Preparation, ...],
    lhs: jax.Array | QTensor,
    rhs: jax.Array | QTensor,
    dims: DimensionNumbers,
) -> jax.Array:
    """Carries out a plan on a mesh with explicit axes.

    Preparations are carried out on the whole operands. Then each device multiplies its
    parts. XLA partitions the product and its preparations instead if the mesh has axes
    of other types too. XLA partitions the product if a part would cut blocks of the
    weight, or if `jax.vmap` maps over all axes of the mesh.

    Args:
      plan: the plan of the whole product.
      steps: the last preparations of `plan.before`. They are not carried out yet.
      lhs: the left operand after the other preparations.
      rhs: the right operand after the other preparations.
      dims: dimension numbers of these operands, without negative axes.

    Returns:
      The product in the dtype `plan.result` or in float32.
    """
    axis_names = (_axes_of(lhs), _axes_of(rhs))
    mesh = all_explicit_mesh((lhs, rhs))
    if mesh is not None and steps:
        return _multiply(plan, steps, lhs, rhs, dims=dims)
    if mesh is not None and len(plan.mapped) < len(mesh.axis_names):
        layout = part_layout(lhs, rhs, dims, axis_names, mesh)
        if layout is not None:
            return _multiply_parts(lhs, rhs, plan, dims, layout, mesh)
    out_names = [axis_names[0][axis] for axis in dims[1][0]]
    for side in (0, 1):
        bound = (*dims[0][side], *dims[1][side])
        names = enumerate(axis_names[side])
        out_names.extend(name for axis, name in names if axis not in bound)
    product = functools.partial(_multiply, plan, steps, dims=dims)
    return call_on_auto_axes(product, PartitionSpec(*out_names), lhs, rhs)


@functools.partial(jax.jit, static_argnames=("plan", "dims", "layout", "mesh"))
def _multiply_parts(
    lhs: jax.Array | QTensor,
    rhs: jax.Array | QTensor,
    plan: Plan,
    dims: DimensionNumbers,
    layout: PartLayout,
    mesh: Any,
) -> jax.Array:
    """The product of operands on explicit mesh axes, as `layout` says."""
    if layout.summed:
        plan = plan_of_term(plan, lhs, rhs)

    def product(lhs: Any, rhs: Any) -> jax.Array:
        multiply = functools.partial(
            _multiply, plan, (), dims=dims, summed=layout.summed
        )
        in_specs = layout.in_specs(lhs, rhs)
        return call_on_parts(
            multiply, mesh, in_specs, layout.out, lhs, rhs, mapped=plan.mapped
        )

    gathers = [
        gathers_codes(operand, _axes_of(operand), spec)
        for operand, spec in zip((lhs, rhs), layout[:2], strict=True)
    ]
    if any(gathers):
        # The backward pass gathers the codes again. No device keeps all of them.
        product = jax.checkpoint(product)
    return product(lhs, rhs)


def _axes_of(operand: jax.Array | QTensor) -> tuple:
    """The explicit mesh axes of each axis of an operand."""
    if isinstance(operand, QTensor):
        return mesh_axes(operand)
    return explicit_spec(operand)


def _multiply(
    plan: Plan,
    steps: tuple[Preparation, ...],
    lhs: Any,
    rhs: Any,
    *,
    dims: DimensionNumbers,
    summed: tuple[str, ...] = (),
) -> jax.Array:
    """Carries out a plan: first the preparations `steps`, then the product.

    Each call makes one preparation and calls itself with the other steps.

    Args:
      plan: the plan.
      steps: preparations that are not carried out yet.
      lhs: the left operand.
      rhs: the right operand.
      dims: dimension numbers of these operands.
      summed: the mesh axes over which products are summed, inside `jax.shard_map`.
        There are no preparations then.
    """
    if steps:
        step, *later = steps
        rest = tuple(later)
        if step == "dequantize_left":
            return _multiply_over_mesh(plan, rest, dequantize(lhs), rhs, dims)
        if step == "scale_left":
            lhs, rhs = scale_over_mesh(lhs, rhs, dims, swapped=False)
            return _multiply_over_mesh(plan, rest, lhs, rhs, dims)
        if step == "scale_right":
            rhs, lhs = scale_over_mesh(rhs, lhs, dims, swapped=True)
            return _multiply_over_mesh(plan, rest, lhs, rhs, dims)
        if step == "quantize_left":
            return _multiply_activation(plan, rest, lhs, rhs, dims, swapped=False)
        return _multiply_activation(plan, rest, rhs, lhs, dims, swapped=True)
    product = _multiply_codes if plan.path == "codes" else _multiply_weight
    if plan.swapped:
        y = product(plan, rhs, lhs, mirrored(dims), summed)
        return _with_sides_changed(y, rhs, mirrored(dims))
    return product(plan, lhs, rhs, dims, summed)


def _with_sides_changed(
    y: jax.Array, lhs: jax.Array | QTensor, dims: DimensionNumbers
) -> jax.Array:
    """`[b, free of lhs, free of rhs]` as `[b, free of rhs, free of lhs]`.

    Args:
      y: the product.
      lhs: the left operand of this product.
      dims: dimension numbers of this product.
    """
    num_batch = len(dims[1][0])
    num_free = lhs.ndim - len(dims[0][0]) - num_batch
    lhs_axes = range(num_batch, num_batch + num_free)
    return jnp.moveaxis(y, lhs_axes, range(y.ndim - num_free, y.ndim))


def _multiply_activation(
    plan: Plan,
    steps: tuple[Preparation, ...],
    x: jax.Array,
    weight: QTensor,
    dims: DimensionNumbers,
    *,
    swapped: bool,
) -> jax.Array:
    """Quantizes `x`, makes the preparations `steps` and multiplies by the weight.

    The outlier columns of `x` are multiplied in floats.
    """
    x_side = 1 if swapped else 0
    _, quantized_dims = batch_first(x.ndim, dims, x_side)
    if swapped:
        quantized_dims = mirrored(quantized_dims)  # the activation is on the left
    axes = activation_axes(x.ndim, dims, swapped=swapped)
    axes = dataclasses.replace(axes, mapped=plan.mapped)

    def codes_product(activation: QTensor, weight: QTensor) -> jax.Array:
        y = _multiply_over_mesh(plan, steps, activation, weight, quantized_dims)
        return _with_sides_changed(y, activation, quantized_dims) if swapped else y

    def float_product(x: jax.Array, weight: QTensor) -> jax.Array:
        sides = (weight, x) if swapped else (x, weight)
        float_plan = plan.outlier_product or plan_dot(*sides, dims)
        if plan.mapped:
            float_plan = dataclasses.replace(float_plan, mapped=plan.mapped)
        return _multiply_over_mesh(float_plan, float_plan.before, *sides, dims)

    if plan.outliers is None:
        return multiply_quantized(x, weight, axes, codes_product, float_product)
    bound = (*dims[0][x_side], *dims[1][x_side])
    free = [axis for axis in range(x.ndim) if axis not in bound]
    split = functools.partial(
        split_outlier_columns, threshold=plan.outliers, free_axes=free
    )
    x_spec = PartitionSpec(*explicit_spec(x))
    ordinary, outliers = call_on_auto_axes(split, (x_spec, x_spec), x)
    low = multiply_quantized(ordinary, weight, axes, codes_product, float_product)
    high = float_product(outliers, weight.with_activation(None))
    low_spec = PartitionSpec(*explicit_spec(low))
    return call_on_auto_axes(jnp.add, low_spec, low, high)


def _multiply_codes(
    plan: Plan,
    lhs: QTensor,
    rhs: QTensor,
    dims: DimensionNumbers,
    summed: tuple[str, ...],
) -> jax.Array:
    """`[b, free of lhs, free of rhs]`, float32, from the codes of both operands."""
    num_batch = len(dims[1][0])

    def multiply_rows(lhs: QTensor, rhs: QTensor) -> jax.Array:
        (lhs_rows, lhs_meta), (rhs_rows, rhs_meta) = weight_rows(lhs), weight_rows(rhs)
        if plan.result == "int32":
            # Integers are summed over devices without rounding, and then scaled.
            sums = _sums_of_codes(plan, lhs_rows, lhs_meta, rhs_rows, rhs_meta)
            return _scaled_sums(plan, lax.psum(sums, summed), lhs_rows, rhs_rows)
        if plan.x_dtype is None:
            y = kernels.call_codes(lhs_rows, lhs_meta, rhs_rows, rhs_meta)
            return _sum_over_devices(y, summed)
        x = lhs_rows.data
        if plan.x_dtype != "int8":
            codes = lax.bitcast_convert_type(x, jnp.dtype(lhs_meta.fmt.name))
            x = codes.astype(plan.x_dtype)
        call = kernels.Call(rhs_meta, (), plan.result)
        sums = _sum_over_devices(kernels.call_matmul(x, rhs_rows, call), summed)
        return sums * lhs_rows.scale.astype(jnp.float32)

    y = _over_batch(multiply_rows, num_batch)(lhs, rhs)  # [b, m, n]
    lhs_kept, rhs_kept = lhs.meta.geometry.kept, rhs.meta.geometry.kept
    sizes = [lhs.meta.geometry.shape[axis] for axis in lhs_kept]
    sizes += [rhs.meta.geometry.shape[axis] for axis in rhs_kept]
    y = _sort_last(y.reshape(*lhs.batch_shape, *sizes), rhs_kept)
    # The free axes of lhs are in storage order as well.
    middle = [num_batch + int(i) for i in np.argsort(lhs_kept)]
    last = range(num_batch + len(middle), y.ndim)
    return jnp.transpose(y, (*range(num_batch), *middle, *last))


def _sums_of_codes(
    plan: Plan,
    lhs: kernels.Rows,
    lhs_meta: kernels.RowMeta,
    rhs: kernels.Rows,
    rhs_meta: kernels.RowMeta,
) -> jax.Array:
    """int32 `[m, n]`, the products of codes without scales."""
    rhs = rhs._replace(scale=None)
    if plan.x_dtype is not None:
        return kernels.call_matmul(lhs.data, rhs, kernels.Call(rhs_meta, (), "int32"))
    return kernels.call_codes(lhs._replace(scale=None), lhs_meta, rhs, rhs_meta)


def _scaled_sums(
    plan: Plan, sums: jax.Array, lhs: kernels.Rows, rhs: kernels.Rows
) -> jax.Array:
    """The sums of codes times both scales, in the order in which one device scales."""
    lhs_scale = lhs.scale.astype(jnp.float32)  # [m or 1, 1]
    rhs_scale = rhs.scale.astype(jnp.float32).T  # [1, n or 1]
    if plan.x_dtype is not None:
        return sums.astype(jnp.float32) * rhs_scale * lhs_scale
    return sums.astype(jnp.float32) * (lhs_scale * rhs_scale)


def _sum_over_devices(y: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """The sum over mesh axes; `y` itself if there are none."""
    return lax.psum(y, names) if names else y


def _multiply_weight(
    plan: Plan,
    x: jax.Array,
    weight: QTensor,
    dims: DimensionNumbers,
    summed: tuple[str, ...],
) -> jax.Array:
    """`[b, free of x, free of weight]`: floats times a weight, summed in float32."""
    return _sum_over_devices(_multiply_floats(plan, x, weight, dims), summed)


def _multiply_floats(
    plan: Plan, x: jax.Array, weight: QTensor, dims: DimensionNumbers
) -> jax.Array:
    """The product of a device's parts, without the sum over devices."""
    x = x.astype(plan.x_dtype)
    if plan.path == "dequantize":
        product = functools.partial(
            lax.dot_general,
            dimension_numbers=dims,
            preferred_element_type=jnp.float32,
        )
        return multiply_decoded(product, x, weight)
    (x_axes, w_axes), (x_batch, w_batch) = dims
    geometry = weight.meta.geometry
    transposed = plan.path == "weight_only_transposed"
    along, out = geometry.contracted, geometry.kept
    if transposed:
        along, out = out, along
    x_axis_of = {
        w_axis - weight.ndim: x_axis
        for w_axis, x_axis in zip(w_axes, x_axes, strict=True)
    }

    def multiply_rows(x: jax.Array, weight: QTensor) -> jax.Array:
        rows, meta = weight_rows(weight)
        call = kernels.Call(meta, (), plan.result, transposed)
        return kernels.call_matmul(x, rows, call)

    x_rows, free = _to_rows(x, [x_axis_of[axis] for axis in along], x_batch)
    y = _over_batch(multiply_rows, len(w_batch))(x_rows, weight)  # [b, m, n]
    batch_sizes = x_rows.shape[: len(x_batch)]
    out_sizes = [geometry.shape[axis] for axis in out]
    return _sort_last(y.reshape(*batch_sizes, *free, *out_sizes), out)


def _over_batch(
    product: Callable[..., jax.Array], num_batch: int
) -> Callable[..., jax.Array]:
    """The product mapped over leading axes of both operands."""
    for _ in range(num_batch):
        product = jax.vmap(product)
    return product


def _to_rows(
    x: jax.Array, contracted: Sequence[int], batch: Sequence[int]
) -> tuple[jax.Array, list[int]]:
    """`x` as `[b, m, k]`, and the sizes of its free axes."""
    free = [a for a in range(x.ndim) if a not in contracted and a not in batch]
    x = jnp.transpose(x, (*batch, *free, *contracted))
    batch_sizes = x.shape[: len(batch)]
    free_sizes = list(x.shape[len(batch) : len(batch) + len(free)])
    k = math.prod(x.shape[len(batch) + len(free) :])
    return x.reshape(*batch_sizes, math.prod(free_sizes), k), free_sizes


def _sort_last(y: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Sorts the last axes of `y`, which are in the order `axes`, in ascending order."""
    first = y.ndim - len(axes)
    last = [first + int(i) for i in np.argsort(axes)]
    return jnp.transpose(y, (*range(first), *last))
