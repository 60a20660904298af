"""Scales that move between a Llama's layers without changing what it computes, and outliers made that way.

In `norm -> linears` the norm's gain can be divided by s if the rows of the linears are multiplied by it; in
`v -> o` and `up -> down` the columns of the first linear take the gain's place, since what lies between them (the
attention's average, the gate) lets a scale of one channel pass. Smoothing and AWQ fold their scales this way; dividing
instead of multiplying makes the outlier channels that large models grow by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.models.llama import Llama
from jaxq.nn.layers import input_transforms

_SEPARATOR = "/"


class NormGroup(NamedTuple):
    """Linears that read one input, and what comes before them.

    Attributes:
      source: path of the norm or linear whose outputs can take a scale, as "layers/0/input_layernorm".
      targets: paths of the linears whose rows then take its inverse.
      kind: "norm" or "linear".
    """

    source: str
    targets: tuple[str, ...]
    kind: Literal["norm", "linear"]


def norm_groups(model: Llama) -> list[NormGroup]:
    """Every place in a model where a scale can be folded, in the order of computation.

    For each layer: the first norm with q, k and v; v with o; the second norm with gate and up; up with down. Then the
    last norm with the head, if the head is no embedding. Stacked layers (`scan_layers`) are one, "layers", and their
    scales have a leading axis. With fewer key heads than query heads, a channel of v feeds one of o for each query
    head of its group; its scale goes to all of them. Where inputs go through a transform at run time
    (`rotate(..., online=)`), no scale can: channels meet in it.

    Args:
      model: a `Llama`.

    Returns:
      The groups. A group's scale has one number for each output of its source.

    Example:
      >>> from jaxq.models import Llama, LlamaConfig
      >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
      ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
      >>> norm_groups(Llama(config, rngs=nnx.Rngs(0)))[0].targets
      ('layers/0/self_attn/q_proj', 'layers/0/self_attn/k_proj', 'layers/0/self_attn/v_proj')
    """
    transformed = input_transforms(model)
    return [
        group
        for group in all_groups(model)
        if not transformed.keys() & set(group.targets)
    ]


def all_groups(model: Llama) -> list[NormGroup]:
    """The layers that read one another, whether a scale can move between them or not."""
    config = model.config
    layers = (
        ["layers"]
        if config.scan_layers
        else [f"layers/{i}" for i in range(config.num_hidden_layers)]
    )
    groups = []
    for layer in layers:
        attention, mlp = f"{layer}/self_attn", f"{layer}/mlp"
        inputs = tuple(f"{attention}/{name}" for name in ("q_proj", "k_proj", "v_proj"))
        groups.append(NormGroup(f"{layer}/input_layernorm", inputs, "norm"))
        groups.append(
            NormGroup(f"{attention}/v_proj", (f"{attention}/o_proj",), "linear")
        )
        gated = (f"{mlp}/gate_proj", f"{mlp}/up_proj")
        groups.append(NormGroup(f"{layer}/post_attention_layernorm", gated, "norm"))
        groups.append(NormGroup(f"{mlp}/up_proj", (f"{mlp}/down_proj",), "linear"))
    if not config.tie_word_embeddings:
        groups.append(NormGroup("norm", ("lm_head",), "norm"))
    return groups


def fold_scales(model: Llama, scales: Mapping[str, jax.typing.ArrayLike]) -> Llama:
    """A copy of a model whose groups are rescaled: sources divided, rows of their targets multiplied.

    What the model computes stays the same up to rounding; to the bit if all scales are powers of two and nothing leaves
    the range of its dtypes.

    Args:
      model: a float `Llama`; left as it is.
      scales: for the sources of some groups of `norm_groups`, float `[n]` with n their outputs (`[layers, n]` for
        stacked layers), finite and not zero.

    Returns:
      The new model.

    Raises:
      ValueError: a path that is the source of no group, a scale of another shape, zero or not finite; a model whose
        weights are not floats.

    Example:
      >>> from jaxq.models import Llama, LlamaConfig
      >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
      ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
      >>> model = Llama(config, rngs=nnx.Rngs(0))
      >>> float(fold_scales(model, {"norm": jnp.full(32, 2.0)}).norm.scale[0])
      0.5
    """
    groups = {group.source: group for group in norm_groups(model)}
    unknown = sorted(set(scales) - set(groups))
    if unknown:
        raise ValueError(
            f"fold_scales: {unknown} are no sources of groups; those are {sorted(groups)}."
        )
    params = Params(model, "fold_scales")
    for source, given in scales.items():
        group, s = groups[source], jnp.asarray(given).astype(jnp.float32)
        outputs = params[source, "scale" if group.kind == "norm" else "kernel"]
        shape = (
            outputs.shape
            if group.kind == "norm"
            else (*outputs.shape[:-2], outputs.shape[-1])
        )
        if s.shape != shape:
            raise ValueError(
                f"fold_scales: the scale of {source} must be {list(shape)}, got {list(s.shape)}."
            )
        if not bool((jnp.isfinite(s) & (s != 0)).all()):
            raise ValueError(
                f"fold_scales: the scale of {source} holds a 0 or a number that is not finite."
            )
        if group.kind == "norm":
            params[source, "scale"] = outputs / s
        else:
            params[source, "kernel"] = outputs / s[..., None, :]
            if (source, "bias") in params:
                params[source, "bias"] = params[source, "bias"] / s
        for target in group.targets:
            kernel = params[target, "kernel"]
            rows = _of_query_heads(s, model) if target.endswith("o_proj") else s
            params[target, "kernel"] = kernel * rows[..., :, None]
    return params.merged()


def smooth(
    model: Llama,
    absmax: Mapping[str, jax.typing.ArrayLike],
    rule: Callable[[jax.Array, list[jax.Array]], Any],
    *,
    groups: Sequence[NormGroup] | None = None,
) -> Llama:
    """A copy of a model with the scales folded in that a rule finds for each group.

    Args:
      model: a float `Llama`; left as it is.
      absmax: for one linear of each group, by its path: float `[in]` (`[layers, in]` for stacked layers), the largest
        magnitude of each of its inputs over some data.
      rule: `(absmax [in], [weights [in, out_i]]) -> scales [in]`, or a tuple that starts with them:
        `functools.partial(jaxq.methods.smoothquant, alpha=0.5)`, for example.
      groups: which to smooth; None takes all groups of kind "norm" but the head's.

    Returns:
      The new model.

    Raises:
      ValueError: no magnitudes for any linear of a group; as `fold_scales`.

    Example:
      >>> from jaxq.models import Llama, LlamaConfig
      >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
      ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
      >>> model = Llama(config, rngs=nnx.Rngs(0))
      >>> group = norm_groups(model)[0]
      >>> smoothed = smooth(model, {group.targets[0]: jnp.full(32, 4.0)}, lambda x, w: jnp.sqrt(x), groups=[group])
      >>> float(smoothed.layers[0].input_layernorm.scale[0])
      0.5
    """
    if groups is None:
        groups = [
            g
            for g in norm_groups(model)
            if g.kind == "norm" and g.targets != ("lm_head",)
        ]
    missing = [
        group.targets[0] for group in groups if not set(group.targets) & set(absmax)
    ]
    if missing:
        raise ValueError(
            f"smooth: absmax has nothing for {missing}, nor for a linear that shares its input."
        )
    params = Params(model, "smooth")
    scales = {}
    for group in groups:
        x = jnp.asarray(
            next(absmax[target] for target in group.targets if target in absmax)
        )
        weights = [params[target, "kernel"] for target in group.targets]
        if x.shape != weights[0].shape[:-1]:
            raise ValueError(
                f"smooth: absmax of {group.targets[0]} must be {list(weights[0].shape[:-1])}, got {list(x.shape)}."
            )
        if group.source.endswith("v_proj"):
            x, weights = _by_key_heads(x, weights, model)
        found = []
        for layer in np.ndindex(x.shape[:-1]):
            s = rule(x[layer], [w[layer] for w in weights])
            found.append(s[0] if isinstance(s, tuple) else s)
        scales[group.source] = jnp.stack(found).reshape(x.shape)
    return fold_scales(model, scales)


def with_outliers(
    model: Llama,
    *,
    channels: int | Sequence[int] = 4,
    strength: float = 64.0,
    key: jax.Array | None = None,
    kinds: Sequence[str] = ("norm",),
) -> Llama:
    """A copy of a model whose activations have outlier channels, as those of large models do; same logits.

    In the same few channels of every layer, what enters the linears is `strength` times larger than before, and the
    rows that read it as much smaller. A testbed: quantizing activations by token, or weights by group, then fails in
    the way SmoothQuant, AWQ, LLM.int8() and rotations were made for.

    Args:
      model: a float `Llama`; left as it is.
      channels: how many, drawn with `key`, or which ones, of the hidden size.
      strength: the factor, positive; a power of two keeps logits to the bit in float32.
      key: PRNG key, where `channels` is a number.
      kinds: "norm": inputs of q, k, v, gate and up; "linear": those of down too, at as many channels of its inputs
        (the same indices).

    Returns:
      The new model.

    Raises:
      ValueError: a number of channels without a key, indices out of range, a factor that is not positive.

    Example:
      >>> from jaxq.models import Llama, LlamaConfig
      >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
      ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
      >>> model = with_outliers(Llama(config, rngs=nnx.Rngs(0)), channels=[3])
      >>> float(model.layers[0].input_layernorm.scale[3])
      64.0

    References:
      Dettmers et al., "LLM.int8()", 2022, section 4 (outlier features in the same few dimensions of all layers).
    """
    d = model.config.hidden_size
    if isinstance(channels, int):
        if key is None:
            raise ValueError(
                f"with_outliers: {channels} channels are drawn at random; pass key=."
            )
        if not 0 <= channels <= d:
            raise ValueError(
                f"with_outliers: channels must be 0 to {d}, got {channels}."
            )
        index = jax.random.permutation(key, d)[:channels]
    else:
        index = jnp.asarray([int(c) for c in channels], jnp.int32)
        if any(not 0 <= c < d for c in channels):
            raise ValueError(
                f"with_outliers: channels must be 0 to {d - 1}, got {list(channels)}."
            )
    if not (strength > 0 and np.isfinite(strength)):
        raise ValueError(f"with_outliers: strength must be positive, got {strength}.")
    unknown = sorted(set(kinds) - {"norm", "linear"})
    if unknown:
        raise ValueError(
            f"with_outliers: kinds are 'norm' and 'linear', got {unknown}."
        )
    params, scales = Params(model, "with_outliers"), {}
    for group in norm_groups(model):
        if (
            group.kind not in kinds
            or group.source == "norm"
            or group.source.endswith("v_proj")
        ):
            continue
        outputs = params[group.source, "scale" if group.kind == "norm" else "kernel"]
        shape = (
            outputs.shape
            if group.kind == "norm"
            else (*outputs.shape[:-2], outputs.shape[-1])
        )
        scales[group.source] = (
            jnp.ones(shape, jnp.float32).at[..., index].set(1 / strength)
        )
    return fold_scales(model, scales)


class Params:
    """The float parameters of a model by (path of the module, name), and the model made of changed ones."""

    def __init__(self, model: Any, caller: str):
        self._graphdef, state = nnx.split(model)
        self._flat = dict(nnx.to_flat_state(state))
        for path, variable in self._flat.items():
            value = variable[...]
            if not (
                isinstance(value, jax.Array | np.ndarray)
                and jnp.issubdtype(value.dtype, jnp.floating)
            ):
                name = _SEPARATOR.join(map(str, path))
                raise ValueError(
                    f"{caller}: {name} holds no floats. Transform the float model, then quantize it."
                )
        self._keys = {
            (_SEPARATOR.join(map(str, path[:-1])), path[-1]): path
            for path in self._flat
        }

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._keys

    def __getitem__(self, key: tuple[str, str]) -> jax.Array:
        """As float32."""
        return jnp.asarray(self._flat[self._keys[key]][...]).astype(jnp.float32)

    def __setitem__(self, key: tuple[str, str], value: jax.Array) -> None:
        old = self._flat[self._keys[key]]
        self._flat[self._keys[key]] = old.replace(value.astype(old.dtype))

    def dtype(self, key: tuple[str, str]) -> Any:
        """What the parameter is kept in."""
        return self._flat[self._keys[key]].dtype

    def merged(self) -> Any:
        """The model of the parameters as they are now."""
        return nnx.merge(self._graphdef, nnx.from_flat_state(self._flat))


def _of_query_heads(s: jax.Array, model: Llama) -> jax.Array:
    """Scales of v's outputs `[..., m h]`, repeated for the query heads of each key head: `[..., m g h]`."""
    c = model.config
    m, g, lead = (
        c.num_key_value_heads,
        c.num_attention_heads // c.num_key_value_heads,
        s.shape[:-1],
    )
    s = jnp.broadcast_to(s.reshape(*lead, m, 1, c.head_dim), (*lead, m, g, c.head_dim))
    return s.reshape(*lead, m * g * c.head_dim)


def _by_key_heads(
    x: jax.Array, weights: list[jax.Array], model: Llama
) -> tuple[jax.Array, list[jax.Array]]:
    """Magnitudes `[..., m g h]` and weights `[..., m g h, out]` of o as seen from v's channels `[..., m h]`."""
    c = model.config
    m, h = c.num_key_value_heads, c.head_dim
    g, lead = c.num_attention_heads // m, x.shape[:-1]
    out = []
    for w in weights:
        heads = jnp.moveaxis(
            w.reshape(*lead, m, g, h, w.shape[-1]), -3, -2
        )  # [..., m, h, g, out]
        out.append(heads.reshape(*lead, m * h, g * w.shape[-1]))
    return jnp.max(x.reshape(*lead, m, g, h), axis=-2).reshape(*lead, m * h), out
