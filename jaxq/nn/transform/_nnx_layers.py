"""The layers and the arrays of an nnx model, with their paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.nn.layers import LayerKind, find_kind

# Variables that are not weights of products, and adapters (LoRA): both stay in floats.
NOT_WEIGHTS = (nnx.RngState, nnx.BatchStat, nnx.Cache, nnx.Intermediate, nnx.LoRAParam)

# Types of arrays. A `jax.ShapeDtypeStruct` takes the place of one in abstract models.
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
    """A float array that is not a parameter of a known layer.

    Attributes:
      path: components joined by "/".
      holder: the module whose code uses the array.
      owner: the module that has the array as an attribute: `holder`, or an `nnx.List`
        or `nnx.Dict` inside it.
      attribute: the name of the attribute of `owner`, if this is an `nnx.Param`. None
        for other arrays, for example in a tuple. They cannot become QTensors.
      value: the array.
    """

    path: str
    holder: Any
    owner: Any
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
    """Yields path and variable for all variables of a model, except random states.

    A shared variable is yielded once, with its first path.
    """
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
            yield _join(path), node


def find_raw_arrays(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Yields path and value of every array of a model that is not in a variable."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, _ARRAYS):
            yield _join(path), node


def find_bare_arrays(model: nnx.Module, layer_weights: set[int]) -> Iterator[BareArray]:
    """Yields every float array that is not in one of Flax's own layers.

    Args:
      model: a flax nnx module.
      layer_weights: the `id` of each variable that is the weight of a known layer. Such
        a variable is left out, also in other modules that share it.
    """
    modules = dict(nnx.iter_modules(model))
    for path, node in nnx.iter_graph(model):
        if not path or id(node) in layer_weights or not _may_be_weight(node):
            continue
        parent = modules.get(path[:-1])
        if _is_flax_layer(parent):
            continue
        holder = _holder(path, modules, model)
        # An nnx.List keeps its elements as attributes "0", "1", ...
        attribute = str(path[-1])
        is_attribute = parent is not None and vars(parent).get(attribute) is node
        if not is_attribute or not isinstance(node, nnx.Param):
            attribute = None
        value = node.get_value() if isinstance(node, nnx.Variable) else node
        for keys, leaf in jax.tree_util.tree_leaves_with_path(value):
            if isinstance(leaf, _ARRAYS) and jnp.issubdtype(leaf.dtype, jnp.floating):
                inner_path = jax.tree_util.keystr(keys, simple=True, separator="/")
                name = "/".join(filter(None, (_join(path), inner_path)))
                own_attribute = None if keys else attribute
                yield BareArray(name, holder, parent, own_attribute, leaf)


def normalized_layers(model: nnx.Module) -> dict[int, str]:
    """Finds layers inside `nnx.SpectralNorm` and `nnx.WeightNorm`.

    These wrappers normalize the weight at each call, so it cannot be quantized.

    Returns:
      The reason for each such layer, by the `id` of the layer.
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


def _may_be_weight(node: Any) -> bool:
    is_variable = isinstance(node, nnx.Variable)
    return isinstance(node, _ARRAYS) or (
        is_variable and not isinstance(node, NOT_WEIGHTS)
    )


def _is_flax_layer(module: Any) -> bool:
    """True for a layer of a known kind whose class is defined in Flax.

    Apart from its weight, such a layer holds only biases. A user's subclass may hold a
    second matrix.
    """
    is_flax = type(module).__module__.startswith("flax.")
    return is_flax and find_kind(module) is not None


def _has_code(module: Any) -> bool:
    """True for a module that is not an `nnx.List` or `nnx.Dict` of other modules."""
    return module is not None and not isinstance(module, nnx.List | nnx.Dict)


def _holder(path: tuple[Any, ...], modules: dict[Any, Any], model: Any) -> Any:
    """The innermost module around an array that is not an `nnx.List` or `nnx.Dict`."""
    owner = path[:-1]
    while owner:
        if _has_code(modules.get(owner)):
            return modules[owner]
        owner = owner[:-1]
    return modules.get((), model)
