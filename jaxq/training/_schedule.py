"""Schedule: starts quantization and stops moving averages at given steps."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.qtensor import TrainedWeight
from jaxq.training._states import is_folded, model_of
from jaxq.training._weights import map_weights, trained_weights

CALLER = "Schedule.apply"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When quantization starts, and when moving averages stop.

    Pass it to `jaxq.training.prepare`, and call `apply` in every training step. The
    number of the step is a traced value, so the training step is compiled only once.

    Trained scales (`jaxq.training.lsq`) start to train at `start`. Until then, `apply`
    computes them, the zero points and the offsets from the floats, because the floats
    have moved away from those of step 0. They are those of rounding to nearest. Other
    initial steps have an effect only with `start=0`: the scales of GPTQ, AWQ or HQQ,
    and `lsq(initial="lsq")`. What the floats do not determine stays as `prepare` made
    it: the codebooks of k-means, and the static ranges of inputs.

    Attributes:
      start: the first step that computes with quantized weights and inputs. Earlier
        steps compute with floats, and they also update moving averages.
      freeze: the first step that does not change the moving averages of
        `jaxq.training.ema`. None: all steps change them.

    Raises:
      TypeError: `start` or `freeze` is not a whole number.
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
        _check_step("start", self.start)
        if self.freeze is not None:
            _check_step("freeze", self.freeze)

    def apply(self, model: Any, step: jax.typing.ArrayLike) -> Any:
        """Switches quantization and moving averages on or off for one step.

        Call it before the function that is differentiated, not inside it. Train the
        result: the optimizer's updates belong to it, not to the old tree.

        Args:
          model: the prepared model: an nnx module, which is changed in place; a tree,
            such as the variables of a linen module or their "params"; an nnx State with
            all Variables of a module; the state of a `jaxq.distillation.make_step`; or
            a linen `TrainState`. Other trees must not have the optimizer's state.
          step: integer `[]`, traced or not.

        Returns:
          The same module, or a new tree or state.

        Raises:
          ValueError: the model has no trained weight; it was prepared without
            `schedule=`, or with a schedule without `freeze`; a State lacks the switches
            of the schedule; or a State has trained scales of weights that are folded
            with a batch norm.
        """
        arrays = model_of(model)
        for path, weight in trained_weights(arrays, CALLER):
            self._check(path, weight)
            if isinstance(arrays, nnx.State):
                _check_folded(arrays, path, weight)
        step = jnp.asarray(step)

        def change(weight: TrainedWeight) -> TrainedWeight:
            started = _at_start(weight)
            # Weights of one shape share a compiled program. It returns the static
            # facts, such as the name, of the weight for which it was compiled.
            started = dataclasses.replace(started, meta=weight.meta)
            return switched(started, self, step)

        return map_weights(change, model)

    def _check(self, path: str, weight: TrainedWeight) -> None:
        """Raises a ValueError if `prepare` did not make the switches of a weight."""
        if weight.switch is None:
            raise ValueError(
                f"{CALLER}: {path} has no switch. Pass schedule= to "
                "jaxq.training.prepare. An nnx State must have all Variables of the "
                "model, not only its Params."
            )
        is_averaged = weight.decay is not None
        if self.freeze is not None and is_averaged and weight.averaging is None:
            raise ValueError(
                f"{CALLER}: {path} was prepared with a schedule without freeze=. "
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


@jax.jit
def _at_start(weight: TrainedWeight) -> TrainedWeight:
    """The weight with computed steps if quantization was off in the step before."""
    assert weight.switch is not None
    was_on = jnp.all(weight.switch > 0.5)
    leaves, structure = jax.tree.flatten(weight)
    computed = jax.lax.cond(
        was_on,
        lambda leaves: leaves,
        lambda leaves: jax.tree.leaves(
            jax.tree.unflatten(structure, leaves).with_computed_steps()
        ),
        leaves,
    )
    return jax.tree.unflatten(structure, computed)


def _check_step(name: str, step: Any) -> None:
    if isinstance(step, bool) or not isinstance(step, numbers.Integral):
        raise TypeError(
            f"Schedule: {name} must be a whole number of steps, got {step!r}."
        )
    if step < 0:
        raise ValueError(f"Schedule: {name} must be at least 0, got {step}.")


def _check_folded(state: nnx.State, path: str, weight: TrainedWeight) -> None:
    """Raises a ValueError if a State does not determine the steps of a weight."""
    if weight.scale is None or not is_folded(state, path):
        return
    raise ValueError(
        f"{CALLER}: the scales of {path} follow from a batch norm, which an nnx State "
        "does not contain. Call apply on the module, in a training step with "
        "nnx.Optimizer. Or prepare the model with ranges='dynamic'."
    )
