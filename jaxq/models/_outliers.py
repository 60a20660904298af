"""Models with outlier channels, as a testbed for methods that handle outliers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.models._parameters import Parameters
from jaxq.models._scale_groups import (
    NormGroup,
    fold_scales,
    norm_groups,
    outputs_shape,
)
from jaxq.models.decoder import Decoder

_KINDS = ("norm", "linear")


def with_outliers(
    model: Decoder,
    *,
    channels: int | Sequence[int] = 4,
    strength: float = 64.0,
    key: jax.Array | None = None,
    kinds: Sequence[str] = ("norm",),
) -> Decoder:
    """Copies a model and gives the copy outlier channels. The logits stay the same.

    Large models develop such channels in training. In the same few channels of every
    layer, the inputs of the linears become `strength` times larger. The rows that read
    these inputs become smaller by the same factor. Then per-token quantization of
    activations and per-group quantization of weights have large errors. SmoothQuant,
    AWQ, LLM.int8() and rotations are made for such models.

    Args:
      model: a float `Decoder`. It is not changed.
      channels: how many channels, drawn with `key`; or the indices of the channels,
        below the hidden size.
      strength: the factor, positive and finite. A power of two keeps the logits equal
        to the bit in float32.
      key: PRNG key. Needed if `channels` is a number.
      kinds: "norm": inputs of q_proj, k_proj, v_proj, gate_proj and up_proj. "linear":
        inputs of down_proj, at the same indices.

    Returns:
      The new model.

    Raises:
      ValueError: `channels` is a number and there is no key; an index is out of range;
        `strength` is not positive and finite; or a kind is unknown.

    Example:
      >>> from flax import nnx
      >>> from jaxq.models import Decoder, DecoderConfig
      >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
      ...                        num_hidden_layers=1, num_attention_heads=2,
      ...                        num_key_value_heads=1, head_dim=16)
      >>> model = with_outliers(Decoder(config, rngs=nnx.Rngs(0)), channels=[3])
      >>> float(model.layers[0].input_layernorm.scale[3])
      64.0

    References:
      Dettmers et al., "LLM.int8()", 2022, section 4: outlier features are in the same
      few dimensions of all layers.
    """
    index = _channel_index(model.config.hidden_size, channels, key)
    if not (strength > 0 and np.isfinite(strength)):
        raise ValueError(
            f"with_outliers: strength must be positive and finite, got {strength}."
        )
    unknown = sorted(set(kinds) - set(_KINDS))
    if unknown:
        raise ValueError(
            f"with_outliers: kinds are 'norm' and 'linear', got {unknown}."
        )
    params = Parameters(model, "with_outliers")
    scales = {}
    for group in norm_groups(model):
        if group.kind in kinds and _inside_a_layer(group):
            ones = jnp.ones(outputs_shape(params, group), jnp.float32)
            scales[group.source] = ones.at[..., index].set(1 / strength)
    return fold_scales(model, scales)


def _channel_index(
    size: int, channels: int | Sequence[int], key: jax.Array | None
) -> jax.Array:
    if not isinstance(channels, int):
        if any(not 0 <= channel < size for channel in channels):
            raise ValueError(
                f"with_outliers: channels must be 0 to {size - 1}, got "
                f"{list(channels)}."
            )
        return jnp.asarray([int(channel) for channel in channels], jnp.int32)
    if key is None:
        raise ValueError(
            f"with_outliers: {channels} channels are drawn at random; pass key=."
        )
    if not 0 <= channels <= size:
        raise ValueError(
            f"with_outliers: channels must be 0 to {size}, got {channels}."
        )
    return jax.random.permutation(key, size)[:channels]


def _inside_a_layer(group: NormGroup) -> bool:
    """True unless the source of a group is the last norm or a v_proj.

    The last norm is before the head. The outputs of v_proj are per key head.
    """
    return group.source != "norm" and not group.source.endswith("v_proj")
