"""The module that takes the place of an nnx Param during quantization-aware training.

A `TrainedWeight` has several arrays. Here, each array has its own Variable, because
nnx.Optimizer, checkpoints and sharding rules expect one array in a Variable.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import errors, nnx

from jaxq.qtensor import TRAINED_LEAVES, Meta, RangeGradient, TrainedWeight

# The metadata of the Variable `floats` that holds `TrainedFacts`. An `nnx.State` has
# the Variables of a model without its modules, so the facts are also needed there.
_FACTS = "trained_weight"


@dataclasses.dataclass(frozen=True, repr=False)
class TrainedFacts:
    """The static facts of a `TrainedWeight`. The fields are its attributes.

    The field `is_folded` is True if the floats in the Variable are multiplied by the
    factors of a batch norm first.
    """

    meta: Meta
    range_gradient: RangeGradient | None
    gradient_scale: bool
    decay: float | None
    is_folded: bool = False

    def __repr__(self) -> str:
        return f"TrainedFacts({self.meta.spec.fmt.name})"


def trained_facts(variable: Any) -> TrainedFacts | None:
    """The facts of a trained weight if a Variable holds its floats, otherwise None."""
    if not isinstance(variable, nnx.Variable):
        return None
    return variable.get_metadata(_FACTS, None)


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

    # Whether `get_value` multiplies the floats by the factors of a batch norm.
    _is_folded = False

    def __init__(self, weight: TrainedWeight, **metadata: Any):
        self._facts = TrainedFacts(
            weight.meta,
            weight.range_gradient,
            weight.gradient_scale,
            weight.decay,
            self._is_folded,
        )
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
            elif name == "floats":
                own_metadata = {**metadata, _FACTS: self._facts}
                self.floats = nnx.Param(leaf, **own_metadata)
            else:
                setattr(self, name, nnx.Param(leaf))

    def get_value(self) -> TrainedWeight:
        """The trained weight with the current values."""
        leaves: dict[str, Any] = {
            name: None if variable is None else variable.get_value()
            for name, variable in self._leaves().items()
        }
        return TrainedWeight(
            **leaves,
            meta=self._facts.meta,
            range_gradient=self._facts.range_gradient,
            gradient_scale=self._facts.gradient_scale,
            decay=self._facts.decay,
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

    def float_param(self) -> nnx.Param:
        """A Param with the floats, and the metadata of the float model's Param."""
        metadata = self.floats.get_metadata()
        del metadata[_FACTS]
        return nnx.Param(self.floats.get_value(), **metadata)

    @property
    def _is_averaging(self) -> bool:
        return self._facts.decay is not None and not self.use_running_average

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
