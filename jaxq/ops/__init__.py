"""Computing with QTensors: one matmul contract, embedding lookup, convolution, attention over a quantized KV cache.

`dot_general` takes arrays or QTensors on either side and decides how to multiply them; `explain` tells what it decided
and why. `matmul`, `einsum` and `@` are spelled in its terms. All of it is plain XLA here, on every platform.
"""

from jaxq.ops._conv import conv_general_dilated, convolve, why_not_codes
from jaxq.ops._dot_general import dot_general, explain
from jaxq.ops._einsum import einsum, einsum_numbers, matmul
from jaxq.ops._plan import Plan
from jaxq.ops._ragged import ragged_dot
from jaxq.ops._take import take
from jaxq.ops.kv_cache import KVCache, KVCacheSpec
from jaxq.qtensor import register_matmul

__all__ = [
    "KVCache",
    "KVCacheSpec",
    "Plan",
    "conv_general_dilated",
    "convolve",
    "dot_general",
    "einsum",
    "einsum_numbers",
    "explain",
    "matmul",
    "ragged_dot",
    "take",
    "why_not_codes",
]

register_matmul(matmul)
