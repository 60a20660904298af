"""Batch norms that are folded into the layer in front of them.

In eval mode, a batch norm after a linear layer or a convolution is a linear function of
the layer's output. Let `factor = scale / sqrt(var + epsilon)`. The layer alone computes
both if its kernel is `kernel * factor` and its bias is
`(bias - mean) * factor + norm_bias`.

References:
  Jacob et al., "Quantization and Training of Neural Networks for Efficient
  Integer-Arithmetic-Only Inference", 2018, section 3.2.
  Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
  2018, section 3.2.2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.nn.layers._conv_product import add_bias
from jaxq.nn.layers._trained_param import TrainedParam
from jaxq.qtensor import TrainedWeight

# Training divides by the factor, so the factor must not be 0. A scale of a batch norm
# with a smaller magnitude counts as this number, with the sign of the scale.
_SMALLEST_SCALE = 1e-6


class FoldedBatchNorm(nnx.Module):
    """Takes the place of a batch norm that is folded into the layer in front of it.

    It returns its input in the dtype that the batch norm returned. It does the same in
    train mode, so a folded model does not normalize by the statistics of a batch.

    Args:
      norm: the batch norm.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> norm = jaxq.nn.FoldedBatchNorm(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
      >>> norm(jnp.ones((1, 2), jnp.bfloat16))
      Array([[1., 1.]], dtype=float32)
    """

    def __init__(self, norm: nnx.BatchNorm):
        self.dtype = norm.dtype
        self.param_dtype = norm.param_dtype

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        return x.astype(_result_dtype(self, x))


class TrainedBatchNorm(nnx.BatchNorm):
    """The batch norm of a layer with a `FoldedTrainedParam`.

    Its input is the layer's product with the quantized folded kernel, without a bias.
    In train mode, it divides its input by `factor()`. Then it does what `nnx.BatchNorm`
    does: it normalizes by the statistics of the batch, and updates its running
    statistics. In eval mode, it adds `folded_bias()`. This is what the quantized layer
    computes after `jaxq.training.convert`.

    Its attributes are those of `nnx.BatchNorm`. The running mean is the mean of the
    layer's outputs without the bias of the layer. `TrainedBatchNorm.of` makes it.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...   nnx.Linear(64, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
      >>> qat = jaxq.training.prepare(
      ...   model, "int8", calibration=[jnp.ones((2, 64))], fold_batch_norm=True)
      >>> isinstance(qat.layers[1], jaxq.nn.TrainedBatchNorm)
      True

    References:
      Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
      2018, section 3.2.2.
    """

    # The dtypes to which the converted layer rounds its bias, in this order.
    _bias_dtypes: tuple[Any, ...]

    @classmethod
    def of(cls, norm: nnx.BatchNorm, layer: Any, dtype: Any) -> TrainedBatchNorm:
        """A copy of a batch norm for the layer in front of it.

        Args:
          norm: the batch norm.
          layer: the float layer. The bias of the layer moves into the running mean.
          dtype: the dtype of the layer's folded bias.
        """
        copy: Any = nnx.clone(norm)
        if layer.bias is not None:
            bias = layer.bias.get_value().astype(jnp.float32)
            copy.mean.set_value(copy.mean.get_value() - bias)
        copy.__class__ = cls
        copy._bias_dtypes = (dtype,) if layer.dtype is None else (dtype, layer.dtype)
        return copy

    def restored(self) -> nnx.BatchNorm:
        """An `nnx.BatchNorm` with the same values, for a float layer without a bias."""
        copy: Any = nnx.clone(self)
        del copy._bias_dtypes
        copy.__class__ = nnx.BatchNorm
        return copy

    def factor(self) -> jax.Array:
        """What the kernel is multiplied by, float32 `[*batch, features]`."""
        return norm_factor(self)

    def folded_bias(self) -> jax.Array:
        """The bias of the converted layer, `[*batch, features]`."""
        bias = folded_bias(None, self)
        for dtype in self._bias_dtypes:
            bias = bias.astype(dtype)
        return bias

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        is_eval = use_running_average
        if is_eval is None:
            is_eval = self.use_running_average
        if is_eval:
            y = add_bias(x, self.folded_bias())
            return y.astype(_result_dtype(self, x))
        y = x.astype(_wider(x.dtype, jnp.float32))
        factor = self.factor().reshape((1,) * (y.ndim - 1) + (-1,))
        y = y / factor.astype(y.dtype)
        return super().__call__(y, use_running_average, mask=mask)


class FoldedTrainedParam(TrainedParam):
    """A `TrainedParam` whose value is folded with a batch norm.

    `floats` is the kernel without the batch norm. `layer.kernel[...]` is a
    `TrainedWeight` whose floats are `floats * norm.factor()`. The gradients reach
    `floats` and the scale of the batch norm.

    The layer and the model share the batch norm. A state such as `nnx.state(model)` has
    the numbers of a shared module only once, at its first path in alphabetical order.
    For the layers "conv" and "norm", this is "conv/kernel/norm".

    Args:
      weight: the trained weight, with floats that are not folded.
      norm: the batch norm after the layer.
      axis: the axis of the features, a negative number.
      **metadata: as in `TrainedParam`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...   nnx.Linear(64, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
      >>> qat = jaxq.training.prepare(
      ...   model, "int8", calibration=[jnp.ones((2, 64))], fold_batch_norm=True)
      >>> kernel = qat.layers[0].kernel
      >>> isinstance(kernel, jaxq.nn.FoldedTrainedParam), kernel.norm is qat.layers[1]
      (True, True)
    """

    _is_folded = True

    def __init__(
        self, weight: TrainedWeight, norm: TrainedBatchNorm, axis: int, **metadata: Any
    ):
        super().__init__(weight, **metadata)
        self.norm = norm
        self._axis = axis

    def get_value(self) -> TrainedWeight:
        """The trained weight with the current values. Its floats are folded."""
        weight = super().get_value()
        floats = folded_kernel(weight.floats, self.norm.factor(), self._axis)
        return dataclasses.replace(weight, floats=floats)

    def set_value(self, weight: TrainedWeight) -> None:
        """Changes all values except the floats, because those of `weight` are folded.

        Raises:
          TypeError: `weight` is not a `TrainedWeight`.
        """
        floats = self.floats.get_value()
        super().set_value(weight)
        self.floats.set_value(floats)


def norm_factor(norm: nnx.BatchNorm) -> jax.Array:
    """What a batch norm in eval mode multiplies by, float32 `[*batch, features]`."""
    # Under jit, the compiler would replace `scale / sqrt(...)` by a product with rsqrt,
    # and round differently from `convert`.
    factor = jax.lax.rsqrt(norm.var.get_value().astype(jnp.float32) + norm.epsilon)
    if norm.scale is None:
        return factor
    scale = norm.scale.get_value().astype(jnp.float32)
    smallest = jnp.where(scale < 0, -_SMALLEST_SCALE, _SMALLEST_SCALE)
    return jnp.where(jnp.abs(scale) < _SMALLEST_SCALE, smallest, scale) * factor


def folded_kernel(kernel: jax.Array, factor: jax.Array, axis: int) -> jax.Array:
    """The kernel, multiplied by the factors of its features.

    Args:
      kernel: `[*batch, *shape]`.
      factor: float32 `[*batch, features]`.
      axis: the axis of the features, a negative number.
    """
    *batch, num_features = factor.shape
    num_before = kernel.ndim + axis - len(batch)
    num_after = -axis - 1
    ones_before, ones_after = (1,) * num_before, (1,) * num_after
    factor = factor.reshape(*batch, *ones_before, num_features, *ones_after)
    return (kernel.astype(jnp.float32) * factor).astype(kernel.dtype)


def folded_bias(bias: jax.Array | None, norm: nnx.BatchNorm) -> jax.Array:
    """The bias of a layer that is folded with a batch norm, float32.

    Args:
      bias: of the layer, `[*batch, features]`, or None.
      norm: the batch norm.
    """
    mean = norm.mean.get_value().astype(jnp.float32)
    if bias is not None:
        mean = mean - bias.astype(jnp.float32)
    shift = -mean * norm_factor(norm)
    # Under jit, the compiler would round the product and the sum only once, and differ
    # from the bias that `convert` computes. A clip in between prevents it.
    limit = float(jnp.finfo(jnp.float32).max)
    shift = jnp.clip(shift, -limit, limit)
    if norm.bias is None:
        return shift
    return norm.bias.get_value().astype(jnp.float32) + shift


def _result_dtype(norm: Any, x: jax.Array) -> Any:
    """The dtype of the output of a batch norm."""
    if norm.dtype is not None:
        return norm.dtype
    # The running statistics are float32.
    return _wider(_wider(x.dtype, norm.param_dtype), jnp.float32)


def _wider(dtype: Any, other: Any) -> Any:
    """The float dtype with more bits. Strict promotion would not mix the two."""
    return other if jnp.finfo(other).bits > jnp.finfo(dtype).bits else dtype
