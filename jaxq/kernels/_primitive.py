"""One product with a quantized weight as a jax primitive, and the primitive's rules.

`_dispatch.decide` decides at lowering whether a kernel runs.

| transformation | rule |
|---|---|
| lowering | a kernel of the platform, or the XLA form if no kernel is chosen |
| vmap over x | the mapped axis joins the rows of x |
| vmap over the weight | a stack of products, the outermost grid axis of a kernel |
| derivative for x | the same product |
| derivative for scale, offset, codebook | `tangent_p`, which is linear in them |
| transpose for x | the same product with the weight transposed |
| transpose for scale, offset, codebook | their gradient, decoded in blocks of rows |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.sharding import PartitionSpec

from jaxq.kernels import _dispatch
from jaxq.kernels._attention import attention_xla_form
from jaxq.kernels._call import Call, float_leaves, with_leaves, without_index
from jaxq.kernels._codes_product import codes_xla_form
from jaxq.kernels._forms import pallas_form, xla_form
from jaxq.kernels._operands import batch_size, varying_alike, with_batch_in_front
from jaxq.kernels._platform_primitive import Target, platform_primitive
from jaxq.kernels._quantize_activation import activation_xla_form
from jaxq.kernels._ragged_primitive import ragged_form, ragged_tangent_form
from jaxq.kernels._remat import has_stack, save_like_dots
from jaxq.kernels._rows import Rows, as_rows
from jaxq.kernels._xla import rows_gradient
from jaxq.meshes import call_on_auto_axes, explicit_spec


def call_matmul(x: jax.Array, rows: Rows, call: Call) -> jax.Array:
    """Computes `x @ decode(rows).T`, or `x @ decode(rows)` if `call.transposed`.

    Args:
      x: `[m, k]`, or `[m, n]` if transposed. It has a leading axis e if every leaf of
        `rows` has one.
      rows: the weight, `[n, k]`.
      call: static facts of the product. `call.leaves` is not read.

    Returns:
      `[m, n]`, or `[m, k]` if transposed, in `call.out_dtype`.
    """
    call, leaves = with_leaves(call, rows)

    def bind(*args: jax.Array) -> jax.Array:
        if x.ndim == 3:
            return _bind(matmul_p, args, call)
        return _bind(matmul_p, [array[None] for array in args], call)[0]

    n_axis = x.ndim - 2 if call.meta.layout == "rows" else x.ndim - 1
    last = None if call.transposed else explicit_spec(rows.data)[n_axis]
    spec = PartitionSpec(*explicit_spec(x)[:-1], last)
    return call_on_auto_axes(bind, spec, x, *leaves)


def _bind(primitive: Primitive, args: Sequence[jax.Array], call: Call) -> jax.Array:
    """Binds a primitive whose operands may vary over different mesh axes."""
    return primitive.bind(*varying_alike(args), call=call)


# Shapes and forms.


def _abstract(x, *leaves, call: Call):
    """Shape and dtype of the result `[e, m, n]`, or `[e, m, k]` if transposed."""
    data = leaves[call.leaves.index("data")]
    n = data.shape[1 if call.meta.layout == "rows" else 2]
    shape = (*x.shape[:2], call.meta.k if call.transposed else n)
    return x.update(shape=shape, dtype=jnp.dtype(call.out_dtype), weak_type=False)


def _product_form(
    target: Target, avals: Sequence[Any], *, call: Call
) -> Callable[..., jax.Array]:
    """What `matmul_p` computes on a target, as `_dispatch.decide` decides."""
    decision = _dispatch.decide(call, avals[0], avals[1:], target)
    if decision.problem is None:
        return functools.partial(xla_form, call=decision.call)
    return functools.partial(
        pallas_form,
        call=decision.call,
        kernel=decision.backend,
        problem=decision.problem,
        device_kind=target.device_kind,
    )


def _tangent_form(x: jax.Array, *args: jax.Array, call: Call) -> jax.Array:
    """What `tangent_p` computes, in plain XLA."""
    leaves, dots = args[: len(call.leaves)], args[len(call.leaves) :]
    by_name = dict(zip(call.leaves, leaves, strict=True))
    names = float_leaves(call)

    def product(float_leaves: list[jax.Array]) -> jax.Array:
        replaced = by_name | dict(zip(names, float_leaves, strict=True))
        return xla_form(x, *replaced.values(), call=call)

    primals = [by_name[name] for name in names]
    _, y_dot = jax.jvp(product, (primals,), (list(dots),))
    return y_dot


# `matmul_p(x, *leaves)` is the product.
# The codes among the leaves may be a stack with an index, see `Call.leaves`.
matmul_p = platform_primitive("quantized_matmul", _abstract, _product_form)
# `tangent_p(x, *leaves, *dots)` is the derivative of the product along `dots`, the
# tangents of the float leaves (scale, offset, codebook). It is linear in `dots`, and
# in x.
tangent_p = platform_primitive(
    "quantized_matmul_tangent",
    _abstract,
    lambda target, avals, call: functools.partial(_tangent_form, call=call),
)


# Derivatives.


def _jvp(primals, tangents, *, call: Call):
    x, *leaves = primals
    x_dot, *leaf_dots = tangents
    y = _bind(matmul_p, primals, call)
    terms = []
    if type(x_dot) is not ad.Zero:
        derivative = dataclasses.replace(call, backward=True)
        terms.append(_bind(matmul_p, [x_dot, *leaves], derivative))
    by_name = dict(zip(call.leaves, leaf_dots, strict=True))
    dots = [by_name[name] for name in float_leaves(call)]
    if any(type(dot) is not ad.Zero for dot in dots):
        dots = [ad.instantiate_zeros(dot) for dot in dots]
        terms.append(_bind(tangent_p, [x, *leaves, *dots], call))
    if not terms:
        return y, ad.Zero.from_primal_value(y)  # pyright: ignore
    return y, functools.reduce(jnp.add, terms)


def _tangent_jvp(primals, tangents, *, call: Call):
    form = functools.partial(_tangent_form, call=call)
    tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
    return jax.jvp(form, tuple(primals), tangents)


def _transpose(ct, x, *leaves, call: Call):
    assert ad.is_undefined_primal(x), "matmul_p is linear in x only"
    no_cotangents = [None] * len(leaves)
    if type(ct) is ad.Zero:
        return [ad.Zero(x.aval), *no_cotangents]
    dtype = x.aval.dtype
    backward = dataclasses.replace(
        call, transposed=not call.transposed, out_dtype=dtype.name, backward=True
    )
    return [_bind(matmul_p, [ct.astype(dtype), *leaves], backward), *no_cotangents]


def _tangent_transpose(ct, x, *args, call: Call):
    """Computes the cotangents of x, or the cotangents of the tangents.

    `args` are the leaves and then the tangents. The leaves have no cotangents.
    """
    operands = (x, *args)
    undefined = [ad.is_undefined_primal(a) for a in operands]
    if type(ct) is ad.Zero:
        return [
            ad.Zero(operand.aval) if is_undefined else None
            for operand, is_undefined in zip(operands, undefined, strict=True)
        ]
    if undefined[0]:
        shape = jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)
        linear = jax.linear_transpose(
            lambda x: _tangent_form(x, *args, call=call), shape
        )
        (dx,) = linear(ct)
        return [dx, *(None for _ in args)]
    leaves = args[: len(call.leaves)]
    gradients = _leaf_gradients(x, ct, leaves, call)
    first_dot = 1 + len(leaves)
    return [
        *(None for _ in range(first_dot)),
        *(
            gradient if is_undefined else None
            for gradient, is_undefined in zip(
                gradients, undefined[first_dot:], strict=True
            )
        ),
    ]


def _leaf_gradients(
    x: jax.Array, ct: jax.Array, leaves: Sequence[jax.Array], call: Call
) -> list[jax.Array]:
    """Gradients of the float leaves, each with the leading axis e."""
    call, leaves = without_index(call, leaves)

    def gradients(x: jax.Array, ct: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
        rows, meta = as_rows(call.rows(leaves), call.meta)
        # dW = ct.T @ x. If the weight is transposed, dW = x.T @ ct.
        x, ct = (ct, x) if call.transposed else (x, ct)
        gradient = rows_gradient(x, rows, meta, ct)
        return [getattr(gradient, name) for name in float_leaves(call)]

    if x.shape[0] != 1:
        return jax.vmap(gradients)(x, ct, *leaves)
    single = gradients(x[0], ct[0], *(leaf[0] for leaf in leaves))
    return [gradient[None] for gradient in single]


# Batching.


def _batch(args, dims, *, call: Call):
    x, *leaves = args
    if all(dim is None for dim in dims[1:]):
        # The whole batch has one weight. So the rows of all batch elements become the
        # rows of one x.
        batched = jnp.moveaxis(x, dims[0], 1)  # [e, b, m, k]
        e, b, m, k = batched.shape
        y = _bind(matmul_p, [batched.reshape(e, b * m, k), *leaves], call)
        return y.reshape(e, b, m, y.shape[-1]), 1
    size = batch_size(args, dims)
    if not call.has_index:
        merged = [
            with_batch_in_front(array, dim, size)
            for array, dim in zip(args, dims, strict=True)
        ]
    else:
        merged = _merged_with_index(args, dims, size, call)
    y = _bind(matmul_p, merged, call)
    return y.reshape(size, -1, *y.shape[1:]), 0


def _merged_with_index(args, dims, size: int, call: Call) -> list[jax.Array]:
    """The merged operands of a product whose codes are a stack with an index.

    All batch elements share the stack. If it has a batch axis, it becomes one longer
    stack.
    """
    position = 1 + call.leaves.index("data")
    shared = dims[position] is None
    merged = [
        array if shared and i == position else with_batch_in_front(array, dim, size)
        for i, (array, dim) in enumerate(zip(args, dims, strict=True))
    ]
    if not shared:
        num_stacks = args[position].shape[dims[position]]
        index, stack_length = merged[-1], merged[position].shape[0] // num_stacks
        starts = jnp.arange(num_stacks, dtype=index.dtype) * stack_length
        merged[-1] = index + jnp.repeat(starts, index.shape[0] // num_stacks)
    return merged


def _batch_tangent(args, dims, *, call: Call):
    form = functools.partial(_tangent_form, call=call)
    return jax.vmap(form, in_axes=dims)(*args), 0


# Registration.

batching.primitive_batchers[matmul_p] = _batch
ad.primitive_jvps[matmul_p] = _jvp
ad.primitive_transposes[matmul_p] = _transpose
save_like_dots(matmul_p, has_stack)

batching.primitive_batchers[tangent_p] = _batch_tangent
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose

# The function that states each primitive in plain XLA, for code that walks jaxprs.
FORMS = {
    "quantized_matmul": xla_form,
    "quantized_matmul_tangent": _tangent_form,
    "quantized_attention": attention_xla_form,
    "quantized_ragged_dot": ragged_form,
    "quantized_ragged_dot_tangent": ragged_tangent_form,
    "quantize_activation": activation_xla_form,
    "codes_matmul": codes_xla_form,
}
