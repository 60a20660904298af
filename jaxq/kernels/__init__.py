"""Products with a quantized weight, on raw arrays: Pallas kernels for TPU and GPU.

Every product also has an XLA form, which runs on any platform. `quantized_matmul` takes
codes and scales as plain arrays. `jaxq.dot_general` computes the product of a QTensor
with the same primitive. `choose` says which kernel computes a product on a platform, or
why no kernel does.

The kernels have been compiled for TPU and GPU. Their arithmetic has been tested in
interpreters. Their speed has not been measured on any device yet.
"""

from jaxq.kernels._activation_problem import ActivationProblem as ActivationProblem
from jaxq.kernels._activation_problem import activation_problem as activation_problem
from jaxq.kernels._attention import AttentionCall as AttentionCall
from jaxq.kernels._attention import call_attention as call_attention
from jaxq.kernels._attention_problem import AttentionProblem as AttentionProblem
from jaxq.kernels._call import Call as Call
from jaxq.kernels._call import problem_of as problem_of
from jaxq.kernels._call import with_index as with_index
from jaxq.kernels._choice import Choice, FallbackWarning, choose
from jaxq.kernels._choice import choose_kernel as choose_kernel
from jaxq.kernels._choice import known_platform as known_platform
from jaxq.kernels._codes import is_exact_in_float8 as is_exact_in_float8
from jaxq.kernels._codes import is_native_float as is_native_float
from jaxq.kernels._codes import largest_exact_length as largest_exact_length
from jaxq.kernels._codes_problem import CodesProblem as CodesProblem
from jaxq.kernels._codes_problem import codes_problem as codes_problem
from jaxq.kernels._codes_product import call_codes as call_codes
from jaxq.kernels._devices import device_kind as device_kind
from jaxq.kernels._forms import xla_form as xla_form
from jaxq.kernels._one_step import as_one_step as as_one_step
from jaxq.kernels._operands import varying_alike as varying_alike
from jaxq.kernels._primitive import FORMS as FORMS
from jaxq.kernels._primitive import call_matmul as call_matmul
from jaxq.kernels._problem import KERNEL_SCALES as KERNEL_SCALES
from jaxq.kernels._problem import Problem
from jaxq.kernels._quantize_activation import quantize_activation as quantize_activation
from jaxq.kernels._quantized_matmul import quantized_matmul
from jaxq.kernels._ragged_primitive import ragged_matmul as ragged_matmul
from jaxq.kernels._ragged_primitive import ragged_problem as ragged_problem
from jaxq.kernels._registry import KERNELS as KERNELS
from jaxq.kernels._registry import PLATFORMS as PLATFORMS
from jaxq.kernels._registry import Family as Family
from jaxq.kernels._remat import mark_product as mark_product
from jaxq.kernels._rows import Layout as Layout
from jaxq.kernels._rows import RowMeta as RowMeta
from jaxq.kernels._rows import Rows as Rows

# An import with `as` and the same name is for other rooms of jaxq, not for users.
__all__ = ["Choice", "FallbackWarning", "Problem", "choose", "quantized_matmul"]
