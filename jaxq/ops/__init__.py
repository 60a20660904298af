"""Computing with QTensors: products, convolution, embedding lookup and the KV cache.

`dot_general` takes arrays or QTensors on either side. `matmul`, `einsum` and `@` call
`dot_general`. `_decision.py` decides what runs: an integer dot, a float8 dot, a Pallas
kernel or the XLA form of that kernel. `explain` shows the decision.
"""

from jaxq.ops._conv import conv_general_dilated, convolve
from jaxq.ops._decision import plan_conv
from jaxq.ops._dot_general import dot_general
from jaxq.ops._einsum import einsum, einsum_numbers, matmul
from jaxq.ops._explain import explain
from jaxq.ops._plan import Plan
from jaxq.ops._ragged import ragged_dot
from jaxq.ops._scan_in_place import scan_in_place
from jaxq.ops._take import take
from jaxq.ops.kv_cache import KVCache, KVCacheSpec
from jaxq.qtensor import register_matmul

# Other rooms also import convolve, einsum_numbers and plan_conv.
__all__ = [
    "KVCache",
    "KVCacheSpec",
    "Plan",
    "conv_general_dilated",
    "dot_general",
    "einsum",
    "explain",
    "matmul",
    "ragged_dot",
    "scan_in_place",
    "take",
]

register_matmul(matmul)  # `x @ qt` and `qt @ x`
