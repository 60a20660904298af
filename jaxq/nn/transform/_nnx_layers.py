"""The layers and the arrays of an nnx model, with their paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.nn.layers import LayerKind, find_kind

# Variables that no product reads as a weight. Adapters (LoRA) stay in floats.
NOT_WEIGHTS = (nnx.RngState, nnx.BatchStat, nnx.Cache, nnx.Intermediate, nnx.LoRAParam)

# What holds numbers, or stands for numbers in an abstract model.
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


class NnxLayer(NamedTuple):
    """A layer of a model.

    Attributes:
      path: components joined by "/".
      layer: the module.
      kind: the record of its kind.
    """

    path: str
    layer: Any
    kind: LayerKind


class BareArray(NamedTuple):
    """A float array that a module outside the known layer kinds holds.

    Attributes:
      path: components joined by "/".
      holder: the module in whose code the array is used.
      attribute: of `holder`, if it is an `nnx.Param` and an attribute. None for an
        array in a list or dict, and for other arrays: a QTensor cannot be put there.
      value: the array.
    """

    path: str
    holder: Any
    attribute: str | None
    value: Any


def find_layers(model: nnx.Module) -> Iterator[NnxLayer]:
    """Yields every layer of a kind that jaxq knows.

    A layer that several modules share is yielded once.

    Args:
      model: a flax nnx module.

    Example:
      >>> from flax import nnx
      >>> from jaxq.nn import find_layers
      >>> model = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.relu)
      >>> [(layer.path, layer.kind.name) for layer in find_layers(model)]
      [('layers/0', 'Linear')]
    """
    for path, module in nnx.iter_modules(model):
        kind = find_kind(module)
        if kind is not None:
            yield NnxLayer(_join(path), module, kind)


def find_variables(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """Path and variable of everything a model holds, except its random states.

    A shared variable is yielded once, with its first path.
    """
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
            yield _join(path), node


def find_raw_arrays(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Path and value of every array that a model holds outside of variables."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, _ARRAYS):
            yield _join(path), node


def find_bare_arrays(model: nnx.Module, layer_weights: set[int]) -> Iterator[BareArray]:
    """Yields every float array outside of the known layers.

    Args:
      model: a flax nnx module.
      layer_weights: the identities of the variables that are weights of known layers.
        Other modules may share them.
    """
    modules = dict(nnx.iter_modules(model))
    for path, node in nnx.iter_graph(model):
        if not path or id(node) in layer_weights or not _may_be_weight(node):
            continue
        parent = modules.get(path[:-1])
        if _is_flax_layer(parent):
            continue
        holder = _holder(path, modules, model)
        is_attribute = _has_code(parent) and isinstance(path[-1], str)
        attribute = None
        if is_attribute and isinstance(node, nnx.Param):
            attribute = str(path[-1])
        value = node.get_value() if isinstance(node, nnx.Variable) else node
        for keys, leaf in jax.tree_util.tree_leaves_with_path(value):
            if isinstance(leaf, _ARRAYS) and jnp.issubdtype(leaf.dtype, jnp.floating):
                name = "/".join([_join(path), *map(_key_name, keys)])
                yield BareArray(name, holder, None if keys else attribute, leaf)


def normalized_layers(model: nnx.Module) -> dict[int, str]:
    """Why layers cannot be quantized whose weight a wrapper normalizes at each call.

    Returns:
      A reason for each such layer, by the identity of the layer.
    """
    reasons = {}
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, nnx.SpectralNorm | nnx.WeightNorm):
            continue
        reason = (
            f"{_join(path) or 'the model itself'}, an nnx.{type(module).__name__}, "
            "normalizes its weight at each call, and codes cannot be normalized. Put "
            "the normalized weight into the layer, and replace the wrapper by the layer"
        )
        for _, inner in nnx.iter_modules(module):
            if inner is not module:
                reasons[id(inner)] = reason
    return reasons


def _join(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _key_name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", key)))


def _may_be_weight(node: Any) -> bool:
    is_variable = isinstance(node, nnx.Variable)
    return isinstance(node, _ARRAYS) or (
        is_variable and not isinstance(node, NOT_WEIGHTS)
    )


def _is_flax_layer(module: Any) -> bool:
    """True for a layer of a known kind whose class is Flax's own.

    Its other parameters are biases. A subclass may hold a second matrix.
    """
    is_flax = type(module).__module__.startswith("flax.")
    return is_flax and find_kind(module) is not None


def _has_code(module: Any) -> bool:
    """True for a module that is not just a list or dict of others."""
    return module is not None and not isinstance(module, nnx.List | nnx.Dict)


def _holder(path: tuple[Any, ...], modules: dict[Any, Any], model: Any) -> Any:
    """The module in whose code an array is used: the innermost one that has code."""
    owner = path[:-1]
    while owner:
        if _has_code(modules.get(owner)):
            return modules[owner]
        owner = owner[:-1]
    return modules.get((), model)
