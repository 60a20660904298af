"""Rows sorted by expert times quantized weights, as a jax primitive.

When jax lowers a program for a platform, the primitive becomes a Pallas kernel of this
platform or the XLA form. A kernel decodes only the weights of experts that have rows.

| transformation | rule |
|---|---|
| lowering | a kernel of the platform, or the XLA form if no kernel is chosen |
| vmap | the batch axis b of the primitive, which kernels read as more rows |
| derivative for x | the same product |
| derivative for scale, offset, codebook | `ragged_tangent_p`, linear in them |
| transpose for x | the same product with transposed weights, in plain XLA |
| transpose for scale, offset, codebook | their gradient, decoded in blocks of rows |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.sharding import PartitionSpec

from jaxq.kernels._call import Call, float_leaves, problem_of, with_leaves
from jaxq.kernels._choice import kernel_on
from jaxq.kernels._codes import is_float8
from jaxq.kernels._dispatch import block_bytes_on
from jaxq.kernels._forms import in_memory_order, kernel_operands, pad_columns
from jaxq.kernels._operands import batch_size, varying_alike, with_batch_in_front
from jaxq.kernels._platform_primitive import Target, platform_primitive
from jaxq.kernels._problem import Problem
from jaxq.kernels._ragged import (
    expert_leaf_gradients,
    ragged_transposed_xla_form,
    ragged_xla_form,
)
from jaxq.kernels._ragged_items import rows_with_experts, work_items
from jaxq.kernels._registry import READS_FLOAT8, kernel_module
from jaxq.kernels._remat import save_like_dots
from jaxq.kernels._rows import RowMeta, Rows
from jaxq.meshes import call_on_auto_axes, explicit_spec


def ragged_matmul(
    x: jax.Array, rows: Rows, sizes: jax.Array, meta: RowMeta
) -> jax.Array:
    """Computes `x[i] @ decode(rows[expert of i]).T` for every row i of x.

    Args:
      x: `[m, k]`, sorted by expert. Weights are rounded to its dtype if it is a float
        of at least 16 bits. int8 and float8 mean codes, for weights in an integer
        format: their products are not rounded before the sums.
      rows: matrices `[n, k]` with a leading axis e in every leaf.
      sizes: int32 `[e]`, the number of rows of x of each expert, not negative. If x has
        more rows, the result of the last rows is zero.
      meta: static facts of the rows.

    Returns:
      float32 `[m, n]`. It has derivatives for x, scale, offset and codebook.
    """
    call, leaves = with_leaves(Call(meta, (), "float32"), rows)

    def bind(*operands: jax.Array) -> jax.Array:
        return _bind(ragged_p, [array[None] for array in operands], call)[0]

    n_axis = 1 if meta.layout == "rows" else 2
    spec = PartitionSpec(explicit_spec(x)[0], explicit_spec(rows.data)[n_axis])
    return call_on_auto_axes(bind, spec, x, sizes, *leaves)


def _bind(primitive: Primitive, args: Sequence[jax.Array], call: Call) -> jax.Array:
    """Binds a primitive whose operands may vary over different mesh axes."""
    return primitive.bind(*varying_alike(args), call=call)


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
    e, x_dtype = leaves[call.leaves.index("data")].shape[0], jnp.dtype(x_dtype)
    # Kernels multiply int8 codes in bfloat16, which holds them.
    is_int8 = x_dtype == jnp.int8
    kernel_dtype = jnp.bfloat16 if is_int8 else x_dtype
    x = jax.ShapeDtypeStruct((e, m, call.meta.k), kernel_dtype)
    problem = problem_of(call, x, leaves)
    if is_int8 and isinstance(problem, Problem):
        return dataclasses.replace(problem, x_codes="int8")
    return problem


# The two ways to compute the product.


def ragged_form(
    x: jax.Array, sizes: jax.Array, *leaves: jax.Array, call: Call
) -> jax.Array:
    """Computes what `ragged_p` computes in plain XLA."""
    xla_form = ragged_transposed_xla_form if call.transposed else ragged_xla_form

    if x.dtype == jnp.int8 or is_float8(x.dtype):
        x = x.astype(jnp.float32)

    def product(x: jax.Array, sizes: jax.Array, *leaves: jax.Array) -> jax.Array:
        # `lax.ragged_dot` has no rule for explicit mesh axes. In a program that is
        # lowered with such a mesh in use, all operands are on it.
        def form(x: jax.Array, sizes: jax.Array, *leaves: jax.Array) -> jax.Array:
            return xla_form(x, call.rows(leaves), sizes, call.meta)

        return call_on_auto_axes(form, PartitionSpec(None, None), x, sizes, *leaves)

    return _for_each_element(product, (x, sizes), leaves)


def _for_each_element(
    product: Callable[..., Any],
    arrays: Sequence[jax.Array],
    leaves: Sequence[jax.Array],
) -> Any:
    """`product(*arrays, *leaves)` of each batch element, stacked along axis 0.

    Args:
      product: a function of arrays without the batch axis.
      arrays: each `[b, ...]`.
      leaves: each `[b, ...]`, or each `[1, ...]` if all batch elements share them.
    """
    b = arrays[0].shape[0]
    if b == 1:
        single = product(*(array[0] for array in (*arrays, *leaves)))
        return jax.tree.map(lambda result: result[None], single)
    if leaves[0].shape[0] == b:
        return jax.vmap(product)(*arrays, *leaves)
    # `lax.ragged_dot` has no rule for a batch of rows with the same weights.
    shared = [leaf[0] for leaf in leaves]
    return jax.lax.map(lambda args: product(*args, *shared), tuple(arrays))


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
    operands = kernel_operands(call.rows(merged), call.meta, problem, kernel)
    if kernel not in READS_FLOAT8 or x.dtype == jnp.int8:
        x = x.astype(problem.x_dtype)
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


# Shapes and forms.


def _abstract(x, sizes, *leaves, call: Call):
    del sizes
    data = leaves[call.leaves.index("data")]
    n = data.shape[2 if call.meta.layout == "rows" else 3]
    shape = (*x.shape[:2], call.meta.k if call.transposed else n)
    return x.update(shape=shape, dtype=jnp.dtype(jnp.float32), weak_type=False)


def _form(
    target: Target, avals: Sequence[Any], *, call: Call
) -> Callable[..., jax.Array]:
    """What the primitive computes on a target: a kernel or the XLA form."""
    kernel = _kernel_on(target, avals, call)
    if kernel is not None:
        return functools.partial(
            ragged_kernel_form,
            call=call,
            kernel=kernel,
            device_kind=target.device_kind,
        )
    block_bytes = block_bytes_on(target, 1)
    meta = dataclasses.replace(call.meta, block_bytes=block_bytes)
    return functools.partial(ragged_form, call=dataclasses.replace(call, meta=meta))


def _kernel_on(target: Target, avals: Sequence[Any], call: Call) -> str | None:
    """The kernel that computes a product on a target, or None for the XLA form."""
    x, _, *leaves = avals
    merged = [_without_batch(leaf.shape, leaf.dtype) for leaf in leaves]
    problem = ragged_problem(call, x.shape[0] * x.shape[1], merged, x.dtype)
    product = f"rows times {call.meta.fmt.name} experts with k = {call.meta.k}"
    # A user cannot act on a warning about a derivative.
    return kernel_on(target, problem, "ragged", product, quiet=call.backward)


def _without_batch(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """`[b, e, ...]` as `[b * e, ...]`."""
    return jax.ShapeDtypeStruct((shape[0] * shape[1], *shape[2:]), dtype)


def ragged_tangent_form(
    x: jax.Array, sizes: jax.Array, *args: jax.Array, call: Call
) -> jax.Array:
    """Computes what `ragged_tangent_p` computes, in plain XLA."""
    leaves, dots = args[: len(call.leaves)], args[len(call.leaves) :]
    by_name = dict(zip(call.leaves, leaves, strict=True))
    names = float_leaves(call)

    def product(floats: list[jax.Array]) -> jax.Array:
        replaced = by_name | dict(zip(names, floats, strict=True))
        return ragged_form(x, sizes, *replaced.values(), call=call)

    _, y_dot = jax.jvp(product, ([by_name[name] for name in names],), (list(dots),))
    return y_dot


# `ragged_p(x, sizes, *leaves)`: x `[b, m, k]`, sizes int32 `[b, e]`, and the leaves of
# `Rows`, each `[b, e, ...]`, or `[1, e, ...]` if all batch elements have the same
# weights. The result is float32 `[b, m, n]`. If `call.transposed`, x is `[b, m, n]` and
# the result `[b, m, k]`.
ragged_p = platform_primitive("quantized_ragged_dot", _abstract, _form)
# `ragged_tangent_p(x, sizes, *leaves, *dots)` is the derivative of the product along
# `dots`, the tangents of the float leaves. It is linear in `dots`, and in x.
ragged_tangent_p = platform_primitive(
    "quantized_ragged_dot_tangent",
    _abstract,
    lambda target, avals, call: functools.partial(ragged_tangent_form, call=call),
)


# Derivatives.


def _jvp(primals, tangents, *, call: Call):
    x, sizes, *leaves = primals
    x_dot, _, *leaf_dots = tangents
    y = _bind(ragged_p, primals, call)
    terms = []
    if type(x_dot) is not ad.Zero:
        derivative = dataclasses.replace(call, backward=True)
        terms.append(_bind(ragged_p, [x_dot, sizes, *leaves], derivative))
    by_name = dict(zip(call.leaves, leaf_dots, strict=True))
    dots = [by_name[name] for name in float_leaves(call)]
    if any(type(dot) is not ad.Zero for dot in dots):
        dots = [ad.instantiate_zeros(dot) for dot in dots]
        terms.append(_bind(ragged_tangent_p, [x, sizes, *leaves, *dots], call))
    if not terms:
        return y, ad.Zero.from_primal_value(y)  # pyright: ignore
    return y, functools.reduce(jnp.add, terms)


def _tangent_jvp(primals, tangents, *, call: Call):
    form = functools.partial(ragged_tangent_form, call=call)
    tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
    return jax.jvp(form, tuple(primals), tangents)


def _transpose(ct, x, sizes, *leaves, call: Call):
    assert ad.is_undefined_primal(x), "ragged_p is linear in x only"
    no_cotangents = [None] * (1 + len(leaves))
    if type(ct) is ad.Zero:
        return [ad.Zero(x.aval), *no_cotangents]
    dtype = x.aval.dtype
    backward = dataclasses.replace(call, transposed=not call.transposed, backward=True)
    dx = _bind(ragged_p, [ct.astype(dtype), sizes, *leaves], backward)
    return [dx.astype(dtype), *no_cotangents]


def _tangent_transpose(ct, x, sizes, *args, call: Call):
    """Computes the cotangents of x, or the cotangents of the tangents.

    `args` are the leaves and then the tangents. The leaves have no cotangents.
    """
    no_cotangents = [None] * (1 + len(args))
    if ad.is_undefined_primal(x):
        if type(ct) is ad.Zero:
            return [ad.Zero(x.aval), *no_cotangents]
        shape = jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)
        linear = jax.linear_transpose(
            lambda x: ragged_tangent_form(x, sizes, *args, call=call), shape
        )
        return [*linear(ct), *no_cotangents]
    leaves, dots = args[: len(call.leaves)], args[len(call.leaves) :]
    undefined = [ad.is_undefined_primal(dot) for dot in dots]
    if type(ct) is ad.Zero:
        gradients = [
            ad.Zero(dot.aval) if u else None
            for dot, u in zip(dots, undefined, strict=True)
        ]
    else:
        gradients = _leaf_gradients(x, sizes, leaves, ct, call)
    kept = [g if u else None for g, u in zip(gradients, undefined, strict=True)]
    return [None, None, *(None for _ in leaves), *kept]


def _leaf_gradients(
    x: jax.Array,
    sizes: jax.Array,
    leaves: Sequence[jax.Array],
    ct: jax.Array,
    call: Call,
) -> list[jax.Array]:
    """Gradients of the float leaves, with the shapes of the leaves."""

    def gradients(
        x: jax.Array, sizes: jax.Array, ct: jax.Array, *leaves: jax.Array
    ) -> list[jax.Array]:
        # dW = ct.T @ x. If the weight is transposed, dW = x.T @ ct.
        x, dy = (ct, x) if call.transposed else (x, ct)
        by_name = expert_leaf_gradients(x, call.rows(leaves), sizes, call.meta, dy)
        return [by_name[name] for name in float_leaves(call)]

    of_elements = _for_each_element(gradients, (x, sizes, ct), leaves)
    if leaves[0].shape[0] == x.shape[0]:
        return of_elements
    return [jnp.sum(gradient, axis=0, keepdims=True) for gradient in of_elements]


# Batching.


def _batch(primitive: Primitive, operands: Sequence[jax.Array], dims, *, call: Call):
    """The mapped axis joins the batch axis b. The operands after sizes are weights."""
    size = batch_size(operands, dims)
    (x, sizes, *weights), (x_dim, sizes_dim, *weight_dims) = operands, dims
    x = with_batch_in_front(x, x_dim, size)  # [size * b, m, k]
    sizes = with_batch_in_front(sizes, sizes_dim, size)
    b = x.shape[0] // size
    if any(dim is not None for dim in weight_dims) or weights[0].shape[0] != 1:
        pairs = zip(weights, weight_dims, strict=True)
        weights = [_with_own_weights(weight, dim, size, b) for weight, dim in pairs]
    y = _bind(primitive, [x, sizes, *weights], call)
    return y.reshape(size, b, *y.shape[1:]), 0


def _with_own_weights(leaf: jax.Array, dim: int | None, size: int, b: int) -> jax.Array:
    """A leaf as `[size * b, e, ...]`: a copy for each batch element that shares it."""
    merged = with_batch_in_front(leaf, dim, size)  # [size * (b or 1), e, ...]
    return jnp.repeat(merged, size * b // merged.shape[0], axis=0)


# Registration.

batching.primitive_batchers[ragged_p] = functools.partial(_batch, ragged_p)
ad.primitive_jvps[ragged_p] = _jvp
ad.primitive_transposes[ragged_p] = _transpose
# Experts are a batch axis of the product.
save_like_dots(ragged_p, lambda equation: True)

batching.primitive_batchers[ragged_tangent_p] = functools.partial(
    _batch, ragged_tangent_p
)
ad.primitive_jvps[ragged_tangent_p] = _tangent_jvp
ad.primitive_transposes[ragged_tangent_p] = _tangent_transpose
