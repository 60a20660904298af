"""`KVCacheSpec`: how a KV cache is quantized."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax

from jaxq.qtensor import QuantSpec, as_spec


@dataclasses.dataclass(frozen=True)
class KVCacheSpec:
    """How a KV cache is quantized; compared by value.

    Args:
      keys: preset name or `QuantSpec`. Scales are shared along the tokens of a group:
        each channel has one scale, or several scales if the group size of the spec is
        smaller than `group`.
      values: preset name or `QuantSpec`. Scales are shared along the head. None uses
        the spec of the keys.
      group: the number of tokens that are quantized together, at least 1. None uses 32
        (16 for keys of 2 bits or fewer), or `residual` if that is smaller.
      residual: the number of newest tokens that stay in full precision, at least
        `group`. None uses 32 (64 for keys of 2 bits or fewer), or `group` if that is
        larger.
      rotation: orthogonal transform along the last axis, a module-level function such
        as `jaxq.methods.hadamard`. Keys and queries are both rotated, so scores do not
        change. The rotation spreads outlier channels over all channels. None rotates
        nothing.

    Raises:
      ValueError: a preset is unknown, a size is less than 1, `residual` is less than
        `group`, or a spec rounds stochastically.
      TypeError: `keys` or `values` is neither a name nor a `QuantSpec`, a size is not a
        whole number, or `rotation` is not callable.

    Example:
      >>> import jaxq
      >>> spec = jaxq.ops.KVCacheSpec("int4", residual=64)
      >>> spec == jaxq.ops.KVCacheSpec("int4", "int4", group=32, residual=64)
      True
      >>> jaxq.ops.KVCacheSpec("int2").group, jaxq.ops.KVCacheSpec("int2").residual
      (16, 64)
    """

    keys: QuantSpec | str
    values: QuantSpec | str | None = None
    group: int = None  # pyright: ignore[reportAssignmentType] # int after __post_init__
    residual: int = None  # pyright: ignore[reportAssignmentType]
    rotation: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self):
        keys = _deterministic(self.keys, "keys")
        values = keys
        if self.values is not None:
            values = _deterministic(self.values, "values")
        group, residual = _group_and_residual(self.group, self.residual, keys)
        if residual < group:
            raise ValueError(
                f"KVCacheSpec: residual is {residual}, less than group {group}. Tokens "
                "stay in full precision until their group is complete. Use "
                f"residual={group}, or a smaller group."
            )
        if self.rotation is not None and not callable(self.rotation):
            raise TypeError(
                "KVCacheSpec: rotation must be a function such as "
                f"jaxq.methods.hadamard, got {self.rotation!r}."
            )
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "group", group)
        object.__setattr__(self, "residual", residual)


def _deterministic(spec: QuantSpec | str, name: str) -> QuantSpec:
    """The `QuantSpec` of `spec`.

    Raises:
      ValueError: the spec rounds stochastically at any level.
    """
    spec = as_spec(spec, f"KVCacheSpec: {name}")
    if spec.needs_key:
        raise ValueError(
            f"KVCacheSpec: {name} has rounding='stochastic', and append takes no PRNG "
            "key. Use rounding='nearest_even', also for a scale that is a QuantSpec."
        )
    return spec


def _group_and_residual(
    group: int | None, residual: int | None, keys: QuantSpec
) -> tuple[int, int]:
    """Both sizes, with the defaults for None."""
    is_narrow = keys.fmt.bits <= 2
    default_group, default_residual = (16, 64) if is_narrow else (32, 32)
    if group is not None:
        group = whole_number("KVCacheSpec: group", group)
    if residual is not None:
        residual = whole_number("KVCacheSpec: residual", residual)
    if group is None:
        group = default_group if residual is None else min(default_group, residual)
    if residual is None:
        residual = max(default_residual, group)
    return group, residual


def as_kv_cache_spec(spec: str | QuantSpec | KVCacheSpec, caller: str) -> KVCacheSpec:
    """The `KVCacheSpec`. A preset or `QuantSpec` applies to keys and values."""
    return spec if isinstance(spec, KVCacheSpec) else KVCacheSpec(as_spec(spec, caller))


def whole_number(name: str, size: Any) -> int:
    """`size` as an int of at least 1. Error messages start with `name`.

    Raises:
      TypeError: `size` is not a whole number.
      ValueError: `size` is less than 1.
    """
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {size!r}.")
    if operator.index(size) < 1:
        raise ValueError(f"{name} is {size}; it must be at least 1.")
    return operator.index(size)
