"""jaxq: quantization for JAX.

Pure functions over pytrees that quantize arrays, compute with quantized arrays and
measure their errors; and quantized Flax models. `import jaxq` does not import Flax. The
subpackages that need Flax are imported when they are first used.

Example:
  >>> import jax.numpy as jnp, jaxq
  >>> w = jnp.linspace(-1, 1, 64 * 8).reshape(64, 8)
  >>> qt = jaxq.quantize(w, "nf4")
  >>> (jnp.ones((2, 64)) @ qt).shape
  (2, 8)
"""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from jaxq import emulation, formats, metrics, ops, qtensor, recipes, sharding
from jaxq.emulation import cast, emulate
from jaxq.ops import dot_general, einsum, explain, matmul
from jaxq.qtensor import (
    PerBlock,
    PerChannel,
    PerFlat,
    PerGroup,
    PerTensor,
    PerToken,
    QTensor,
    QuantSpec,
    combine,
    dequantize,
    fake_quant,
    partition,
    presets,
    quantize,
    relayout,
)
from jaxq.recipes import Recipe, Rule

if TYPE_CHECKING:
    from jaxq import (
        distillation,
        evaluation,
        io,
        methods,
        models,
        nn,
        observers,
        optim,
        training,
    )
    from jaxq.io import load, save
    from jaxq.nn import dequantize_params, quantize_model, quantize_params

__version__ = "0.1.0"

# Imported when first used: these import Flax or optax, or read and write files.
_LAZY = {
    "dequantize_params": "jaxq.nn",
    "distillation": "jaxq.distillation",
    "evaluation": "jaxq.evaluation",
    "io": "jaxq.io",
    "load": "jaxq.io",
    "methods": "jaxq.methods",
    "models": "jaxq.models",
    "nn": "jaxq.nn",
    "observers": "jaxq.observers",
    "optim": "jaxq.optim",
    "quantize_model": "jaxq.nn",
    "quantize_params": "jaxq.nn",
    "save": "jaxq.io",
    "training": "jaxq.training",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        close = difflib.get_close_matches(name, __all__, n=2)
        hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
        raise AttributeError(f"module 'jaxq' has no attribute {name!r}.{hint}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"jaxq.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))


__all__ = [
    "PerBlock",
    "PerChannel",
    "PerFlat",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QTensor",
    "QuantSpec",
    "Recipe",
    "Rule",
    "cast",
    "combine",
    "dequantize",
    "dequantize_params",
    "distillation",
    "dot_general",
    "einsum",
    "emulate",
    "emulation",
    "evaluation",
    "explain",
    "fake_quant",
    "formats",
    "io",
    "load",
    "matmul",
    "methods",
    "metrics",
    "models",
    "nn",
    "observers",
    "ops",
    "optim",
    "partition",
    "presets",
    "qtensor",
    "quantize",
    "quantize_model",
    "quantize_params",
    "recipes",
    "relayout",
    "save",
    "sharding",
    "training",
]
