"""Quantization of an activation as a jax primitive.

Without a kernel, XLA reads the activation once for the largest magnitudes and once more
for the codes, in several launches. A kernel does it in one launch. When jax lowers a
program for a platform, the primitive becomes a kernel of this platform or plain XLA.
The arithmetic is that of `quantize`. On a GPU the reciprocal of a scale can differ in
the last place, see `_rows_triton.py`.

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

from jaxq.kernels._dispatch import Choice, warn_of_fallback, why_not_partitioned
from jaxq.kernels._platform_primitive import Target, platform_primitive
from jaxq.kernels._registry import kernel_module
from jaxq.kernels._rows_problem import RowsProblem, rows_problem
from jaxq.qtensor import (
    Geometry,
    Meta,
    QTensor,
    QuantSpec,
    quantize_array,
    without_gradient,
)

# The kernel of each platform, and the module that contains it.
ROWS_KERNELS = {"tpu": "rows_tpu", "cuda": "rows_triton"}


@dataclasses.dataclass(frozen=True)
class RowsCall:
    """Static facts of one quantization: the spec, and the geometry of the array."""

    spec: QuantSpec
    geometry: Geometry

    def meta(self, dtype: str) -> Meta:
        """The static facts of the result, for an array of this dtype."""
        return Meta(self.spec, self.geometry, self.spec.order, dtype)


def quantize_rows(x: jax.Array, spec: QuantSpec, geometry: Geometry) -> QTensor:
    """Quantizes an array as `quantize_array` does, in a kernel where one can.

    Args:
      x: float32, bfloat16 or float16 `[*batch, *geometry.shape]`.
      spec: a spec for which `why_not_spec` is None.
      geometry: the geometry of `x`.

    Returns:
      A QTensor. NaN and infinities propagate.
    """
    call = RowsCall(spec, geometry)
    data, scale = quantize_rows_p.bind(without_gradient(x), call=call)
    return QTensor(data, scale, None, None, None, call.meta(x.dtype.name))


def choose_rows(
    problem: RowsProblem | str, platform: str, num_devices: int = 1
) -> Choice:
    """Chooses the kernel for a platform, by static facts alone.

    Args:
      problem: the quantization, or the reason why no kernel computes it.
      platform: "cpu", "tpu", "cuda", ...
      num_devices: number of devices over which XLA partitions the program.
    """
    if platform not in ROWS_KERNELS:
        return Choice("xla", f"there are no kernels for {platform}")
    if isinstance(problem, str):
        return Choice("xla", problem)
    reason = why_not_partitioned(num_devices)
    if reason is not None:
        return Choice("xla", reason)
    name = ROWS_KERNELS[platform]
    reason = kernel_module(name).why_not(problem)
    return Choice("xla" if reason else name, reason)


def rows_xla_form(x: jax.Array, *, call: RowsCall) -> tuple[jax.Array, jax.Array]:
    """Computes (codes, scales) in plain XLA."""
    qt = quantize_array(x, call.spec, call.geometry, None)
    assert not isinstance(qt.scale, QTensor)
    return qt.data, qt.scale


def rows_kernel_form(
    x: jax.Array, *, call: RowsCall, kernel: str, interpret: bool = False, **tiles: int
) -> tuple[jax.Array, jax.Array]:
    """Computes (codes, scales) by a kernel.

    Args:
      x: `[*batch, *geometry.shape]`.
      call: static facts. The kernel must accept the problem.
      kernel: name of the kernel.
      interpret: True to run the kernel's interpreter, on any platform.
      **tiles: sizes that replace those of the kernel's `default_tiles`.
    """
    problem = rows_problem(x.shape, x.dtype.name, call.spec, call.geometry)
    assert isinstance(problem, RowsProblem), problem
    module = kernel_module(kernel)
    codes, scales = module.quantize_rows(
        x.reshape(problem.m, problem.k),
        problem=problem,
        tiles=module.default_tiles(problem) | tiles,
        interpret=interpret,
    )
    shapes = _result_shapes(x.shape, x.dtype.name, call)
    return codes.reshape(shapes[0]), scales.reshape(shapes[1])


def _result_shapes(
    shape: tuple[int, ...], dtype: str, call: RowsCall
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the codes and of the scales."""
    batch = shape[: len(shape) - len(call.geometry.shape)]
    stored = call.meta(dtype).stored_shape
    return (*batch, *stored), (*batch, *call.geometry.num_blocks)


# Rules of the primitive.


def _abstract(x, *, call: RowsCall):
    codes_shape, scales_shape = _result_shapes(x.shape, x.dtype.name, call)
    assert isinstance(call.spec.scale, str)
    codes_dtype, scale_dtype = call.spec.fmt.code_dtype, jnp.dtype(call.spec.scale)
    return [
        x.update(shape=codes_shape, dtype=jnp.dtype(codes_dtype), weak_type=False),
        x.update(shape=scales_shape, dtype=scale_dtype, weak_type=False),
    ]


def _form(
    target: Target, avals: Sequence[Any], *, call: RowsCall
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """What the primitive computes on a target: a kernel or the XLA form."""
    (x,) = avals
    problem = rows_problem(x.shape, x.dtype.name, call.spec, call.geometry)
    choice = choose_rows(problem, target.platform, target.num_devices)
    if choice.reason is None:
        return functools.partial(rows_kernel_form, call=call, kernel=choice.backend)
    if target.platform in ROWS_KERNELS:
        warn_of_fallback(
            f"the quantization of an activation to {call.spec.fmt.name}",
            target.platform,
            choice.reason,
        )
    return functools.partial(rows_xla_form, call=call)


def _batch(operands, dims, *, call: RowsCall):
    (x,), (dim,) = operands, dims
    data, scale = quantize_rows_p.bind(jnp.moveaxis(x, dim, 0), call=call)
    return [data, scale], [0, 0]


# `quantize_rows_p(x)` is (codes, scales).
quantize_rows_p = platform_primitive(
    "quantize_rows", _abstract, _form, multiple_results=True
)
batching.primitive_batchers[quantize_rows_p] = _batch
