"""Models that read Hugging Face checkpoints, and functions that transform them.

    model, tokenizer = jaxq.models.load("path/to/hf_dir")
    logits = model(tokens)                    # int32[b, t] -> float32[b, t, vocab]
    longer = jaxq.models.generate(model, tokens, 32)

The networks are plain flax nnx, with no quantization inside. The Llama family covers
Llama 1 to 3, Mistral, Qwen2 and other models of the same architecture. Some functions
here change a model without changing what it computes: they move scales between layers,
make outliers in that way, rotate the model, or stack its layers.
"""

from jaxq.io import register_model
from jaxq.models import llama
from jaxq.models._checkpoint import load, save
from jaxq.models._checkpoint_parts import checkpoint_parts
from jaxq.models._generate import generate
from jaxq.models._outliers import with_outliers
from jaxq.models._quantized_weights import is_quantized
from jaxq.models._rotate import rotate, rotate_by
from jaxq.models._scale_groups import NormGroup, fold_scales, norm_groups, smooth
from jaxq.models._stacking import stacked, unrolled
from jaxq.models.llama import Llama, LlamaConfig
from jaxq.nn import register_folding, register_rotation
from jaxq.ops import KVCache

llama.set_quantized_cache(KVCache.empty)
register_folding(Llama, norm_groups, fold_scales)
register_model(Llama, checkpoint_parts)
register_rotation(Llama, rotate_by)

__all__ = [
    "Llama",
    "LlamaConfig",
    "NormGroup",
    "fold_scales",
    "generate",
    "is_quantized",
    "load",
    "norm_groups",
    "rotate",
    "save",
    "smooth",
    "stacked",
    "unrolled",
    "with_outliers",
]
