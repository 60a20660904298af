"""Reference models that read Hugging Face checkpoints, in plain flax nnx with no quantization inside.

    model, tokenizer = jaxq.models.load("path/to/hf_dir")
    logits = model(tokens)                    # int32[b, t] -> float32[b, t, vocab]
    longer = jaxq.models.generate(model, tokens, 32)

The Llama family covers Llama 1 to 3, Mistral, Qwen2 and their relatives of the same architecture. What changes a model
without changing what it computes is here too: scales moved between layers, outliers made that way, rotations, layers in
a list or stacked.
"""

from jaxq.models._checkpoint import load, save
from jaxq.models._generate import generate
from jaxq.models._outliers import (
    NormGroup,
    fold_scales,
    norm_groups,
    smooth,
    with_outliers,
)
from jaxq.models._rotate import rotate
from jaxq.models._stacking import stacked, unrolled
from jaxq.models.llama import Llama, LlamaConfig

__all__ = [
    "Llama",
    "LlamaConfig",
    "NormGroup",
    "fold_scales",
    "generate",
    "load",
    "norm_groups",
    "rotate",
    "save",
    "smooth",
    "stacked",
    "unrolled",
    "with_outliers",
]
