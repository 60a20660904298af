"""QTensors for `flax.serialization`: `to_bytes`, `to_state_dict` and back.

A state dict holds the arrays of a QTensor by name, and its static description (format,
granularity, shape) as text. A QTensor is restored only if this text is equal to the
text of the target. Codes of one format are therefore never read as codes of another.
TrainedWeights are saved in the same way.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization

from jaxq.qtensor import QTensor, TrainedWeight

# The entry of a state dict that holds the static description.
_DESCRIPTION = "meta"


def register_serialization() -> None:
    """Tells `flax.serialization` how to save and restore QTensors."""
    for cls in (QTensor, TrainedWeight):
        serialization.register_serialization_state(
            cls, _to_state, _from_state, override=True
        )


def _to_state(qt: QTensor | TrainedWeight) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(qt)
    state = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return state | {_DESCRIPTION: repr(qt.meta)}


def _from_state(target: Any, state: Any) -> Any:
    """Restores the QTensor of a state dict.

    Raises:
      ValueError: `state` is not the state of a QTensor; the description, names or
        shapes in `state` differ from those of `target`.
    """
    if not isinstance(state, dict) or _DESCRIPTION not in state:
        raise ValueError(
            f"flax.serialization: the target is {target!r}, but the saved value is not "
            f"a {type(target).__name__} (it is a {type(state).__name__}). Restore into "
            "the float variables, and quantize the result."
        )
    if not _matches_target(target, state):
        remedy = "Restore into variables that were made by the same recipe"
        if isinstance(target, QTensor):
            remedy += ", or use jaxq.load, which needs no target"
        raise ValueError(
            f"flax.serialization: the saved {type(target).__name__} was quantized in "
            f"another way than {target!r}. {remedy}."
        )
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    arrays = [jnp.asarray(state[jax.tree_util.keystr(path)]) for path, _ in leaves]
    return jax.tree.unflatten(structure, arrays)


def _matches_target(target: Any, state: dict[str, Any]) -> bool:
    """True if a state dict has the target's description, names and shapes."""
    if state[_DESCRIPTION] != repr(target.meta):
        return False
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(target)
    }
    if set(state) != {*leaves, _DESCRIPTION}:
        return False
    return all(state[name].shape == leaf.shape for name, leaf in leaves.items())
