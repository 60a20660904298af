"""Products with QTensors, and the programs they lower to, also without the platform."""

import contextlib
import functools

import jax
from jax.sharding import AbstractMesh

import jaxq
from tests.arrays import normal_with_outliers

K, N, M = 128, 256, 16
CUSTOM_CALL = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}
# One of the layouts that the kernels of a platform read.
LAYOUT = {"tpu": "columns", "cuda": "rows"}
WITH_OFFSET = jaxq.QuantSpec("uint4", jaxq.PerGroup(64), offset="min")


@functools.cache
def weight(
    preset="int4", layout="rows", dtype="float32", *, stack: int = 0
) -> jaxq.QTensor:
    """A quantized weight `[K, N]`, or `[stack, K, N]` with a batch axis."""
    shape, roles = (K, N), {}
    if stack:
        shape, roles = (stack, K, N), {"contracting": -2, "batch": 0}
    qt = jaxq.quantize(normal_with_outliers(*shape, dtype=dtype), preset, **roles)
    return jaxq.relayout(qt, layout)


def bfloat16(*shape: int) -> jax.Array:
    """Random activations."""
    return normal_with_outliers(*shape, dtype="bfloat16")


def h200():
    """An H200 for a program that is lowered without a GPU."""
    from jax._src.mesh import AbstractDevice  # not public yet

    return AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


def lowered_for(platform: str, f, *args) -> str:
    """The program that `f(*args)` lowers to for a platform."""
    context = contextlib.nullcontext()
    if platform == "cuda":
        mesh = AbstractMesh((1,), ("x",), abstract_device=h200())
        context = jax.sharding.use_abstract_mesh(mesh)
    with context:
        traced = jax.jit(f).trace(*args)
        return traced.lower(lowering_platforms=(platform,)).as_text()
