"""Checks that a changed float model still computes the same function.

Scales that are folded into other layers, and rotations, must not change the outputs of
the float model. A wrong group of layers changes them, and every later error of the
report would compare with a wrong model. One calibration batch through both models
shows it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.nn.calibration import eval_copy, run_model
from jaxq.nn.transform._folding import Folded, fold_into
from jaxq.nn.transform._model_error import Run, largest_difference
from jaxq.nn.transform._options import Options


def nnx_run(model: nnx.Module, options: Options) -> Run:
    """An nnx model in eval mode, ready to run batches under jit."""
    graph, state = nnx.split(eval_copy(model))

    def function(state: Any, batch: Any) -> Any:
        return run_model(nnx.merge(graph, state), batch, options.forward)

    return Run(function, state)


def check_rotated(model: nnx.Module, rotated: nnx.Module, options: Options) -> None:
    """Raises a ValueError if a rotated model computes another function.

    Args:
      model: the float model.
      rotated: the rotated float model.
      options: with batches.
    """
    difference = _difference(model, rotated, options)
    if difference:
        raise ValueError(
            f"{options.caller}: the rotation of {type(model).__name__} changes what "
            f"the model computes: {difference}. Correct the function that "
            "jaxq.nn.register_rotation got, or the method rotated(), or use a recipe "
            "without rotate=True."
        )


def check_folded(model: nnx.Module, folded: Folded, options: Options) -> None:
    """Raises a ValueError if folded scales changed what a model computes.

    The error names the first group that changes it alone.

    Args:
      model: the float model.
      folded: the folded float model, with the scales of each group.
      options: with batches.
    """
    difference = _difference(model, folded.model, options)
    if not difference:
        return
    wrong = ", ".join(folded.scales)
    for source, scale in folded.scales.items():
        alone = fold_into(model, {source: scale})
        if difference_alone := _difference(model, alone, options):
            wrong, difference = source, difference_alone
            break
    targets = ", ".join(folded.targets.get(wrong, ()))
    group = f"{wrong} into {targets}" if targets else wrong
    raise ValueError(
        f"{options.caller}: folding the scales of {group} changes what the model "
        f"computes: {difference}. Another layer may read the same outputs, such as a "
        f"residual sum. Correct the groups of {type(model).__name__} "
        "(jaxq.nn.register_folding, or its methods scale_groups and fold_scales), or "
        "use another method."
    )


def _difference(before: nnx.Module, after: nnx.Module, options: Options) -> str:
    """How much outputs differ. Empty if rounding explains the difference."""
    runs = nnx_run(before, options), nnx_run(after, options)
    error = largest_difference(*runs, options)
    tolerance = _rounding(before)
    if error <= tolerance:
        return ""
    return (
        f"the outputs of a calibration batch differ by {error:.2g} of their norm, and "
        f"rounding explains at most {tolerance:.2g}"
    )


def _rounding(model: nnx.Module) -> float:
    """The relative difference of outputs that rounding explains.

    It is the square root of the step of the narrowest dtype of the model: 3e-4 in
    float32, 0.09 in bfloat16. One product loses about one step. Deep models amplify
    this, but a wrong scale usually changes the outputs by their own size.
    """
    dtypes = [
        getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(nnx.state(model))
    ]
    # Layers may compute in a narrower dtype than that of their parameters.
    for _, module in nnx.iter_modules(model):
        dtypes.append(getattr(module, "dtype", None))
    steps = [
        float(jnp.finfo(dtype).eps)
        for dtype in dtypes
        if dtype is not None and _is_float_dtype(dtype)
    ]
    return float(np.sqrt(max(steps, default=np.finfo(np.float32).eps)))


def _is_float_dtype(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # a module of the user may have another attribute `dtype`
        return False
