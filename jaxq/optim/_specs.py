"""The specs of optimizer states by name."""

from __future__ import annotations

from jaxq.qtensor import PerGroup, QuantSpec, as_spec

# The block size of presets without groups, such as "fp8".
_BLOCK = 256
# Presets for optimizer states only. The unsigned ones are for second moments, and
# `jaxq.quantize` does not take their formats.
_OWN = {
    "dynamic4": QuantSpec("dynamic4", PerGroup(128)),
    "dynamic8": QuantSpec("dynamic8", PerGroup(256)),
    "udynamic8": QuantSpec("udynamic8", PerGroup(256)),
    "ulinear4": QuantSpec("ulinear4", PerGroup(128)),
}


def first_spec(spec: str | QuantSpec, caller: str) -> QuantSpec:
    """The spec of first moments and of leaves that `where=` names.

    Args:
      spec: as in `quantize_state`.
      caller: the public function, for error messages.

    Raises:
      TypeError: `spec` is neither a name nor a `QuantSpec`.
      ValueError: the name is unknown, scales depend on more than one block, or the spec
        cannot represent negative numbers.
    """
    resolved = _checked(spec, "spec", caller)
    if resolved.symmetric and resolved.offset is None and resolved.fmt.min >= 0:
        raise ValueError(
            f"{caller}: spec= has the format {resolved.fmt.name}, which has no "
            "negative numbers, but first moments are negative too. Use a signed format "
            "such as 'dynamic8' for spec=. Unsigned formats are for second=."
        )
    return resolved


def second_spec(
    second: str | QuantSpec | None, first: QuantSpec, caller: str
) -> QuantSpec:
    """The spec of second moments.

    Args:
      second: as in `quantize_state`.
      first: the spec of first moments. If `second` is None, the result depends on it.
      caller: the public function, for error messages.

    Raises:
      TypeError: `second` is not a name, a `QuantSpec` or None.
      ValueError: the name is unknown, or scales depend on more than one block.
    """
    if second is not None:
        return _checked(second, "second", caller)
    if first.fmt.kind == "float" and first.fmt.bits >= 8:
        return first
    return _OWN["udynamic8" if first.fmt.bits > 4 else "ulinear4"]


def _checked(spec: str | QuantSpec, argument: str, caller: str) -> QuantSpec:
    """The spec of a name or `QuantSpec`, after a check. It has `PerGroup`."""
    if isinstance(spec, str):
        name = spec.strip().lower().replace("-", "_")
        resolved = _OWN.get(name) or as_spec(spec, f"{caller}: {argument}")
        if not isinstance(resolved.granularity, PerGroup):
            resolved = resolved.replace(granularity=PerGroup(_BLOCK))
    else:
        resolved = as_spec(spec, f"{caller}: {argument}")
    if not isinstance(resolved.granularity, PerGroup):
        raise ValueError(
            f"{caller}: {argument}= has granularity {resolved.granularity}, but "
            "optimizer states have blocks along the last axis. Use "
            f"spec.replace(granularity=jaxq.PerGroup({_BLOCK}))."
        )
    if isinstance(resolved.scale, QuantSpec) or resolved.offset == "mean":
        raise ValueError(
            f"{caller}: {argument}= has scale={resolved.scale!r} and "
            f"offset={resolved.offset!r}, so a block depends on other blocks. Use a "
            "dtype for scale= and offset=None."
        )
    if resolved.needs_key:
        raise ValueError(
            f"{caller}: {argument}= rounds stochastically, but optimizer states have "
            "no random key. Use rounding='nearest_even'."
        )
    return resolved
