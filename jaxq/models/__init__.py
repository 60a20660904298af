"""Models that read Hugging Face checkpoints, and functions that transform them.

    model, tokenizer = jaxq.models.load("path/to/hf_dir")
    logits = model(tokens)                    # int32[b, t] -> float32[b, t, vocab]
    longer = jaxq.models.generate(model, tokens, 32)

The networks are plain flax nnx, with no quantization inside. One `Decoder` covers the
families that `model_types()` lists. Some functions here change a model without changing
what it computes: they move scales between layers, make outliers in that way, rotate the
model, or stack its layers.
"""

from jaxq.io import register_model
from jaxq.models import decoder
from jaxq.models._chat import ChatTemplate, load_chat_template
from jaxq.models._checkpoint import load, save
from jaxq.models._checkpoint_parts import checkpoint_parts
from jaxq.models._config import ExpertsConfig
from jaxq.models._expert_kind import EXPERT_LINEAR
from jaxq.models._generate import generate
from jaxq.models._hf_config import model_types
from jaxq.models._outliers import with_outliers
from jaxq.models._quantized_weights import is_quantized
from jaxq.models._rotate import rotate, rotate_by
from jaxq.models._scale_groups import NormGroup, fold_scales, norm_groups, smooth
from jaxq.models._stacking import stacked, unrolled
from jaxq.models._stop_tokens import load_stop_tokens
from jaxq.models.decoder import Decoder, DecoderConfig
from jaxq.models.encoder import Encoder, EncoderConfig
from jaxq.nn import register_folding, register_layer, register_rotation
from jaxq.ops import KVCache

decoder.set_quantized_cache(KVCache.empty)
register_layer(EXPERT_LINEAR)
register_folding(Decoder, norm_groups, fold_scales)
register_model(Decoder, checkpoint_parts)
register_rotation(Decoder, rotate_by)

# The earlier names, from when Llama was the only family.
Llama = Decoder
LlamaConfig = DecoderConfig

__all__ = [
    "ChatTemplate",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "ExpertsConfig",
    "Llama",
    "LlamaConfig",
    "NormGroup",
    "fold_scales",
    "generate",
    "is_quantized",
    "load",
    "load_chat_template",
    "load_stop_tokens",
    "model_types",
    "norm_groups",
    "rotate",
    "save",
    "smooth",
    "stacked",
    "unrolled",
    "with_outliers",
]
