"""Tangents of products whose derivative is that of another function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero


def checkpointed_tangent(
    function: Callable[..., jax.Array], primals: Any, tangents: Any
) -> jax.Array | None:
    """The tangent of `function(*primals)`, computed inside `jax.checkpoint`.

    A policy of an outer `jax.checkpoint` may save all dot products. So this computes
    only products that a tangent needs: neither the value of the function nor a product
    with a tangent that is zero.

    Args:
      function: a function of pytrees of arrays.
      primals: the arguments.
      tangents: of the arguments. A tangent that is zero is a `SymbolicZero`.

    Returns:
      The tangent, or None if all tangents are zero.
    """
    leaves, structure = jax.tree.flatten(primals)
    moved = {
        position: tangent
        for position, tangent in enumerate(jax.tree.leaves(tangents))
        if not isinstance(tangent, SymbolicZero)
        and tangent.dtype != jax.dtypes.float0  # integers have no tangent
    }
    if not moved:
        return None

    def tangent_of(leaves: list[Any], moved: dict[int, jax.Array]) -> jax.Array:
        def of_moved(values: dict[int, Any]) -> jax.Array:
            filled = [values.get(i, leaf) for i, leaf in enumerate(leaves)]
            return function(*jax.tree.unflatten(structure, filled))

        return jax.jvp(of_moved, ({i: leaves[i] for i in moved},), (moved,))[1]

    return jax.checkpoint(tangent_of, prevent_cse=False)(leaves, moved)
