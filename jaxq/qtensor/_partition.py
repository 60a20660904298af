"""Trees in two: what gradients reach, and the rest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def partition(tree: Any) -> tuple[Any, Any]:
    """The leaves of a tree that can be trained, and the others: codes, integers, float8 scales.

    Args:
      tree: any pytree of arrays and QTensors.

    Returns:
      (trainable, rest): trees like `tree`, each with None where the other has a leaf. Floats of 16 bits and more are
      trainable: norms and biases, scales, offsets and codebooks of QTensors. Neither moves nor copies anything.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> x, qt = jnp.ones((2, 64)), jaxq.quantize(jnp.ones((64, 8)), "int8")
      >>> trainable, rest = jaxq.partition({"w": qt})
      >>> dscale = jax.grad(lambda t: (x @ jaxq.combine(t, rest)["w"]).sum())(trainable)["w"].scale
      >>> dscale.shape, float(dscale[0, 0])
      ((8, 1), 16256.0)
    """

    def trains(leaf: Any) -> bool:
        dtype = getattr(leaf, "dtype", None)
        return (
            dtype is not None
            and jnp.issubdtype(dtype, jnp.floating)
            and jnp.dtype(dtype).itemsize > 1
        )

    first = jax.tree.map(lambda leaf: leaf if trains(leaf) else None, tree)
    return first, jax.tree.map(lambda leaf: None if trains(leaf) else leaf, tree)


def combine(trainable: Any, rest: Any) -> Any:
    """The tree that `partition` took apart, with leaves that may have changed meanwhile.

    Args:
      trainable: as `partition` gives it, or of new arrays of the same structure.
      rest: as `partition` gives it.

    Raises:
      ValueError: the two have other structures, or both a leaf at one place.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> tree = {"scale": jnp.ones(2), "step": 3}
      >>> jaxq.combine(*jaxq.partition(tree)) == tree
      True
    """

    def places(tree: Any) -> set[str]:
        found = jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda leaf: leaf is None
        )
        return {jax.tree_util.keystr(path) for path, _ in found}

    if odd := sorted(places(trainable) ^ places(rest)):
        raise ValueError(
            f"combine: the two trees are not the halves of one: {', '.join(odd[:5])} is in one of them."
        )

    def one(path: Any, a: Any, b: Any) -> Any:
        if a is not None and b is not None:
            raise ValueError(
                f"combine: both trees have a leaf at {jax.tree_util.keystr(path) or 'the root'}."
            )
        return b if a is None else a

    return jax.tree.map_with_path(
        one, trainable, rest, is_leaf=lambda leaf: leaf is None
    )
