"""jaxq's own files: models and trees in safetensors.

`save` writes a tree (dicts, lists and tuples of arrays, numbers and QTensors) or a
model (its arrays by path). `load` reads it back, and can put the arrays into a float
model. `jaxq.serialization` describes how values are stored.
"""

from jaxq.io import layouts as layouts
from jaxq.io._saving import load, save

__all__ = ["layouts", "load", "save"]
