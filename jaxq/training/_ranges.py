"""How the ranges of weights and activations are determined during training."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

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
    """How the ranges of weights and activations are determined during training.

    `lsq()`, `pact()` and `ema()` return common combinations. In `prepare`, the string
    "dynamic" means `Ranges()`. `dataclasses.replace(lsq(), decay=0.99)` trains the
    scales of weights, and averages the ranges of inputs.

    Attributes:
      trained_scales: True trains the scales of weights, their zero points, offsets and
        codebooks. False computes them from the floats in every product.
      initial: the scales with which training starts. "recipe" takes those of the
        recipe's method, such as GPTQ. "lsq" takes `2 * mean(|w|) / sqrt(q)` for each
        block, where q is the largest number of the format.
      range_gradient: how the static range of a layer's input is trained, as in
        `jaxq.fake_quant`: "lsq", "pact", or None to keep it constant.
      gradient_scale: multiply the gradients of scales and ranges by `1 / sqrt(n * q)`,
        where n is the number of weights of a block, or the number of features of an
        input, and q is the largest number of the format.
      decay: a number makes the range of each layer's input a moving average, as in
        `ema`. The value "lsq" of `range_gradient` then has no effect. None: there are
        no moving averages.

    Raises:
      TypeError: `decay` is not a number.
      ValueError: `initial` or `range_gradient` is unknown; `initial` is "lsq" and
        `trained_scales` is False; `decay` is not at least 0 and below 1;
        `range_gradient` is "pact" and `decay` is a number.

    Example:
      >>> import jaxq
      >>> jaxq.training.Ranges(trained_scales=True).initial
      'recipe'
    """

    trained_scales: bool = False
    initial: str = "recipe"
    range_gradient: RangeGradient | None = None
    gradient_scale: bool = False
    decay: float | None = None

    def __post_init__(self):
        check_choice("Ranges: initial", self.initial, INITIAL_STEPS)
        if self.range_gradient is not None:
            check_choice("Ranges: range_gradient", self.range_gradient, RANGE_GRADIENTS)
        if self.initial == "lsq" and not self.trained_scales:
            raise ValueError(
                "Ranges: initial='lsq' needs trained_scales=True, because computed "
                "scales have no initial value."
            )
        if self.decay is not None:
            self._check_decay(self.decay)

    def _check_decay(self, decay: Any) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float):
            raise TypeError(f"Ranges: decay must be a number or None, got {decay!r}.")
        if not 0 <= decay < 1:
            raise ValueError(
                "Ranges: decay must be at least 0 and below 1, for example 0.99, got "
                f"{decay}."
            )
        if self.range_gradient == "pact":
            raise ValueError(
                "Ranges: the clipping thresholds of range_gradient='pact' are trained, "
                f"so they cannot be moving averages with decay={decay}. Use either "
                "pact() or ema()."
            )

    def weight(self, floats: jax.Array, qt: QTensor) -> TrainedWeight:
        """The weight with which training starts.

        Args:
          floats: the float weight.
          qt: the weight, quantized by the recipe.
        """
        activation = qt.meta.activation
        has_average = self.decay is not None and activation is not None
        if has_average:
            # Bounds make the spec of the activation static. The moving average takes
            # their place below.
            qt = qt.with_activation(activation, bounds=(-1.0, 1.0))
        weight = _start(
            floats,
            qt,
            trained_scales=self.trained_scales,
            range_gradient=None if has_average else self.range_gradient,
            gradient_scale=self.gradient_scale,
        )
        # Two layers of one shape share a compiled program, but not their names.
        weight = dataclasses.replace(weight, meta=qt.meta)
        if has_average:
            empty = jnp.zeros((*qt.batch_shape, 2), jnp.float32)
            weight = dataclasses.replace(weight, input_range=empty, decay=self.decay)
        if self.initial == "lsq" and qt.codebook is None:
            weight = dataclasses.replace(weight, floats=floats)
            return weight.with_scale(_lsq_scale(floats, qt))
        return weight


def lsq(*, initial: str = "recipe", gradient_scale: bool = True) -> Ranges:
    """Trained step sizes: LSQ, and LSQ+ where the recipe has zero points or offsets.

    The scales of weights and the static ranges of inputs are trained. Inputs with
    dynamic activation quantization have no range to train.

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
    return Ranges(
        trained_scales=True,
        initial=initial,
        range_gradient="lsq",
        gradient_scale=gradient_scale,
    )


def pact() -> Ranges:
    """Trained clipping thresholds of inputs (PACT). Scales of weights are computed.

    Only inputs outside the range change it. The recipe must have static ranges, such as
    "w8a8_static". Otherwise `prepare` raises an error. Calibration sets the initial
    range.

    The paper also adds the squared thresholds to the loss. If you want this, add the
    squares of the leaves `input_range` of the parameters.

    Example:
      >>> import jaxq
      >>> jaxq.training.pact().range_gradient
      'pact'

    References:
      Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural
      Networks", 2018.
    """
    return Ranges(range_gradient="pact")


def ema(decay: float = 0.99) -> Ranges:
    """Moving averages of the ranges of inputs. Scales of weights are computed.

    Each rule with an activation gets a static range without calibration. The observer
    of the rule is ignored. The first batch in train mode sets the (low, high) of the
    range to the extremes of the layer's input. Each later batch sets it to
    `decay * range + (1 - decay) * range of the batch`. Gradients do not change it. An
    input that is all zeros, or has a number that is not finite, does not count. Before
    the first batch, a product uses the range of its own input. Each call of a shared
    layer counts as a batch. Layers that share a weight share its average.

    In an nnx model, the averages are `jaxq.nn.QuantStats` variables. They change in
    train mode (`model.train()`), and not in eval mode (`model.eval()`). In linen, they
    are in the collection "quant_stats". They change only if `mutable=["quant_stats"]`
    is passed to `apply`. `jaxq.training.Schedule(freeze=)` stops them at a given step.

    Args:
      decay: at least 0 and below 1.

    Raises:
      TypeError: `decay` is not a number.
      ValueError: `decay` is not at least 0 and below 1.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
      >>> qat = jaxq.training.prepare(model, "w8a8", ranges=jaxq.training.ema(0.75))
      >>> y = qat(jnp.full((2, 64), 1.0))
      >>> y = qat(jnp.full((2, 64), 2.0))
      >>> qat.kernel.input_range[...].tolist()
      [0.0, 1.25]
      >>> qat.eval()
      >>> y = qat(jnp.full((2, 64), 3.0))
      >>> qat.kernel.input_range[...].tolist()
      [0.0, 1.25]

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, section 3.1.
    """
    return Ranges(decay=decay)


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
        "jaxq.training.pact(), jaxq.training.ema() or a jaxq.training.Ranges, got "
        f"{ranges!r}."
    )


# Compiled as a whole, because a model has many weights of the same shape.
_start = jax.jit(
    TrainedWeight.start,
    static_argnames=("trained_scales", "range_gradient", "gradient_scale"),
)


def _lsq_scale(floats: jax.Array, qt: QTensor) -> jax.Array:
    """`2 * mean(|w|) / sqrt(q)` for each block (Esser et al., 2020, section 2.1)."""
    spec = qt.spec.replace(
        scale="float32", scale_rule="absmean", clipping="absmax", symmetric=True
    )
    mean = scale_values(quantize_array(floats, spec, qt.meta.geometry, None))
    return jnp.asarray(mean * (2 / math.sqrt(qt.spec.fmt.max)), jnp.float32)
