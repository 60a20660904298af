"""Products with dynamic or static activation quantization.

The gradient passes straight through the rounding. Numbers that a static range clips get
no gradient. A number up to half a step beyond the range is rounded, not clipped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxq import kernels
from jaxq.ops._dimension_numbers import broadcastable
from jaxq.ops._facts import ArrayFacts, activation_facts, activation_problem
from jaxq.qtensor import QTensor, quantize, with_margin


@dataclasses.dataclass(frozen=True)
class ActivationAxes:
    """The roles of an activation's axes.

    Attributes:
      order: the permutation of the activation's axes before quantization. It puts the
        product's batch axes first.
      contracting: the contracted axes after this permutation.
      num_batch: the number of leading batch axes after this permutation.
      range_axes: the axes of the weight's `input_range` in the order of the product's
        batch axes.
    """

    order: tuple[int, ...]
    contracting: tuple[int, ...]
    num_batch: int = 0
    range_axes: tuple[int, ...] = ()


def multiply_quantized(
    x: jax.Array,
    weight: QTensor,
    axes: ActivationAxes,
    codes_product: Callable[[QTensor, QTensor], jax.Array],
    float_product: Callable[[jax.Array, QTensor], jax.Array],
    *,
    is_convolution: bool = False,
) -> jax.Array:
    """The product with `x` quantized by `weight.meta.activation`.

    Args:
      x: float activation.
      weight: QTensor with an activation spec.
      axes: roles of the axes of `x`.
      codes_product: multiplies the quantized activation (axes in `axes.order`) by the
        weight.
      float_product: multiplies `x` itself by the weight. The gradient is the gradient
        of this function, except where a static range clips.
      is_convolution: tells policies of `jax.checkpoint` that this is no dot product.

    Returns:
      The result of `codes_product`.
    """

    @jax.custom_vjp
    def quantized(x: jax.Array, weight: QTensor) -> jax.Array:
        activation = quantize_activation(x, weight, axes)
        return codes_product(activation, weight.with_activation(None))

    def forward(x: jax.Array, weight: QTensor):
        has_batch = is_convolution or axes.num_batch > 0
        num_terms = math.prod(x.shape[axes.order[axis]] for axis in axes.contracting)
        if is_convolution:
            num_terms = weight.meta.geometry.contracted_size
        y = kernels.mark_product(
            quantized(x, weight), has_batch=has_batch, num_terms=num_terms
        )
        return y, (x, weight)

    def backward(saved: tuple[jax.Array, QTensor], dy: jax.Array):
        x, weight = saved
        _, pull_back = jax.vjp(float_product, x, weight.with_activation(None))
        dx, dweight = pull_back(dy)
        return _pass_through(dx, dweight, x, weight, axes)

    quantized.defvjp(forward, backward)
    return quantized(x, weight)


def quantize_activation(x: jax.Array, weight: QTensor, axes: ActivationAxes) -> QTensor:
    """`x` quantized by `weight.meta.activation`, with its axes in `axes.order`.

    `kernels.quantize_activation` has the bits of `quantize`. It takes dynamic ranges
    only. With a static range there are no extremes to find, and XLA needs one launch.
    """
    spec = weight.meta.activation
    assert spec is not None
    x = jnp.transpose(x, axes.order)
    batch = tuple(range(axes.num_batch))
    bounds = None
    if weight.input_range is not None:
        bounds = range_ends(weight.input_range, axes.range_axes)
    else:
        array = ArrayFacts(tuple(x.shape), x.dtype.name)
        facts = activation_facts(array, spec, axes.contracting, batch)
        if isinstance(activation_problem(facts), kernels.ActivationProblem):
            activation = kernels.quantize_activation(x, spec, facts.meta.geometry)
            meta = dataclasses.replace(activation.meta, name="activation")
            return dataclasses.replace(activation, meta=meta)
    return quantize(
        x,
        spec,
        contracting=axes.contracting,
        batch=batch,
        on_nonfinite="propagate",
        bounds=bounds,
        name="activation",
    )


def _pass_through(
    dx: jax.Array,
    dweight: QTensor,
    x: jax.Array,
    weight: QTensor,
    axes: ActivationAxes,
) -> tuple[jax.Array, QTensor]:
    """Turns the gradients of the float product into those of the quantized product.

    Args:
      dx: gradient of the float product with respect to `x`.
      dweight: gradient of the float product with respect to the weight without its
        activation spec.
      x: the activation before it is quantized.
      weight: the weight with its activation spec.
      axes: roles of the axes of `x`.

    Returns:
      Gradients of `x` and of `weight`. The gradient of the static range is zero.
    """
    if weight.input_range is None:
        return dx, dataclasses.replace(dweight, meta=weight.meta)
    batch = axes.order[: axes.num_batch]
    low, high = (
        broadcastable(end, batch, x.ndim)
        for end in range_ends(weight.input_range, axes.range_axes)
    )
    low, high = with_margin(low, high, weight.meta.activation)
    dx = jnp.where((low <= x) & (x <= high), dx, jnp.zeros((), dx.dtype))
    no_gradient = jnp.zeros_like(weight.input_range)
    return dx, dataclasses.replace(dweight, meta=weight.meta, input_range=no_gradient)


def range_ends(
    input_range: jax.Array, range_axes: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """(low, high) of a static range, `[*batch]` in the product's order of batch axes.

    Both are `[]` if the whole activation shares one range. Only a weight with leading
    batch axes has one range for each batch element.
    """
    if input_range.ndim == 1:
        return input_range[0], input_range[1]
    ordered = jnp.transpose(input_range, (*range_axes, len(range_axes)))
    return ordered[..., 0], ordered[..., 1]
