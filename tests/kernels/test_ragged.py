"""Rows sorted by expert: items, kernels in interpreters, and what is lowered."""

import dataclasses
import functools
import itertools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

import jaxq
from jaxq import kernels
from jaxq.kernels import Call, _ragged_tpu, _ragged_triton
from jaxq.kernels._call import with_leaves
from jaxq.kernels._ragged_items import most_items, rows_with_experts, work_items
from jaxq.kernels._ragged_primitive import ragged_form, ragged_kernel_form
from jaxq.ops import ragged_dot
from jaxq.ops._weight_rows import row_meta, weight_rows
from tests.arrays import assert_same, normal, normal_with_outliers
from tests.kernels.problems import CODES, error, operands, problem
from tests.kernels.products import WITH_OFFSET, h200, lowered_for
from tests.tables import thinned

KERNELS = {"ragged_tpu": _ragged_tpu, "ragged_triton": _ragged_triton}
CUSTOM_CALL = {"tpu": "tpu_custom_call", "cuda": "xla.gpu.triton"}
BM = 16
# Interpreted kernels are long programs.
FAST = {"xla_backend_optimization_level": 0}
# Rows of each expert, and rows of x.
SIZES = {
    "uneven": ([3, 0, 20, 9], 40),
    "whole tiles": ([16, 16, 0, 8], 40),
    "one expert": ([0, 0, 37, 0], 37),
    "a row": ([0, 1, 0, 0], 1),
    "no rows": ([0, 0, 0, 0], 20),
    "tiles of no expert": ([2, 1, 0, 0], 50),
    "a single expert": ([33], 40),
    "many experts in a tile": ([1, 2, 1, 0, 3, 1, 0, 4, 1, 0, 2, 1], 16),
}


# The items.


def expected_items(sizes, num_rows, bm, shared):
    """Tile, expert, first and last row of each item that has rows."""
    b, e = sizes.shape
    per_element = num_rows // b
    items = []
    for tile in range(-(-num_rows // bm)):
        for i, j in itertools.product(range(b), range(e)):
            first = i * per_element + sizes[i, :j].sum()
            last = min(first + sizes[i, j], (i + 1) * per_element)
            if max(first, tile * bm) < min(last, (tile + 1) * bm):
                items.append((tile, j if shared else i * e + j, first, last))
    return items


@pytest.mark.parametrize(
    ("b", "e", "rows_of_element", "bm", "shared"),
    [
        (1, 1, 5, 8, True),
        (1, 7, 29, 4, True),
        (1, 12, 9, 4, False),
        (3, 5, 10, 4, True),
        (3, 5, 10, 8, False),
        (4, 3, 8, 8, False),
    ],
)
def test_items_are_the_pairs_of_tile_and_expert(b, e, rows_of_element, bm, shared):
    """An expert without rows is in no item, so kernels cannot read it."""
    num_rows = b * rows_of_element
    run = jax.jit(lambda sizes: work_items(sizes, num_rows, bm, shared_weights=shared))
    rng = np.random.default_rng(b * e)
    for _ in range(200):
        total = rng.integers(0, rows_of_element + 1)
        share = rng.dirichlet(np.full(e, 0.3))
        sizes = rng.multinomial(total, share, size=b)
        items = [np.asarray(numbers) for numbers in run(sizes.astype(np.int32))]
        tile, expert, first, last = items
        assert len(tile) == most_items(num_rows, b * e, bm)
        has_rows = first < last
        pairs = zip(*(numbers[has_rows] for numbers in items), strict=True)
        assert list(pairs) == expected_items(sizes, num_rows, bm, shared)
        # The items of a tile are neighbours, and every tile has one.
        assert (np.diff(tile) >= 0).all()
        assert set(tile) == set(range(-(-num_rows // bm)))
        # An idle item repeats the expert of the item before, so nothing is loaded.
        idle = np.flatnonzero(~has_rows)
        follows = idle[np.cumsum(has_rows)[idle] > 0]
        assert (expert[follows] == expert[follows - 1]).all()


def test_sizes_beyond_the_rows_of_x_stay_inside():
    run = jax.jit(lambda sizes: work_items(sizes, 20, 8, shared_weights=True))
    items = run(np.array([[5, 90, 3, 4]], np.int32))
    assert int(items.last_row.max()) == 20
    assert set(np.asarray(items.expert)) == {0, 1}


# The kernels in interpreters.


def sorted_rows(p, sizes):
    """x `[m, k]` sorted by expert, the other arrays, and the float64 result.

    Experts without rows have NaN scales, and rows of no expert are NaN.
    """
    (x, data, scale, zero_point, codebook), products = operands(p)
    x_rows = np.full((p.m, p.k), np.nan, x.dtype)
    expected = np.zeros((p.m, p.n))
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        x_rows[rows] = np.asarray(x)[expert, rows]
        expected[rows] = products[expert, rows]
        start += size
    is_empty = (np.asarray(sizes) == 0)[:, None, None]
    scale = jnp.where(is_empty, jnp.nan, scale).astype(scale.dtype)
    return jnp.asarray(x_rows), [data, scale, zero_point, codebook], expected


def multiply(name, p, x, arrays, sizes, **tiles) -> np.ndarray:
    module = KERNELS[name]
    assert module.why_not(p, None) is None
    tiles = module.default_tiles(p, None) | {"bm": BM} | tiles
    sizes = jnp.asarray([sizes], jnp.int32)
    interpret = True
    if name == "ragged_tpu":
        interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    else:
        data, scale, zero_point, codebook = arrays
        swapped = [a if a is None else a.swapaxes(1, 2) for a in (scale, zero_point)]
        arrays = [data, *swapped, codebook]

    def run(x, sizes, *arrays):
        items = work_items(sizes, p.m, tiles["bm"], shared_weights=True)
        y = module.matmul(
            x, *arrays, items, problem=p, tiles=tiles, interpret=interpret
        )
        if name == "ragged_tpu":
            return y
        return jnp.where(rows_with_experts(sizes, p.m)[:, None], y, 0)

    y = jax.jit(run, compiler_options=FAST)(x, sizes, *arrays)
    assert y.shape == (p.m, p.n)
    assert y.dtype == jnp.float32
    return np.asarray(y, np.float64)


@pytest.mark.parametrize(
    ("name", "codes", "group", "layout"),
    thinned(
        [
            case
            for case in itertools.product(
                KERNELS, CODES, (32, 64, 128, None), ("rows", "columns")
            )
            if case[0] == "ragged_tpu" or case[3] == "rows"
        ],
        [
            ("ragged_tpu", "int4", 128, "rows"),
            ("ragged_tpu", "codebook4", 64, "columns"),
            ("ragged_tpu", "uint8", None, "rows"),
            ("ragged_triton", "uint4", 64, "rows"),
            ("ragged_triton", "codebook4", None, "rows"),
            ("ragged_triton", "int8", 128, "rows"),
        ],
    ),
)
def test_codes_and_groups_against_float64(name, codes, group, layout):
    sizes, m = SIZES["uneven"]
    p = problem(codes, e=len(sizes), m=m, k=256, n=136, group=group, layout=layout)
    x, arrays, expected = sorted_rows(p, sizes)
    # The scaled weights of some bodies are rounded to bfloat16 once.
    assert error(multiply(name, p, x, arrays, sizes), expected) < 4e-3


@pytest.mark.parametrize(
    ("name", "sizes"),
    thinned(
        itertools.product(KERNELS, SIZES),
        [
            ("ragged_tpu", "one expert"),
            ("ragged_tpu", "tiles of no expert"),
            ("ragged_tpu", "many experts in a tile"),
            ("ragged_triton", "a row"),
            ("ragged_triton", "no rows"),
            ("ragged_triton", "whole tiles"),
        ],
    ),
)
def test_sizes_against_float64(name, sizes):
    sizes, m = SIZES[sizes]
    floats = dict.fromkeys(("x_dtype", "out_dtype"), "float32")
    p = problem("int4", e=len(sizes), m=m, k=640, n=72, group=64, **floats)
    x, arrays, expected = sorted_rows(p, sizes)
    tiles = {"bk": 512} if name == "ragged_tpu" else {"splits": 3}
    y = multiply(name, p, x, arrays, sizes, **tiles)
    np.testing.assert_allclose(y, expected, atol=3e-5 * (abs(expected).max() + 1e-9))
    assert (y[sum(sizes) :] == 0).all()


@functools.cache
def experts(preset="int4", e=3, k=256, n=136, dtype="bfloat16", layout="rows"):
    w = normal_with_outliers(e, k, n, dtype=dtype)
    return jaxq.relayout(jaxq.quantize(w, preset, contracting=-2, batch=0), layout)


def call_of(weights):
    """Static facts and leaves `[e, ...]` of the primitive."""
    rows = jax.vmap(lambda weight: weight_rows(weight)[0])(weights)
    return with_leaves(Call(row_meta(weights.meta), (), "float32"), rows)


@pytest.mark.parametrize(
    ("name", "preset", "shared"),
    thinned(
        itertools.product(KERNELS, ("int4", "nf4_dq", "uint4", "uint8"), (True, False)),
        [("ragged_tpu", "nf4_dq", False), ("ragged_triton", "uint4", True)],
    ),
)
def test_batches_of_qtensors_against_the_xla_form(name, preset, shared):
    """With b batch elements, the rows of no expert lie between those of experts."""
    b, m, sizes = 2, 21, jnp.array([[5, 0, 7], [0, 12, 9]])
    weights = [experts(preset), experts(preset, dtype="float32")]
    call, leaves = call_of(weights[0])
    leaves = [leaf[None] for leaf in leaves]
    if not shared:
        _, others = call_of(weights[1])
        pairs = zip(leaves, others, strict=True)
        leaves = [jnp.concatenate([a, o[None].astype(a.dtype)]) for a, o in pairs]
    x = normal(b, m, 256)
    form = functools.partial(
        ragged_kernel_form, call=call, kernel=name, interpret=True, tiles={"bm": BM}
    )
    y = jax.jit(form, compiler_options=FAST)(x, sizes, *leaves)
    xla_form = jax.jit(functools.partial(ragged_form, call=call))
    expected = np.asarray(xla_form(x, sizes, *leaves), np.float64)
    assert error(y, expected) < 3e-6


@pytest.mark.parametrize(
    ("name", "preset", "codes"),
    thinned(
        itertools.product(
            KERNELS, ("int4", "uint4", "int8"), ("int8", "float8_e4m3fn", "float8_e5m2")
        ),
        [("ragged_tpu", "int4", "int8"), ("ragged_triton", "uint4", "float8_e5m2")],
    ),
)
def test_codes_are_multiplied_without_rounding(name, preset, codes):
    call, leaves = call_of(experts(preset))
    sizes, m = [5, 0, 14], 21
    x = np.clip(np.asarray(normal(m, 256)) * 40, -127, 127)
    x = jnp.asarray(x).astype(codes)
    form = functools.partial(ragged_kernel_form, call=call, kernel=name, interpret=True)
    if name == "ragged_tpu" and codes != "int8" and preset != "int8":
        # The matrix unit of v7x multiplies float8.
        form = functools.partial(form, device_kind="TPU7x")
    operands = x[None], jnp.array([sizes]), *(leaf[None] for leaf in leaves)
    y = jax.jit(form, compiler_options=FAST)(*operands)[0]
    w = np.asarray(jaxq.dequantize(experts(preset), dtype="float32"), np.float64)
    x = np.asarray(x.astype("float32"), np.float64)
    parts = [x[:5] @ w[0], x[5:19] @ w[2], np.zeros((2, 136))]
    # bfloat16 weights would give an error of more than 1e-3.
    assert error(y, np.concatenate(parts)) < 2e-6
    xla_form = jax.jit(functools.partial(ragged_form, call=call))
    assert error(xla_form(*operands)[0], np.concatenate(parts)) < 2e-6


# The primitive.


def operands_of(weights, m=40):
    k, e = weights.shape[1], weights.shape[0]
    sizes = jnp.array([3, 0, 30, *[0] * (e - 3)], jnp.int32)
    return normal(m, k, dtype=weights.dtype), weights, sizes


def test_eager_and_jit_have_the_same_bits():
    arguments = operands_of(experts())
    assert_same(ragged_dot(*arguments), jax.jit(ragged_dot)(*arguments))
    with jax.disable_jit():
        assert_same(ragged_dot(*arguments), jax.jit(ragged_dot)(*arguments))


@pytest.mark.parametrize("mapped", [(0, None, 0), (0, 0, 0), (None, 0, None)])
def test_vmap_equals_a_loop(mapped):
    x, weights, sizes = operands_of(experts(dtype="float32"))
    stacks = (
        jnp.stack([x, 2 * x]),
        jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), weights),
        jnp.stack([sizes, sizes[::-1]]),
    )
    single = (x, weights, sizes)
    arguments = [
        one if axis is None else stack
        for one, stack, axis in zip(single, stacks, mapped, strict=True)
    ]
    y = jax.jit(jax.vmap(ragged_dot, in_axes=mapped))(*arguments)
    single_product = jax.jit(ragged_dot)
    for i in range(2):
        of_element = [
            a if axis is None else jax.tree.map(lambda leaf: leaf[i], a)  # noqa: B023
            for a, axis in zip(arguments, mapped, strict=True)
        ]
        np.testing.assert_allclose(
            y[i], single_product(*of_element), rtol=2e-5, atol=2e-5
        )


def test_two_vmaps_equal_two_loops():
    x, weights, sizes = operands_of(experts(dtype="float32"))
    factors = jnp.array([1.0, 2.0, 3.0])

    def product(a, c):
        return ragged_dot(a * c * x, weights, sizes)

    rows = jax.vmap(product, in_axes=(None, 0))
    y = jax.jit(jax.vmap(rows, in_axes=(0, None)))(factors, factors)
    products = jnp.outer(factors, factors)[:, :, None, None]
    expected = products * ragged_dot(x, weights, sizes)[None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_a_scan_over_layers_of_experts_equals_a_loop():
    x, weights, sizes = operands_of(experts(n=256, dtype="float32"))
    layers = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), weights)

    def step(x, layer):
        return jnp.tanh(ragged_dot(x, layer, sizes)), None

    y = jax.lax.scan(step, x, layers)[0]
    loop = x
    for i in range(2):
        loop = step(loop, jax.tree.map(lambda a: a[i], layers))[0]  # noqa: B023
    np.testing.assert_allclose(y, loop, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gradients_are_those_of_the_float_products(layout):
    x, weights, sizes = operands_of(experts("uint4", dtype="float32", layout=layout))
    dy = normal(40, 136, seed=1)

    def float_loss(x):
        y = jax.lax.ragged_dot(x, jaxq.dequantize(weights), sizes)
        return jnp.sum(dy * y)

    dx = jax.jit(jax.grad(lambda x: jnp.sum(dy * ragged_dot(x, weights, sizes))))(x)
    expected = np.asarray(jax.grad(float_loss)(x), np.float64)
    assert error(dx, expected) < 1e-5


def test_forward_mode_is_the_derivative_of_the_float_product():
    """For x, and for the scales; forward over reverse as well."""
    spec = jaxq.QuantSpec("uint4", jaxq.PerGroup(64), symmetric=False, scale="float32")
    x, weights, sizes = operands_of(experts(spec, dtype="float32"))
    scale, x_dot = weights.scale, normal(*x.shape, seed=5)
    scale_dot = normal(*scale.shape, seed=6)

    def derivatives(product):
        def loss(x, scale):
            qt = dataclasses.replace(weights, scale=scale)
            return jnp.sum(jnp.sin(product(x, qt)))

        gradient = jax.grad(loss, argnums=(0, 1))
        tangents = (x_dot, scale_dot)
        _, loss_dot = jax.jvp(loss, (x, scale), tangents)
        _, gradient_dot = jax.jvp(gradient, (x, scale), tangents)
        return loss_dot, *gradient_dot

    results = jax.jit(lambda: derivatives(lambda x, qt: ragged_dot(x, qt, sizes)))()
    expected = jax.jit(
        lambda: derivatives(
            lambda x, qt: jax.lax.ragged_dot(x, jaxq.dequantize(qt), sizes)
        )
    )()
    for a, b in zip(results, expected, strict=True):
        assert error(a, np.asarray(b, np.float64)) < 2e-5


def test_forward_mode_runs_the_kernel():
    """For the product and for its derivative along x."""
    x, weights, sizes = operands_of(experts())

    def derivative(x, weights):
        return jax.jvp(lambda x: ragged_dot(x, weights, sizes), (x,), (x,))

    text = lowered_for("tpu", derivative, x, weights)
    assert text.count("@tpu_custom_call") == 2


def test_emulation_rounds_inside_the_product():
    x, weights, sizes = operands_of(experts(dtype="float32"))
    coarse = jaxq.emulation.Policy(operands="bfloat16")
    y = jaxq.emulate(ragged_dot, coarse)(x, weights, sizes)
    exact = np.asarray(ragged_dot(x, weights, sizes), np.float64)
    assert 1e-4 < error(y, exact) < 1e-2


# What is lowered.


def largest_float_array(text):
    """The largest number of floats in an array of a program."""
    shapes = re.findall(r"tensor<((?:\d+x)+)(?:f32|bf16)>", text)
    return max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)


@pytest.mark.parametrize("preset", ["int4", "nf4"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_kernel_is_lowered_and_no_decoded_weight(platform, preset):
    weights = experts(preset, e=8, k=512, n=512)
    arguments = operands_of(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lowered_for(platform, ragged_dot, *arguments)
    assert CUSTOM_CALL[platform] in text
    num_weights = 8 * 512 * 512
    assert largest_float_array(text) < num_weights / 16
    # No codes are moved.
    moved = r"stablehlo\.(transpose|gather|convert|pad|concat).*tensor<[\dx]+xu?i8>"
    assert not re.search(moved, text)
    # The XLA form decodes a block of rows of every expert.
    assert largest_float_array(lowered_for("cpu", ragged_dot, *arguments)) > 2**17


def test_transformations_keep_the_kernel():
    x, weights, sizes = operands_of(experts())
    layers = jax.tree.map(lambda a: jnp.stack([a, a]), weights)

    def mapped(x, layers):
        return jax.vmap(lambda layer: ragged_dot(x, layer, sizes))(layers)

    def scanned(x, layers):
        return jax.lax.scan(
            lambda _, layer: (None, ragged_dot(x, layer, sizes)), None, layers
        )

    def gradient(x, layers):
        layer = jax.tree.map(lambda a: a[0], layers)
        return jax.value_and_grad(lambda x: jnp.sum(ragged_dot(x, layer, sizes)))(x)

    with warnings.catch_warnings():
        # A derivative runs in plain XLA, and nobody expects a kernel there.
        warnings.simplefilter("error", kernels.FallbackWarning)
        for f in (mapped, scanned, gradient):
            text = lowered_for("tpu", f, x, layers)
            assert text.count("@tpu_custom_call") == 1


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_kernel_runs_inside_shard_map(platform):
    """Each device has some of the experts, and rows of its own."""
    weights = experts("nf4", e=4)
    x, sizes = normal(2 * 16, 256, dtype="bfloat16"), jnp.array([3, 9, 10, 6])
    device = h200() if platform == "cuda" else None
    mesh = AbstractMesh((2,), ("d",), (AxisType.Auto,), abstract_device=device)
    specs = PartitionSpec("d")
    f = jax.shard_map(
        lambda x, w, sizes: ragged_dot(x, w, sizes),
        mesh=mesh,
        in_specs=specs,
        out_specs=specs,
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(f).trace(x, weights, sizes)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert CUSTOM_CALL[platform] in text


def test_gradients_inside_shard_map_are_sums_over_devices():
    """Each device has rows of its own. All devices have the same scales."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    weights = experts("int8", n=24, dtype="float32")
    x, sizes = normal(2 * 20, 256), jnp.array([3, 0, 10])

    def loss(x, scale):
        qt = dataclasses.replace(weights, scale=scale)
        return jnp.sum(jnp.sin(ragged_dot(x, qt, sizes)))

    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    specs = (PartitionSpec("d"), PartitionSpec())
    total = jax.shard_map(
        lambda x, scale: jax.lax.psum(loss(x, scale), "d"),
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec(),
    )
    dx, dscale = jax.jit(jax.grad(total, (0, 1)))(x, weights.scale)
    parts = [jax.grad(loss, (0, 1))(half, weights.scale) for half in jnp.split(x, 2)]
    np.testing.assert_allclose(dx, jnp.concatenate([p[0] for p in parts]), 1e-5, 1e-5)
    np.testing.assert_allclose(dscale, parts[0][1] + parts[1][1], 1e-5, 1e-4)


# The choice.


@pytest.mark.parametrize(
    ("platform", "preset", "layout", "kernel", "reason"),
    [
        ("cpu", "int4", "rows", "xla", "there are no kernels for cpu"),
        ("rocm", "int4", "rows", "xla", "there are no kernels for rocm"),
        ("tpu", "int4", "columns", "ragged_tpu", None),
        ("tpu", "nf4_dq", "rows", "ragged_tpu", None),
        ("cuda", "int4", "rows", "ragged_triton", None),
        ("cuda", "uint8", "rows", "ragged_triton", None),
        ("cuda", "int4", "columns", "xla", '"rows", not "columns"'),
        ("tpu", "int3", "rows", "xla", "int3 has 3 bits, and kernels take 4 and 8"),
        ("cuda", "fp8", "rows", "xla", "only of integer formats"),
        ("tpu", "vsq4", "rows", "xla", "not groups of 16"),
        ("tpu", WITH_OFFSET, "rows", "xla", "real offsets"),
    ],
)
def test_explain_names_the_kernel_and_the_reason(
    platform, preset, layout, kernel, reason
):
    x, weights, sizes = operands_of(experts(preset, layout=layout))
    plan = jaxq.explain(x, weights, group_sizes=sizes, platform=platform)
    assert plan.kernel == kernel
    assert (plan.path, plan.accumulate, plan.x_dtype) == (
        "weight_only",
        "float32",
        "bfloat16",
    )
    if reason is None:
        assert plan.why_no_kernel is None
    else:
        assert re.search(reason, plan.why_no_kernel)
    if platform == "rocm":
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", kernels.FallbackWarning)
        text = lowered_for(platform, ragged_dot, x, weights, sizes)
    messages = [str(w.message) for w in caught if w.category is kernels.FallbackWarning]
    if platform == "cpu" or reason is None:
        assert not messages
    else:
        assert any(re.search(reason, message) for message in messages)
    if platform != "cpu":
        assert (CUSTOM_CALL[platform] in text) == (reason is None)


def test_explain_checks_its_operands():
    x, weights, sizes = operands_of(experts())
    shape = jax.ShapeDtypeStruct((3,), jnp.int32)
    assert jaxq.explain(x, weights, group_sizes=shape, platform="tpu").kernel != "xla"
    with pytest.raises(ValueError, match=r"explain: x must be .* group_sizes \[3\]"):
        jaxq.explain(x, weights, group_sizes=sizes[:2])
    with pytest.raises(TypeError, match="explain: weights must be a QTensor"):
        jaxq.explain(x, x, group_sizes=sizes)
    codes = jaxq.quantize(x, "int8", contracting=-1)
    with pytest.raises(TypeError, match="ragged_dot: x must be .* got QTensor"):
        ragged_dot(codes, weights, sizes)
    with pytest.raises(TypeError, match="explain: x must be .* got QTensor"):
        jaxq.explain(codes, weights, group_sizes=sizes)
    with pytest.raises(ValueError, match="Leave out dimension_numbers"):
        jaxq.explain(x, weights, (((1,), (1,)), ((), ())), group_sizes=sizes)
    with pytest.raises(ValueError, match="gradient runs in plain XLA"):
        jaxq.explain(x, weights, group_sizes=sizes, derivative=True)
    scaled = weights.with_input_scale(jnp.ones((3, 256)))
    assert jaxq.explain(x, scaled, group_sizes=sizes).before == ("scale_left",)


@pytest.mark.parametrize("is_ragged", [True, False])
def test_forward_derivatives_for_scales_and_then_for_x(is_ragged):
    """The product is linear in both, so the derivative along both is the product."""
    x, weights, sizes = operands_of(experts(dtype="float32"))
    weights = weights if is_ragged else weights[0]
    scale = weights.scale

    def product(x, scale):
        scaled = dataclasses.replace(weights, scale=scale)
        return ragged_dot(x, scaled, sizes) if is_ragged else x @ scaled

    def along_scale(x):
        return jax.jvp(functools.partial(product, x), (scale,), (scale,))[1]

    _, y = jax.jvp(along_scale, (x,), (x,))
    np.testing.assert_allclose(y, product(x, scale), 1e-4, 1e-3)


def test_derivatives_do_not_warn():
    """A user cannot act on a warning about a derivative."""
    x, weights, sizes = operands_of(experts("int3"))

    def tangent(x, x_dot, weights, sizes):
        product = functools.partial(ragged_dot, group_sizes=sizes)
        return jax.jvp(lambda x: product(x, weights), (x,), (x_dot,))[1]

    with warnings.catch_warnings():
        warnings.simplefilter("error", kernels.FallbackWarning)
        lowered_for("tpu", tangent, x, x, weights, sizes)


def test_choices_without_a_kernel_have_reasons():
    def choose(p, platform="tpu", kind=None, num_devices=1):
        return kernels.choose(p, platform, kind, num_devices, family="ragged")

    p = problem("int4", e=8, k=256, n=128)
    assert choose(p)[:2] == ("ragged_tpu", None)
    assert "shard_map" in choose(p, num_devices=4).reason
    assert "for TPU v4" in choose(p, kind="TPU v4").reason
    assert "int8 x" in choose(problem("int4", e=8, x_dtype="int8")).reason
    assert choose(problem("int4", e=8, m=0)).preferred


@pytest.mark.parametrize(
    ("e", "m", "kernel"),
    [
        (2, 1023, "ragged_triton"),
        (2, 1024, "xla"),
        # XLA would multiply each row by the weights of all 8 experts.
        (8, 8192, "ragged_triton"),
    ],
)
def test_many_rows_of_few_experts_are_dense_on_a_gpu(e, m, kernel):
    p = problem("int4", e=e, m=m)
    choice = kernels.choose(p, "cuda", "NVIDIA H200", family="ragged")
    assert choice.backend == kernel
    assert choice.preferred == (kernel == "xla")
