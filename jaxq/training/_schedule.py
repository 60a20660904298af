"""Schedule: starts quantization and stops moving averages at given steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.qtensor import TrainedWeight
from jaxq.training._weights import map_weights, trained_weights


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When quantization starts, and when moving averages stop.

    Pass it to `jaxq.training.prepare`, and call `apply` in every training step. The
    number of the step is a traced value, so the training step is compiled only once.

    Attributes:
      start: the first step that computes with quantized weights and inputs. Earlier
        steps compute with floats, and they also update moving averages.
      freeze: the first step that does not change the moving averages of
        `jaxq.training.ema`. None: all steps change them.

    Raises:
      ValueError: `start` or `freeze` is negative.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> schedule = jaxq.training.Schedule(start=100)
      >>> params = jaxq.training.prepare({"w": jnp.eye(64)}, "int4", schedule=schedule)
      >>> params = jax.jit(schedule.apply)(params, 99)
      >>> float(params["w"].switch)
      0.0
    """

    start: int = 0
    freeze: int | None = None

    def __post_init__(self):
        if self.start < 0:
            raise ValueError(f"Schedule: start must be at least 0, got {self.start}.")
        if self.freeze is not None and self.freeze < 0:
            raise ValueError(f"Schedule: freeze must be at least 0, got {self.freeze}.")

    def apply(self, model: Any, step: jax.typing.ArrayLike) -> Any:
        """Switches quantization and moving averages on or off for one step.

        Call it before the function that is differentiated, not inside it.

        Args:
          model: the prepared model: an nnx module, which is changed in place, or a
            tree, such as the variables of a linen module or their "params".
          step: integer `[]`, traced or not.

        Returns:
          The same module, or the new tree.

        Raises:
          ValueError: the model was prepared without `schedule=`, or with a schedule
            without `freeze`.
        """
        for path, weight in trained_weights(model):
            self._check(path, weight)
        step = jnp.asarray(step)
        return map_weights(lambda weight: switched(weight, self, step), model)

    def _check(self, path: str, weight: TrainedWeight) -> None:
        """Raises a ValueError if `prepare` did not make the switches of a weight."""
        if weight.switch is None:
            raise ValueError(
                f"Schedule.apply: {path} has no switch. Pass schedule= to "
                "jaxq.training.prepare."
            )
        is_averaged = weight.decay is not None
        if self.freeze is not None and is_averaged and weight.averaging is None:
            raise ValueError(
                f"Schedule.apply: {path} was prepared with a schedule without freeze=. "
                f"Pass schedule={self} to jaxq.training.prepare."
            )


def switched(
    weight: TrainedWeight, schedule: Schedule, step: jax.Array
) -> TrainedWeight:
    """The weight with the switches of a step."""

    def switch(is_on: jax.Array) -> jax.Array:
        return jnp.full(weight.batch_shape, is_on.astype(jnp.float32))

    weight = dataclasses.replace(weight, switch=switch(step >= schedule.start))
    if schedule.freeze is None or weight.decay is None:
        return weight
    return dataclasses.replace(weight, averaging=switch(step < schedule.freeze))
