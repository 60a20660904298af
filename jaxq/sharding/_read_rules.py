"""read_rules: the PartitionSpecs of a float model, as rules for its quantized model."""

from __future__ import annotations

from typing import Any

from jax.sharding import PartitionSpec

from jaxq.sharding._entries import find_entries, present_spec, state_of


def read_rules(tree: Any) -> dict[str, PartitionSpec]:
    """Returns the PartitionSpec of each array by its path.

    A quantized model has the paths of the float model. So the result is `rules` for
    `specs`, `place` and `jaxq.load` of a quantized model whose metadata are gone, for
    example linen variables after `nn.unbox`.

    Args:
      tree: a float model, the variables of a linen module with their boxes, or any
        tree. The PartitionSpec of an array is that of its metadata (`nnx` and `nn`
        `.with_partitioning`, logical axis rules), or else of its present sharding.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> list(jaxq.sharding.read_rules({"up": {"kernel": jnp.ones((4, 2))}}))
      ['up/kernel']
    """
    entries, _ = find_entries(state_of(tree), None, "read_rules")
    return {
        entry.path: present_spec(entry.value) if entry.spec is None else entry.spec
        for entry in entries
        if hasattr(entry.value, "shape")
    }
