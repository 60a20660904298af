"""Statistics from a file: dicts of fields become named tuples again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

# Fields that had another name when a file was written.
_RENAMED = {"seen": "totals"}


def as_stats(value: Any, like: Any) -> Any:
    """Converts statistics to named tuples of arrays.

    A file holds each named tuple as a dict of its fields.

    Args:
      value: the statistics of a layer, or a part of them.
      like: the same part of other statistics. The result has the types of `like`.

    Raises:
      ValueError: `value` is not a dict or named tuple, or it has an unknown field.
    """
    if value is None or like is None:
        return value
    if hasattr(like, "_fields"):
        fields = value._asdict() if hasattr(value, "_fields") else value
        if isinstance(fields, Mapping):
            fields = {_RENAMED.get(name, name): fields[name] for name in fields}
        _check_fields(fields, like)
        return type(like)(
            **{
                name: as_stats(fields.get(name), getattr(like, name))
                for name in like._fields
            }
        )
    if isinstance(like, tuple | list):
        parts = zip(value, like, strict=True)
        return type(like)(as_stats(part, like_part) for part, like_part in parts)
    return jnp.asarray(value)


def _check_fields(fields: Any, like: Any) -> None:
    """Raises unless `fields` is a dict whose names are fields of `like`."""
    is_dict = isinstance(fields, Mapping)
    if is_dict and set(fields) <= set(like._fields):
        return
    got = list(fields) if is_dict else type(fields).__name__
    raise ValueError(
        "calibrate: statistics of earlier batches do not fit. "
        f"{type(like).__name__} has the fields {list(like._fields)}, got {got}. "
        "Pass what calibrate returned."
    )
