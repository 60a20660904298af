"""One matmul contract: `lax.dot_general` with arrays or QTensors on either side."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats, kernels, sharding
from jaxq.ops._plan import DimensionNumbers, Plan, batch_first, make_plan, result_dtype
from jaxq.ops._rows import rows_of
from jaxq.ops._straight_through import straight_through
from jaxq.qtensor import QTensor, dequantize, quantize

Operand = jax.typing.ArrayLike | QTensor


def dot_general(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`lax.dot_general`, where either operand may be a QTensor.

    Low-precision operands accumulate as matrix units do: integer codes in int32, everything else in float32; the
    result is rounded once. `explain` tells which path a product takes.

    Args:
      lhs: array or QTensor.
      rhs: array or QTensor.
      dimension_numbers: `((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))`.
      precision: passed on where both operands are arrays.
      preferred_element_type: dtype of the result, a float of at most 32 bits if an operand is quantized. None takes
        what the operands' dtypes promote to, but int32 for narrower integers and float32 for float8: those sums rarely
        fit.
      out_sharding: how the result lies over a mesh, a `NamedSharding` or `PartitionSpec`. Of arrays lax takes explicit
        axes alone; a product with a QTensor is resharded along those, and constrained along automatic ones.

    Returns:
      Array of batch axes, then free axes of lhs, then free axes of rhs.

    Raises:
      TypeError: sizes of contracted or batch axes differ, or axes repeat; integers or float64 meet a QTensor.
      NotImplementedError: `out_sharding` of a product with a QTensor names explicit and automatic axes at once.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.eye(32), "int4")
      >>> y = jaxq.dot_general(jnp.ones((2, 32)), qt, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
      >>> y.shape, y.dtype.name
      ((2, 32), 'float32')
    """
    lhs, rhs = as_operands(lhs, rhs)
    dims = _as_tuples(dimension_numbers)
    _check_sizes(lhs, rhs, dims)
    _check_floats(lhs, rhs)
    out_dtype = _result_dtype(lhs, rhs, preferred_element_type)
    if not isinstance(lhs, QTensor) and not isinstance(rhs, QTensor):
        return _dot_general(lhs, rhs, dims, out_dtype, precision, out_sharding)
    specs = (_spec_of(lhs), _spec_of(rhs))
    batch = [specs[0][a] for a in dims[1][0]]
    free = [
        s[a]
        for s, c, b in zip(specs, dims[0], dims[1], strict=True)
        for a in range(len(s))
        if a not in (*c, *b)
    ]
    product = functools.partial(_dot_general, dims=dims, out_dtype=out_dtype)
    return sharding.lay_out(
        sharding.over_explicit_axes(product, (*batch, *free), lhs, rhs), out_sharding
    )


def _spec_of(x: jax.Array | QTensor) -> tuple:
    """The mesh axes that each axis of an operand lies over, where its type says so; none for contracted codes."""
    if not isinstance(x, QTensor):
        return sharding.spec_of(x)
    num_batch, geometry = len(x.batch_shape), x.meta.geometry
    stored, out = sharding.spec_of(x.data), [None] * x.ndim
    out[:num_batch] = stored[:num_batch]
    if not geometry.flat:
        first = num_batch + (x.meta.layout == "columns")
        for i, axis in enumerate(geometry.kept):
            out[x.ndim + axis] = stored[first + i]
    return tuple(out)


def _dot_general(
    lhs: jax.Array | QTensor,
    rhs: jax.Array | QTensor,
    dims: DimensionNumbers,
    out_dtype: Any,
    precision: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    plan = make_plan(lhs, rhs, dims)
    if (
        isinstance(rhs, QTensor)
        and rhs.meta.activation is not None
        and not isinstance(lhs, QTensor)
    ):
        return _dynamic(lhs, rhs, dims, False).astype(out_dtype)
    if (
        isinstance(lhs, QTensor)
        and lhs.meta.activation is not None
        and not isinstance(rhs, QTensor)
    ):
        return _dynamic(rhs, lhs, dims, True).astype(out_dtype)
    if not isinstance(lhs, QTensor) and not isinstance(rhs, QTensor):
        wide = jnp.dtype(plan.accumulate)
        y = lax.dot_general(
            lhs,
            rhs,
            dims,
            precision=precision,
            preferred_element_type=wide,
            out_sharding=out_sharding,
        )
    elif isinstance(lhs, QTensor) and isinstance(rhs, QTensor):
        y = _codes(lhs, rhs, dims) if plan.path == "codes" else dot_general(
            dequantize(lhs), rhs, dims, preferred_element_type=jnp.float32
        )  # fmt: skip
    elif isinstance(lhs, QTensor):
        assert not isinstance(rhs, QTensor)
        mirrored = ((dims[0][1], dims[0][0]), (dims[1][1], dims[1][0]))
        y = _float_by_weight(rhs, lhs, mirrored, plan, out_dtype)
        num_batch, num_x = len(dims[1][0]), rhs.ndim - len(dims[0][1]) - len(dims[1][1])
        # Computed as [batch, x's free axes, weight's free axes]; asked for the other way round.
        y = jnp.moveaxis(
            y, range(num_batch, num_batch + num_x), range(y.ndim - num_x, y.ndim)
        )
    else:
        assert isinstance(rhs, QTensor)
        y = _float_by_weight(lhs, rhs, dims, plan, out_dtype)
    return y.astype(out_dtype)


def explain(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers | None = None,
    *,
    platform: str | None = None,
) -> Plan:
    """Which path `dot_general` takes for these operands, which kernel runs it, and why; nothing is computed.

    A kernel runs on one device. Where an operand lies on several, a program under plain `jax.jit` is partitioned by
    XLA and takes the XLA form; inside `jax.shard_map` each device runs the kernel.

    Args:
      lhs: array, `jax.ShapeDtypeStruct` or QTensor.
      rhs: the same.
      dimension_numbers: None takes those of `matmul`.
      platform: "cpu", "tpu", "cuda"; None takes the one jax runs on.

    Returns:
      A `Plan`; print it.

    Raises:
      ValueError: an unknown platform, or sizes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> x, qt = jnp.ones((2, 32)), jaxq.quantize(jnp.eye(32), "nf4")
      >>> print(jaxq.explain(x, qt, platform="cpu"))
      weight_only (accumulates in float32): nf4 codes are decoded in blocks of rows
      >>> jaxq.explain(x, jaxq.relayout(qt, "columns"), platform="tpu").kernel
      'tpu'
    """
    lhs, rhs = (v if hasattr(v, "ndim") else jnp.asarray(v) for v in (lhs, rhs))
    if dimension_numbers is None:
        lhs, rhs, dims = align_matmul(lhs, rhs)
    else:
        dims = _as_tuples(dimension_numbers)
    _check_sizes(lhs, rhs, dims)
    plan = make_plan(lhs, rhs, dims)
    if platform is None:
        platform = jax.default_backend()
    else:
        formats.check_choice(
            "explain: platform", platform, ("cpu", "cuda", "gpu", "rocm", "tpu")
        )
    platform = {"gpu": "cuda"}.get(platform, platform)
    choice = _choose_kernel(lhs, rhs, dims, platform)
    return dataclasses.replace(
        plan,
        kernel=choice.backend,
        why_no_kernel=choice.reason,
        passed_over=choice.passed_over,
        platform=platform,
    )


def _choose_kernel(
    lhs: Any, rhs: Any, dims: DimensionNumbers, platform: str
) -> kernels.Choice:
    """The kernel of the first product that has one, or the reason of the last."""
    if platform not in kernels.KERNELS:
        return kernels.Choice("xla", f"there are no kernels for {platform}")
    traced = jax.make_jaxpr(
        lambda lhs, rhs: dot_general(lhs, rhs, dims, preferred_element_type=jnp.float32)
    )
    shaped = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (lhs, rhs)
    )
    shardings: list[Any] = [
        getattr(leaf, "sharding", None) for leaf in jax.tree.leaves((lhs, rhs))
    ]
    num_devices = max(
        [1, *(len(s.device_set) for s in shardings if hasattr(s, "device_set"))]
    )
    choice = kernels.Choice(
        "xla",
        "kernels multiply floats, or int8 of one scale a row, by a weight; this is neither",
    )
    for call, x, leaves in kernels.calls(traced(*shaped).jaxpr):
        found = kernels.problem_of(call, x, leaves)
        choice = kernels.choose(
            found, platform, kernels.device_kind(platform), num_devices
        )
        if choice.reason is None:
            break
    return choice


def as_operands(
    *operands: Operand, caller: str = "dot_general"
) -> tuple[jax.Array | QTensor, ...]:
    """QTensors as they are, also inside Flax variables; anything else as jax arrays.

    Raises:
      TypeError: a numpy array that would lose its dtype on the way meets a QTensor.
    """
    held = [getattr(x, "get_value", None) for x in operands]
    values = [
        x if get is None else get() for x, get in zip(operands, held, strict=True)
    ]
    quantized = next((x for x in values if isinstance(x, QTensor)), None)
    for x in values:
        if (
            quantized is not None
            and isinstance(x, np.ndarray)
            and jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
        ):
            _check_floats(x, quantized, caller)
    return tuple(x if isinstance(x, QTensor) else jnp.asarray(x) for x in values)


def align_matmul(lhs: Any, rhs: Any) -> tuple[Any, Any, DimensionNumbers]:
    """The operands of `lhs @ rhs` and its dimension numbers.

    Leading axes are matched from the right, as numpy does. Where a QTensor has more of them, the array is broadcast.
    """
    for operand in (lhs, rhs):
        if operand.ndim == 0:
            raise ValueError(
                "matmul: operands must have at least one axis; use * for scalars."
            )
    if isinstance(rhs, QTensor) and rhs.ndim > max(lhs.ndim, 2):
        lhs = _broadcast(lhs, rhs.shape[:-2])
    if isinstance(lhs, QTensor) and lhs.ndim > max(rhs.ndim, 2):
        rhs = _broadcast(rhs, lhs.shape[:-2])
    shared = max(0, min(lhs.ndim, rhs.ndim) - 2)
    batch = [
        tuple(range(v.ndim - 2 - shared, v.ndim - 2)) if shared else ()
        for v in (lhs, rhs)
    ]
    return lhs, rhs, (((lhs.ndim - 1,), (max(rhs.ndim - 2, 0),)), (batch[0], batch[1]))


def _broadcast(x: Any, leading: tuple[int, ...]) -> Any:
    if isinstance(x, QTensor):
        raise ValueError(
            f"matmul: {x!r} cannot be broadcast to leading axes {list(leading)}."
        )
    shape = (*leading, *x.shape[max(x.ndim - 2, 0) :])
    if x.ndim == 1:
        raise ValueError(
            f"matmul: a row meets leading axes {list(leading)}; give it two axes, x[None]."
        )
    return (
        jax.ShapeDtypeStruct(shape, x.dtype)
        if isinstance(x, jax.ShapeDtypeStruct)
        else jnp.broadcast_to(x, shape)
    )


def _float_by_weight(
    x: jax.Array, qt: QTensor, dims: DimensionNumbers, plan: Plan, out_dtype: np.dtype
) -> jax.Array:
    """`[batch, free axes of x, free axes of the weight]`, summed in float32."""
    # Numbers of the weight must not be rounded, or overflow, on their way into a narrower x.
    narrow = x.dtype == qt.dtype and x.dtype in (jnp.bfloat16, jnp.float16)
    x = x if narrow else x.astype(jnp.float32)
    if plan.path == "dequantize":
        w = dequantize(qt, dtype=x.dtype)
        return lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)
    (x_axes, w_axes), (x_batch, w_batch) = dims
    named = {
        a - qt.ndim if a >= 0 else a: b for a, b in zip(w_axes, x_axes, strict=True)
    }
    geometry = qt.meta.geometry
    transposed = plan.path == "weight_only_transposed"
    along, out = (
        (geometry.kept, geometry.contracted)
        if transposed
        else (geometry.contracted, geometry.kept)
    )
    sums = out_dtype.name if out_dtype.name in ("bfloat16", "float16") else "float32"

    def one(x: jax.Array, qt: QTensor) -> jax.Array:
        rows, meta = rows_of(qt)
        return kernels.call_matmul(x, rows, kernels.Call(meta, (), sums, transposed))

    x_rows, free = _to_rows(x, [named[a] for a in along], x_batch)
    y = _over_batch(one, len(w_batch))(x_rows, qt)
    y = y.reshape(
        *x_rows.shape[: len(x_batch)], *free, *(geometry.shape[a] for a in out)
    )
    return _sort_last(y, out)


def _dynamic(
    x: jax.Array, qt: QTensor, dims: DimensionNumbers, swapped: bool
) -> jax.Array:
    """The product with x quantized on the fly, columns of outliers left out and multiplied in floats; float32."""
    threshold = qt.meta.outliers
    if threshold is None:
        return cast(jax.Array, _quantized(x, qt, dims, swapped))
    qt = qt.with_activation(qt.meta.activation)
    side = 1 if swapped else 0
    free = tuple(a for a in range(x.ndim) if a not in (*dims[0][side], *dims[1][side]))
    magnitude = jnp.max(jnp.abs(x), axis=free, keepdims=True, initial=0.0)
    ordinary = magnitude < threshold  # NaN is an outlier
    low = cast(
        jax.Array,
        _quantized(jnp.where(ordinary, x, jnp.zeros((), x.dtype)), qt, dims, swapped),
    )
    high = jnp.where(ordinary, jnp.zeros((), x.dtype), x)
    return low + _in_floats(high, qt.with_activation(None), dims, swapped)


def _in_floats(
    x: jax.Array, qt: QTensor, dims: DimensionNumbers, swapped: bool
) -> jax.Array:
    lhs, rhs = (qt, x) if swapped else (x, qt)
    return dot_general(lhs, rhs, dims, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _quantized(
    x: jax.Array, qt: QTensor, dims: DimensionNumbers, swapped: bool
) -> jax.Array:
    """The product with x quantized as `qt.meta.activation` says; float32. Backward, x passes straight through."""
    assert qt.meta.activation is not None
    side = 1 if swapped else 0
    bounds = (
        None if qt.input_range is None else _ends(qt.input_range, dims[1][1 - side])
    )
    order, dims = batch_first(x.ndim, dims, side)
    qx = quantize(
        jnp.transpose(x, order),
        qt.meta.activation,
        contracting=tuple(dims[0][side]),
        batch=tuple(dims[1][side]),
        on_nonfinite="propagate",
        bounds=bounds,
        name="activation",
    )
    weight = qt.with_activation(None)
    lhs, rhs = (weight, qx) if swapped else (qx, weight)
    return dot_general(lhs, rhs, dims, preferred_element_type=jnp.float32)


def _ends(input_range: jax.Array, batch: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """(low, high), each `[*batch]` in the order of the product's batch axes; `[]` where all share one range."""
    if (
        input_range.ndim == 1
    ):  # a weight whose batch axes do not lead has no stacked ranges
        return input_range[0], input_range[1]
    ordered = jnp.transpose(input_range, (*batch, len(batch)))
    return ordered[..., 0], ordered[..., 1]


def _quantized_forward(x, qt, dims, swapped):
    return _quantized(x, qt, dims, swapped), (x, qt)


def _quantized_backward(dims, swapped, saved, dy):
    x, qt = saved
    _, pull = jax.vjp(
        lambda x, qt: _in_floats(x, qt, dims, swapped), x, qt.with_activation(None)
    )
    dx, dqt = pull(dy)
    ends = None
    if qt.input_range is not None:
        batch = [a % x.ndim for a in dims[1][1 if swapped else 0]]
        low, high = _ends(qt.input_range, dims[1][0 if swapped else 1])
        ends = _over_axes(low, batch, x.ndim), _over_axes(high, batch, x.ndim)
    return straight_through(dx, dqt, x, qt, ends)


def _over_axes(values: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """`[*axes in any order]` as an array of `ndim` axes that broadcasts; a number as it is."""
    if not values.ndim:
        return values
    values = jnp.transpose(values, np.argsort(axes).tolist())
    return values.reshape(
        [values.shape[sorted(axes).index(i)] if i in axes else 1 for i in range(ndim)]
    )


_quantized.defvjp(_quantized_forward, _quantized_backward)


def _codes(lhs: QTensor, rhs: QTensor, dims: DimensionNumbers) -> jax.Array:
    def one(lhs: QTensor, rhs: QTensor) -> jax.Array:
        (a, a_meta), (b, b_meta) = rows_of(lhs), rows_of(rhs)
        if (
            a_meta.fmt.name == "int8"
            and a.zero_point is None
            and a.scale.shape[-1] == 1
        ):
            # Plain int8 rows, as activations are: their scale joins the result, so that kernels see integers alone.
            return kernels.call_matmul(
                a.data, b, kernels.Call(b_meta, (), "float32")
            ) * a.scale.astype(jnp.float32)
        return kernels.codes_matmul(a, a_meta, b, b_meta)

    y = _over_batch(one, len(dims[1][0]))(lhs, rhs)
    free = [qt.meta.geometry.kept for qt in (lhs, rhs)]
    sizes = [
        qt.meta.geometry.shape[a]
        for qt, axes in zip((lhs, rhs), free, strict=True)
        for a in axes
    ]
    y = _sort_last(y.reshape(*lhs.batch_shape, *sizes), free[1])
    first = len(lhs.batch_shape)
    middle = [first + int(i) for i in np.argsort(free[0])]
    return jnp.transpose(
        y, (*range(first), *middle, *range(first + len(middle), y.ndim))
    )


def _over_batch(one, num_batch: int):
    for _ in range(num_batch):
        one = jax.vmap(one)
    return one


def _to_rows(
    x: jax.Array, contracted: list[int], batch: Sequence[int]
) -> tuple[jax.Array, list[int]]:
    """`[*batch, free..., contracted...]` with both runs flattened, and the sizes of the free axes."""
    contracted = [a % x.ndim for a in contracted]
    batch = [a % x.ndim for a in batch]
    free = [a for a in range(x.ndim) if a not in contracted and a not in batch]
    x = jnp.transpose(x, (*batch, *free, *contracted))
    sizes = list(x.shape[len(batch) : len(batch) + len(free)])
    k = math.prod(x.shape[len(batch) + len(free) :])
    return x.reshape(*x.shape[: len(batch)], math.prod(sizes), k), sizes


def _sort_last(y: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The last axes of y stand in the order `axes` names them; brings them into ascending order."""
    first = y.ndim - len(axes)
    return jnp.transpose(
        y, (*range(first), *(first + int(i) for i in np.argsort(axes)))
    )


def _result_dtype(lhs: Any, rhs: Any, preferred: Any) -> np.dtype:
    """`preferred` if it can be had, else `result_dtype`."""
    quantized = isinstance(lhs, QTensor) or isinstance(rhs, QTensor)
    if preferred is not None:
        dtype = jnp.dtype(preferred)
        if quantized and (
            not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 4
        ):
            raise TypeError(
                f"dot_general: products with scales are float32 sums; preferred_element_type must be float32 or a "
                f"narrower float, got {dtype}."
            )
        return dtype
    return result_dtype(lhs, rhs)


def _as_tuples(dims: DimensionNumbers) -> DimensionNumbers:
    try:
        (a, b), (c, d) = dims
        return (tuple(a), tuple(b)), (tuple(c), tuple(d))
    except (TypeError, ValueError) as error:
        raise TypeError(
            "dot_general: dimension_numbers must be ((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch)), "
            f"got {dims!r}."
        ) from error


def _check_sizes(lhs: Any, rhs: Any, dims: DimensionNumbers) -> None:
    shapes = (lhs.shape, rhs.shape)
    for side, shape in enumerate(shapes):
        axes = [*dims[0][side], *dims[1][side]]
        if len({a % max(len(shape), 1) for a in axes}) != len(axes) or any(
            not -len(shape) <= a < len(shape) for a in axes
        ):
            raise TypeError(
                f"dot_general: contracting and batch axes {axes} must be distinct axes of the "
                f"{('left', 'right')[side]} operand, {list(shape)}."
            )
    for kind, (a, b) in zip(("contracting", "batch"), dims, strict=True):
        if [shapes[0][i] for i in a] != [shapes[1][i] for i in b]:
            raise TypeError(
                f"dot_general: {kind} axes {list(a)} of {list(shapes[0])} and {list(b)} of {list(shapes[1])} "
                "differ in size."
            )


def _check_floats(lhs: Any, rhs: Any, caller: str = "dot_general") -> None:
    for x, other in ((lhs, rhs), (rhs, lhs)):
        if (
            isinstance(other, QTensor)
            and not isinstance(x, QTensor)
            and not jnp.issubdtype(x.dtype, jnp.floating)
        ):
            raise TypeError(
                f"{caller}: {x.dtype.name}{list(x.shape)} meets {other!r}. "
                "Pass floats, or quantize this operand as well."
            )
        if isinstance(other, QTensor) and x.dtype == jnp.float64:
            raise TypeError(
                f"{caller}: {x.dtype.name}{list(x.shape)} meets {other!r}, and products with it are float32 sums. "
                "Pass x.astype(jnp.float32)."
            )
