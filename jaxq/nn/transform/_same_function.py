"""Checks that a changed float model still computes the same function.

Scales that are folded into other layers, and rotations, must not change the outputs of
the float model. A wrong group of layers changes them, and every later error of the
report would compare with a wrong model. One calibration batch through both models
shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.jaxprs import inner_jaxprs
from jaxq.nn.calibration import Batch, NnxFunction, cached_program, eval_copy
from jaxq.nn.transform._folding import Folded, fold_into
from jaxq.nn.transform._model_error import Run, largest_difference
from jaxq.nn.transform._options import Options


def nnx_run(model: nnx.Module, options: Options) -> Run:
    """An nnx model in eval mode, ready to run batches under jit."""
    graph, state = nnx.split(eval_copy(model))
    return Run(NnxFunction(graph, options.forward), state)


def check_rotated(model: nnx.Module, rotated: nnx.Module, options: Options) -> None:
    """Raises a ValueError if a rotated model computes another function.

    Args:
      model: the float model.
      rotated: the rotated float model.
      options: with batches.
    """
    difference = output_difference(model, rotated, options)
    if difference:
        raise ValueError(
            f"{options.caller}: the rotation of {type(model).__name__} changes what "
            f"the model computes: {difference}. Correct the function that "
            "jaxq.nn.register_rotation got, or the method rotated(), or use a recipe "
            "without rotate=True."
        )


def check_folded(model: nnx.Module, folded: Folded, options: Options) -> None:
    """Raises a ValueError if folded scales changed what a model computes.

    The error names the first group whose scales alone change the outputs.

    Args:
      model: the float model.
      folded: the folded float model, with the scales of each group.
      options: with batches.
    """
    difference = output_difference(model, folded.model, options)
    if not difference:
        return
    wrong = ", ".join(folded.scales)
    for source, scale in folded.scales.items():
        alone = fold_into(model, {source: scale})
        difference_alone = output_difference(model, alone, options)
        if difference_alone:
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


def output_difference(before: nnx.Module, after: nnx.Module, options: Options) -> str:
    """How much outputs differ. Empty if rounding explains the difference."""
    return run_difference(nnx_run(before, options), nnx_run(after, options), options)


def run_difference(before: Run, after: Run, options: Options) -> str:
    """As `output_difference`, for two models that are ready to run."""
    error = largest_difference(before, after, options)
    tolerance = _FLOAT32_ROUNDING
    if error > tolerance:
        tolerance = _rounding(before, after, options)
    if error <= tolerance:
        return ""
    return (
        f"the outputs of a calibration batch differ by {error:.2g} of their norm, and "
        f"rounding explains at most {tolerance:.2g}"
    )


def _rounding(before: Run, after: Run, options: Options) -> float:
    """The relative difference of outputs that rounding explains.

    It is the square root of the step of the narrowest dtype that numbers are rounded
    to: 3e-4 in float32, 0.09 in bfloat16. One product loses about one step. Deep models
    amplify this, but a wrong scale usually changes the outputs by their own size.

    The model rounds where it computes, and the new weights are rounded where they are
    stored. Other arrays of the model have no effect.
    """
    assert options.batches
    batch = Batch.of(options.batches[0])
    traced = _program(before.function).trace(before.arrays, batch)
    dtypes = {*_computed_dtypes(traced.jaxpr.jaxpr), *_changed_dtypes(before, after)}
    steps = [float(jnp.finfo(dtype).eps) for dtype in dtypes]
    return max([_FLOAT32_ROUNDING, *np.sqrt(steps)])


@cached_program
def _program(function: Callable[[Any, Any], Any]) -> Any:
    """A jitted function that runs a batch."""

    @jax.jit
    def outputs(arrays: Any, batch: Batch) -> Any:
        return function(arrays, batch.whole())

    return outputs


def _computed_dtypes(jaxpr: Any) -> Iterator[Any]:
    """Yields the float dtypes that the equations of a jaxpr round numbers to."""
    for equation in jaxpr.eqns:
        inner = list(inner_jaxprs(equation))
        for part in inner:
            yield from _computed_dtypes(part)
        if inner or equation.primitive.name in _MOVES:
            continue
        inputs = [getattr(atom.aval, "dtype", None) for atom in equation.invars]
        for var in equation.outvars:
            dtype = getattr(var.aval, "dtype", None)
            is_cast = equation.primitive.name == "convert_element_type"
            if _is_float(dtype) and not (is_cast and _is_exact(inputs[0], dtype)):
                yield dtype


def _is_exact(narrow: Any, wide: Any) -> bool:
    """True if a cast between two float dtypes keeps all numbers."""
    return _is_float(narrow) and jnp.promote_types(narrow, wide) == wide


def _changed_dtypes(before: Run, after: Run) -> Iterator[Any]:
    """Yields the dtypes of the float arrays that differ between two models."""
    old = dict(jax.tree_util.tree_leaves_with_path(before.arrays))
    for path, array in jax.tree_util.tree_leaves_with_path(after.arrays):
        dtype = getattr(array, "dtype", None)
        if _is_float(dtype) and not jnp.array_equal(array, old.get(path, ())):
            yield dtype


def _is_float(dtype: Any) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


_FLOAT32_ROUNDING = float(np.sqrt(np.finfo(np.float32).eps))
# These primitives move numbers, and do not round them.
_MOVES = (
    "broadcast_in_dim",
    "concatenate",
    "copy",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "name",
    "pad",
    "reshape",
    "rev",
    "select_n",
    "slice",
    "squeeze",
    "stop_gradient",
    "transpose",
)
