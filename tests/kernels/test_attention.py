"""Attention over quantized groups: kernels in interpreters, and what is lowered."""

import itertools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jaxq
from jaxq import kernels
from jaxq.kernels import AttentionProblem
from jaxq.kernels._attention import attention_kernel_form
from tests.kernels.attention_cases import (
    B,
    H,
    M,
    R,
    cache_of,
    expected,
    filled,
    finished,
    operands_of,
)
from tests.kernels.products import lowered_for
from tests.tables import thinned

PLATFORM = {"attention_tpu": "tpu", "attention_triton": "cuda"}
CUSTOM_CALL = {"tpu": "tpu_custom_call", "cuda": "triton"}
# The cache, the tokens in each slot, the queries of each slot, and sizes of tiles. The
# last tile of 17 places is not whole. A slot of 0 tokens has NaN scales.
CASES = {
    "int8": ({"spec": "int8"}, (0, 300, 560), 1, {}),
    "int4": ({"spec": "int4"}, (0, 300, 560), 1, {}),
    "bfloat16": ({"dtype": "bfloat16"}, (0, 300, 560), 1, {}),
    "float16": ({"spec": "int8", "dtype": "float16"}, (0, 300, 560), 1, {}),
    "window": ({"length": 900, "window": 300}, (5, 400, 610), 2, {}),
    "int8 window": (
        {"spec": "int8", "length": 900, "window": 300},
        (5, 400, 610),
        2,
        {},
    ),
    "many queries": ({}, (40, 300, 560), 20, {"bq": 16}),
    "splits": ({}, (0, 300, 560), 3, {"splits": 3}),
    "one group": ({"length": 64}, (33, 50, 64), 1, {}),
    "groups of 64": ({"group": 64, "spec": "int8"}, (0, 300, 560), 1, {}),
}
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2, "float16": 2e-3}


@pytest.mark.parametrize(
    ("kernel", "name"),
    thinned(
        itertools.product(PLATFORM, CASES),
        [
            ("attention_tpu", "int8"),
            ("attention_tpu", "window"),
            ("attention_tpu", "splits"),
            ("attention_triton", "bfloat16"),
            ("attention_triton", "int8 window"),
        ],
    ),
)
def test_kernel_equals_the_xla_form_and_float64(kernel, name):
    sizes, lengths, t, tiles = CASES[name]
    if kernel == "attention_tpu" and sizes.get("length") != 64:
        tiles = {"groups": 8} | tiles
    cache = filled(cache_of(**sizes), lengths)
    operands, call = operands_of(cache, t)
    assert isinstance(call.problem, AttentionProblem), call.problem
    state = attention_kernel_form(
        *operands, call=call, kernel=kernel, interpret=True, **tiles
    )
    shape = (B, M, R * t)
    assert [x.shape for x in state] == [shape, shape, (*shape, H)]
    y, exact = finished(state), expected(cache, operands, cache.window)
    xla = finished(call.form(*operands))
    assert np.isfinite(y).all()
    bound = TOLERANCE[cache.dtype.name] * np.linalg.norm(exact)
    assert np.linalg.norm(y - exact) < bound
    assert np.linalg.norm(y - xla) < 2 * bound
    assert np.linalg.norm(exact) > 1


def largest_float_array(text):
    """The largest number of floats in an array of a program."""
    shapes = re.findall(r"tensor<((?:\d+x)+)(?:f32|bf16)>", text)
    return max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)


@pytest.mark.parametrize("spec", ["int8", "int4"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_kernel_is_lowered_and_no_decoded_cache(platform, spec):
    cache = cache_of(spec, 2048 + 32, dtype="bfloat16")
    q = jnp.ones((B, 1, M * R, H), jnp.bfloat16)
    num_numbers = B * M * 2048 * H

    def attend(cache, q):
        return cache.attend(q, block=2048)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lowered_for(platform, attend, cache, q)
    assert CUSTOM_CALL[platform] in text
    assert largest_float_array(text) < num_numbers / 4
    # No codes are moved.
    moved = r"stablehlo\.(transpose|gather|convert|pad|concat).*tensor<[\dx]+xu?i8>"
    assert not re.search(moved, text)
    # The XLA form decodes this block of 2048 tokens.
    assert largest_float_array(lowered_for("cpu", attend, cache, q)) >= num_numbers


def test_under_vmap_and_scan_the_kernel_is_lowered():
    cache = cache_of("int4", dtype="bfloat16")
    layers = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
    q = jnp.ones((2, B, 1, M * R, H), jnp.bfloat16)

    def mapped(layers, q):
        return jax.vmap(lambda c, q: c.attend(q))(layers, q)

    def scanned(layers, q):
        return jax.lax.scan(
            lambda _, xs: (None, xs[0].attend(xs[1])), None, (layers, q)
        )

    for f in (mapped, scanned):
        assert lowered_for("tpu", f, layers, q).count("@tpu_custom_call") == 1


REASONS = {
    "nf4": ("tpu", {"spec": "nf4"}, "keys are nf4"),
    "uint4": ("tpu", {"spec": "uint4"}, "keys are uint4"),
    "int2": ("cuda", {"spec": "int2"}, "keys are int2"),
    "value groups": (
        "cuda",
        {"spec": jaxq.QuantSpec("int4", jaxq.PerGroup(32))},
        "values with one scale for each token",
    ),
    "tensor": (
        "cuda",
        {"spec": jaxq.QuantSpec("int8", jaxq.PerTensor())},
        "keys with one scale for each channel",
    ),
    "head": ("tpu", {"h": 64}, "multiple of 128 channels, not of 64"),
    "odd head": ("cuda", {"h": 96}, "power of two"),
    "group": ("tpu", {"group": 8}, "multiple of 16 tokens of 4 bits, not of 8"),
    "odd group": ("cuda", {"group": 48}, "power of two"),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_warning_says_why_no_kernel_runs(name):
    platform, sizes, reason = REASONS[name]
    cache = cache_of(**sizes)
    heads, h = M * R, cache.recent_keys.shape[-1]
    q = jnp.ones((B, 1, heads, h))
    with pytest.warns(kernels.FallbackWarning, match=re.escape(reason)):
        text = lowered_for(platform, lambda c, q: c.attend(q), cache, q)
    assert CUSTOM_CALL[platform] not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered_for("cpu", lambda c, q: c.attend(q), cache, q)


@pytest.mark.parametrize("name", REASONS)
def test_explain_gives_the_reason_of_the_warning(name):
    platform, sizes, reason = REASONS[name]
    cache = cache_of(**sizes)
    q = jax.ShapeDtypeStruct((B, 1, M * R, cache.recent_keys.shape[-1]), cache.dtype)
    plan = cache.explain(q, platform=platform)
    assert (plan.path, plan.kernel, plan.platform) == ("attention", "xla", platform)
    assert reason in plan.why_no_kernel
    assert reason in str(plan)
    assert "attention_" not in str(plan)


@pytest.mark.parametrize(
    ("platform", "kernel"), [("tpu", "attention_tpu"), ("cuda", "attention_triton")]
)
def test_explain_names_the_kernel(platform, kernel):
    """Also for a cache of shapes."""
    shapes = jax.eval_shape(cache_of)
    q = jax.ShapeDtypeStruct((B, 2, M * R, shapes.recent_keys.shape[-1]), shapes.dtype)
    for cache in (cache_of(), shapes):
        plan = cache.explain(q, platform=platform)
        assert (plan.kernel, plan.why_no_kernel) == (kernel, None)
        assert f"runs as the {kernel} kernel on {platform}" in str(plan)
    on_cpu = shapes.explain(q, platform="cpu")
    assert on_cpu.why_no_kernel == "there are no kernels for cpu"
    with pytest.raises(ValueError, match=r"KVCache\.explain: expected"):
        shapes.explain(q.update(shape=q.shape[:3]))


def test_explain_of_a_cache_without_groups():
    cache = jaxq.ops.KVCache.empty(
        "int4", batch=1, num_heads=1, length=16, head_dim=128, dtype="float32"
    )
    assert cache.num_groups == 0
    plan = cache.explain(jnp.ones((1, 1, 1, 128)), platform="tpu")
    assert "no place for quantized groups" in plan.why_no_kernel


def test_no_kernel_runs_in_a_program_for_several_devices():
    _, call = operands_of(cache_of(), 1)

    def choose(platform, num_devices=1):
        problem = call.problem
        return kernels.choose(problem, platform, None, num_devices, family="attention")

    assert choose("tpu").backend == "attention_tpu"
    assert "2 devices" in choose("tpu", 2).reason
    assert "no kernels for rocm" in choose("rocm").reason


def test_on_a_mesh_with_explicit_axes():
    cache = filled(cache_of(length=96, batch=4), (70, 80, 90, 96))
    q = jnp.asarray(np.random.default_rng(2).normal(size=(4, 1, M * R, H)), "float32")
    attend = jax.jit(lambda cache, q: cache.attend(q))
    unsharded = attend(cache, q)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    with jax.set_mesh(mesh):
        y = attend(*jax.device_put((cache, q), sharding))
    np.testing.assert_allclose(y, unsharded, rtol=1e-5, atol=1e-6)
    assert y.sharding.spec[0] == "d"


def test_the_kernel_is_lowered_on_a_mesh_of_one_device_with_explicit_axes():
    cache, q = (
        cache_of("int8", dtype="bfloat16"),
        jnp.ones((B, 1, M * R, H), "bfloat16"),
    )
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh):
        text = lowered_for("tpu", lambda cache, q: cache.attend(q), cache, q)
    assert CUSTOM_CALL["tpu"] in text


def test_forward_derivative_is_that_of_the_xla_form():
    cache, q = filled(cache_of(length=96), (70, 80, 90)), jnp.ones((B, 1, M * R, H))
    _, slope = jax.jvp(cache.attend, (q,), (q,))
    step = 1e-2
    difference = (cache.attend(q + step * q) - cache.attend(q - step * q)) / (2 * step)
    np.testing.assert_allclose(slope, difference, atol=1e-3)
    assert float(jnp.abs(slope).max()) > 1e-2
