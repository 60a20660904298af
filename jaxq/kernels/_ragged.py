"""Rows of x sorted by expert, each times the decoded matrix of its expert, a few rows of every matrix at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes, lax

from jaxq.kernels._rows import (
    RowMeta,
    Rows,
    block_rows,
    decode_field,
    join_fields,
    num_fields,
    slice_rows,
    split_fields,
)

# dW[e] = dy[rows of e].T @ x[rows of e]
_OUTER = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ragged_matmul(
    x: jax.Array, rows: Rows, sizes: jax.Array, meta: RowMeta
) -> jax.Array:
    """`x[i] @ decode(rows[expert of i]).T`.

    Args:
      x: float `[m, k]`, sorted by expert; weights are rounded to its dtype.
      rows: matrices `[n, k]` with a leading axis e in every leaf, codes along rows.
      sizes: int32 `[e]`, how many rows of x each expert has; rows beyond them give zeros.
      meta: static facts of the rows.

    Returns:
      float32 `[m, n]`.
    """
    parts = split_fields(x, meta, _groups(rows))

    def write(
        y: jax.Array, start: jax.Array, weights: list[jax.Array], _: jax.Array
    ) -> jax.Array:
        products = [
            _ragged(part, jnp.swapaxes(w, 1, 2), sizes)
            for part, w in zip(parts, weights, strict=True)
        ]
        return lax.dynamic_update_slice_in_dim(
            y, functools.reduce(jnp.add, products), start, axis=1
        )

    return _for_blocks(
        x.dtype,
        rows,
        meta,
        write,
        jnp.zeros((x.shape[0], rows.data.shape[1]), jnp.float32),
    )


def _forward(x, rows, sizes, meta):
    return ragged_matmul(x, rows, sizes, meta), (x, rows, sizes)


def _backward(meta: RowMeta, saved: tuple[jax.Array, Rows, jax.Array], dy: jax.Array):
    x, rows, sizes = saved
    parts = split_fields(x.astype(jnp.float32), meta, _groups(rows))
    floats = {
        name: leaf
        for name in ("scale", "offset", "codebook")
        if (leaf := getattr(rows, name)) is not None
    }
    n = rows.data.shape[1]

    def to_x(
        totals: list[jax.Array],
        start: jax.Array,
        weights: list[jax.Array],
        fresh: jax.Array,
    ) -> list[jax.Array]:
        part = _fresh_columns(dy, start, weights[0].shape[1], fresh).astype(x.dtype)
        return [
            t + _ragged(part, w, sizes) for t, w in zip(totals, weights, strict=True)
        ]

    def to_leaves(
        totals: dict, start: jax.Array, taken: Rows, fresh: jax.Array
    ) -> dict:
        part = _fresh_columns(dy, start, taken.data.shape[1], fresh)

        def decode(leaves: dict) -> list[jax.Array]:
            return _decode(taken._replace(**leaves), meta)

        wide = {name: getattr(taken, name).astype(jnp.float32) for name in floats}
        outer = [
            lax.ragged_dot_general(
                part, p, sizes, _OUTER, preferred_element_type=jnp.float32
            )
            for p in parts
        ]
        (found,) = jax.vjp(decode, wide)[1](outer)

        def put(total: jax.Array, new: jax.Array) -> jax.Array:
            if total.shape[1] == 1 != n:  # all rows share it
                return total + new
            old = lax.dynamic_slice_in_dim(total, start, new.shape[1], axis=1)
            return lax.dynamic_update_slice_in_dim(total, old + new, start, axis=1)

        return jax.tree.map(put, totals, found)

    zeros = [jnp.zeros((x.shape[0], part.shape[1]), jnp.float32) for part in parts]
    dx = join_fields(_for_blocks(x.dtype, rows, meta, to_x, zeros), meta)
    totals = {name: jnp.zeros(leaf.shape, jnp.float32) for name, leaf in floats.items()}
    totals = _for_blocks(None, rows, meta, to_leaves, totals)
    grads = {
        name: np.zeros(leaf.shape, dtypes.float0)
        for name, leaf in rows._asdict().items()
        if leaf is not None
    }
    grads |= {name: leaf.astype(floats[name].dtype) for name, leaf in totals.items()}
    none = np.zeros(sizes.shape, dtypes.float0)
    return dx.astype(x.dtype), Rows(**(dict.fromkeys(Rows._fields) | grads)), none  # pyright: ignore[reportArgumentType]


ragged_matmul.defvjp(_forward, _backward)


def _for_blocks(dtype, rows: Rows, meta: RowMeta, step, carry):
    """Folds `step(carry, start, decoded parts or the rows themselves, how many were met before)` over blocks of n."""
    e, n = rows.data.shape[:2]
    if 0 in (e, n, meta.k):
        return carry
    count = block_rows(meta, n, 4 * max(meta.padded_k, 1) * e)

    def body(i: jax.Array, carry):
        i = i.astype(jnp.int32)
        start = jnp.minimum(i * count, n - count)
        taken = jax.vmap(lambda one: slice_rows(one, start, count))(rows)
        weights = (
            taken if dtype is None else [w.astype(dtype) for w in _decode(taken, meta)]
        )
        return step(carry, start, weights, i * count - start)

    return lax.fori_loop(0, -(-n // count), body, carry)


def _decode(rows: Rows, meta: RowMeta) -> list[jax.Array]:
    """Parts of every row, float32 `[e, r, k / parts]`."""
    return [
        jax.vmap(lambda one, i=i: decode_field(one, meta, i))(rows)
        for i in range(num_fields(meta, _groups(rows)))
    ]


def _groups(rows: Rows) -> int:
    assert rows.scale is not None, "a QTensor has scales"
    return rows.scale.shape[-1]


def _fresh_columns(
    dy: jax.Array, start: jax.Array, count: int, fresh: jax.Array
) -> jax.Array:
    """`count` columns from `start` on; those met before count as zero."""
    part = lax.dynamic_slice_in_dim(dy, start, count, axis=1)
    return jnp.where(jnp.arange(count, dtype=jnp.int32)[None, :] >= fresh, part, 0.0)


def _ragged(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, weights, sizes, preferred_element_type=jnp.float32)
