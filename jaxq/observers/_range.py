"""Observers of the extremes: of all numbers, of the magnitudes, and moving averages."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.observers import _numbers
from jaxq.observers._numbers import Count
from jaxq.observers._observer import Observer, RangeKind, Totals, enclose


class RangeState(NamedTuple):
    """The smallest and the largest finite number, each float32 `[*channels]`.

    Before the first number, low is infinity and high is minus infinity.
    """

    totals: Totals
    low: jax.Array
    high: jax.Array


class MovingAverageState(NamedTuple):
    """Averages of the smallest and the largest number of each batch.

    Attributes:
      totals: how many numbers were observed.
      low: float32 `[*channels]`, the average of the smallest numbers.
      high: float32 `[*channels]`, the average of the largest numbers.
      weight: float32 `[*channels]`, the sum of the weights of all batches. After t
        batches it is `1 - decay^t` with bias correction, and 1 without. It is 0 before
        the first batch.
      batches: `[*channels]`, the number of batches.
    """

    totals: Totals
    low: jax.Array
    high: jax.Array
    weight: jax.Array
    batches: Count


@dataclasses.dataclass(frozen=True)
class MinMax(Observer):
    """See `minmax`."""

    kind: ClassVar[str] = "minmax"

    def _init(self, totals, shape):
        return RangeState(totals, *no_range(shape))

    def _update(self, state, x, keep):
        low, high = range_of(x, keep)
        low, high = _numbers.smaller(state.low, low), _numbers.larger(state.high, high)
        return state._replace(low=low, high=high)

    def _across(self, state, axis_name):
        low, high = range_across(state.low, state.high, axis_name)
        return state._replace(low=low, high=high)

    def _bounds(self, state, fmt, range_kind):
        return enclose(state.low, state.high, fmt, range_kind)


@dataclasses.dataclass(frozen=True)
class AbsMax(MinMax):
    """See `absmax`."""

    kind: ClassVar[str] = "absmax"

    def _bounds(self, state, fmt, range_kind):
        low, high = super()._bounds(state, fmt, range_kind)
        if range_kind is not RangeKind.WITH_ZERO:
            return low, high
        threshold = _numbers.larger(-low, high)
        # A side without a number gets no codes. Bits also compare subnormal numbers.
        has_negative = _numbers.ordered_bits(low) < -1  # -1 is the key of -0
        has_positive = _numbers.ordered_bits(high) > 0
        return (
            jnp.where(has_negative, -threshold, 0.0),
            jnp.where(has_positive, threshold, 0.0),
        )


@dataclasses.dataclass(frozen=True)
class MovingAverage(Observer):
    """See `moving_average`."""

    kind: ClassVar[str] = "moving_average"

    decay: float = 0.99
    bias_corrected: bool = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "decay", float(self.decay))
        if not 0 <= self.decay < 1:
            raise ValueError(
                "moving_average: decay must be at least 0 and below 1, got "
                f"{self.decay}."
            )

    def _init(self, totals, shape):
        zeros = jnp.zeros(shape, jnp.float32)
        return MovingAverageState(
            totals, zeros, zeros, zeros, _numbers.zero_counts(shape)
        )

    def _update(self, state, x, keep):
        low, high = range_of(x, keep)
        new_weight = np.float32(1 - self.decay)
        if self.bias_corrected:
            weight = np.float32(self.decay) * state.weight + new_weight
            share = new_weight / weight
        else:
            weight = jnp.ones_like(state.weight)
            share = jnp.where(state.weight == 0, weight, new_weight)
        not_empty = jnp.any(keep, axis=-1)
        is_first = state.weight == 0
        batches = _numbers.plus(
            state.batches, _numbers.as_count(not_empty.astype(jnp.uint32))
        )

        def average(old, new):
            # Rounding must not move the average out of the interval from old to new. So
            # the average of a constant is exact. After the first batch the average is
            # `new`.
            mixed = _clip(
                (1 - share) * old + share * new,
                _numbers.smaller(old, new),
                _numbers.larger(old, new),
            )
            return jnp.where(not_empty, jnp.where(is_first, new, mixed), old)

        return state._replace(
            low=average(state.low, low),
            high=average(state.high, high),
            weight=jnp.where(not_empty, weight, state.weight),
            batches=batches,
        )

    def _across(self, state, axis_name):
        own_batches = _numbers.as_float(state.batches)
        not_empty = ~_numbers.is_zero(state.batches)
        total = lax.psum(own_batches, axis_name)
        share = own_batches / jnp.maximum(total, 1.0)

        def average(value):
            # The clip makes the mean exact if only one state has batches, or if all
            # averages are equal.
            low = jnp.where(not_empty, value, np.float32(np.inf))
            high = jnp.where(not_empty, value, np.float32(-np.inf))
            mean = lax.psum(share * value, axis_name)
            mean = _clip(mean, *range_across(low, high, axis_name))
            return jnp.where(total == 0, 0.0, mean)

        def total_of(words):
            return lax.psum(words, axis_name)

        return state._replace(
            low=average(state.low),
            high=average(state.high),
            weight=lax.pmax(state.weight, axis_name),
            batches=_numbers.sum_counts(state.batches, total_of),
        )

    def _bounds(self, state, fmt, range_kind):
        return enclose(state.low, state.high, fmt, range_kind)


def minmax(*, axis: int | tuple[int, ...] | None = None) -> MinMax:
    """The smallest and the largest number of all batches.

    Args:
      axis: see `Observer`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> x = jnp.array([[1.0, 3.0], [-2.0, 0.0]])
      >>> low, high = jaxq.observers.minmax(axis=0).bounds_of(x, symmetric=False)
      >>> low.tolist(), high.tolist()
      ([0.0, -2.0], [3.0, 0.0])
    """
    return MinMax(axis=axis)


def absmax(*, axis: int | tuple[int, ...] | None = None) -> AbsMax:
    """The largest magnitude T of all batches.

    The bounds are (-T, T), or (0, T) if the format has no negative numbers. With
    `symmetric=False` they are (-T, T) for every format. They are (0, T) or (-T, 0) if
    all numbers have one sign. With `include_zero=False` they are the extremes.

    Args:
      axis: see `Observer`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> float(jaxq.observers.absmax().bounds_of(jnp.array([1.0, -3.0]))[1])
      3.0
    """
    return AbsMax(axis=axis)


def moving_average(
    decay: float = 0.99,
    *,
    bias_corrected: bool = False,
    axis: int | tuple[int, ...] | None = None,
) -> MovingAverage:
    """Moving averages of the smallest and the largest number of each batch.

    A new value v updates the average e: `e = decay * e + (1 - decay) * v`. A batch
    without a finite number does not change the average.

    The average depends on the order of the batches. A merged state therefore differs
    from the state after all batches in sequence. The merged average is the mean of the
    two averages, weighted by their numbers of batches. It does not depend on the order
    of merges, up to rounding in float32.

    Args:
      decay: at least 0 and below 1.
      bias_corrected: False starts with the values of the first batch. True starts with
        0 and divides by `1 - decay^t` after t batches (Kingma and Ba, "Adam", 2015,
        section 3). The result is a weighted mean of all batches. The weight of a batch
        is multiplied by `decay` at each later batch.
      axis: see `Observer`.

    Raises:
      ValueError: `decay` is negative, or 1 or more.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> obs = jaxq.observers.moving_average(0.9)
      >>> state = obs.init(jnp.zeros(1))
      >>> for v in (1.0, 3.0):
      ...     state = obs.update(state, jnp.array([v]))
      >>> round(float(obs.bounds(state)[1]), 3)
      1.2

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference" (2018), section 3.1.
    """
    return MovingAverage(decay=decay, bias_corrected=bias_corrected, axis=axis)


def no_range(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(low, high) before the first number: inf and -inf."""
    return jnp.full(shape, np.inf, jnp.float32), jnp.full(shape, -np.inf, jnp.float32)


def range_of(x: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest number of each channel of `[*channels, n]`.

    They are inf and -inf in a channel without a number.
    """
    key = _numbers.ordered_bits(x)
    key_of_inf = np.int32(_numbers.INFINITY)
    key_of_minus_inf = ~key_of_inf
    # ~key reverses the order. So `largest` also finds the smallest number.
    low = ~_numbers.largest(jnp.where(keep, ~key, ~key_of_inf), ~key_of_inf)
    high = _numbers.largest(jnp.where(keep, key, key_of_minus_inf), key_of_minus_inf)
    return _numbers.from_ordered_bits(low), _numbers.from_ordered_bits(high)


def range_across(
    low: jax.Array, high: jax.Array, axis_name
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest number of all devices along a mapped axis."""
    least = lax.pmin(_numbers.ordered_bits(low), axis_name)
    most = lax.pmax(_numbers.ordered_bits(high), axis_name)
    return _numbers.from_ordered_bits(least), _numbers.from_ordered_bits(most)


def _clip(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return _numbers.smaller(_numbers.larger(x, low), high)
