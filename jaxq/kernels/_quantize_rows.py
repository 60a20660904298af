"""Quantization of an activation as a jax primitive.

Without a kernel, XLA reads the activation once for the largest magnitudes and once more
for the codes, in two or three launches. A kernel does it in one launch. When jax lowers
a program for a platform, the primitive becomes a kernel of this platform or plain XLA.
Both give the bits of `quantize`.

| transformation | rule |
|---|---|
| lowering | a kernel of the platform, or `quantize_array` if no kernel is chosen |
| vmap | the mapped axis becomes a leading batch axis, and joins the rows of a kernel |
| derivatives | as for `quantize`, none: the derivative of a product is defined outside |
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxq.kernels._devices import assumed_gpu, lowering_devices
from jaxq.kernels._dispatch import Choice, FallbackWarning
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

# `quantize_rows_p(x)` is (codes, scales).
quantize_rows_p = Primitive("quantize_rows")
quantize_rows_p.multiple_results = True


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
      A QTensor with the same bits on every path. NaN and infinities propagate.
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
    if num_devices > 1:
        return Choice(
            "xla",
            f"XLA partitions this program for {num_devices} devices and cannot "
            "partition a kernel; inside jax.shard_map a kernel runs on each device",
        )
    name = ROWS_KERNELS[platform]
    reason = _kernel_module(name).why_not(problem)
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
    module = _kernel_module(kernel)
    codes, scales = module.quantize_rows(
        x.reshape(problem.m, problem.k),
        problem=problem,
        tiles=module.default_tiles(problem) | tiles,
        interpret=interpret,
    )
    shapes = _result_shapes(x.shape, x.dtype.name, call)
    return codes.reshape(shapes[0]), scales.reshape(shapes[1])


def _kernel_module(name: str) -> ModuleType:
    """The module of a kernel. The import is late because Pallas is slow to import."""
    return importlib.import_module(f"jaxq.kernels._{name}")


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


@functools.partial(jax.jit, static_argnames="call")
def _run(x, *, call: RowsCall):
    return quantize_rows_p.bind(x, call=call)


def _evaluate(x, *, call: RowsCall):
    # The primitive can only be lowered and compiled.
    with jax.disable_jit(False):
        return _run(x, call=call)


def _lower(ctx, x, *, call: RowsCall, platform: str | None):
    """Lowers the primitive for one platform; None is every platform without kernels."""
    with assumed_gpu(platform, ctx.avals_in), warnings.catch_warnings():
        form = functools.partial(rows_xla_form, call=call)
        if platform is not None:
            _, num_devices = lowering_devices(ctx, platform)
            aval = ctx.avals_in[0]
            problem = rows_problem(
                aval.shape, aval.dtype.name, call.spec, call.geometry
            )
            choice = choose_rows(problem, platform, num_devices)
            if choice.reason is None:
                form = functools.partial(
                    rows_kernel_form, call=call, kernel=choice.backend
                )
            else:
                _warn(call, platform, choice.reason)
        # A user who multiplies by a QTensor cannot act on this warning.
        warnings.filterwarnings(
            "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
        )
        return mlir.lower_fun(form, multiple_results=True)(ctx, x)


def _warn(call: RowsCall, platform: str, reason: str) -> None:
    warnings.warn(
        f"No kernel quantizes an activation {call.geometry.shape} to "
        f"{call.spec.fmt.name} on {platform}, so XLA does: {reason}.",
        FallbackWarning,
        stacklevel=3,
    )


def _batch(operands, dims, *, call: RowsCall):
    (x,), (dim,) = operands, dims
    data, scale = quantize_rows_p.bind(jnp.moveaxis(x, dim, 0), call=call)
    return [data, scale], [0, 0]


quantize_rows_p.def_abstract_eval(_abstract)
quantize_rows_p.def_impl(_evaluate)
batching.primitive_batchers[quantize_rows_p] = _batch
mlir.register_lowering(quantize_rows_p, functools.partial(_lower, platform=None))
for _platform in ROWS_KERNELS:
    mlir.register_lowering(
        quantize_rows_p,
        functools.partial(_lower, platform=_platform),
        platform=_platform,
    )
