"""Float activations times a quantized weight, decoding a few rows at a time.

A dequantized weight is 4 to 16 times its quantized size, and on CPU the page faults of that one temporary cost more
than the product. So rows are decoded in blocks that stay in cache, and multiplied at once:

    for each block of rows:  y[rows] = decode(codes[rows]) @ x.T          # [r, k] @ [k, m]

Halves of a byte are never interleaved: each half meets its half of x. The block is the left operand, which the CPU's
matrix library prefers, and y stays [n, m] until the last block is done: a transpose right after a product would be
folded into it, into a form that library does not take. The backward pass runs the same loop: dx sums over blocks, and
scales get exact gradients.

Where there are no cores but matrix units, the same loop runs over larger blocks (`RowMeta.block_bytes`): a dense
product of a decoded weight, which is what a kernel for few rows of x cannot beat at many.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.kernels._rows import (
    RowMeta,
    Rows,
    block_rows,
    decode_field,
    for_blocks,
    join_fields,
    num_fields,
    split_fields,
)


def weight_only_matmul(x: jax.Array, rows: Rows, meta: RowMeta) -> jax.Array:
    """`x @ decode(rows).T` accumulated in float32.

    Args:
      x: `[m, k]` float32, bfloat16 or float16; weights are rounded to its dtype, as on a matrix unit.
      rows: `[n, k]`.
      meta: static facts of the rows.

    Returns:
      float32 `[m, n]`.
    """
    m, n = x.shape[0], rows.data.shape[0]
    if 0 in (m, n, meta.k):
        return jnp.zeros((m, n), jnp.float32)
    groups = rows.scale.shape[-1]
    # A scale that is one along k leaves the sum and joins the result.
    post = groups == 1 and rows.offset is None
    # One lone row of a narrow type is no matrix product for XLA:CPU, which then widens the whole weight.
    wide = jnp.pad(x, ((0, 1), (0, 0))) if m == 1 and x.dtype != jnp.float32 else x
    parts = split_fields(wide, meta, groups)  # [m, k / fields]

    def block(taken: Rows) -> jax.Array:
        weights = [
            decode_field(taken, meta, i, scaled=not post).astype(wide.dtype)
            for i in range(len(parts))
        ]
        total = functools.reduce(
            jnp.add,
            [_dot(w, part, (1, 1)) for w, part in zip(weights, parts, strict=True)],
        )
        return total * taken.scale.astype(jnp.float32) if post else total  # [r, m]

    def write(y: jax.Array, start: jax.Array, taken: Rows) -> jax.Array:
        return lax.dynamic_update_slice(y, block(taken), (start, jnp.zeros_like(start)))

    return for_blocks(rows, meta, write, jnp.zeros((n, wide.shape[0]), jnp.float32)).T[
        :m
    ]


def transposed_matmul(x: jax.Array, rows: Rows, meta: RowMeta) -> jax.Array:
    """`x @ decode(rows)`, accumulated in float32: the weight used the other way round.

    Args:
      x: `[m, n]`.
      rows: `[n, k]`.
      meta: static facts of the rows.

    Returns:
      float32 `[m, k]`.
    """
    m, n, groups = x.shape[0], rows.data.shape[0], rows.scale.shape[-1]
    fields = num_fields(meta, groups)
    if 0 in (m, n, meta.k):
        return jnp.zeros((m, meta.k), jnp.float32)
    count = block_rows(meta, n)
    # The last block starts early so that all have one size; rows met before count as zero the second time.
    index = jnp.arange(count, dtype=jnp.int32)

    def add(
        totals: list[jax.Array], start: jax.Array, taken: Rows, fresh: jax.Array
    ) -> list[jax.Array]:
        part = lax.dynamic_slice_in_dim(x, start, count, axis=1)
        part = jnp.where(index[None, :] >= fresh, part, jnp.zeros((), x.dtype))
        part = (
            jnp.pad(part, ((0, 1), (0, 0)))
            if m == 1 and x.dtype != jnp.float32
            else part
        )
        weights = [
            decode_field(taken, meta, i).astype(part.dtype) for i in range(fields)
        ]
        return [
            t + _dot(part, w, (1, 0))[:m] for t, w in zip(totals, weights, strict=True)
        ]

    zeros = [jnp.zeros((m, meta.padded_k // fields), jnp.float32)] * fields
    return join_fields(for_blocks(rows, meta, add, zeros, tell_fresh=True), meta)


def rows_gradient(x: jax.Array, rows: Rows, meta: RowMeta, dy: jax.Array) -> Rows:
    """Cotangents of scale, offset and codebook for `y = x @ decode(rows).T`; None for the others.

    Args:
      x: `[m, k]`.
      rows: `[n, k]`.
      meta: static facts of the rows.
      dy: `[m, n]`.
    """
    groups, n = rows.scale.shape[-1], rows.data.shape[0]
    leaves = {"scale": rows.scale, "offset": rows.offset, "codebook": rows.codebook}
    floats = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    parts = split_fields(x.astype(jnp.float32), meta, groups)
    dy = dy.astype(jnp.float32)
    count = block_rows(meta, n)

    def add(totals: dict, start: jax.Array, taken: Rows, fresh: jax.Array) -> dict:
        dy_part = lax.dynamic_slice_in_dim(dy, start, count, axis=1)  # [m, r]
        dy_part = jnp.where(
            jnp.arange(count, dtype=jnp.int32)[None, :] >= fresh, dy_part, 0.0
        )

        def decode(leaves: dict) -> list[jax.Array]:
            return [
                decode_field(taken._replace(**leaves), meta, i)
                for i in range(len(parts))
            ]

        _, pull = jax.vjp(
            decode, {name: getattr(taken, name).astype(jnp.float32) for name in floats}
        )
        (found,) = pull(
            [_dot(dy_part, part, (0, 0)) for part in parts]
        )  # from dW: [r, k / fields]

        def put(total: jax.Array, new: jax.Array) -> jax.Array:
            if total.shape[0] == 1 != n:  # all rows share it
                return total + new
            old = lax.dynamic_slice_in_dim(total, start, count, axis=0)
            return lax.dynamic_update_slice_in_dim(total, old + new, start, axis=0)

        return jax.tree.map(put, totals, found)

    zeros = {name: jnp.zeros(leaf.shape, jnp.float32) for name, leaf in floats.items()}
    if 0 not in (x.shape[0], n, meta.k):
        zeros = for_blocks(rows, meta, add, zeros, tell_fresh=True)
    found = {name: leaf.astype(floats[name].dtype) for name, leaf in zeros.items()}
    return Rows(**{name: found.get(name) for name in Rows._fields})  # pyright: ignore[reportArgumentType]


def _dot(a: jax.Array, b: jax.Array, contracting: tuple[int, int]) -> jax.Array:
    dims = (((contracting[0],), (contracting[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
