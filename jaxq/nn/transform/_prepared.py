"""Refuses models that are prepared for quantization-aware training."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxq.nn.layers import TrainedParam
from jaxq.qtensor import TrainedWeight


def refuse_prepared(model: Any, caller: str) -> None:
    """Raises a ValueError if a model has trained weights.

    Args:
      model: an nnx module or a tree.
      caller: the public function, for the error.
    """
    if isinstance(model, nnx.Module):
        paths = [
            "/".join(map(str, path))
            for path, module in nnx.iter_modules(model)
            if isinstance(module, TrainedParam)
        ]
    else:
        leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_trained)
        paths = [
            jax.tree_util.keystr(keys, simple=True, separator="/")
            for keys, leaf in leaves
            if _is_trained(leaf)
        ]
    if not paths:
        return
    raise ValueError(
        f"{caller}: the model is prepared for training, for example {paths[0]}. To "
        "quantize it use jaxq.training.convert. To train with another recipe call "
        "jaxq.training.prepare again."
    )


def _is_trained(x: Any) -> bool:
    return isinstance(x, TrainedWeight)
