"""The range with the smallest quantization error.

The first candidate is the range of the extremes. Each further candidate is smaller by
the same step. A range for codes with an offset shrinks towards its middle. Every other
range shrinks towards 0. Errors are measured relative to the largest number. So x and
`2^k * x` get the same candidate.

For a state, the numbers of a bin are assumed to be spread evenly over the bin. The mean
error over a bin is then an integral in closed form. So bins may be wider than a step of
the format. For an array, the error of each number is measured.
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
from jaxq.observers._observer import RangeKind, enclose
from jaxq.observers._range import range_of

# A width in steps of the format. The mean error of a narrower bin is the error of its
# middle. The difference of two integrals would be lost in rounding.
_NARROW = np.float32(2.0**-8)


class _ErrorTable(NamedTuple):
    """Tables to compute the integral of |error|^power from 0 to t.

    t is a real number in steps of the format. Each number of the format has a cell: the
    interval that is rounded to this number. Each cell has one entry of a table.

    Attributes:
      values: float32 `[n]`, the numbers of the format, ascending.
      edges: float32 `[n - 1]`, the edges between the cells.
      base: float32 `[n]`, the constant of each cell that makes the integral continuous.
    """

    values: np.ndarray
    edges: np.ndarray
    base: np.ndarray


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

    def _check(self, fmt, range_kind):
        if fmt.max <= 0:
            raise ValueError(
                f"mse: {fmt.name} has no positive numbers to scale to. Use a format "
                "with positive numbers."
            )
        if fmt.bits > 16:
            raise ValueError(
                f"mse: {fmt.name} has {fmt.bits} bits, and mse takes at most 16 bits. "
                "Use minmax or absmax."
            )
        if range_kind is not RangeKind.SYMMETRIC and fmt.kind != "integer":
            raise ValueError(
                "mse: symmetric=False is for codes with a zero point or an offset, "
                f"which only integer formats have. {fmt.name} is not an integer "
                "format. Pass symmetric=True."
            )

    def _factors(self) -> np.ndarray:
        """The factors of the extremes, float32 `[grid]`, descending from 1."""
        return (1 - self.shrink * np.arange(self.grid) / self.grid).astype(np.float32)

    def _bounds(self, state, fmt, range_kind):
        low, high = enclose(state.low, state.high, fmt, range_kind)
        # From here on the unit of all numbers is the width of a bin. The edges of the
        # bins are whole numbers. They are clipped to the extremes, because no number is
        # beyond the extremes.
        exponent = -self._exponent(state.low, state.high)
        least, most = _in_units(exponent, state.low, state.high)
        bottom, top = _in_units(exponent, low, high)
        edge_numbers = jnp.arange(-self.bins, self.bins + 1, dtype=jnp.float32)
        edges = jnp.broadcast_to(edge_numbers, (*low.shape, edge_numbers.size))
        edges = jnp.clip(edges, least, most)  # [*channels, 2 * bins + 1]
        counts = _numbers.as_float(ascending(state.counts))  # [*channels, 2 * bins]
        # Only the ratios of the counts matter. Small counts keep the sum of errors from
        # overflow.
        counts = counts / jnp.maximum(jnp.max(counts, axis=-1, keepdims=True), 1.0)
        table = _error_table(fmt, range_kind, self.power)

        def error(factor):
            steps = _grid(
                *_smaller_range(bottom, top, factor, range_kind), fmt, range_kind
            )
            t = (edges - steps.start) * steps.inverse + steps.zero
            mean_error = _mean_error(table, t, self.power)  # [*channels, 2 * bins]
            error = jnp.sum(counts * mean_error, axis=-1)
            return self._in_numbers(error, bottom, top, factor, range_kind)

        errors = lax.map(error, jnp.asarray(self._factors()))  # [grid, *channels]
        errors = jnp.where(jnp.isnan(errors), np.float32(np.inf), errors)
        return self._candidate(low, high, jnp.argmin(errors, axis=0), range_kind)

    def _bounds_of(self, x, keep, fmt, range_kind):
        least, most = range_of(x, keep)
        low, high = enclose(least, most, fmt, range_kind)
        # From here on the unit of all numbers is a power of two near the largest
        # magnitude.
        exponent = -(self._exponent(least, most) + (self.bins - 1).bit_length())
        scaled = _numbers.times_power_of_two(
            jnp.where(keep, x, 0.0), jnp.broadcast_to(exponent[..., None], x.shape)
        )
        bottom, top = _in_units(exponent, low, high)
        factors = jnp.asarray(self._factors())

        def step(k, carry):
            best_error, best_k = carry
            factor = factors[k]
            steps = _grid(
                *_smaller_range(bottom, top, factor, range_kind), fmt, range_kind
            )
            t = (scaled - steps.start) * steps.inverse + steps.zero
            errors = _power(t - _nearest(t, fmt, range_kind), self.power)
            error = jnp.sum(jnp.where(keep, errors, 0.0), axis=-1)
            error = self._in_numbers(error, bottom, top, factor, range_kind)
            # If errors are equal, the first candidate is used. It has the widest range.
            better = error < best_error
            return jnp.where(better, error, best_error), jnp.where(better, k, best_k)

        infinity = jnp.full(low.shape, np.inf, jnp.float32)
        start = infinity, jnp.zeros(low.shape, jnp.int32)
        start = _numbers.varying_like(start, x)
        _, best_k = lax.fori_loop(0, self.grid, step, start)
        return self._candidate(low, high, best_k, range_kind)

    def _in_numbers(
        self,
        error: jax.Array,
        bottom: jax.Array,
        top: jax.Array,
        factor: jax.Array,
        range_kind: RangeKind,
    ) -> jax.Array:
        """Converts the error of a candidate to steps of the largest candidate.

        The errors of all candidates can then be compared.

        Args:
          error: float32 `[*channels]`, in steps of the smaller range.
          bottom: float32 `[*channels, 1]`, the smallest number.
          top: float32 `[*channels, 1]`, the largest number.
          factor: the factor of the smaller range.
          range_kind: see `RangeKind`.

        Returns:
          float32 `[*channels]`, infinite for a range that is empty in float32.
        """
        if range_kind is not RangeKind.ANYWHERE:
            return error * _power(factor, self.power)
        # Far from zero, the ends of the smaller range are rounded.
        low, high = _smaller_range(bottom, top, factor, range_kind)
        width = (top - bottom)[..., 0]
        share = (high - low)[..., 0] / jnp.where(width > 0, width, 1)
        share = jnp.where(width > 0, share, factor)
        error = error * _power(share, self.power)
        return jnp.where(share > 0, error, np.float32(np.inf))

    def _candidate(
        self, low: jax.Array, high: jax.Array, k: jax.Array, range_kind: RangeKind
    ) -> tuple[jax.Array, jax.Array]:
        """The range of candidate k. A range of subnormal numbers is not shrunk."""
        factor = jnp.asarray(self._factors())[k]
        magnitude = jnp.maximum(jnp.abs(low), jnp.abs(high))
        unchanged = (magnitude < _numbers.SMALLEST_NORMAL) | (k == 0)
        new_low, new_high = _smaller_range(low, high, factor, range_kind)
        return jnp.where(unchanged, low, new_low), jnp.where(unchanged, high, new_high)


def mse(
    power: float = 2.0,
    *,
    grid: int = 100,
    shrink: float = 1.0,
    bins: int = 2048,
    axis: int | tuple[int, ...] | None = None,
) -> MeanSquaredError:
    """The range with the smallest mean of `|x - quantized x|^power`, by a grid search.

    The candidates are the extremes times `1 - shrink * k / grid` for k from 0 to
    `grid - 1`. If errors are equal, the smallest k is used. With `symmetric=False` both
    ends shrink by the same factor, and zero points are whole numbers, as in `quantize`.
    With `include_zero=False` the range shrinks towards its middle.

    Args:
      power: above 0 and at most 8. 2 gives the mean squared error. GPTQ's search uses
        power=2.4, grid=80 and shrink=0.8.
      grid: the number of candidates, 1 to 10000.
      shrink: above 0 and at most 1. The smallest candidate is nearly `1 - shrink` times
        the extremes.
      bins: bins of the state's histogram on each side of 0, 2 to 32768.
      axis: see `Observer`.

    Raises:
      ValueError: `power`, `grid`, `shrink` or `bins` is out of range. `bounds` raises
        if the format has more than 16 bits or no positive numbers, or if `symmetric` is
        False and the format is not an integer format.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> x = jnp.concatenate([jnp.linspace(-1, 1, 1001), jnp.array([3.0])])
      >>> float(jaxq.observers.mse().bounds_of(x, "int4")[1]) < 1.5
      True
      >>> float(jaxq.observers.mse().bounds_of(x, "int8")[1]) > 2.5
      True

    References:
      Sung et al., "Resiliency of Deep Neural Networks under Quantization" (2015).
      Frantar et al., "GPTQ" (2022): the search in the published code.
    """
    return MeanSquaredError(power=power, grid=grid, shrink=shrink, bins=bins, axis=axis)


def _in_units(exponent: jax.Array, *bounds: jax.Array) -> list[jax.Array]:
    """Each of `bounds`, `[*channels]`, times 2^exponent, as `[*channels, 1]`."""
    return [_numbers.times_power_of_two(b, exponent)[..., None] for b in bounds]


def _smaller_range(
    low: jax.Array, high: jax.Array, factor: jax.Array, range_kind: RangeKind
) -> tuple[jax.Array, jax.Array]:
    """A range made smaller by a factor: towards 0, or towards its middle."""
    if range_kind is not RangeKind.ANYWHERE:
        return low * factor, high * factor
    # Halves first, because the sum and the difference of the ends may overflow.
    middle = low * 0.5 + high * 0.5
    half = (high * 0.5 - low * 0.5) * factor
    # middle + half may differ from `high` in float32. Factor 1 must change nothing.
    low = jnp.where(factor == 1, low, middle - half)
    return low, jnp.where(factor == 1, high, middle + half)


class _Grid(NamedTuple):
    """x in steps of the format is `(x - start) * inverse + zero`.

    All fields are float32. `inverse` is 0 if the step is 0.
    """

    start: jax.Array
    inverse: jax.Array
    zero: jax.Array


def _grid(low: jax.Array, high: jax.Array, fmt: Format, range_kind: RangeKind) -> _Grid:
    """The steps of a range, as in `quantize`."""
    is_symmetric = range_kind is RangeKind.SYMMETRIC
    if is_symmetric:
        step = high * np.float32(1 / fmt.max)
    else:
        step = (high - low) * np.float32(1 / (fmt.max - fmt.min))
    inverse = jnp.where(step > 0, 1 / jnp.where(step > 0, step, 1.0), 0.0)
    nothing = jnp.zeros_like(inverse)
    if is_symmetric:
        return _Grid(nothing, inverse, nothing)
    if range_kind is RangeKind.ANYWHERE:
        return _Grid(low, inverse, nothing + np.float32(fmt.min))
    zero = np.float32(fmt.min) - jnp.round(low * inverse)
    return _Grid(nothing, inverse, jnp.clip(zero, fmt.min, fmt.max))


def _nearest(t: jax.Array, fmt: Format, range_kind: RangeKind) -> jax.Array:
    """The number of the format nearest to t. Symmetric integers go from -max to max."""
    if fmt.kind != "integer":
        return fmt.round(t)
    is_symmetric = range_kind is RangeKind.SYMMETRIC
    least = max(fmt.min, -fmt.max) if is_symmetric else fmt.min
    return jnp.clip(jnp.round(t), least, fmt.max)


def _mean_error(table: _ErrorTable, t: jax.Array, power: float) -> jax.Array:
    """The mean of |error|^power over each bin.

    Args:
      table: the integral of the error.
      t: float32 `[..., n + 1]`, the edges of the bins in steps of the format.
      power: the power of the error.

    Returns:
      float32 `[..., n]`.
    """
    width = t[..., 1:] - t[..., :-1]
    integral = _integral(table, t, power)
    middle = (t[..., 1:] + t[..., :-1]) / 2
    nearest = _table_entry(table.values, _cell(table, middle))
    wide_mean = (integral[..., 1:] - integral[..., :-1]) / jnp.where(
        width < _NARROW, 1.0, width
    )
    return jnp.where(width < _NARROW, _power(middle - nearest, power), wide_mean)


def _error_table(fmt: Format, range_kind: RangeKind, power: float) -> _ErrorTable:
    """The tables that `_integral` reads, computed in float64.

    In the cell of the number v, the integral of |t - v|^p is F(t - v) plus a constant,
    where F(u) = sign(u) |u|^(p+1) / (p+1). The constants make the integral continuous
    from cell to cell, and 0 at t = 0.
    """
    values = fmt.values().astype(np.float64)
    if fmt.kind == "integer" and range_kind is RangeKind.SYMMETRIC:
        values = values[values >= -fmt.max]
    edges = (values[1:] + values[:-1]) / 2
    boundaries = getattr(fmt, "boundaries", None)
    if boundaries is not None:
        edges = np.asarray(boundaries, np.float64)
    left = _antiderivative(edges - values[:-1], power)
    right = _antiderivative(edges - values[1:], power)
    jumps = left - right
    home = int(np.searchsorted(edges, 0.0))  # the cell of 0
    base = np.zeros_like(values)
    # The sums start at the cell of 0 and go outwards. So the integrals near 0 are
    # small, and rounding to float32 keeps their digits.
    base[home] = -_antiderivative(0.0 - values[home], power)
    base[home + 1 :] = base[home] + np.cumsum(jumps[home:])
    base[:home] = base[home] - np.cumsum(jumps[:home][::-1])[::-1]
    return _ErrorTable(*(part.astype(np.float32) for part in (values, edges, base)))


def _antiderivative(u, power: float):
    """F of `_error_table`, in numpy."""
    return np.sign(u) * np.abs(u) ** (power + 1) / (power + 1)


def _integral(table: _ErrorTable, t: jax.Array, power: float) -> jax.Array:
    """The integral of |error|^power from 0 to t."""
    cell = _cell(table, t)
    u = t - _table_entry(table.values, cell)
    inverse = np.float32(1 / (power + 1))
    return _table_entry(table.base, cell) + jnp.sign(u) * _power(u, power + 1) * inverse


def _cell(table: _ErrorTable, t: jax.Array) -> jax.Array:
    """The index of the cell of t; int32."""
    return jnp.searchsorted(jnp.asarray(table.edges), t).astype(jnp.int32)


def _table_entry(values: np.ndarray, index: jax.Array) -> jax.Array:
    return jnp.asarray(values)[index]


def _power(u: jax.Array, power: float) -> jax.Array:
    """`|u|^power`. An integer power is computed by products."""
    return jnp.abs(u) ** (int(power) if power == int(power) else power)
