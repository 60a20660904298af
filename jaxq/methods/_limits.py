"""Which specs a method cannot serve, known before any weight is read."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxq import formats
from jaxq.qtensor import Granularity, QuantSpec, as_spec

INF = float("inf")


def _is_number(
    least: float, most: float, *, open_ends: str = "", whole: bool = False
) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        kind: Any = numbers.Integral if whole else numbers.Real
        if isinstance(value, bool) or not (
            isinstance(value, kind) or getattr(value, "ndim", None) == 0
        ):
            return False
        inside = (
            least < value if "(" in open_ends else least <= value
        ) and value <= most
        return bool(
            inside and (value < most or ")" not in open_ends)
        )  # NaN is nowhere inside

    return fits


def _is_count(value: Any) -> bool:
    return _is_number(1, INF, whole=True)(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_COUNT, _FLAG = (_is_count, "a whole number of at least 1"), (_is_bool, "True or False")
_SHARE = (_is_number(0, 1), "0 to 1")
_POSITIVE = (_is_number(0, INF, open_ends="()"), "a positive number")
_NOT_NEGATIVE = (_is_number(0, INF, whole=True), "a whole number, not negative")
# What options of methods can be, where it does not depend on the weight: (a check, what it asks for).
NUMBERS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "adaround": {
        "num_steps": _COUNT,
        "batch_size": _COUNT,
        "learning_rate": _POSITIVE,
        "regularization": (_is_number(0, INF, open_ends=")"), "a number, not negative"),
        "warm_start": _SHARE,
        "beta": (
            lambda v: (
                isinstance(v, tuple | list)
                and len(v) == 2
                and all(map(_POSITIVE[0], v))
            ),
            "two positive numbers, at first and in the end",
        ),
    },
    "awq": {
        "duo": _FLAG,
        "num": _COUNT,
        "max_tokens": _COUNT,
        "clip_num": _COUNT,
        "clip_max_shrink": _SHARE,
    },
    "clip": {
        "rule": (
            lambda v: v in ("entropy", "mse", "percentile"),
            "one of entropy, mse, percentile",
        ),
        "power": _POSITIVE,
        "num": _COUNT,
        "max_shrink": _SHARE,
        "percentile": (_is_number(0, 100), "0 to 100"),
        "bins": _COUNT,
        "inputs": _FLAG,
    },
    "equalize": {"power_of_two": _FLAG},
    "gptq": {
        "act_order": _FLAG,
        "damp": (_is_number(0, 1), "a share of the diagonal's mean, 0 to 1"),
        "block_size": _COUNT,
    },
    "hqq": {
        "norm": (_is_number(0, 1, open_ends="()"), "above 0 and below 1"),
        "beta": _POSITIVE,
        "kappa": _POSITIVE,
        "num_steps": _NOT_NEGATIVE,
    },
    "kmeans": {
        "granularity": (
            lambda v: isinstance(v, Granularity),
            "a granularity, jaxq.PerChannel() for example",
        ),
        "init": (lambda v: v in ("density", "linear"), "one of density, linear"),
        "num_steps": _NOT_NEGATIVE,
        "algorithm": (
            lambda v: v in ("auto", "exact", "histogram"),
            "one of auto, exact, histogram",
        ),
    },
    "llm_int8": {"threshold": (_is_number(0, INF), "at least 0")},
    "smoothquant": {"alpha": _SHARE},
}


# What each rule of clipping reads.
CLIPPING = {
    "entropy": ("bins",),
    "mse": ("power", "num", "max_shrink", "inputs"),
    "percentile": ("percentile",),
}


def check_clipping(caller: str, options: Mapping[str, Any]) -> None:
    """Raises a ValueError for an option of `clip` that its rule does not read; None is no option."""
    rule = options.get("rule", "mse")
    for name, value in options.items():
        owner = next(
            (owner for owner, names in CLIPPING.items() if name in names), rule
        )
        if value not in (None, False) and owner != rule:
            raise ValueError(
                f"{caller}: {name}={value!r} is of rule={owner!r}, and rule={rule!r} does not read it."
            )


def check_numbers(caller: str, method: str = "", /, **options: Any) -> None:
    """Raises a ValueError for an option that no weight could make right.

    Args:
      caller: what errors begin with.
      method: whose options they are; the caller's, if empty.
      **options: by name.
    """
    for name, value in options.items():
        fits, said = NUMBERS.get(method or caller, {}).get(name, (None, ""))
        if fits is not None and not fits(value):
            raise ValueError(f"{caller}: {name} must be {said}, got {value!r}.")


def why_not(
    method: str, spec: str | QuantSpec, options: Mapping[str, Any] | None = None
) -> str:
    """Why a method cannot quantize to a spec, as it would say itself; empty if it can.

    Args:
      method: one of `jaxq.methods.names()`.
      spec: preset name or `QuantSpec`.
      options: keyword arguments of the method.

    Raises:
      ValueError: an unknown method or preset.

    Example:
      >>> import jaxq
      >>> jaxq.methods.why_not("gptq", "nvfp4")
      ''
      >>> jaxq.methods.why_not("hqq", "nvfp4").partition(" and ")[0]
      'scales of this spec are quantized themselves (float8_e4m3fn)'
    """
    from jaxq.methods._solve import names  # which imports the methods, and those this

    formats.check_choice("why_not: method", method, names())
    return problem(method, as_spec(spec, "why_not"), options or {})


def refuse(method: str, spec: QuantSpec, **options: Any) -> None:
    """Raises a ValueError where `why_not` has an answer."""
    if why := problem(method, spec, options):
        raise ValueError(f"{method}: {why}")


def problem(method: str, spec: QuantSpec, options: Mapping[str, Any]) -> str:
    rule = options.get("rule", "mse")
    if method == "kmeans":  # takes nothing from the spec but how many bits codes have
        return ""
    if spec.rounding == "stochastic":
        return "rounding='stochastic' needs a key, and methods round to nearest. Change spec.rounding."
    if method == "adaround" and spec.scale_rule in ("ttq", "twn"):
        return f"scale_rule={spec.scale_rule!r} has no two neighbours to choose from. Use another scale rule."
    if method == "hqq" and isinstance(spec.scale, QuantSpec) and spec.offset != "min":
        return (
            f"scales of this spec are quantized themselves ({spec.scale.fmt.name}) and cannot be moved one by one. Use "
            "a spec with scale='float32', 'bfloat16' or 'float16', or with offset='min'."
        )
    if method == "clip" and rule == "entropy" and spec.offset == "min":
        return "rule='entropy' counts magnitudes, which offset='min' does not start from; use 'mse'."
    if (
        method == "clip"
        and rule == "entropy"
        and np.ptp(np.diff(np.unique(spec.fmt.values()))) > 0
    ):
        return f"rule='entropy' counts even steps, which the numbers of {spec.fmt.name} are not; use 'mse'."
    if method == "awq" and rule != "mse":
        return f"ranges are clipped by the error of products, which rule={rule!r} does not read. Leave rule='mse'."
    if (
        method == "clip"
        and options.get("inputs", False)
        and (rule != "mse" or options.get("power", 2.0) != 2.0)
    ):
        return "inputs=True weighs the squared error of products, which rule='mse' with power=2 minimises; leave those."
    return ""
