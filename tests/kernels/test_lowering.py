"""Programs that users lower: with 64-bit types, and with symbolic shapes."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import export

import jaxq
from jaxq import kernels
from tests.kernels.attention_cases import cache_of
from tests.kernels.products import h200, lowered_for

CUSTOM_CALLS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2")
# A weight, and what its activations are quantized to.
PRODUCTS = {
    "int4": ("int4", None),
    "nf4": ("nf4", None),
    "w8a8": ("int8", "int8"),
    "w4a8": ("int4", "int8"),
    "fp8": ("fp8", "fp8"),
}


def product_of(name):
    preset, activation = PRODUCTS[name]
    weight = jaxq.quantize(jnp.ones((256, 128), jnp.bfloat16), preset)
    if activation is not None:
        weight = weight.with_activation(activation)
    return lambda x: x @ weight


def gradient(x):
    y, pull_back = jax.vjp(product_of("int4"), x)
    return pull_back(y)


def experts(x):
    weights = jnp.ones((3, 256, 128), jnp.bfloat16)
    weights = jaxq.quantize(weights, "int4", contracting=-2, batch=0)
    return jaxq.ops.ragged_dot(x, weights, jnp.array([5, 6, 5], jnp.int32))


def attention(x):
    cache = cache_of("int4", dtype="bfloat16")
    return cache.attend(jnp.ones((3, 1, 6, 128), jnp.bfloat16) + x[0, 0])


FUNCTIONS = {name: product_of(name) for name in ("int4", "w8a8", "fp8")}
FUNCTIONS |= {"gradient": gradient, "experts": experts, "attention": attention}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_are_lowered_with_64_bit_types(platform, name):
    x = jnp.ones((16, 256), jnp.bfloat16)
    with jax.enable_x64(True):
        text = lowered_for(platform, FUNCTIONS[name], x)
    assert any(call in text for call in CUSTOM_CALLS)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_symbolic_shapes_run_in_plain_xla(platform, name):
    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 256), jnp.bfloat16)
    product = product_of(name)  # the context below can only lower programs
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", kernels.FallbackWarning)
        with export_context(platform):
            exported = export.export(jax.jit(product), platforms=[platform])(x)
    assert not any(call in exported.mlir_module() for call in CUSTOM_CALLS)
    messages = [str(w.message) for w in caught if w.category is kernels.FallbackWarning]
    assert (platform != "cpu") == any("symbolic" in message for message in messages)


def export_context(platform):
    """Names a GPU, because this machine has none."""
    if platform != "cuda":
        return contextlib.nullcontext()
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=h200())
    return jax.sharding.use_abstract_mesh(mesh)


def test_an_exported_product_computes_every_batch_size():
    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 256), jnp.bfloat16)
    multiply = product_of("fp8")
    exported = export.export(jax.jit(multiply))(x)
    for size in (1, 5):
        x = jnp.full((size, 256), 0.5, jnp.bfloat16)
        assert (exported.call(x) == multiply(x)).all()
