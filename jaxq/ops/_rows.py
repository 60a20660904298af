"""A weight as rows `[n, k]`: the one shape every matmul path works on, whatever its axes and blocks were."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxq import formats
from jaxq.kernels import Layout, RowMeta, Rows
from jaxq.qtensor import QTensor, scale_values


def rows_of(qt: QTensor) -> tuple[Rows, RowMeta]:
    """`qt` (no batch axes) as rows; `why_not_rows` must have given None. Scales in a dtype of 16 or 32 bits keep it."""
    geometry, spec = qt.meta.geometry, qt.spec
    meta_unit = qt.meta.pack_unit
    num_rows = math.prod(geometry.shape[a] for a in geometry.kept)
    k = geometry.contracted_size
    if geometry.flat:
        data = qt.data.reshape(num_rows, -1)

        def spread(leaf: jax.Array) -> jax.Array:
            return leaf.reshape(1, 1) if leaf.size == 1 else leaf.reshape(num_rows, -1)

        padded_k = k
    else:
        data = _kept_rows(
            qt.data, geometry.storage_shape[:-1], num_rows, qt.meta.layout
        )
        padded_k = geometry.padded_shape[-1]

        def spread(leaf: jax.Array) -> jax.Array:
            kept = geometry.block_shape[:-1]
            if all(n == 1 for n in leaf.shape[:-1]):
                return leaf.reshape(1, leaf.shape[-1])
            for axis, (block, size) in enumerate(
                zip(kept, geometry.storage_shape, strict=False)
            ):
                if block != 1 and leaf.shape[axis] != size:
                    leaf = jnp.repeat(leaf, block or size, axis=axis)[
                        (slice(None),) * axis + (slice(size),)
                    ]
            return leaf.reshape(num_rows, leaf.shape[-1])

    plain = not isinstance(qt.scale, QTensor) and qt.scale.dtype in (
        jnp.float32,
        jnp.bfloat16,
        jnp.float16,
    )
    scale = spread(qt.scale if plain else scale_values(qt))  # pyright: ignore[reportArgumentType]
    zero_point = None if qt.zero_point is None else spread(qt.zero_point)
    offset = None if qt.offset is None else spread(qt.offset.astype(jnp.float32))
    codebook = None
    if qt.codebook is not None:
        codebook = jnp.stack(
            [spread(qt.codebook[..., i]) for i in range(qt.codebook.shape[-1])], axis=-1
        )
    meta = RowMeta(spec.fmt, qt.meta.packing, meta_unit, k, padded_k, qt.meta.layout)
    return Rows(data, scale, zero_point, offset, codebook), meta


def _kept_rows(
    data: jax.Array, kept_sizes: tuple[int, ...], num_rows: int, layout: Layout
) -> jax.Array:
    """Stored codes with all kept axes flattened, padding of kept axes cut off."""
    whole = tuple(slice(n) for n in kept_sizes)
    if layout == "columns":
        return data[(slice(None), *whole)].reshape(data.shape[0], num_rows)
    data = data[whole]
    return data.reshape(num_rows, data.shape[-1])


def why_not_rows(qt: QTensor) -> str | None:
    """None if `qt` can be taken as rows, else the reason."""
    geometry, packing = qt.meta.geometry, qt.meta.packing
    if not geometry.flat:
        return None
    k, block = geometry.contracted_size, geometry.block_shape[0]
    if geometry.num_blocks != (1,) and (block is None or k % block):
        return f"blocks of {block} run across rows of {k}"
    if geometry.padded_shape != geometry.storage_shape or k % formats.codes_per_pack(
        qt.spec.fmt.bits, packing
    ):
        return "its rows end inside a byte"
    if (
        packing is formats.Packing.HALVES
        and qt.meta.pack_unit is None
        and k != geometry.storage_shape[0]
    ):
        return "its codes are packed across rows"
    return None
