"""Quantization of an activation as a jax primitive.

Without a kernel, XLA reads the activation once for the largest magnitudes and once more
for the codes, in several launches. A kernel does it in one launch. When jax lowers a
program for a platform, the primitive becomes a kernel of this platform or plain XLA.
The arithmetic is that of `quantize`. On a GPU the reciprocal of a scale can differ in
the last place, see `_activation_triton.py`.

| transformation | rule |
|---|---|
| lowering | a kernel of the platform, or `quantize_array` if no kernel is chosen |
| vmap | the mapped axis becomes a leading batch axis, and joins the rows of a kernel |
| derivatives | none, as for `quantize`; a product defines its own |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import batching

from jaxq.kernels._activation_problem import ActivationProblem, activation_problem
from jaxq.kernels._choice import kernel_on
from jaxq.kernels._platform_primitive import Target, platform_primitive
from jaxq.kernels._registry import kernel_module
from jaxq.meshes import is_explicit
from jaxq.qtensor import (
    Geometry,
    Meta,
    QTensor,
    QuantSpec,
    quantize_array,
    quantized_like,
    without_gradient,
)


@dataclasses.dataclass(frozen=True)
class ActivationCall:
    """Static facts of one quantization: the spec, and the geometry of the array."""

    spec: QuantSpec
    geometry: Geometry

    def meta(self, dtype: str) -> Meta:
        """The static facts of the result, for an array of this dtype."""
        return Meta(self.spec, self.geometry, self.spec.order, dtype)


def quantize_activation(x: jax.Array, spec: QuantSpec, geometry: Geometry) -> QTensor:
    """Quantizes an array as `quantize_array` does, in a kernel where one can.

    Args:
      x: float32, bfloat16 or float16 `[*batch, *geometry.shape]`.
      spec: a spec for which `why_not_spec` is None.
      geometry: the geometry of `x`.

    Returns:
      A QTensor. NaN and infinities propagate.
    """
    call = ActivationCall(spec, geometry)

    def quantize(x: jax.Array) -> QTensor:
        data, scale = quantize_activation_p.bind(x, call=call)
        return QTensor(data, scale, None, None, None, call.meta(x.dtype.name))

    x = without_gradient(x)
    # On a mesh with explicit axes, the primitive does not know the sharding of codes.
    return quantized_like(quantize, x) if is_explicit(x) else quantize(x)


def activation_xla_form(
    x: jax.Array, *, call: ActivationCall
) -> tuple[jax.Array, jax.Array]:
    """Computes (codes, scales) in plain XLA."""
    qt = quantize_array(x, call.spec, call.geometry, None)
    assert not isinstance(qt.scale, QTensor)
    return qt.data, qt.scale


def activation_kernel_form(
    x: jax.Array,
    *,
    call: ActivationCall,
    kernel: str,
    interpret: bool = False,
    **tiles: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes (codes, scales) by a kernel.

    Args:
      x: `[*batch, *geometry.shape]`.
      call: static facts. The kernel must accept the problem.
      kernel: name of the kernel.
      interpret: True to run the kernel's interpreter, on any platform.
      **tiles: sizes that replace those of the kernel's `default_tiles`.
    """
    problem = activation_problem(x.shape, x.dtype.name, call.spec, call.geometry)
    assert isinstance(problem, ActivationProblem), problem
    module = kernel_module(kernel)
    codes, scales = module.quantize_activation(
        x.reshape(problem.m, problem.k),
        problem=problem,
        tiles=module.default_tiles(problem) | tiles,
        interpret=interpret,
    )
    shapes = _result_shapes(x.shape, x.dtype.name, call)
    return codes.reshape(shapes[0]), scales.reshape(shapes[1])


def _result_shapes(
    shape: tuple[int, ...], dtype: str, call: ActivationCall
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the codes and of the scales."""
    batch = shape[: len(shape) - len(call.geometry.shape)]
    stored = call.meta(dtype).stored_shape
    return (*batch, *stored), (*batch, *call.geometry.num_blocks)


# Rules of the primitive.


def _abstract(x, *, call: ActivationCall):
    codes_shape, scales_shape = _result_shapes(x.shape, x.dtype.name, call)
    assert isinstance(call.spec.scale, str)
    codes_dtype, scale_dtype = call.spec.fmt.code_dtype, jnp.dtype(call.spec.scale)
    return [
        x.update(shape=codes_shape, dtype=jnp.dtype(codes_dtype), weak_type=False),
        x.update(shape=scales_shape, dtype=scale_dtype, weak_type=False),
    ]


def _form(
    target: Target, avals: Sequence[Any], *, call: ActivationCall
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """What the primitive computes on a target: a kernel or the XLA form."""
    (x,) = avals
    problem = activation_problem(x.shape, x.dtype.name, call.spec, call.geometry)
    product = f"the quantization of an activation to {call.spec.fmt.name}"
    kernel = kernel_on(target, problem, "activation", product)
    if kernel is not None:
        return functools.partial(activation_kernel_form, call=call, kernel=kernel)
    return functools.partial(activation_xla_form, call=call)


def _batch(operands, dims, *, call: ActivationCall):
    (x,), (dim,) = operands, dims
    data, scale = quantize_activation_p.bind(jnp.moveaxis(x, dim, 0), call=call)
    return [data, scale], [0, 0]


# `quantize_activation_p(x)` is (codes, scales).
quantize_activation_p = platform_primitive(
    "quantize_activation", _abstract, _form, multiple_results=True
)
batching.primitive_batchers[quantize_activation_p] = _batch
