"""check: finds weights, scales and ranges that are not usable any more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq.nn.layers import QUANT_STATS
from jaxq.processes import to_numpy
from jaxq.qtensor import TRAINED_LEAVES, TrainedWeight
from jaxq.training._averages import join_averages
from jaxq.training._states import model_of
from jaxq.training._weights import trained_weights

CALLER = "training.check"


def check(model: Any) -> None:
    """Raises an error if training has ruined weights, scales or ranges of a model.

    Call it outside jit, for example every hundred training steps. A compiled program
    cannot raise an error. In the program, a scale of 0 makes its block 0, and a scale
    of NaN makes its block NaN. If the format is symmetric, a negative scale has the
    same effect as its absolute value. Outside jit, a product with a crossed range (low
    above high) raises an error that does not name the layer. This function names it.

    Args:
      model: the result of `jaxq.training.prepare`: an nnx module or a tree, such as the
        variables of a linen module. Or an nnx State of such a module, the state of a
        `jaxq.distillation.make_step`, or a linen `TrainState`.

    Raises:
      TypeError: the call is under jit.
      ValueError: a scale is zero, or negative although the spec has no signed scales; a
        number is not finite; all entries of a codebook are equal, or the value of a
        ternary code is zero; a zero point is outside the format by more than the width
        of the format; a range is empty or crossed; or the model has no trained weight.
        The error names all of them.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> params = jaxq.training.prepare({"w": jnp.eye(64)}, "int4")
      >>> jaxq.training.check(params)
    """
    model = model_of(model)
    if isinstance(model, Mapping) and "params" in model and QUANT_STATS in model:
        model = join_averages(model, CALLER)
    problems = []
    for path, weight in trained_weights(model, CALLER):
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(weight)):
            raise TypeError(
                f"{CALLER}: the model is traced. Call it outside jit, with the "
                "parameters of the last step."
            )
        problems += [f"  {path}: {problem}" for problem in _problems(weight)]
    if problems:
        raise ValueError(
            f"{CALLER}: training has ruined some weights, scales or ranges.\n"
            + "\n".join(problems)
            + "\nGo back to the last good parameters. Use a smaller learning rate for "
            "trained scales and ranges (jaxq.training.labels)."
        )


def _problems(weight: TrainedWeight) -> Iterator[str]:
    """Yields what is wrong with the leaves of a weight."""
    for name in TRAINED_LEAVES:
        leaf = getattr(weight, name)
        if leaf is None:
            continue
        if isinstance(leaf, TrainedWeight):  # quantized scales
            yield from (f"{name}.{problem}" for problem in _problems(leaf))
            continue
        num_bad = int(jnp.sum(~jnp.isfinite(leaf)))
        if num_bad:
            yield f"{name}: {num_bad} of {leaf.size} numbers are NaN or infinite"
    if weight.scale is not None:
        yield from _problems_of_scales(weight)
    if weight.zero_point is not None:
        fmt = weight.spec.fmt
        width = fmt.max - fmt.min
        beyond = jnp.maximum(fmt.min - weight.zero_point, weight.zero_point - fmt.max)
        num_far = int(jnp.sum(beyond > width))
        if num_far:
            yield (
                f"zero_point: {num_far} of {beyond.size} are far outside the range of "
                f"{fmt.name}, {fmt.min:g} to {fmt.max:g}"
            )
    if weight.codebook is not None:
        yield from _problems_of_codebooks(weight)
    if weight.input_range is not None:
        low, high = weight.input_range[..., 0], weight.input_range[..., 1]
        is_empty = low >= high
        if weight.decay is not None:
            # An average is (0, 0) until a batch sets it.
            is_empty &= (low != 0) | (high != 0)
        num_empty = int(jnp.sum(is_empty))
        if num_empty:
            yield f"input_range: {num_empty} of {low.size} ranges are empty or crossed"


def _problems_of_scales(weight: TrainedWeight) -> Iterator[str]:
    scale = weight.scale
    scale = to_numpy(scale.floats if isinstance(scale, TrainedWeight) else scale)
    num_zero = int(np.sum(scale == 0))
    num_negative = int(np.sum(scale < 0))
    if num_zero:
        yield f"scale: {num_zero} of {scale.size} scales are zero"
    if num_negative and not weight.spec.rule.signed:
        yield f"scale: {num_negative} of {scale.size} scales are negative"


def _problems_of_codebooks(weight: TrainedWeight) -> Iterator[str]:
    codebook = to_numpy(weight.codebook)
    num_codebooks = codebook[..., 0].size
    num_equal = int(np.sum(codebook.min(-1) == codebook.max(-1)))
    if num_equal:
        yield f"codebook: the entries of {num_equal} of {num_codebooks} are all equal"
    if weight.spec.rule.has_threshold:
        values = codebook[..., weight.spec.fmt.values() != 0]
        num_zero = int(np.sum(values == 0))
        if num_zero:
            yield f"codebook: {num_zero} of {values.size} values are zero"
