"""How the ranges of weights and activations are found during training."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxq.formats import check_choice
from jaxq.qtensor import (
    RANGE_GRADIENTS,
    QTensor,
    RangeGradient,
    TrainedWeight,
    quantize_array,
    scale_values,
)

INITIAL_STEPS = ("recipe", "lsq")


@dataclasses.dataclass(frozen=True)
class Ranges:
    """How the ranges of weights and activations are found during training.

    `lsq()` and `pact()` return common combinations. The string "dynamic" in `prepare`
    is `Ranges()`.

    Attributes:
      trained_scales: True trains the scales of weights, their zero points, offsets and
        codebooks. False computes them from the floats in every product.
      initial: the scales with which training starts. "recipe" takes those of the
        recipe's method, such as GPTQ. "lsq" takes `2 * mean(|w|) / sqrt(q)` for each
        block, where q is the largest number of the format.
      range_gradient: how the static range of a layer's input is trained, as in
        `jaxq.fake_quant`: "lsq", "pact", or None to keep it constant.
      gradient_scale: multiply the gradients of scales and ranges by `1 / sqrt(n * q)`,
        where n is the number of weights of a block, or of features of an input.

    Raises:
      ValueError: `initial` or `range_gradient` is unknown, or `initial` is "lsq" and
        `trained_scales` is False.

    Example:
      >>> import jaxq
      >>> jaxq.training.Ranges(trained_scales=True).initial
      'recipe'
    """

    trained_scales: bool = False
    initial: str = "recipe"
    range_gradient: RangeGradient | None = None
    gradient_scale: bool = False

    def __post_init__(self):
        check_choice("Ranges: initial", self.initial, INITIAL_STEPS)
        if self.range_gradient is not None:
            check_choice("Ranges: range_gradient", self.range_gradient, RANGE_GRADIENTS)
        if self.initial == "lsq" and not self.trained_scales:
            raise ValueError(
                "Ranges: initial='lsq' needs trained_scales=True, because computed "
                "scales have no initial value."
            )

    def weight(self, floats: jax.Array, qt: QTensor) -> TrainedWeight:
        """The weight with which training starts.

        Args:
          floats: the float weight.
          qt: the weight, quantized by the recipe.
        """
        weight = TrainedWeight.start(
            floats,
            qt,
            trained_scales=self.trained_scales,
            range_gradient=self.range_gradient,
            gradient_scale=self.gradient_scale,
        )
        if self.initial == "lsq" and qt.codebook is None:
            weight = dataclasses.replace(weight, floats=floats)
            return weight.with_scale(_lsq_scale(floats, qt))
        return weight


def lsq(*, initial: str = "recipe", gradient_scale: bool = True) -> Ranges:
    """Trained step sizes: LSQ, and LSQ+ where the recipe has zero points or offsets.

    The scales of weights are trained. Static ranges of inputs are trained too. Inputs
    with dynamic activation quantization have no range to train.

    Args:
      initial: "recipe" starts with the scales of the recipe's method. "lsq" starts with
        those of the LSQ paper.
      gradient_scale: multiply the gradients of the steps by `1 / sqrt(n * q)`, as in
        the paper. With Adam, this factor has almost no effect.

    Example:
      >>> import jaxq
      >>> jaxq.training.lsq().trained_scales
      True

    References:
      Esser et al., "Learned Step Size Quantization", 2020, sections 2.1 and 2.2.
      Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets
      and better initialization", 2020.
    """
    return Ranges(True, initial, "lsq", gradient_scale)


def pact() -> Ranges:
    """Trained clipping thresholds of inputs (PACT). Scales of weights are computed.

    Only numbers beyond the range change it. The recipe must have static ranges, such as
    "w8a8_static". Calibration gives the initial range.

    The paper adds the squared thresholds to the loss. Do this with the leaves
    `input_range` of the parameters.

    Example:
      >>> import jaxq
      >>> jaxq.training.pact().range_gradient
      'pact'

    References:
      Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural
      Networks", 2018.
    """
    return Ranges(False, "recipe", "pact", False)


def as_ranges(ranges: str | Ranges, caller: str) -> Ranges:
    """The `ranges=` of `prepare` as a `Ranges`.

    Raises:
      TypeError: `ranges` is neither "dynamic" nor a `Ranges`.
    """
    if isinstance(ranges, Ranges):
        return ranges
    if ranges == "dynamic":
        return Ranges()
    raise TypeError(
        f"{caller}: ranges must be 'dynamic', jaxq.training.lsq(), "
        f"jaxq.training.pact() or a jaxq.training.Ranges, got {ranges!r}."
    )


def _lsq_scale(floats: jax.Array, qt: QTensor) -> jax.Array:
    """`2 * mean(|w|) / sqrt(q)` for each block (Esser et al., 2020, section 2.1)."""
    spec = qt.spec.replace(
        scale="float32", scale_rule="absmean", clipping="absmax", symmetric=True
    )
    mean = scale_values(quantize_array(floats, spec, qt.meta.geometry, None))
    return jnp.asarray(mean * (2 / math.sqrt(qt.spec.fmt.max)), jnp.float32)
