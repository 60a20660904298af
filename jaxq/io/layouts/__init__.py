"""Quantized weights of other libraries, as pure functions on arrays.

`get` returns a layout by its name, and `names` lists all names. A layout turns the
arrays of a weight, as they lie in another library's file, into a QTensor and back.
Codes and scales stay the same. Files and folders are not read here.
"""

from jaxq.io.layouts._gptq import restore_inputs, sort_inputs
from jaxq.io.layouts._layout import Layout
from jaxq.io.layouts._table import get, names

__all__ = ["Layout", "get", "names", "restore_inputs", "sort_inputs"]
