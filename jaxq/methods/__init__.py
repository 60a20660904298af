"""Post-training methods: pure functions of a weight and statistics of its inputs.

`(w, stats, spec) -> (qt, info)`. Weights are `[in, out]`, as Flax keeps them. Each file
holds one method and its record (`Method`). `jaxq.nn` knows models, and calls methods by
their names (`solve`). `register` adds a method, and `unregister` removes it.
"""

from jaxq.methods._adaround import AdaRoundInfo, adaround
from jaxq.methods._awq import AWQInfo, AWQScaleInfo, awq, awq_scale
from jaxq.methods._bias_correction import bias_correction
from jaxq.methods._clipping import ClipInfo, clip
from jaxq.methods._equalization import EqualizeInfo, equalize
from jaxq.methods._folding import fold_scale_into_next, fold_scale_into_previous
from jaxq.methods._gptq import GPTQInfo, gptq
from jaxq.methods._hqq import HQQInfo, hqq
from jaxq.methods._judging import (
    FALLBACKS,
    Solved,
    error_ratio,
    falls_back,
    output_error,
)
from jaxq.methods._kmeans import KMeansInfo, centroid_gradient, kmeans
from jaxq.methods._layer_errors import names_layer
from jaxq.methods._llm_int8 import (
    LLMInt8Info,
    LLMInt8MatmulInfo,
    llm_int8,
    llm_int8_matmul,
)
from jaxq.methods._method import Folding, Method, Option, Solution
from jaxq.methods._notes import few_tokens, join_notes
from jaxq.methods._registry import (
    check_options,
    get,
    names,
    register,
    unregister,
    why_not,
)
from jaxq.methods._rotation import (
    hadamard,
    hadamard_matrix,
    random_hadamard,
    rotate_in,
    rotate_out,
)
from jaxq.methods._rtn import RTNInfo, rtn
from jaxq.methods._smoothquant import SmoothQuantInfo, smoothquant
from jaxq.methods._solve import solve

__all__ = [
    "AWQInfo",
    "AWQScaleInfo",
    "AdaRoundInfo",
    "ClipInfo",
    "EqualizeInfo",
    "Folding",
    "GPTQInfo",
    "HQQInfo",
    "KMeansInfo",
    "LLMInt8Info",
    "LLMInt8MatmulInfo",
    "Method",
    "Option",
    "RTNInfo",
    "SmoothQuantInfo",
    "Solution",
    "Solved",
    "adaround",
    "awq",
    "awq_scale",
    "bias_correction",
    "centroid_gradient",
    "clip",
    "equalize",
    "fold_scale_into_next",
    "fold_scale_into_previous",
    "get",
    "gptq",
    "hadamard",
    "hadamard_matrix",
    "hqq",
    "kmeans",
    "llm_int8",
    "llm_int8_matmul",
    "names",
    "random_hadamard",
    "register",
    "rotate_in",
    "rotate_out",
    "rtn",
    "smoothquant",
    "solve",
    "unregister",
    "why_not",
]
