"""Observers of the extremes: of everything, of the magnitudes, and their moving average."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.observers import _numbers
from jaxq.observers._numbers import Count
from jaxq.observers._observer import Observer, Seen, enclose, mirror


class RangeState(NamedTuple):
    """The least and greatest finite number, infinity and minus infinity of none; float32 `[*channels]`."""

    seen: Seen
    low: jax.Array
    high: jax.Array


class AbsMaxState(NamedTuple):
    """The largest finite magnitude; float32 `[*channels]`."""

    seen: Seen
    magnitude: jax.Array


class MovingAverageState(NamedTuple):
    """Averages of the batches' least and greatest numbers, float32 `[*channels]`.

    `weight` is what the averaged batches weigh together, `1 - decay^t` of the bias-corrected kind and 1 of the other;
    0 of none. `batches` counts them.
    """

    seen: Seen
    low: jax.Array
    high: jax.Array
    weight: jax.Array
    batches: Count


@dataclasses.dataclass(frozen=True)
class MinMax(Observer):
    """See `minmax`."""

    kind: ClassVar[str] = "minmax"

    def _init(self, seen, shape):
        return RangeState(seen, *no_range(shape))

    def _update(self, state, x, keep):
        low, high = range_of(x, keep)
        return state._replace(
            low=_numbers.smaller(state.low, low), high=_numbers.larger(state.high, high)
        )

    def _across(self, state, axis_name):
        low, high = range_across(state.low, state.high, axis_name)
        return state._replace(low=low, high=high)

    def _bounds(self, state, fmt, symmetric):
        return enclose(state.low, state.high, fmt, symmetric)


@dataclasses.dataclass(frozen=True)
class AbsMax(Observer):
    """See `absmax`."""

    kind: ClassVar[str] = "absmax"

    def _init(self, seen, shape):
        return AbsMaxState(seen, jnp.zeros(shape, jnp.float32))

    def _update(self, state, x, keep):
        largest = lax.bitcast_convert_type(_largest_pattern(x, keep), jnp.float32)
        return state._replace(magnitude=_numbers.larger(state.magnitude, largest))

    def _across(self, state, axis_name):
        return state._replace(
            magnitude=_numbers.unordered(
                lax.pmax(_numbers.ordered(state.magnitude), axis_name)
            )
        )

    def _bounds(self, state, fmt, symmetric):
        del symmetric
        return mirror(state.magnitude, fmt)


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
                f"moving_average: decay must be at least 0 and below 1, got {self.decay}."
            )

    def _init(self, seen, shape):
        zeros = jnp.zeros(shape, jnp.float32)
        return MovingAverageState(seen, zeros, zeros, zeros, _numbers.no_count(shape))

    def _update(self, state, x, keep):
        low, high = range_of(x, keep)
        new = np.float32(1 - self.decay)
        if self.bias_corrected:
            weight = np.float32(self.decay) * state.weight + new
            share = new / weight
        else:
            weight = jnp.ones_like(state.weight)
            share = jnp.where(state.weight == 0, weight, new)
        any_came = jnp.any(keep, axis=-1)
        batches = _numbers.plus(
            state.batches, _numbers.as_count(any_came.astype(jnp.uint32))
        )

        def average(old, came):
            # Between the two, whatever is rounded, so that a constant stays itself; the first batch counts in full.
            mixed = _between(
                (1 - share) * old + share * came,
                _numbers.smaller(old, came),
                _numbers.larger(old, came),
            )
            return jnp.where(any_came, jnp.where(state.weight == 0, came, mixed), old)

        return state._replace(
            low=average(state.low, low),
            high=average(state.high, high),
            weight=jnp.where(any_came, weight, state.weight),
            batches=batches,
        )

    def _across(self, state, axis_name):
        some = ~_numbers.is_zero(state.batches)
        total = lax.psum(_numbers.as_float(state.batches), axis_name)
        share = _numbers.as_float(state.batches) / jnp.maximum(total, 1.0)

        def average(value):
            low, high = (
                jnp.where(some, value, np.float32(end)) for end in (np.inf, -np.inf)
            )
            # Of one state alone, or of equal ones, it is that number, whatever is rounded.
            mixed = _between(
                lax.psum(share * value, axis_name), *range_across(low, high, axis_name)
            )
            return jnp.where(total == 0, 0.0, mixed)

        return state._replace(
            low=average(state.low),
            high=average(state.high),
            weight=lax.pmax(state.weight, axis_name),
            batches=_numbers.add_up(
                state.batches, lambda words: lax.psum(words, axis_name)
            ),
        )

    def _bounds(self, state, fmt, symmetric):
        return enclose(state.low, state.high, fmt, symmetric)


def minmax(*, axis: int | tuple[int, ...] | None = None) -> MinMax:
    """The least and the greatest number ever seen.

    Args:
      axis: see `Observer`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> low, high = jaxq.observers.minmax(axis=0).bounds_of(jnp.array([[1.0, 3.0], [-2.0, 0.0]]), symmetric=False)
      >>> low.tolist(), high.tolist()
      ([0.0, -2.0], [3.0, 0.0])
    """
    return MinMax(axis=axis)


def absmax(*, axis: int | tuple[int, ...] | None = None) -> AbsMax:
    """The largest magnitude ever seen, T: bounds are (-T, T), also with `symmetric=False`.

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
    """Moving averages of each batch's least and greatest number: `e = decay * e + (1 - decay) * v`.

    Order matters here, so a merge is no continuation of either state: it is the mean of the two averages, each weighing
    as many batches as it saw, the same in every order of merging up to float32's rounding. Batches with nothing in
    them, or nothing finite, leave the averages alone.

    Args:
      decay: 0 to below 1.
      bias_corrected: False begins with the first batch. True begins with 0 and divides by `1 - decay^t`: the mean of
        the batches with weights that fall off by `decay` (Kingma and Ba, "Adam", 2015, section 3).
      axis: see `Observer`.

    Raises:
      ValueError: decay is out of range.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> obs = jaxq.observers.moving_average(0.9)
      >>> state = obs.init(jnp.zeros(1))
      >>> for v in (1.0, 3.0):
      ...     state = obs.update(state, jnp.array([v]))
      >>> round(float(obs.bounds(state)[1]), 3)
      1.2

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
      (2018), section 3.1.
    """
    return MovingAverage(decay=decay, bias_corrected=bias_corrected, axis=axis)


def no_range(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The least and greatest of nothing."""
    return jnp.full(shape, np.inf, jnp.float32), jnp.full(shape, -np.inf, jnp.float32)


def range_of(x: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and greatest number of each channel of `[*channels, n]`, infinite if there is none."""
    key = _numbers.ordered(x)
    above, below = (
        np.int32(_numbers.INFINITY),
        ~np.int32(_numbers.INFINITY),
    )  # of infinity and minus infinity
    low = ~_numbers.largest(jnp.where(keep, ~key, ~above), ~above)
    return _numbers.unordered(low), _numbers.unordered(
        _numbers.largest(jnp.where(keep, key, below), below)
    )


def range_across(
    low: jax.Array, high: jax.Array, axis_name
) -> tuple[jax.Array, jax.Array]:
    """The least and greatest of all devices."""
    least = _numbers.unordered(lax.pmin(_numbers.ordered(low), axis_name))
    return least, _numbers.unordered(lax.pmax(_numbers.ordered(high), axis_name))


def _between(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return _numbers.smaller(_numbers.larger(x, low), high)


def _largest_pattern(x: jax.Array, keep: jax.Array) -> jax.Array:
    return _numbers.largest(
        jnp.where(keep, _numbers.magnitude_pattern(x), np.uint32(0)), np.uint32(0)
    )
