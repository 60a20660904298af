"""Which way a product is computed, and why: decided once, from static facts, for `dot_general` and `explain` alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import kernels
from jaxq.kernels import is_native_float, largest_exact_length
from jaxq.ops._rows import rows_of, why_not_rows
from jaxq.qtensor import QTensor, quantize

DimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]
Path = Literal["dense", "codes", "weight_only", "weight_only_transposed", "dequantize"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How `dot_general` computes one product.

    Attributes:
      path: "dense": no QTensor, plain XLA. "codes": codes meet codes, integers in int32 or float8 in float32.
        "weight_only": floats meet a weight decoded in blocks of rows. "weight_only_transposed": the same with a kept
        axis contracted. "dequantize": a whole operand is dequantized first.
      accumulate: dtype of the sums.
      swapped: the weight stands on the left.
      reason: why this path, in words.
      kernel: the Pallas kernel that runs it on `platform`: "tpu", "mosaic_gpu", "triton"; or "xla" where none does.
      why_no_kernel: the reason where none does.
      passed_over: kernels of the platform that were asked before the one that runs, with their reasons.
      platform: what the kernel was chosen for; None where nobody asked.
    """

    path: Path
    accumulate: str
    swapped: bool
    reason: str
    kernel: str = "xla"
    why_no_kernel: str | None = None
    passed_over: str = ""
    platform: str | None = None

    def __str__(self) -> str:
        side = ", weight on the left" if self.swapped else ""
        text = f"{self.path} (accumulates in {self.accumulate}{side}): {self.reason}"
        if self.platform not in kernels.KERNELS:
            return text
        if self.why_no_kernel is None:
            others = f" ({self.passed_over})" if self.passed_over else ""
            return (
                f"{text}; runs as the {self.kernel} kernel on {self.platform}{others}"
            )
        return f"{text}; in plain XLA on {self.platform}: {self.why_no_kernel}"


def make_plan(lhs: Any, rhs: Any, dims: DimensionNumbers) -> Plan:
    """The plan for `lax.dot_general(lhs, rhs, dims)` with a QTensor on either side, both, or none."""
    left, right = isinstance(lhs, QTensor), isinstance(rhs, QTensor)
    if not left and not right:
        return Plan(
            "dense", accumulate_dtype(lhs, rhs).name, False, "no operand is quantized"
        )
    if left and right:
        return _plan_both(lhs, rhs, dims)
    qt, (contracted, batch), swapped = (rhs, (dims[0][1], dims[1][1]), False) if right else (
        lhs, (dims[0][0], dims[1][0]), True
    )  # fmt: skip
    if qt.meta.activation is not None:
        return _plan_dynamic(rhs if swapped else lhs, qt, dims, swapped)
    problem = why_not_batch(qt, batch) or why_not_rows(qt)
    if problem:
        return Plan(
            "dequantize", "float32", swapped, f"the whole weight, because {problem}"
        )
    geometry = qt.meta.geometry
    axes = {a - qt.ndim if a >= 0 else a for a in contracted}
    if axes == set(geometry.contracted):
        return Plan(
            "weight_only",
            "float32",
            swapped,
            f"{qt.spec.fmt.name} codes are decoded in blocks of rows",
        )
    if axes == set(geometry.kept):
        return Plan(
            "weight_only_transposed",
            "float32",
            swapped,
            f"kept axes {sorted(axes)} are contracted: blocks of decoded rows are summed up",
        )
    return Plan(
        "dequantize",
        "float32",
        swapped,
        f"the whole weight, because axes {sorted(axes)} are contracted and its blocks run along "
        f"{list(geometry.contracted)}",
    )


def _plan_dynamic(x: Any, qt: QTensor, dims: DimensionNumbers, swapped: bool) -> Plan:
    spec, side = qt.meta.activation, 1 if swapped else 0
    assert spec is not None
    order, dims = batch_first(x.ndim, dims, side)
    shaped = jax.ShapeDtypeStruct(tuple(x.shape[a] for a in order), x.dtype)
    qx = jax.eval_shape(
        lambda v: quantize(
            v,
            spec,
            contracting=tuple(dims[0][side]),
            batch=tuple(dims[1][side]),
            name="activation",
        ),
        shaped,
    )
    weight = qt.with_activation(None)
    rest = make_plan(*((weight, qx) if swapped else (qx, weight)), dims)
    outliers = qt.meta.outliers
    kept = (
        ""
        if outliers is None
        else f", but for columns that reach {outliers:g}, which are multiplied in floats"
    )
    how = "on the fly" if qt.input_range is None else "by a range known beforehand"
    return dataclasses.replace(
        rest,
        reason=f"activations are quantized to {spec.fmt.name} {how}{kept}; {rest.reason}",
    )


def batch_first(
    ndim: int, dims: DimensionNumbers, side: int
) -> tuple[list[int], DimensionNumbers]:
    """Order of one operand's axes that brings the product's batch axes to the front, and the numbers of that product.

    The result stays what it is: its batch axes lead already, and free axes keep their order.
    """
    batch = [a % ndim for a in dims[1][side]]
    order = [*batch, *(a for a in range(ndim) if a not in batch)]
    contracted, leading = list(dims[0]), list(dims[1])
    contracted[side] = tuple(order.index(a % ndim) for a in contracted[side])
    leading[side] = tuple(range(len(batch)))
    return order, ((contracted[0], contracted[1]), (leading[0], leading[1]))


def _plan_both(lhs: QTensor, rhs: QTensor, dims: DimensionNumbers) -> Plan:
    problem = _why_not_codes(lhs, rhs, dims)
    if problem:
        rest = make_plan(_floats_like(lhs), rhs, dims)
        return dataclasses.replace(
            rest,
            reason=f"the left operand is dequantized, because {problem}; {rest.reason}",
        )
    if is_native_float(rhs.spec.fmt):
        return Plan(
            "codes",
            "float32",
            False,
            f"{lhs.spec.fmt.name} x {rhs.spec.fmt.name} products of codes",
        )
    chunk = largest_exact_length(
        rows_meta(lhs), lhs.zero_point is None, rows_meta(rhs), rhs.zero_point is None
    )
    parts = -(-rhs.meta.geometry.contracted_size // chunk)
    more = (
        f", in {parts} parts of at most {chunk} along k, which int32 holds"
        if parts > 1
        else ""
    )
    zero = (
        " with zero points"
        if lhs.zero_point is not None or rhs.zero_point is not None
        else ""
    )
    return Plan(
        "codes",
        "int32",
        False,
        f"{lhs.spec.fmt.name} x {rhs.spec.fmt.name} products of codes{zero}{more}",
    )


def _why_not_codes(lhs: QTensor, rhs: QTensor, dims: DimensionNumbers) -> str | None:
    for qt, contracted, batch in (
        (lhs, dims[0][0], dims[1][0]),
        (rhs, dims[0][1], dims[1][1]),
    ):
        problem = why_not_batch(qt, batch) or why_not_rows(qt)
        if problem:
            return problem
        order = [a - qt.ndim if a >= 0 else a for a in contracted]
        if set(order) != set(qt.meta.geometry.contracted):
            return f"axes {sorted(order)} of {qt!r} are contracted, not those its scales are shared along"
        if qt.offset is not None:
            return f"{qt!r} has a real offset"
        if qt.codebook is not None:
            return f"codes of {qt!r} stand for numbers of its own"
    ints = [qt.spec.fmt.kind == "integer" for qt in (lhs, rhs)]
    floats = [is_native_float(qt.spec.fmt) for qt in (lhs, rhs)]
    if not (all(ints) or all(floats)):
        return f"codes of {lhs.spec.fmt.name} and {rhs.spec.fmt.name} do not multiply natively"
    where = [
        {a - qt.ndim if a >= 0 else a: i for i, a in enumerate(axes)}
        for qt, axes in zip((lhs, rhs), dims[0], strict=True)
    ]
    if [where[0][a] for a in lhs.meta.geometry.contracted] != [
        where[1][a] for a in rhs.meta.geometry.contracted
    ]:
        return "their contracted axes are flattened in different orders"
    groups = [
        qt.meta.geometry.num_blocks[-1] if not qt.meta.geometry.flat else 0
        for qt in (lhs, rhs)
    ]
    sizes = [qt.meta.geometry.block_shape[-1] for qt in (lhs, rhs)]
    if 0 in groups or (
        1 not in groups and (groups[0] != groups[1] or sizes[0] != sizes[1])
    ):
        return f"their groups along k differ ({sizes[0]} and {sizes[1]})"
    return None


def why_not_batch(qt: QTensor, batch: Sequence[int]) -> str | None:
    """None if the dot's batch axes are the QTensor's own, else the reason."""
    axes = [a + qt.ndim if a < 0 else a for a in batch]
    if axes != list(range(len(qt.batch_shape))):
        return f"the product's batch axes {axes} are not its own leading {len(qt.batch_shape)}"
    return None


def rows_meta(qt: QTensor):
    """`RowMeta` of a QTensor, batch axes or not; nothing is computed."""
    one = jax.eval_shape(lambda q: q, qt)
    for _ in qt.batch_shape:
        one = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), one
        )
    found = []
    jax.eval_shape(lambda q: found.append(rows_of(q)[1]), one)
    return found[0]


def _floats_like(qt: QTensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(qt.shape, qt.dtype)


def accumulate_dtype(*operands: Any) -> np.dtype:
    """What sums of products of these operands are kept in: at least int32 or float32."""
    dtype = _promoted(operands)
    narrow = jnp.dtype(jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32)
    return dtype if dtype.itemsize >= 4 or dtype == jnp.bool else narrow


def result_dtype(*operands: Any) -> np.dtype:
    """What those sums are given back in if nobody says: what the operands promote to, if it has at least 16 bits."""
    dtype = _promoted(operands)
    return (
        dtype
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2
        else accumulate_dtype(*operands)
    )


def _promoted(operands: Sequence[Any]) -> np.dtype:
    dtypes = [jnp.dtype(v.dtype) for v in operands]
    return functools.reduce(
        lambda a, b: a if a == b else jnp.promote_types(a, b), dtypes
    )
