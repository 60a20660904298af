"""Rows sorted by expert times quantized weights, as a jax primitive.

When jax lowers a program for a platform, the primitive becomes a Pallas kernel of this
platform or the XLA form. A kernel decodes only the weights of experts that have rows.

| transformation | rule |
|---|---|
| lowering | a kernel of the platform, or the XLA form if no kernel is chosen |
| vmap | the batch axis b of the primitive, which kernels read as more rows |
| derivatives of `ragged_matmul` | the gradients of the XLA form, in plain XLA |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.interpreters import ad, batching
from jax.sharding import PartitionSpec

from jaxq.kernels._call import Call, problem_of, with_leaves
from jaxq.kernels._dispatch import (
    Choice,
    block_bytes_on,
    warn_of_fallback,
    why_not_partitioned,
)
from jaxq.kernels._forms import in_memory_order, kernel_operands, pad_columns
from jaxq.kernels._operands import batch_size, varying_alike, with_batch_in_front
from jaxq.kernels._platform_primitive import Target, platform_primitive
from jaxq.kernels._problem import Problem
from jaxq.kernels._ragged import ragged_gradients, ragged_xla_form
from jaxq.kernels._ragged_items import rows_with_experts, work_items
from jaxq.kernels._registry import kernel_module
from jaxq.kernels._remat import mark_product
from jaxq.kernels._rows import RowMeta, Rows
from jaxq.meshes import call_on_auto_axes, explicit_spec

# The kernel of each platform.
_KERNELS = {"tpu": "ragged_tpu", "cuda": "ragged_triton"}
# The kernels that read scales `[e, n, g]`. Other kernels get them as `[e, g, n]`.
_SCALES_AS_STORED = ("ragged_triton",)
# On a GPU, XLA multiplies every row by the weights of all experts and keeps one result.
# With many rows of each of few experts, this is still expected to take less time than
# decoding each weight for every 64 rows. Both numbers are estimates: no device has been
# measured yet.
_DENSE_FROM_ROWS_OF_EXPERT = 512
_MOST_DENSE_EXPERTS = 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ragged_matmul(
    x: jax.Array, rows: Rows, sizes: jax.Array, meta: RowMeta
) -> jax.Array:
    """Computes `x[i] @ decode(rows[expert of i]).T` for every row i of x.

    Args:
      x: float `[m, k]`, sorted by expert. Weights are rounded to its dtype.
      rows: matrices `[n, k]` with a leading axis e in every leaf.
      sizes: int32 `[e]`, the number of rows of x of each expert. If x has more rows,
        the result of the last rows is zero.
      meta: static facts of the rows.

    Returns:
      float32 `[m, n]`. It has derivatives for x, scale, offset and codebook.
    """
    call, leaves = with_leaves(Call(meta, (), "float32"), rows)

    def bind(*operands: jax.Array) -> jax.Array:
        batched = varying_alike([array[None] for array in operands])
        return ragged_p.bind(*batched, call=call)[0]

    n_axis = 1 if meta.layout == "rows" else 2
    spec = PartitionSpec(explicit_spec(x)[0], explicit_spec(rows.data)[n_axis])
    return call_on_auto_axes(bind, spec, x, sizes, *leaves)


def _forward(x, rows, sizes, meta):
    y = mark_product(ragged_matmul(x, rows, sizes, meta), has_batch=True)
    return y, (x, rows, sizes)


def _backward(meta: RowMeta, saved: tuple[jax.Array, Rows, jax.Array], dy: jax.Array):
    x, rows, sizes = saved
    # Integers have cotangents of dtype float0.
    no_sizes = np.zeros(sizes.shape, dtypes.float0)
    return *ragged_gradients(x, rows, sizes, meta, dy), no_sizes


ragged_matmul.defvjp(_forward, _backward)


def ragged_problem(call: Call, m: int, leaves: Sequence[Any], x_dtype: Any) -> Any:
    """Returns the product as kernels see it, or the reason why no kernel computes it.

    Args:
      call: static facts of the product.
      m: number of rows of x.
      leaves: arrays of the rows in the order of `call.leaves`, each `[e, ...]`. Only
        shapes and dtypes are read.
      x_dtype: dtype of x.

    Returns:
      A `Problem` or a reason. In the problem, e is the number of experts and m the
      number of rows of all experts together.
    """
    e = leaves[call.leaves.index("data")].shape[0]
    x = jax.ShapeDtypeStruct((e, m, call.meta.k), x_dtype)
    return problem_of(call, x, leaves)


def choose_ragged(
    problem: Problem | str, platform: str, device_kind: str | None, num_devices: int = 1
) -> Choice:
    """Chooses the kernel for a platform, by static facts alone.

    Args:
      problem: the product, or the reason why no kernel computes it, as `ragged_problem`
        returns it.
      platform: "cpu", "tpu", "cuda", ...
      device_kind: `jax.Device.device_kind`, or None if unknown.
      num_devices: number of devices over which XLA partitions the program.
    """
    if platform not in _KERNELS:
        return Choice("xla", f"there are no ragged kernels for {platform}")
    if isinstance(problem, str):
        return Choice("xla", problem)
    reason = why_not_partitioned(num_devices)
    if reason is not None:
        return Choice("xla", reason)
    name = _KERNELS[platform]
    reason = kernel_module(name).why_not(problem, device_kind)
    if reason is not None:
        return Choice("xla", f"{name}: {reason}")
    many_rows = problem.m >= _DENSE_FROM_ROWS_OF_EXPERT * problem.e
    if platform == "cuda" and many_rows and problem.e <= _MOST_DENSE_EXPERTS:
        reason = (
            f"with {_MOST_DENSE_EXPERTS} or fewer experts and "
            f"{_DENSE_FROM_ROWS_OF_EXPERT} or more rows of x for each, the weights are "
            "decoded once and multiplied densely (estimated)"
        )
        return Choice("xla", reason, preferred=True)
    return Choice(name, None)


# The two ways to compute the product.


def ragged_form(
    x: jax.Array, sizes: jax.Array, *leaves: jax.Array, call: Call
) -> jax.Array:
    """Computes what `ragged_p` computes in plain XLA."""

    def product(x: jax.Array, sizes: jax.Array, *leaves: jax.Array) -> jax.Array:
        # `lax.ragged_dot` has no rule for explicit mesh axes. In a program that is
        # lowered with such a mesh in use, all operands are on it.
        def form(x: jax.Array, sizes: jax.Array, *leaves: jax.Array) -> jax.Array:
            return ragged_xla_form(x, call.rows(leaves), sizes, call.meta)

        return call_on_auto_axes(form, PartitionSpec(None, None), x, sizes, *leaves)

    b = x.shape[0]
    if b == 1:
        return product(*(array[0] for array in (x, sizes, *leaves)))[None]
    if leaves[0].shape[0] == b:
        return jax.vmap(product)(x, sizes, *leaves)
    # `lax.ragged_dot` has no rule for a batch of rows with the same weights.
    shared = [leaf[0] for leaf in leaves]
    return jax.lax.map(lambda args: product(*args, *shared), (x, sizes))


def ragged_kernel_form(
    x: jax.Array,
    sizes: jax.Array,
    *leaves: jax.Array,
    call: Call,
    kernel: str,
    device_kind: str | None = None,
    interpret: Any = False,
    tiles: Mapping[str, int | str] | None = None,
) -> jax.Array:
    """Computes what `ragged_p` computes by a kernel.

    Args:
      x: `[b, m, k]`.
      sizes: int32 `[b, e]`.
      *leaves: `[b, e, ...]` or `[1, e, ...]`.
      call: static facts. The kernel must accept the problem.
      kernel: name of the kernel.
      device_kind: `jax.Device.device_kind`, or None if unknown. It selects the tiles.
      interpret: True to run the kernel's interpreter, on any platform.
      tiles: sizes that replace those of the kernel's `default_tiles`.
    """
    b, m, _ = x.shape
    module = kernel_module(kernel)
    shared_weights = leaves[0].shape[0] == 1
    merged = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves]
    problem = ragged_problem(call, b * m, merged, x.dtype)
    assert isinstance(problem, Problem), problem
    tile_sizes = module.default_tiles(problem, device_kind) | dict(tiles or {})
    operands = kernel_operands(
        call.rows(merged),
        call.meta,
        problem,
        scales_as_stored=kernel in _SCALES_AS_STORED,
    )
    rows = pad_columns(x.reshape(1, b * m, x.shape[2]), call.meta)
    rows = in_memory_order(rows, call.meta)[0]
    items = work_items(sizes, b * m, tile_sizes["bm"], shared_weights=shared_weights)
    y = module.matmul(
        rows, *operands, items, problem=problem, tiles=tile_sizes, interpret=interpret
    )
    has_expert = rows_with_experts(sizes, b * m)
    # The GPU kernel does not write the rows of no expert.
    y = jnp.where(has_expert[:, None], y, 0)
    return y.reshape(b, m, problem.n)


# Rules of the primitive.


def _abstract(x, sizes, *leaves, call: Call):
    del sizes
    data = leaves[call.leaves.index("data")]
    n = data.shape[2 if call.meta.layout == "rows" else 3]
    shape = (*x.shape[:2], n)
    return x.update(shape=shape, dtype=jnp.dtype(jnp.float32), weak_type=False)


def _form(
    target: Target, avals: Sequence[Any], *, call: Call
) -> Callable[..., jax.Array]:
    """What the primitive computes on a target: a kernel or the XLA form."""
    x, _, *leaves = avals
    merged = [_without_batch(leaf.shape, leaf.dtype) for leaf in leaves]
    problem = ragged_problem(call, x.shape[0] * x.shape[1], merged, x.dtype)
    platform, device_kind, num_devices = target
    choice = choose_ragged(problem, platform, device_kind, num_devices)
    if choice.reason is None:
        return functools.partial(
            ragged_kernel_form,
            call=call,
            kernel=choice.backend,
            device_kind=device_kind,
        )
    if platform in _KERNELS and not choice.preferred:
        product = f"rows times {call.meta.fmt.name} experts with k = {call.meta.k}"
        warn_of_fallback(product, platform, choice.reason)
    block_bytes = block_bytes_on(platform, num_devices, 1)
    meta = dataclasses.replace(call.meta, block_bytes=block_bytes)
    return functools.partial(ragged_form, call=dataclasses.replace(call, meta=meta))


def _without_batch(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """`[b, e, ...]` as `[b * e, ...]`."""
    return jax.ShapeDtypeStruct((shape[0] * shape[1], *shape[2:]), dtype)


def _jvp(primals, tangents, *, call: Call):
    """The derivative of the XLA form. `ragged_matmul` has its own reverse rule."""
    form = functools.partial(ragged_form, call=call)
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return jax.jvp(form, tuple(primals), tuple(tangents))


def _batch(operands: Sequence[jax.Array], dims, *, call: Call):
    size = batch_size(operands, dims)
    (x, sizes, *leaves), (x_dim, sizes_dim, *leaf_dims) = operands, dims
    x = with_batch_in_front(x, x_dim, size)  # [size * b, m, k]
    sizes = with_batch_in_front(sizes, sizes_dim, size)
    b = x.shape[0] // size
    if any(dim is not None for dim in leaf_dims) or leaves[0].shape[0] != 1:
        pairs = zip(leaves, leaf_dims, strict=True)
        leaves = [_with_own_weights(leaf, dim, size, b) for leaf, dim in pairs]
    y = ragged_p.bind(*varying_alike([x, sizes, *leaves]), call=call)
    return y.reshape(size, b, *y.shape[1:]), 0


def _with_own_weights(leaf: jax.Array, dim: int | None, size: int, b: int) -> jax.Array:
    """A leaf as `[size * b, e, ...]`: a copy for each batch element that shares it."""
    merged = with_batch_in_front(leaf, dim, size)  # [size * (b or 1), e, ...]
    return jnp.repeat(merged, size * b // merged.shape[0], axis=0)


# `ragged_p(x, sizes, *leaves)`: x `[b, m, k]`, sizes int32 `[b, e]`, and the leaves of
# `Rows`, each `[b, e, ...]`, or `[1, e, ...]` if all batch elements have the same
# weights. The result is float32 `[b, m, n]`.
ragged_p = platform_primitive("quantized_ragged_dot", _abstract, _form)
batching.primitive_batchers[ragged_p] = _batch
ad.primitive_jvps[ragged_p] = _jvp
