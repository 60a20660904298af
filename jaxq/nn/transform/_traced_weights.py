"""Models whose weights are traced, as inside `jax.jit` and `jax.eval_shape`.

The numbers of such weights are not known while the model is quantized. Rules and axes
do not depend on them, so `jax.eval_shape` gives a template of the quantized model. No
error is measured. A method that needs data compares measured errors, so calibration
data are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from jaxq.nn.transform._options import Options
from jaxq.qtensor import is_traced

NOT_MEASURED = (
    "the weights are traced (jax.jit, jax.eval_shape), so they were not checked for "
    "NaN, and no error was measured"
)


def has_traced(tree: Any) -> bool:
    """True if an array of a tree is traced."""
    return any(is_traced(leaf) for leaf in jax.tree.leaves(tree))


def refuse_data(arrays: Iterable[Any], options: Options) -> None:
    """Raises a ValueError if arrays are traced where their numbers are needed.

    Args:
      arrays: the arrays of the model.
      options: the numbers are needed if `calibration` or `resume` is set.
    """
    if options.calibration is None and options.resume is None:
        return
    traced = [
        name
        for name, tree in (
            ("the weights", list(arrays)),
            ("the calibration data", options.calibration),
        )
        if has_traced(tree)
    ]
    if traced:
        raise ValueError(
            f"{options.caller}: {' and '.join(traced)} are traced (jax.jit, "
            "jax.eval_shape), but calibration= and resume= need their numbers. Call "
            f"{options.caller} outside of jit, or use a recipe that needs no data."
        )


def refuse_shapes(arrays: Iterable[Any], caller: str) -> None:
    """Raises a TypeError if the arrays of a model are shapes without numbers."""
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
        raise TypeError(
            f"{caller}: the weights are jax.ShapeDtypeStructs, which have no numbers. "
            "For the shapes of the quantized model, make the model and quantize it "
            "inside jax.eval_shape or nnx.eval_shape. For the report alone, use "
            "jaxq.nn.plan."
        )
