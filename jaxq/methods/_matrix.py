"""What methods ask of their arguments, and how they take stacks of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq import qtensor

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")


def describe(x: Any) -> str:
    """`float32[64,32]`."""
    return f"{x.dtype.name}[{','.join(map(str, x.shape))}]"


def as_weight(w: jax.typing.ArrayLike, caller: str, name: str = "w") -> jax.Array:
    """`w` as an array of floats `[..., in, out]`, finite where that can be known.

    Raises:
      TypeError: no float array.
      ValueError: fewer than two axes, no elements, or a number that is not finite.
    """
    dtype = np.dtype(getattr(w, "dtype", None) or np.asarray(w).dtype)
    if dtype.name not in WEIGHT_DTYPES:
        raise TypeError(
            f"{caller}: {name} must be float32, bfloat16 or float16, got {dtype.name}{list(np.shape(w))}."
        )
    x = jnp.asarray(w)
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"{caller}: {name} must be a matrix [in, out], or a stack of them, got {describe(x)}."
        )
    raise_if_not_finite(x, name, caller)
    return x


def as_statistic(
    x: jax.typing.ArrayLike,
    name: str,
    caller: str,
    *,
    shape: Sequence[int | None],
    said: str,
    w: jax.Array,
) -> jax.Array:
    """`x` as float32 of `shape` (None: any size), with the leading axes of `w` or none; finite where that can be known.

    Raises:
      TypeError: no floats.
      ValueError: another shape, or a number that is not finite.
    """
    dtype = np.dtype(getattr(x, "dtype", None) or np.asarray(x).dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{caller}: {name} must be floats {said}, got {dtype.name}{list(np.shape(x))}."
        )
    array = jnp.asarray(x).astype(jnp.float32)
    lead, core = (
        array.shape[: array.ndim - len(shape)],
        array.shape[array.ndim - len(shape) :],
    )
    fits = len(core) == len(shape) and all(
        b in (None, a) and a > 0 for a, b in zip(core, shape, strict=True)
    )
    if not fits or lead not in ((), w.shape[:-2]):
        expected = ",".join("any" if n is None else str(n) for n in shape)
        stack = (
            f", or stacked like w, [{','.join(map(str, w.shape[:-2]))},{expected}]"
            if w.ndim > 2
            else ""
        )
        raise ValueError(
            f"{caller}: {name} must be {said}: [{expected}]{stack}; got {describe(array)} (w: {describe(w)})."
        )
    raise_if_not_finite(array, name, caller)
    return array


def raise_if_not_finite(x: jax.Array, name: str, caller: str) -> None:
    """Outside jit, a ValueError that names the first number that is NaN or infinite."""
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
