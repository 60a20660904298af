"""The base class of all observers.

An observer is a frozen description with `init`, `update`, `merge` and `bounds`. Its
state is a NamedTuple of arrays of static shape. So a state goes through `jit`,
`lax.scan`, `vmap` and `shard_map`, and into checkpoints. The first field of every state
is `totals`: how many numbers were observed.

Shapes: with `axis=None` each statistic is a scalar. Otherwise it is `[*channels]`, the
sizes of the kept axes in the order of `axis`.

A number that is not finite is counted and otherwise ignored. If a channel has no finite
number, it has no bounds.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import math
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from jaxq import formats
from jaxq.debug_checks import allow_nonfinite
from jaxq.formats import Format
from jaxq.meshes import call_on_auto_axes
from jaxq.observers import _numbers
from jaxq.observers._numbers import Count
from jaxq.processes import to_numpy

ON_NONFINITE = ("raise", "ignore")

State = TypeVar("State", bound=Any)


class Totals(NamedTuple):
    """How many numbers of each kind an observer has read; each `[*channels]`."""

    finite: Count
    nan: Count
    infinite: Count


class RangeKind(enum.Enum):
    """Where a range may lie."""

    SYMMETRIC = "(-T, T), or (0, T) if the format has no negative numbers"
    WITH_ZERO = "contains 0, for codes with a zero point"
    ANYWHERE = "with or without 0, for codes with an offset"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observer(abc.ABC):
    """Finds the range to quantize from batches of numbers.

    Two observers are equal if all their settings are equal.

    Args:
      axis: the axis or axes of x that are kept. Each index along the kept axes is a
        channel and has its own statistics. None computes the statistics of all numbers
        together.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> obs = jaxq.observers.minmax()
      >>> state = obs.init(jnp.zeros(3))
      >>> state = obs.update(state, jnp.array([-1.0, 0.5, 2.0]))
      >>> [float(b) for b in obs.bounds(state, "int8", symmetric=False)]
      [-1.0, 2.0]
      >>> [float(b) for b in obs.bounds(state, "int8")]
      [-2.0, 2.0]
    """

    kind: ClassVar[str]

    axis: int | tuple[int, ...] | None = None

    def __post_init__(self):
        axis = tuple(self.axis) if isinstance(self.axis, list | tuple) else self.axis
        if not all(_is_int(a) for a in _as_tuple(axis)):
            raise TypeError(
                f"{self.kind}: axis must be a whole number, a tuple of whole "
                f"numbers or None, got {self.axis!r}."
            )
        object.__setattr__(self, "axis", axis)

    @allow_nonfinite()
    def init(self, x: jax.typing.ArrayLike | jax.ShapeDtypeStruct) -> Any:
        """The state before the first batch.

        Args:
          x: a batch, or its `jax.ShapeDtypeStruct`. Only the dtype and the sizes of the
            kept axes are read.

        Raises:
          TypeError: x is not floating point.
          ValueError: x does not have one of the kept axes, or `axis` names one axis
            twice.
        """
        shape = self._channel_shape(x, "init")
        return self._empty(shape, x)

    @allow_nonfinite()
    def update(
        self,
        state: State,
        x: jax.typing.ArrayLike,
        *,
        where: jax.typing.ArrayLike | None = None,
    ) -> State:
        """The state after one more batch.

        Args:
          state: the result of `init`, `update` or `merge`.
          x: floats. The sizes of the axes that are not kept may differ between batches.
          where: bool, of a shape that broadcasts to the shape of x. A number is ignored
            if its entry is False, for example because it is padding.

        Raises:
          TypeError: x is not floating point, or `where` is not bool.
          ValueError: the kept axes of x have other sizes than the channels of the
            state; or `where` does not broadcast to x; or another kind of observer or
            other settings made the state.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> observer = jaxq.observers.minmax()
          >>> x = jnp.array([-1.0, 2.0, 100.0])
          >>> is_real = jnp.array([True, True, False])  # the last number is padding
          >>> state = observer.update(observer.init(x), x, where=is_real)
          >>> [float(end) for end in observer.bounds(state, "int8", symmetric=False)]
          [-1.0, 2.0]
        """
        shape = self._channel_shape(x, "update")
        state_shape = state.totals.nan.low.shape
        if shape != state_shape:
            raise ValueError(
                f"{self.kind}.update: the state has statistics of shape "
                f"{list(state_shape)}, and this batch needs {list(shape)} "
                f"(x: {_array_text(x)}, axis={self.axis}). Make another state with "
                "init(x) for batches of this shape."
            )
        self.check_state(state, "update")
        mask = self._mask(where, x, "update")
        update = functools.partial(_jit_update, self._state_maker())
        # Every device has the whole state, also on a mesh with explicit axes.
        specs = jax.tree.map(lambda _: PartitionSpec(), state)
        return call_on_auto_axes(update, specs, state, jnp.asarray(x), mask)

    @allow_nonfinite()
    def merge(self, a: State, b: State) -> State:
        """The state of all batches of both states. The order of merges does not matter.

        Raises:
          ValueError: the shapes of the states differ.
        """
        shapes = [jax.tree.map(jnp.shape, state) for state in (a, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{self.kind}.merge: the states differ in shape: {shapes[0]} and "
                f"{shapes[1]}. Make both with the same observer and the same number of "
                "channels."
            )
        return _jit_merge(self._state_maker(), a, b)

    @allow_nonfinite()
    def merge_across(self, state: State, axis_name: str | tuple[str, ...]) -> State:
        """The merged state of all devices along a mapped axis, the same on each device.

        Call it inside `shard_map` or `vmap`.

        Example:
          >>> import jax, jax.numpy as jnp, jaxq
          >>> obs = jaxq.observers.absmax()
          >>> def shard(x):
          ...     return obs.merge_across(obs.update(obs.init(x), x), "data")
          >>> x = jnp.array([[1.0, -4.0], [2.0, 3.0]])
          >>> state = jax.vmap(shard, axis_name="data", out_axes=None)(x)
          >>> float(obs.bounds(state)[1])
          4.0
        """
        add = functools.partial(lax.psum, axis_name=axis_name)
        totals = Totals(*(_numbers.sum_counts(count, add) for count in state.totals))
        return self._across(state, axis_name)._replace(totals=totals)

    @allow_nonfinite()
    def bounds(
        self,
        state: Any,
        format: str | Format = "int8",
        *,
        symmetric: bool = True,
        include_zero: bool = True,
        on_nonfinite: str = "raise",
    ) -> tuple[jax.Array, jax.Array]:
        """The range to quantize.

        Args:
          state: a state of at least one batch.
          format: the format to quantize to. The ranges of `mse` and `entropy` depend on
            it.
          symmetric: True gives (-T, T), or (0, T) if the format has no negative
            numbers. False gives a range that may be asymmetric.
          include_zero: True extends a range that is not symmetric to contain 0, as
            codes with a zero point need it. False is for codes with an offset
            (`QuantSpec(offset="min")`), and needs `symmetric=False`.
          on_nonfinite: what to do if numbers that are not finite were observed: "raise"
            an error or "ignore" them.

        Returns:
          (low, high), each float32 `[*channels]`. Under jit a channel without a valid
          range has NaN, because no error can be raised.

        Raises:
          TypeError: `symmetric` or `include_zero` is not a bool.
          ValueError: a channel has no finite number; or numbers that are not finite
            were observed and `on_nonfinite` is "raise"; or another kind of observer or
            other settings made the state; or the format is unknown; or the observer
            cannot find a range for the format; or `symmetric` is True and
            `include_zero` is False.
        """
        fmt = self._check_format(format, on_nonfinite, "bounds")
        range_kind = self._range_kind(fmt, symmetric, include_zero, "bounds")
        self.check_state(state, "bounds")
        low, high = _jit_bounds(self, fmt, range_kind, on_nonfinite, state)
        self._check_counts(state.totals, on_nonfinite, "bounds")
        return low, high

    @allow_nonfinite()
    def bounds_of(
        self,
        x: jax.typing.ArrayLike,
        format: str | Format = "int8",
        *,
        symmetric: bool = True,
        include_zero: bool = True,
        where: jax.typing.ArrayLike | None = None,
        on_nonfinite: str = "raise",
    ) -> tuple[jax.Array, jax.Array]:
        """The range to quantize of one array, such as a weight, without a state.

        `bounds_of` reads all numbers. So `percentile` is exact, and `mse` measures the
        error of each number. `bounds` reads only the histogram of a state. To find one
        range for each row of `[..., n]`, let `axis` be all axes but the last, or use
        `jax.vmap`.

        Args:
          x: floats.
          format: as for `bounds`.
          symmetric: as for `bounds`.
          include_zero: as for `bounds`.
          where: as for `update`.
          on_nonfinite: as for `bounds`.

        Returns:
          (low, high), as `bounds`.

        Raises:
          TypeError: x is not floating point, or `where`, `symmetric` or `include_zero`
            is not bool.
          ValueError: x does not have one of the kept axes; or `where` does not
            broadcast to x; or a channel has no finite number; or x has numbers that are
            not finite and `on_nonfinite` is "raise"; or the format is unknown; or the
            observer cannot find a range for the format; or `symmetric` is True and
            `include_zero` is False.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> blocks = jnp.array([[1.0, 1.1, 0.9, 8.0], [1.0, 2.0, 3.0, 4.0]])
          >>> obs = jaxq.observers.percentile(50, axis=0)
          >>> low, high = obs.bounds_of(blocks, "int4")
          >>> [round(float(t), 2) for t in high]
          [1.05, 2.5]
        """
        self._channel_shape(x, "bounds_of")
        fmt = self._check_format(format, on_nonfinite, "bounds_of")
        range_kind = self._range_kind(fmt, symmetric, include_zero, "bounds_of")
        mask = self._mask(where, x, "bounds_of")
        low, high, totals = _jit_bounds_of(
            self, fmt, range_kind, on_nonfinite, jnp.asarray(x), mask
        )
        self._check_counts(totals, on_nonfinite, "bounds_of")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """A description for JSON. `from_dict` gives an equal observer."""
        return {"type": self.kind, **dataclasses.asdict(self)}

    # Each kind of observer implements the four methods below. They run inside jit. x is
    # float32 [*channels, n]. keep is bool of the same shape. It is False for a number
    # that is masked or not finite. The base class updates the field `totals`.

    @abc.abstractmethod
    def _init(self, totals: Totals, shape: tuple[int, ...]) -> Any:
        """The state before the first batch."""

    @abc.abstractmethod
    def _update(self, state: Any, x: jax.Array, keep: jax.Array) -> Any:
        """The state after one more batch."""

    @abc.abstractmethod
    def _across(self, state: Any, axis_name: str | tuple[str, ...]) -> Any:
        """The merged state of all devices along a mapped axis."""

    @abc.abstractmethod
    def _bounds(
        self, state: Any, fmt: Format, range_kind: RangeKind
    ) -> tuple[jax.Array, jax.Array]:
        """The range of a state. It is arbitrary if a channel has no finite number."""

    def _bounds_of(
        self, x: jax.Array, keep: jax.Array, fmt: Format, range_kind: RangeKind
    ) -> tuple[jax.Array, jax.Array]:
        """The range of one array."""
        state = self._update(self._empty(x.shape[:-1], x), x, keep)
        return self._bounds(state, fmt, range_kind)

    def check_state(self, state: Any, caller: str) -> None:
        """Raises ValueError if this observer cannot have made the state."""
        totals = getattr(state, "totals", None)
        shape = tuple(totals.nan.low.shape) if isinstance(totals, Totals) else ()
        expected = _abstract_state(self._state_maker(), shape)
        if _treedef_and_shapes(state) != _treedef_and_shapes(expected):
            raise ValueError(
                f"{self.kind}.{caller}: {self!r} did not make this state. The state "
                "comes from another kind of observer or from other settings. Observe "
                "the data with this observer."
            )

    def _state_maker(self) -> Observer:
        """The observer that compiled programs for states use in place of this one.

        Its states have the same arrays. Observers with the same state maker share their
        compiled programs.
        """
        return self

    def _empty(self, shape: tuple[int, ...], x: Any) -> Any:
        """The state before the first batch, as the carry of a loop that reads x.

        Inside `shard_map` a carry must vary over the same mesh axes as x.
        """
        totals = Totals(*(_numbers.zero_counts(shape) for _ in Totals._fields))
        return _numbers.varying_like(self._init(totals, shape), x)

    def _check(self, fmt: Format, range_kind: RangeKind) -> None:  # noqa: B027
        """Raises ValueError if this observer cannot find a range for the format."""

    def _check_format(
        self, format: str | Format, on_nonfinite: str, caller: str
    ) -> Format:
        fmt = formats.get(format)
        formats.check_choice(
            f"{self.kind}.{caller}: on_nonfinite", on_nonfinite, ON_NONFINITE
        )
        return fmt

    def _range_kind(
        self, fmt: Format, symmetric: bool, include_zero: bool, caller: str
    ) -> RangeKind:
        for name, value in (("symmetric", symmetric), ("include_zero", include_zero)):
            if not isinstance(value, bool):
                raise TypeError(
                    f"{self.kind}.{caller}: {name} must be True or False, got "
                    f"{value!r}."
                )
        if symmetric and not include_zero:
            raise ValueError(
                f"{self.kind}.{caller}: a symmetric range contains 0, got "
                "symmetric=True and include_zero=False. Pass symmetric=False too."
            )
        range_kind = RangeKind.WITH_ZERO if include_zero else RangeKind.ANYWHERE
        if symmetric:
            range_kind = RangeKind.SYMMETRIC
        self._check(fmt, range_kind)
        return range_kind

    def _channel_shape(self, x: Any, caller: str) -> tuple[int, ...]:
        """The shape of the statistics of x."""
        shape, dtype = jnp.shape(x), jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{self.kind}.{caller}: x must be floating point, got "
                f"{_array_text(x)}. Convert it with astype."
            )
        axes = _as_tuple(self.axis)
        ndim = len(shape)
        in_range = all(-ndim <= axis < ndim for axis in axes)
        if not in_range or len({axis % ndim for axis in axes}) < len(axes):
            raise ValueError(
                f"{self.kind}.{caller}: axis={self.axis} must name axes of x, each at "
                f"most once, got x: {_array_text(x)}. Use an observer with other axes."
            )
        return tuple(shape[axis] for axis in axes)

    def _mask(self, where: Any, x: Any, caller: str) -> jax.Array | None:
        """Checks `where`, and returns it as an array or None."""
        if where is None:
            return None
        mask, shape = jnp.asarray(where), jnp.shape(x)
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"{self.kind}.{caller}: where must be bool, got {_array_text(mask)}. "
                "Convert it with astype(bool)."
            )
        try:
            fits = np.broadcast_shapes(mask.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{self.kind}.{caller}: where must broadcast to x, got "
                f"{_array_text(mask)} for x: {_array_text(x)}. Reshape where."
            )
        return mask

    def _check_counts(self, totals: Totals, on_nonfinite: str, caller: str) -> None:
        """Raises ValueError if a channel has no valid range. Does nothing under jit."""
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(totals)):
            return
        finite, nan, infinite = (
            to_numpy(count.low) + to_numpy(count.high).astype(np.float64) * 2.0**32
            for count in totals
        )
        if on_nonfinite == "raise" and (nan.any() or infinite.any()):
            raise ValueError(
                f"{self.kind}.{caller}: {int(nan.sum())} NaN and {int(infinite.sum())} "
                f"infinities were observed{self._channels_text(nan + infinite > 0)}. "
                "Pass on_nonfinite='ignore' to get the range of the finite numbers."
            )
        if (finite == 0).any():
            raise ValueError(
                f"{self.kind}.{caller}: no finite number was observed"
                f"{self._channels_text(finite == 0)}, so there is no range. Each "
                "channel needs at least one finite number."
            )

    def _channels_text(self, bad: np.ndarray) -> str:
        """Names the bad channels for an error. It is "" if `axis` is None."""
        if self.axis is None:
            return ""
        index = [int(i) for i in np.argwhere(bad)[0]]
        first = index[0] if len(index) == 1 else index
        return f" in {int(bad.sum())} of {bad.size} channels (the first is {first})"

    def _channels_first(
        self, x: jax.Array, where: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Totals]:
        """Moves the channels of x to the front, and counts its numbers.

        Returns:
          x: float32 `[*channels, n]`.
          keep: bool `[*channels, n]`, False for a number that is masked or not finite.
          totals: the counts of the numbers that are not masked.
        """
        axes = tuple(axis % x.ndim for axis in _as_tuple(self.axis))
        order = (*axes, *(axis for axis in range(x.ndim) if axis not in axes))
        channels = tuple(x.shape[axis] for axis in axes)
        n = math.prod(x.shape) // max(math.prod(channels), 1)

        def move(array: jax.Array) -> jax.Array:
            return array.transpose(order).reshape(*channels, n)

        numbers = move(x.astype(jnp.float32))
        pattern = _numbers.magnitude_pattern(numbers)
        finite, nan = pattern < _numbers.INFINITY, pattern > _numbers.INFINITY
        infinite = pattern == _numbers.INFINITY
        if where is not None:
            mask = move(_broadcast_mask(where, x.shape))
            finite, nan, infinite = finite & mask, nan & mask, infinite & mask
        counts = _numbers.count_true(finite, nan, infinite)
        return numbers, finite, Totals(*(_numbers.as_count(count) for count in counts))


def enclose(
    low: jax.Array, high: jax.Array, fmt: Format, range_kind: RangeKind
) -> tuple[jax.Array, jax.Array]:
    """The smallest range of a kind that holds the numbers from `low` to `high`."""
    if range_kind is RangeKind.SYMMETRIC:
        return mirror(_numbers.larger(jnp.abs(low), jnp.abs(high)), fmt)
    if range_kind is RangeKind.ANYWHERE:
        return low, high
    zero = jnp.zeros_like(low)
    return _numbers.smaller(low, zero), _numbers.larger(high, zero)


def mirror(threshold: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """(-T, T), or (0, T) if the format has no negative numbers."""
    low = -threshold if fmt.min < 0 else jnp.zeros_like(threshold)
    return low, threshold


@functools.lru_cache
def _abstract_state(observer: Observer, shape: tuple[int, ...]) -> Any:
    """The state before the first batch, as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: observer._empty(shape, np.float32(0)))


def _treedef_and_shapes(
    state: Any,
) -> tuple[Any, list[tuple[tuple[int, ...], np.dtype]]]:
    """Treedef, and the shape and dtype of each leaf."""
    leaves, treedef = jax.tree.flatten(state)
    return treedef, [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves]


@functools.partial(jax.jit, static_argnums=0)
def _jit_update(
    observer: Observer, state: Any, x: jax.Array, where: jax.Array | None
) -> Any:
    numbers, keep, new = observer._channels_first(x, where)
    pairs = zip(state.totals, new, strict=True)
    totals = Totals(*(_numbers.plus(a, b) for a, b in pairs))
    state = _numbers.varying_like(state, numbers)
    return observer._update(state, numbers, keep)._replace(totals=totals)


@functools.partial(jax.jit, static_argnums=0)
def _jit_merge(observer: Observer, a: Any, b: Any) -> Any:
    """Merges two states by `merge_across`, as if two devices had them."""
    stacked = jax.tree.map(lambda u, v: jnp.stack([u, v]), a, b)

    def across(state):
        return observer.merge_across(state, "merged")

    return jax.vmap(across, axis_name="merged", out_axes=None)(stacked)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _jit_bounds(
    observer: Observer,
    fmt: Format,
    range_kind: RangeKind,
    on_nonfinite: str,
    state: Any,
):
    return _or_nan(observer._bounds(state, fmt, range_kind), state.totals, on_nonfinite)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _jit_bounds_of(
    observer: Observer,
    fmt: Format,
    range_kind: RangeKind,
    on_nonfinite: str,
    x: jax.Array,
    where: jax.Array | None,
):
    numbers, keep, totals = observer._channels_first(x, where)
    bounds = observer._bounds_of(numbers, keep, fmt, range_kind)
    return *_or_nan(bounds, totals, on_nonfinite), totals


def _or_nan(
    bounds: tuple[jax.Array, jax.Array], totals: Totals, on_nonfinite: str
) -> tuple[jax.Array, jax.Array]:
    """The range, with NaN in the channels that have no valid range."""
    bad = _numbers.is_zero(totals.finite)
    if on_nonfinite == "raise":
        bad = bad | ~_numbers.is_zero(totals.nan) | ~_numbers.is_zero(totals.infinite)
    low, high = (jnp.where(bad, np.float32(np.nan), bound) for bound in bounds)
    return low, high


def _broadcast_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask with the shape of x. Missing leading axes are added first."""
    same_rank = mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)
    return jnp.broadcast_to(same_rank, shape)


def _as_tuple(axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _array_text(x: Any) -> str:
    """dtype[shape] of an array, for errors."""
    return f"{jnp.result_type(x).name}[{','.join(map(str, jnp.shape(x)))}]"
