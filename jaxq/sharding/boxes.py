"""The box of a quantized weight of Flax linen, which keeps the mesh axes of its floats.

Flax puts a weight that an initializer of `nn.with_partitioning` made into a box with
one name for each axis. Codes and scales have other axes. So a box of Flax around a
QTensor would shard every leaf as the floats. `QuantizedBox` gives each leaf its own
mesh axes, and otherwise leaves everything to the box of Flax. It also holds a
`TrainedWeight` of quantization-aware training.

The module imports Flax, so `jaxq.sharding` does not import it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import struct
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.qtensor import QUANTIZED, QTensor, TrainedWeight, leaf_specs
from jaxq.sharding._entries import WEIGHT_SHARDING, WEIGHT_SHARDING_RULES, value_in_box


class QuantizedBox(struct.PyTreeNode, meta.AxisMetadata):
    """A box of Flax that holds a QTensor or a `jaxq.qtensor.TrainedWeight`.

    `nn.unbox` returns the weight. `nn.get_partition_spec` and `nn.get_sharding` return
    the box with the PartitionSpec or the sharding of each leaf of the weight, and
    `nn.unbox` returns these too. `nn.scan` and `nn.vmap` add and remove the names of
    stacked axes, as in a box of floats.

    Unlike a box of floats, it does not constrain the sharding of its value under jit.
    Codes and scales stay where they are.

    Attributes:
      box: an `nn.Partitioned` or another box of metadata, with the weight as its
        value. Its names are those of the axes of the float weight.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import linen as nn
      >>> box = nn.Partitioned(jaxq.quantize(jnp.ones((64, 8)), "int8"), (None, "t"))
      >>> specs = nn.get_partition_spec(jaxq.nn.linen.QuantizedBox(box))
      >>> specs.value.data == PartitionSpec("t", None)
      True
    """

    box: Any

    @property
    def value(self) -> Any:
        """The QTensor or `TrainedWeight`."""
        return value_in_box(self.box)

    def unbox(self) -> Any:
        # Functions such as `dequantize_params` put floats into the box.
        return self.value if isinstance(self.value, QUANTIZED) else self.box.unbox()

    def replace_boxed(self, val: Any) -> QuantizedBox:
        return self.replace(box=self.box.replace_boxed(val))

    def add_axis(self, index: int, params: dict[Any, Any]) -> QuantizedBox:
        return self.replace(box=self.box.add_axis(index, params))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> QuantizedBox:
        return self.replace(box=self.box.remove_axis(index, params))

    def get_partition_spec(self) -> Any:
        """The box with a PartitionSpec in place of each leaf.

        The floats of a `TrainedWeight` get the spec of the box. Its scales and ranges
        are replicated.
        """
        axes = ()
        if hasattr(self.box, "get_partition_spec"):
            axes = self.box.get_partition_spec()
        if isinstance(self.value, TrainedWeight):
            return self.replace_boxed(_trained_specs(self.value, axes))
        if not isinstance(self.value, QTensor):
            return PartitionSpec(*axes)
        return self.replace_boxed(leaf_specs(self.value, axes))

    def get_sharding(self, mesh: Mesh) -> Any:
        """The box with a sharding in place of each leaf."""
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            self.get_partition_spec(),
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )

    def to_nnx_metadata(self) -> dict[str, Any]:
        """The value and metadata of an nnx Variable, for `nnx.bridge.ToNNX`."""
        box = self.box
        structure = jax.tree.structure(box, is_leaf=lambda node: node is not box)
        kept = {
            WEIGHT_SHARDING: getattr(box, "names", None),
            WEIGHT_SHARDING_RULES: getattr(box, "rules", None),
        }
        kept = {name: axes for name, axes in kept.items() if axes}
        return {"value": self.value, "box": structure, **kept}

    @classmethod
    def from_nnx_metadata(cls, metadata: dict[str, Any]) -> QuantizedBox:
        """The box of an nnx Variable, for `nnx.bridge.ToLinen`."""
        return cls(jax.tree.unflatten(metadata["box"], [metadata["value"]]))


def _trained_specs(weight: TrainedWeight, axes: Any) -> TrainedWeight:
    """The weight with a PartitionSpec in place of each leaf."""
    replicated = jax.tree.map(lambda _: PartitionSpec(), weight)
    return dataclasses.replace(replicated, floats=PartitionSpec(*axes))


def boxed_like(weight: Any, old: Any) -> Any:
    """A new weight in the box of the old weight, or alone if that had no box.

    Args:
      weight: a QTensor, a `TrainedWeight` or an array.
      old: a weight of linen variables, with or without a box.
    """
    if not isinstance(old, meta.AxisMetadata):
        return weight
    box = old.box if isinstance(old, QuantizedBox) else old
    box = box.replace_boxed(weight)
    return QuantizedBox(box) if isinstance(weight, QUANTIZED) else box


def with_quantized_boxes(tree: Any) -> Any:
    """A tree in which each box with a quantized weight is a `QuantizedBox`."""

    def changed(node: Any) -> Any:
        if not isinstance(node, meta.AxisMetadata):
            return node
        value = value_in_box(node)
        return boxed_like(value, node) if isinstance(value, QUANTIZED) else node

    def is_leaf(node: Any) -> bool:
        # A weight outside of boxes stays the same object.
        return isinstance(node, meta.AxisMetadata | QUANTIZED)

    return jax.tree.map(changed, tree, is_leaf=is_leaf)
