"""QTensors and the QArrays of qwix: the same codes, and the same numbers in both."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerBlock, PerChannel, PerFlat, PerGroup, PerTensor, QuantSpec
from jaxq.io import from_qwix, to_qwix
from tests import tables

try:
    import qwix
except ImportError:
    qwix = None

# The rows are the same without qwix, so that their number in docs/testing.md is too.
pytestmark = pytest.mark.skipif(
    qwix is None, reason="compares with qwix: pip install jaxq[qwix]"
)


def normal(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), shape).astype(dtype)


def same_bits(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def assert_equal_to_qwix(qt, **axes):
    """`qwix.dequantize` returns the numbers of `qt`, and the way back the codes."""
    qarray = to_qwix(qt)
    numbers = qwix.dequantize(qarray)
    assert same_bits(numbers, jaxq.dequantize(qt))
    back = from_qwix(qarray, **axes)
    assert same_bits(back.codes(), qt.codes())
    assert same_bits(jaxq.dequantize(back), numbers)
    return qarray, back


# In the order: qtype, dtype of the codes, format and scale on the way back.
PRESETS = {
    "fp4_e2m1": ("float4_e2m1fn", "float4_e2m1fn", "float4_e2m1fn", "float32"),
    "fp8": ("float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn", "float32"),
    "fp8_e5m2": ("float8_e5m2", "float8_e5m2", "float8_e5m2", "float32"),
    "int2": ("int2", "int4", "int2", "float32"),
    "int3": ("int3", "int4", "int3", "float32"),
    "int3_absmax": ("int3", "int4", "int3", "float32"),
    "int4": ("int4", "int4", "int4", "float32"),
    "int4_absmax": ("int4", "int4", "int4", "float32"),
    "int8": ("int8", "int8", "int8", "float32"),
    "mxfp4": ("mxfp4", "float4_e2m1fn", "float4_e2m1fn", "float8_e8m0fnu"),
    "mxfp8": ("mxfp8", "float8_e4m3fn", "float8_e4m3fn", "float8_e8m0fnu"),
    "mxfp8_e5m2": ("float8_e5m2", "float8_e5m2", "float8_e5m2", "float32"),
    "mxint8": ("int8", "int8", "int8", "float32"),
    "nf4": ("nf4", "uint4", "nf4", "float32"),
    "nf4_dq": ("nf4", "uint4", "nf4", "float32"),
    "nvfp4": ("float4_e2m1fn", "float4_e2m1fn", "float4_e2m1fn", "float32"),
    "ternary": ("int2", "int4", "int2", "float32"),
    "uint4": ("uint4", "uint4", "uint4", "float32"),
    "uint8": ("uint8", "uint8", "uint8", "float32"),
    "vsq4": ("int4", "int4", "int4", "float32"),
}
OFTEN = ("fp8", "int2", "int8", "mxfp4", "nf4_dq", "nvfp4", "uint4")


@pytest.mark.parametrize("preset", tables.thinned(PRESETS, OFTEN))
def test_presets(preset):
    qtype, dtype, fmt, scale = PRESETS[preset]
    qt = jaxq.quantize(normal(256, 8), preset)
    qarray, back = assert_equal_to_qwix(qt)
    name = qarray.qtype if isinstance(qarray.qtype, str) else qarray.qtype.name
    assert (name, qarray.qvalue.dtype.name) == (qtype, dtype)
    assert (back.spec.fmt.name, back.spec.scale) == (fmt, scale)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_other_widths(bits):
    spec = QuantSpec(f"int{bits}", PerGroup(32))
    assert_equal_to_qwix(jaxq.quantize(normal(64, 8), spec))


def test_the_other_presets_are_refused():
    w = normal(256, 8)
    for preset in set(jaxq.presets()) - set(PRESETS):
        reason = "a trained codebook" if preset == "ttq" else "qwix does not have the"
        with pytest.raises(ValueError, match=f"{reason}.* Quantize with a spec that"):
            to_qwix(jaxq.quantize(w, preset))


# Shape, spec, roles of the axes, and the shape of the scales of the QArray.
BLOCKS = [
    ((64, 8), QuantSpec("int8", PerTensor()), {}, (1, 1)),
    ((64, 8), QuantSpec("int8", PerChannel()), {"contracting": -1}, (64, 1)),
    ((64, 8), QuantSpec("int4", PerGroup(16)), {}, (4, 8)),
    ((64, 8), QuantSpec("int4", PerGroup(4), symmetric=False), {"contracting": -1}, ()),
    ((64, 8), QuantSpec("float8_e4m3fn", PerBlock((16, 4))), {}, (4, 2)),
    ((64,), QuantSpec("int8", PerGroup(16)), {}, (4,)),
    ((3, 64, 8), QuantSpec("nf4", PerGroup(16)), {"batch": 0}, (3, 4, 8)),
    ((3, 64, 8), QuantSpec("int8", PerTensor()), {"batch": 0}, (3, 1, 1)),
    ((4, 16, 8), QuantSpec("int8", PerChannel()), {"contracting": (0, 1)}, (1, 1, 8)),
    ((4, 16, 8), QuantSpec("int4", PerGroup(8)), {"contracting": (0, 1)}, (4, 2, 8)),
    ((4, 16, 8), QuantSpec("int4", PerGroup(32)), {"contracting": (0, 1)}, (2, 1, 8)),
    ((8, 4, 16), QuantSpec("int4", PerGroup(16)), {"contracting": (0, 2)}, (8, 4, 1)),
]


@pytest.mark.parametrize(("shape", "spec", "axes", "scales"), BLOCKS)
def test_blocks_and_axes(shape, spec, axes, scales):
    axes = {"contracting": -2, **axes} if len(shape) > 1 else axes
    if axes.get("batch") == 0:
        axes["batch"] = (0,)
    qt = jaxq.quantize(normal(*shape), spec, **axes)
    qarray, back = assert_equal_to_qwix(qt, **axes)
    assert qarray.scale.shape == (scales or (64, 2))
    assert back.spec.granularity == spec.granularity
    assert back.meta.geometry == qt.meta.geometry


QTYPES = [
    (jnp.int8, "minmax"),
    (jnp.int4, "absmax"),
    *((name, "absmax") for name in ("int2", "int3", "int5", "int6", "int7", "nf4")),
    *((name, "absmax") for name in ("mxfp8", "mxfp4", "nvfp4")),
    (jnp.float8_e5m2, "absmax"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("qtype", "method"), QTYPES)
def test_what_qwix_quantized(qtype, method, dtype):
    w = normal(64, 8, dtype=dtype)
    with jax.numpy_dtype_promotion("standard"):  # as qwix needs for nf4
        qarray = qwix.quantize(
            w,
            qtype,
            channelwise_axes=[1],
            tiled_axes={0: 16 if qtype == "nvfp4" else 32},
            calibration_method=method,
        )
    qt = from_qwix(qarray)
    numbers = np.asarray(qwix.dequantize(qarray), np.float64)
    if qtype == "nf4" and dtype == "bfloat16":
        # qwix rounds the table to bfloat16 before it multiplies.
        np.testing.assert_allclose(jaxq.dequantize(qt), numbers, rtol=2**-7)
    else:
        np.testing.assert_array_equal(jaxq.dequantize(qt), numbers)
    assert qt.dtype == dtype
    again = to_qwix(qt)
    assert jax.tree.structure(again) == jax.tree.structure(qarray)
    assert same_bits(again.qvalue, qarray.qvalue)
    assert same_bits(again.scale, qarray.scale)


def test_products_agree():
    w, x = normal(64, 8), normal(4, 64)
    qt = jaxq.quantize(w, QuantSpec("int4", PerGroup(16)))
    theirs = qwix.dot_general(x, to_qwix(qt), (((1,), (0,)), ((), ())))
    np.testing.assert_allclose(x @ qt, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scale", "dtype", "expected"),
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "bfloat16", "float32"),
        ("float32", "float16", "float32"),
        ("float8_e4m3fn", "float16", "float16"),
        ("float8_e8m0fnu", "float16", "float32"),
        ("float8_e8m0fnu", "bfloat16", "bfloat16"),
    ],
)
def test_scales_stay_exact(scale, dtype, expected):
    spec = QuantSpec("int4", PerGroup(16), scale=scale)
    qt = jaxq.quantize(normal(64, 8, dtype=dtype), spec)
    qarray = to_qwix(qt)
    assert qarray.scale.dtype == expected
    np.testing.assert_array_equal(
        np.asarray(qarray.scale, np.float64).T, np.asarray(qt.scale, np.float64)
    )


def test_trees_and_jit():
    tree = {"w": jaxq.quantize(normal(64, 8), "int8"), "b": jnp.ones(8)}

    @jax.jit
    def there_and_back(tree):
        there = jax.tree.map(
            lambda leaf: to_qwix(leaf) if jaxq.qtensor.is_qtensor(leaf) else leaf,
            tree,
            is_leaf=jaxq.qtensor.is_qtensor,
        )
        return {**there, "w": from_qwix(there["w"])}

    back = there_and_back(tree)
    assert same_bits(back["w"].data, tree["w"].data)
    assert back["w"].meta == tree["w"].meta


def test_what_a_qarray_cannot_hold():
    w = normal(64, 8)
    cases = {
        "its blocks cross rows": jaxq.quantize(w, QuantSpec("int8", PerFlat(32))),
        "the last of its blocks of 24 is not full": jaxq.quantize(
            w, QuantSpec("int8", PerGroup(24, pad=True))
        ),
        r"its groups of 4 are no tiles of the axes \[4, 6\]": jaxq.quantize(
            normal(4, 6, 2), QuantSpec("int8", PerGroup(4)), contracting=(0, 1)
        ),
        "it has an offset": jaxq.quantize(
            w, QuantSpec("uint4", PerGroup(32), offset="min")
        ),
        "it has an input_scale": jaxq.quantize(w, "int8").with_input_scale(
            jnp.full(64, 2.0)
        ),
        "it has no elements": jaxq.quantize(jnp.zeros((0, 8)), "int8"),
    }
    for reason, qt in cases.items():
        with pytest.raises(ValueError, match=f"a QArray cannot hold .*: {reason}"):
            to_qwix(qt)
    with pytest.raises(TypeError, match="to_qwix: expected a QTensor, got Array"):
        to_qwix(w)


def test_what_a_qtensor_cannot_hold():
    qarray = to_qwix(jaxq.quantize(normal(64, 8), QuantSpec("int4", PerGroup(16))))

    def refused(message, changed, error=ValueError, **arguments):
        with pytest.raises(error, match=message):
            from_qwix(changed, **arguments)

    refused("expected a qwix.QArray, got dict", {}, TypeError)
    replace = qarray.replace
    refused("does not have the qtype 'int9x'", replace(qtype="int9x"))
    refused("outside the range of int2", replace(qtype="int2"))
    refused("a scale is not finite", replace(scale=qarray.scale * jnp.inf))
    refused("do not divide the QArray", replace(scale=qarray.scale[:3]))
    refused("batch elements share a scale", qarray, contracting=1, batch=(0,))
    refused("scales are not exact in bfloat16", qarray, scale="bfloat16")
    refused("scale must be one of|scale", qarray, scale="int8")
    zero = jnp.zeros((4, 8), jnp.int4)
    finer = qarray.replace(scale=qarray.scale[:1], zero_point=zero)
    refused("vary where the scales", finer)
    with pytest.raises(ValueError, match="under jit, the conversion of scales from"):
        jax.jit(lambda q: from_qwix(q, scale="bfloat16"))(qarray)
    shared = qarray.replace(zero_point=zero[:1, :1])
    expected = np.asarray(qwix.dequantize(shared))
    np.testing.assert_array_equal(jaxq.dequantize(from_qwix(shared)), expected)


def test_without_qwix(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"pip install jaxq\[qwix\]"):
        to_qwix(jaxq.quantize(jnp.eye(4), "int8"))
