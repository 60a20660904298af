"""Layers in a list, or stacked along an axis.

Both models compute the same. A Python loop runs a list, and one scan runs a stack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.models.decoder import Decoder
from jaxq.qtensor import QTensor


def unrolled(model: Decoder) -> Decoder:
    """A copy of a model whose layers are in a list.

    Each layer is then a separate module, so each layer can be inspected or quantized
    separately. Calibration needs this: a scan over stacked layers discards what is
    collected inside it.

    Args:
      model: a `Decoder`, float or quantized. It is not changed.

    Returns:
      The model with `scan_layers=False`.

    Example:
      >>> from jaxq.models import Decoder, DecoderConfig, stacked, unrolled
      >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
      ...                        num_hidden_layers=2, num_attention_heads=2,
      ...                        num_key_value_heads=1, head_dim=16, scan_layers=True)
      >>> model = unrolled(Decoder(config, rngs=nnx.Rngs(0)))
      >>> len(model.layers), stacked(model).config.scan_layers
      (2, True)
    """
    copy = nnx.clone(model)
    if not model.config.scan_layers:
        return copy
    graphdef, state = nnx.split(copy.layers)
    layers = []
    for number in range(model.config.num_hidden_layers):
        own_state = jax.tree.map(lambda leaf, number=number: leaf[number], state)
        layers.append(nnx.merge(graphdef, own_state))
    return _with_layers(copy, nnx.List(layers), scan_layers=False)


def stacked(model: Decoder) -> Decoder:
    """A copy of a model whose layers are stacked along a leading axis.

    One scan runs them, so the compile time does not grow with the number of layers.

    Args:
      model: a `Decoder`, float or quantized. It is not changed.

    Returns:
      The model with `scan_layers=True`.

    Raises:
      ValueError: the layers differ in structure, shapes or dtypes, for example because
        a recipe quantizes some of them differently.

    Example:
      >>> from jaxq.models import Decoder, DecoderConfig, stacked
      >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
      ...                        num_hidden_layers=2, num_attention_heads=2,
      ...                        num_key_value_heads=1, head_dim=16)
      >>> model = stacked(Decoder(config, rngs=nnx.Rngs(0)))
      >>> model.layers.mlp.up_proj.kernel.shape
      (2, 32, 48)
    """
    copy = nnx.clone(model)
    if model.config.scan_layers:
        return copy
    _complete_input_scales(list(copy.layers))
    graphdefs, states = zip(*(nnx.split(layer) for layer in copy.layers), strict=True)
    first = _structure(states[0])
    for number, (graphdef, state) in enumerate(zip(graphdefs, states, strict=True)):
        structure = _structure(state)
        if (graphdef, structure) != (graphdefs[0], first):
            raise ValueError(
                f"stacked: layers/{number} differs from layers/0"
                f"{_first_difference(first, structure)}. Quantize all layers in the "
                "same way, or leave them in a list."
            )
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return _with_layers(copy, nnx.merge(graphdefs[0], state), scan_layers=True)


def _with_layers(model: Decoder, layers: Any, *, scan_layers: bool) -> Decoder:
    model.layers = layers
    model.config = dataclasses.replace(model.config, scan_layers=scan_layers)
    return model


def _complete_input_scales(layers: Sequence[Any]) -> None:
    """Adds input scales of 1 if the same weight of another layer has input scales.

    Some layers may lack input scales, because a method leaves them out of a layer where
    they do not help.
    """
    by_path = [dict(nnx.iter_graph(layer)) for layer in layers]
    for path, node in by_path[0].items():
        if not isinstance(node, nnx.Variable):
            continue
        variables = [nodes[path] for nodes in by_path if path in nodes]
        weights = [variable.get_value() for variable in variables]
        if not all(isinstance(weight, QTensor) for weight in weights):
            continue
        if all(weight.input_scale is None for weight in weights):
            continue
        for variable, weight in zip(variables, weights, strict=True):
            if weight.input_scale is None:
                ones = jnp.ones(weight.meta.geometry.contracted_size)
                variable.set_value(weight.with_input_scale(ones))


def _structure(state: Any) -> dict[str, Any]:
    """Treedef, shapes and dtypes of every variable of a layer, by path."""
    structure = {}
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        arrays = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(value)]
        structure["/".join(map(str, path))] = (jax.tree.structure(value), arrays)
    return structure


def _first_difference(first: dict[str, Any], other: dict[str, Any]) -> str:
    """The text " in <path>" for the first variable that differs; empty if none does."""
    for name in sorted({*first, *other}):
        if first.get(name) != other.get(name):
            return f" in {name}"
    return ""
