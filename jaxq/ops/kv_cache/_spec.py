"""How a key-value cache is quantized."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax

from jaxq.qtensor import QuantSpec, as_spec


@dataclasses.dataclass(frozen=True)
class KVCacheSpec:
    """How a cache is quantized; compared by value.

    Args:
      keys: preset name or `QuantSpec`. Its scales are shared along tokens: a channel of a group of tokens has one, or
        several for a granularity of fewer tokens.
      values: preset name or `QuantSpec`, its scales shared along the head; None takes that of the keys.
      group: tokens quantized together, at least 1. None takes 32, and 16 where keys have 2 bits or fewer.
      residual: newest tokens kept in full precision, at least `group`. None takes 32, and 64 for such keys.
      rotation: orthogonal transform along the last axis, a module-level function such as `jaxq.methods.hadamard`. Keys
        and queries both go through it, which leaves scores as they are and spreads outlier channels; None does without.

    Raises:
      ValueError: unknown preset, sizes out of range, or a spec that rounds at random.
      TypeError: neither a name nor a spec, or a rotation that cannot be called.

    Example:
      >>> import jaxq
      >>> spec = jaxq.ops.KVCacheSpec("int4", residual=64)
      >>> spec.values.fmt.name, spec == jaxq.ops.KVCacheSpec("int4", "int4", group=32, residual=64)
      ('int4', True)
      >>> jaxq.ops.KVCacheSpec("int2").group, jaxq.ops.KVCacheSpec("int2").residual
      (16, 64)
    """

    keys: QuantSpec | str
    values: QuantSpec | str | None = None
    group: int = None  # pyright: ignore[reportAssignmentType] # a number from __post_init__ on
    residual: int = None  # pyright: ignore[reportAssignmentType]
    rotation: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self):
        for name in ("keys", "values"):
            given = (
                self.keys
                if name == "values" and self.values is None
                else getattr(self, name)
            )
            spec = as_spec(given, f"KVCacheSpec: {name}")
            if spec.rounding == "stochastic":
                raise ValueError(
                    f"KVCacheSpec: {name} round at random, and nobody passes a key. Use 'nearest_even'."
                )
            object.__setattr__(self, name, spec)
        assert isinstance(self.keys, QuantSpec)
        group, residual = (16, 64) if self.keys.fmt.bits <= 2 else (32, 32)
        given = {
            name: getattr(self, name)
            for name in ("group", "residual")
            if getattr(self, name) is not None
        }
        given = {
            name: whole_number(f"KVCacheSpec: {name}", size)
            for name, size in given.items()
        }
        object.__setattr__(
            self, "group", given.get("group", min(group, given.get("residual", group)))
        )
        object.__setattr__(
            self, "residual", given.get("residual", max(residual, self.group))
        )
        if self.residual < self.group:
            raise ValueError(
                f"KVCacheSpec: residual is {self.residual}, less than group {self.group}: tokens wait there until "
                f"their group is whole. Use residual={self.group}, or a smaller group."
            )
        if self.rotation is not None and not callable(self.rotation):
            raise TypeError(
                f"KVCacheSpec: rotation must be a function such as jaxq.methods.hadamard, got {self.rotation!r}."
            )


def as_kv_cache_spec(spec: str | QuantSpec | KVCacheSpec, caller: str) -> KVCacheSpec:
    """A `KVCacheSpec`, or one with keys and values of a preset or `QuantSpec`."""
    return spec if isinstance(spec, KVCacheSpec) else KVCacheSpec(as_spec(spec, caller))


def whole_number(name: str, size: Any) -> int:
    """`size` as an int of at least 1, else an error about `name`."""
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {size!r}.")
    if operator.index(size) < 1:
        raise ValueError(f"{name} is {size}; it must be at least 1.")
    return operator.index(size)
