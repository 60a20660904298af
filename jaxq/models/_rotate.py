"""A Llama in rotated coordinates: the residual stream times an orthogonal matrix, with the same logits.

RMSNorm without gains commutes with rotations, `norm(x Q) = norm(x) Q`. So with gains folded into the linears behind
them, the embedding and everything that writes into the stream can be multiplied by Q, and everything that reads it by
its transpose. Outlier channels of the stream are spread over all channels; what is between reading and writing can be
rotated as well where it is linear: values of each head, and the inputs of down_proj at run time.

References:
    Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, 2024, section 4.
    Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns, 2024, section 3 (the norm).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxq.models._outliers import Params, all_groups
from jaxq.models.llama import Llama
from jaxq.nn.layers import TransformInput

# A rotation may be this far from orthogonal, in any entry of Q^T Q.
_TOLERANCE = 1e-4


def rotate(
    model: Llama,
    rotation: jax.typing.ArrayLike,
    *,
    heads: jax.typing.ArrayLike | None = None,
    online: Callable[[jax.Array], jax.Array] | None = None,
) -> Llama:
    """A copy of a model in rotated coordinates: the same logits up to rounding, other weights and activations.

    With Q the rotation and g a norm's gain: the embedding becomes `E Q`, every linear that reads the stream
    `Q^T diag(g) W`, every one that writes into it `W Q` (its bias `b Q`), and all gains 1.

    A tied head is untied: it reads through the last norm's gain, the embedding does not.

    Args:
      model: a float `Llama`; left as it is.
      rotation: float `[d, d]`, orthogonal, with d = hidden_size: `jaxq.methods.hadamard(jnp.diag(signs))` with
        `signs = jaxq.methods.random_hadamard(key, d)`, for example.
      heads: float `[h, h]`, orthogonal, for the values of every head, between v and o; None leaves them.
      online: orthogonal linear map of the last axis of `[..., intermediate_size]`, that the inputs of down_proj go
        through at run time, with its inverse in the weight: `jaxq.methods.hadamard`, for example. A module-level
        function or a frozen object, since models are compared by it. None leaves them. It is no parameter: what
        `jaxq.save` wrote is loaded into a model that was rotated with the same `online`.

    Returns:
      The new model, with `tie_word_embeddings=False`.

    Raises:
      ValueError: a matrix of another shape or not orthogonal; an `online` that is not; a model whose weights are not
        floats.

    Example:
      >>> from jaxq.models import Llama, LlamaConfig
      >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
      ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
      >>> model, tokens = Llama(config, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 3]])
      >>> q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (32, 32)))
      >>> bool(jnp.allclose(rotate(model, q)(tokens), model(tokens), atol=1e-5))
      True
    """
    config = model.config
    q = _orthogonal(rotation, config.hidden_size, "rotation")
    per_head = None if heads is None else _orthogonal(heads, config.head_dim, "heads")
    inner = None
    if online is not None:
        inner = _orthogonal(
            online(jnp.eye(config.intermediate_size)),
            config.intermediate_size,
            "online",
        )
    model = _untied(model)
    params = Params(model, "rotate")
    for group in all_groups(model):
        if group.kind != "norm":
            continue
        gain = params[group.source, "scale"]  # [..., d]
        for target in group.targets:
            params[target, "kernel"] = _dot(
                q.T, params[target, "kernel"] * gain[..., :, None]
            )
        params[group.source, "scale"] = jnp.ones_like(gain)
    params["embed_tokens", "embedding"] = _dot(params["embed_tokens", "embedding"], q)
    for group in all_groups(model):
        if group.kind != "linear":
            continue
        (target,) = group.targets
        kernel = params[target, "kernel"]
        if target.endswith("o_proj") and per_head is not None:
            values = params[group.source, "kernel"]
            params[group.source, "kernel"] = _per_head(values, per_head)
            if (group.source, "bias") in params:
                params[group.source, "bias"] = _per_head(
                    params[group.source, "bias"], per_head
                )
            # Rows of o as heads: what v's columns do, its rows undo.
            kernel = jnp.swapaxes(
                _per_head(jnp.swapaxes(kernel, -1, -2), per_head), -1, -2
            )
        if target.endswith("down_proj") and inner is not None:
            kernel = _dot(inner.T, kernel)
        params[target, "kernel"] = _dot(kernel, q)
        if (target, "bias") in params:
            params[target, "bias"] = _dot(params[target, "bias"], q)
    out = params.merged()
    if online is not None:
        for layer in [out.layers] if config.scan_layers else out.layers:
            down = layer.mlp.down_proj
            down.promote_dtype = TransformInput(online, down.promote_dtype)
    return out


def rotate_by(
    model: Llama,
    orthogonal: Callable[[int], jax.Array],
    online: Callable[[jax.Array], jax.Array],
) -> Llama:
    """A rotated copy, as `Recipe(rotate=True)` wants it: see `nn.register_rotation`.

    The stream, the values of the heads and the inputs of down_proj are rotated.

    Args:
      model: a float `Llama`.
      orthogonal: returns an orthogonal matrix `[n, n]` for a size n.
      online: orthogonal linear map of the last axis of an array.
    """
    heads = orthogonal(model.config.head_dim)
    stream = orthogonal(model.config.hidden_size)
    return rotate(model, stream, heads=heads, online=online)


def _untied(model: Llama) -> Llama:
    """The model itself, or a copy whose head has a kernel of its own."""
    if not model.config.tie_word_embeddings:
        return model
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    old = dict(nnx.to_flat_state(nnx.state(model)))
    table = old[("embed_tokens", "embedding")]
    make = functools.partial(Llama, config, dtype=model.dtype, param_dtype=table.dtype)
    shell = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(shell)
    flat = {
        path: old.get(path, variable) for path, variable in nnx.to_flat_state(state)
    }
    head = ("lm_head", "kernel")
    flat[head] = flat[head].replace(jnp.asarray(table[...]).T)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _per_head(columns: jax.Array, per_head: jax.Array) -> jax.Array:
    """Each run of h last entries times `per_head [h, h]`."""
    h = per_head.shape[0]
    return _dot(columns.reshape(*columns.shape[:-1], -1, h), per_head).reshape(
        columns.shape
    )


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    # HIGHEST: matrix units would otherwise read bfloat16.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _orthogonal(matrix: jax.typing.ArrayLike, size: int, name: str) -> jax.Array:
    q = jnp.asarray(matrix)
    if q.shape != (size, size) or not jnp.issubdtype(q.dtype, jnp.floating):
        shape = ",".join(map(str, q.shape))
        raise ValueError(
            f"rotate: {name} must be float32[{size},{size}], got {q.dtype}[{shape}]."
        )
    q = q.astype(jnp.float32)
    error = jnp.abs(_dot(q.T, q) - jnp.eye(size))
    if not bool((error <= _TOLERANCE).all()):  # NaN is not orthogonal either
        raise ValueError(
            f"rotate: {name} is not orthogonal: Q^T Q differs from the identity by {float(jnp.max(error)):.3g}."
        )
    return q
