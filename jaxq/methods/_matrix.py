"""Checks of the arguments of methods, and a map of a method over stacks of matrices.

A weight is `[in, out]`. A stack of weights has further axes in front. Statistics
describe the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq import qtensor

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")


def dtype_and_shape(x: Any) -> str:
    """The dtype and shape of an array: `float32[64,32]`."""
    return f"{x.dtype.name}[{','.join(map(str, x.shape))}]"


def as_weight(w: jax.typing.ArrayLike, caller: str, name: str = "w") -> jax.Array:
    """Returns `w` as an array of floats `[..., in, out]`, checked.

    Args:
      w: the weight. A list of Python floats becomes float32, as in `quantize`.
      caller: the name that error messages begin with.
      name: the name of the weight in errors.

    Raises:
      TypeError: `w` is not float32, bfloat16 or float16.
      ValueError: `w` has fewer than two axes or no elements, or (outside jit) a number
        is not finite.
    """
    # The dtype is read first, since jnp.asarray turns float64 into float32.
    dtype = np.dtype(getattr(w, "dtype", None) or np.asarray(w).dtype)
    if isinstance(w, list | tuple) and dtype == np.float64:
        # A Python float has no fixed width.
        w, dtype = np.asarray(w, np.float32), np.dtype(np.float32)
    if dtype.name not in WEIGHT_DTYPES:
        raise TypeError(
            f"{caller}: {name} must be float32, bfloat16 or float16, got "
            f"{dtype.name}{list(np.shape(w))}."
        )
    x = jnp.asarray(w)
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"{caller}: {name} must be a matrix [in, out], or a stack of them, got "
            f"{dtype_and_shape(x)}."
        )
    check_finite_outside_jit(x, name, caller)
    return x


def as_statistic(
    x: jax.typing.ArrayLike,
    name: str,
    caller: str,
    *,
    shape: Sequence[int | None],
    meaning: str,
    w: jax.Array,
) -> jax.Array:
    """Returns a statistic of a layer's inputs as a float32 array, checked.

    Args:
      x: the statistic, with the leading axes of `w` or without them.
      name: the name of the statistic in errors.
      caller: the name that error messages begin with.
      shape: the shape for one matrix; None allows any size.
      meaning: the meaning of the statistic, for errors: "inputs [tokens, in]".
      w: the weight `[..., in, out]`.

    Raises:
      TypeError: `x` is not a float array.
      ValueError: `x` has another shape, or (outside jit) a number is not finite.
    """
    dtype = np.dtype(getattr(x, "dtype", None) or np.asarray(x).dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{caller}: {name} must be floats {meaning}, got "
            f"{dtype.name}{list(np.shape(x))}."
        )
    array = jnp.asarray(x).astype(jnp.float32)
    num_leading = array.ndim - len(shape)
    leading, sizes = array.shape[:num_leading], array.shape[num_leading:]
    fits = len(sizes) == len(shape) and all(
        size > 0 and expected in (None, size)
        for size, expected in zip(sizes, shape, strict=True)
    )
    if not fits or leading not in ((), w.shape[:-2]):
        expected = ",".join("any" if n is None else str(n) for n in shape)
        stack = ""
        if w.ndim > 2:
            leading_sizes = ",".join(map(str, w.shape[:-2]))
            stack = f", or stacked like w, [{leading_sizes},{expected}]"
        raise ValueError(
            f"{caller}: {name} must be {meaning}: [{expected}]{stack}; got "
            f"{dtype_and_shape(array)} (w: {dtype_and_shape(w)})."
        )
    check_finite_outside_jit(array, name, caller)
    return array


def check_finite_outside_jit(x: jax.Array, name: str, caller: str) -> None:
    """Raises a ValueError that names the first NaN or infinity; does nothing in jit."""
    if isinstance(x, Tracer):
        return
    qtensor.raise_if_not_finite(x, name, caller, remedy="Clean the array first.")


def over_stack(
    function: Callable[..., Any],
    w: jax.Array,
    *statistics: tuple[jax.Array, int],
    stacked: Sequence[Any] = (),
) -> Any:
    """Calls a function for each matrix of a stack, by `jax.vmap` over the leading axes.

    Args:
      function: `(matrix, *statistics, *stacked)` to a pytree of arrays.
      w: `[..., in, out]`.
      *statistics: pairs of an array and its number of axes for one matrix. An array
        without further axes is shared by all matrices.
      stacked: pytrees whose arrays have the leading axes of `w`.
    """
    statistic_axes = (0 if x.ndim > ndim else None for x, ndim in statistics)
    axes = (0, *statistic_axes, *(0 for _ in stacked))
    for _ in range(w.ndim - 2):
        function = jax.vmap(function, in_axes=axes)
    return function(w, *(x for x, _ in statistics), *stacked)
