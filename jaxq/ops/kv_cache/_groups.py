"""Attention over the quantized groups of a KV cache.

`read_groups` calls a jax primitive (`jaxq.kernels`). On a TPU or a GPU the primitive
becomes a Pallas kernel, if there is one for the cache. Everywhere else it becomes
`_BlockByBlock`, which dequantizes one block of groups at a time.

Letters in shapes: b slots, m key heads, r query heads of a key head, t queries, n = r
t, h the size of a head, g tokens of a group, p groups in a block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.kernels import (
    KERNEL_SCALES,
    AttentionCall,
    AttentionProblem,
    call_attention,
)
from jaxq.ops.kv_cache._arrays import (
    CacheArrays,
    dequantize_groups,
    newest_in_ring,
    num_quantized,
    tokens_per_row,
)
from jaxq.ops.kv_cache._online_softmax import Block, Queries, Softmax, fold_many, start
from jaxq.ops.kv_cache._spec import KVCacheSpec
from jaxq.qtensor import QTensor


def read_groups(cache: CacheArrays, queries: Queries, block: int) -> Softmax:
    """The softmax state of queries after the quantized groups of a cache are read.

    Args:
      cache: a cache with at least one place for a group.
      queries: queries of the cache's dtype.
      block: tokens that are dequantized at a time if no kernel runs.
    """
    operands, call = group_operands(cache, queries, block)
    top, total, sums = call_attention(*operands, call=call)
    shape = queries.rows.shape
    return Softmax(
        top.reshape(shape[:-1]), total.reshape(shape[:-1]), sums.reshape(shape)
    )


def group_operands(
    cache: CacheArrays, queries: Queries, block: int
) -> tuple[list[jax.Array], AttentionCall]:
    """The operands of `jaxq.kernels.call_attention`, and its static facts."""
    spec, num_groups = cache.spec, cache.num_groups
    b, m, r, t, h = queries.rows.shape
    filled = num_quantized(cache.lengths, spec)  # [b]
    group_of_place = newest_in_ring(filled - 1, num_groups)  # [b, num_groups]
    in_group = jnp.arange(spec.group, dtype=jnp.int32)[None, None]
    tokens = group_of_place[:, :, None] * spec.group + in_group  # [b, num_groups, g]
    # The newest c tokens are read in full precision, even if their group is already
    # quantized.
    is_old = tokens < (cache.lengths - spec.residual)[:, None, None]
    is_read = (group_of_place >= 0)[:, :, None] & is_old
    leaves, structure = jax.tree.flatten((cache.keys, cache.values))
    operands = [
        queries.rows.reshape(b, m, r * t, h),
        jnp.tile(queries.positions, (1, r)),  # [b, n]
        jnp.where(is_read, tokens, -1),
        jnp.minimum(filled, num_groups),
        *leaves,
    ]
    form = _BlockByBlock(structure, spec, queries.scale, queries.window, block)
    problem = attention_problem(cache, r * t, queries.scale)
    return operands, AttentionCall(form, problem)


def attention_problem(
    cache: CacheArrays, num_queries: int, scale: float = 1.0
) -> AttentionProblem | str:
    """The attention as kernels see it, or the reason why no kernel computes it.

    Args:
      cache: a cache with at least one place for a group. The leaves may be shapes.
      num_queries: queries that read one key head, n.
      scale: scores are multiplied by this number.
    """
    b, m, _, h = cache.recent_keys.shape
    problem = AttentionProblem(
        b=b,
        m=m,
        n=num_queries,
        h=h,
        groups=cache.num_groups,
        group=cache.spec.group,
        bits=cache.keys.spec.fmt.bits,
        dtype=cache.dtype.name,
        scale=float(scale),
        window=cache.window,
    )
    return _why_no_kernel(cache, problem) or problem


@dataclasses.dataclass(frozen=True)
class _BlockByBlock:
    """Reads the groups in plain XLA; compared by value.

    Attributes:
      structure: treedef of the keys and values of the cache.
      spec: how the cache is quantized.
      scale: scores are multiplied by this number.
      window: as in `Queries`.
      block: tokens that are dequantized at a time.
    """

    structure: Any
    spec: KVCacheSpec
    scale: float
    window: int | None
    block: int

    def __call__(
        self,
        q: jax.Array,
        positions: jax.Array,
        tokens: jax.Array,
        num_places: jax.Array,
        *leaves: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The state of the online softmax; see `jaxq.kernels.call_attention`."""
        qtensors = jax.tree.unflatten(self.structure, leaves)
        b, num_groups, group = tokens.shape
        per_block = min(num_groups, max(1, self.block // group))  # p
        num_used = jnp.max(num_places)  # of the longest slot

        def block_at(i: jax.Array) -> Block:
            # The last block ends with the last place, so it may overlap the block
            # before. Places that the block before has read are marked as not valid.
            at = jnp.minimum(i * per_block, num_groups - per_block)
            stored = jax.tree.map(
                lambda leaf: lax.dynamic_slice_in_dim(leaf, at, per_block, 2), qtensors
            )
            keys, values = dequantize_groups(*stored, spec=self.spec, dtype=q.dtype)
            block_tokens = lax.dynamic_slice_in_dim(tokens, at, per_block, 1)
            places = at + jnp.arange(per_block, dtype=jnp.int32)  # [p]
            is_repeated = (places < i * per_block)[None, :, None]
            valid = (block_tokens >= 0) & ~is_repeated  # [b, p, g]
            return Block(
                keys, values, block_tokens.reshape(b, -1), valid.reshape(b, -1)
            )

        # All queries of a key head are rows of one matrix.
        queries = Queries(q[:, :, None], positions, self.scale, self.window)
        state = fold_many(start(queries), -(-num_used // per_block), block_at, queries)
        return state.top[:, :, 0], state.total[:, :, 0], state.sums[:, :, 0]


def _why_no_kernel(cache: CacheArrays, problem: AttentionProblem) -> str | None:
    """Why kernels cannot read the arrays of a cache; None if they can."""
    p, keys, values = problem, cache.keys, cache.values
    for name, qt in (("keys", keys), ("values", values)):
        reason = _why_not_codes(qt)
        if reason is not None:
            return f"{name} {reason}"
    if keys.spec.fmt.bits != values.spec.fmt.bits:
        return "kernels read keys and values of the same number of bits"
    if keys.meta.layout != "columns":
        return (
            "keys lie along rows, as in files; use "
            'dataclasses.replace(cache, keys=jaxq.relayout(cache.keys, "columns"))'
        )
    if keys.scale.shape[3:] != (p.h, 1):
        return "kernels read keys with one scale for each channel of a group"
    one_scale = tokens_per_row(values, cache.spec) == p.parts
    if not one_scale or values.scale.shape[3:] != (p.rows, p.parts):
        return "kernels read values with one scale for each token"
    return None


def _why_not_codes(qt: QTensor) -> str | None:
    """Why kernels cannot decode these codes; None if they can."""
    fmt, packing = qt.spec.fmt, qt.meta.packing
    is_signed = fmt.kind == "integer" and fmt.code_dtype == np.int8
    if not is_signed or fmt.bits not in (4, 8):
        return f"are {fmt.name}, and kernels decode only int8 and int4"
    if any(x is not None for x in (qt.zero_point, qt.offset, qt.codebook)):
        return "have zero points, offsets or a codebook, and kernels decode only scales"
    if isinstance(qt.scale, QTensor) or qt.scale.dtype.name not in KERNEL_SCALES:
        return f"have scales in other dtypes than {', '.join(KERNEL_SCALES)}"
    if fmt.bits == 4 and packing is not formats.Packing.HALVES:
        return f"are packed as {packing.value!r}, and kernels read 'halves'"
    return None
