"""partition and combine: split a tree into trainable and other leaves, and join it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def partition(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into trainable leaves and all other leaves.

    Float leaves of 16 bits or more are trainable: norms and biases, scales, offsets and
    codebooks of QTensors. Codes, integers and float8 scales are not trainable. No leaf
    is copied.

    Args:
      tree: any pytree of arrays and QTensors.

    Returns:
      (trainable, rest): two trees with the structure of `tree`. Each leaf is in one of
      the trees. The other tree has None in the same place.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> x, qt = jnp.ones((2, 64)), jaxq.quantize(jnp.ones((64, 8)), "int8")
      >>> trainable, rest = jaxq.partition({"w": qt})
      >>> loss = lambda trainable: (x @ jaxq.combine(trainable, rest)["w"]).sum()
      >>> scale_gradient = jax.grad(loss)(trainable)["w"].scale
      >>> scale_gradient.shape, float(scale_gradient[0, 0])
      ((8, 1), 16256.0)
    """
    trainable = jax.tree.map(lambda x: x if _is_trainable(x) else None, tree)
    rest = jax.tree.map(lambda x: None if _is_trainable(x) else x, tree)
    return trainable, rest


def combine(trainable: Any, rest: Any) -> Any:
    """Joins the two trees of `partition`.

    Args:
      trainable: the first tree that `partition` returned, or a tree of the same
        structure with new arrays.
      rest: the second tree that `partition` returned.

    Returns:
      The tree with the leaves of both trees.

    Raises:
      ValueError: the trees have different structures, or both trees have a leaf in the
        same place.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> tree = {"scale": jnp.ones(2), "step": 3}
      >>> jaxq.combine(*jaxq.partition(tree)) == tree
      True
    """
    different = sorted(_paths(trainable) ^ _paths(rest))
    if different:
        raise ValueError(
            "combine: the two trees are not the halves of one tree. Only one of them "
            f"has {', '.join(different[:5])}. Pass both results of one partition call."
        )

    def join(path: Any, leaf: Any, other: Any) -> Any:
        if leaf is not None and other is not None:
            place = jax.tree_util.keystr(path) or "the root"
            raise ValueError(
                f"combine: both trees have a leaf at {place}. Pass both results of one "
                "partition call."
            )
        return other if leaf is None else leaf

    return jax.tree.map_with_path(join, trainable, rest, is_leaf=_is_none)


def _is_trainable(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return False
    return jnp.dtype(dtype).itemsize > 1


def _paths(tree: Any) -> set[str]:
    """The paths of all leaves; None counts as a leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_none)
    return {jax.tree_util.keystr(path) for path, _ in leaves}


def _is_none(leaf: Any) -> bool:
    return leaf is None
