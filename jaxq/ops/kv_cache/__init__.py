"""The quantized KV cache of keys and values, and attention over it.

`_cache.py` contains the class. `_append.py` writes tokens. `_attention.py` reads them.
"""

from jaxq.ops.kv_cache._cache import KVCache
from jaxq.ops.kv_cache._spec import KVCacheSpec

__all__ = ["KVCache", "KVCacheSpec"]
