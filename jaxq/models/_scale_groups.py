"""Where a scale can move between the layers of a Decoder, and models with moved scales.

In `norm -> linears` the gain of the norm can be divided by s if the rows of the linears
are multiplied by s. In `v_proj -> o_proj` and `up_proj -> down_proj` the columns of the
first linear are divided instead of a gain. This is possible because a scale of one
channel passes unchanged through the functions between the two linears (the average of
attention, the gate).

SmoothQuant and AWQ move scales in this way. The opposite direction makes outlier
channels: see `_outliers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.models._parameters import Parameters
from jaxq.models.decoder import Decoder
from jaxq.nn.layers import input_transforms
from jaxq.qtensor import is_traced


class NormGroup(NamedTuple):
    """Linears that read one input, and the layer before them.

    Attributes:
      source: path of the norm or linear whose outputs can be divided by a scale, for
        example "layers/0/input_layernorm".
      targets: paths of the linears whose rows are then multiplied by it.
      kind: "norm" or "linear": what the source is.

    Example:
      >>> from jaxq.models import NormGroup
      >>> NormGroup("norm", ("lm_head",), "norm").targets
      ('lm_head',)
    """

    source: str
    targets: tuple[str, ...]
    kind: Literal["norm", "linear"]


def norm_groups(model: Decoder) -> list[NormGroup]:
    """Every place in a model where a scale can move, in the order of computation.

    A layer has up to four groups. The first norm is the source for q_proj, k_proj and
    v_proj. v_proj is the source for o_proj. The second norm is the source for gate_proj
    and up_proj. up_proj is the source for down_proj. The last group of a model is the
    last norm with the head, unless the head is tied to the embedding. A model without
    norms in front of its linears (OLMo 2) lacks the groups of norms. A model without a
    gate (GPT-2) lacks the group of up_proj. A layer with experts lacks the last two
    groups.

    Stacked layers (`scan_layers`) are one layer, "layers", and their scales have a
    leading axis. With fewer key heads than query heads, several query heads share a key
    head. Then several rows of o_proj read the same channel of v_proj, and all these
    rows get the scale of that channel. A linear whose inputs are transformed while the
    model runs (`rotate(..., online=)`) is left out, because the transform mixes
    channels.

    Args:
      model: a `Decoder`.

    Returns:
      The groups. The scale of a group has one number per output of its source.

    Example:
      >>> from flax import nnx
      >>> from jaxq.models import Decoder, DecoderConfig
      >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
      ...                        num_hidden_layers=1, num_attention_heads=2,
      ...                        num_key_value_heads=1, head_dim=16)
      >>> group = norm_groups(Decoder(config, rngs=nnx.Rngs(0)))[1]
      >>> group.source, group.targets
      ('layers/0/self_attn/v_proj', ('layers/0/self_attn/o_proj',))
    """
    transformed = set(input_transforms(model))
    return [
        group for group in all_groups(model) if transformed.isdisjoint(group.targets)
    ]


def all_groups(model: Decoder) -> list[NormGroup]:
    """All groups of a model, including those in which an online transform stands."""
    config = model.config
    if config.scan_layers:
        layers = ["layers"]
    else:
        layers = [f"layers/{number}" for number in range(config.num_hidden_layers)]
    # A stack has layers of one kind.
    expert_layers = config.expert_layers()
    groups = []
    for layer, has_experts in zip(layers, expert_layers, strict=False):
        attention, mlp = f"{layer}/self_attn", f"{layer}/mlp"
        inputs = tuple(f"{attention}/{name}" for name in ("q_proj", "k_proj", "v_proj"))
        names = ("gate_proj", "up_proj") if config.gated_mlp else ("up_proj",)
        gated = tuple(f"{mlp}/{name}" for name in names)
        output, down = (f"{attention}/o_proj",), (f"{mlp}/down_proj",)
        has_norms = config.norm_places != "after"
        if has_norms:
            groups.append(NormGroup(f"{layer}/input_layernorm", inputs, "norm"))
        groups.append(NormGroup(f"{attention}/v_proj", output, "linear"))
        if has_experts:
            continue  # no scale moves into or between experts
        if has_norms:
            norm = f"{layer}/post_attention_layernorm"
            groups.append(NormGroup(norm, gated, "norm"))
        # Without a gate, the outputs of up_proj pass through the activation.
        if config.gated_mlp:
            groups.append(NormGroup(f"{mlp}/up_proj", down, "linear"))
    if not config.tie_word_embeddings:
        groups.append(NormGroup("norm", ("lm_head",), "norm"))
    return groups


def fold_scales(model: Decoder, scales: Mapping[str, jax.typing.ArrayLike]) -> Decoder:
    """Divides the outputs of sources by scales, and multiplies the rows of targets.

    The outputs of the model stay the same up to rounding. They stay the same to the bit
    if all scales are powers of two and no number leaves the range of its dtype.

    Args:
      model: a float `Decoder`. It is not changed.
      scales: a dict from the source of each group (`norm_groups`) to its scale. A scale
        is float `[n]` for a source with n outputs, or `[layers, n]` for stacked layers.
        Its numbers are finite and not zero.

    Returns:
      The new model.

    Raises:
      ValueError: a path is not the source of a group; a scale has another shape, is
        zero or is not finite; or the weights of the model are not floats.

    Example:
      >>> from flax import nnx
      >>> from jaxq.models import Decoder, DecoderConfig
      >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
      ...                        num_hidden_layers=1, num_attention_heads=2,
      ...                        num_key_value_heads=1, head_dim=16)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> float(fold_scales(model, {"norm": jnp.full(32, 2.0)}).norm.scale[0])
      0.5
    """
    groups = {group.source: group for group in norm_groups(model)}
    unknown = sorted(set(scales) - set(groups))
    if unknown:
        raise ValueError(
            f"fold_scales: {unknown} are not sources of groups. The sources are "
            f"{sorted(groups)}."
        )
    params = Parameters(model, "fold_scales")
    for source, value in scales.items():
        group = groups[source]
        scale = _checked_scale(params, group, value)
        _divide_source(params, group, scale)
        for target in group.targets:
            # With fewer key heads, several rows of o_proj read one channel of v_proj.
            rows = scale
            if target.endswith("o_proj"):
                rows = _repeat_for_query_heads(scale, model)
            kernel = params[target, "kernel"]  # [..., in, out]
            params[target, "kernel"] = kernel * rows[..., :, None]
    return params.merged()


def outputs_shape(params: Parameters, group: NormGroup) -> tuple[int, ...]:
    """The shape of a group's scale: `[n]`, or `[layers, n]` for stacked layers."""
    if group.kind == "norm":
        return params[group.source, "scale"].shape
    kernel = params[group.source, "kernel"]
    return (*kernel.shape[:-2], kernel.shape[-1])


def _checked_scale(
    params: Parameters, group: NormGroup, value: jax.typing.ArrayLike
) -> jax.Array:
    scale = jnp.asarray(value).astype(jnp.float32)
    shape = outputs_shape(params, group)
    if scale.shape != shape:
        raise ValueError(
            f"fold_scales: the scale of {group.source} must be {list(shape)}, got "
            f"{list(scale.shape)}."
        )
    is_valid = (jnp.isfinite(scale) & (scale != 0)).all()
    if not is_traced(is_valid) and not bool(is_valid):
        raise ValueError(
            f"fold_scales: the scale of {group.source} holds a 0 or a number that is "
            "not finite."
        )
    return scale


def _divide_source(params: Parameters, group: NormGroup, scale: jax.Array) -> None:
    """Divides the outputs of a norm or linear by a scale."""
    source = group.source
    if group.kind == "norm":
        params[source, "scale"] = params[source, "scale"] / scale
        if (source, "bias") in params:
            params[source, "bias"] = params[source, "bias"] / scale
        return
    params[source, "kernel"] = params[source, "kernel"] / scale[..., None, :]
    if (source, "bias") in params:
        params[source, "bias"] = params[source, "bias"] / scale


def smooth(
    model: Decoder,
    absmax: Mapping[str, jax.typing.ArrayLike],
    rule: Callable[[jax.Array, list[jax.Array]], Any],
    *,
    groups: Sequence[NormGroup] | None = None,
) -> Decoder:
    """A copy of a model with the scales that a rule finds for each group.

    Args:
      model: a float `Decoder`. It is not changed.
      absmax: for one linear of each group, by its path: float `[in]` (`[layers, in]`
        for stacked layers), the largest magnitude of each of its inputs over some data.
      rule: `(absmax [in], [weights [in, out_i]]) -> scale [in]`, or a tuple that begins
        with the scale: for example
        `functools.partial(jaxq.methods.smoothquant, alpha=0.5)`.
      groups: the groups to smooth. None uses all groups whose source is a norm, except
        that of the head.

    Returns:
      The new model.

    Raises:
      ValueError: `absmax` has no entry for a linear of a group; or an entry has another
        shape; or `fold_scales` raises.

    Example:
      >>> from flax import nnx
      >>> from jaxq.models import Decoder, DecoderConfig
      >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
      ...                        num_hidden_layers=1, num_attention_heads=2,
      ...                        num_key_value_heads=1, head_dim=16)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> group = norm_groups(model)[0]
      >>> absmax = {group.targets[0]: jnp.full(32, 4.0)}
      >>> smoothed = smooth(model, absmax, lambda x, w: jnp.sqrt(x), groups=[group])
      >>> float(smoothed.layers[0].input_layernorm.scale[0])
      0.5
    """
    if groups is None:
        behind_norms = [group for group in norm_groups(model) if group.kind == "norm"]
        groups = [group for group in behind_norms if group.targets != ("lm_head",)]
    missing = [
        group.targets[0] for group in groups if set(absmax).isdisjoint(group.targets)
    ]
    if missing:
        raise ValueError(
            f"smooth: absmax has no entry for {missing}, nor for another linear that "
            "reads the same input. Add an entry for each group, or leave groups out "
            "with groups=."
        )
    params = Parameters(model, "smooth")
    scales = {}
    for group in groups:
        magnitudes = jnp.asarray(_entry_of_group(absmax, group))
        weights = [params[target, "kernel"] for target in group.targets]
        if magnitudes.shape != weights[0].shape[:-1]:
            raise ValueError(
                f"smooth: absmax of {group.targets[0]} must be "
                f"{list(weights[0].shape[:-1])}, got {list(magnitudes.shape)}."
            )
        if group.source.endswith("v_proj"):
            magnitudes, weights = _grouped_by_key_head(magnitudes, weights, model)
        scales[group.source] = _scales_of_layers(rule, magnitudes, weights)
    return fold_scales(model, scales)


def _entry_of_group(absmax: Mapping[str, Any], group: NormGroup) -> Any:
    return next(absmax[target] for target in group.targets if target in absmax)


def _scales_of_layers(
    rule: Callable[..., Any], magnitudes: jax.Array, weights: list[jax.Array]
) -> jax.Array:
    """The scale of each layer of a stack, by the rule: `[..., in]`."""
    scales = []
    for layer in np.ndindex(magnitudes.shape[:-1]):
        result = rule(magnitudes[layer], [weight[layer] for weight in weights])
        scales.append(result[0] if isinstance(result, tuple) else result)
    return jnp.stack(scales).reshape(magnitudes.shape)


def _repeat_for_query_heads(scale: jax.Array, model: Decoder) -> jax.Array:
    """Repeats scales of v_proj for the query heads of each key head.

    `[..., m h]` becomes `[..., m g h]`, with g query heads per key head.
    """
    config = model.config
    m, h = config.num_key_value_heads, config.head_dim
    g, stack = config.num_attention_heads // m, scale.shape[:-1]
    heads = scale.reshape(*stack, m, 1, h)
    return jnp.broadcast_to(heads, (*stack, m, g, h)).reshape(*stack, m * g * h)


def _grouped_by_key_head(
    magnitudes: jax.Array, weights: list[jax.Array], model: Decoder
) -> tuple[jax.Array, list[jax.Array]]:
    """Groups the inputs of o_proj by the channel of v_proj that they come from.

    Magnitudes `[..., m g h]` become `[..., m h]`: the largest of the g query heads.
    Weights `[..., m g h, out]` become `[..., m h, g out]`.
    """
    config = model.config
    m, h = config.num_key_value_heads, config.head_dim
    g, stack = config.num_attention_heads // m, magnitudes.shape[:-1]
    regrouped = []
    for weight in weights:
        out = weight.shape[-1]
        heads = weight.reshape(*stack, m, g, h, out)
        heads = jnp.moveaxis(heads, -3, -2)  # [..., m, h, g, out]
        regrouped.append(heads.reshape(*stack, m * h, g * out))
    largest = jnp.max(magnitudes.reshape(*stack, m, g, h), axis=-2)
    return largest.reshape(*stack, m * h), regrouped
