"""Layers that are quantized from the start, for modules written that way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen

from jaxq.nn.layers import _linen as _layers
from jaxq.nn.layers._linen import LayerKind, Roles, StandIn, code_of
from jaxq.qtensor import QTensor, quantize


class QDense(linen.Dense):
    """`nn.Dense` with a quantized kernel: int8 dot products accumulate in int32, floats in float32.

    `init` draws the floats that `nn.Dense` would and quantizes them; `apply` takes the QTensor in its variables as it
    is, also one of another spec or method. A float kernel is an error.

    Args:
      weight: preset name or `QuantSpec` of the kernel; None keeps floats (bfloat16 products into float32).
      activation: preset name or `QuantSpec` the input is quantized with on the fly, one scale a token; None leaves it.
      **kwargs: all fields of `nn.Dense` stand before these two.

    Raises:
      TypeError: in `apply`, the kernel is an array.
      ValueError: in `apply`, a QTensor of another shape; activation without weight.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer, x = jaxq.nn.linen.QDense(8, weight="int8", activation="int8"), jnp.ones((2, 64))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> variables["params"]["kernel"]
      QTensor(kernel: int8[64x8], PerChannel(along -2), scale=float32, activation=int8, 8.5 bits, float32)
      >>> layer.apply(variables, x).shape
      (2, 8)
    """

    weight: Any = "int8"
    activation: Any = None

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return _by_own_code(self, _layers.DENSE, linen.Dense, inputs)


class QDenseGeneral(linen.DenseGeneral):
    """`nn.DenseGeneral` with a quantized kernel; `weight`, `activation` and errors as in `QDense`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer, x = jaxq.nn.linen.QDenseGeneral((4, 16), weight="int4"), jnp.ones((2, 64))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 4, 16)
    """

    weight: Any = "int8"
    activation: Any = None

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return _by_own_code(self, _layers.GENERAL, linen.DenseGeneral, inputs)


class QConv(linen.Conv):
    """`nn.Conv` with a quantized kernel; `weight`, `activation` and errors as in `QDense`.

    Activations have one scale an example, since a window mixes places.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer, x = jaxq.nn.linen.QConv(16, (3, 3), activation="int8"), jnp.ones((1, 6, 6, 8))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (1, 6, 6, 16)
    """

    weight: Any = "int8"
    activation: Any = None

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return _by_own_code(self, _layers.CONV, linen.Conv, inputs)


class QConvTranspose(linen.ConvTranspose):
    """`nn.ConvTranspose` with a quantized kernel; `weight`, `activation` and errors as in `QDense`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer, x = jaxq.nn.linen.QConvTranspose(16, (3, 3), activation="int8"), jnp.ones((1, 6, 6, 8))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (1, 6, 6, 16)
    """

    weight: Any = "int8"
    activation: Any = None

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        _check(self, _layers.CONV_TRANSPOSE)
        if self.weight is None:
            return super().__call__(inputs)
        sizes = (
            (self.kernel_size,)
            if isinstance(self.kernel_size, int)
            else tuple(self.kernel_size)
        )
        ends = (inputs.shape[-1], self.features)
        shape = (*sizes, *(reversed(ends) if self.transpose_kernel else ends))
        roles = _layers.CONV_TRANSPOSE.roles(self, shape)
        kernel: Any = _weight(
            self, "kernel", roles, self.kernel_init, shape, self.param_dtype
        )
        return _layers.conv_transpose(self, kernel, inputs)


class QEinsum(linen.Einsum):
    """`nn.Einsum` with a quantized kernel; `weight`, `activation` and errors as in `QDense`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer, x = jaxq.nn.linen.QEinsum((64, 4, 16), "btd,dhk->bthk"), jnp.ones((2, 3, 64))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 3, 4, 16)
    """

    weight: Any = "int8"
    activation: Any = None

    @linen.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        _check(self, _layers.EINSUM, inputs, einsum_str)
        roles = _layers.EINSUM.roles(self, tuple(self.shape), inputs, einsum_str)
        kernel = _weight(
            self, "kernel", roles, self.kernel_init, tuple(self.shape), self.param_dtype
        )
        return _layers.einsum(self, kernel, inputs, einsum_str)


class QEmbed(linen.Embed):
    """`nn.Embed` whose table is a QTensor: looks up and dequantizes only the rows asked for.

    `weight` and errors are as in `QDense`; `attend` multiplies by the codes.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer, tokens = jaxq.nn.linen.QEmbed(16, 64, weight="nf4"), jnp.array([1, 2])
      >>> layer.apply(layer.init(jax.random.key(0), tokens), tokens).shape
      (2, 64)
    """

    weight: Any = "int8"

    def setup(self):
        shape = (self.num_embeddings, self.features)
        self.embedding = _weight(
            self,
            "embedding",
            Roles((-1,), shape),
            self.embedding_init,
            shape,
            self.param_dtype,
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        table = self.embedding
        return (
            _layers.lookup(self, table, inputs)
            if isinstance(table, QTensor)
            else super().__call__(inputs)
        )

    def attend(self, query: jax.Array) -> jax.Array:
        table = self.embedding
        return (
            _layers.attend(self, table, query)
            if isinstance(table, QTensor)
            else super().attend(query)
        )


def _by_own_code(
    layer: Any, kind: LayerKind, cls: type[linen.Module], inputs: jax.Array
) -> jax.Array:
    _check(layer, kind)

    def weight(init: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> Any:
        return _weight(
            layer,
            kind.weight,
            kind.roles(layer, tuple(shape)),
            init,
            tuple(shape),
            dtype,
        )

    return code_of(cls.__call__)(StandIn(layer, kind.weight, weight), inputs)


def _check(layer: Any, kind: LayerKind, *args: Any) -> None:
    problem = kind.problem(layer, *args)
    if problem is not None:
        raise ValueError(f"{type(layer).__name__}: {problem}.")
    if layer.weight is None and layer.activation is not None:
        raise ValueError(
            f"{type(layer).__name__}: activation={layer.activation!r} needs a quantized weight=."
        )


def _weight(
    layer: Any,
    name: str,
    roles: Roles,
    init: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: Any,
) -> QTensor | jax.Array:
    """A layer's weight as its variables hold it, or fresh."""
    if layer.weight is None:
        return layer.param(name, init, shape, dtype)
    path = "/".join((*layer.path, name))
    what = f"{type(layer).__name__}: {path}"
    if not layer.has_variable("params", name):
        # Axes of a fresh weight are all its own: lifted layers are initialized one by one.
        def fresh(rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> QTensor:
            floats = linen.meta.unbox(init(rng, shape, dtype))
            qt = quantize(
                floats,
                layer.weight,
                contracting=roles.contracting,
                batch=tuple(range(roles.num_batch)),
                name=path,
            )
            return qt.with_activation(getattr(layer, "activation", None))

        return layer.param(name, fresh, shape, dtype)
    value = layer.get_variable("params", name)
    if not isinstance(value, QTensor):
        axes = f"contracting={roles.contracting}" + (
            f", batch={tuple(range(roles.num_batch))}" if roles.num_batch else ""
        )
        raise TypeError(
            f"{what} is {getattr(value, 'dtype', type(value).__name__)}{list(getattr(value, 'shape', []))}, not a "
            f"QTensor. Pass jaxq.quantize({name}, {layer.weight!r}, {axes}), use the float "
            "layer with jaxq.nn.linen.quantize_model, or weight=None."
        )
    if value.shape != shape:
        raise ValueError(f"{what} is {value!r}, expected the shape {list(shape)}.")
    return value
