"""The product of two operands of codes as a jax primitive.

When jax lowers a program for a platform, the primitive becomes a Pallas kernel, or
`codes_matmul` with blocks of a size for this platform.

| transformation | rule |
|---|---|
| lowering | a kernel of the platform, or the XLA form if no kernel is chosen |
| vmap | the mapped axis joins the stacked products |
| derivatives for the scales | those of the XLA form |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jaxq.kernels._choice import kernel_on
from jaxq.kernels._codes import codes_matmul, is_native_float
from jaxq.kernels._codes_problem import CodesProblem, codes_problem
from jaxq.kernels._dispatch import block_bytes_on
from jaxq.kernels._forms import in_memory_order
from jaxq.kernels._operands import batch_size, varying_alike, with_batch_in_front
from jaxq.kernels._platform_primitive import Target, platform_primitive
from jaxq.kernels._registry import READS_UNITS, kernel_module
from jaxq.kernels._remat import has_stack, save_like_dots
from jaxq.kernels._rows import (
    RowMeta,
    Rows,
    as_rows,
    decode_field,
    leaf_names,
    rows_of_leaves,
)
from jaxq.kernels._xla import weight_only_matmul


@dataclasses.dataclass(frozen=True)
class CodesCall:
    """Static facts of one product of codes.

    Attributes:
      a_meta: static facts of the left operand.
      a_leaves: names of the fields of its `Rows` that are not None, in order.
      b_meta: static facts of the right operand.
      b_leaves: likewise for the right operand.
    """

    a_meta: RowMeta
    a_leaves: tuple[str, ...]
    b_meta: RowMeta
    b_leaves: tuple[str, ...]

    def rows(self, operands: Sequence[Any]) -> tuple[Rows, Rows]:
        """Both operands, from their leaves one after the other."""
        num_a = len(self.a_leaves)
        return (
            rows_of_leaves(self.a_leaves, operands[:num_a]),
            rows_of_leaves(self.b_leaves, operands[num_a:]),
        )

    @property
    def is_mixed(self) -> bool:
        """True if float8 codes are multiplied by a weight in another kind of format."""
        return is_native_float(self.a_meta.fmt) and not is_native_float(self.b_meta.fmt)

    def problem(self, operands: Sequence[Any]) -> CodesProblem | str:
        """The product as kernels see it, or the reason why no kernel computes it."""
        a, b = self.rows(operands)
        return codes_problem(a, self.a_meta, b, self.b_meta)


def call_codes(a: Rows, a_meta: RowMeta, b: Rows, b_meta: RowMeta) -> jax.Array:
    """Computes `decode(a) @ decode(b).T` from codes, float32 `[m, n]`.

    Args:
      a: `[m, k]` codes with scales. Or integer codes of both operands have no scales.
        The result is then the int32 sums of their products.
      a_meta: static facts of a.
      b: `[n, k]` codes.
      b_meta: static facts of b.
    """
    call = CodesCall(a_meta, leaf_names(a), b_meta, leaf_names(b))
    leaves = [leaf[None] for leaf in (*a, *b) if leaf is not None]
    return codes_p.bind(*varying_alike(leaves), call=call)[0]


def codes_xla_form(*operands: jax.Array, call: CodesCall) -> jax.Array:
    """Computes the products `[e, m, n]` in plain XLA. Operands have a leading axis."""

    def product(*operands: jax.Array) -> jax.Array:
        a, b = call.rows(operands)
        a, a_meta = as_rows(a, call.a_meta)
        b, b_meta = as_rows(b, call.b_meta)
        if call.is_mixed and b_meta.block_bytes is None:
            # XLA:CPU has no float8 product, and multiplies groups slowly.
            x = decode_field(a, a_meta, 0)[:, : a_meta.k]
            return weight_only_matmul(x, b, b_meta)
        return codes_matmul(a, a_meta, b, b_meta)

    if operands[0].shape[0] == 1:
        return product(*(leaf[0] for leaf in operands))[None]
    return jax.vmap(product)(*operands)


def codes_kernel_form(
    *operands: jax.Array,
    call: CodesCall,
    kernel: str,
    interpret: bool = False,
    **tiles: int,
) -> jax.Array:
    """Computes the products `[e, m, n]` by a kernel.

    Args:
      *operands: leaves with a leading axis.
      call: static facts. The kernel must accept the problem.
      kernel: name of the kernel.
      interpret: True to run the kernel's interpreter, on any platform.
      **tiles: sizes that replace those of the kernel's `default_tiles`.
    """
    (a, b), problem = call.rows(operands), call.problem(operands)
    assert isinstance(problem, CodesProblem), problem
    assert a.scale is not None
    assert b.scale is not None
    module, p = kernel_module(kernel), problem
    a_data = a.data
    if p.is_packed and kernel not in READS_UNITS:
        a_data = in_memory_order(a_data, call.b_meta)
    return module.matmul(
        a_data,
        jnp.broadcast_to(a.scale, (p.e, p.m, p.a_groups)),
        b.data,
        jnp.broadcast_to(b.scale, (p.e, p.n, p.b_groups)),
        problem=p,
        tiles=module.default_tiles(p) | tiles,
        interpret=interpret,
    )


# Rules of the primitive.


def _abstract(*operands, call: CodesCall):
    a, b = call.rows(operands)
    data: Any = a.data
    shape = (*a.data.shape[:2], b.data.shape[1 if call.b_meta.layout == "rows" else 2])
    dtype = jnp.dtype(jnp.int32 if a.scale is None else jnp.float32)
    return data.update(shape=shape, dtype=dtype, weak_type=False)


def _form(
    target: Target, avals: Sequence[Any], *, call: CodesCall
) -> Callable[..., jax.Array]:
    """What the primitive computes on a target: a kernel or the XLA form."""
    product = f"a product of {call.b_meta.fmt.name} codes"
    kernel = kernel_on(target, call.problem(avals), "codes", product)
    if kernel is not None:
        return functools.partial(codes_kernel_form, call=call, kernel=kernel)
    block_bytes = block_bytes_on(target, avals[0].shape[0])
    b_meta = dataclasses.replace(call.b_meta, block_bytes=block_bytes)
    call = dataclasses.replace(call, b_meta=b_meta)
    return functools.partial(codes_xla_form, call=call)


def _jvp(primals, tangents, *, call: CodesCall):
    form = functools.partial(codes_xla_form, call=call)
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return jax.jvp(form, tuple(primals), tuple(tangents))


def _batch(operands, dims, *, call: CodesCall):
    size = batch_size(operands, dims)
    num_a = len(call.a_leaves)
    has_one_b = all(dim is None for dim in dims[num_a:])
    if has_one_b and call.a_meta.layout == "rows":
        # The whole batch has one right operand. So the rows of all batch elements
        # become the rows of one left operand, and the right operand is not copied.
        a = [
            _batch_second(leaf, dim, size)
            for leaf, dim in zip(operands[:num_a], dims[:num_a], strict=True)
        ]
        m = a[call.a_leaves.index("data")].shape[2]
        a = [_with_batch_in_rows(leaf, m) for leaf in a]
        y = codes_p.bind(*varying_alike([*a, *operands[num_a:]]), call=call)
        return y.reshape(y.shape[0], size, m, y.shape[-1]), 1
    merged = [
        with_batch_in_front(operand, dim, size)
        for operand, dim in zip(operands, dims, strict=True)
    ]
    y = codes_p.bind(*varying_alike(merged), call=call)
    return y.reshape(size, -1, *y.shape[1:]), 0


def _batch_second(leaf: jax.Array, dim: int | None, size: int) -> jax.Array:
    """A leaf `[e, rows, ...]` as `[e, batch, rows, ...]`."""
    if dim is not None:
        return jnp.moveaxis(leaf, dim, 1)
    shape = (leaf.shape[0], size, *leaf.shape[1:])
    return jnp.broadcast_to(leaf[:, None], shape)


def _with_batch_in_rows(leaf: jax.Array, m: int) -> jax.Array:
    """A leaf `[e, batch, m or 1, ...]` as `[e, batch * m, ...]`."""
    e, size, _, *rest = leaf.shape
    return jnp.broadcast_to(leaf, (e, size, m, *rest)).reshape(e, size * m, *rest)


codes_p = platform_primitive("codes_matmul", _abstract, _form)
batching.primitive_batchers[codes_p] = _batch
ad.primitive_jvps[codes_p] = _jvp
save_like_dots(codes_p, has_stack)
