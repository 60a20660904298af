"""The arrays and settings of one weight, with checks whose errors name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.debug_checks import allow_nonfinite
from jaxq.formats import unknown_name
from jaxq.qtensor import is_traced


class WeightTensors:
    """The arrays of one weight.

    Args:
      layout: the name of the layout, which error messages begin with.
      tensors: arrays by name.
      known: the names that the layout has.
      static: the names of arrays that are read while a program is traced.
    """

    def __init__(
        self,
        layout: str,
        tensors: Mapping[str, Any],
        known: Sequence[str],
        static: Sequence[str] = (),
    ):
        self.layout = layout
        self._tensors = dict(tensors)
        self._known, self._static = known, static
        for name, array in self._tensors.items():
            if name not in known:
                listing = f"jaxq.io.layouts.get({layout!r}).tensors"
                message = unknown_name("array", str(name), known, listing)
                raise ValueError(f"{layout}: {message}")
            if not hasattr(array, "dtype") or not hasattr(array, "shape"):
                raise self.problem(
                    name, f"is {type(array).__name__}, expected a numpy or jax array"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def problem(self, name: str, text: str) -> ValueError:
        """The error that says what is wrong with an array."""
        return ValueError(f"{self.layout}: {name} {text}.")

    def raw(self, name: str) -> Any:
        """An array as it was given."""
        if name not in self._tensors:
            given = ", ".join(sorted(self._tensors)) or "none"
            raise ValueError(
                f"{self.layout}: the array {name} is missing; got {given}."
            )
        return self._tensors[name]

    def shape(self, name: str, ndim: int, *, has_batch: bool = False) -> tuple:
        """The shape of an array, after a check that no size is 0.

        Args:
          name: of the array.
          ndim: the number of axes.
          has_batch: whether further axes may come before these.
        """
        shape = tuple(self.raw(name).shape)
        right = len(shape) == ndim or (has_batch and len(shape) > ndim)
        if not right or 0 in shape:
            axes = f"{ndim} {'or more ' if has_batch else ''}axes"
            raise self.problem(
                name, f"has shape {list(shape)}, expected {axes} above 0"
            )
        return shape

    def array(
        self, name: str, dtypes: str | Sequence[str], shape: Sequence[int]
    ) -> jax.Array:
        """An array with a known shape and dtype.

        Args:
          name: of the array.
          dtypes: the names of the dtypes that it may have.
          shape: the shape that it must have.
        """
        array = self.raw(name)
        dtypes = (dtypes,) if isinstance(dtypes, str) else dtypes
        dtype = np.dtype(array.dtype).name
        if dtype not in dtypes or tuple(array.shape) != tuple(shape):
            expected = f"{' or '.join(dtypes)}{list(shape)}"
            raise self.problem(
                name, f"is {dtype}{list(array.shape)}, expected {expected}"
            )
        return jnp.asarray(array)

    def scale(
        self, name: str, dtypes: str | Sequence[str], shape: Sequence[int]
    ) -> jax.Array:
        """An array of scales: as `array`, and (outside jit) all numbers are finite."""
        array = self.array(name, dtypes, shape)
        self.check_finite(name, array)
        return array

    def check_finite(self, name: str, values: jax.Array) -> None:
        """Raises if a number is not finite. Under jit nothing is checked."""
        if is_traced(values):
            return
        with allow_nonfinite():
            finite = np.isfinite(np.asarray(values).astype(np.float32))
        if not finite.all():
            first = np.unravel_index(int(np.argmin(finite)), finite.shape)
            index = [int(i) for i in first]
            raise self.problem(
                name,
                f"has a number that is not finite at {index}. The file is damaged",
            )

    def constant(self, name: str) -> np.ndarray:
        """An array whose numbers are read now, also under jit."""
        array = self.raw(name)
        if is_traced(array):
            raise self.problem(
                name,
                "is traced, but its numbers decide shapes or tables. Keep it outside "
                "jit as a numpy array",
            )
        return np.asarray(array)


_LARGEST = float(np.finfo(np.float32).max)


class Settings:
    """The settings of one weight, with checks.

    Args:
      layout: the name of the layout, which error messages begin with.
      values: settings by name. Settings that a layout does not read are ignored.
    """

    def __init__(self, layout: str, values: Mapping[str, Any]):
        if not isinstance(values, Mapping):
            raise ValueError(f"{layout}: config must be a dict, got {values!r:.80}.")
        self.layout, self.values = layout, values

    def problem(self, name: str, text: str) -> ValueError:
        """The error that says what is wrong with a setting."""
        return ValueError(f"{self.layout}: the setting {name} {text}.")

    def choice(self, name: str, allowed: Sequence[Any], default: Any = None) -> Any:
        """A setting with one of several values. A default of None is no default."""
        value = self.values.get(name)
        value = default if value is None else value
        same_type = any(type(value) is type(item) for item in allowed)
        if not same_type or value not in allowed:
            listed = ", ".join(repr(item) for item in allowed)
            raise self.problem(name, f"must be one of {listed}; got {value!r:.80}")
        return value

    def optional_size(self, name: str) -> int | None:
        """A whole number above 0; None if it is missing or -1."""
        value = self.values.get(name)
        if value is None or (type(value) is int and value == -1):
            return None
        # A larger number would overflow the integers of numpy.
        if type(value) is not int or not 0 < value < 2**31:
            raise self.problem(
                name,
                "must be a whole number above 0 and below 2^31, or -1; got "
                f"{value!r:.80}",
            )
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above 0. A default of None is no default."""
        value = self.optional_size(name)
        value = default if value is None else value
        if value is None:
            raise self.problem(name, "is missing, expected a whole number above 0")
        return value

    def pair(
        self, name: str, default: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """A setting of two sizes above 0."""
        value = self.values.get(name, default)
        if isinstance(value, list | tuple) and len(value) == 2:
            first, second = value
            are_sizes = type(first) is int and type(second) is int
            if are_sizes and first > 0 and second > 0:
                return first, second
        raise self.problem(name, f"must be two sizes above 0, got {value!r:.80}")

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.values.get(name)
        problem = self.problem(name, f"must be a finite number, got {value!r:.80}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise problem
        if not abs(value) <= _LARGEST:  # also for NaN
            raise problem
        return float(value)

    def inner(self, name: str) -> Settings:
        """The settings inside a setting."""
        value = self.values.get(name)
        if not isinstance(value, Mapping):
            raise self.problem(name, f"must be a dict, got {value!r:.80}")
        return Settings(f"{self.layout}: {name}", value)
