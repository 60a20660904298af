"""The boxes of metadata of linen variables, as JSON fields.

A file keeps the boxes of Flax that have names of axes: `nn.Partitioned` and
`nn.LogicallyPartitioned`, and jaxq's `QuantizedBox` around them. The mesh of a box is
not kept. Other boxes, and boxes of weights in training, are written as dicts.
"""

from __future__ import annotations

from typing import Any

from jaxq.qtensor import QTensor, TrainedWeight


def box_fields(box: Any) -> dict[str, Any] | None:
    """Class, names and rules of a box. None if a file cannot keep it."""
    from flax import linen  # lazy: a user without Flax has no boxes

    inner = getattr(box, "box", box)
    if type(inner) not in (linen.Partitioned, linen.LogicallyPartitioned):
        return None
    if isinstance(inner.value, TrainedWeight):
        return None
    names, rules = _as_lists(inner.names), _as_lists(getattr(inner, "rules", None))
    if not _are_axes(names) or not _are_rules(rules):
        return None
    return {"box": type(inner).__name__, "names": names, "rules": rules}


def boxed(value: Any, fields: dict[str, Any]) -> Any:
    """An array or a QTensor in the box that `box_fields` described.

    Raises:
      TypeError: the fields do not describe a box.
    """
    from flax import linen  # lazy: only users of Flax have boxes

    from jaxq.sharding.boxes import QuantizedBox  # it imports Flax

    kind, names, rules = fields["box"], fields["names"], fields["rules"]
    if not _are_axes(names) or not _are_rules(rules):
        raise TypeError(f"the axes of a box are {names!r:.80}")
    if kind == "Partitioned":
        box: Any = linen.Partitioned(value, _as_tuples(names))
    elif kind == "LogicallyPartitioned":
        rules = _as_tuples(rules)
        box = linen.LogicallyPartitioned(value, _as_tuples(names), rules=rules)
    else:
        raise TypeError(f"a box is described as {kind!r:.80}")
    return QuantizedBox(box) if isinstance(value, QTensor) else box


def name_of_value(is_qtensor: bool) -> str:
    """The path from a box to its value."""
    return "box/value" if is_qtensor else "value"


def _as_lists(axes: Any) -> Any:
    """Nested tuples as lists, which JSON has."""
    is_sequence = isinstance(axes, tuple | list)
    return [_as_lists(entry) for entry in axes] if is_sequence else axes


def _as_tuples(axes: Any) -> Any:
    if not isinstance(axes, list):
        return axes
    return tuple(_as_tuples(entry) for entry in axes)


def _are_axes(names: Any) -> bool:
    """Whether this is a list with None, a name or a list of names for each axis."""
    if not isinstance(names, list):
        return False
    flat: list[Any] = []
    for name in names:
        flat += name if isinstance(name, list) else [name]
    return all(name is None or isinstance(name, str) for name in flat)


def _are_rules(rules: Any) -> bool:
    """Whether this is None, or pairs of a logical axis and mesh axes."""
    if rules is None:
        return True
    is_list = isinstance(rules, list)
    return is_list and all(_are_axes(rule) and len(rule) == 2 for rule in rules)
