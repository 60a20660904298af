"""Delayed scaling: the scale of a tensor follows from the tensors of earlier steps.

With current scaling, a tensor is read twice: once for its largest magnitude, and once
to quantize it. With delayed scaling, the scale is known before the step. So a kernel
that computes the tensor can write float8 codes at once.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class AmaxHistory(NamedTuple):
    """The largest magnitudes of a tensor in the last steps.

    Attributes:
      largest: float32 `[*batch, length]`, the newest number first. 0 before the first
        step.
      bound: float32 `[*batch]`, the largest magnitude that the next step can represent.
        The scale of Transformer Engine is the largest number of the format divided by
        `bound`. 0 before the first step.

    Example:
      >>> import jaxq
      >>> state = jaxq.training.DelayedScaling(length=3).init()
      >>> state.largest.shape, state.bound.shape
      ((3,), ())
    """

    largest: jax.Array
    bound: jax.Array


@dataclasses.dataclass(frozen=True)
class DelayedScaling:
    """The scale of a step comes from the largest magnitude of the steps before it.

    The first step uses the largest magnitude of its own tensor. Numbers above the bound
    of a step are clipped to it.

    Args:
      length: the number of steps in the history, at least 1.
      margin: the bound is `2^margin` times the largest magnitude of the history.
      axis_name: inside `shard_map` or `vmap`, the mapped axes over which the maximum is
        taken, so that all devices have the same state. Under jit, arrays that are
        sharded over a mesh need no axis name.

    Raises:
      ValueError: `length` is not a whole number of at least 1, or `margin` is not a
        whole number.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> scaling = jaxq.training.DelayedScaling(length=3)
      >>> state = scaling.init()
      >>> for amax in [1.0, 4.0, 2.0]:
      ...     state = scaling.update(state, jnp.float32(amax))
      >>> state.largest.tolist(), float(state.bound), 448 / float(state.bound)
      ([2.0, 4.0, 1.0], 4.0, 112.0)

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning", 2022, section 3.3.
    """

    length: int = 1024
    margin: int = 0
    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self):
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(
                "DelayedScaling: length must be a whole number of at least 1, got "
                f"{self.length!r}."
            )
        if not isinstance(self.margin, int):
            raise ValueError(
                f"DelayedScaling: margin must be a whole number, got {self.margin!r}."
            )

    def init(self, batch: tuple[int, ...] = ()) -> AmaxHistory:
        """The state before the first step.

        Args:
          batch: the shape of a stack of tensors, for example of stacked layers.
        """
        return AmaxHistory(
            jnp.zeros((*batch, self.length), jnp.float32),
            jnp.zeros(batch, jnp.float32),
        )

    def largest_magnitude(self, x: jax.Array) -> jax.Array:
        """The largest magnitude of a tensor on all devices, float32 scalar."""
        amax = jnp.max(jnp.abs(x), initial=0).astype(jnp.float32)
        return amax if self.axis_name is None else lax.pmax(amax, self.axis_name)

    def bound(self, state: AmaxHistory, amax: jax.Array) -> jax.Array:
        """The largest magnitude that the present step can represent.

        Args:
          state: the state before the step.
          amax: the largest magnitude of the tensor. Only the first step uses it.
        """
        return jnp.where(state.bound > 0, state.bound, amax * 2.0**self.margin)

    def update(self, state: AmaxHistory, amax: jax.Array) -> AmaxHistory:
        """The state after a step.

        Zeros, infinities and NaN do not change the bound.

        Args:
          state: the state before the step.
          amax: the largest magnitude of the tensor, float32 `[*batch]`.
        """
        newest = jnp.asarray(amax, jnp.float32)[..., None]
        largest = jnp.concatenate([newest, state.largest[..., :-1]], axis=-1)
        finite = jnp.where(jnp.isfinite(largest), largest, 0)
        most = jnp.max(finite, axis=-1)
        bound = jnp.where(most > 0, most * 2.0**self.margin, state.bound)
        return AmaxHistory(largest, bound)
