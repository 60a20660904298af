"""Weights decoded in blocks of rows: memory, overlapping blocks, gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxq
from jaxq import PerBlock, PerGroup, PerTensor, QuantSpec
from jaxq.kernels import _rows, _xla
from jaxq.qtensor import scale_values
from tests import tables
from tests.arrays import normal_with_outliers
from tests.ops.reference import ROUNDOFF, assert_product, compiled, primitives

MEGABYTES = 2**20
# Codes counted up from the real minimum of each group. No preset does this.
WITH_OFFSET = QuantSpec("uint4", PerGroup(32, pad=True), offset="min")
SPECS = {
    name: jaxq.presets()[name] for name in ("int8", "int4", "nf4_dq", "uint4", "nvfp4")
} | {
    "offset": WITH_OFFSET,
    "tensor": QuantSpec("int8", PerTensor()),
    "blocks": QuantSpec("float8_e4m3fn", PerBlock((32, 16), pad=True)),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 rows: 40 rows are three blocks, and the last two share 8 rows."""
    monkeypatch.setattr(_rows, "_BLOCK_BYTES", 0)


@functools.cache
def weight(name: str) -> jaxq.QTensor:
    return jaxq.quantize(normal_with_outliers(96, 40), SPECS[name])


def plain(x, qt):
    """The product with the dequantized weight, for comparison."""
    return x @ jaxq.dequantize(qt, dtype=jnp.float32)


def assert_close_for_dtype(actual, expected, tolerance=3e-6):
    """Leaf by leaf, up to `tolerance` or two roundings in the dtype of the leaf."""

    def compare(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        if a.dtype != jax.dtypes.float0:
            t = max(tolerance, 2 * ROUNDOFF[a.dtype.name])
            a, b = a.astype(np.float64), b.astype(np.float64)
            np.testing.assert_allclose(
                a, b, rtol=t, atol=t * abs(b).max(), err_msg=jax.tree_util.keystr(path)
            )

    jax.tree.map_with_path(compare, actual, expected)


OVERLAPPING = [
    (name, dtype, m) for name in SPECS for dtype, m in [("float32", 3), ("bfloat16", 1)]
]


@pytest.mark.parametrize(
    ("name", "dtype", "m"),
    tables.thinned(
        OVERLAPPING,
        [("int8", "bfloat16", 1), ("nf4_dq", "bfloat16", 1)]
        + [(name, "float32", 3) for name in ("int4", "nvfp4", "offset", "blocks")],
    ),
)
def test_overlapping_blocks_of_rows(small_blocks, name, dtype, m):
    qt, x, y = (
        weight(name),
        normal_with_outliers(m, 96, dtype=dtype),
        normal_with_outliers(m, 40, dtype=dtype),
    )
    product = functools.partial(jaxq.matmul, preferred_element_type=jnp.float32)
    assert {"while", "scan"} & set(primitives(product, x, qt))
    forward, backward = jax.jit(lambda x, y, qt: (product(x, qt), product(y, qt.T)))(
        x, y, qt
    )
    assert_product(forward, np.matmul, x, qt, 96, weights=dtype)
    assert_product(backward, lambda y, w: y @ w.T, y, qt, 40, weights=dtype)


DECODED = [(name, m, cores) for name in SPECS for m, cores in ((17, 2), (3, 8))]


@pytest.mark.parametrize(
    ("name", "m", "cores"),
    tables.thinned(DECODED, [("int8", 3, 8), ("nf4_dq", 17, 2), ("offset", 3, 8)]),
)
def test_blocks_that_all_cores_decode(small_blocks, monkeypatch, name, m, cores):
    """The form for many rows of x, and for more cores."""
    monkeypatch.setattr(_xla, "num_cores", lambda: cores)
    qt, x = weight(name), normal_with_outliers(m, 96)
    y = jax.jit(lambda x, qt: jaxq.matmul(x, qt))(x, qt)  # not compiled before
    assert_product(y, np.matmul, x, qt, 96)


@pytest.mark.parametrize("name", tables.thinned(SPECS, ["nf4_dq", "offset", "blocks"]))
def test_gradients(small_blocks, name):
    # dy has many sizes and signs, so that a row counted twice or not at all is seen.
    qt, x, dy = (
        weight(name),
        normal_with_outliers(3, 96),
        normal_with_outliers(3, 40, seed=2),
    )

    def loss(multiply):
        return lambda x, qt: jnp.sum(dy * multiply(x, qt))

    gradients = jax.jit(jax.grad(loss(jaxq.matmul), argnums=(0, 1), allow_int=True))(
        x, qt
    )
    assert_close_for_dtype(
        gradients, jax.jit(jax.grad(loss(plain), argnums=(0, 1), allow_int=True))(x, qt)
    )
    assert all(
        np.any(g != 0)
        for g in jax.tree.leaves(gradients)
        if g.dtype != jax.dtypes.float0
    )

    y, dx = normal_with_outliers(3, 40, seed=3), normal_with_outliers(3, 96, seed=4)

    def loss_transposed(multiply):
        return lambda y, qt: jnp.sum(dx * multiply(y, qt))

    gradients = jax.jit(
        jax.grad(loss_transposed(lambda y, q: y @ q.T), argnums=(0, 1), allow_int=True)
    )(y, qt)
    reference = loss_transposed(
        lambda y, q: y @ jaxq.dequantize(q, dtype=jnp.float32).T
    )
    assert_close_for_dtype(
        gradients, jax.jit(jax.grad(reference, argnums=(0, 1), allow_int=True))(y, qt)
    )


@pytest.mark.parametrize("name", tables.thinned(["nf4_dq", "offset"], ["nf4_dq"]))
def test_gradients_under_vmap_scan_and_checkpoint(small_blocks, name):
    layers = [
        jaxq.quantize(normal_with_outliers(40, 40, seed=i), SPECS[name])
        for i in range(3)
    ]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = normal_with_outliers(5, 40) * 0.1

    def through(multiply, checkpoint=False):
        def body(h, layer):
            return jnp.tanh(multiply(h, layer)), None

        body = jax.checkpoint(body) if checkpoint else body
        return lambda x, stack: jnp.sum(jax.lax.scan(body, x, stack)[0] ** 2)

    def gradient(loss):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), allow_int=True))(
            x, stack
        )

    _, expected = gradient(through(plain))
    value, gradients = gradient(through(jaxq.matmul))
    assert_close_for_dtype(gradients, expected, 1e-4)  # errors of three layers
    assert_close_for_dtype(
        gradient(through(jaxq.matmul, checkpoint=True))[1], expected, 1e-4
    )
    product, unrolled = jax.jit(jaxq.matmul), x
    for layer in layers:
        unrolled = jnp.tanh(product(unrolled, layer))
    np.testing.assert_allclose(np.sum(np.square(unrolled)), value, rtol=1e-5)

    mapped = jax.jit(jax.vmap(jaxq.matmul, in_axes=(None, 0)))(x, stack)
    np.testing.assert_allclose(
        mapped, np.stack([product(x, layer) for layer in layers]), rtol=1e-5, atol=1e-5
    )
    rows = jax.jit(jax.vmap(jaxq.matmul, in_axes=(0, None)))(x, layers[0])
    np.testing.assert_allclose(rows, product(x, layers[0]), rtol=1e-5, atol=1e-5)
    slope = jax.grad(lambda x, qt: jnp.sum(jnp.sin(x @ qt)))
    per_row = jax.jit(jax.vmap(slope, in_axes=(0, None)))(x, layers[0])
    np.testing.assert_allclose(
        per_row, jax.jit(slope)(x, layers[0]), rtol=1e-4, atol=1e-5
    )


def test_gradient_of_a_stack_in_one_product(small_blocks):
    stack = jaxq.quantize(
        normal_with_outliers(3, 96, 40), "nf4", contracting=-2, batch=0
    )
    x, dy = normal_with_outliers(3, 5, 96), normal_with_outliers(3, 5, 40, seed=1)
    gradients = jax.jit(
        jax.grad(lambda x, qt: jnp.sum(dy * (x @ qt)), argnums=(0, 1), allow_int=True)
    )(x, stack)
    expected = jax.jit(
        jax.grad(
            lambda x, qt: jnp.sum(dy * plain(x, qt)), argnums=(0, 1), allow_int=True
        )
    )(x, stack)
    assert_close_for_dtype(gradients, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_keep_their_dtypes(dtype):
    qt, x = weight("int4").astype(dtype), normal_with_outliers(3, 96, dtype=dtype)

    def total(x, qt):
        return jnp.sum((x @ qt).astype(jnp.float32))

    dx, dqt = jax.jit(jax.grad(total, argnums=(0, 1), allow_int=True))(x, qt)
    assert dx.dtype == jnp.dtype(dtype)
    assert dqt.scale.dtype == qt.scale.dtype
    assert dqt.data.dtype == jax.dtypes.float0
    expected = jax.jit(
        jax.grad(lambda x, qt: jnp.sum(plain(x.astype(jnp.float32), qt)))
    )(x, qt)
    np.testing.assert_allclose(
        dx.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.1
    )


def test_integer_scales_of_scales_are_left_alone():
    qt = weight("nf4_dq")
    dqt = jax.jit(
        jax.grad(lambda qt: jnp.sum(normal_with_outliers(3, 96) @ qt), allow_int=True)
    )(qt)
    assert dqt.scale.data.dtype == jax.dtypes.float0
    assert float(jnp.abs(dqt.scale.scale).max()) > 0
    assert scale_values(qt).shape == (40, 2)


# A quantized scale for each 16 numbers: the float32 scales of the weight take 4 MB.
MANY_SCALES = {"nvfp4", "vsq4"}


ROWS = [(preset, m) for m in (1, 128) for preset in jaxq.presets()]
MATRICES = [(preset, 128) for preset in tables.REPRESENTATIVES]


@pytest.mark.parametrize(
    ("preset", "m"),
    tables.thinned(
        ROWS,
        [*MATRICES, ("int4", 1), ("int3", 1), ("nvfp4", 1)],
    ),
)
def test_the_weight_is_never_decoded_as_a_whole(preset, m):
    qt = jax.eval_shape(
        lambda w: jaxq.quantize(w, preset),
        jax.ShapeDtypeStruct((4096, 4096), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((m, 4096), jnp.float32)
    program = compiled(lambda x, qt: x @ qt, x, qt)
    assert (
        program.memory_analysis().temp_size_in_bytes
        <= (12 if preset in MANY_SCALES else 9) * MEGABYTES
    )
    assert "f32[4096,4096]" not in program.as_text()


WIDENED = [(preset, m) for preset in ("int8", "int4") for m in (1, 16, 128)]


@pytest.mark.parametrize(
    ("preset", "m"), tables.thinned(WIDENED, [("int8", 16), ("int4", 1), ("int4", 128)])
)
def test_codes_never_widened_as_a_whole(preset, m):
    qt = jax.eval_shape(
        lambda w: jaxq.quantize(w, preset),
        jax.ShapeDtypeStruct((4096, 4096), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((m, 4096), jnp.float32)
    program = compiled(
        lambda x, qt: jaxq.quantize(x, "int8", contracting=-1) @ qt, x, qt
    )
    assert program.memory_analysis().temp_size_in_bytes <= 8 * MEGABYTES


FEW_ROWS = [
    (preset, dtype, m)
    for preset in ("int4", "nf4")
    for dtype in ("float32", "bfloat16")
    for m in (1, 16)
]


@pytest.mark.parametrize(
    ("preset", "dtype", "m"),
    tables.thinned(
        FEW_ROWS,
        [
            ("int4", "float32", 1),
            ("int4", "bfloat16", 16),
            ("nf4", "float32", 16),
            ("nf4", "bfloat16", 1),
        ],
    ),
)
def test_one_core_decodes_for_few_rows(monkeypatch, preset, dtype, m):
    """XLA does not divide the decoding of a block, and bfloat16 runs in float32."""
    monkeypatch.setattr(_xla, "num_cores", lambda: 2)
    qt = jax.eval_shape(
        lambda w: jaxq.quantize(w, preset), jax.ShapeDtypeStruct((4096, 4096), dtype)
    )
    x = jax.ShapeDtypeStruct((m, 4096), dtype)
    program = compiled(lambda x, qt: x @ qt, x, qt)
    assert program.memory_analysis().temp_size_in_bytes <= 3 * MEGABYTES
    text = program.as_text()
    decodings = [
        line
        for line in text.splitlines()
        if "f32[48,4096]" in line
        and "dynamic-update-slice" in line
        and "calls=" in line
    ]
    assert decodings
    assert not any("outer_dimension_partitions" in line for line in decodings)
    # Only scales are in bfloat16: codes have 2048 or 4096 columns.
    assert not re.search(r"bf16\[48,\d{4}\]", text)


@pytest.mark.parametrize("m", [1, 128])
def test_int8_times_4_bits_is_the_product_of_floats(m):
    """Groups are no axis of the product, because the scale multiplies the weight."""
    qt = jaxq.quantize(normal_with_outliers(256, 64), "int4").with_activation("int8")
    text = jax.jit(jaxq.matmul).lower(normal_with_outliers(m, 256), qt).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    # One for each half of the bytes. Many rows are one product with both halves.
    assert len(products) == (2 if m == 1 else 1)
    assert not any("batching_dims" in line for line in products)


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "preset", tables.thinned(["int8", "int4", "mxint8"], ["int8", "mxint8"])
)
def test_products_go_to_the_matrix_library(preset, dtype, m):
    qt = jaxq.quantize(normal_with_outliers(512, 256), preset)
    text = compiled(
        lambda x, qt: x @ qt,
        normal_with_outliers(m, 512, dtype=dtype),
        qt.astype(dtype),
    ).as_text()
    assert "__ynn_fusion" in text or (m, dtype) == (
        1,
        "float32",
    )  # a single float32 row needs no library


@pytest.mark.parametrize(
    "spec", tables.thinned(["int3", "mxint8", "mxfp8", "offset"], ["int3", "mxfp8"])
)
def test_no_transpose_is_folded_into_the_product_of_a_block(small_blocks, spec):
    # XLA would fold a transpose after the product into the product. That form runs
    # without the matrix library in float32, and not at all in bfloat16.
    qt, x = (
        jaxq.quantize(normal_with_outliers(96, 40), SPECS.get(spec, spec)),
        normal_with_outliers(16, 96),
    )
    assert "__ynn_fusion" in compiled(jaxq.matmul, x, qt).as_text()
    half = x.astype("bfloat16"), qt.astype("bfloat16")
    assert_product(
        jax.jit(jaxq.matmul)(*half),
        np.matmul,
        *half,
        96,
        weights="bfloat16",
        dtype="bfloat16",
    )


def test_backward_pass_needs_no_whole_weight_either():
    qt = jax.eval_shape(
        lambda w: jaxq.quantize(w, "nf4"),
        jax.ShapeDtypeStruct((4096, 4096), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((16, 4096), jnp.float32)
    program = compiled(jax.grad(lambda x, qt: jnp.sum((x @ qt) ** 2)), x, qt)
    assert program.memory_analysis().temp_size_in_bytes <= 8 * MEGABYTES


SHARDED = [
    (name, along)
    for name in ("int8", "int4", "nf4_dq")
    for along in ("rows", "columns", "tokens")
]


@pytest.mark.parametrize(
    ("name", "along"),
    tables.thinned(
        SHARDED, [("int8", "rows"), ("int4", "tokens"), ("nf4_dq", "columns")]
    ),
)
def test_sharded_over_devices(small_blocks, name, along):
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    qt, x = (
        jaxq.quantize(normal_with_outliers(256, 64), SPECS[name]),
        normal_with_outliers(8, 256),
    )
    expected = jax.jit(jaxq.matmul)(x, qt)

    def place(leaf, axis):
        split = leaf.ndim > axis and leaf.shape[axis] % 4 == 0
        spec = [None] * leaf.ndim
        if split:
            spec[axis] = "d"
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    if along == "tokens":
        x, qt = place(x, 0), jax.tree.map(lambda leaf: place(leaf, 9), qt)
    else:  # stored as [n, k]
        qt = jax.tree.map(lambda leaf: place(leaf, 0 if along == "rows" else 1), qt)
        x = place(x, 9)
    np.testing.assert_allclose(
        jax.jit(jaxq.matmul)(x, qt), expected, rtol=1e-5, atol=1e-4
    )
