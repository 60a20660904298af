"""A function that each device of a mesh with explicit axes calls on its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding


def call_on_parts(
    fn: Callable[..., Any], mesh: Any, in_specs: tuple, out_specs: Any, *args: Any
) -> Any:
    """`fn` of the parts of each device, in `jax.shard_map`.

    The arguments are resharded first, so this must be traced under `jax.jit`. Codes and
    scales of a QTensor then move between devices, and its floats do not.

    Args:
      fn: function of the parts.
      mesh: a mesh whose axes are all explicit.
      in_specs: for each argument, the PartitionSpec of each leaf.
      out_specs: the PartitionSpecs of the results.
      *args: pytrees of arrays.
    """
    args = jax.tree.map(
        lambda leaf, spec: jax.sharding.reshard(leaf, NamedSharding(mesh, spec)),
        args,
        in_specs,
    )
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*args)
