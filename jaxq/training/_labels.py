"""labels: shows optax which parameters are weights, and which are scales or ranges."""

from __future__ import annotations

from typing import Any

import jax

from jaxq.training._weights import path_of

_WEIGHT, _STEP, _SWITCH = "weight", "step", "switch"
# The leaves of a `TrainedWeight` that a `Schedule` sets.
_SWITCHES = ("switch", "averaging")


def labels(params: Any) -> Any:
    """A tree like `params` with a label for each array.

    There are three labels:

    - "step": trained scales, zero points, offsets, codebooks and ranges.
    - "switch": the switches of a `Schedule`. An optimizer should not change them.
    - "weight": weights, and all other parameters of the model.

    Pass this function as `param_labels` of `optax.multi_transform`. Or use it to
    exclude steps from weight decay, which would shrink them.

    Args:
      params: a tree with `TrainedWeight`s, such as `nnx.state(qat, nnx.Param)`.

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
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [tuple(path_of((key,)) for key in _named(keys)) for keys, _ in leaves]
    trained = {path[:-1] for path in names if path and path[-1] == "floats"}
    leaf_labels = [_label(path, trained) for path in names]
    return jax.tree.unflatten(jax.tree.structure(params), leaf_labels)


def _named(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path without the key `.value` that an nnx Variable adds."""
    is_value = bool(keys) and path_of(keys[-1:]) == "value"
    return keys[:-1] if is_value else keys


def _label(path: tuple[str, ...], trained: set[tuple[str, ...]]) -> str:
    """The label of a leaf. `trained` holds the paths of the trained weights."""
    owner = path[:-1]
    # Scales that are quantized themselves are a trained weight in a trained weight.
    is_scale = owner[-1:] == ("scale",) and owner[:-1] in trained
    if owner not in trained or (path[-1] == "floats" and not is_scale):
        return _WEIGHT
    return _SWITCH if path[-1] in _SWITCHES else _STEP
