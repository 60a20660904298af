"""The plan of attention over a quantized KV cache: which kernel runs, and why."""

from __future__ import annotations

from typing import Any

from jaxq.kernels import Choice
from jaxq.ops._plan import Plan
from jaxq.ops._platform_choice import choose_on, with_choice
from jaxq.ops.kv_cache._arrays import CacheArrays
from jaxq.ops.kv_cache._groups import attention_problem


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
