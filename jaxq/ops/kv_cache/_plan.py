"""The plan of attention over a quantized KV cache: which kernel runs, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxq.kernels import Choice
from jaxq.ops._part_layout import gathered_names
from jaxq.ops._plan import Plan
from jaxq.ops._plan_of_parts import names_of, shapes_of_part, why_not_parts
from jaxq.ops._platform_choice import choose_on, with_choice
from jaxq.ops.kv_cache._arrays import CacheArrays
from jaxq.ops.kv_cache._groups import attention_problem
from jaxq.ops.kv_cache._layout import cache_layout


def plan_attention(
    cache: CacheArrays, q: Any, platform: str, num_devices: int = 1
) -> Plan:
    """The plan of `KVCache.attend`, with the kernel that runs on a platform.

    Args:
      cache: the cache. The leaves may be shapes.
      q: queries `[b, t, n, h]` or their shapes.
      platform: "cpu", "tpu", "cuda", ...
      num_devices: number of devices over which XLA partitions the program.
    """
    _, t, n, _ = q.shape
    if cache.num_groups:
        problem = attention_problem(cache, n // cache.recent_keys.shape[1] * t)
        choice = choose_on(platform, problem, num_devices, "attention")
    else:
        reason = "the cache has no place for quantized groups"
        choice = Choice("xla", reason, preferred=True)
    keys, values = (qt.spec.fmt.name for qt in (cache.keys, cache.values))
    reason = (
        f"groups of {keys} keys and {values} values are decoded, and the newest "
        f"{cache.spec.residual} tokens are read in full precision"
    )
    return with_choice(Plan("attention", "float32", False, reason), choice, platform)


def plan_attention_on_mesh(
    cache: CacheArrays, q: Any, platform: str, mesh: Any
) -> Plan:
    """The plan of each device of a mesh, or that of XLA with the reason."""
    problem = why_not_parts(mesh)
    layout = None
    if problem is None:
        layout = cache_layout(cache, q, names_of, mesh)
        problem = "no device has whole slots and heads of the cache"
    if layout is None:
        plan = plan_attention(cache, q, platform, mesh.size)
        reason = f"{plan.why_no_kernel} ({problem})"
        return dataclasses.replace(plan, why_no_kernel=reason)
    specs = (layout.cache, layout.tokens)
    cache_part, q_part = shapes_of_part((cache, q), specs, mesh)
    leaves = [*jax.tree.leaves(cache), q]
    before = [names_of(leaf) for leaf in leaves]
    slots, heads = cache_part.recent_keys.shape[:2]
    return dataclasses.replace(
        plan_attention(cache_part, q_part, platform),
        num_devices=mesh.size,
        part=f"queries {list(q_part.shape)} by {slots} slots with {heads} key heads",
        gathered=gathered_names(before, jax.tree.leaves(specs)),
    )
