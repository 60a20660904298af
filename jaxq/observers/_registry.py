"""Observers by the name of their factory."""

from __future__ import annotations

from typing import Any

from jaxq.formats import unknown_name
from jaxq.observers._entropy import Entropy
from jaxq.observers._histogram import Histogram
from jaxq.observers._mse import MeanSquaredError
from jaxq.observers._observer import Observer
from jaxq.observers._percentile import Percentile
from jaxq.observers._range import AbsMax, MinMax, MovingAverage

_CLASSES: tuple[type[Observer], ...] = (
    AbsMax,
    Entropy,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
)
_KINDS: dict[str, type[Observer]] = {cls.kind: cls for cls in _CLASSES}


def names() -> list[str]:
    """The kinds of observers, in alphabetical order.

    Example:
      >>> import jaxq
      >>> jaxq.observers.names()[:3]
      ['absmax', 'entropy', 'histogram']
    """
    return sorted(_KINDS)


def from_dict(data: dict[str, Any]) -> Observer:
    """The observer that a dict from `to_dict` describes.

    Args:
      data: the result of `to_dict`, before or after a round trip through JSON.

    Raises:
      ValueError: the kind or a field is unknown.

    Example:
      >>> import jaxq
      >>> obs = jaxq.observers.percentile(99.9, axis=-1)
      >>> jaxq.observers.from_dict(obs.to_dict()) == obs
      True
    """
    fields = dict(data)
    kind = fields.pop("type", "")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(
            "observers.from_dict: "
            + unknown_name("kind", kind, _KINDS, "jaxq.observers.names()")
        )
    try:
        return _KINDS[kind](**fields)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"observers.from_dict: {error}") from None
