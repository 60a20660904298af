"""What every observer is: a frozen description with `init`, `update`, `merge` and `bounds` over a state of arrays.

A state is a NamedTuple of static shape, so it goes through `jit`, `lax.scan`, `vmap` and `shard_map` and into
checkpoints. Every state begins with `seen`, which counts what went in. Shapes: with `axis=None` statistics are scalars,
else `[*channels]`, the sizes of the kept axes in the order given.

What is not finite takes no part in a statistic and is counted. What nothing was observed for has no bounds.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxq import formats
from jaxq.formats import Format
from jaxq.observers import _numbers
from jaxq.observers._numbers import Count

ON_NONFINITE = ("raise", "ignore")

State = TypeVar("State", bound=Any)


class Seen(NamedTuple):
    """How many numbers came, by kind; each `[*channels]`."""

    finite: Count
    nan: Count
    infinite: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observer(abc.ABC):
    """Finds the range to quantize from numbers that come in batches; compared by value.

    Args:
      axis: the axis, or axes, of x that keep statistics of their own; None takes one statistic of everything.

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
                f"{self.kind}: axis must be a whole number, several or None, got {self.axis!r}."
            )
        object.__setattr__(self, "axis", axis)

    def init(self, x: jax.typing.ArrayLike | jax.ShapeDtypeStruct) -> Any:
        """The state of nothing seen.

        Args:
          x: what will be observed, or a `jax.ShapeDtypeStruct` of it; only its shape and dtype are read, and of the
            shape only the kept axes matter.

        Raises:
          TypeError: x is not floating point.
          ValueError: x lacks one of the kept axes.
        """
        shape = self._channels(x, "init")
        return self._empty(shape, x)

    def update(
        self,
        state: State,
        x: jax.typing.ArrayLike,
        *,
        where: jax.typing.ArrayLike | None = None,
    ) -> State:
        """The state after one more batch.

        Args:
          state: from `init`, `update` or `merge`.
          x: floats; the axes that are not kept may differ in size from batch to batch.
          where: bool, of a shape that broadcasts to x's: False leaves a number out, as padding.

        Raises:
          TypeError: x is not floating point, or `where` is not bool.
          ValueError: the kept axes of x have other sizes than the state's.
        """
        shape = self._channels(x, "update")
        held = state.seen.nan.low.shape
        if shape != held:
            raise ValueError(
                f"{self.kind}.update: the state keeps statistics of shape {list(held)} and this batch has "
                f"{list(shape)} (x: {_describe(x)}, axis={self.axis}). Make the state with init(x) of such a batch."
            )
        self.check_state(state, "update")
        return _update(
            self._keeper(), state, jnp.asarray(x), self._mask(where, x, "update")
        )

    def merge(self, a: State, b: State) -> State:
        """The state of everything both have seen; the order of merging never matters.

        Raises:
          ValueError: the states are of different shapes.
        """
        shapes = [jax.tree.map(jnp.shape, s) for s in (a, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{self.kind}.merge: the states differ in shape: {shapes[0]} and {shapes[1]}."
            )
        return _merge(self._keeper(), a, b)

    def merge_across(self, state: State, axis_name: str | tuple[str, ...]) -> State:
        """The merged state of all devices along a mapped axis, the same on each: inside `shard_map` or `vmap`.

        Example:
          >>> import jax, jax.numpy as jnp, jaxq
          >>> obs = jaxq.observers.absmax()
          >>> def shard(x):
          ...     return obs.merge_across(obs.update(obs.init(x), x), "data")
          >>> state = jax.vmap(shard, axis_name="data", out_axes=None)(jnp.array([[1.0, -4.0], [2.0, 3.0]]))
          >>> float(obs.bounds(state)[1])
          4.0
        """
        total = functools.partial(lax.psum, axis_name=axis_name)
        seen = Seen(*(_numbers.add_up(count, total) for count in state.seen))
        return self._across(state, axis_name)._replace(seen=seen)

    def bounds(
        self,
        state: Any,
        format: str | Format = "int8",
        *,
        symmetric: bool = True,
        on_nonfinite: str = "raise",
    ) -> tuple[jax.Array, jax.Array]:
        """The range to quantize.

        Args:
          state: of at least one batch.
          format: the format to quantize to, which `mse` and `entropy` depend on.
          symmetric: True gives (-T, T), or (0, T) for a format without negative numbers. False gives a range
            that contains 0.
          on_nonfinite: "raise" or "ignore" what was not finite.

        Returns:
          (low, high), each float32 `[*channels]`. Under jit, where no error can be raised, NaN in place of one.

        Raises:
          ValueError: nothing finite was observed, here or in some channel; or something was that is not finite; the
            state is of an observer of another kind or other settings.
        """
        fmt = self._checked(format, symmetric, on_nonfinite, "bounds")
        self.check_state(state, "bounds")
        low, high = _bounds(self, fmt, symmetric, on_nonfinite, state)
        self._complain(state.seen, on_nonfinite, "bounds")
        return low, high

    def bounds_of(
        self,
        x: jax.typing.ArrayLike,
        format: str | Format = "int8",
        *,
        symmetric: bool = True,
        where: jax.typing.ArrayLike | None = None,
        on_nonfinite: str = "raise",
    ) -> tuple[jax.Array, jax.Array]:
        """The range to quantize of one array, such as a weight; `bounds` without a state.

        Percentiles are exact and `mse` measures the errors of the numbers themselves, where a state keeps a histogram.
        For blocks `[..., n]` with a range each, let `axis` be all axes but the last, or use `jax.vmap`.

        Returns:
          (low, high), as `bounds`.

        Raises:
          TypeError, ValueError: as `update` and `bounds`.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> blocks = jnp.array([[1.0, 1.1, 0.9, 8.0], [1.0, 2.0, 3.0, 4.0]])
          >>> low, high = jaxq.observers.percentile(50, axis=0).bounds_of(blocks, "int4")
          >>> [round(float(t), 2) for t in high]
          [1.05, 2.5]
        """
        self._channels(x, "bounds_of")
        fmt = self._checked(format, symmetric, on_nonfinite, "bounds_of")
        mask = self._mask(where, x, "bounds_of")
        low, high, seen = _bounds_of(
            self, fmt, symmetric, on_nonfinite, jnp.asarray(x), mask
        )
        self._complain(seen, on_nonfinite, "bounds_of")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` gives an equal observer back."""
        return {"type": self.kind, **dataclasses.asdict(self)}

    # What a kind of observer is made of: all inside jit, on x float32 [*channels, n] and keep bool of the same shape,
    # False for what is masked or not finite.

    @abc.abstractmethod
    def _init(self, seen: Seen, shape: tuple[int, ...]) -> Any:
        """The state of nothing seen."""

    @abc.abstractmethod
    def _update(self, state: Any, x: jax.Array, keep: jax.Array) -> Any:
        """The state after one more batch; `seen` is the caller's business."""

    @abc.abstractmethod
    def _across(self, state: Any, axis_name: str | tuple[str, ...]) -> Any:
        """The merged state of everything along a mapped axis; `seen` is the caller's business."""

    @abc.abstractmethod
    def _bounds(
        self, state: Any, fmt: Format, symmetric: bool
    ) -> tuple[jax.Array, jax.Array]:
        """The range, where anything was seen."""

    def _bounds_of(
        self, x: jax.Array, keep: jax.Array, fmt: Format, symmetric: bool
    ) -> tuple[jax.Array, jax.Array]:
        """The range of one array."""
        return self._bounds(
            self._update(self._empty(x.shape[:-1], x), x, keep), fmt, symmetric
        )

    def check_state(self, state: Any, caller: str) -> None:
        """Raises a ValueError where the arrays of a state are not those this observer keeps."""
        shape = (
            state.seen.nan.low.shape
            if isinstance(getattr(state, "seen", None), Seen)
            else ()
        )
        if _described(state) != _described(_blank(self._keeper(), tuple(shape))):
            raise ValueError(
                f"{self.kind}.{caller}: the state is not of {self!r}, but of another kind or other settings. Observe "
                "the data with this one."
            )

    def _keeper(self) -> Observer:
        """An observer whose states are made and merged alike: equal ones share compiled programs."""
        return self

    def _empty(self, shape: tuple[int, ...], x: Any) -> Any:
        seen = Seen(*(_numbers.no_count(shape) for _ in range(3)))
        return _numbers.varying_like(self._init(seen, shape), x)

    def _check(self, fmt: Format, symmetric: bool) -> None:  # noqa: B027 (most have an answer for every format)
        """Raises if the format is one this observer has no answer for."""

    def _checked(
        self, format: str | Format, symmetric: bool, on_nonfinite: str, caller: str
    ) -> Format:
        fmt = formats.get(format)
        formats.check_choice(
            f"{self.kind}.{caller}: on_nonfinite", on_nonfinite, ON_NONFINITE
        )
        if not isinstance(symmetric, bool):
            raise TypeError(
                f"{self.kind}.{caller}: symmetric must be True or False, got {symmetric!r}."
            )
        self._check(fmt, symmetric)
        return fmt

    def _channels(self, x: Any, caller: str) -> tuple[int, ...]:
        """The shape of the statistics of x."""
        shape, dtype = jnp.shape(x), jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{self.kind}.{caller}: x must be floating point, got {_describe(x)}."
            )
        axes = _as_tuple(self.axis)
        if any(not -len(shape) <= a < len(shape) for a in axes) or len(
            {a % len(shape) for a in axes}
        ) < len(axes):
            raise ValueError(
                f"{self.kind}.{caller}: x has no such axes: axis={self.axis}, x: {_describe(x)}."
            )
        return tuple(shape[a] for a in axes)

    def _mask(self, where: Any, x: Any, caller: str) -> jax.Array | None:
        if where is None:
            return None
        mask, shape = jnp.asarray(where), jnp.shape(x)
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"{self.kind}.{caller}: where must be bool, got {_describe(mask)}."
            )
        try:
            fits = np.broadcast_shapes(mask.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{self.kind}.{caller}: where must broadcast to x, got {_describe(mask)} for x: {_describe(x)}."
            )
        return mask

    def _complain(self, seen: Seen, on_nonfinite: str, caller: str) -> None:
        """Raises what `bounds` says NaN of under jit."""
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(seen)):
            return
        finite, nan, infinite = (
            np.asarray(c.low) + np.asarray(c.high).astype(np.float64) * 2.0**32
            for c in seen
        )
        if on_nonfinite == "raise" and (nan.any() or infinite.any()):
            raise ValueError(
                f"{self.kind}.{caller}: {int(nan.sum())} NaN and {int(infinite.sum())} infinities were observed"
                f"{self._place((nan > 0) | (infinite > 0))}. Pass on_nonfinite='ignore' for the range of the finite "
                "numbers."
            )
        if (finite == 0).any():
            raise ValueError(
                f"{self.kind}.{caller}: no finite number was observed{self._place(finite == 0)}, so there is no range. "
                "Update the state with a batch first."
            )

    def _place(self, bad: np.ndarray) -> str:
        if self.axis is None:
            return ""
        first = [int(i) for i in np.argwhere(bad)[0]]
        return f" in {int(bad.sum())} of {bad.size} channels, the first being {first[0] if len(first) == 1 else first}"

    def _view(
        self, x: jax.Array, where: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Seen]:
        """x as float32 `[*channels, n]`, which of it are to be used, and how many of each kind there are."""
        axes = tuple(a % x.ndim for a in _as_tuple(self.axis))
        order = (*axes, *(a for a in range(x.ndim) if a not in axes))
        shape = tuple(x.shape[a] for a in axes)

        def channels_first(v: jax.Array) -> jax.Array:
            return v.transpose(order).reshape(
                *shape, math.prod(x.shape) // max(math.prod(shape), 1)
            )

        view = channels_first(x.astype(jnp.float32))
        pattern = _numbers.magnitude_pattern(view)
        finite, nan = pattern < _numbers.INFINITY, pattern > _numbers.INFINITY
        infinite = pattern == _numbers.INFINITY
        if where is not None:
            mask = channels_first(_broadcast(where, x.shape))
            finite, nan, infinite = finite & mask, nan & mask, infinite & mask
        counts = _numbers.count_true(finite, nan, infinite)
        return view, finite, Seen(*(_numbers.as_count(count) for count in counts))


def enclose(
    low: jax.Array, high: jax.Array, fmt: Format, symmetric: bool
) -> tuple[jax.Array, jax.Array]:
    """The range a format is given for numbers from `low` to `high`: symmetric about 0, or containing it."""
    if symmetric:
        return mirror(_numbers.larger(jnp.abs(low), jnp.abs(high)), fmt)
    zero = jnp.zeros_like(low)
    return _numbers.smaller(low, zero), _numbers.larger(high, zero)


def mirror(threshold: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """(-T, T), or (0, T) for a format without negative numbers."""
    return (-threshold if fmt.min < 0 else jnp.zeros_like(threshold)), threshold


@functools.lru_cache
def _blank(observer: Observer, shape: tuple[int, ...]) -> Any:
    """The state of nothing seen, of `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: observer._empty(shape, np.float32(0)))


def _described(state: Any) -> tuple[Any, list[tuple[tuple[int, ...], np.dtype]]]:
    leaves, structure = jax.tree.flatten(state)
    return structure, [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves]


@functools.partial(jax.jit, static_argnums=0)
def _update(
    observer: Observer, state: Any, x: jax.Array, where: jax.Array | None
) -> Any:
    view, keep, seen = observer._view(x, where)
    total = Seen(*(_numbers.plus(a, b) for a, b in zip(state.seen, seen, strict=True)))
    return observer._update(_numbers.varying_like(state, view), view, keep)._replace(
        seen=total
    )


@functools.partial(jax.jit, static_argnums=0)
def _merge(observer: Observer, a: Any, b: Any) -> Any:
    both = jax.tree.map(lambda u, v: jnp.stack([u, v]), a, b)
    return jax.vmap(
        lambda s: observer.merge_across(s, "merged"), axis_name="merged", out_axes=None
    )(both)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _bounds(
    observer: Observer, fmt: Format, symmetric: bool, on_nonfinite: str, state: Any
):
    return _or_nan(observer._bounds(state, fmt, symmetric), state.seen, on_nonfinite)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _bounds_of(
    observer: Observer,
    fmt: Format,
    symmetric: bool,
    on_nonfinite: str,
    x: jax.Array,
    where: jax.Array | None,
):
    view, keep, seen = observer._view(x, where)
    return *_or_nan(
        observer._bounds_of(view, keep, fmt, symmetric), seen, on_nonfinite
    ), seen


def _or_nan(
    bounds: tuple[jax.Array, jax.Array], seen: Seen, on_nonfinite: str
) -> tuple[jax.Array, jax.Array]:
    bad = _numbers.is_zero(seen.finite)
    if on_nonfinite == "raise":
        bad = bad | ~_numbers.is_zero(seen.nan) | ~_numbers.is_zero(seen.infinite)
    low, high = (jnp.where(bad, np.float32(np.nan), bound) for bound in bounds)
    return low, high


def _broadcast(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(
        mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape), shape
    )


def _as_tuple(axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(x: Any) -> str:
    return f"{jnp.result_type(x).name}[{','.join(map(str, jnp.shape(x)))}]"
