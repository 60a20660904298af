"""The static facts of one product, as the primitive carries them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq import formats
from jaxq.kernels._codes import is_float8, largest_exact_length
from jaxq.kernels._problem import Problem, why_not_static
from jaxq.kernels._rows import (
    RowMeta,
    Rows,
    group_size,
    int8_meta,
    leaf_names,
    num_groups,
    rows_of_leaves,
)


@dataclasses.dataclass(frozen=True)
class Call:
    """Static facts of one product `x @ decode(rows).T`.

    Attributes:
      meta: static facts of the rows.
      leaves: names of the fields of `Rows` that are not None, in the order in which the
        primitive gets them. If the last name is "index", `data` is a stack of any
        number of matrices. Product e then reads matrix `index[e]`, int32 `[e]`.
      out_dtype: dtype of the result.
      transposed: True for `x @ decode(rows)`.
      backend: "auto", "xla" or the name of a kernel.
      interpret: True to run the kernel's interpreter, on any platform.
      backward: True if the product is part of a derivative. Such a product gives no
        `FallbackWarning`.
    """

    meta: RowMeta
    leaves: tuple[str, ...]
    out_dtype: str
    transposed: bool = False
    backend: str = "auto"
    interpret: bool = False
    backward: bool = False

    def rows(self, leaves: Sequence[Any]) -> Rows:
        """Returns the `Rows` of these leaves. Fields without a leaf are None."""
        num_leaves = len(self.leaves) - self.has_index
        return rows_of_leaves(self.leaves[:num_leaves], leaves[:num_leaves])

    def index(self, leaves: Sequence[Any]) -> Any:
        """Returns the leaf "index", or None if there is none."""
        return leaves[-1] if self.has_index else None

    @property
    def has_index(self) -> bool:
        """True if an index chooses matrices out of a stack."""
        return self.leaves[-1:] == ("index",)


def with_leaves(call: Call, rows: Rows) -> tuple[Call, list[Any]]:
    """Returns the call with the names of its leaves filled in, and the leaves."""
    leaves = [leaf for leaf in rows if leaf is not None]
    return dataclasses.replace(call, leaves=leaf_names(rows)), leaves


def with_index(
    call: Call, leaves: Sequence[Any], stack: jax.Array, index: jax.Array
) -> tuple[Call, list[Any]]:
    """Returns the same product, which reads its codes out of a stack.

    Args:
      call: static facts of the product, without an index.
      leaves: arrays of the rows in the order of `call.leaves`. The codes among them are
        not used.
      stack: codes of any number of matrices.
      index: int32 `[e]`, the matrix of each product.
    """
    names = (*call.leaves, "index")
    operands = dict(zip(names, (*leaves, index), strict=True)) | {"data": stack}
    return dataclasses.replace(call, leaves=names), list(operands.values())


def without_index(call: Call, leaves: Sequence[Any]) -> tuple[Call, list[Any]]:
    """The inverse of `with_index`. It copies the matrices out of the stack."""
    if not call.has_index:
        return call, list(leaves)
    *names, _ = call.leaves
    *arrays, index = leaves
    operands = dict(zip(names, arrays, strict=True))
    if index.shape == (1,):
        data = jax.lax.dynamic_slice_in_dim(operands["data"], index[0], 1)
    else:
        data = jnp.take(operands["data"], index, axis=0, mode="clip")
    operands["data"] = data
    return dataclasses.replace(call, leaves=tuple(names)), list(operands.values())


def float_leaves(call: Call) -> list[str]:
    """Returns the names of the leaves that have derivatives."""
    return [name for name in call.leaves if name in ("scale", "offset", "codebook")]


def problem_of(call: Call, x: Any, leaves: Sequence[Any]) -> Problem | str:
    """Returns the product as kernels see it, or the reason why no kernel computes it.

    Only shapes and dtypes are read, so the arguments may be abstract values.

    Args:
      call: static facts of the product.
      x: `[e, m, k]`, or `[e, m, n]` if `call.transposed`.
      leaves: arrays of the rows in the order of `call.leaves`, each with a leading axis
        e.
    """
    reason = _why_no_problem(call, x, leaves)
    if reason is not None:
        return reason
    meta, rows = call.meta, call.rows(leaves)
    integer = meta.fmt.kind == "integer"
    return Problem(
        e=x.shape[0],
        m=x.shape[1],
        k=meta.padded_k,
        n=rows.data.shape[1 if meta.layout == "rows" else 2],
        bits=meta.fmt.bits,
        signed=integer and meta.fmt.code_dtype.name == "int8",
        codebook=not integer,
        group=group_size(meta, num_groups(rows)),
        zero_point=rows.zero_point is not None,
        layout=meta.layout,
        x_dtype="bfloat16" if is_float8(x.dtype) else x.dtype.name,
        scale_dtype=None if rows.scale is None else rows.scale.dtype.name,
        out_dtype=call.out_dtype,
        unit=_halves_unit(meta),
        transposed=call.transposed,
        x_codes=x.dtype.name if is_float8(x.dtype) else None,
        stack=rows.data.shape[0] if call.has_index else None,
    )


def _halves_unit(meta: RowMeta) -> int | None:
    """Number of codes in a HALVES unit, or None for other packings.

    It is also None for units that fill no whole words. Then kernels get x in the order
    of the codes in memory.
    """
    unit = meta.unit or meta.padded_k
    is_halves = meta.packing is formats.Packing.HALVES
    return unit if is_halves and unit % 32 == 0 else None


def _why_no_problem(call: Call, x: Any, leaves: Sequence[Any]) -> str | None:
    """Returns why no kernel computes the product, or None if `Problem` describes it."""
    symbolic = why_not_static(x, *leaves)
    if symbolic is not None:
        return symbolic
    meta, rows, name = call.meta, call.rows(leaves), call.meta.fmt.name
    is_codes = is_float8(x.dtype) or not jnp.issubdtype(x.dtype, jnp.floating)
    if call.transposed and is_codes:
        return f"kept axes of the weight are contracted with {x.dtype.name} activations"
    if rows.offset is not None:
        return "the weight has real offsets"
    if meta.fmt.bits not in (4, 8):
        return f"{name} has {meta.fmt.bits} bits, and kernels take 4 and 8 bits"
    integer = meta.fmt.kind == "integer"
    if x.dtype.name == "int8" and integer:
        reason = _why_no_int32_sum(meta, rows)
        if reason is not None:
            return reason
    if meta.fmt.bits == 8 and not integer:
        return f"kernels take 8-bit codes only of integer formats, not of {name}"
    if rows.codebook is not None and rows.codebook.shape[1:3] != (1, 1):
        return "the weight has several codebooks"
    if meta.packing is formats.Packing.HALVES and num_groups(rows) > 1:
        # `pallas_form` moves columns inside a unit. Each unit needs one scale.
        group, unit = group_size(meta, num_groups(rows)), meta.unit
        if unit is None or group % unit:
            return (
                f"codes are packed in units of {unit or meta.padded_k}, and each group "
                f"of {group} codes has its own scale; a unit must have one scale"
            )
    if is_codes and not integer:
        return f"{x.dtype.name} activations cannot be multiplied with {name} codes"
    return None


def _why_no_int32_sum(meta: RowMeta, rows: Rows) -> str | None:
    """Returns why sums with int8 x can overflow int32, or None if they cannot."""
    longest = largest_exact_length(
        int8_meta(meta.k), True, meta, rows.zero_point is None
    )
    length = group_size(meta, max(num_groups(rows), 1))
    if length <= longest:
        return None
    return (
        f"int32 can sum {longest} products of {meta.fmt.name} codes and int8 x without "
        f"overflow, and a sum has {length}"
    )
