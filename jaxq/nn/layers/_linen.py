"""What jaxq knows of each Flax linen layer: the roles of its weight's axes, and how it multiplies a weight of codes.

Layers are met through `flax.linen.intercept_methods`, at the functions of flax's own classes (`Dense.__call__`,
`Embed.attend`, ...), so a subclass that calls its parent's is met as well, and a lifted one (`nn.vmap(nn.Dense)`) where
it has the weight of one element. Dense, DenseGeneral and Conv run their own code, with jaxq's functions where their
fields `dot_general`, `conv_general_dilated` and `promote_dtype` are read; the others have no such fields.

What happens is decided by what is stored: a QTensor is multiplied by its codes, an array as ever. jit caches do not see
interceptors, but they see the variables they are called with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from jax import lax

from jaxq import ops
from jaxq.nn.layers._nnx import (
    PromoteAround,
    Roles,
    conv_general_dilated,
    convolved,
    dot_general,
    einsum_roles,
)
from jaxq.qtensor import QTensor


class LayerKind(NamedTuple):
    """One kind of layer.

    Attributes:
      name: what rules and reports call it.
      weight: name of the parameter that is quantized.
      roles: the weight's axes, from the layer, the weight's shape and what the layer is called with.
      problem: why a given layer cannot be quantized, or None; from the layer and what it is called with.
      watched: whether calibration looks at its inputs.
      windowed: True where windows of the input meet the weight, so that how much of it does is not in the weight.
    """

    name: str
    weight: str
    roles: Callable[..., Roles]
    problem: Callable[..., str | None]
    watched: bool = True
    windowed: bool = False


class Call(NamedTuple):
    """A method of a layer that uses its weight.

    Attributes:
      kind: of the layer.
      product: the method for a weight of codes, `product(layer, weight, *args, **kwargs)`.
    """

    kind: LayerKind
    product: Callable[..., Any]


def find_call(context: linen.module.InterceptorContext) -> Call | None:
    """Which method of a layer jaxq knows is being called, or None."""
    return CALLS.get(getattr(context.orig_method, "func", None))


def use_codes(
    call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
) -> Any:
    """An interceptor: layers whose stored weight is a QTensor multiply its codes, everything else is as it was."""
    return intercepted(stored, call, args, kwargs, context)


def intercepted(
    read: Callable[[linen.Module, str], QTensor | None],
    call: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    context: Any,
) -> Any:
    """What `use_codes` does, with `read(layer, name)` to find the QTensor (None: there is none)."""
    layer = context.module
    if getattr(context.orig_method, "func", None) is _EMBED_SETUP:
        table = read(layer, EMBED.weight)
        if table is None:
            return call(*args, **kwargs)
        layer.embedding = table
        return None
    found = find_call(context)
    weight = None if found is None else read(layer, found.kind.weight)
    if found is None or weight is None:
        return call(*args, **kwargs)
    problem = found.kind.problem(layer, *args, **kwargs)
    if problem is not None:
        raise ValueError(
            f"{'/'.join(layer.path) or type(layer).__name__}: its weight is quantized, but {problem}."
        )
    return found.product(layer, weight, *args, **kwargs)


def stored(layer: linen.Module, name: str) -> QTensor | None:
    """A parameter of a layer, if it is a QTensor."""
    value = layer.get_variable("params", name)
    return value if isinstance(value, QTensor) else None


class StandIn:
    """A layer as its own code sees it: another weight, and jaxq's functions in its fields for functions.

    Args:
      layer: of flax.
      name: of the parameter that holds the weight.
      weight: what to take for it: `weight(init, shape, dtype)`, as the layer asks for its parameter.
    """

    dot_general = staticmethod(dot_general)
    dot_general_cls = None
    conv_general_dilated = staticmethod(conv_general_dilated)
    conv_general_dilated_cls = None

    def __init__(self, layer: linen.Module, name: str, weight: Callable[..., Any]):
        self._layer, self._name, self._weight = layer, name, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def param(self, name: str, init: Callable[..., Any], *args: Any) -> Any:
        return (
            self._weight(init, *args)
            if name == self._name
            else self._layer.param(name, init, *args)
        )

    def promote_dtype(self, *arrays: Any, **kwargs: Any) -> tuple:
        return _promoted(self._layer, *arrays, **kwargs)


def _promoted(layer: Any, *arrays: Any, **kwargs: Any) -> tuple:
    return PromoteAround(lambda arrays, **kw: layer.promote_dtype(*arrays, **kw))(
        arrays, **kwargs
    )


# Products.


def own_code(fn: Callable[..., Any], kind: LayerKind) -> Callable[..., Any]:
    """The product of a layer whose own code, `fn`, reads its functions from fields."""

    def product(layer: Any, weight: QTensor, *args: Any, **kwargs: Any) -> Any:
        return fn(StandIn(layer, kind.weight, lambda *_: weight), *args, **kwargs)

    return product


def einsum(
    layer: Any, weight: Any, inputs: jax.Array, einsum_str: str | None = None
) -> jax.Array:
    """`Einsum.__call__`."""
    text = einsum_text(layer, inputs, einsum_str)
    (left, right), out = text.split("->")[0].split(","), text.split("->")[1]
    size = dict(zip(right, weight.shape, strict=True))
    bias = None
    if layer.use_bias:
        named = [size[c] for c in out if c in size]
        bias = layer.param("bias", layer.bias_init, tuple(named), layer.param_dtype)
    inputs, weight, bias = _promoted(layer, inputs, weight, bias, dtype=layer.dtype)
    y = ops.einsum(
        text,
        inputs,
        weight,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
    )
    if bias is None:
        return y
    dots = "\0" * (inputs.ndim - len(left.replace("...", "")))
    return y + bias.reshape([size.get(c, 1) for c in out.replace("...", dots)])


def einsum_text(layer: Any, inputs: Any, einsum_str: str | None = None) -> str:
    """The subscripts of an Einsum, given to it or to its call."""
    return linen.merge_param("einsum_str", layer.einsum_str, einsum_str).replace(
        " ", ""
    )


def conv_transpose(layer: Any, weight: QTensor, inputs: jax.Array) -> jax.Array:
    """`ConvTranspose.__call__`."""
    bias = (
        layer.param("bias", layer.bias_init, (layer.features,), layer.param_dtype)
        if layer.use_bias
        else None
    )
    x, weight, bias = _promoted(layer, inputs, weight, bias, dtype=layer.dtype)

    def product(x: jax.Array, kernel: jax.Array, accumulate: Any) -> jax.Array:
        return code_of(linen.ConvTranspose.__call__)(
            _Unbiased(layer, kernel, accumulate), x
        )

    return convolved(
        product,
        x,
        weight,
        bias,
        channel=_features_axis(layer),
        dtype=layer.preferred_element_type,
    )


class _Unbiased(StandIn):
    """A ConvTranspose as its own code sees it, to convolve arrays of any dtype with this kernel and without bias."""

    use_bias = False

    def __init__(self, layer: linen.Module, kernel: jax.Array, accumulate: Any):
        super().__init__(layer, CONV_TRANSPOSE.weight, lambda *_: kernel)
        self.preferred_element_type = accumulate

    def promote_dtype(self, *arrays: Any, **kwargs: Any) -> tuple:
        return arrays


def lookup(layer: Any, table: QTensor, inputs: jax.Array) -> jax.Array:
    """`Embed.__call__`: only the rows asked for are decoded."""
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ValueError("Input type must be an integer or unsigned integer.")
    (table,) = _promoted(layer, table, dtype=layer.dtype, inexact=False)
    return ops.take(
        table, jnp.zeros_like(inputs) if layer.num_embeddings == 1 else inputs
    )


def attend(layer: Any, table: QTensor, query: jax.Array) -> jax.Array:
    """`Embed.attend`."""
    query, table = _promoted(layer, query, table, dtype=layer.dtype)
    return ops.dot_general(query, table, (((query.ndim - 1,), (1,)), ((), ())))


# Roles of axes, and what stands against quantizing.


def _dense_roles(
    layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> Roles:
    return Roles((-2,), shape)


def _general_roles(
    layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> Roles:
    num_axes, num_features, num_batch = (
        _length(v) for v in (layer.axis, layer.features, layer.batch_dims)
    )
    return Roles(
        tuple(range(-num_axes - num_features, -num_features)), shape, num_batch
    )


def _length(value: Any) -> int:
    return 1 if isinstance(value, int) else len(tuple(value))


def _einsum_roles(
    layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> Roles:
    return einsum_roles(einsum_text(layer, *args, **kwargs), shape)


def _conv_roles(layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Roles:
    return Roles(tuple(range(-len(shape), -1)), shape)


def _conv_transpose_roles(
    layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> Roles:
    return Roles(
        tuple(a for a in range(-len(shape), 0) if a != _features_axis(layer)), shape
    )


def _features_axis(layer: Any) -> int:
    return -2 if layer.transpose_kernel else -1


def _embed_roles(
    layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> Roles:
    return Roles((-1,), shape)


def _dot_problem(layer: Any, *args: Any, **kwargs: Any) -> str | None:
    return _own_function(layer, "dot_general", lax.dot_general)


def _conv_problem(layer: Any, *args: Any, **kwargs: Any) -> str | None:
    if not layer.shared_weights:
        return "every place has a kernel of its own (ConvLocal), for which jaxq has no product"
    if layer.mask is not None:
        return "its kernel is masked; multiply the mask into the kernel first"
    return _own_function(layer, "conv_general_dilated", lax.conv_general_dilated)


def _conv_transpose_problem(layer: Any, *args: Any, **kwargs: Any) -> str | None:
    return (
        None
        if layer.mask is None
        else "its kernel is masked; multiply the mask into the kernel first"
    )


def _own_function(layer: Any, name: str, plain: Any) -> str | None:
    for field in (name, f"{name}_cls"):
        value = getattr(layer, field)
        if value is not None and value is not plain:
            return f"it has a {field} of its own, {value!r}"
    return None


def _einsum_problem(layer: Any, *args: Any, **kwargs: Any) -> str | None:
    text = einsum_text(layer, *args, **kwargs)
    inputs, arrow, out = text.partition("->")
    if not arrow or inputs.count(",") != 1:
        return f"{text!r} does not say its result, or is not of two operands"
    left, right = inputs.split(",")
    if "..." in right:
        return f"the kernel's axes in {text!r} are not all named"
    if not any(c in left and c not in out for c in right):
        return f"{text!r} contracts no axis of the kernel"
    try:
        ops.einsum_numbers(text, len(left.replace("...", "")), len(right))
    except ValueError as error:
        return str(error)
    return None


def _no_problem(layer: Any, *args: Any, **kwargs: Any) -> str | None:
    return None


DENSE = LayerKind("Dense", "kernel", _dense_roles, _dot_problem)
GENERAL = LayerKind("DenseGeneral", "kernel", _general_roles, _dot_problem)
EINSUM = LayerKind("Einsum", "kernel", _einsum_roles, _einsum_problem)
CONV = LayerKind("Conv", "kernel", _conv_roles, _conv_problem, windowed=True)
CONV_TRANSPOSE = LayerKind(
    "ConvTranspose",
    "kernel",
    _conv_transpose_roles,
    _conv_transpose_problem,
    windowed=True,
)
EMBED = LayerKind("Embed", "embedding", _embed_roles, _no_problem, watched=False)


def code_of(method: Any) -> Callable[..., Any]:
    """The function that flax wraps: what an interceptor is shown."""
    return inspect.unwrap(method)


_EMBED_SETUP = code_of(linen.Embed.setup)
# By the functions of flax's classes.
CALLS: dict[Any, Call] = {
    code_of(linen.Dense.__call__): Call(
        DENSE, own_code(code_of(linen.Dense.__call__), DENSE)
    ),
    code_of(linen.DenseGeneral.__call__): Call(
        GENERAL, own_code(code_of(linen.DenseGeneral.__call__), GENERAL)
    ),
    code_of(linen.Einsum.__call__): Call(EINSUM, einsum),
    code_of(linen.Conv.__call__): Call(
        CONV, own_code(code_of(linen.Conv.__call__), CONV)
    ),  # ConvLocal's too
    code_of(linen.ConvTranspose.__call__): Call(CONV_TRANSPOSE, conv_transpose),
    code_of(linen.Embed.__call__): Call(EMBED, lookup),
    code_of(linen.Embed.attend): Call(EMBED, attend),
}
