"""Puts the arrays of a file into a tree of the same structure.

A file holds dicts, lists and tuples. `into_tree` puts its arrays into other containers,
such as the named tuples of an optax state and the Variables of an `nnx.state`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.qtensor import LEAVES, QTensor, is_nnx_variable


def into_tree(tree: Any, value: Any, path: Path) -> Any:
    """A tree of the structure of `tree` with the leaves of a file.

    Args:
      tree: any pytree of arrays, shapes and QTensors. It is not changed.
      value: the tree of the file.
      path: the file, for errors.

    Raises:
      ValueError: tree and file do not fit. The error lists all problems.
    """
    named, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    expected = _by_name(named, f"load: into= for {path}")
    leaves = jax.tree_util.tree_leaves_with_path(value, is_leaf=_is_leaf)
    saved = _by_name(leaves, f"load: {path}")
    problems = [f"{name} is missing in the file" for name in expected.keys() - saved]
    problems += [f"{name} is only in the file" for name in saved.keys() - expected]
    for name in expected.keys() & saved:
        wanted, got = _description(expected[name]), _description(saved[name])
        if wanted != got and not _is_counted(saved[name], expected[name]):
            problems.append(f"{name} is {got} in the file, but {wanted} in into=")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in sorted(problems))
        raise ValueError(f"load: {path} does not fit into=:\n{lines}")
    leaves = [_placed(saved[name], leaf) for name, leaf in expected.items()]
    return treedef.unflatten(leaves)


def _by_name(named: list[tuple[Any, Any]], owner: str) -> dict[str, Any]:
    """Leaves by the text of their paths. {"a/b": x, "a": {"b": y}} has one twice."""
    leaves: dict[str, Any] = {}
    for path, leaf in named:
        name = _name(path)
        if name in leaves:
            raise ValueError(
                f"{owner} has two leaves with the path {name!r}. Rename one key."
            )
        leaves[name] = leaf
    return leaves


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_leaf(node: Any) -> bool:
    """Whether a node has one entry in the file: an array or a QTensor."""
    if isinstance(node, QTensor):
        # Optimizers of nnx models hold QTensors whose leaves are Variables.
        return not is_nnx_variable(node.data)
    if is_nnx_variable(node):
        # optax.masked puts a node without arrays into a Variable.
        value = node.get_value()
        return isinstance(value, QTensor) or jax.tree_util.all_leaves([value])
    return False


def _value(leaf: Any) -> Any:
    return leaf.get_value() if is_nnx_variable(leaf) else leaf


def _description(leaf: Any) -> str:
    """Shape and dtype of an array, or spec and blocks of a QTensor, or the type."""
    value = _value(leaf)
    if isinstance(value, QTensor):
        leaves = [name for name in LEAVES if getattr(value, name) is not None]
        blocks = value.meta.geometry.block_shape
        # The name is for errors. Files do not have it.
        value = value.with_meta(name="")
        return f"{value!r} with blocks {blocks} and the leaves {', '.join(leaves)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype.name}{list(value.shape)}"
    return type(value).__name__


def _is_counted(saved: Any, leaf: Any) -> bool:
    """Whether the file has an integer array in the place of a Python int.

    The step of a flax `TrainState` is an int until the first jitted update.
    """
    if type(leaf) is not int or not isinstance(saved, jax.Array):
        return False
    return saved.ndim == 0 and jnp.issubdtype(saved.dtype, jnp.integer)


def _placed(saved: Any, leaf: Any) -> Any:
    """A leaf of the file, on the devices of `leaf`, in a Variable if `leaf` is one."""
    value = _value(leaf)
    arrays, treedef = jax.tree.flatten(saved)
    places = jax.tree.leaves(value)
    arrays = [_on_devices(a, place) for a, place in zip(arrays, places, strict=True)]
    saved = treedef.unflatten(arrays)
    if is_nnx_variable(leaf):
        # A Variable is a pytree of its value.
        return jax.tree.map(
            lambda _: saved, leaf, is_leaf=lambda x: isinstance(x, QTensor)
        )
    return saved


def _on_devices(array: Any, place: Any) -> Any:
    """`array` with the sharding of `place`, if the user chose that sharding."""
    if isinstance(place, jax.Array) and place.committed:
        return jax.device_put(jnp.asarray(array), place.sharding)
    return array
