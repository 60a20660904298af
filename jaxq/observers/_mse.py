"""The range of least quantization error, among ones that shrink from the extremes in even steps.

Errors are measured in units of the largest number, so the choice is the same for 2^k x as for x. Of a state, each bin's
numbers count as spread evenly over it, and the mean error over a bin is an integral in closed form, so bins
wider than a step of the format do no harm. Of an array, each number's own error counts.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.formats import Format
from jaxq.observers import _numbers
from jaxq.observers._histogram import Histogram, ascending
from jaxq.observers._observer import enclose
from jaxq.observers._range import range_of

# Narrower than this, in steps of the format, a bin is taken for its middle: an integral would be lost in rounding.
_NARROW = np.float32(2.0**-8)


class _Grid(NamedTuple):
    """A format's numbers as a function of a code's real value t, and the integral of the error's power from 0 to t."""

    values: np.ndarray  # float32 [n], ascending
    edges: np.ndarray  # float32 [n - 1], where the nearest number changes
    base: np.ndarray  # float32 [n], what makes the integral continuous


@dataclasses.dataclass(frozen=True)
class MeanSquaredError(Histogram):
    """See `mse`."""

    kind: ClassVar[str] = "mse"

    power: float = 2.0
    grid: int = 100
    shrink: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "power", float(self.power))
        object.__setattr__(self, "shrink", float(self.shrink))
        if not 0 < self.power <= 8:
            raise ValueError(
                f"mse: power must be above 0 and at most 8, got {self.power}."
            )
        if not isinstance(self.grid, int) or not 1 <= self.grid <= 10000:
            raise ValueError(
                f"mse: grid must be a whole number from 1 to 10000, got {self.grid!r}."
            )
        if not 0 < self.shrink <= 1:
            raise ValueError(
                f"mse: shrink must be above 0 and at most 1, got {self.shrink}."
            )

    def _check(self, fmt, symmetric):
        if fmt.max <= 0:
            raise ValueError(f"mse: {fmt.name} has no positive numbers to scale to.")
        if fmt.bits > 16:
            raise ValueError(
                f"mse: {fmt.name} has too many numbers to measure; use minmax or absmax."
            )
        if not symmetric and fmt.kind != "integer":
            raise ValueError(
                f"mse: symmetric=False finds a zero point, which only integer formats have, and {fmt.name} has none."
            )

    def _factors(self) -> np.ndarray:
        return (1 - self.shrink * np.arange(self.grid) / self.grid).astype(np.float32)

    def _bounds(self, state, fmt, symmetric):
        low, high = enclose(state.low, state.high, fmt, symmetric)
        exponent = -self._exponent(state.low, state.high)
        # From here on in bins, `[*channels, 2 * bins + 1]` edges: whole numbers, cut where the numbers end.
        least, most = (
            _numbers.times_power(v, exponent)[..., None]
            for v in (state.low, state.high)
        )
        bottom, top = (
            _numbers.times_power(v, exponent)[..., None] for v in (low, high)
        )
        whole = jnp.arange(-self.bins, self.bins + 1, dtype=jnp.float32)
        edges = jnp.clip(jnp.broadcast_to(whole, (*low.shape, whole.size)), least, most)
        counts = _numbers.as_float(ascending(state.counts))
        # Only their ratios matter, and sums of powers must not overflow.
        counts = counts / jnp.maximum(jnp.max(counts, axis=-1, keepdims=True), 1.0)
        steps = _grid(fmt, symmetric, self.power)

        def error(factor):
            inverse, zero = _inverse_step(bottom * factor, top * factor, fmt, symmetric)
            t = edges * inverse + zero
            integral, middle = (
                _integral(steps, t, self.power),
                (t[..., 1:] + t[..., :-1]) / 2,
            )
            width = t[..., 1:] - t[..., :-1]
            mean = jnp.where(
                width < _NARROW,
                _raised(middle - _at(steps.values, _cell(steps, middle)), self.power),
                (integral[..., 1:] - integral[..., :-1])
                / jnp.where(width < _NARROW, 1.0, width),
            )
            return jnp.sum(counts * mean, axis=-1) * _raised(factor, self.power)

        errors = lax.map(error, jnp.asarray(self._factors()))
        return self._best(
            low,
            high,
            jnp.argmin(
                jnp.where(jnp.isnan(errors), np.float32(np.inf), errors), axis=0
            ),
        )

    def _bounds_of(self, x, keep, fmt, symmetric):
        least, most = range_of(x, keep)
        low, high = enclose(least, most, fmt, symmetric)
        # In units of a power of two near the largest magnitude.
        exponent = -(self._exponent(least, most) + (self.bins - 1).bit_length())
        scaled = _numbers.times_power(
            jnp.where(keep, x, 0.0), jnp.broadcast_to(exponent[..., None], x.shape)
        )
        bottom, top = (
            _numbers.times_power(v, exponent)[..., None] for v in (low, high)
        )
        factors = jnp.asarray(self._factors())

        def step(k, carry):
            best, at = carry
            factor = factors[k]
            inverse, zero = _inverse_step(bottom * factor, top * factor, fmt, symmetric)
            t = scaled * inverse + zero
            error = _raised(t - _nearest(t, fmt, symmetric), self.power)
            total = jnp.sum(jnp.where(keep, error, 0.0), axis=-1) * _raised(
                factor, self.power
            )
            return jnp.where(total < best, total, best), jnp.where(total < best, k, at)

        start = (
            jnp.full(low.shape, np.inf, jnp.float32),
            jnp.zeros(low.shape, jnp.int32),
        )
        return self._best(
            low,
            high,
            lax.fori_loop(0, self.grid, step, _numbers.varying_like(start, x))[1],
        )

    def _best(
        self, low: jax.Array, high: jax.Array, k: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The range `k` steps in; numbers below float32's normal range are not shrunk."""
        factor = jnp.asarray(self._factors())[k]
        tiny = jnp.maximum(jnp.abs(low), jnp.abs(high)) < _numbers.SMALLEST_NORMAL
        low, high = (
            jnp.where(tiny | (k == 0), bound, bound * factor) for bound in (low, high)
        )
        return low, high


def mse(
    power: float = 2.0,
    *,
    grid: int = 100,
    shrink: float = 1.0,
    bins: int = 2048,
    axis: int | tuple[int, ...] | None = None,
) -> MeanSquaredError:
    """The range that minimises the mean of `|x - quantized x|^power` for the format, over a grid.

    Candidates are the extremes times `1 - shrink * k / grid`, k from 0 to below `grid`; the first of equals wins. With
    `symmetric=False` both ends shrink alike, and zero points are whole, as `quantize` makes them.

    Args:
      power: 2 for squares; GPTQ's search uses 2.4 (with grid=80, shrink=0.8).
      grid: how many candidates.
      shrink: the whole way the grid goes, above 0 to 1.
      bins: of the state's histogram, see `histogram`.
      axis: see `Observer`.

    Raises:
      ValueError: a number out of range; at `bounds`, a format of more than 16 bits, or `symmetric=False` with
        one that is no integer.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> x = jnp.concatenate([jnp.linspace(-1, 1, 1001), jnp.array([3.0])])
      >>> float(jaxq.observers.mse().bounds_of(x, "int4")[1]) < 1.5
      True
      >>> float(jaxq.observers.mse().bounds_of(x, "int8")[1]) > 2.5
      True

    References:
      Sung et al., "Resiliency of Deep Neural Networks under Quantization" (2015); Frantar et al., "GPTQ" (2022), its
      published code's search.
    """
    return MeanSquaredError(power=power, grid=grid, shrink=shrink, bins=bins, axis=axis)


def _inverse_step(
    low: jax.Array, high: jax.Array, fmt: Format, symmetric: bool
) -> tuple[jax.Array, jax.Array]:
    """(1 / scale, zero point) of a range, as `quantize` finds them; 0 in place of 1 / 0."""
    step = (
        high * np.float32(1 / fmt.max)
        if symmetric
        else (high - low) * np.float32(1 / (fmt.max - fmt.min))
    )
    inverse = jnp.where(step > 0, 1 / jnp.where(step > 0, step, 1.0), 0.0)
    if symmetric:
        return inverse, jnp.zeros_like(inverse)
    return inverse, jnp.clip(
        np.float32(fmt.min) - jnp.round(low * inverse), fmt.min, fmt.max
    )


def _nearest(t: jax.Array, fmt: Format, symmetric: bool) -> jax.Array:
    """The format's number nearest to t: for integers -max to max where symmetric."""
    if fmt.kind == "integer":
        return jnp.clip(
            jnp.round(t), max(fmt.min, -fmt.max) if symmetric else fmt.min, fmt.max
        )
    return fmt.round(t)


def _grid(fmt: Format, symmetric: bool, power: float) -> _Grid:
    """The tables of `_integral`, in float64 while they are made.

    With v the nearest number in a cell, the integral of |t - v|^p there is F(t - v) and a constant, where
    F(u) = sign(u) |u|^(p+1) / (p+1); constants make it continuous from cell to cell, and 0 at t = 0.
    """
    values = fmt.values().astype(np.float64)
    if fmt.kind == "integer" and symmetric:
        values = values[values >= -fmt.max]
    edges = (values[1:] + values[:-1]) / 2
    boundaries = getattr(fmt, "boundaries", None)
    if boundaries is not None:
        edges = np.asarray(boundaries, np.float64)
    jumps = _antiderivative(edges - values[:-1], power) - _antiderivative(
        edges - values[1:], power
    )
    home = int(np.searchsorted(edges, 0.0))
    base = np.zeros_like(values)
    # Outwards from 0, so that small numbers keep small integrals, and their digits.
    base[home] = -_antiderivative(0.0 - values[home], power)
    base[home + 1 :] = base[home] + np.cumsum(jumps[home:])
    base[:home] = base[home] - np.cumsum(jumps[:home][::-1])[::-1]
    return _Grid(*(table.astype(np.float32) for table in (values, edges, base)))


def _antiderivative(u, power: float):
    return np.sign(u) * np.abs(u) ** (power + 1) / (power + 1)


def _integral(grid: _Grid, t: jax.Array, power: float) -> jax.Array:
    cell = _cell(grid, t)
    u = t - _at(grid.values, cell)
    return _at(grid.base, cell) + jnp.sign(u) * _raised(u, power + 1) * np.float32(
        1 / (power + 1)
    )


def _cell(grid: _Grid, t: jax.Array) -> jax.Array:
    return jnp.searchsorted(jnp.asarray(grid.edges), t).astype(jnp.int32)


def _at(table: np.ndarray, cell: jax.Array) -> jax.Array:
    return jnp.asarray(table)[cell]


def _raised(u: jax.Array, power: float) -> jax.Array:
    """`|u|^power`, by products where the power is whole."""
    return jnp.abs(u) ** (int(power) if power == int(power) else power)
