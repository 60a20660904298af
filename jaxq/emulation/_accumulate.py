"""Sums in a narrow accumulator: one term after the other, each addition rounded once.

Each addition rounds the exact sum of two numbers, see `Precision.add`. The order of the
terms is part of the result:

| primitive | order of the terms |
|---|---|
| dot_general | contracted axes in the listed order, the last one fastest |
| conv_general_dilated | input channel, then kernel position, the last axis fastest |
| reduce_sum | axes in ascending order, the last one fastest |
| reduce_window_sum | window position, the last axis fastest |
| cumsum | along the axis |

All functions return float32, or float64 if an operand is float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.emulation._precision import Policy

Term = Callable[[Any], jax.Array]


def dot_general(
    lhs: jax.Array, rhs: jax.Array, policy: Policy, *, dimension_numbers, **_
) -> jax.Array:
    """`lax.dot_general` of rounded operands, summed as `policy` says."""
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    carrier = _common_carrier(lhs, rhs)
    a, batch, rows = _contracted_first(lhs.astype(carrier), lhs_contracted, lhs_batch)
    b, _, columns = _contracted_first(rhs.astype(carrier), rhs_contracted, rhs_batch)

    def outer_product(slices):
        left, right = slices  # [b, m], [b, n]
        return left[:, :, None] * right[:, None, :]  # [b, m, n]

    total = _running_sum(outer_product, (a, b), policy)  # a [k, b, m], b [k, b, n]
    return total.reshape(*batch, *rows, *columns)


def _contracted_first(
    x: jax.Array, contracted: Sequence[int], batch: Sequence[int]
) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """`x` as `[k, b, free]`, and the sizes of its batch axes and of its free axes."""
    free = [a for a in range(x.ndim) if a not in contracted and a not in batch]
    batch_sizes = tuple(x.shape[a] for a in batch)
    free_sizes = tuple(x.shape[a] for a in free)
    x = jnp.transpose(x, (*contracted, *batch, *free))
    k = math.prod(x.shape[: len(contracted)])
    x = x.reshape(k, math.prod(batch_sizes), math.prod(free_sizes))
    return x, batch_sizes, free_sizes


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, policy: Policy, **params
) -> jax.Array:
    """`lax.conv_general_dilated` of rounded operands, as a dot product over patches."""
    carrier = _common_carrier(lhs, rhs)
    specs, batch_groups = params["dimension_numbers"], params["batch_group_count"]
    # At most one of the two counts is not 1.
    groups = params["feature_group_count"] * batch_groups
    lhs = jnp.transpose(lhs.astype(carrier), specs.lhs_spec)  # [n, c, *spatial]
    rhs = jnp.transpose(rhs.astype(carrier), specs.rhs_spec)  # [o, c / groups, *kernel]
    patches = lax.conv_general_dilated_patches(
        lhs,
        rhs.shape[2:],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        precision=lax.Precision.HIGHEST,  # exact: products with 0 and 1
    )  # [n, c * kernel, *out]
    num, out = patches.shape[0] // batch_groups, patches.shape[2:]
    if batch_groups > 1:
        a = patches.reshape(groups, num, -1, math.prod(out))
        a = jnp.moveaxis(a, 0, 1)  # [n, g, k, out]
    else:
        a = patches.reshape(num, groups, -1, math.prod(out))  # [n, g, k, out]
    b = rhs.reshape(groups, rhs.shape[0] // groups, -1)  # [g, o, k]
    numbers = (((2,), (2,)), ((0,), (1,)))
    y = dot_general(b, a, policy, dimension_numbers=numbers)  # [g, o, n, out]
    y = jnp.moveaxis(y.reshape(rhs.shape[0], num, *out), 0, 1)  # [n, o, *out]
    return jnp.transpose(y, np.argsort(specs.out_spec).tolist())


def reduce_sum(x: jax.Array, policy: Policy, *, axes, **_) -> jax.Array:
    """The sum of `x` over `axes`."""
    kept = [a for a in range(x.ndim) if a not in axes]
    x = jnp.transpose(x, (*sorted(axes), *kept))
    num_terms = math.prod(x.shape[: len(axes)])
    terms = x.reshape(num_terms, *x.shape[len(axes) :])
    return _running_sum(_as_carrier_dtype, terms, policy)


def reduce_window_sum(
    x: jax.Array,
    policy: Policy,
    *,
    window_dimensions,
    window_strides,
    padding,
    base_dilation,
    window_dilation,
) -> jax.Array:
    """The sum of `x` over the positions of a sliding window."""
    config = [
        (low, high, step - 1)
        for (low, high), step in zip(padding, base_dilation, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    spans = [
        (size - 1) * step + 1
        for size, step in zip(window_dimensions, window_dilation, strict=True)
    ]
    counts = [
        (size - span) // stride + 1
        for size, span, stride in zip(x.shape, spans, window_strides, strict=True)
    ]

    def term_at(offset: tuple[int, ...]) -> jax.Array:
        """The numbers that all windows have at one position, `[*counts]`."""
        start = [o * step for o, step in zip(offset, window_dilation, strict=True)]
        stop = [
            first + (count - 1) * stride + 1
            for first, count, stride in zip(start, counts, window_strides, strict=True)
        ]
        return lax.slice(x, start, stop, window_strides)

    offsets = itertools.product(*map(range, window_dimensions))
    terms = jnp.stack([term_at(offset) for offset in offsets])
    return _running_sum(_as_carrier_dtype, terms, policy)


def cumsum(x: jax.Array, policy: Policy, *, axis, reverse) -> jax.Array:
    """The running sums of `x` along an axis."""
    if policy.chunk is not None:
        raise NotImplementedError(
            "emulate: cumsum has no chunked form. Give cumsum a separate policy: "
            "primitives={'cumsum': Policy(...)}."
        )
    terms = jnp.moveaxis(x, axis, 0)

    def step(total, term):
        total = policy.accumulate.add(total, _as_carrier_dtype(term))
        return total, total

    zeros = jnp.zeros(terms.shape[1:], _common_carrier(x))
    start = _varying_like(zeros, terms)
    _, sums = lax.scan(step, start, terms, reverse=reverse)
    return jnp.moveaxis(sums, 0, axis)


# The sums by primitive. They add one term after the other under a narrow `accumulate`.
SUMS: dict[str, Callable[..., jax.Array]] = {
    "conv_general_dilated": conv_general_dilated,
    "cumsum": cumsum,
    "dot_general": dot_general,
    "reduce_sum": reduce_sum,
    "reduce_window_sum": reduce_window_sum,
}


def _common_carrier(*operands: jax.Array) -> np.dtype:
    """float64 if an operand is float64, else float32."""
    is_wide = any(x.dtype == np.float64 for x in operands)
    return jnp.dtype(np.float64 if is_wide else np.float32)


def _as_carrier_dtype(x: jax.Array) -> jax.Array:
    return x.astype(_common_carrier(x))


def _running_sum(term: Term, xs: Any, policy: Policy) -> jax.Array:
    """Sums `term(x)` over the entries x of the leading axis of `xs`, in their order.

    With `policy.chunk`, each chunk has a narrow running sum that starts at zero. The
    sums of the chunks are added in the dtype of the terms.
    """
    length, chunk = len(jax.tree.leaves(xs)[0]), policy.chunk
    entry = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    shape = jax.eval_shape(term, entry)
    zeros = _varying_like(jnp.zeros(shape.shape, shape.dtype), xs)

    def add(total, x):
        return policy.accumulate.add(total, term(x)), None

    if chunk is None or chunk >= length:
        return lax.scan(add, zeros, xs)[0]

    def add_chunk(total, part):
        return total + lax.scan(add, zeros, part)[0], None

    whole = length // chunk * chunk
    parts = jax.tree.map(
        lambda x: x[:whole].reshape(whole // chunk, chunk, *x.shape[1:]), xs
    )
    total = lax.scan(add_chunk, zeros, parts)[0]
    if whole < length:
        total, _ = add_chunk(total, jax.tree.map(lambda x: x[whole:], xs))
    return total


def _varying_like(start: jax.Array, xs: Any) -> jax.Array:
    """`start`, marked to vary over the mesh axes that `xs` varies over.

    `lax.scan` needs this inside `shard_map`: its carry must have one type throughout.
    """
    axes: set[str] = set()
    for x in jax.tree.leaves(xs):
        axes |= set(jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(start, tuple(sorted(axes)), to="varying") if axes else start
