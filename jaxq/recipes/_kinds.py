"""The kinds of layers that a rule can name.

jaxq's own kinds are listed here. `jaxq.nn.register_layer` adds a kind.
"""

from __future__ import annotations

# One layer has two names: that of flax nnx and that of flax linen.
_SAME_LAYER = {
    "Dense": "Linear",
    "DenseGeneral": "LinearGeneral",
    "Linear": "Dense",
    "LinearGeneral": "DenseGeneral",
}

_KINDS = [
    # Layers of flax nnx and flax linen.
    *("Linear", "LinearGeneral", "Dense", "DenseGeneral", "Einsum"),
    *("Conv", "ConvTranspose", "Embed"),
    # An array of a tree that is not a Flax model.
    "Array",
    # A matrix that a module of the user's own class multiplies with.
    "Param",
]


def kinds() -> tuple[str, ...]:
    """The kind names that `Rule(kinds=...)` accepts.

    Example:
      >>> import jaxq
      >>> "Linear" in jaxq.recipes.kinds()
      True
    """
    return tuple(_KINDS)


def register_kind(name: str) -> None:
    """Adds a kind name for `Rule(kinds=...)`; a known name is kept."""
    if name not in _KINDS:
        _KINDS.append(name)


def unregister_kind(name: str) -> None:
    """Removes a kind name that `register_kind` added."""
    _KINDS.remove(name)


def names_of(kind: str) -> set[str]:
    """The names under which a rule may list a layer of this kind.

    A rule for "Linear" also applies to linen's Dense, and the other way round.
    """
    return {kind, _SAME_LAYER.get(kind, kind)}
