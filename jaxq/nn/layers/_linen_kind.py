"""What jaxq knows about each kind of linen layer: one record per kind, and a registry.

Each kind has its own file (`_linen_dense.py`, `_linen_conv.py`, ...) with its record.
All other code of jaxq reads the record.

An interceptor (`flax.linen.intercept_methods`) sees the calls of layers. It recognises
a call by the function of Flax's own class (`Dense.__call__`, `Embed.attend`, ...). A
subclass that calls its parent's method is therefore recognised too. A lifted layer such
as `nn.vmap(nn.Dense)` is also recognised. Inside the transform, the layer has the
weight of one element.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen

from jaxq.nn.layers._call_inputs import InputRows
from jaxq.nn.layers._roles import Roles

# A method of a layer, for a quantized weight: `method(layer, weight, *args, **kwargs)`.
QuantizedMethod = Callable[..., Any]


def _no_problem(layer: Any, *args: Any, **kwargs: Any) -> str | None:
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class LinenKind:
    """One kind of linen layer.

    Attributes:
      name: the name of the kind in `Rule(kinds=...)` and in reports.
      weight: the name of the parameter that is quantized.
      roles: `roles(layer, shape, *args, **kwargs) -> Roles`, from the layer, the shape
        of its weight and the arguments of its call.
      methods: the functions that replace methods of Flax's class if the weight is a
        QTensor. Keys are functions of Flax such as `linen.Dense.__call__`.
      setups: as `methods`, for methods that only read the weight and compute nothing.
      problem: `problem(layer, *args, **kwargs)` says why a layer cannot be quantized.
        None if it can.
      read_rows: `read_rows(layer, x, *args, **kwargs)` returns the rows
        `[*batch, *free, K]` of the input `x`, and the number of batch axes. None if
        calibration cannot see the layer's input.
      windowed: True for a convolution: windows of the input are multiplied by the
        weight.
      read_patches: `read_patches(layer, x, *args, **kwargs)` returns the patches
        `[groups, *free, K]` of a convolution's input (`conv_patches`). None if
        calibration cannot see which windows the layer reads.
      corrects_bias: True if `Rule(correct_bias=True)` works. The layer must add its
        parameter "bias" to the product, one number for each output feature.
    """

    name: str
    weight: str
    roles: Callable[..., Roles]
    methods: Mapping[Any, QuantizedMethod]
    setups: Mapping[Any, QuantizedMethod] = dataclasses.field(default_factory=dict)
    problem: Callable[..., str | None] = _no_problem
    read_rows: Callable[..., InputRows] | None = None
    windowed: bool = False
    read_patches: Callable[..., Any] | None = None
    corrects_bias: bool = False

    @property
    def watched(self) -> bool:
        """True if calibration can see the layer's input."""
        return self.read_rows is not None


class LayerCall(NamedTuple):
    """A method of a layer that uses its weight.

    Attributes:
      kind: of the layer.
      method: replaces Flax's method if the weight is a QTensor.
    """

    kind: LinenKind
    method: QuantizedMethod


_LINEN_KINDS: list[LinenKind] = []
# The keys are Flax's functions, as an interceptor sees them.
_CALLS_BY_CODE: dict[Any, LayerCall] = {}
_SETUPS_BY_CODE: dict[Any, LayerCall] = {}


def register_linen_layer(kind: LinenKind) -> LinenKind:
    """Registers a kind of linen layer, and returns the kind."""
    _LINEN_KINDS.append(kind)
    for table, methods in (
        (_CALLS_BY_CODE, kind.methods),
        (_SETUPS_BY_CODE, kind.setups),
    ):
        for flax_method, method in methods.items():
            table[code_of(flax_method)] = LayerCall(kind, method)
    return kind


def linen_kinds() -> tuple[LinenKind, ...]:
    """The kinds of linen layers that jaxq knows."""
    return tuple(_LINEN_KINDS)


def find_call(context: linen.module.InterceptorContext) -> LayerCall | None:
    """The intercepted call, if it computes with a layer's weight. None otherwise."""
    return _CALLS_BY_CODE.get(getattr(context.orig_method, "func", None))


def find_setup(context: linen.module.InterceptorContext) -> LayerCall | None:
    """The intercepted call, if it only reads a layer's weight. None otherwise."""
    return _SETUPS_BY_CODE.get(getattr(context.orig_method, "func", None))


def code_of(method: Any) -> Callable[..., Any]:
    """The function of a Flax method without decorators, as an interceptor sees it."""
    return inspect.unwrap(method)


def foreign_function(layer: Any, name: str, plain: Any) -> str | None:
    """Says why a layer with a custom product cannot be quantized. None if it can.

    Args:
      layer: a linen layer.
      name: of the field that holds the product.
      plain: Flax's default for that field.
    """
    for field in (name, f"{name}_cls"):
        function = getattr(layer, field)
        if function is not None and function is not plain:
            return f"its {field} is a custom function, {function!r}"
    return None
