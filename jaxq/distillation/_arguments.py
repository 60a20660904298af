"""Checks of numbers that a user passes, such as temperatures and sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.qtensor import is_traced


def number(
    value: Any,
    name: str,
    caller: str,
    is_allowed: Callable[[Any], Any],
    rule: str,
) -> float | jax.Array:
    """A real number, after a check. It may be traced.

    Args:
      value: what the user passed.
      name: the argument, for errors.
      caller: the public function, for errors.
      is_allowed: returns whether a number, or a traced float32 scalar, is in the range.
      rule: the range in words, and the remedy.

    Returns:
      A Python float, or a float32 scalar if `value` is traced. Where the traced number
      is not allowed, it becomes NaN.

    Raises:
      TypeError: the value is not one real number.
      ValueError: the number is not allowed.
    """
    if is_traced(value) and value.ndim == 0:
        traced = value.astype(jnp.float32)
        return jnp.where(is_allowed(traced), traced, jnp.nan)
    is_number = not is_traced(value) and not isinstance(value, str | bytes)
    try:
        converted = float(value) if is_number and np.ndim(value) == 0 else None
    except (TypeError, ValueError):
        converted = None
    if converted is None:
        raise TypeError(f"{caller}: {name} is {_shown(value)}; expected one number.")
    if not is_allowed(converted):
        raise ValueError(f"{caller}: {name} is {value}; {rule}")
    return converted


def is_positive(value: Any) -> Any:
    """Whether a number is positive and finite. It may be traced."""
    return (value > 0) & (value < math.inf)


def whole_number(value: Any, name: str, caller: str, *, least: int = 1) -> int:
    """A Python int, after a check.

    Raises:
      TypeError: the value is not an integer, or it is traced.
      ValueError: the number is below `least`.
    """
    try:
        converted = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"{caller}: {name} is {_shown(value)}; expected an integer."
        ) from error
    if converted < least:
        raise ValueError(
            f"{caller}: {name} is {converted}; it must be at least {least}."
        )
    return converted


def _shown(value: Any) -> str:
    if is_traced(value):
        return f"traced ({value.aval.str_short()})"
    return repr(value)
