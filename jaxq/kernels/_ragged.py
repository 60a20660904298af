"""Multiplies each row of x with the quantized matrix of the row's expert, in plain XLA.

The rows of x are sorted by expert. A few rows of every expert's matrix are decoded at a
time. The loops are like the loops of `_xla.py`, with a leading axis e for the experts.
`_ragged_primitive.py` runs a kernel instead where a platform has one.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.kernels._one_step import as_one_step
from jaxq.kernels._rows import (
    RowMeta,
    Rows,
    block_rows,
    columns_of_block,
    decode_field,
    field_length,
    join_fields,
    num_fields,
    num_groups,
    slice_rows,
    split_fields,
)

# dW[e] = dy[rows of e].T @ x[rows of e]
_OUTER = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(),
)


def ragged_xla_form(
    x: jax.Array, rows: Rows, sizes: jax.Array, meta: RowMeta
) -> jax.Array:
    """Computes what `_ragged_primitive.ragged_matmul` computes, with its arguments."""
    rows, meta = _codes_along_rows(rows, meta)
    x_fields = split_fields(x, meta, num_groups(rows))

    def write(
        y: jax.Array, start: jax.Array, block: Rows, num_repeats: jax.Array
    ) -> jax.Array:
        del num_repeats  # writing a row twice does no harm
        weights = [weight.astype(x.dtype) for weight in _decoded_fields(block, meta)]
        terms = [
            _ragged_dot(field, jnp.swapaxes(weight, 1, 2), sizes)  # [m, r]
            for field, weight in zip(x_fields, weights, strict=True)
        ]
        total = functools.reduce(jnp.add, terms)
        return lax.dynamic_update_slice_in_dim(y, total, start, axis=1)

    y = jnp.zeros((x.shape[0], rows.data.shape[1]), jnp.float32)
    return _for_expert_blocks(rows, meta, write, y)


def ragged_transposed_xla_form(
    dy: jax.Array, rows: Rows, sizes: jax.Array, meta: RowMeta
) -> jax.Array:
    """Computes `dy[i] @ decode(rows[expert of i])` for every row i of dy.

    This is the gradient of `ragged_xla_form` for x.

    Args:
      dy: float `[m, n]`, sorted by expert. Weights are rounded to its dtype.
      rows: as for `ragged_xla_form`.
      sizes: as for `ragged_xla_form`.
      meta: as for `ragged_xla_form`.

    Returns:
      float32 `[m, k]`.
    """
    rows, meta = _codes_along_rows(rows, meta)

    def add(
        totals: list[jax.Array], start: jax.Array, block: Rows, num_repeats: jax.Array
    ) -> list[jax.Array]:
        weights = [weight.astype(dy.dtype) for weight in _decoded_fields(block, meta)]
        index = jnp.arange(weights[0].shape[1], dtype=jnp.int32)
        dy_block = columns_of_block(dy, start, index, num_repeats).astype(dy.dtype)
        return [
            total + _ragged_dot(dy_block, weight, sizes)
            for total, weight in zip(totals, weights, strict=True)
        ]

    groups = num_groups(rows)
    zero = jnp.zeros((dy.shape[0], field_length(meta, groups)), jnp.float32)
    zeros = [zero] * num_fields(meta, groups)
    return join_fields(_for_expert_blocks(rows, meta, add, zeros), meta)


def expert_leaf_gradients(
    x: jax.Array, rows: Rows, sizes: jax.Array, meta: RowMeta, dy: jax.Array
) -> dict[str, jax.Array]:
    """Computes the gradients of `ragged_xla_form` for the float leaves of `rows`.

    Args:
      x: `[m, k]`.
      rows: as for `ragged_xla_form`.
      sizes: as for `ragged_xla_form`.
      meta: as for `ragged_xla_form`.
      dy: float32 `[m, n]`, the gradient of the result.

    Returns:
      Gradients of scale, offset and codebook by name. A leaf that is None has none.
    """
    rows, meta = _codes_along_rows(rows, meta)
    x_fields = split_fields(x.astype(jnp.float32), meta, num_groups(rows))
    leaves = {"scale": rows.scale, "offset": rows.offset, "codebook": rows.codebook}
    floats = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    n = rows.data.shape[1]

    def add(
        totals: dict, start: jax.Array, block: Rows, num_repeats: jax.Array
    ) -> dict:
        index = jnp.arange(block.data.shape[1], dtype=jnp.int32)
        dy_block = columns_of_block(dy, start, index, num_repeats)  # [m, r]

        def decode(leaves: dict) -> list[jax.Array]:
            return _decoded_fields(block._replace(**leaves), meta)

        wide = {name: getattr(block, name).astype(jnp.float32) for name in floats}
        d_weights = [
            lax.ragged_dot_general(
                dy_block, field, sizes, _OUTER, preferred_element_type=jnp.float32
            )  # [e, r, field_length]
            for field in x_fields
        ]
        (gradients,) = jax.vjp(decode, wide)[1](d_weights)

        def add_block(total: jax.Array, gradient: jax.Array) -> jax.Array:
            if total.shape[1] == 1 and n != 1:  # all rows share the leaf
                return total + gradient
            old = lax.dynamic_slice_in_dim(total, start, gradient.shape[1], axis=1)
            new = old + gradient
            return lax.dynamic_update_slice_in_dim(total, new, start, axis=1)

        return jax.tree.map(add_block, totals, gradients)

    totals = {name: jnp.zeros(leaf.shape, jnp.float32) for name, leaf in floats.items()}
    totals = _for_expert_blocks(rows, meta, add, totals)
    return {name: total.astype(floats[name].dtype) for name, total in totals.items()}


def _codes_along_rows(rows: Rows, meta: RowMeta) -> tuple[Rows, RowMeta]:
    """The same matrices with their codes along rows."""
    if meta.layout == "rows":
        return rows, meta
    data = jnp.swapaxes(rows.data, 1, 2)
    return rows._replace(data=data), dataclasses.replace(meta, layout="rows")


def _for_expert_blocks(rows: Rows, meta: RowMeta, step, carry):
    """Folds `step(carry, start, block, num_repeats)` over blocks of all experts' rows.

    A block has the same few rows of every expert's matrix. See `_rows.for_blocks` for
    `start` and `num_repeats`.
    """
    e, n = rows.data.shape[:2]
    if 0 in (e, n, meta.k):
        return carry
    count = block_rows(meta, n, 4 * max(meta.padded_k, 1) * e)

    def body(i: jax.Array, carry):
        i = i.astype(jnp.int32)  # int64 if 64-bit types are enabled
        start = jnp.minimum(i * count, n - count)
        block = jax.vmap(lambda matrix: slice_rows(matrix, start, count))(rows)
        return step(carry, start, block, i * count - start)

    if n <= count:

        def single(carry, rows: Rows):
            return step(carry, jnp.int32(0), rows, jnp.int32(0))

        return as_one_step(rows.data, single, lambda carry, rows: carry, carry, rows)
    return lax.fori_loop(0, -(-n // count), body, carry)


def _decoded_fields(rows: Rows, meta: RowMeta) -> list[jax.Array]:
    """Every field of the rows, float32 `[e, r, field_length]`."""
    fields = range(num_fields(meta, num_groups(rows)))
    return [
        jax.vmap(lambda matrix, i=i: decode_field(matrix, meta, i))(rows)
        for i in fields
    ]


def _ragged_dot(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, weights, sizes, preferred_element_type=jnp.float32)
