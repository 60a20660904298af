"""Checks that methods share: the values of options, and specs that methods refuse.

A method's record names its options with these checks. The method's function uses the
same checks, so a `Rule` and a direct call refuse the same values.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from jaxq.methods._method import Option
from jaxq.qtensor import QuantSpec

_INF = float("inf")


def number(
    expected: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> Option:
    """An option whose values are numbers in an interval. NaN is never valid.

    Args:
      expected: what a valid value is, in words.
      least: the least valid number.
      above: valid numbers are greater than this.
      most: the greatest valid number.
      below: valid numbers are less than this.
      whole: only whole numbers are valid.
    """
    kind: Any = numbers.Integral if whole else numbers.Real

    def accepts(value: Any) -> bool:
        is_scalar_array = getattr(value, "ndim", None) == 0
        if isinstance(value, bool) or not (isinstance(value, kind) or is_scalar_array):
            return False
        # Every comparison must hold: a comparison with NaN never does.
        return bool(
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        )

    return Option(accepts, expected)


def choice(*names: str) -> Option:
    """An option whose value is one of a few names."""
    return Option(lambda value: value in names, f"one of {', '.join(names)}")


COUNT = number("a whole number of at least 1", least=1, whole=True)
FLAG = Option(lambda value: isinstance(value, bool), "True or False")
NOT_NEGATIVE = number("a whole number, not negative", least=0, whole=True)
POSITIVE = number("a positive number", above=0, below=_INF)
SHARE = number("0 to 1", least=0, most=1)


def check_values(caller: str, options: Mapping[str, Option], **values: Any) -> None:
    """Raises a ValueError if a value is invalid for every weight.

    Args:
      caller: the name that error messages begin with.
      options: the options with their checks.
      **values: the value of each option, by the option's name.
    """
    for name, value in values.items():
        option = options[name]
        if not option.accepts(value):
            raise ValueError(
                f"{caller}: {name} must be {option.expected}, got {value!r}."
            )


def why_not_stochastic(spec: QuantSpec, options: Mapping[str, Any]) -> str:
    """Why a method that rounds to nearest cannot quantize to a spec; empty if it can.

    It has the signature of `Method.why_not`, for methods that refuse nothing else.
    """
    if spec.needs_key:
        return (
            "methods round to nearest, so rounding='stochastic' is not possible. "
            "Pass spec.replace(rounding='nearest_even')."
        )
    return ""


def refuse(caller: str, reason: str) -> None:
    """Raises a ValueError with the reason, unless the reason is empty."""
    if reason:
        raise ValueError(f"{caller}: {reason}")
