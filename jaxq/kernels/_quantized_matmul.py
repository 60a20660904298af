"""The product by a quantized matrix for people with codes and scales of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxq import formats
from jaxq.kernels import _tiles
from jaxq.kernels._call import KERNELS, Call, call_matmul, interpreted, problem_of
from jaxq.kernels._codes import largest_exact_length
from jaxq.kernels._rows import RowMeta, Rows

_BACKENDS = ("auto", "xla", *(name for names in KERNELS.values() for name in names))
_LAYOUTS = ("rows", "columns")


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
    out_dtype: Any = None,
    backend: str = "auto",
    interpret: bool = False,
) -> jax.Array:
    """`x @ (scale * (codes - zero_point)).T` without ever holding the decoded matrix.

    The platform a program is lowered for decides what runs: a Pallas kernel where there is one, the XLA form
    elsewhere and on programs that XLA partitions over several devices. Sums are float32, or int32 where x is int8.
    Differentiable in x, scale and codebook.

    Args:
      x: `[..., k]` bfloat16, float16 or float32, or int8 (then its own scale is left to the caller).
      data: codes `[n, k * bits / 8]`, uint8 below 8 bits; `[k * bits / 8, n]` with `layout="columns"`. A stack of
        matrices has one more axis in front, and so has x.
      scale: float `[n, g]`: one number for `k / g` neighbouring codes of a row. k that is no multiple of a group ends
        in a padded one. None, with int8 x: the sums of codes are the result.
      format: of the codes; integers of 4 and 8 bits and every format of 4 bits have kernels.
      zero_point: `[n, g]` integers in the dtype of the format's codes, for asymmetric integers.
      codebook: float32 `[num_codes]`, instead of the numbers of a codebook format, in the order of its codes.
      packing: order of codes in bytes, a `jaxq.formats.Packing`; None takes HALVES of a group (of a row with one group)
        at 4 bits.
      layout: "rows", which GPU kernels take, or "columns", which TPU kernels take.
      out_dtype: of the result; None takes x's, for int8 x float32, or int32 without scale.
      backend: "auto", "xla", or a kernel: "tpu", "mosaic_gpu", "triton".
      interpret: run the interpreter of the kernel that `backend` names: slow, on any platform, for tests; that of
        "mosaic_gpu" without derivatives.

    Returns:
      `[..., n]`.

    Raises:
      TypeError: a dtype that does not fit.
      ValueError: shapes that do not fit, or the kernel asked for by name cannot compute this, or (when lowered) not on
        this platform.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.eye(64), "int4")
      >>> jaxq.kernels.quantized_matmul(jnp.ones((2, 64)), qt.data, qt.scale, format="int4").shape
      (2, 64)
    """
    fmt = formats.get(format) if isinstance(format, str) else format
    formats.check_choice("quantized_matmul: backend", backend, _BACKENDS)
    formats.check_choice("quantized_matmul: layout", layout, _LAYOUTS)
    if isinstance(packing, str):
        formats.check_choice(
            "quantized_matmul: packing", packing, [p.value for p in formats.Packing]
        )
    packing = (
        formats.default_packing(fmt.bits)
        if packing is None
        else formats.Packing(packing)
    )
    arrays = {
        "x": x,
        "data": data,
        "scale": scale,
        "zero_point": zero_point,
        "codebook": codebook,
    }
    shown = ", ".join(
        f"{name}: {a.dtype.name}{list(a.shape)}"
        for name, a in arrays.items()
        if a is not None
    )

    def refuse(kind: type[Exception], problem: str) -> Exception:
        return kind(f"quantized_matmul: {problem} ({shown}).")

    if interpret and backend in ("auto", "xla"):
        raise ValueError(
            f"quantized_matmul: interpret=True needs a kernel's name as backend=, got {backend!r}."
        )
    if x.dtype.name not in ("bfloat16", "float16", "float32", "int8"):
        raise refuse(TypeError, "x must be bfloat16, float16, float32 or int8")
    if x.dtype == jnp.int8 and fmt.kind != "integer":
        raise refuse(TypeError, f"int8 x meets integer codes, and {fmt.name} has none")
    if scale is None and x.dtype != jnp.int8:
        raise refuse(TypeError, "scale may be left out only where x is int8")
    if scale is not None and scale.dtype.name not in ("bfloat16", "float16", "float32"):
        raise refuse(TypeError, "scale must be bfloat16, float16 or float32")
    wanted = fmt.code_dtype.name if packing is formats.Packing.NONE else "uint8"
    if data.dtype.name != wanted:
        raise refuse(
            TypeError,
            f"data must be {wanted} for {fmt.name} packed as {packing.value!r}",
        )
    if zero_point is not None and (
        fmt.kind != "integer" or zero_point.dtype != fmt.code_dtype
    ):
        raise refuse(
            TypeError,
            f"zero_point goes with integer codes and has their dtype, {fmt.code_dtype.name}",
        )
    if data.ndim not in (2, 3) or x.ndim < data.ndim - 1 + (data.ndim == 3):
        raise refuse(
            ValueError,
            "data must be a matrix, or a stack of them with x having the same leading axis",
        )

    stacked = data.ndim == 3
    k, (n, stored) = (
        x.shape[-1],
        data.shape[-2:] if layout == "rows" else data.shape[:-3:-1],
    )
    padded_k = stored if packing is formats.Packing.NONE else stored * 8 // fmt.bits
    groups = 1 if scale is None or scale.ndim != data.ndim else scale.shape[-1]
    lead: tuple[int, ...] = data.shape[:1] if stacked else ()
    if stacked and x.shape[:1] != lead:
        raise refuse(
            ValueError, f"x has {x.shape[0]} stacked matrices and data {data.shape[0]}"
        )
    for name, leaf in (("scale", scale), ("zero_point", zero_point)):
        if leaf is not None and leaf.shape != (*lead, n, groups):
            raise refuse(
                ValueError,
                f"{name} must be {[*lead, n, groups]}: one row for every row of codes",
            )
    if codebook is not None and codebook.dtype.name not in (
        "bfloat16",
        "float16",
        "float32",
    ):
        raise refuse(TypeError, "codebook must be bfloat16, float16 or float32")
    if codebook is not None and (
        fmt.kind != "codebook" or codebook.shape != (2**fmt.bits,)
    ):
        shape = [2**fmt.bits]
        raise refuse(
            ValueError,
            f"codebook goes with a codebook format, and is one table {shape} for the whole stack",
        )
    fill = formats.codes_per_pack(fmt.bits, packing)
    if not groups and k:
        raise refuse(
            ValueError, f"scale has no groups, and rows of data hold {padded_k} codes"
        )
    group = padded_k // groups if groups else 0
    if groups and padded_k % groups:
        raise refuse(
            ValueError, f"{groups} groups do not divide the {padded_k} codes of a row"
        )
    step = fill if groups == 1 else group
    if k > padded_k or padded_k - k >= max(step, 1):
        raise refuse(
            ValueError,
            f"x has k = {k} and rows of data hold {padded_k} codes in {groups} groups",
        )

    whole = group % fill == 0
    meta = RowMeta(
        fmt, packing, group if whole and groups > 1 else None, k, padded_k, layout
    )  # pyright: ignore[reportArgumentType]
    table = None
    if codebook is not None:
        table = jnp.broadcast_to(
            codebook.astype(jnp.float32), (*lead, 1, 1, codebook.shape[0])
        )
    rows = Rows(data, scale, zero_point, None, table)  # pyright: ignore[reportArgumentType]
    default = (
        x.dtype if x.dtype != jnp.int8 else jnp.int32 if scale is None else jnp.float32
    )
    out = jnp.dtype(default if out_dtype is None else out_dtype)
    if (scale is None) != (out == jnp.int32) or not (
        out == jnp.int32 or out.name in ("bfloat16", "float16", "float32")
    ):
        raise refuse(
            TypeError,
            f"out_dtype must be float32, bfloat16 or float16, or int32 without scale; got {out}",
        )

    if scale is None:
        plain = RowMeta(formats.get("int8"), formats.Packing.NONE, None, k, k)
        longest = largest_exact_length(plain, True, meta, zero_point is None)
        if padded_k > longest:
            raise refuse(
                ValueError,
                f"int32 surely holds {longest} of these products, and a row has {padded_k}",
            )
    flat = x.reshape(*lead, math.prod(x.shape[len(lead) : -1]), k)
    call = Call(meta, (), out.name, backend=backend, interpret=interpret)
    if 0 in (*lead, n, flat.shape[-2]):
        return jnp.zeros((*x.shape[:-1], n), out)
    if backend not in ("auto", "xla"):
        _check_kernel(call, flat, rows, refuse)
    # That interpreter has effects, which no primitive of ours can have.
    y = (interpreted if interpret and backend == "mosaic_gpu" else call_matmul)(
        flat, rows, call
    )
    return y.reshape(*x.shape[:-1], n)


def _check_kernel(
    call: Call,
    x: jax.Array,
    rows: Rows,
    refuse: Callable[[type[Exception], str], Exception],
) -> None:
    """Raises where the kernel asked for by name cannot compute this."""

    def stacked(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape if x.ndim == 3 else (1, *leaf.shape), leaf.dtype
        )

    leaves = {
        name: stacked(leaf) for name, leaf in rows._asdict().items() if leaf is not None
    }
    found = problem_of(
        dataclasses.replace(call, leaves=tuple(leaves)),
        stacked(x),
        list(leaves.values()),
    )
    platform = next(
        platform for platform, names in KERNELS.items() if call.backend in names
    )
    kernel = _tiles.kernel(call.backend)
    reason = (
        found
        if isinstance(found, str)
        else kernel.why_not(found, _tiles.device_kind(platform))
    )
    if reason is not None:
        raise refuse(
            ValueError, f"the {call.backend} kernel does not compute this: {reason}"
        )
