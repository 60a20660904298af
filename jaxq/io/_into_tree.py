"""Puts the arrays of a file or a description into a tree of the same structure.

A file holds dicts, lists and tuples. `into_tree` puts its arrays into other containers,
such as the named tuples of an optax state and the Variables of an `nnx.state`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.qtensor import LEAVES, QTensor, is_nnx_variable


def into_tree(
    tree: Any, value: Any, *, caller: str, source: str, place: str = "file"
) -> Any:
    """A tree of the structure of `tree` with the leaves of a file or a description.

    Args:
      tree: any pytree of arrays, shapes and QTensors. It is not changed.
      value: the tree of the file or the description.
      caller: the public function, at the start of errors.
      source: the path of the file, or "the description", for errors.
      place: "file" or "description", for errors.

    Raises:
      ValueError: the trees do not fit. The error lists all problems.
    """
    expected = leaves_by_name(tree, f"{caller}: into= for {source}")
    saved = leaves_by_name(value, f"{caller}: {source}")
    problems = [f"{name} is missing in the {place}" for name in expected.keys() - saved]
    problems += [f"{name} is only in the {place}" for name in saved.keys() - expected]
    for name in expected.keys() & saved:
        wanted, got = _description(expected[name]), _description(saved[name])
        if wanted != got and not _is_counted(saved[name], expected[name]):
            problems.append(f"{name} is {got} in the {place}, but {wanted} in into=")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in sorted(problems))
        raise ValueError(f"{caller}: {source} does not fit into=:\n{lines}")
    leaves = [_in_variable(saved[name], leaf) for name, leaf in expected.items()]
    return jax.tree.structure(tree, is_leaf=_is_leaf).unflatten(leaves)


def leaves_by_name(tree: Any, owner: str) -> dict[str, Any]:
    """The leaves of a tree by the text of their paths. A QTensor is one leaf.

    Raises:
      ValueError: two leaves have the same text: {"a/b": x, "a": {"b": y}}.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf):
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


def value_in(leaf: Any) -> Any:
    """The value of a leaf that is an nnx Variable, or the leaf itself."""
    return leaf.get_value() if is_nnx_variable(leaf) else leaf


def _description(leaf: Any) -> str:
    """Shape and dtype of an array, or spec and blocks of a QTensor, or the type."""
    value = value_in(leaf)
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


def _in_variable(saved: Any, leaf: Any) -> Any:
    """A leaf of the file, in a Variable if `leaf` is one."""
    if is_nnx_variable(leaf):
        # A Variable is a pytree of its value.
        return jax.tree.map(
            lambda _: saved, leaf, is_leaf=lambda x: isinstance(x, QTensor)
        )
    return saved
