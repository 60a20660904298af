"""What jaxq knows of each Flax nnx layer: the roles of its weight's axes, and the public hook its product goes through.

A quantized layer is the same layer with a QTensor in its weight's Variable and jaxq's functions in its own hook
attributes (`dot_general`, `einsum_op`, `conv_general_dilated`, `promote_dtype`). No class is edited, no jax function is
replaced. Hooks are module-level functions or frozen dataclasses, compared by value, so that `nnx.jit` does not retrace.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxq import ops, sharding
from jaxq.ops import (
    dot_general,
    einsum,
)  # hooks of Linear and LinearGeneral, and of Einsum, as they are
from jaxq.qtensor import QTensor, quantize


class QuantizedParam(nnx.Variable):
    """A weight held as a QTensor. Not an `nnx.Param`: optimizers and `nnx.grad` over Params leave it alone."""

    def __jax_array__(self) -> Any:
        value = self.get_value()
        asked = getattr(
            value, "__jax_array__", None
        )  # a QTensor's is what raises where an array is wanted
        return value if asked is None else asked()


@dataclasses.dataclass(frozen=True)
class Roles:
    """The axes of a layer's weight.

    Attributes:
      contracting: negative axes the layer's product contracts.
      shape: sizes without stacked leading axes.
      num_batch: how many leading ones of them are batch axes of the product.
      subscripts: of the einsum that the product is, the weight on its right; empty where it is none.
    """

    contracting: tuple[int, ...]
    shape: tuple[int, ...]
    num_batch: int = 0
    subscripts: str = ""


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """One kind of layer.

    Attributes:
      name: what rules and reports call it.
      cls: the nnx class; subclasses count too.
      weight: attribute that holds the weight.
      roles: the weight's axes, from the layer.
      attach: puts jaxq's hooks into a layer.
      problem: why a given layer cannot be quantized, or None.
      hook: the attribute its product goes through, which calibration watches; None where there is none.
      windowed: True where windows of the input meet the weight, so that how much of it does is not in the weight.
    """

    name: str
    cls: type[nnx.Module]
    weight: str
    roles: Callable[[Any], Roles]
    attach: Callable[[Any], None]
    problem: Callable[[Any], str | None]
    hook: str | None = None
    windowed: bool = False

    @property
    def watched(self) -> bool:
        """Whether calibration looks at its inputs."""
        return self.hook is not None


def find_kind(layer: Any) -> LayerKind | None:
    """The kind of a layer, or None for a module that holds no weight jaxq knows."""
    return next((kind for kind in KINDS if isinstance(layer, kind.cls)), None)


def weight_axes(layer: Any, kind: LayerKind) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(contracting, batch) axes of a layer's weight; stacked layers lead.

    Raises:
      ValueError: the weight's shape is not the layer's with leading stacked axes.
    """
    shape, roles = getattr(layer, kind.weight).get_value().shape, kind.roles(layer)
    stacked = len(shape) - len(roles.shape)
    if stacked < 0 or tuple(shape[stacked:]) != roles.shape:
        raise ValueError(
            f"its {kind.weight} is {list(shape)}, which is not {list(roles.shape)} with stacked axes in front. "
            "Stack layers along axis 0 (nnx.vmap out_axes=0)."
        )
    return roles.contracting, tuple(range(stacked + roles.num_batch))


def stack_note(layer: Any, kind: LayerKind) -> str:
    """What a report says of a stack that could be stacked along another axis as well; else empty."""
    shape, own = getattr(layer, kind.weight).get_value().shape, kind.roles(layer).shape
    others = [
        i
        for i in range(1, len(shape))
        if len(shape) == len(own) + 1 and (*shape[:i], *shape[i + 1 :]) == own
    ]
    return (
        f"taken as stacked along axis 0; sizes would fit axis {others[0]} too"
        if others
        else ""
    )


def bare_kind(name: str, contracting: tuple[int, ...], num_batch: int) -> LayerKind:
    """The kind of a module that holds a matrix of its own as the attribute `name`: "Param"."""

    def roles(layer: Any) -> Roles:
        return Roles(
            contracting, tuple(getattr(layer, name).get_value().shape), num_batch
        )

    return LayerKind(
        "Param", nnx.Module, name, roles, lambda layer: None, lambda layer: None
    )


def put_weight(layer: Any, kind: LayerKind, variable: QuantizedParam) -> None:
    """Gives a layer its quantized weight and jaxq's hooks."""
    setattr(layer, kind.weight, variable)
    kind.attach(layer)


def replace_variables(model: nnx.Module, replaced: dict[int, QuantizedParam]) -> None:
    """Puts new variables where else a model holds the old ones, so that what was shared stays shared.

    Args:
      model: changed in place; its layers have the new variables already.
      replaced: new variables by the identity of the old ones, which must still be alive.

    Raises:
      ValueError: an old one is held where no attribute can be set, in a tuple for example.
    """
    for _, node in list(nnx.iter_graph(model)):
        if isinstance(node, nnx.Pytree):
            for name, value in list(vars(node).items()):
                if id(value) in replaced:
                    setattr(node, name, replaced[id(value)])
    left = [
        "/".join(map(str, path))
        for path, node in nnx.iter_graph(model)
        if id(node) in replaced
    ]
    if left:
        raise ValueError(
            f"A quantized weight is also held as {', '.join(left)}, in a container that cannot be changed. "
            "Use nnx.List or an attribute, or skip the layer."
        )


def quantize_own_weight(layer: Any, weight: Any, activation: Any) -> None:
    """Turns a freshly initialized layer into a quantized one, in place.

    Args:
      layer: an nnx layer of a kind jaxq knows.
      weight: preset name or `QuantSpec`; None keeps the float weight, with float32 accumulation.
      activation: preset name or `QuantSpec` for the input; None leaves it in floats.
    """
    kind = find_kind(layer)
    assert kind is not None
    if weight is None:
        if activation is not None:
            raise ValueError(
                f"{type(layer).__name__}: activation={activation!r} needs a quantized weight=."
            )
        if kind.name != "Embed":
            kind.attach(layer)
        return
    if getattr(layer, "mask", None) is not None:
        raise ValueError(
            f"{type(layer).__name__}: mask= needs weight=None; a quantized kernel has no mask."
        )
    contracting, batch = weight_axes(layer, kind)
    floats = getattr(layer, kind.weight)[...]
    qt = quantize(
        floats, weight, contracting=contracting, batch=batch, name=kind.weight
    )
    put_weight(layer, kind, QuantizedParam(qt.with_activation(activation)))


# Hooks.


@dataclasses.dataclass(frozen=True)
class PromoteAround:
    """A layer's `promote_dtype` for a weight that is a QTensor: a scalar of its dtype stands in for it."""

    original: Callable[..., Any]

    def __call__(self, arrays: tuple, **kwargs: Any) -> tuple:
        stand_ins = tuple(
            jnp.zeros((), a.dtype) if isinstance(a, QTensor) else a for a in arrays
        )
        promoted = self.original(stand_ins, **kwargs)
        return tuple(
            a.astype(p.dtype) if isinstance(a, QTensor) else p
            for a, p in zip(arrays, promoted, strict=True)
        )


def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    window_strides: Any,
    padding: Any,
    *,
    out_sharding: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """The `conv_general_dilated` hook of Conv."""
    if not isinstance(rhs, QTensor):
        wide = kwargs.pop("preferred_element_type", None) or jnp.result_type(lhs, rhs)
        kwargs |= {"preferred_element_type": jnp.float32, "out_sharding": out_sharding}
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, **kwargs
        ).astype(wide)
    return sharding.lay_out(
        ops.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs),
        out_sharding,
    )


def convolved(
    product: Callable[..., jax.Array],
    x: jax.Array,
    kernel: QTensor,
    bias: jax.Array | None,
    *,
    channel: int,
    dtype: Any,
) -> jax.Array:
    """A convolution of examples `[*leading, *places, channels]`, with bias.

    Args:
      product: as in `ops.convolve`, of examples `[n, *places, channels]`.
      x: examples.
      kernel: quantized, of as many axes as there are places, and two.
      bias: `[features]`, or None.
      channel: the axis of `kernel` that is the result's features.
      dtype: of the result; None takes that of x.
    """
    first = x.ndim - (kernel.ndim - 1)
    y = ops.convolve(product, x.reshape(-1, *x.shape[first:]), kernel, channel=channel)
    y = y.astype(dtype or x.dtype).reshape(*x.shape[:first], *y.shape[1:])
    return (
        y
        if bias is None
        else y + bias.reshape((1,) * (y.ndim - 1) + (-1,)).astype(y.dtype)
    )


# Kinds.


def _linear_roles(layer: Any) -> Roles:
    return Roles((-2,), (layer.in_features, layer.out_features))


def _general_roles(layer: Any) -> Roles:
    num_in, num_out, batch = (
        len(layer.in_features),
        len(layer.out_features),
        tuple(layer.batch_axis.values()),
    )
    contracting = tuple(range(-num_in - num_out, -num_out))
    return Roles(
        contracting, (*batch, *layer.in_features, *layer.out_features), len(batch)
    )


def _einsum_roles(layer: Any) -> Roles:
    return einsum_roles(layer.einsum_str, tuple(layer.kernel_shape))


def einsum_roles(subscripts: str, shape: tuple[int, ...]) -> Roles:
    """The axes of an einsum's right operand, of this shape."""
    subscripts = subscripts.replace(" ", "")
    inputs, out = subscripts.split("->")
    left, right = inputs.split(",")
    summed = tuple(
        i - len(right)
        for i, index in enumerate(right)
        if index in left and index not in out
    )
    batch = [i for i, index in enumerate(right) if index in left and index in out]
    return Roles(
        summed,
        shape,
        sum(i == position for position, i in enumerate(batch)),
        subscripts,
    )


def _conv_roles(layer: Any) -> Roles:
    ndim = len(layer.kernel_shape)
    return Roles(tuple(range(-ndim, -1)), tuple(layer.kernel_shape))


def _conv_transpose_roles(layer: Any) -> Roles:
    ndim, out = len(layer.kernel_shape), -2 if layer.transpose_kernel else -1
    return Roles(
        tuple(a for a in range(-ndim, 0) if a != out), tuple(layer.kernel_shape)
    )


def _embed_roles(layer: Any) -> Roles:
    return Roles((-1,), (layer.num_embeddings, layer.features))


def _attach_dot(layer: Any) -> None:
    layer.promote_dtype = PromoteAround(layer.promote_dtype)
    layer.dot_general = dot_general


def _attach_einsum(layer: Any) -> None:
    layer.promote_dtype = PromoteAround(layer.promote_dtype)
    layer.einsum_op = einsum


def _attach_conv(layer: Any) -> None:
    layer.promote_dtype = PromoteAround(layer.promote_dtype)
    layer.conv_general_dilated = conv_general_dilated


def _attach_conv_transpose(layer: Any) -> None:
    layer.__class__ = QConvTranspose  # ConvTranspose has no hook for its product; `problem` let only plain ones come


def _attach_embed(layer: Any) -> None:
    layer.__class__ = QEmbed  # Embed has no hook for its lookup; `problem` let only plain Embeds come here


def _own_hook(name: str, plain: Any) -> Callable[[Any], str | None]:
    def problem(layer: Any) -> str | None:
        if getattr(layer, name) not in plain:
            return f"it has a {name} of its own, {getattr(layer, name)!r}"
        return None

    return problem


def _general_problem(layer: Any) -> str | None:
    if layer.dot_general_cls is not None:
        return f"it has a dot_general_cls of its own, {layer.dot_general_cls!r}"
    return _own_hook("dot_general", (None, lax.dot_general, dot_general))(layer)


def _einsum_problem(layer: Any) -> str | None:
    if layer.einsum_str is None:
        return "its einsum_str is given at each call, so which axes are contracted is not known"
    right = layer.einsum_str.split("->")[0].split(",")[1]
    if "..." in right:
        return f"the kernel's axes in {layer.einsum_str!r} are not all named"
    roles = _einsum_roles(layer)
    if not roles.contracting:
        return f"{layer.einsum_str!r} contracts no axis of the kernel"
    try:
        ops.einsum_numbers(
            roles.subscripts, roles.subscripts.replace("...", "").index(","), len(right)
        )
    except ValueError as error:
        return str(error)
    return _own_hook("einsum_op", (jnp.einsum, einsum))(layer)


def _conv_problem(layer: Any) -> str | None:
    if layer.mask is not None:
        return "its kernel is masked; multiply the mask into the kernel first"
    return _own_hook(
        "conv_general_dilated", (lax.conv_general_dilated, conv_general_dilated)
    )(layer)


def _conv_transpose_problem(layer: Any) -> str | None:
    if type(layer) not in (nnx.ConvTranspose, QConvTranspose):
        return f"{type(layer).__name__} is a subclass of ConvTranspose, whose product cannot be seen into"
    return (
        None
        if layer.mask is None
        else "its kernel is masked; multiply the mask into the kernel first"
    )


def _embed_problem(layer: Any) -> str | None:
    if type(layer) not in (nnx.Embed, QEmbed):
        return f"{type(layer).__name__} is a subclass of Embed, whose lookup cannot be seen into"
    return None


class QConvTranspose(nnx.ConvTranspose):
    """`nnx.ConvTranspose` with a quantized kernel; arguments as in `QConv` and `nnx.ConvTranspose`.

    Integer activations have one scale an example (or one for all, where it is static) and meet an integer kernel with
    int32 sums; in all other cases kernel and input are dequantized.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> jaxq.nn.QConvTranspose(8, 16, (3, 3), activation="int8", rngs=nnx.Rngs(0))(jnp.ones((1, 6, 6, 8))).shape
      (1, 6, 6, 16)
    """

    def __init__(
        self, in_features: int, out_features: int, kernel_size: Any, *args: Any, weight: Any = "int8",
        activation: Any = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(in_features, out_features, kernel_size, *args, **kwargs)
        quantize_own_weight(self, weight, activation)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = PromoteAround(self.promote_dtype)(
            (inputs, self.kernel[...], bias), dtype=self.dtype
        )
        channel, dtype = (
            -2 if self.transpose_kernel else -1,
            self.preferred_element_type,
        )
        if isinstance(kernel, QTensor):
            return convolved(
                self._transposed, x, kernel, bias, channel=channel, dtype=dtype
            )
        y = self._transposed(x, kernel, jnp.float32).astype(dtype or x.dtype)
        return (
            y
            if bias is None
            else y + bias.reshape((1,) * (y.ndim - 1) + (-1,)).astype(y.dtype)
        )

    def _transposed(
        self, x: jax.Array, kernel: jax.Array, accumulate: Any
    ) -> jax.Array:
        """The float layer's own product of arrays of any dtype, without bias: its method, with another kernel."""
        names = (
            "dtype",
            "kernel_dilation",
            "kernel_shape",
            "kernel_size",
            "padding",
            "precision",
            "strides",
        )
        like_self: Any = types.SimpleNamespace(
            **{name: getattr(self, name) for name in names},
            transpose_kernel=self.transpose_kernel,
            kernel=kernel,
            bias=None,
            mask=self.mask,
            use_bias=False,
            promote_dtype=lambda arrays, **_: arrays,
            preferred_element_type=accumulate,
        )
        return nnx.ConvTranspose.__call__(like_self, x)


class QEmbed(nnx.Embed):
    """`nnx.Embed` whose table is a QTensor: looks up and dequantizes only the rows asked for.

    Args:
      num_embeddings: rows of the table.
      features: length of a row.
      weight: preset name or `QuantSpec`; None keeps floats.
      **kwargs: as in `nnx.Embed`, `rngs` included.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> jaxq.nn.QEmbed(16, 64, weight="int8", rngs=nnx.Rngs(0))(jnp.array([1, 2])).shape
      (2, 64)
    """

    def __init__(
        self, num_embeddings: int, features: int, *, weight: Any = "int8", **kwargs: Any
    ):
        super().__init__(num_embeddings, features, **kwargs)
        quantize_own_weight(self, weight, None)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        table = self.embedding[...]
        if not isinstance(table, QTensor):
            return super().__call__(inputs, out_sharding=out_sharding)
        (table,) = PromoteAround(self.promote_dtype)(
            (table,), dtype=self.dtype, inexact=False
        )
        rows = (
            jnp.zeros_like(inputs) if self.num_embeddings == 1 else inputs
        )  # which is what nnx.Embed does
        return sharding.lay_out(ops.take(table, rows), out_sharding)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        query, table = PromoteAround(self.promote_dtype)(
            (query, self.embedding[...]), dtype=self.dtype
        )
        return ops.dot_general(
            query,
            table,
            (((query.ndim - 1,), (1,)), ((), ())),
            out_sharding=out_sharding,
        )


KINDS = (
    LayerKind("Linear", nnx.Linear, "kernel", _linear_roles, _attach_dot,
              _own_hook("dot_general", (lax.dot_general, dot_general)), "dot_general"),
    LayerKind("LinearGeneral", nnx.LinearGeneral, "kernel", _general_roles, _attach_dot, _general_problem,
              "dot_general"),
    LayerKind("Einsum", nnx.Einsum, "kernel", _einsum_roles, _attach_einsum, _einsum_problem, "einsum_op"),
    LayerKind("Conv", nnx.Conv, "kernel", _conv_roles, _attach_conv, _conv_problem, "conv_general_dilated", True),
    LayerKind("ConvTranspose", nnx.ConvTranspose, "kernel", _conv_transpose_roles, _attach_conv_transpose,
              _conv_transpose_problem, "promote_dtype", True),
    LayerKind("Embed", nnx.Embed, "embedding", _embed_roles, _attach_embed, _embed_problem),
)  # fmt: skip
