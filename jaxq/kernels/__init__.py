"""Block-wise products by quantized matrices, on raw arrays: Pallas kernels for TPU and GPU, and the XLA form of each.

`quantized_matmul` is for people with codes and scales of their own; `jaxq.dot_general` arrives at the same primitive
from a QTensor. `choose` says which kernel a product gets on a platform, and why if none.
"""

from jaxq.kernels._call import (
    FORMS,
    KERNELS,
    Call,
    Choice,
    FallbackWarning,
    call_matmul,
    calls,
    choose,
    problem_of,
    xla_form,
)
from jaxq.kernels._codes import codes_matmul, is_native_float, largest_exact_length
from jaxq.kernels._problem import Problem
from jaxq.kernels._quantized_matmul import quantized_matmul
from jaxq.kernels._ragged import ragged_matmul
from jaxq.kernels._rows import Layout, RowMeta, Rows, as_rows
from jaxq.kernels._tiles import device_kind

__all__ = [
    "FORMS",
    "KERNELS",
    "Call",
    "Choice",
    "FallbackWarning",
    "Layout",
    "Problem",
    "RowMeta",
    "Rows",
    "as_rows",
    "call_matmul",
    "calls",
    "choose",
    "codes_matmul",
    "device_kind",
    "is_native_float",
    "largest_exact_length",
    "problem_of",
    "quantized_matmul",
    "ragged_matmul",
    "xla_form",
]
