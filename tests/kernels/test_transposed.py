"""The kernels of the backward pass: their arithmetic, and programs that run them."""

import dataclasses
import functools
import importlib
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

import jaxq
from jaxq import kernels
from jaxq.kernels._registry import KERNELS
from tests.arrays import assert_close, normal_with_outliers
from tests.kernels.problems import CODES, error, lowered, operands, problem
from tests.kernels.products import WITH_OFFSET, K, M, N, bfloat16, lowered_for, weight
from tests.tables import thinned

NAMES = tuple(itertools.chain.from_iterable(KERNELS["transposed"].values()))
GROUPS = (32, 64, 128, None)
# The first has no gather.
GENERATIONS = ["TPU v5 lite", "TPU7x"]


def module(name: str):
    return importlib.import_module(f"jaxq.kernels._{name}")


def small(codes: str, group: int | None = 64, **other) -> kernels.Problem:
    facts = {
        "m": 5,
        "k": 256,
        "n": 128,
        "scale_dtype": "bfloat16",
        "out_dtype": "float32",
        "transposed": True,
    }
    return problem(codes, group=group, **facts | other)


def multiply(name: str, p: kernels.Problem, arrays: list, **tiles) -> np.ndarray:
    """The TPU interpreter fills memory that nobody wrote with NaN."""
    kernel = module(name)
    assert kernel.why_not(p, None) is None
    run = functools.partial(
        kernel.matmul,
        problem=p,
        tiles=kernel.default_tiles(p, None) | tiles,
        interpret=pltpu.InterpretParams(uninitialized_memory="nan")
        if name.startswith("tpu")
        else True,
    )
    y = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})(*arrays)
    assert y.shape == (p.e, p.m, p.k)
    assert y.dtype == p.out_dtype
    return np.asarray(y, np.float64)


def check(name: str, p: kernels.Problem, limit: float, **tiles) -> None:
    arrays, expected = operands(p)
    actual = error(multiply(name, p, arrays, **tiles), expected)
    assert actual <= limit, f"{p}: {actual:.1e}"  # NaN fails too


# Arithmetic, against float64.


def layouts(name: str) -> tuple:
    return ("rows", "columns") if name.startswith("tpu") else ("rows",)


@pytest.mark.parametrize(
    ("name", "codes", "group", "layout"),
    thinned(
        [
            (name, codes, group, layout)
            for name in NAMES
            for codes, group in itertools.product(CODES, GROUPS)
            for layout in layouts(name)
        ],
        [
            ("tpu_transposed", "int4", 128, "rows"),
            ("tpu_transposed", "codebook4", 64, "columns"),
            ("triton_transposed", "uint4", 32, "rows"),
            ("triton_transposed", "int8", None, "rows"),
        ],
    ),
)
def test_every_code_group_and_layout(name, codes, group, layout):
    check(name, small(codes, group, layout=layout), 5e-3)


@pytest.mark.parametrize(
    ("name", "codes", "group", "layout"),
    thinned(
        [
            (name, codes, group, layout)
            for name in NAMES
            for codes, group in itertools.product(CODES, (32, 128, None))
            for layout in layouts(name)
        ],
        [
            ("tpu_transposed", "uint4", 128, "rows"),
            ("tpu_transposed", "int8", 32, "columns"),
            ("triton_transposed", "codebook4", 128, "rows"),
            ("triton_transposed", "uint8", 32, "rows"),
        ],
    ),
)
def test_tails_in_every_direction(name, codes, group, layout):
    """Several tiles along m and n, and with small groups along k.

    The last group is not full.
    """
    p = small(codes, group, m=21, k=346, n=200, e=2, layout=layout)
    tiles = {"bm": 16, "bk": 1024 if group == 128 else 256, "bn": 128}
    if name == "triton_transposed":
        tiles = {"bm": 16, "bn": 32, "splits": 3}
    check(name, p, 5e-3, **tiles)


@pytest.mark.parametrize(
    ("name", "codes", "x"),
    thinned(
        itertools.product(NAMES, CODES, ("float32", "float16")),
        [
            ("tpu_transposed", "codebook4", "float32"),
            ("tpu_transposed", "uint4", "float16"),
            ("triton_transposed", "int4", "float32"),
        ],
    ),
)
def test_wide_x(name, codes, x):
    """float32 stays exact. A GPU rounds scaled weights to float16."""
    p = small(codes, 32, k=330, n=130, x_dtype=x, scale_dtype="float32")
    is_exact = x == "float32" or name.startswith("tpu")
    check(name, p, 1e-6 if is_exact else 1e-3)


@pytest.mark.parametrize(
    ("body", "codes"),
    [("gather", "codebook4"), ("select", "codebook4"), ("pre", "uint8")],
)
def test_each_body_for_tpu(body, codes):
    p = small(codes, 64, m=20, k=576, n=130)
    check("tpu_transposed", p, 5e-3, bk=512, bn=256, body=body)


def test_weights_are_rounded_once_as_in_plain_xla():
    """x selects single rows of the weight, so the result has its exact numbers."""
    x = jnp.eye(N, dtype=jnp.bfloat16)
    for preset in ("int4", "nf4"):
        qt = weight(preset, dtype="bfloat16")
        product = functools.partial(
            kernels.quantized_matmul,
            format=qt.spec.format,
            out_dtype=jnp.float32,
        )

        def gradient(x, data, scale, product=product, **options):
            zero = jnp.zeros((N, K), jnp.bfloat16)
            _, pull = jax.vjp(lambda z: product(z, data, scale, **options), zero)
            return pull(x.astype(jnp.float32))[0]

        expected = jax.jit(functools.partial(gradient, backend="xla"))
        for backend in ("tpu", "triton"):
            actual = jax.jit(
                functools.partial(gradient, backend=backend, interpret=True)
            )
            np.testing.assert_array_equal(
                actual(x, qt.data, qt.scale), expected(x, qt.data, qt.scale)
            )


@pytest.mark.parametrize("name", NAMES)
def test_default_tiles_fit(name):
    """VMEM of a TPU, and shared memory of a GPU with 99 KB for a program."""
    for codes, x in itertools.product(CODES, ("bfloat16", "float32")):
        for m, k, group in itertools.product((1, 200, 4096), (4096, 14336), GROUPS):
            p = problem(codes, m=m, k=k, group=group, x_dtype=x, transposed=True)
            tiles = module(name).default_tiles(p, None)
            bm, bn, width = int(tiles["bm"]), int(tiles["bn"]), jnp.dtype(x).itemsize
            if name == "triton_transposed":
                row = bm * width + 128 * p.bits // 8
                assert int(tiles["stages"]) * bn * row <= 99 * 1024
                continue
            bk = int(tiles["bk"])
            data = bk * bn * p.bits // 8
            scales = (1 if p.group == p.k else bk // p.group) * bn * 4
            twice = bm * bn * width + data + scales + bm * bk * width
            decoded = bk * bn * (4 if tiles["body"] == "select" else width)
            assert 2 * twice + bm * bk * 4 + decoded + data <= 12 * 2**20


# Lowering, and reasons.


@pytest.mark.parametrize(
    ("codes", "group", "m", "kind", "layout"),
    thinned(
        itertools.product(CODES, GROUPS, (16, 512), GENERATIONS, ("rows", "columns")),
        [
            (codes, 64, m, kind, layout)
            for codes in ("int4", "codebook4", "uint8")
            for m, kind, layout in (
                (16, "TPU v5 lite", "rows"),
                (512, "TPU7x", "columns"),
            )
        ],
    ),
)
def test_lowers_for_tpu(codes, group, m, kind, layout):
    p = small(codes, group, m=m, k=4096, n=1024, layout=layout)
    kernel = module("tpu_transposed")
    assert "tpu_custom_call" in lowered(kernel, p, kernel.default_tiles(p, kind))


@pytest.mark.parametrize(
    ("codes", "group", "x_dtype", "m"),
    thinned(
        itertools.product(CODES, (32, 128, None), ("bfloat16", "float32"), (1, 512)),
        [
            ("int4", 128, "bfloat16", 1),
            ("codebook4", 32, "float32", 512),
            ("uint8", None, "bfloat16", 512),
        ],
    ),
)
def test_lowers_for_cuda(codes, group, x_dtype, m):
    p = small(codes, group, m=m, k=4096, n=4096, x_dtype=x_dtype)
    kernel = module("triton_transposed")
    assert "triton" in lowered(kernel, p, kernel.default_tiles(p, None))


@pytest.mark.parametrize(
    ("name", "change", "kind", "reason"),
    [
        ("tpu_transposed", {"m": 0}, None, "empty"),
        ("tpu_transposed", {"bits": 2}, None, "int2"),
        ("tpu_transposed", {"group": 16}, None, "groups of 16"),
        ("tpu_transposed", {"x_dtype": "int8"}, None, "int8"),
        ("tpu_transposed", {}, "TPU v4", "TPU v4"),
        ("triton_transposed", {"layout": "columns"}, None, "columns"),
        ("triton_transposed", {"x_dtype": "int8"}, None, "int8"),
        ("triton_transposed", {"group": 16}, None, "not 16"),
    ],
)
def test_why_not_names_the_reason(name, change, kind, reason):
    p = small("int4")
    assert module(name).why_not(p, None) is None
    changed = dataclasses.replace(p, **change)
    assert reason in (module(name).why_not(changed, kind) or "")


@pytest.mark.parametrize(
    ("codes", "change", "tiles", "match"),
    [
        ("int4", {}, {"bk": 256}, "multiples"),
        ("int4", {}, {"body": "post"}, "does not decode int4"),
        ("codebook4", {"x_dtype": "float32"}, {"body": "gather"}, "float32"),
    ],
)
def test_tiles_that_do_not_fit_raise(codes, change, tiles, match):
    p = small(codes, **change)
    with pytest.raises(ValueError, match=match):
        multiply("tpu_transposed", p, operands(p)[0], **tiles)


# Gradients through the primitive.


PACKINGS = ("halves", "low_first", "high_first")
FORMS = [
    (backend, packing, facts)
    for backend in ("tpu", "triton")
    for packing in PACKINGS
    for facts in ("groups", "one group", "short group")
]


@pytest.mark.parametrize(
    ("backend", "packing", "facts"),
    thinned(
        FORMS,
        [
            ("tpu", "halves", "short group"),
            ("triton", "halves", "groups"),
            ("triton", "high_first", "one group"),
        ],
    ),
)
def test_the_columns_of_a_gradient_have_the_order_of_x(backend, packing, facts):
    """k is odd. In HALVES packing a last group that is not full is a shorter unit."""
    n, k, size = 24, {"groups": 127, "one group": 127, "short group": 149}[facts], 32
    padded_k = 150 if facts == "short group" else 128
    group = padded_k if facts == "one group" else size
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (n, padded_k)).astype(np.int8)
    num_groups = -(-padded_k // group)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (n, num_groups)), jnp.float32)
    order = jaxq.formats.Packing(packing)
    unit = group if facts != "one group" else None
    data = jaxq.formats.pack(codes.view(np.uint8) & 15, 4, order, unit=unit)

    @functools.partial(jax.jit, static_argnames=("backend", "interpret"))
    def gradient(dy, data, **options):
        def product(x):
            return kernels.quantized_matmul(
                x,
                data,
                scale,
                packing=packing,
                group_size=None if facts == "one group" else size,
                **options,
            )

        return jax.vjp(product, jnp.zeros((3, k)))[1](dy)[0]

    dy = jnp.asarray(rng.normal(size=(3, n)), jnp.float32)
    actual = gradient(dy, data, backend=backend, interpret=True)
    weights = codes * np.repeat(np.asarray(scale, np.float64), group, 1)[:, :padded_k]
    assert error(actual, np.asarray(dy, np.float64) @ weights[:, :k]) < 1e-6


def test_a_named_kernel_has_second_derivatives_and_vmap():
    qt = weight("int4")

    @functools.partial(jax.jit, static_argnames=("backend", "interpret"))
    def derivatives(x, data, **options):
        def loss(x):
            y = kernels.quantized_matmul(x, data, qt.scale, **options)
            return jnp.sum(jnp.sin(y))

        slope = jax.grad(lambda x: jnp.sum(jnp.cos(jax.grad(loss)(x))))
        return jax.vmap(jax.grad(loss))(x), slope(x[0])

    x = normal_with_outliers(2, 3, K) / 8
    expected = derivatives(x, qt.data, backend="xla")
    for backend in ("tpu", "triton"):
        actual = derivatives(x, qt.data, backend=backend, interpret=True)
        assert_close(actual, expected, 1e-4)


# Programs.

CUSTOM_CALLS = re.compile(
    r"custom_call @(tpu_custom_call|mosaic_gpu_v2|__gpu\$xla\.gpu\.triton)"
)
CALLS = {
    "tpu": ["tpu_custom_call", "tpu_custom_call"],
    "cuda": ["mosaic_gpu_v2", "__gpu$xla.gpu.triton"],
}


def float_sizes(text: str) -> list[int]:
    """The number of elements of each float array in a program."""
    shapes = re.findall(r"tensor<([\dx]+)x(?:bf16|f16|f32)>", text)
    return [int(np.prod([int(size) for size in s.split("x")])) for s in shapes]


@pytest.mark.parametrize("platform", CALLS)
@pytest.mark.parametrize("recipe", ["int4", "nf4"])
def test_an_adapter_on_a_frozen_layer_runs_two_kernels(recipe, platform):
    """One product forward and one backward. No float array has the weight's size.

    Plain XLA decodes 4-bit codes in two halves, so half the size counts, too.
    """
    layer = nnx.Linear(K, N, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    frozen, _ = jaxq.quantize_model(layer, recipe)
    adapter = nnx.LoRA(
        K,
        4,
        N,
        base_module=frozen,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        rngs=nnx.Rngs(1),
    )
    graph, factors, rest = nnx.split(adapter, nnx.LoRAParam, ...)

    def loss(factors, x, rest):
        y = nnx.merge(graph, factors, rest)(x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    gradient = jax.grad(loss, argnums=(0, 1))
    text = lowered_for(platform, gradient, factors, bfloat16(M, K), rest)
    assert CUSTOM_CALLS.findall(text) == CALLS[platform]
    assert max(float_sizes(text)) < K * N // 2


def test_a_gradient_without_a_kernel_decodes_the_weight_and_does_not_warn():
    """What the test above looks for is there if no kernel runs."""
    qt = weight(WITH_OFFSET, dtype="bfloat16")

    def total(x, qt):
        return jnp.sum(x @ qt).astype(jnp.float32)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kernels.FallbackWarning)
        text = lowered_for("cuda", jax.grad(total), bfloat16(M, K), qt)
    assert not CUSTOM_CALLS.findall(text)
    assert max(float_sizes(text)) >= K * N // 2


@pytest.mark.parametrize("platform", CALLS)
def test_vmap_over_gradients_of_a_stack_is_one_kernel(platform):
    stack = weight("int4", dtype="bfloat16", stack=3)

    def dx(x, qt, dy):
        return jax.vjp(lambda x: x @ qt, x)[1](dy)[0]

    text = lowered_for(
        platform, jax.vmap(dx), bfloat16(3, M, K), stack, bfloat16(3, M, N)
    )
    # Nothing reads the result of the forward product, so it is not lowered.
    assert CUSTOM_CALLS.findall(text)[-1:] == CALLS[platform][-1:]
    assert max(float_sizes(text)) < K * N // 2


# Plans.


@pytest.mark.parametrize(
    ("platform", "m", "qt", "kernel", "reason"),
    [
        ("cpu", M, "int4", "xla", "there are no kernels for cpu"),
        ("tpu", M, "int4", "tpu_transposed", None),
        ("tpu", 2048, "nf4", "tpu_transposed", None),
        ("cuda", M, "nf4", "triton_transposed", None),
        ("cuda", 512, "int4", "xla", "decoded once"),
        ("cuda", 65, "nf4", "xla", "decoded once"),
        ("cuda", M, "int3", "xla", "int3 has 3 bits"),
        ("tpu", M, WITH_OFFSET, "xla", "real offsets"),
    ],
)
def test_explain_shows_the_derivative(platform, m, qt, kernel, reason):
    x = jax.ShapeDtypeStruct((m, K), jnp.bfloat16)
    qt = weight(qt, dtype="bfloat16")
    plan = jaxq.explain(x, qt, platform=platform, derivative=True)
    assert (plan.path, plan.kernel) == ("weight_only_transposed", kernel)
    assert (plan.why_no_kernel is None) == (reason is None)
    assert (reason or "") in (plan.why_no_kernel or "")
    if platform == "cpu" or m > 512:
        return

    def total(x, qt):
        return jnp.sum((x @ qt).astype(jnp.float32))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kernels.FallbackWarning)
        text = lowered_for(platform, jax.grad(total), x, qt)
    calls = CUSTOM_CALLS.findall(text)
    assert (calls[-1:] == CALLS[platform][-1:]) == (reason is None)


def test_explain_shows_the_derivative_of_other_products():
    x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
    dy = jax.ShapeDtypeStruct((M, N), jnp.bfloat16)
    qt = weight("int8", dtype="bfloat16")
    explain = functools.partial(jaxq.explain, platform="cuda", derivative=True)
    # The gradient passes straight through a quantized activation.
    assert explain(x, qt.with_activation("int8")).kernel == "triton_transposed"
    # The gradient of a product with a transposed weight is an ordinary product.
    assert explain(dy, qt.T).kernel == "mosaic_gpu"
    assert explain(x, jaxq.dequantize(qt)).path == "dense"
    with pytest.raises(TypeError, match="needs a float operand"):
        explain(weight("int8").T, weight("int8"))
