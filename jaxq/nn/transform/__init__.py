"""The loop that quantizes a model, and the adapters for the kinds of models.

`_loop.py` has the loop. The loop works on slots (`_slot.py`). There is one slot for
each weight that a rule may quantize. `_nnx.py`, `_linen.py` and `_tree.py` have the
public functions and the adapters. An adapter lists the slots of a model and puts the
results back. `_matching.py` checks all slots before the first one is quantized.
`_weight.py` quantizes one weight. `_folding.py` and `_rotation.py` change a model
before its weights are quantized.
"""

from jaxq.nn.transform._batch_norm import (
    features_axis,
    find_norms,
    fold_batch_norm,
    fold_norms,
)
from jaxq.nn.transform._folding import register_folding
from jaxq.nn.transform._linen import LinenAdapter, check_module
from jaxq.nn.transform._linen import quantize_model as linen_quantize_model
from jaxq.nn.transform._linen_batch_norm import (
    fold_batch_norm as linen_fold_batch_norm,
)
from jaxq.nn.transform._loop import quantize_slots
from jaxq.nn.transform._model_plan import plan
from jaxq.nn.transform._nnx import NnxAdapter, quantize_model
from jaxq.nn.transform._nnx_layers import (
    find_layers,
    find_raw_arrays,
    find_variables,
    normalized_layers,
)
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._rotation import register_rotation
from jaxq.nn.transform._tree import (
    TreeAdapter,
    dequantize_params,
    quantize_params,
)

# `jaxq.training` also imports the names that are not listed below.

__all__ = [
    "dequantize_params",
    "find_layers",
    "fold_batch_norm",
    "linen_fold_batch_norm",
    "linen_quantize_model",
    "plan",
    "quantize_model",
    "quantize_params",
    "register_folding",
    "register_rotation",
]
