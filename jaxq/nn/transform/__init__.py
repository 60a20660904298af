"""The loop that quantizes a model, and the adapters for the kinds of models.

`_loop.py` has the loop. The loop works on slots (`_slot.py`). There is one slot for
each weight that a rule may quantize. `_nnx.py`, `_linen.py` and `_tree.py` have the
public functions and the adapters. An adapter lists the slots of a model and puts the
results back. `_matching.py` checks all slots before the first one is quantized.
`_weight.py` quantizes one weight. `_folding.py` and `_rotation.py` change a model
before its weights are quantized.
"""

from jaxq.nn.transform._folding import register_folding
from jaxq.nn.transform._linen import quantize_model as linen_quantize_model
from jaxq.nn.transform._model_plan import plan
from jaxq.nn.transform._nnx import quantize_model
from jaxq.nn.transform._nnx_layers import find_layers
from jaxq.nn.transform._rotation import register_rotation
from jaxq.nn.transform._tree import dequantize_params, quantize_params

__all__ = [
    "dequantize_params",
    "find_layers",
    "linen_quantize_model",
    "plan",
    "quantize_model",
    "quantize_params",
    "register_folding",
    "register_rotation",
]
