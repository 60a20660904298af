"""Sums in a narrow accumulator: one term after the other, each addition rounded once.

Each addition rounds the true sum of two numbers, see `Precision.add`.

| primitive | order of the terms |
|---|---|
| dot_general | contracted axes as `dimension_numbers` lists them, the last one fastest |
| conv_general_dilated | input channel, then kernel position, the last axis fastest |
| reduce_sum | axes in ascending order, the last one fastest |
| reduce_window_sum | window position, the last axis fastest |
| cumsum | along the axis |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
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
    """`lax.dot_general` of rounded operands, summed as `policy` says; float32 (float64 of float64)."""
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers

    def arrange(
        x: jax.Array, contracted, batch
    ) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
        free = [a for a in range(x.ndim) if a not in contracted and a not in batch]
        sizes = tuple(x.shape[a] for a in batch), tuple(x.shape[a] for a in free)
        x = jnp.transpose(x, (*contracted, *batch, *free))
        return x.reshape(
            math.prod(x.shape[: len(contracted)]),
            math.prod(sizes[0]),
            math.prod(sizes[1]),
        ), *sizes

    carrier = _carrier(lhs, rhs)
    a, batch, rows = arrange(
        lhs.astype(carrier), lhs_contracted, lhs_batch
    )  # [k, b, m]
    b, _, columns = arrange(rhs.astype(carrier), rhs_contracted, rhs_batch)  # [k, b, n]
    total = _running_sum(
        lambda ab: ab[0][:, :, None] * ab[1][:, None, :], (a, b), policy
    )
    return total.reshape(*batch, *rows, *columns)


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, policy: Policy, **params
) -> jax.Array:
    """`lax.conv_general_dilated` of rounded operands, as a dot product over patches."""
    carrier = _carrier(lhs, rhs)
    specs, batch_groups = params["dimension_numbers"], params["batch_group_count"]
    groups = (
        params["feature_group_count"] * batch_groups
    )  # at most one of them is not 1
    lhs = jnp.transpose(lhs.astype(carrier), specs.lhs_spec)  # [n, c, *spatial]
    rhs = jnp.transpose(rhs.astype(carrier), specs.rhs_spec)  # [o, c / groups, *kernel]
    patches = lax.conv_general_dilated_patches(
        lhs,
        rhs.shape[2:],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        precision=lax.Precision.HIGHEST,  # products with 0 and 1: exact
    )  # [n, c * kernel, *out]
    num, out = patches.shape[0] // batch_groups, patches.shape[2:]
    if batch_groups > 1:
        a = jnp.moveaxis(
            patches.reshape(groups, num, -1, math.prod(out)), 0, 1
        )  # [n, g, k, out]
    else:
        a = patches.reshape(num, groups, -1, math.prod(out))  # [n, g, k, out]
    b = rhs.reshape(groups, rhs.shape[0] // groups, -1)  # [g, o, k]
    y = dot_general(
        b, a, policy, dimension_numbers=(((2,), (2,)), ((0,), (1,)))
    )  # [g, o, n, out]
    y = jnp.moveaxis(y.reshape(rhs.shape[0], num, *out), 0, 1)  # [n, o, *out]
    return jnp.transpose(y, np.argsort(specs.out_spec).tolist())


def reduce_sum(x: jax.Array, policy: Policy, *, axes, **_) -> jax.Array:
    kept = [a for a in range(x.ndim) if a not in axes]
    x = jnp.transpose(x, (*sorted(axes), *kept))
    flat = x.reshape(math.prod(x.shape[: len(axes)]), *x.shape[len(axes) :])
    return _running_sum(_widened, flat, policy)


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
    config = [
        (*ends, step - 1) for ends, step in zip(padding, base_dilation, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    spans = [
        (w - 1) * d + 1 for w, d in zip(window_dimensions, window_dilation, strict=True)
    ]
    counts = [
        (n - span) // s + 1
        for n, span, s in zip(x.shape, spans, window_strides, strict=True)
    ]

    def at(offset: tuple[int, ...]) -> jax.Array:
        start = [o * d for o, d in zip(offset, window_dilation, strict=True)]
        stop = [
            a + (n - 1) * s + 1
            for a, n, s in zip(start, counts, window_strides, strict=True)
        ]
        return lax.slice(x, start, stop, window_strides)

    terms = jnp.stack(
        [at(offset) for offset in itertools.product(*map(range, window_dimensions))]
    )
    return _running_sum(_widened, terms, policy)


def cumsum(x: jax.Array, policy: Policy, *, axis, reverse) -> jax.Array:
    if policy.chunk is not None:
        raise NotImplementedError(
            "emulate: cumsum has no chunked form. Give it a policy of its own: primitives={'cumsum': Policy(...)}."
        )
    terms = jnp.moveaxis(x, axis, 0)

    def step(total, term):
        total = policy.accumulate.add(total, _widened(term))
        return total, total

    start = _varying_like(jnp.zeros(terms.shape[1:], _carrier(x)), terms)
    return jnp.moveaxis(lax.scan(step, start, terms, reverse=reverse)[1], 0, axis)


# What adds up one term after the other under a narrow `accumulate`.
SUMS: dict[str, Callable[..., jax.Array]] = {
    "conv_general_dilated": conv_general_dilated,
    "cumsum": cumsum,
    "dot_general": dot_general,
    "reduce_sum": reduce_sum,
    "reduce_window_sum": reduce_window_sum,
}


def _carrier(*operands: jax.Array) -> np.dtype:
    return jnp.dtype(
        np.float64 if any(x.dtype == np.float64 for x in operands) else np.float32
    )


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(_carrier(x))


def _running_sum(term: Term, xs: Any, policy: Policy) -> jax.Array:
    """The sum of `term` of every entry of the leading axis of `xs`."""
    length, chunk = len(jax.tree.leaves(xs)[0]), policy.chunk
    shape = jax.eval_shape(
        term, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    )
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
    """`start`, inside `shard_map` varying over the mesh axes that `xs` varies over."""
    axes = {
        axis
        for x in jax.tree.leaves(xs)
        for axis in jax.typeof(x).manual_axis_type.varying
    }
    return lax.pcast(start, tuple(sorted(axes)), to="varying") if axes else start
