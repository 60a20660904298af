"""Attention over the quantized groups of a KV cache, as a jax primitive.

The primitive gives the state of an online softmax after all quantized groups. The
caller adds the tokens in full precision to this state. When jax lowers a program for a
platform, the primitive becomes a Pallas kernel of this platform or the XLA form. The
caller supplies the XLA form.

| transformation | rule |
|---|---|
| lowering | a kernel of the platform, or the XLA form if no kernel is chosen |
| vmap | the mapped axis joins the slots |
| derivatives | those of the XLA form |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching
from jax.sharding import PartitionSpec

from jaxq.kernels._attention_problem import AttentionProblem
from jaxq.kernels._choice import kernel_on
from jaxq.kernels._operands import batch_size, varying_alike, with_batch_in_front
from jaxq.kernels._platform_primitive import Target, platform_primitive
from jaxq.kernels._registry import kernel_module
from jaxq.meshes import call_on_auto_axes, explicit_spec

# (top, total, sums), float32: `[b, m, n]`, the same, and `[b, m, n, h]`.
State = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """Static facts of one attention over quantized groups.

    Attributes:
      form: the XLA form, `form(q, positions, tokens, num_places, *leaves) -> State`. It
        is compared by value.
      problem: the attention as kernels see it, or the reason why no kernel computes it.
        Its leaves are then the codes and scales of keys, and those of values.
    """

    form: Callable[..., State]
    problem: AttentionProblem | str


def call_attention(*operands: jax.Array, call: AttentionCall) -> State:
    """Computes the softmax state of queries over the quantized groups of a cache.

    Args:
      *operands: q `[b, m, n, h]`; positions int32 `[b, n]` of the queries; tokens int32
        `[b, groups, group]`, the position of each stored token, negative for tokens
        that are not read; num_places int32 `[b]`, such that later places of a slot have
        no tokens to read; and the leaves of the cache, each `[b, m, groups, ...]`.
      call: static facts.
    """

    def bind(*operands: jax.Array) -> list[jax.Array]:
        return attention_p.bind(*varying_alike(operands), call=call)

    q_spec = explicit_spec(operands[0])
    per_query = PartitionSpec(*q_spec[:3])
    specs = [per_query, per_query, PartitionSpec(*q_spec)]
    top, total, sums = call_on_auto_axes(bind, specs, *operands)
    return top, total, sums


def attention_kernel_form(
    *operands: jax.Array,
    call: AttentionCall,
    kernel: str,
    interpret: bool = False,
    **tiles: int,
) -> State:
    """Computes what `call_attention` computes by a kernel.

    Args:
      *operands: as for `call_attention`.
      call: static facts. `call.problem` must be a problem that the kernel accepts.
      kernel: name of the kernel.
      interpret: True to run the kernel's interpreter, on any platform.
      **tiles: sizes that replace those of the kernel's `default_tiles`.
    """
    q, positions, tokens, num_places, *leaves = operands
    keys, key_scale, values, value_scale = leaves
    problem, module = call.problem, kernel_module(kernel)
    assert isinstance(problem, AttentionProblem), problem
    p = problem
    top, total, sums = module.read_groups(
        q,
        positions,
        tokens,
        num_places,
        keys.reshape(p.b, p.m, p.groups, p.rows, p.h),
        key_scale.reshape(p.b, p.m, p.groups, p.h),
        values.reshape(p.b, p.m, p.groups, p.rows, p.h),
        value_scale.reshape(p.b, p.m, p.groups, p.rows, p.parts),
        problem=p,
        tiles=module.default_tiles(p) | tiles,
        interpret=interpret,
    )
    return _merge_splits(top, total, sums)


def _merge_splits(top: jax.Array, total: jax.Array, sums: jax.Array) -> State:
    """Merges the softmax states of the splits, which are on axis 2."""
    largest = jnp.max(top, axis=2)
    share = jnp.exp(top - largest[:, :, None])  # [b, m, splits, n]
    merged_total = jnp.sum(total * share, axis=2)
    return largest, merged_total, jnp.sum(sums * share[..., None], axis=2)


def attention_xla_form(*operands: jax.Array, call: AttentionCall) -> State:
    """Computes what `call_attention` computes in plain XLA."""
    return call.form(*operands)


# Rules of the primitive.


def _abstract(q, *operands, call: AttentionCall):
    del operands, call
    b, m, n, h = q.shape
    per_query, per_channel = (
        q.update(shape=shape, dtype=jnp.dtype(jnp.float32), weak_type=False)
        for shape in ((b, m, n), (b, m, n, h))
    )
    return [per_query, per_query, per_channel]


def _form(
    target: Target, avals: Sequence[Any], *, call: AttentionCall
) -> Callable[..., State]:
    """What the primitive computes on a target: a kernel or the XLA form."""
    del avals
    product = "attention over a quantized KV cache"
    kernel = kernel_on(target, call.problem, "attention", product)
    if kernel is not None:
        return functools.partial(attention_kernel_form, call=call, kernel=kernel)
    return functools.partial(attention_xla_form, call=call)


def _jvp(primals, tangents, *, call: AttentionCall):
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    primals_out, tangents_out = jax.jvp(call.form, tuple(primals), tuple(tangents))
    return list(primals_out), list(tangents_out)


def _batch(operands: Sequence[jax.Array], dims, *, call: AttentionCall):
    size = batch_size(operands, dims)
    merged = [
        with_batch_in_front(x, dim, size) for x, dim in zip(operands, dims, strict=True)
    ]
    problem = call.problem
    if isinstance(problem, AttentionProblem):
        problem = dataclasses.replace(problem, b=problem.b * size)
    call = dataclasses.replace(call, problem=problem)
    state = attention_p.bind(*varying_alike(merged), call=call)
    return [x.reshape(size, -1, *x.shape[1:]) for x in state], [0, 0, 0]


# `attention_p(q, positions, tokens, num_places, *leaves)`.
attention_p = platform_primitive(
    "quantized_attention", _abstract, _form, multiple_results=True
)
batching.primitive_batchers[attention_p] = _batch
ad.primitive_jvps[attention_p] = _jvp
