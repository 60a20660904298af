"""A Llama in rotated coordinates: the same logits, other weights and activations.

The residual stream is multiplied by an orthogonal matrix Q. An RMSNorm without a gain
commutes with rotations: `norm(x Q) = norm(x) Q`. So the gains are first folded into the
linears that read the norms. Then the embedding and every linear that writes into the
stream are multiplied by Q. Every linear that reads the stream is multiplied by the
transpose of Q. This spreads an outlier channel of the stream over all channels.

Two other arrays inside a layer can be rotated as well: the values of each head, and the
inputs of down_proj. The inputs of down_proj are rotated while the model runs.

References:
    Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, 2024,
    section 4.
    Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and
    Columns, 2024, section 3 (the norm).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxq.models._parameters import Parameters
from jaxq.models._scale_groups import all_groups
from jaxq.models.decoder import Decoder, DecoderConfig
from jaxq.nn.layers import TransformInput
from jaxq.qtensor import is_traced

# The largest allowed entry of |Q^T Q - I|.
_TOLERANCE = 1e-4


def rotate(
    model: Decoder,
    rotation: jax.typing.ArrayLike,
    *,
    heads: jax.typing.ArrayLike | None = None,
    online: Callable[[jax.Array], jax.Array] | None = None,
) -> Decoder:
    """A copy of a model in rotated coordinates. Its logits are equal up to rounding.

    With the rotation Q and the gain g of a norm, the embedding E becomes `E Q`. A
    linear that reads the stream becomes `Q^T diag(g) W`. A linear that writes into the
    stream becomes `W Q`, and its bias `b Q`. All gains become 1. A tied head gets a
    separate kernel, because the gain of the last norm applies to the head and not to
    the embedding.

    Args:
      model: a float `Decoder`. It is not changed.
      rotation: float `[d, d]`, orthogonal, with d = hidden_size. For example
        `jaxq.methods.hadamard(jnp.diag(signs))` with
        `signs = jaxq.methods.random_hadamard(key, d)`.
      heads: float `[h, h]`, orthogonal: rotates the values of every head, between
        v_proj and o_proj. None does not rotate them.
      online: orthogonal linear map of the last axis of `[..., intermediate_size]`, for
        example `jaxq.methods.hadamard`. It is applied to the inputs of down_proj while
        the model runs, and its inverse goes into the weight. None does not rotate
        these inputs. Use a module-level function or a frozen object, because models
        are compared by it. It is not a parameter: load a file of `jaxq.save` into a
        model that was rotated with the same `online`.

    Returns:
      The new model, with `tie_word_embeddings=False`.

    Raises:
      ValueError: a matrix or `online` has another size or is not orthogonal; the
        weights of the model are not floats; or the model has LayerNorms, norms after
        attention and the MLP, experts, or learned positions.

    Example:
      >>> from jaxq.models import Decoder, DecoderConfig
      >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
      ...                        num_hidden_layers=1, num_attention_heads=2,
      ...                        num_key_value_heads=1, head_dim=16)
      >>> model, tokens = Decoder(config, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 3]])
      >>> q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (32, 32)))
      >>> bool(jnp.allclose(rotate(model, q)(tokens), model(tokens), atol=1e-5))
      True
    """
    config = model.config
    _check_rotatable(config)
    q = _as_orthogonal(rotation, config.hidden_size, "rotation")
    per_head = inner = None
    if heads is not None:
        per_head = _as_orthogonal(heads, config.head_dim, "heads")
    if online is not None:
        matrix = online(jnp.eye(config.intermediate_size))
        inner = _as_orthogonal(matrix, config.intermediate_size, "online")
    model = _untied(model)
    params = Parameters(model, "rotate")
    _rotate_readers(model, params, q)
    params["embed_tokens", "embedding"] = _dot(params["embed_tokens", "embedding"], q)
    _rotate_writers(model, params, q, per_head, inner)
    rotated = params.merged()
    if online is not None:
        for layer in [rotated.layers] if config.scan_layers else rotated.layers:
            down = layer.mlp.down_proj
            down.promote_dtype = TransformInput(online, down.promote_dtype)
    return rotated


def rotate_by(
    model: Decoder,
    orthogonal: Callable[[int], jax.Array],
    online: Callable[[jax.Array], jax.Array],
) -> Decoder:
    """A rotated copy, for `Recipe(rotate=True)`: see `jaxq.nn.register_rotation`.

    The stream, the values of the heads and the inputs of down_proj are rotated.

    Args:
      model: a float `Decoder`.
      orthogonal: returns an orthogonal matrix `[n, n]` for a size n.
      online: orthogonal linear map of the last axis of an array.
    """
    heads = orthogonal(model.config.head_dim)
    stream = orthogonal(model.config.hidden_size)
    return rotate(model, stream, heads=heads, online=online)


def _rotate_readers(model: Decoder, params: Parameters, q: jax.Array) -> None:
    """Rotates the linears that read a norm: `W -> Q^T diag(g) W`, and g -> 1."""
    for group in all_groups(model):
        if group.kind != "norm":
            continue
        gain = params[group.source, "scale"]  # [..., d]
        for target in group.targets:
            kernel = params[target, "kernel"] * gain[..., :, None]  # [..., d, out]
            params[target, "kernel"] = _dot(q.T, kernel)
        params[group.source, "scale"] = jnp.ones_like(gain)


def _rotate_writers(
    model: Decoder,
    params: Parameters,
    q: jax.Array,
    per_head: jax.Array | None,
    inner: jax.Array | None,
) -> None:
    """Rotates o_proj and down_proj: `W -> W Q`. Also rotates their own inputs."""
    for group in all_groups(model):
        if group.kind != "linear":
            continue
        (target,) = group.targets
        kernel = params[target, "kernel"]  # [..., in, d]
        if target.endswith("o_proj") and per_head is not None:
            values = params[group.source, "kernel"]
            params[group.source, "kernel"] = _times_per_head(values, per_head)
            if (group.source, "bias") in params:
                bias = params[group.source, "bias"]
                params[group.source, "bias"] = _times_per_head(bias, per_head)
            # The rows of o_proj undo what the columns of v_proj do.
            columns = _times_per_head(jnp.swapaxes(kernel, -1, -2), per_head)
            kernel = jnp.swapaxes(columns, -1, -2)
        if target.endswith("down_proj") and inner is not None:
            kernel = _dot(inner.T, kernel)
        params[target, "kernel"] = _dot(kernel, q)
        if (target, "bias") in params:
            params[target, "bias"] = _dot(params[target, "bias"], q)


def _check_rotatable(config: DecoderConfig) -> None:
    """Raises a ValueError unless the whole stream can be rotated."""
    if config.norm != "rms":
        reason = "a LayerNorm subtracts the mean, which does not commute with rotations"
        problem = f"norm={config.norm!r}"
    elif config.norm_places != "before":
        reason = "the gain of a norm that adds to the stream cannot be folded"
        problem = f"norm_places={config.norm_places!r}"
    elif config.experts is not None:
        reason = "the experts are not rotated"
        problem = "experts"
    elif config.learned_positions:
        reason = "the learned positions are not rotated"
        problem = "learned_positions=True"
    else:
        return
    raise ValueError(
        f"rotate: the config has {problem}, and {reason}. Use a method or recipe "
        "without rotation."
    )


def _untied(model: Decoder) -> Decoder:
    """The model, or a copy whose head has a separate kernel."""
    if not model.config.tie_word_embeddings:
        return model
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    tied = dict(nnx.to_flat_state(nnx.state(model)))
    table = tied[("embed_tokens", "embedding")]
    types: dict[str, Any] = {"dtype": model.dtype, "param_dtype": table.dtype}
    abstract = nnx.eval_shape(lambda: Decoder(config, **types, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    untied = {}
    for path, variable in nnx.to_flat_state(state):
        untied[path] = tied.get(path, variable)
    head = ("lm_head", "kernel")
    untied[head] = untied[head].replace(jnp.asarray(table[...]).T)
    untied[head].set_metadata(**_metadata_of_transpose(table))
    return nnx.merge(graphdef, nnx.from_flat_state(untied))


def _metadata_of_transpose(table: nnx.Variable) -> dict[str, Any]:
    """The metadata of a matrix, with the mesh axes of its transpose."""
    metadata = dict(table.get_metadata())
    axes = metadata.get("out_sharding")
    if isinstance(axes, NamedSharding):
        metadata["out_sharding"] = NamedSharding(axes.mesh, _transposed(axes.spec))
    elif axes:
        metadata["out_sharding"] = _transposed(axes)
    return metadata


def _transposed(axes: Iterable[Any]) -> PartitionSpec:
    rows, columns, *_ = (*axes, None, None)
    return PartitionSpec(columns, rows)


def _times_per_head(columns: jax.Array, per_head: jax.Array) -> jax.Array:
    """Multiplies every run of h columns by `per_head`: `[..., heads h], [h, h]`."""
    h = per_head.shape[0]
    heads = columns.reshape(*columns.shape[:-1], -1, h)
    return _dot(heads, per_head).reshape(columns.shape)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    # Without HIGHEST, matrix units would read bfloat16.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _as_orthogonal(matrix: jax.typing.ArrayLike, size: int, name: str) -> jax.Array:
    """A matrix as float32[size, size]. Unless it is traced, it must be orthogonal."""
    q = jnp.asarray(matrix)
    if q.shape != (size, size) or not jnp.issubdtype(q.dtype, jnp.floating):
        shape = ",".join(map(str, q.shape))
        raise ValueError(
            f"rotate: {name} must be float32[{size},{size}], got {q.dtype}[{shape}]."
        )
    q = q.astype(jnp.float32)
    error = jnp.abs(_dot(q.T, q) - jnp.eye(size))
    if is_traced(error):
        return q
    if not bool((error <= _TOLERANCE).all()):  # this is False for NaN
        raise ValueError(
            f"rotate: {name} is not orthogonal. Q^T Q differs from the identity by "
            f"{float(jnp.max(error)):.3g}, and at most {_TOLERANCE} is allowed."
        )
    return q
