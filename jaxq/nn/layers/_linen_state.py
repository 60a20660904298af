"""QTensors for `flax.serialization`: `to_bytes`, `to_state_dict` and back into variables quantized the same way.

A state dict holds the arrays of a QTensor by name, and what they mean (format, granularity, shape) as text that must be
that of the target: codes of one format are not read as codes of another.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization

from jaxq.qtensor import QTensor

_MEANING = "meta"


def register_serialization() -> None:
    """Tells `flax.serialization` what QTensors are."""
    serialization.register_serialization_state(
        QTensor, _to_state, _from_state, override=True
    )


def _to_state(qt: QTensor) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(qt)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves} | {
        _MEANING: repr(qt.meta)
    }


def _from_state(target: QTensor, state: Any) -> QTensor:
    if not isinstance(state, dict) or _MEANING not in state:
        raise ValueError(
            f"flax.serialization: {target!r} cannot take what was no QTensor when it was saved. Restore into the float "
            "variables, and quantize them."
        )
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    fits = state[_MEANING] == repr(target.meta) and set(names) | {_MEANING} == set(
        state
    )
    if not fits or any(
        state[name].shape != leaf.shape
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ):
        raise ValueError(
            f"flax.serialization: the saved array was quantized in another way than {target!r}. Restore into variables "
            "quantized by the same recipe, or use jaxq.load, which needs none."
        )
    return jax.tree.unflatten(structure, [jnp.asarray(state[name]) for name in names])
