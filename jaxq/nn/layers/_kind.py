"""What jaxq knows about a kind of Flax nnx layer: one record per kind, and a registry.

Each kind has its own file (`_nnx_linear.py`, `_nnx_conv.py`, ...) with its record. All
other code of jaxq reads the record. A user adds a kind with `register_layer`.

A quantized layer is the same layer with a QTensor in its weight's Variable and with
jaxq's functions in the layer's own hook attributes (`dot_general`, `einsum_op`, ...).
No class is edited and no JAX function is replaced. Hooks are module-level functions or
frozen dataclasses. `nnx.jit` compares hooks by value, so it does not compile again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from flax import nnx

from jaxq import recipes
from jaxq.nn.layers._call_inputs import InputRows, dot_rows, first_argument
from jaxq.nn.layers._roles import Roles


def _no_problem(layer: Any) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """One kind of nnx layer.

    Attributes:
      name: the name of the kind in `Rule(kinds=...)` and in reports.
      cls: the nnx class. Subclasses count too.
      weight: the attribute that holds the weight, an `nnx.Variable`.
      roles: `roles(layer) -> Roles`, the roles of the weight's axes.
      attach: `attach(layer)` puts functions that take a QTensor into the layer's hooks.
      problem: `problem(layer)` says why a layer cannot be quantized. None if it can.
      hook: the attribute that holds a function which the layer calls with its input,
        usually its product. Calibration puts a probe there. None if calibration cannot
        see the layer's input.
      plain_product: what the layer calls when its hook attribute is None.
      read_input: `read_input(*args, **kwargs)` returns the layer's input. The arguments
        are those of the hook.
      read_rows: `read_rows(*args, **kwargs)` returns the rows `[*batch, *free, K]` of
        the input, and the number of batch axes. The arguments are those of the hook.
      num_channels: `num_channels(layer)` returns the number of input channels of a
        convolution. This number is the size K of a row. None if the layer is not a
        convolution.
      read_patches: `read_patches(*args, **kwargs)` returns the patches
        `[groups, *free, K]` of a convolution's input (`conv_patches`). The arguments
        are those of the hook. The last contracted axis of the weight is that of the
        channels. None if calibration cannot see which windows the layer reads.
      corrects_bias: True if `Rule(correct_bias=True)` works. The layer must add its
        attribute `bias` to the product, one number for each output feature.

    Raises:
      TypeError: a field has another type than the one above.

    Example:
      >>> from flax import nnx
      >>> from jaxq.nn.layers import find_kind
      >>> kind = find_kind(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
      >>> kind.name, kind.weight, kind.hook
      ('Linear', 'kernel', 'dot_general')
    """

    name: str
    cls: type[nnx.Module]
    weight: str
    roles: Callable[[Any], Roles]
    attach: Callable[[Any], None]
    problem: Callable[[Any], str | None] = _no_problem
    hook: str | None = None
    plain_product: Callable[..., Any] | None = None
    read_input: Callable[..., Any] = first_argument
    read_rows: Callable[..., InputRows] = dot_rows
    num_channels: Callable[[Any], int] | None = None
    corrects_bias: bool = False
    read_patches: Callable[..., Any] | None = None

    def __post_init__(self):
        for field in ("name", "weight"):
            text = getattr(self, field)
            if not (isinstance(text, str) and text):
                self._refuse(field, "a non-empty string")
        if not isinstance(self.cls, type):
            self._refuse("cls", "a class of nnx layers")
        for field in ("roles", "attach", "problem", "read_input", "read_rows"):
            if not callable(getattr(self, field)):
                self._refuse(field, "a function")
        for field in ("plain_product", "num_channels", "read_patches"):
            function = getattr(self, field)
            if function is not None and not callable(function):
                self._refuse(field, "a function or None")
        if not isinstance(self.hook, str | None):
            self._refuse("hook", "the name of an attribute or None")
        if not isinstance(self.corrects_bias, bool):
            self._refuse("corrects_bias", "True or False")

    def _refuse(self, field: str, expected: str) -> NoReturn:
        """Raises the TypeError of a field."""
        value = getattr(self, field)
        raise TypeError(
            f"LayerKind {self.name!r}: {field} must be {expected}, got {value!r}."
        )

    @property
    def watched(self) -> bool:
        """True if calibration can see the layer's input."""
        return self.hook is not None

    @property
    def windowed(self) -> bool:
        """True for a convolution: windows of the input are multiplied by the weight."""
        return self.num_channels is not None


_LAYER_KINDS: list[LayerKind] = []
# The names of jaxq's own kinds. `unregister_layer` keeps them.
_OWN_NAMES = ("Linear", "LinearGeneral", "Einsum", "Conv", "ConvTranspose", "Embed")
# The kind names that `register_layer` added to `recipes`.
_ADDED_NAMES: set[str] = set()


def register_layer(kind: LayerKind) -> None:
    """Registers a kind of nnx layer for `quantize_model`, `calibrate` and recipes.

    If a layer belongs to several kinds, the kind that was registered last is used. A
    subclass of a known layer can therefore have its own kind.

    Args:
      kind: the record of the kind.

    Raises:
      TypeError: `kind` is not a `LayerKind`.
      ValueError: another kind has this name.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> class Scale(nnx.Module):
      ...   def __init__(self):
      ...     self.w = nnx.Param(jnp.ones((64, 8)))
      ...     self.product = jnp.matmul
      ...   def __call__(self, x):
      ...     return self.product(x, self.w[...])
      >>> def attach(layer):
      ...   layer.product = jaxq.matmul
      >>> def roles(layer):
      ...   return jaxq.nn.Roles(contracting=(-2,), shape=(64, 8))
      >>> jaxq.nn.register_layer(jaxq.nn.LayerKind("Scale", Scale, "w", roles, attach))
      >>> qmodel, report = jaxq.quantize_model(Scale(), "int8")
      >>> qmodel(jnp.ones((2, 64))).shape, report.rows[0].kind
      ((2, 8), 'Scale')
      >>> jaxq.nn.unregister_layer("Scale")
    """
    if not isinstance(kind, LayerKind):
        raise TypeError(
            f"register_layer: kind must be a jaxq.nn.LayerKind, got {kind!r}."
        )
    if any(other.name == kind.name for other in _LAYER_KINDS):
        raise ValueError(
            f"register_layer: a layer kind {kind.name!r} exists already. "
            "Choose another name, or call unregister_layer first."
        )
    _LAYER_KINDS.append(kind)
    if kind.name not in recipes.kinds():
        recipes.register_kind(kind.name)
        _ADDED_NAMES.add(kind.name)


def unregister_layer(name: str) -> None:
    """Removes a layer kind that `register_layer` added.

    Args:
      name: the name of the kind.

    Raises:
      ValueError: no kind has this name, or it is one of jaxq's own kinds.

    Example:
      >>> import jaxq
      >>> jaxq.nn.unregister_layer("Scale")
      Traceback (most recent call last):
      ValueError: unregister_layer: no layer kind 'Scale'. Known kinds: ...
    """
    names = [kind.name for kind in _LAYER_KINDS]
    if name not in names:
        raise ValueError(
            f"unregister_layer: no layer kind {name!r}. "
            f"Known kinds: {', '.join(names)}."
        )
    if name in _OWN_NAMES:
        raise ValueError(
            f"unregister_layer: {name!r} is one of jaxq's own layer kinds. Pass the "
            "name of a kind that register_layer added."
        )
    del _LAYER_KINDS[names.index(name)]
    if name in _ADDED_NAMES:
        _ADDED_NAMES.remove(name)
        recipes.unregister_kind(name)


def layer_kinds() -> tuple[LayerKind, ...]:
    """The layer kinds that are registered, in the order of registration."""
    return tuple(_LAYER_KINDS)


def find_kind(layer: Any) -> LayerKind | None:
    """The kind of a layer. None if the class of the layer belongs to no kind.

    Example:
      >>> from flax import nnx
      >>> from jaxq.nn.layers import find_kind
      >>> find_kind(nnx.Embed(16, 64, rngs=nnx.Rngs(0))).name
      'Embed'
    """
    for kind in reversed(_LAYER_KINDS):
        if isinstance(layer, kind.cls):
            return kind
    return None


def bare_kind(
    attribute: str, contracting: tuple[int, ...], num_batch: int
) -> LayerKind:
    """The kind "Param": a user-defined module with a weight matrix as an attribute.

    Args:
      attribute: the name of the attribute.
      contracting: the axes that the module contracts, as negative numbers.
      num_batch: the number of leading batch axes.
    """

    def roles(layer: Any) -> Roles:
        shape = tuple(getattr(layer, attribute).get_value().shape)
        return Roles(contracting, shape, num_batch)

    def attach(layer: Any) -> None:
        """Does nothing: `x @ layer.w` and `jaxq.matmul` take a QTensor as it is."""

    return LayerKind("Param", nnx.Module, attribute, roles, attach)


def weight_axes(layer: Any, kind: LayerKind) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The (contracting, batch) axes of a layer's weight.

    The axes of a stack of layers are batch axes, and come first.

    Raises:
      ValueError: the last axes of the weight do not have the shape of one layer.

    Example:
      >>> from flax import nnx
      >>> from jaxq.nn.layers import find_kind, weight_axes
      >>> layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
      >>> weight_axes(layer, find_kind(layer))
      ((-2,), ())
    """
    shape, roles = getattr(layer, kind.weight).get_value().shape, kind.roles(layer)
    num_stacked = len(shape) - len(roles.shape)
    if num_stacked < 0 or tuple(shape[num_stacked:]) != roles.shape:
        raise ValueError(
            f"its {kind.weight} is {list(shape)}, {wrong_stack(shape, roles.shape)}. "
            "Stack layers along axis 0: nnx.vmap(out_axes=0) and nnx.scan(in_axes=0), "
            "or StateAxes with 0 for nnx.Param"
        )
    return roles.contracting, tuple(range(num_stacked + roles.num_batch))


def wrong_stack(shape: Sequence[int], own: Sequence[int]) -> str:
    """What is wrong with the shape of a weight that is no stack along axis 0.

    Args:
      shape: of the weight.
      own: the shape of the weight of one layer.
    """
    for axis in range(1, len(shape)):
        if (*shape[:axis], *shape[axis + 1 :]) == tuple(own):
            return f"a stack along axis {axis}, not along axis 0"
    return f"which is not {list(own)} with stacked axes in front"


def stack_note(layer: Any, kind: LayerKind) -> str:
    """The note of a report on a stack whose sizes also fit a stack axis other than 0.

    Empty if axis 0 is the only axis that fits.
    """
    shape, own = getattr(layer, kind.weight).get_value().shape, kind.roles(layer).shape
    if len(shape) != len(own) + 1:
        return ""
    for axis in range(1, len(shape)):
        if (*shape[:axis], *shape[axis + 1 :]) == own:
            return f"stacked along axis 0; the sizes also fit axis {axis}"
    return ""


def put_weight(layer: Any, kind: LayerKind, variable: Any) -> None:
    """Gives a layer its quantized weight and jaxq's hooks, in place."""
    setattr(layer, kind.weight, variable)
    kind.attach(layer)


def foreign_hook(
    layer: Any, attribute: str, replaceable: tuple[Any, ...]
) -> str | None:
    """Says why a layer with a custom hook cannot be quantized. None if it can.

    Args:
      layer: an nnx layer.
      attribute: the name of the hook.
      replaceable: the functions that jaxq may replace: Flax's default and jaxq's own.
    """
    hook = getattr(layer, attribute)
    if hook in replaceable:
        return None
    return f"its {attribute} is a custom function, {hook!r}"
