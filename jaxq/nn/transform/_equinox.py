"""How Equinox layers use their weights. The package itself is not imported.

Equinox keeps a matrix as `[out, in]`, and computes `weight @ x`. A tree has no other
sign of this, so the class of the module that holds the array decides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# The attributes that hold a matrix `[out, in]`, by the name of the class.
_MATRICES = {
    "Linear": ("weight",),
    "GRUCell": ("weight_ih", "weight_hh"),
    "LSTMCell": ("weight_ih", "weight_hh"),
}
# What the other layers do with the attribute `weight`. A QTensor does not support it.
_OTHER_USES = {
    "Conv": "passes it to lax.conv_general_dilated",
    "ConvTranspose": "passes it to lax.conv_general_dilated",
    "Embedding": "indexes it",
}
_WRAPPERS = ("SpectralNorm", "WeightNorm")


class EquinoxWeight(NamedTuple):
    """The weight of an Equinox layer.

    Attributes:
      is_table: it is the table of an Embedding.
      problem: why it cannot be quantized. Empty for a matrix `[out, in]`.
    """

    is_table: bool = False
    problem: str = ""


def find_equinox_weight(params: Any, keys: tuple[Any, ...]) -> EquinoxWeight | None:
    """The weight at a path of a tree, if an Equinox layer holds it. None otherwise.

    Args:
      params: the tree.
      keys: the path of an array, as `jax.tree_util` returns it.
    """
    modules = [_equinox_classes(node) for node in _nodes_on_path(params, keys[:-1])]
    attribute = getattr(keys[-1], "name", None) if keys else None
    if attribute is None or not modules or not modules[-1]:
        return None
    classes = modules[-1]
    for wrapper in _WRAPPERS:
        if any(wrapper in names for names in modules):
            problem = f"eqx.nn.{wrapper} normalizes it at each call"
            return EquinoxWeight(problem=_with_remedy(problem))
    for name, attributes in _MATRICES.items():
        if name in classes and attribute in attributes:
            return EquinoxWeight()
    for name, use in _OTHER_USES.items():
        if name in classes and attribute == "weight":
            problem = f"eqx.nn.{name} {use}, and a QTensor does not support this"
            return EquinoxWeight(name == "Embedding", _with_remedy(problem))
    return None


def _with_remedy(problem: str) -> str:
    return f"{problem}. Skip it, or call jaxq.dequantize_params(model) inside jit"


def _equinox_classes(node: Any) -> list[str]:
    """The names of the Equinox classes of an object, its own class first."""
    return [
        cls.__name__
        for cls in type(node).__mro__
        if cls.__module__.partition(".")[0] == "equinox"
    ]


def _nodes_on_path(params: Any, keys: tuple[Any, ...]) -> list[Any]:
    """The tree and the nodes on a path. Empty if a key is of an unknown type."""
    nodes = [params]
    for key in keys:
        if hasattr(key, "name"):
            nodes.append(getattr(nodes[-1], key.name))
        elif hasattr(key, "idx"):
            nodes.append(nodes[-1][key.idx])
        elif isinstance(nodes[-1], dict) and hasattr(key, "key"):
            nodes.append(nodes[-1][key.key])
        else:
            return []
    return nodes
