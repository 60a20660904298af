"""The quantized cache of keys and values, and attention over it."""

from jaxq.ops.kv_cache._cache import KVCache
from jaxq.ops.kv_cache._spec import KVCacheSpec

__all__ = ["KVCache", "KVCacheSpec"]
