"""The product with a quantized matrix, for callers with their own codes and scales."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.kernels._call import Call, problem_of, with_leaves
from jaxq.kernels._codes import largest_exact_length
from jaxq.kernels._devices import device_kind
from jaxq.kernels._dispatch import bypasses_primitive
from jaxq.kernels._forms import interpreted
from jaxq.kernels._primitive import call_matmul
from jaxq.kernels._registry import KERNEL_NAMES, kernel_module, platform_of
from jaxq.kernels._rows import RowMeta, Rows, int8_meta

_BACKENDS = ("auto", "xla", *KERNEL_NAMES)
_LAYOUTS = ("rows", "columns")
_FLOATS = ("bfloat16", "float16", "float32")


def quantized_matmul(
    x: jax.Array,
    data: jax.Array,
    scale: jax.Array | None,
    *,
    format: str | formats.Format = "int4",
    zero_point: jax.Array | None = None,
    codebook: jax.Array | None = None,
    packing: str | formats.Packing | None = None,
    layout: str = "rows",
    group_size: int | None = None,
    out_dtype: Any = None,
    backend: str = "auto",
    interpret: bool = False,
) -> jax.Array:
    """Computes `x @ (scale * (codes - zero_point)).T`, and decodes one block at a time.

    The platform that a program is lowered for decides what runs. A Pallas kernel runs
    if the platform has one for this product. Otherwise the XLA form runs, also in a
    program that XLA partitions over several devices. Sums are float32, or int32 if x is
    int8. The product has derivatives for x, scale and codebook.

    Args:
      x: `[..., k]` bfloat16, float16, float32 or int8. The caller multiplies the result
        with the scale of an int8 x.
      data: codes `[n, k * bits / 8]`, or `[k * bits / 8, n]` with `layout="columns"`.
        Packed codes are uint8. A stack of matrices has one more axis in front, and x
        then has the same leading axis.
      scale: bfloat16, float16 or float32 `[n, g]`: one number for each group of
        neighbouring codes of a row. None gives the sums of `x * codes`. It needs int8
        x.
      format: format of the codes. Kernels take integers of 4 and 8 bits and every
        format of 4 bits.
      zero_point: integers `[n, g]` in the code dtype of an asymmetric integer format,
        or None.
      codebook: bfloat16, float16 or float32 `[num_codes]`, in the order of the codes.
        It replaces the numbers of a codebook format. None means the numbers of the
        format.
      packing: order of codes in bytes, a `jaxq.formats.Packing` or its value. None
        means the default of the format: HALVES for 4 bits. A HALVES unit is a group, or
        a row if there is one group. A last group that is not full is a shorter unit.
      layout: order of the codes in memory. All kernels take "rows". The TPU kernel also
        takes "columns", and decodes them faster.
      group_size: number of codes of a group. The last group may have fewer codes. None
        means that the codes of a row are cut into g equal groups, whose size must be a
        power of two if g > 1. Codes beyond k are then padding.
      out_dtype: dtype of the result. None means the dtype of x. For int8 x it means
        float32, or int32 without a scale.
      backend: "auto", "xla", or the name of a kernel: "tpu", "mosaic_gpu", "triton",
        "triton_int8".
      interpret: True runs the interpreter of the kernel that `backend` names. It is
        slow, runs on any platform, and is meant for tests. The interpreter of
        "mosaic_gpu" has no derivatives.

    Returns:
      `[..., n]`.

    Raises:
      TypeError: An argument has a dtype that is not listed above, data is not in the
        dtype of packed or unpacked codes, or `out_dtype` is int32 with a scale.
      ValueError: Shapes do not match, the sums of codes can overflow int32, or
        `backend` names a kernel that cannot compute this product.
      ValueError: `backend` names a kernel of another platform than the one that the
        program is lowered for. This error is raised at lowering.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.eye(64), "int4")
      >>> x = jnp.ones((2, 64))
      >>> y = jaxq.kernels.quantized_matmul(x, qt.data, qt.scale, format="int4")
      >>> y.shape
      (2, 64)
    """
    fmt = formats.get(format) if isinstance(format, str) else format
    packing = _checked_options(fmt, packing, layout, backend, interpret)
    operands = _Operands(
        x, data, scale, zero_point, codebook, fmt, packing, layout, group_size
    )
    _check_dtypes(operands)
    _check_stack(operands)
    _check_leaves(operands)
    _check_lengths(operands)
    dtype = _result_dtype(operands, out_dtype)
    meta, rows = _row_meta(operands), _as_rows(operands)
    if scale is None:
        _check_int32_sums(operands, meta)
    stack, n, k = operands.stack, operands.n, operands.k
    matrices = x.reshape(*stack, math.prod(x.shape[len(stack) : -1]), k)
    if 0 in (*stack, n, matrices.shape[-2]):
        return jnp.zeros((*x.shape[:-1], n), dtype)
    call = Call(meta, (), dtype.name, backend=backend, interpret=interpret)
    if backend in KERNEL_NAMES:
        _check_kernel(operands, call, matrices, rows)
    matmul = interpreted if bypasses_primitive(call) else call_matmul
    return matmul(matrices, rows, call).reshape(*x.shape[:-1], n)


@dataclasses.dataclass(frozen=True)
class _Operands:
    """The arguments of `quantized_matmul` that define the product."""

    x: jax.Array
    data: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None
    codebook: jax.Array | None
    fmt: formats.Format
    packing: formats.Packing
    layout: str
    group_size: int | None

    @property
    def stack(self) -> tuple[int, ...]:
        """`(e,)` for a stack of e matrices, `()` for one matrix."""
        return self.data.shape[:-2]

    @property
    def n(self) -> int:
        return self.data.shape[-2 if self.layout == "rows" else -1]

    @property
    def k(self) -> int:
        return self.x.shape[-1]

    @property
    def padded_k(self) -> int:
        """Number of codes that `data` stores for each row."""
        stored = self.data.shape[-1 if self.layout == "rows" else -2]
        if self.packing is formats.Packing.NONE:
            return stored
        return stored * 8 // self.fmt.bits

    @property
    def groups(self) -> int:
        """Number of groups of a row. It is 1 if scale is None or lacks an axis."""
        if self.scale is None or self.scale.ndim != self.data.ndim:
            return 1
        return self.scale.shape[-1]

    @property
    def group(self) -> int:
        """Number of codes of a group. It is 0 if scale has no entries."""
        if self.group_size is not None and self.groups > 1:
            return self.group_size
        return self.padded_k // self.groups if self.groups else 0

    def error(self, kind: type[Exception], problem: str, remedy: str) -> Exception:
        """An exception that names the problem, all arrays, and the remedy."""
        arrays = {
            "x": self.x,
            "data": self.data,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "codebook": self.codebook,
        }
        shown = [
            f"{name}: {array.dtype.name}{_shape_text(array.shape)}"
            for name, array in arrays.items()
            if array is not None
        ]
        return kind(f"quantized_matmul: {problem} ({', '.join(shown)}). {remedy}")


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _checked_options(
    fmt: formats.Format,
    packing: str | formats.Packing | None,
    layout: str,
    backend: str,
    interpret: bool,
) -> formats.Packing:
    """Checks `packing`, `layout`, `backend` and `interpret`. Returns the packing."""
    formats.check_choice("quantized_matmul: backend", backend, _BACKENDS)
    formats.check_choice("quantized_matmul: layout", layout, _LAYOUTS)
    if isinstance(packing, str):
        values = [member.value for member in formats.Packing]
        formats.check_choice("quantized_matmul: packing", packing, values)
    if interpret and backend not in KERNEL_NAMES:
        raise ValueError(
            "quantized_matmul: interpret=True needs a kernel's name as backend=, got "
            f"{backend!r}. Use one of {', '.join(KERNEL_NAMES)}."
        )
    if packing is None:
        return formats.default_packing(fmt.bits)
    return formats.Packing(packing)


def _check_dtypes(operands: _Operands) -> None:
    """Checks the dtypes of x, scale, data and zero_point."""
    o, fmt = operands, operands.fmt
    if o.x.dtype.name not in (*_FLOATS, "int8"):
        raise o.error(
            TypeError,
            "x must be bfloat16, float16, float32 or int8",
            "Convert x with x.astype.",
        )
    if o.x.dtype == jnp.int8 and fmt.kind != "integer":
        raise o.error(
            TypeError,
            f"int8 x needs integer codes, and {fmt.name} is not an integer format",
            "Use a float x, or codes of an integer format.",
        )
    if o.scale is None and o.x.dtype != jnp.int8:
        raise o.error(
            TypeError, "scale may be None only if x is int8", "Pass the scales."
        )
    if o.scale is not None and o.scale.dtype.name not in _FLOATS:
        raise o.error(
            TypeError,
            "scale must be bfloat16, float16 or float32",
            "Convert it with scale.astype.",
        )
    packed = o.packing is not formats.Packing.NONE
    data_dtype = "uint8" if packed else fmt.code_dtype.name
    if o.data.dtype.name != data_dtype:
        raise o.error(
            TypeError,
            f"data must be {data_dtype} for {fmt.name} packed as {o.packing.value!r}",
            "Pass packing= if the codes are packed in another order; "
            "jaxq.formats.pack packs codes.",
        )
    if o.zero_point is None:
        return
    if fmt.kind != "integer" or o.zero_point.dtype != fmt.code_dtype:
        raise o.error(
            TypeError,
            "zero_point needs an integer format and must have the dtype of its codes, "
            f"which is {fmt.code_dtype.name} for {fmt.name}",
            "Convert zero_point, or leave it out if the format has no integer codes.",
        )


def _check_stack(operands: _Operands) -> None:
    """Checks that data is a matrix or a stack, and that x has the same stack."""
    o = operands
    leading_axes = 1 if o.data.ndim == 3 else 0
    # Each matrix of a stack needs at least one row of x.
    if o.data.ndim not in (2, 3) or o.x.ndim < 1 + 2 * leading_axes:
        raise o.error(
            ValueError,
            "data must be a matrix, or a stack of matrices if x has the same leading "
            "axis",
            "Reshape data to two or three axes, and x to [..., k] or [e, ..., k].",
        )
    if o.x.shape[:leading_axes] != o.stack:
        raise o.error(
            ValueError,
            f"x has {o.x.shape[0]} stacked matrices and data has {o.data.shape[0]}",
            "Give both the same leading axis.",
        )


def _check_leaves(operands: _Operands) -> None:
    """Checks the shapes of scale and zero_point, and the codebook."""
    o = operands
    shape = (*o.stack, o.n, o.groups)
    for name, leaf in (("scale", o.scale), ("zero_point", o.zero_point)):
        if leaf is not None and leaf.shape != shape:
            raise o.error(
                ValueError,
                f"{name} must have shape {_shape_text(shape)}, one row for each row of "
                "codes",
                f"Reshape {name}.",
            )
    if o.codebook is None:
        return
    if o.codebook.dtype.name not in _FLOATS:
        raise o.error(
            TypeError,
            "codebook must be bfloat16, float16 or float32",
            "Convert it with codebook.astype.",
        )
    size = 2**o.fmt.bits
    if o.fmt.kind != "codebook" or o.codebook.shape != (size,):
        raise o.error(
            ValueError,
            f"codebook needs a codebook format and must be one table [{size}] for the "
            f"whole stack, and the format is {o.fmt.name}",
            f"Pass a table [{size}] with a codebook format, or leave codebook out.",
        )


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _check_lengths(operands: _Operands) -> None:
    """Checks that groups fit the codes, and that x has a column for each code.

    x may have fewer columns if the other codes are padding. Only the last group can be
    padded. If there is one group, only its last byte can be padded.
    """
    o, k, padded_k, groups = operands, operands.k, operands.padded_k, operands.groups
    if not groups and k:
        raise o.error(
            ValueError,
            f"scale has no groups, and each row of data holds {padded_k} codes",
            "Pass at least one scale for each row.",
        )
    size = o.group_size
    if groups and size is None and padded_k % groups:
        raise o.error(
            ValueError,
            f"{groups} groups do not divide the {padded_k} codes of a row",
            "Pass group_size= if the last group has fewer codes, or pass scale with "
            "another number of groups.",
        )
    if groups > 1 and size is None and not _is_power_of_two(padded_k // groups):
        # The codes of a QTensor whose last group has fewer codes look like this.
        raise o.error(
            ValueError,
            f"{padded_k} codes of a row in {groups} equal groups would be groups of "
            f"{padded_k // groups}, which is not a power of two",
            "Pass group_size=, the number of codes of a group that is full.",
        )
    if size is not None and (size < 1 or -(-padded_k // size) != groups):
        raise o.error(
            ValueError,
            f"the {padded_k} codes of a row are not {groups} groups of {size} codes",
            "Pass another group_size, or scale with another number of groups.",
        )
    step = formats.codes_per_pack(o.fmt.bits, o.packing) if groups == 1 else o.group
    if k > padded_k or padded_k - k >= max(step, 1):
        raise o.error(
            ValueError,
            f"x has k = {k}, and each row of data holds {padded_k} codes in {groups} "
            "groups",
            "Give x a column for each code. Codes that pad the last group need none.",
        )


def _result_dtype(operands: _Operands, out_dtype: Any) -> np.dtype:
    """The dtype of the result: int32 without a scale, a float dtype with one."""
    o = operands
    if out_dtype is not None:
        dtype = jnp.dtype(out_dtype)
    elif o.x.dtype != jnp.int8:
        dtype = o.x.dtype
    else:
        dtype = jnp.dtype(jnp.int32 if o.scale is None else jnp.float32)
    allowed = ("int32",) if o.scale is None else _FLOATS
    if dtype.name not in allowed:
        raise o.error(
            TypeError,
            "out_dtype must be float32, bfloat16 or float16 with a scale, and int32 "
            f"without a scale, got {dtype}",
            f"Use one of {', '.join(allowed)}.",
        )
    return dtype


def _row_meta(operands: _Operands) -> RowMeta:
    o = operands
    group = o.group
    # With several groups a HALVES unit is a group, if groups fill whole bytes.
    whole_bytes = group % formats.codes_per_pack(o.fmt.bits, o.packing) == 0
    unit = group if whole_bytes and o.groups > 1 else None
    return RowMeta(
        o.fmt,
        o.packing,
        unit,
        o.k,
        o.padded_k,
        o.layout,  # pyright: ignore[reportArgumentType]
        group=group,
    )


def _as_rows(operands: _Operands) -> Rows:
    o, table = operands, None
    if o.codebook is not None:
        # One table for all rows and groups of each matrix: [1, 1, num_codes].
        table = jnp.broadcast_to(
            o.codebook.astype(jnp.float32), (*o.stack, 1, 1, o.codebook.shape[0])
        )
    return Rows(o.data, o.scale, o.zero_point, None, table)  # pyright: ignore


def _check_int32_sums(operands: _Operands, meta: RowMeta) -> None:
    """Checks that int32 can hold the result if there is no scale."""
    o = operands
    longest = largest_exact_length(int8_meta(o.k), True, meta, o.zero_point is None)
    if o.padded_k > longest:
        raise o.error(
            ValueError,
            f"int32 can sum {longest} of these products without overflow, but a row "
            f"has {o.padded_k} products",
            "Pass scale, or cut the product into parts along k.",
        )


def _check_kernel(operands: _Operands, call: Call, x: jax.Array, rows: Rows) -> None:
    """Checks that the kernel that `call.backend` names can compute this product."""

    def abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
        shape = array.shape if x.ndim == 3 else (1, *array.shape)
        return jax.ShapeDtypeStruct(shape, array.dtype)

    call, leaves = with_leaves(call, rows)
    problem = problem_of(call, abstract(x), [abstract(leaf) for leaf in leaves])
    if isinstance(problem, str):
        reason = problem
    else:
        device = device_kind(platform_of(call.backend))
        reason = kernel_module(call.backend).why_not(problem, device)
    if reason is not None:
        raise operands.error(
            ValueError,
            f"the {call.backend} kernel cannot compute this product: {reason}",
            'Use backend="auto" to let jaxq choose.',
        )
