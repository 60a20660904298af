"""The product on raw arrays: against float64, exact for integers, and every error."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import formats
from jaxq.kernels import quantized_matmul
from tests.arrays import normal_with_outliers
from tests.tables import thinned

GROUPS = {"g32": 32, "g64": 64, "g128": 128, "channel": None}


@functools.cache
def numbers_of(fmt):
    """The number of each code."""
    numbers = {
        int(c): float(v)
        for c, v in zip(fmt.codes(), jax.jit(fmt.decode)(fmt.codes()), strict=True)
    }
    assert set(numbers.values()) == {float(v) for v in fmt.values()}
    return numbers


multiply = jax.jit(quantized_matmul, static_argnames=("format", "layout", "packing"))
pack = jax.jit(formats.pack, static_argnums=(1, 2), static_argnames="unit")


def packed(name, group, n=24, k=256, *, layout="rows", packing=None, seed=0):
    """Random codes as arguments of `quantized_matmul`.

    Returns:
      (data, scale), the other arguments, the decoded matrix `[n, k]` in float64, and
      the codes `[n, k]`.
    """
    rng = np.random.default_rng([seed, n, k, group or 0])
    fmt = formats.get(name)
    packing = formats.default_packing(fmt.bits) if packing is None else packing
    group = group or k
    padded = -(-k // group) * group
    codes = rng.choice(fmt.codes(), (n, padded)).astype(fmt.code_dtype)
    scale = rng.uniform(0.5, 1.5, (n, padded // group)).astype(np.float32) / 64
    numbers = np.vectorize(numbers_of(fmt).get)(codes).astype(np.float64)
    zero = None
    if name.startswith("uint"):
        zero = rng.integers(0, 2**fmt.bits, scale.shape).astype(np.uint8)
        numbers = numbers - np.repeat(zero, group, 1)
    matrix = (numbers * np.repeat(scale, group, 1).astype(np.float64))[:, :k]
    unit = group if padded != group and packing is formats.Packing.HALVES else None
    data = (
        codes
        if packing is formats.Packing.NONE
        else np.asarray(pack(codes, fmt.bits, packing, unit=unit))
    )
    data = jnp.asarray(data.T if layout == "columns" else data)
    options = {"format": name, "layout": layout, "packing": packing}
    if zero is not None:
        options["zero_point"] = jnp.asarray(zero)
    return (data, jnp.asarray(scale)), options, matrix, codes[:, :k]


NAMES = ("int4", "uint4", "nf4", "float4_e2m1fn", "int8", "uint8")


@pytest.mark.parametrize(
    ("name", "group", "layout"),
    thinned(
        itertools.product(NAMES, GROUPS, ("rows", "columns")),
        [
            *zip(
                NAMES, [*GROUPS, "g64", "channel"], ["rows", "columns"] * 3, strict=True
            )
        ],
    ),
)
def test_against_float64(name, group, layout):
    arrays, options, matrix, _ = packed(name, GROUPS[group], layout=layout)
    x = normal_with_outliers(5, 256)
    y = multiply(x, *arrays, **options)
    exact = np.asarray(x, np.float64) @ matrix.T
    assert np.linalg.norm(y - exact) <= 1e-6 * np.linalg.norm(exact)
    narrow = multiply(x.astype(jnp.bfloat16), *arrays, **options)
    assert narrow.dtype == jnp.bfloat16
    exact = np.asarray(x.astype(jnp.bfloat16), np.float64) @ matrix.T
    assert np.linalg.norm(
        np.asarray(narrow, np.float64) - exact
    ) <= 5e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "packing",
    [packing for packing in formats.Packing if packing is not formats.Packing.NONE],
)
@pytest.mark.parametrize("k", [256, 200])
def test_orders_of_codes_in_bytes(packing, k):
    arrays, options, matrix, _ = packed("int4", 64, k=k, packing=packing)
    x = normal_with_outliers(5, k)
    expected = np.asarray(x, np.float64) @ matrix.T
    np.testing.assert_allclose(multiply(x, *arrays, **options), expected, 1e-4, 1e-4)
    y = quantized_matmul(x, *arrays, **options, backend="triton", interpret=True)
    np.testing.assert_allclose(y, expected, 1e-4, 1e-4)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_integers_are_exact(name, layout):
    (data, scale), options, _, codes = packed(name, None, layout=layout)
    x = np.random.default_rng(1).integers(-128, 128, (5, 256)).astype(np.int8)
    sums = quantized_matmul(jnp.asarray(x), data, None, **options)
    expected = x.astype(np.int64) @ codes.T.astype(np.int64)
    assert sums.dtype == jnp.int32
    np.testing.assert_array_equal(sums, expected)
    scaled = quantized_matmul(jnp.asarray(x), data, scale, **options)
    np.testing.assert_array_equal(
        scaled, expected.astype(np.float32) * np.asarray(scale)[:, 0]
    )


def test_a_codebook_of_the_caller():
    (data, scale), options, _, codes = packed("nf4", 64)
    table = np.sort(np.random.default_rng(0).standard_normal(16).astype(np.float32))
    x = normal_with_outliers(5, 256)

    def product(table):
        return quantized_matmul(x, data, scale, **options, codebook=table)

    y = product(table)
    matrix = np.asarray(table, np.float64)[codes] * np.repeat(
        np.asarray(scale, np.float64), 64, 1
    )
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ matrix.T, 1e-4, 1e-5)
    slope = jax.jit(jax.grad(lambda t: jnp.sum(product(t))))(table)
    counted = np.einsum(
        "mk,nk,nkc->c", x, np.repeat(scale, 64, 1), codes[..., None] == np.arange(16)
    )
    np.testing.assert_allclose(slope, counted, 1e-3, 1e-4)


def test_stacks_and_leading_axes():
    parts = [packed("int4", 64, seed=i) for i in range(3)]
    data, scale = (np.stack([p[0][i] for p in parts]) for i in range(2))
    x = normal_with_outliers(3, 2, 5, 256)
    y = multiply(x, data, scale, **parts[0][1])
    expected = np.einsum(
        "ebmk,enk->ebmn", np.asarray(x, np.float64), np.stack([p[2] for p in parts])
    )
    np.testing.assert_allclose(y, expected, 1e-4, 1e-4)
    one = multiply(x, data[0], scale[0], **parts[0][1])
    np.testing.assert_allclose(np.asarray(one)[0], np.asarray(y)[0], 1e-5, 1e-5)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 24, 256), (5, 0, 256), (0, 0, 256)])
def test_nothing_to_compute(m, n, k):
    (data, scale), options, *_ = packed("int4", 64)
    y = quantized_matmul(jnp.ones((m, k)), data[:n], scale[:n], **options)
    assert y.shape == (m, n)
    assert (
        quantized_matmul(
            jnp.ones((m, k), jnp.int8), data[:n, :128], None, format="int4"
        ).dtype
        == jnp.int32
    )


def test_is_the_same_as_the_product_of_a_qtensor():
    w, x = normal_with_outliers(100, 24), normal_with_outliers(5, 100)
    for name in ("int4", "nf4", "uint4", "int8"):
        qt = jaxq.quantize(w, name)
        y = quantized_matmul(
            x,
            qt.data,
            qt.scale,
            format=qt.spec.fmt,
            zero_point=qt.zero_point,
            group_size=qt.meta.geometry.block_shape[-1],
        )
        np.testing.assert_array_equal(y, x @ qt)


def _bad(**changes):
    (data, scale), options, *_ = packed("int4", 64)
    arguments = {
        "x": jnp.ones((5, 256)),
        "data": data,
        "scale": scale,
        **options,
    } | changes
    return quantized_matmul(
        arguments.pop("x"), arguments.pop("data"), arguments.pop("scale"), **arguments
    )


ones = jnp.ones
ERRORS = {
    "x too long": (
        {"x": ones((5, 300))},
        ValueError,
        r"k = 300, and each row of data holds 256 codes in 4 groups",
    ),
    "x too short": (
        {"x": ones((5, 100))},
        ValueError,
        r"k = 100, and each row of data holds 256",
    ),
    "groups do not divide": (
        {"scale": ones((24, 3))},
        ValueError,
        r"3 groups do not divide the 256 codes of a row",
    ),
    "groups of an unlikely size": (
        # A QTensor of 192 numbers in groups of 128 has such data.
        {
            "x": ones((5, 192)),
            "data": ones((24, 96), jnp.uint8),
            "scale": ones((24, 2)),
        },
        ValueError,
        r"would be groups of 96, which is not a power of two",
    ),
    "groups of another size": (
        {"group_size": 100},
        ValueError,
        r"the 256 codes of a row are not 4 groups of 100 codes",
    ),
    "scale of other rows": (
        {"scale": ones((20, 4))},
        ValueError,
        r"scale must have shape \[24,4\].*scale: float32\[20,4\]",
    ),
    "scale for columns": (
        {"scale": ones((4, 24))},
        ValueError,
        r"scale must have shape \[24,24\]",
    ),
    "zero point of another shape": (
        {"zero_point": ones((24, 1), jnp.int8)},
        ValueError,
        r"zero_point must have shape \[24,4\]",
    ),
    "zero point of another dtype": (
        {"zero_point": ones((24, 4), jnp.int32)},
        TypeError,
        r"which is int8 for int4",
    ),
    "codes not packed": (
        {"data": ones((24, 256), jnp.int8)},
        TypeError,
        r"data must be uint8 for int4 packed as",
    ),
    "codes packed": (
        {"format": "int8", "packing": "none", "data": ones((24, 256), jnp.uint8)},
        TypeError,
        r"data must be int8",
    ),
    "integer x": (
        {"x": ones((5, 256), jnp.int32)},
        TypeError,
        r"x must be .* int8 \(x: int32\[5,256\]",
    ),
    "int8 x and a table": (
        {"x": ones((5, 256), jnp.int8), "format": "nf4"},
        TypeError,
        r"nf4 is not an integer format",
    ),
    "floats without scale": (
        {"scale": None},
        TypeError,
        r"scale may be None only if x is int8",
    ),
    "integer scale": (
        {"scale": ones((24, 4), jnp.int32)},
        TypeError,
        r"scale must be bfloat16, float16 or float32",
    ),
    "a table for integers": (
        {"codebook": ones((16,))},
        ValueError,
        r"codebook needs a codebook format",
    ),
    "a result of integers": (
        {"out_dtype": jnp.int32},
        TypeError,
        r"out_dtype must be float32",
    ),
    "stack of another size": (
        {
            "x": ones((2, 5, 256)),
            "data": ones((3, 24, 128), jnp.uint8),
            "scale": ones((3, 24, 4)),
        },
        ValueError,
        r"x has 2 stacked matrices and data has 3",
    ),
    "four axes": (
        {"data": ones((1, 1, 24, 128), jnp.uint8)},
        ValueError,
        r"data must be a matrix, or a stack",
    ),
    "unknown backend": (
        {"backend": "tpus"},
        ValueError,
        r"backend must be one of .*Did you mean 'tpu'",
    ),
    "unknown layout": ({"layout": "column"}, ValueError, r"Did you mean 'columns'"),
    "unknown packing": ({"packing": "halfs"}, ValueError, r"Did you mean 'halves'"),
    "the TPU kernel on short groups": (
        {"backend": "tpu", "scale": jnp.ones((24, 16))},
        ValueError,
        r"the tpu kernel cannot compute this product: .*not groups of 16",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_came(case):
    changes, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        _bad(**changes)


@pytest.mark.parametrize(
    ("backend", "layout", "platform"),
    [("tpu", "columns", "tpu"), ("triton", "rows", "cuda")],
)
def test_a_named_kernel_raises_on_another_platform(backend, layout, platform):
    arrays, options, *_ = packed("int4", 64, layout=layout)
    message = f"the {backend} kernel runs on {platform}, .* lowered for cpu.*interpret"
    with pytest.raises(ValueError, match=message):
        quantized_matmul(
            normal_with_outliers(5, 256), *arrays, **options, backend=backend
        )


def test_sums_that_int32_may_not_hold():
    k = 2**18
    with pytest.raises(ValueError, match="int32 can sum 131071 of these"):
        jax.eval_shape(
            lambda x, d: quantized_matmul(x, d, None, format="int8"),
            jax.ShapeDtypeStruct((1, k), jnp.int8),
            jax.ShapeDtypeStruct((1, k), jnp.int8),
        )


BACKENDS = [
    ("rows", "tpu"),
    ("columns", "tpu"),
    ("rows", "triton"),
    ("rows", "mosaic_gpu"),
]


@pytest.mark.parametrize(
    ("name", "layout", "backend"),
    thinned(
        [(name, *backend) for name in ("int4", "nf4") for backend in BACKENDS],
        [("nf4", *BACKENDS[0]), ("nf4", *BACKENDS[2]), ("int4", *BACKENDS[3])],
    ),
)
def test_interpreters_through_the_public_function(name, layout, backend):
    """The steps before a kernel: order of codes, scales along k, a format's table."""
    arrays, options, matrix, _ = packed(name, 64, n=64, layout=layout)
    x = normal_with_outliers(5, 256).astype(jnp.bfloat16)
    y = quantized_matmul(x, *arrays, **options, backend=backend, interpret=True)
    exact = np.asarray(x, np.float64) @ matrix.T
    assert np.linalg.norm(np.asarray(y, np.float64) - exact) <= 5e-3 * np.linalg.norm(
        exact
    )


PARTIAL = [
    (name, *backend, 320 if backend[1] == "mosaic_gpu" else 330)
    for name in ("int4", "nf4", "int8")
    for backend in (*BACKENDS, ("columns", "xla"))
]


@pytest.mark.parametrize(
    ("name", "layout", "backend", "k"),
    thinned(
        PARTIAL,
        [
            ("nf4", "rows", "tpu", 330),
            ("int4", "rows", "triton", 330),
            ("nf4", "rows", "mosaic_gpu", 320),
            ("int4", "columns", "xla", 330),
        ],
    ),
)
def test_a_last_group_that_is_not_full(name, layout, backend, k):
    """The codes of a QTensor end inside a group. No kernel needs padding."""
    spec = jaxq.QuantSpec(name, jaxq.PerGroup(128, pad=True), scale="bfloat16")
    qt = jaxq.relayout(jaxq.quantize(normal_with_outliers(k, 64), spec), layout)
    bits = jaxq.formats.get(name).bits
    assert qt.data.shape[0 if layout == "columns" else 1] == k * bits // 8
    x = normal_with_outliers(5, k, dtype="bfloat16")
    options = {"format": name, "layout": layout, "group_size": 128}
    kernel = {"backend": backend, "interpret": backend != "xla"}
    y = quantized_matmul(x, qt.data, qt.scale, **options, **kernel)
    exact = np.asarray(x, np.float64) @ np.asarray(jaxq.dequantize(qt), np.float64)
    error = np.linalg.norm(np.asarray(y, np.float64) - exact)
    assert error <= 5e-3 * np.linalg.norm(exact)


def test_a_named_kernel_has_derivatives():
    (data, scale), options, matrix, _ = packed("int4", 64, n=64, layout="columns")

    def loss(x, scale, **how):
        return jnp.sum(quantized_matmul(x, data, scale, **options, **how))

    x = normal_with_outliers(5, 256)
    y = jax.jit(
        jax.grad(functools.partial(loss, backend="tpu", interpret=True), argnums=(0, 1))
    )(x, scale)
    np.testing.assert_allclose(
        y[0], np.broadcast_to(matrix.sum(0), (5, 256)), 1e-4, 1e-4
    )
    np.testing.assert_allclose(
        y[1], jax.jit(jax.grad(loss, argnums=1))(x, scale), 1e-4, 1e-4
    )


def test_sums_that_int32_may_not_hold_run_in_xla():
    k = 2**17 + 256
    arrays = (
        np.full((8, k), -128, np.int8),
        np.full((k, 128), -128, np.int8),
        np.ones((128, 1), np.float32),
    )
    options = {"format": "int8", "layout": "columns"}
    np.testing.assert_allclose(multiply(*arrays, **options), 128.0 * 128.0 * k, 1e-6)
    with pytest.raises(ValueError, match="int32 can sum 131071 products"):
        quantized_matmul(*arrays, **options, backend="tpu", interpret=True)


def test_empty_stacks_and_more_errors():
    data, scale = jnp.zeros((24, 128), jnp.uint8), jnp.ones((24, 4))
    assert quantized_matmul(
        jnp.ones((0, 5, 256)), jnp.zeros((0, 24, 128), jnp.uint8), jnp.ones((0, 24, 4))
    ).shape == (*(0, 5, 24),)
    x = jnp.ones((5, 256))
    with pytest.raises(
        ValueError, match="scale has no groups, and each row of data holds 256 codes"
    ):
        quantized_matmul(x, data, jnp.ones((24, 0)))
    with pytest.raises(TypeError, match="codebook must be"):
        quantized_matmul(
            x, data, scale, format="nf4", codebook=jnp.ones(16, jnp.complex64)
        )
    with pytest.raises(ValueError, match=r"one table \[16\] for the whole stack"):
        quantized_matmul(x, data, scale, format="nf4", codebook=jnp.ones((2, 16)))
    with pytest.raises(ValueError, match="needs a kernel's name"):
        quantized_matmul(x, data, scale, interpret=True)
