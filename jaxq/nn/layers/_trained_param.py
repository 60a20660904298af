"""The module that takes the place of an nnx Param during quantization-aware training.

A `TrainedWeight` has several arrays. Here, each array has its own Variable, because
nnx.Optimizer, checkpoints and sharding rules expect one array in a Variable.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import errors, nnx

from jaxq.qtensor import TRAINED_LEAVES, RangeGradient, TrainedWeight


class QuantStats(nnx.Variable):
    """Numbers of quantization-aware training that gradients do not change.

    These are ranges that are not trained, moving averages of ranges, and the switches
    of a `jaxq.training.Schedule`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> jaxq.nn.QuantStats(jnp.array([-1.0, 1.0])).shape
      (2,)
    """


class TrainedParam(nnx.Module):
    """Holds a `jaxq.qtensor.TrainedWeight` in the place of an `nnx.Param`.

    `jaxq.training.prepare` puts it there. Layers read it like a Variable:
    `layer.kernel[...]` is the `TrainedWeight`.

    Args:
      weight: the trained weight.
      **metadata: metadata of the float weight's Variable, such as its sharding.

    Attributes:
      floats: `nnx.Param`, the float weight.
      scale: `nnx.Param`, the trained scales; `TrainedParam` if they are quantized; or
        None.
      zero_point: `nnx.Param` or None. The attributes `offset` and `codebook` are like
        it.
      input_range: `nnx.Param` if the range is trained, `QuantStats` if it is not, or
        None.
      input_scale: `QuantStats` or None.
      switch: `QuantStats` or None. The attribute `averaging` is like it.
      use_running_average: whether the moving average `input_range` stays as it is.
        `model.eval()` and `model.train()` set it. It exists only for a moving average.

    Example:
      >>> import jaxq
      >>> from flax import nnx
      >>> qat = jaxq.training.prepare(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), "int4")
      >>> isinstance(qat.kernel, jaxq.nn.TrainedParam), qat.kernel.floats.shape
      (True, (64, 8))
    """

    floats: nnx.Param
    scale: nnx.Param | TrainedParam | None
    zero_point: nnx.Param | None
    offset: nnx.Param | None
    codebook: nnx.Param | None
    input_range: nnx.Param | QuantStats | None
    input_scale: QuantStats | None
    switch: QuantStats | None
    averaging: QuantStats | None

    def __init__(self, weight: TrainedWeight, **metadata: Any):
        self._meta = weight.meta
        self._range_gradient: RangeGradient | None = weight.range_gradient
        self._gradient_scale = weight.gradient_scale
        self._decay = weight.decay
        if weight.decay is not None:
            self.use_running_average = False
        constants = {"input_scale", "switch", "averaging"}
        if weight.range_gradient is None:
            constants.add("input_range")
        for name in TRAINED_LEAVES:
            leaf = getattr(weight, name)
            if leaf is None:
                setattr(self, name, None)
            elif isinstance(leaf, TrainedWeight):  # quantized scales
                setattr(self, name, TrainedParam(leaf))
            elif name in constants:
                setattr(self, name, QuantStats(leaf))
            else:
                own_metadata = metadata if name == "floats" else {}
                setattr(self, name, nnx.Param(leaf, **own_metadata))

    def get_value(self) -> TrainedWeight:
        """The trained weight with the current values."""
        leaves: dict[str, Any] = {
            name: None if variable is None else variable.get_value()
            for name, variable in self._leaves().items()
        }
        return TrainedWeight(
            **leaves,
            meta=self._meta,
            range_gradient=self._range_gradient,
            gradient_scale=self._gradient_scale,
            decay=self._decay,
            record=self._record if self._is_averaging else None,
        )

    def set_value(self, weight: TrainedWeight) -> None:
        """Changes the values of the Variables to those of a trained weight.

        Raises:
          TypeError: `weight` is not a `TrainedWeight`.
        """
        if not isinstance(weight, TrainedWeight):
            raise TypeError(
                "TrainedParam.set_value: expected a TrainedWeight, got "
                f"{type(weight).__name__}. To change the floats, set .floats."
            )
        for name, variable in self._leaves().items():
            if variable is not None:
                variable.set_value(getattr(weight, name))

    @property
    def _is_averaging(self) -> bool:
        return self._decay is not None and not self.use_running_average

    def _record(self, input_range: jax.Array) -> None:
        """Stores the moving average after a product."""
        assert self.input_range is not None
        try:
            self.input_range.set_value(input_range)
        except errors.TraceContextError as error:
            raise ValueError(
                "training.ema: a layer in train mode is called inside jax.jit, "
                "jax.grad, jax.checkpoint, jax.vmap or a jax.lax loop. A model cannot "
                "update its moving averages inside these transforms. Use nnx.jit, "
                "nnx.grad, nnx.remat or nnx.scan. To evaluate, call model.eval(), "
                "which keeps the averages."
            ) from error

    def _leaves(self) -> dict[str, Any]:
        """The Variables by the names of their leaves."""
        return {name: getattr(self, name) for name in TRAINED_LEAVES}

    # What layers and users read from a Variable.

    def __getitem__(self, index: Any) -> TrainedWeight:
        return self.get_value()[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.get_value().shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the float weight."""
        return self.floats.get_value().dtype

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return self.get_value().ndim

    # With None, numpy calls `__rmatmul__` for `array @ param`.
    __array_ufunc__ = None

    def __matmul__(self, other: Any) -> Any:
        return self.get_value() @ other

    def __rmatmul__(self, other: Any) -> Any:
        return other @ self.get_value()
