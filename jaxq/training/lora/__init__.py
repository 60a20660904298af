"""Low-rank adapters (LoRA) on float or quantized weights.

`_adapter.py` has the axes of an adapter's matrices, and `_product.py` the product of a
layer with an adapter. `add_lora` and `merge_lora` add adapters to a model and merge
them into its weights. `_start.py` has adapters that start from quantization errors.
`_files.py` reads and writes the files of PEFT, and `_names.py` has the names of layers
in these files. `linen.py` has adapters for linen modules. `jaxq.training.linen` exports
its functions.
"""

from jaxq.training.lora._add import add_lora
from jaxq.training.lora._files import load_lora, save_lora
from jaxq.training.lora._merge import merge_lora
from jaxq.training.lora._start import ErrorStart, loftq, lqer

__all__ = [
    "ErrorStart",
    "add_lora",
    "load_lora",
    "loftq",
    "lqer",
    "merge_lora",
    "save_lora",
]
