"""Which specs a method cannot serve, known before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxq import formats
from jaxq.qtensor import QuantSpec, as_spec


def why_not(method: str, spec: str | QuantSpec, options: Mapping[str, Any] | None = None) -> str:
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
    if method == "awq" and rule != "mse":
        return f"ranges are clipped by the error of products, which rule={rule!r} does not read. Leave rule='mse'."
    return ""
