"""Layers in a list or stacked along an axis: the same model, run by a Python loop or by one scan."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.models.llama import Llama


def unrolled(model: Llama) -> Llama:
    """A copy of a model whose layers are a list, each a module that can be looked into or quantized in its own way.

    For calibration: a scan over stacked layers throws away what is collected inside it.

    Args:
      model: a `Llama`, of floats or quantized; left as it is.

    Returns:
      The model with `scan_layers=False`.

    Example:
      >>> from jaxq.models import Llama, LlamaConfig, stacked, unrolled
      >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
      ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16, scan_layers=True)
      >>> model = unrolled(Llama(config, rngs=nnx.Rngs(0)))
      >>> len(model.layers), stacked(model).config.scan_layers
      (2, True)
    """
    copy = nnx.clone(model)
    if not model.config.scan_layers:
        return copy
    graphdef, state = nnx.split(copy.layers)

    def layer(i: int) -> Any:
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], state))

    return _with_layers(
        copy, nnx.List([layer(i) for i in range(model.config.num_hidden_layers)]), False
    )


def stacked(model: Llama) -> Llama:
    """A copy of a model whose layers are stacked along a leading axis and run by one scan: it compiles in no time.

    Args:
      model: a `Llama`, of floats or quantized; left as it is.

    Returns:
      The model with `scan_layers=True`.

    Raises:
      ValueError: layers differ in more than numbers, as where a recipe quantizes some of them in another way.
    """
    copy = nnx.clone(model)
    if model.config.scan_layers:
        return copy
    graphdefs, states = zip(*(nnx.split(layer) for layer in copy.layers), strict=True)
    kinds = [
        (graphdef, _kinds(state))
        for graphdef, state in zip(graphdefs, states, strict=True)
    ]
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"stacked: layers/{i} is not made as layers/0 is{_difference(kinds[0][1], kind[1])}. Quantize all "
                "layers alike, or leave them in a list."
            )
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return _with_layers(copy, nnx.merge(graphdefs[0], state), True)


def _with_layers(model: Llama, layers: Any, scan_layers: bool) -> Llama:
    model.layers = layers
    model.config = dataclasses.replace(model.config, scan_layers=scan_layers)
    return model


def _kinds(state: Any) -> dict[str, Any]:
    """By path, what each variable of a layer is but for its numbers."""
    found = {}
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(value)]
        found["/".join(map(str, path))] = (jax.tree.structure(value), shapes)
    return found


def _difference(first: dict[str, Any], other: dict[str, Any]) -> str:
    names = [
        name for name in sorted({*first, *other}) if first.get(name) != other.get(name)
    ]
    return f": {names[0]} differs" if names else ""
