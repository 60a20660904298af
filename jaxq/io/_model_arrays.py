"""All arrays of an nnx model by path, also arrays that are not in a Variable."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxq.nn.layers import input_transforms
from jaxq.qtensor import QTensor


def parameters(model: Any) -> dict[str, Any]:
    """The value of every array of a model or state by path.

    A Variable that two modules share has one path.

    Raises:
      ValueError: two parameters have the same path.
    """
    values: dict[str, Any] = {}
    for path, leaf in array_leaves(model):
        name = path_name(path)
        if name in values:
            raise ValueError(
                f"save: two parameters have the path {name!r}. Rename one attribute."
            )
        values[name] = value_of(leaf)
    return values


def array_leaves(model: Any) -> list[tuple[tuple, Any]]:
    """Path and leaf of every array of a model or state.

    A leaf is a Variable, or an array that the model holds without a Variable: a field
    of `nnx.data`, or a table of frequencies.
    """
    if isinstance(model, nnx.State):
        return list(nnx.to_flat_state(model))
    leaves = [
        (path, leaf)
        for path, leaf in nnx.iter_graph(model)
        if isinstance(leaf, nnx.Variable) or is_array(leaf)
    ]
    # iter_graph also enters a bare QTensor. Its codes and scales are not leaves here.
    qtensor_paths = {path for path, leaf in leaves if isinstance(leaf, QTensor)}

    def inside_qtensor(path: tuple) -> bool:
        return any(path[:length] in qtensor_paths for length in range(len(path)))

    return [(path, leaf) for path, leaf in leaves if not inside_qtensor(path)]


def path_name(path: tuple) -> str:
    return "/".join(map(str, path))


def value_of(leaf: Any) -> Any:
    """The value of a Variable, or the array itself."""
    return leaf if is_array(leaf) else leaf.get_value()


def is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct | QTensor)


def input_transforms_of(model: Any) -> dict[str, str] | None:
    """The name of each layer's run-time input transform by path.

    None for a state, which has arrays but no layers.
    """
    return input_transforms(model) if isinstance(model, nnx.Module) else None
