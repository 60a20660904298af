"""labels: shows optax which parameters are weights, steps or constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxq.nn.layers import QuantStats, trained_facts
from jaxq.qtensor import TRAINED_LEAVES, TrainedWeight
from jaxq.training._states import Path
from jaxq.training._weights import path_of

_WEIGHT, _STEP, _CONSTANT = "weight", "step", "constant"
_CONSTANTS = ("input_scale", "switch", "averaging")


def labels(params: Any) -> Any:
    """A tree like `params` with a label for each array.

    There are three labels:

    - "step": trained scales, zero points, offsets, codebooks and ranges.
    - "constant": numbers of a trained weight that are not trained: static ranges from
      calibration, the input scales of AWQ, and the switches of a `Schedule`. Their
      gradients are 0, but weight decay would change them.
    - "weight": weights, and all other parameters of the model.

    Pass this function as `param_labels` of `optax.multi_transform`, with
    `optax.set_to_zero()` for "constant". Or use it to restrict weight decay to weights.

    In an nnx model, constants are `jaxq.nn.QuantStats`. So
    `nnx.Optimizer(..., wrt=nnx.Param)` never changes them.

    Args:
      params: a tree with `TrainedWeight`s, or a State of a prepared nnx model, such as
        `nnx.state(qat, nnx.Param)`. In other trees, all labels are "weight".

    Returns:
      A tree of strings with the structure of `params`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq, optax
      >>> params = jaxq.training.prepare(
      ...   {"w": jnp.eye(64)}, "int4", ranges=jaxq.training.lsq())
      >>> jax.tree.leaves(jaxq.training.labels(params))
      ['weight', 'step']
      >>> def decayed(params):
      ...   return jax.tree.map(lambda label: label == "weight",
      ...                       jaxq.training.labels(params))
      >>> tx = optax.adamw(1e-3, mask=decayed)
    """
    return jax.tree.map(_labels_of, params, is_leaf=_is_labelled)


def _is_labelled(x: Any) -> bool:
    return isinstance(x, TrainedWeight | nnx.State)


def _labels_of(x: Any) -> Any:
    """The labels of a trained weight, a State or another leaf."""
    if isinstance(x, TrainedWeight):
        return _labels_of_weight(x)
    if isinstance(x, nnx.State):
        return _labels_of_state(x)
    return _WEIGHT


def _labels_of_weight(weight: TrainedWeight) -> TrainedWeight:
    constants = {*_CONSTANTS}
    if weight.range_gradient is None:
        constants = {*_CONSTANTS, "input_range"}
    changes = {}
    for name in TRAINED_LEAVES:
        label = _CONSTANT if name in constants else _STEP
        if name == "floats":
            label = _WEIGHT
        # A scale has several leaves if it is quantized itself.
        leaf = getattr(weight, name)
        changes[name] = jax.tree.map(lambda _, label=label: label, leaf)
    return dataclasses.replace(weight, **changes)


def _labels_of_state(state: nnx.State) -> nnx.State:
    variables = dict(nnx.to_flat_state(state))
    owners = {path[:-1] for path in variables if _is_trained_floats(path, variables)}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    leaf_labels = []
    for keys, _ in leaves:
        path = tuple(getattr(key, "key", path_of((key,))) for key in keys)
        if path not in variables:
            path = path[:-1]  # the last key leads from a Variable to its value
        leaf_labels.append(_label(path, variables, owners))
    return jax.tree.unflatten(jax.tree.structure(state), leaf_labels)


def _is_trained_floats(path: Path, variables: Mapping[Path, Any]) -> bool:
    """Whether a Variable or array has the floats of a `TrainedParam`."""
    if path[-1:] != ("floats",):
        return False
    if isinstance(variables[path], nnx.Variable):
        return trained_facts(variables[path]) is not None
    # A State of arrays, as `nnx.as_pure` returns it, has only names.
    owner, num_keys = path[:-1], len(path)
    names = {p[num_keys - 1] for p in variables if p[: num_keys - 1] == owner}
    return names <= {*TRAINED_LEAVES, "norm"}


def _label(path: Path, variables: Mapping[Path, Any], owners: set[Path]) -> str:
    """The label of a leaf. `owners` holds the paths of the trained weights."""
    owner = path[:-1]
    # Scales that are quantized themselves are a trained weight in a trained weight.
    is_scale = owner[-1:] == ("scale",) and owner[:-1] in owners
    if owner not in owners or (path[-1] == "floats" and not is_scale):
        return _WEIGHT
    is_constant = path[-1] in _CONSTANTS or isinstance(variables[path], QuantStats)
    return _CONSTANT if is_constant else _STEP
