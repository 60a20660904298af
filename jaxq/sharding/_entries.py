"""Every array of a tree or model, its path, and the PartitionSpec wanted for it.

A PartitionSpec here has the mesh axes of each axis of a float array. For a QTensor this
is the array that it represents, not its codes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxq.qtensor import (
    QTensor,
    TrainedWeight,
    axes_of_array,
    is_nnx_module,
    is_nnx_variable,
)
from jaxq.recipes import compile_pattern

# The metadata of an nnx Variable that holds a QTensor. They are those of the float
# weight's `out_sharding` and `sharding_rules`. Flax would apply metadata of these names
# to every leaf of the QTensor.
WEIGHT_SHARDING = "weight_sharding"
WEIGHT_SHARDING_RULES = "weight_sharding_rules"
_MOST_LISTED = 12


class Entry(NamedTuple):
    """An array of a tree.

    Attributes:
      path: its path, components joined by "/".
      leaf: the leaf of the tree: an array, a QTensor, an nnx Variable or a linen box.
      value: the array or QTensor in the leaf.
      spec: the PartitionSpec that is wanted for it. None if neither a rule nor
        metadata name one.
    """

    path: str
    leaf: Any
    value: Any
    spec: PartitionSpec | None

    def leaf_with(self, value: Any) -> Any:
        """Another value in the kind of leaf that the tree has."""
        if is_nnx_variable(self.leaf):
            return self.leaf.replace(value)
        return self.leaf.replace_boxed(value) if is_box(self.leaf) else value


def state_of(tree: Any) -> Any:
    """The arrays of an nnx model as an `nnx.State`; any other tree itself."""
    if not is_nnx_module(tree):
        return tree
    from flax import nnx  # lazy: a user without Flax has no such model

    return nnx.state(tree)


def find_entries(
    tree: Any, rules: Mapping[str, PartitionSpec] | None, caller: str
) -> tuple[list[Entry], Any]:
    """The arrays of a tree with the specs that are wanted for them, and its treedef.

    Args:
      tree: the result of `state_of`.
      rules: a PartitionSpec by pattern. None reads the metadata of Flax.
      caller: the public function, for errors.

    Raises:
      TypeError: a rule is not a pattern with a PartitionSpec, or the tree has a weight
        in training.
      ValueError: a pattern is wrong or matches no array, or no rule matches an array
        with several axes.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    patterns = None if rules is None else _Patterns(rules, caller)
    entries = []
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        value = _value_of(leaf)
        _refuse_training(path, value, caller)
        spec = _spec_of_metadata(leaf)
        if patterns is not None:
            spec = patterns.find(path, value)
        entries.append(Entry(path, leaf, value, spec))
    if patterns is not None:
        patterns.check()
    return entries, treedef


def single_entry(value: Any, spec: PartitionSpec, caller: str) -> Entry:
    """The entry of a tree that is one QTensor or one array."""
    value = _value_of(value)
    _refuse_training("w", value, caller)
    if not isinstance(value, QTensor) and not hasattr(value, "shape"):
        raise TypeError(
            f"{caller}: one PartitionSpec is for one QTensor or array, got "
            f"{type(value).__name__}. For a tree or a model, pass a dict of patterns "
            "with PartitionSpecs."
        )
    path = value.meta.name if isinstance(value, QTensor) else ""
    return Entry(path, value, value, spec)


def present_spec(value: Any) -> PartitionSpec:
    """How an array, or the array that a QTensor represents, is sharded now."""
    is_quantized = isinstance(value, QTensor)
    sharding = named_sharding(value.data if is_quantized else value)
    if sharding is None:
        return PartitionSpec()
    if is_quantized:
        return PartitionSpec(*axes_of_array(value, sharding.spec))
    return sharding.spec


def named_sharding(value: Any) -> NamedSharding | None:
    """The sharding of an array over a mesh; None for an array on one device."""
    sharding = getattr(value, "sharding", None)
    is_named = isinstance(sharding, NamedSharding) and not sharding.mesh.empty
    return sharding if is_named else None


def listed(names: list[str]) -> str:
    """The names, or the first ones if they are many."""
    more = len(names) - _MOST_LISTED
    shown = ", ".join(names[:_MOST_LISTED])
    return f"{shown} and {more} more" if more > 0 else shown


class _Patterns:
    """The rules, which of them matched, and the arrays that none matched."""

    def __init__(self, rules: Mapping[str, PartitionSpec], caller: str):
        if not isinstance(rules, Mapping):
            raise TypeError(
                f"{caller}: rules must be a dict of patterns with their "
                f"jax.sharding.PartitionSpec, got {type(rules).__name__}."
            )
        self._rules = []
        for pattern, spec in rules.items():
            if not isinstance(pattern, str) or not isinstance(spec, PartitionSpec):
                raise TypeError(
                    f"{caller}: rules must be a dict of patterns with their "
                    f"jax.sharding.PartitionSpec, got {pattern!r}: {spec!r}."
                )
            try:
                compiled = compile_pattern(pattern)
            except ValueError as error:
                raise ValueError(f"{caller}: rule {pattern!r}: {error}") from error
            self._rules.append((pattern, compiled, spec))
        self._caller = caller
        self._used: set[str] = set()
        self._paths: list[str] = []
        self._unmatched: list[str] = []

    def find(self, path: str, value: Any) -> PartitionSpec:
        """The spec of the first rule that matches, or P() if no rule matches."""
        self._paths.append(path)
        for pattern, compiled, spec in self._rules:
            if compiled.matches(path):
                self._used.add(pattern)
                return spec
        if getattr(value, "ndim", 0) > 1:
            self._unmatched.append(path)
        return PartitionSpec()

    def check(self) -> None:
        """Raises a ValueError if a rule matched no array, or an array needs a rule."""
        messages = []
        unused = [p for p, _, _ in self._rules if p not in self._used]
        if self._paths == [""] and (unused or self._unmatched):
            raise ValueError(
                f"{self._caller}: one QTensor or array has no path for the patterns "
                f"{[p for p, _, _ in self._rules]} to match. Pass its PartitionSpec as "
                "rules, not a dict."
            )
        if unused:
            messages.append(
                f"{self._caller}: the rules {unused} match no array. The paths are: "
                f"{listed(self._paths)}."
            )
        if self._unmatched:
            messages.append(
                f"{self._caller}: no rule matches {listed(self._unmatched)}. An array "
                "with several axes needs a rule. Add '**': PartitionSpec() as the "
                "last rule to replicate all other arrays."
            )
        if messages:
            raise ValueError("\n".join(messages))


def _refuse_training(path: str, value: Any, caller: str) -> None:
    if isinstance(value, TrainedWeight):
        raise TypeError(
            f"{caller}: {path} is a weight in quantization-aware training. Place the "
            "float model before jaxq.training.prepare."
        )


def _is_leaf(node: Any) -> bool:
    is_weight = isinstance(node, QTensor | TrainedWeight)
    return is_weight or is_nnx_variable(node) or is_box(node)


def is_box(node: Any) -> bool:
    """Whether a node is a linen box of metadata, such as `nn.Partitioned`."""
    meta = sys.modules.get("flax.core.meta")
    return meta is not None and isinstance(node, meta.AxisMetadata)


def _value_of(leaf: Any) -> Any:
    if is_nnx_variable(leaf):
        return leaf.get_value()
    return value_in_box(leaf)


def value_in_box(node: Any) -> Any:
    """The value in a linen box; any other node itself."""
    if not is_box(node):
        return node
    # `unbox` of some boxes would shard the value.
    return node.value if hasattr(node, "value") else node.unbox()


def _spec_of_metadata(leaf: Any) -> PartitionSpec | None:
    """The PartitionSpec that Flax's metadata name, after the logical axis rules."""
    if is_nnx_variable(leaf):
        metadata = leaf.get_metadata()
        axes = metadata.get(WEIGHT_SHARDING) or metadata.get("out_sharding")
        rules = metadata.get(WEIGHT_SHARDING_RULES) or metadata.get("sharding_rules")
        if isinstance(axes, NamedSharding):
            return axes.spec
        return None if not axes else _after_rules(axes, rules)
    if is_box(leaf):
        # A QuantizedBox has the box of the float weight.
        leaf = getattr(leaf, "box", leaf)
    if not hasattr(leaf, "get_partition_spec"):
        return None
    return _after_rules(leaf.get_partition_spec(), getattr(leaf, "rules", None))


def _after_rules(axes: Any, rules: Any) -> PartitionSpec:
    """Mesh axes in place of logical axes."""
    from flax.core import spmd  # lazy: only Flax has such metadata

    return spmd.get_pspec(PartitionSpec(*axes), rules)
