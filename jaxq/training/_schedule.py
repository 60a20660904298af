"""Schedule: quantization that starts after some steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.qtensor import TrainedWeight
from jaxq.training._weights import map_weights, trained_weights


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When quantization starts.

    Pass it to `jaxq.training.prepare`, and call `apply` in every training step. The
    step is a traced value, so the training step compiles once.

    Attributes:
      start: the first step that computes with quantized weights and inputs. Earlier
        steps compute with floats.

    Raises:
      ValueError: `start` is negative.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> schedule = jaxq.training.Schedule(start=100)
      >>> params = jaxq.training.prepare({"w": jnp.eye(64)}, "int4", schedule=schedule)
      >>> params = jax.jit(schedule.apply)(params, 99)
      >>> float(params["w"].switch)
      0.0
    """

    start: int = 0

    def __post_init__(self):
        if self.start < 0:
            raise ValueError(f"Schedule: start must be at least 0, got {self.start}.")

    def apply(self, model: Any, step: jax.typing.ArrayLike) -> Any:
        """Switches quantization on or off for one step.

        Call it outside of the function that is differentiated.

        Args:
          model: the prepared model: an nnx module, which is changed in place, or a
            tree.
          step: integer `[]`, traced or not.

        Returns:
          The same module, or the new tree.

        Raises:
          ValueError: the model was prepared without `schedule=`.
        """
        for path, weight in trained_weights(model):
            if weight.switch is None:
                raise ValueError(
                    f"Schedule.apply: {path} has no switch. Pass schedule= to "
                    "jaxq.training.prepare."
                )
        is_on = (jnp.asarray(step) >= self.start).astype(jnp.float32)

        def switched(weight: TrainedWeight) -> TrainedWeight:
            switch = jnp.full(weight.batch_shape, is_on)
            return dataclasses.replace(weight, switch=switch)

        return map_weights(switched, model)
