"""The registry of methods: their records by name, for recipes and models.

A record is registered here once. Everything else in jaxq asks for it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxq import formats
from jaxq.methods import (
    _adaround,
    _awq,
    _clipping,
    _equalization,
    _gptq,
    _hqq,
    _kmeans,
    _llm_int8,
    _rtn,
    _smoothquant,
)
from jaxq.methods._method import Method
from jaxq.methods._method_options import check_values
from jaxq.qtensor import QuantSpec, as_spec

_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Makes a method known by its name, so that a `Rule` can use it.

    Registering the same record again changes nothing.

    Args:
      method: the record of the method.

    Raises:
      TypeError: `method` is not a `Method`.
      ValueError: another method has this name.

    Example:
      >>> import jaxq
      >>> def solve(w, stats, spec, *, key):
      ...     qt, _ = jaxq.methods.clip(w, spec, max_shrink=0.5)
      ...     return jaxq.methods.Solution(qt)
      >>> jaxq.methods.register(jaxq.methods.Method("half_clip", solve))
      >>> jaxq.Rule("**", weight="int4", method="half_clip").method
      'half_clip'
      >>> jaxq.methods.unregister("half_clip")
    """
    if not isinstance(method, Method):
        raise TypeError(
            f"methods.register: method must be a jaxq.methods.Method, got {method!r}."
        )
    record = _METHODS.get(method.name)
    if record is not None and record is not method:
        raise ValueError(
            f"methods.register: a method {method.name!r} exists already. "
            "Choose another name."
        )
    _METHODS[method.name] = method


def unregister(name: str) -> None:
    """Removes a method that `register` added.

    Args:
      name: the name of the method.

    Raises:
      ValueError: there is no such method, or it is one of jaxq's own methods.

    Example:
      >>> import jaxq
      >>> method = jaxq.methods.Method("plain", solve=None)
      >>> jaxq.methods.register(method)
      >>> jaxq.methods.unregister("plain")
      >>> "plain" in jaxq.methods.names()
      False
    """
    formats.check_choice("methods.unregister: name", name, names())
    if name in _OWN_NAMES:
        raise ValueError(
            f"methods.unregister: {name!r} is one of jaxq's own methods. Pass the name "
            "of a method that methods.register added."
        )
    del _METHODS[name]


def get(name: str) -> Method:
    """Returns the record of a method.

    Args:
      name: one of `names()`.

    Raises:
      ValueError: there is no such method. The message names similar ones.

    Example:
      >>> import jaxq
      >>> sorted(jaxq.methods.get("gptq").options)
      ['act_order', 'block_size', 'damp']
    """
    formats.check_choice("methods.get: name", name, names())
    return _METHODS[name]


def names() -> list[str]:
    """Returns the names of all methods that a `Rule` can use, sorted.

    Example:
      >>> import jaxq
      >>> "gptq" in jaxq.methods.names()
      True
    """
    return sorted(_METHODS)


def why_not(
    method: str, spec: str | QuantSpec, options: Mapping[str, Any] | None = None
) -> str:
    """Returns why a method cannot quantize to a spec; an empty text if it can.

    `solve` raises a ValueError with the same reason.

    Args:
      method: one of `names()`.
      spec: preset name or `QuantSpec`.
      options: keyword arguments of the method.

    Raises:
      ValueError: there is no such method or preset.

    Example:
      >>> import jaxq
      >>> jaxq.methods.why_not("gptq", "nvfp4")
      ''
      >>> jaxq.methods.why_not("hqq", "nvfp4").partition(" and ")[0]
      'scales of this spec are quantized themselves (float8_e4m3fn)'
    """
    formats.check_choice("why_not: method", method, names())
    return _METHODS[method].why_not(as_spec(spec, "why_not"), options or {})


def check_options(caller: str, method: str, options: Mapping[str, Any]) -> None:
    """Checks the options of a method: their names, their values, their combination.

    Args:
      caller: the name that error messages begin with.
      method: one of `names()`.
      options: keyword arguments of the method.

    Raises:
      ValueError: there is no such method, the method has no option of that name, a
        value is out of range, or two options exclude each other.

    Example:
      >>> from jaxq.methods import check_options
      >>> check_options("Rule", "gptq", {"damp": 0.1})
    """
    formats.check_choice(f"{caller}: method", method, names())
    record = _METHODS[method]
    available = record.options
    for name in options:
        if name not in available:
            text = f"unknown option {name!r}. Method {method!r} has no options."
            if available:
                listing = f"{sorted(available)}"
                text = formats.unknown_name("option", name, available, listing)
            raise ValueError(f"{caller}: options: {text}")
    check_values(f"{caller}: options", available, **options)
    problem = "" if record.check is None else record.check(options)
    if problem:
        raise ValueError(f"{caller}: options: {problem}")


for _module in (
    _adaround,
    _awq,
    _clipping,
    _equalization,
    _gptq,
    _hqq,
    _kmeans,
    _llm_int8,
    _rtn,
    _smoothquant,
):
    register(_module.METHOD)

# `unregister` keeps these methods.
_OWN_NAMES = frozenset(_METHODS)
