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
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from jaxq.kernels._call import Call, problem_of, with_leaves
from jaxq.kernels._devices import assumed_gpu, lowering_devices
from jaxq.kernels._dispatch import Choice, FallbackWarning
from jaxq.kernels._forms import in_memory_order, kernel_operands
from jaxq.kernels._operands import varying_alike
from jaxq.kernels._problem import Problem
from jaxq.kernels._ragged import ragged_gradients, ragged_xla_form
from jaxq.kernels._ragged_items import rows_with_experts, work_items
from jaxq.kernels._registry import kernel_module
from jaxq.kernels._rows import RowMeta, Rows

# The kernel of each platform.
_KERNELS = {"tpu": "ragged_tpu", "cuda": "ragged_triton"}
# On a GPU, XLA multiplies every row by the weights of all experts and keeps one result.
# With many rows of each of few experts, this is still expected to take less time than
# decoding each weight for every 64 rows. Both numbers are estimates: no device has been
# measured yet.
_DENSE_FROM_ROWS_OF_EXPERT = 512
_MOST_DENSE_EXPERTS = 2
# Size in bytes of the decoded rows of all experts that the XLA form holds on an
# accelerator.
_ACCELERATOR_BLOCK_BYTES = 256 * 2**20

# `ragged_p(x, sizes, *leaves)`: x `[b, m, k]`, sizes int32 `[b, e]`, and the leaves of
# `Rows`, each `[b, e, ...]`, or `[1, e, ...]` if all batch elements have the same
# weights. The result is float32 `[b, m, n]`.
ragged_p = Primitive("quantized_ragged_dot")


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
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves((x, rows))]
    if any(AxisType.Explicit in mesh.axis_types for mesh in meshes if not mesh.empty):
        # The XLA form states the sharding of each of its results.
        return ragged_xla_form(x, rows, sizes, meta)
    call, leaves = with_leaves(Call(meta, (), "float32"), rows)
    operands = [array[None] for array in (x, sizes, *leaves)]
    return ragged_p.bind(*varying_alike(operands), call=call)[0]


def _forward(x, rows, sizes, meta):
    return ragged_matmul(x, rows, sizes, meta), (x, rows, sizes)


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
    if num_devices > 1:
        return Choice(
            "xla",
            f"XLA partitions this program for {num_devices} devices and cannot "
            "partition a kernel; inside jax.shard_map a kernel runs on each device",
        )
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
        return ragged_xla_form(x, call.rows(leaves), sizes, call.meta)

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
    tiles = module.default_tiles(problem, device_kind) | dict(tiles or {})
    operands = kernel_operands(
        call.rows(merged),
        call.meta,
        problem,
        scales_as_stored=kernel == "ragged_triton",
    )
    rows = in_memory_order(x.reshape(1, b * m, -1), call.meta)[0]
    items = work_items(sizes, b * m, int(tiles["bm"]), shared_weights=shared_weights)
    y = module.matmul(
        rows, *operands, items, problem=problem, tiles=tiles, interpret=interpret
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


@functools.partial(jax.jit, static_argnames="call")
def _run(*operands, call: Call):
    return ragged_p.bind(*operands, call=call)


def _evaluate(*operands, call: Call):
    # The primitive can only be lowered and compiled.
    with jax.disable_jit(False):
        return _run(*operands, call=call)


def _lower(ctx, *operands, call: Call, platform: str | None):
    """Lowers the primitive for one platform; None is every platform without kernels."""
    with assumed_gpu(platform, ctx.avals_in), warnings.catch_warnings():
        form = functools.partial(ragged_form, call=call)
        if platform is not None:
            form = _form_of_platform(ctx, call, platform)
        # A user who multiplies by a QTensor cannot act on this warning.
        warnings.filterwarnings(
            "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
        )
        return mlir.lower_fun(form, multiple_results=False)(ctx, *operands)


def _form_of_platform(ctx, call: Call, platform: str) -> functools.partial:
    """The kernel or the XLA form for a platform that has kernels."""
    device_kind, num_devices = lowering_devices(ctx, platform)
    x, _, *leaves = ctx.avals_in
    merged = [
        jax.ShapeDtypeStruct((leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), dtype)
        for leaf in leaves
        for dtype in [leaf.dtype]
    ]
    problem = ragged_problem(call, x.shape[0] * x.shape[1], merged, x.dtype)
    choice = choose_ragged(problem, platform, device_kind, num_devices)
    if choice.reason is None:
        return functools.partial(
            ragged_kernel_form,
            call=call,
            kernel=choice.backend,
            device_kind=device_kind,
        )
    if not choice.preferred:
        warnings.warn(
            f"No kernel runs for a ragged product with {call.meta.fmt.name} experts "
            f"and k = {call.meta.k} on {platform}, so XLA computes it: "
            f"{choice.reason}.",
            FallbackWarning,
            stacklevel=3,
        )
    meta = dataclasses.replace(call.meta, block_bytes=_ACCELERATOR_BLOCK_BYTES)
    return functools.partial(ragged_form, call=dataclasses.replace(call, meta=meta))


def _jvp(primals, tangents, *, call: Call):
    """The derivative of the XLA form. `ragged_matmul` has its own reverse rule."""
    form = functools.partial(ragged_form, call=call)
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return jax.jvp(form, tuple(primals), tuple(tangents))


def _batch(operands: Sequence[jax.Array], dims, *, call: Call):
    size = next(
        x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None
    )
    x, sizes, *leaves = operands
    x_dim, sizes_dim, *leaf_dims = dims

    def merge(array: jax.Array, dim: int | None, b: int) -> jax.Array:
        """`[v, b or 1, ...]` as `[v * b, ...]`."""
        if dim is None:
            front = jnp.broadcast_to(array[None], (size, *array.shape))
        else:
            front = jnp.moveaxis(array, dim, 0)
        if front.shape[1] != b:
            front = jnp.broadcast_to(front, (size, b, *front.shape[2:]))
        return front.reshape(size * b, *front.shape[2:])

    b = x.shape[0 if x_dim is None or x_dim > 0 else 1]
    shared = leaves[0].shape[0] == 1 and all(dim is None for dim in leaf_dims)
    if not shared:
        leaves = [merge(a, d, b) for a, d in zip(leaves, leaf_dims, strict=True)]
    merged = [merge(x, x_dim, b), merge(sizes, sizes_dim, b), *leaves]
    y = ragged_p.bind(*varying_alike(merged), call=call)
    return y.reshape(size, b, *y.shape[1:]), 0


ragged_p.def_abstract_eval(_abstract)
ragged_p.def_impl(_evaluate)
batching.primitive_batchers[ragged_p] = _batch
ad.primitive_jvps[ragged_p] = _jvp
mlir.register_lowering(ragged_p, functools.partial(_lower, platform=None))
for _platform in _KERNELS:
    mlir.register_lowering(
        ragged_p, functools.partial(_lower, platform=_platform), platform=_platform
    )
