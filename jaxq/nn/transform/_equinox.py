"""How Equinox modules use their arrays. The package itself is not imported.

Equinox keeps a matrix as `[out, in]`, and computes `weight @ x`. A tree has no other
sign of this, so the class of the module that holds the array decides. A user's own
module may compute anything, so the axes of its arrays are not known.
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
# The attributes that no product contracts. In a stack of layers they have two axes.
_GAINS_AND_BIASES = {
    "Linear": ("bias",),
    "GRUCell": ("bias", "bias_n"),
    "LSTMCell": ("bias",),
    "Conv": ("bias",),
    "ConvTranspose": ("bias",),
    "GroupNorm": ("weight", "bias"),
    "LayerNorm": ("weight", "bias"),
    "RMSNorm": ("weight", "bias"),
    "WeightNorm": ("g",),
}
_WRAPPERS = ("SpectralNorm", "WeightNorm")


class EquinoxArray(NamedTuple):
    """An array of an Equinox module.

    Attributes:
      problem: why it cannot be quantized. Empty if it can.
      is_table: it is the table of an Embedding.
      is_weight: False for gains and biases.
      has_known_axes: False if a module of the user's own holds it. True for a matrix
        `[out, in]` and for all other arrays of Equinox's layers.
    """

    problem: str = ""
    is_table: bool = False
    is_weight: bool = True
    has_known_axes: bool = True


def find_equinox_array(params: Any, keys: tuple[Any, ...]) -> EquinoxArray | None:
    """The array at a path of a tree, if an Equinox module holds it. None otherwise.

    Args:
      params: the tree.
      keys: the path of an array, as `jax.tree_util` returns it.
    """
    modules = [_equinox_classes(node) for node in _nodes_on_path(params, keys[:-1])]
    if not any(modules):
        return None
    classes = modules[-1]
    # None for an array in a list or a dict.
    attribute = getattr(keys[-1], "name", None)
    if _is_listed(_GAINS_AND_BIASES, classes, attribute):
        return EquinoxArray(is_weight=False)
    for wrapper in _WRAPPERS:
        if any(wrapper in names for names in modules):
            problem = f"eqx.nn.{wrapper} normalizes it at each call"
            return EquinoxArray(_with_remedy(problem))
    if _is_listed(_MATRICES, classes, attribute):
        return EquinoxArray()
    for name, use in _OTHER_USES.items():
        if name in classes and attribute == "weight":
            problem = f"eqx.nn.{name} {use}, and a QTensor does not support this"
            return EquinoxArray(_with_remedy(problem), is_table=name == "Embedding")
    return EquinoxArray(has_known_axes=False)


def _is_listed(
    attributes: dict[str, tuple[str, ...]], classes: list[str], attribute: str | None
) -> bool:
    return any(attribute in attributes.get(name, ()) for name in classes)


def _with_remedy(problem: str) -> str:
    return f"{problem}. Skip it: no other rule can quantize it"


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
