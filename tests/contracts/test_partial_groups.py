"""Weights whose last group is not full. Its padding is computed with, but not stored.

Earlier versions stored codes for the padding. The numbers are the same to the bit.
"""

import dataclasses
import io
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxq
from jaxq import PerBlock, PerChannel, PerFlat, PerGroup, PerTensor, QuantSpec, formats
from jaxq.methods import gptq
from jaxq.qtensor import decode_blocks, requantize, without_padding
from tests.arrays import assert_same, normal_with_outliers
from tests.tables import thinned

K, N = 75, 12
GRANULARITIES = {
    "32": PerGroup(32, pad=True),
    "5": PerGroup(5, pad=True),
    "7": PerGroup(7, pad=True),
    "tiles": PerBlock((32, 8), pad=True),
    "odd tiles": PerBlock((7, 5), pad=True),
    "flat": PerFlat(32),
    "channel": PerChannel(),
    "tensor": PerTensor(),
}
FORMATS = {
    "int8": {},
    "int4": {"scale": "bfloat16"},
    "int3": {"scale_rule": "signed_extreme"},
    "uint4": {"symmetric": False},
    "uint2": {"symmetric": False},
    "nf4": {"scale": QuantSpec("udynamic8", PerFlat(8))},
    "float8_e4m3fn": {"scale": "float8_e8m0fnu"},
    "float6_e2m3fn": {},
    "float4_e2m1fn": {"packing": "low_first"},
    "binary": {"scale_rule": "absmean"},
    "ternary": {"scale_rule": "ttq"},
    "uint8": {"offset": "min"},
}
SPECS = {
    (fmt, name): QuantSpec(fmt, granularity, **fields)
    for fmt, fields in FORMATS.items()
    for name, granularity in GRANULARITIES.items()
}


def test_padding_has_no_bytes():
    """320 rows in groups of 128 had 4.95 bits when the padding was stored."""
    w = jax.ShapeDtypeStruct((320, 16), jnp.float32)
    for scale in ("bfloat16", "float16"):
        spec = QuantSpec("int4", PerGroup(128, pad=True), scale=scale)
        qt = jax.eval_shape(lambda w, spec=spec: jaxq.quantize(w, spec), w)
        assert (qt.data.shape, qt.scale.shape) == ((16, 160), (16, 3))
        assert qt.nbytes == 16 * (160 + 3 * 2)
        assert qt.bits_per_element == pytest.approx(4.15)


def with_stored_padding(qt: jaxq.QTensor) -> jaxq.QTensor:
    """The QTensor as earlier versions stored it: codes for whole blocks."""
    meta = qt.meta
    assert qt.stored_codes().shape[-1] % (meta.pack_unit or 1) == 0
    data = formats.pack(
        qt.stored_codes(), qt.spec.fmt.bits, meta.packing, unit=meta.pack_unit
    )
    return dataclasses.replace(qt, data=data)


def numbers_with_padding(qt: jaxq.QTensor) -> jax.Array:
    """What earlier versions computed from codes for whole blocks."""
    geometry, fmt = qt.meta.geometry, qt.spec.fmt
    codes = formats.unpack(qt.data, fmt.bits, qt.meta.packing, unit=qt.meta.pack_unit)
    if fmt.code_dtype == np.int8:
        codes = formats.as_signed(codes, fmt.bits)
    blocks = geometry.to_blocks(geometry.to_view_order(codes))
    values = geometry.from_blocks(decode_blocks(qt, blocks))
    return geometry.from_view(geometry.unpad(values))


@pytest.mark.parametrize(
    ("fmt", "blocks"),
    thinned(
        SPECS,
        [("uint2", "tiles"), ("nf4", "32"), ("int3", "7")],
    ),
)
def test_numbers_are_those_of_stored_padding(fmt, blocks):
    w, spec = normal_with_outliers(K, N), SPECS[fmt, blocks]

    @jax.jit
    def both(w):
        qt = jaxq.quantize(w, spec)
        old = with_stored_padding(qt)
        again = without_padding(old)
        return qt, again, old.data, jaxq.dequantize(qt), numbers_with_padding(old)

    qt, again, old_data, values, old_values = both(w)
    assert_same(again, qt)
    assert_same(values, old_values)
    num_rows, k = (1, K * N) if blocks == "flat" else (N, K)
    per_pack = formats.codes_per_pack(qt.spec.fmt.bits, qt.meta.packing)
    num_codes = num_rows * -(-k // per_pack) * per_pack
    assert qt.data.nbytes == num_codes * qt.spec.fmt.bits // 8
    is_padded = qt.meta.geometry.padded_shape != qt.meta.stored_sizes
    assert (old_data.nbytes > qt.data.nbytes) == is_padded


def quantized(fmt: str, blocks: str) -> jaxq.QTensor:
    return jaxq.quantize(normal_with_outliers(K, N), SPECS[fmt, blocks])


USES = thinned(
    [case for case in SPECS if case[1] in ("32", "7", "tiles")],
    [("int4", "32"), ("uint4", "7")],
)


@pytest.mark.parametrize(("fmt", "blocks"), USES)
def test_products_and_their_gradients(fmt, blocks):
    qt = quantized(fmt, blocks)
    x, y = normal_with_outliers(3, K), normal_with_outliers(3, N)

    def results(w):
        products = jax.vjp(lambda x: x @ w, x)
        (dx,) = products[1](y)
        return products[0], dx, y @ w.T

    actual = jax.jit(results)(qt)
    expected = jax.jit(results)(jaxq.dequantize(qt))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fmt", "blocks"), USES)
def test_new_codes_other_orders_and_fake_quant(fmt, blocks):
    w, other = normal_with_outliers(K, N), normal_with_outliers(K, N, seed=1)
    spec = SPECS[fmt, blocks]

    @jax.jit
    def run(w, other):
        qt = jaxq.quantize(w, spec)
        columns = jaxq.relayout(qt, "columns")
        values = {
            "": jaxq.dequantize(qt),
            "fake_quant": jaxq.fake_quant(w, spec),
            "columns": jaxq.dequantize(columns),
            "again": jaxq.dequantize(qt.with_codes(qt.codes())),
        }
        old = without_padding(with_stored_padding(qt))
        return qt, values, requantize(other, qt), requantize(other, old)

    qt, values, new, same = run(w, other)
    for name, numbers in values.items():
        assert np.array_equal(numbers, values[""]), name
    assert new.data.shape == qt.data.shape
    assert_same(new, same)
    assert not np.array_equal(new.data, qt.data)
    assert_same(pickle.load(io.BytesIO(pickle.dumps(qt))), qt)


def test_rows_of_tables_and_layers_of_stacks():
    spec = SPECS["int4", "32"]
    table = jaxq.quantize(normal_with_outliers(N, K), spec, contracting=-1)
    ids = np.array([3, 0])
    rows = jaxq.ops.take(table, ids)
    np.testing.assert_array_equal(rows, np.asarray(jaxq.dequantize(table))[ids])
    layers, x = normal_with_outliers(2, K, N), normal_with_outliers(3, K)
    stack = jaxq.quantize(layers, spec, contracting=-2, batch=0)
    _, ys = jax.lax.scan(lambda c, layer: (c, x @ layer), 0, stack)
    expected = np.asarray(x) @ np.asarray(jaxq.dequantize(stack))
    np.testing.assert_allclose(ys, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "blocks", "fmt"),
    thinned(
        itertools.product(("int8", "uint8"), ("32", "channel"), ("int4", "uint4")),
        [("uint8", "32", "uint4"), ("int8", "channel", "int4")],
    ),
)
def test_codes_times_codes(activation, blocks, fmt):
    """Padding of either operand decodes to zero, also beside a zero point."""
    symmetric = activation == "int8"
    spec = QuantSpec(activation, GRANULARITIES[blocks], symmetric=symmetric)
    qx = jaxq.quantize(normal_with_outliers(3, K), spec, contracting=-1)
    qt = quantized(fmt, "32")
    assert jaxq.explain(qx, qt).path == "codes"
    expected = jaxq.dequantize(qx) @ jaxq.dequantize(qt)
    np.testing.assert_allclose(jax.jit(jaxq.matmul)(qx, qt), expected, 1e-4, 1e-4)


@pytest.mark.heavy
def test_gptq():
    spec, x = SPECS["uint4", "32"], normal_with_outliers(256, K)
    qt, info = gptq(normal_with_outliers(K, N), x.T @ x, spec)
    assert qt.data.shape == (N, -(-K // 2))
    assert not info.fell_back
    nearest = jaxq.quantize(normal_with_outliers(K, N), spec)

    def loss(qt):
        return jnp.sum((x @ (jaxq.dequantize(qt) - normal_with_outliers(K, N))) ** 2)

    assert loss(qt) < loss(nearest)


@pytest.mark.parametrize(
    "kind", thinned([AxisType.Auto, AxisType.Explicit], [AxisType.Explicit])
)
def test_sharded_weights(kind):
    """Both axes are sharded, and a shard of k ends inside a group."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    w, x = normal_with_outliers(80, N), normal_with_outliers(4, 80)
    spec = SPECS["int4", "32"]
    expected = jaxq.quantize(w, spec)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
        qt = jaxq.qtensor.shard_like(expected, jax.device_put(w, sharding))
        assert qt.data.sharding.spec == PartitionSpec("model", "data")
        y = jax.jit(jaxq.matmul)(x, qt)
    np.testing.assert_allclose(y, x @ expected, rtol=1e-4, atol=1e-4)
