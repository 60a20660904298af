"""check: finds steps that cannot quantize anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq.nn.layers import QUANT_STATS
from jaxq.qtensor import TRAINED_LEAVES, TrainedWeight
from jaxq.training._averages import join_averages
from jaxq.training._weights import trained_weights


def check(model: Any) -> None:
    """Raises an error if training has ruined the steps of a prepared model.

    Call it outside jit, for example every hundred steps. Under jit nothing can be
    raised. There, a scale of 0 makes its block 0. A negative scale acts like the same
    scale without its sign if the format is symmetric. NaN makes its block NaN.

    Args:
      model: the result of `jaxq.training.prepare`: an nnx module or a tree, such as the
        variables of a linen module.

    Raises:
      TypeError: the call is under jit.
      ValueError: a scale is zero, or negative although the spec has no signed scales;
        a number is not finite; or a range is empty. The error names all of them.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> params = jaxq.training.prepare({"w": jnp.eye(64)}, "int4")
      >>> jaxq.training.check(params)
    """
    if isinstance(model, Mapping) and "params" in model and QUANT_STATS in model:
        model = join_averages(model)
    problems = []
    for path, weight in trained_weights(model):
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(weight)):
            raise TypeError(
                "training.check: the model is traced. Call it outside jit, with the "
                "parameters of the last step."
            )
        problems += [f"  {path}: {problem}" for problem in _problems(weight)]
    if problems:
        raise ValueError(
            "training.check: training has ruined some weights or steps.\n"
            + "\n".join(problems)
            + "\nUse a smaller learning rate for steps (jaxq.training.labels), and go "
            "back to the last good parameters."
        )


def _problems(weight: TrainedWeight) -> Iterator[str]:
    """Yields what is wrong with the leaves of a weight."""
    for name in TRAINED_LEAVES:
        leaf = getattr(weight, name)
        if leaf is None:
            continue
        num_bad = int(jnp.sum(~jnp.isfinite(leaf)))
        if num_bad:
            yield f"{name}: {num_bad} of {leaf.size} numbers are NaN or infinite"
    if weight.scale is not None:
        scale = np.asarray(weight.scale)
        num_zero, num_negative = int(np.sum(scale == 0)), int(np.sum(scale < 0))
        if num_zero:
            yield f"scale: {num_zero} of {scale.size} steps are zero"
        if num_negative and not weight.spec.rule.signed:
            yield f"scale: {num_negative} of {scale.size} steps are negative"
    if weight.input_range is not None:
        low, high = weight.input_range[..., 0], weight.input_range[..., 1]
        is_empty = low >= high
        if weight.decay is not None:
            is_empty &= (low != 0) | (high != 0)  # no batch has set the average
        num_empty = int(jnp.sum(is_empty))
        if num_empty:
            yield f"input_range: {num_empty} of {low.size} ranges are empty"
