"""The layouts of bitsandbytes, against the package and against bytes that it wrote."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.io import layouts
from tests.io.layouts.cases import kernel

FOUR_BIT = layouts.get("bitsandbytes_4bit")
INT8 = layouts.get("bitsandbytes_int8")
TABLES = {"nf4": "nf4", "fp4": "float4_bitsandbytes"}


def packages():
    torch = pytest.importorskip("torch", reason="bitsandbytes needs torch")
    bnb = pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")
    torch.compiler.set_stance("force_eager")  # compiling takes longer than all tests
    return torch, bnb


def stored(torch, bnb, w, kind, nested, blocksize=64):
    """The arrays that bitsandbytes saves, and the floats that it computes."""
    weight = bnb.nn.Params4bit(
        torch.from_numpy(w.copy()),
        requires_grad=False,
        quant_type=kind,
        compress_statistics=nested,
        blocksize=blocksize,
    ).to("cpu")
    tensors = {"weight": weight.data.numpy()}
    for name, value in weight.quant_state.as_dict(packed=True).items():
        tensors[f"weight.{name}"] = value.numpy()
    floats = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return tensors, floats.numpy()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 128), (7, 65), (3, 5)])
def test_weights_of_bitsandbytes(kind, nested, shape):
    torch, bnb = packages()
    tensors, floats = stored(torch, bnb, kernel(0, shape), kind, nested)
    qt = FOUR_BIT.to_qtensor(tensors)
    assert qt.shape == shape[::-1]
    assert qt.spec.fmt.name == TABLES[kind]
    # bitsandbytes may fuse the product and the sum of a nested scale.
    np.testing.assert_allclose(
        jaxq.dequantize(qt).T, floats, rtol=1e-6 if nested else 0, atol=0
    )
    again, _ = FOUR_BIT.from_qtensor(qt)
    assert set(again) == set(tensors)
    for name, array in tensors.items():
        if "quant_state" in name:
            read = [json.loads(bytes(t[name])) for t in (array_of(again), tensors)]
            assert read[0] == read[1]
        else:
            np.testing.assert_array_equal(np.asarray(again[name]), array, err_msg=name)


def array_of(tensors):
    return {name: np.asarray(array) for name, array in tensors.items()}


@pytest.mark.parametrize("preset", ["nf4", "nf4_dq"])
def test_bitsandbytes_reads_the_presets(preset):
    torch, bnb = packages()
    qt = jaxq.quantize(jnp.asarray(kernel(3, (128, 96))), preset)
    tensors, config = FOUR_BIT.from_qtensor(qt)
    assert config["bnb_4bit_use_double_quant"] == (preset == "nf4_dq")
    arrays = {n: torch.from_numpy(np.array(a)) for n, a in tensors.items()}
    packed = arrays.pop("weight")
    stats = {name.removeprefix("weight."): a for name, a in arrays.items()}
    state = bnb.functional.QuantState.from_dict(stats, device=torch.device("cpu"))
    floats = bnb.functional.dequantize_4bit(packed, state).numpy()
    np.testing.assert_allclose(jaxq.dequantize(qt).T, floats, rtol=1e-6, atol=0)


def test_llm_int8_weights_of_bitsandbytes():
    torch, bnb = packages()
    w = kernel(4, (48, 64))
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(torch.from_numpy(w).half())
    floats = bnb.functional.int8_vectorwise_dequant(codes, absmax).numpy()
    tensors = {"weight": codes.numpy(), "SCB": absmax.numpy()}
    qt = INT8.to_qtensor(tensors)
    np.testing.assert_allclose(jaxq.dequantize(qt).T, floats, rtol=3e-7)
    again, _ = INT8.from_qtensor(qt)
    np.testing.assert_array_equal(again["weight"], tensors["weight"])
    np.testing.assert_allclose(again["SCB"], tensors["SCB"], rtol=3e-7)


STEPS = (((np.arange(256) * 37) % 101 - 50) / 16).astype(np.float32)
# Bytes that bitsandbytes 0.50 wrote.
GOLDEN = "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1"


def test_bytes_of_a_file():
    w = STEPS.reshape(8, 32).T
    spec = FOUR_BIT.spec({"bnb_4bit_quant_type": "nf4"})
    tensors, _ = FOUR_BIT.from_qtensor(jaxq.quantize(jnp.asarray(w), spec))
    assert np.asarray(tensors["weight"]).tobytes().hex().startswith(GOLDEN)
    assert tensors["weight.absmax"].tolist() == [3.125] * 4
    state = bytes(tensors["weight.quant_state.bitsandbytes__nf4"])
    assert state.decode() == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 32]}'
    )


def four_bit_tensors():
    qt = jaxq.quantize(jnp.asarray(kernel(5, (64, 4))), FOUR_BIT.spec({}))
    return array_of(FOUR_BIT.from_qtensor(qt)[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_codes_may_be_stored_as_another_dtype(dtype):
    tensors = four_bit_tensors()
    expected = FOUR_BIT.to_qtensor(tensors)
    other = tensors["weight"].reshape(-1).view(jnp.dtype(dtype)).reshape(-1, 1)
    qt = FOUR_BIT.to_qtensor(tensors | {"weight": other})
    np.testing.assert_array_equal(qt.data, expected.data)


def test_another_table_is_kept():
    tensors = four_bit_tensors()
    table = np.linspace(-1, 1, 16, dtype=np.float32)
    qt = FOUR_BIT.to_qtensor(tensors | {"weight.quant_map": table})
    codes = np.asarray(qt.codes())
    scale = np.asarray(qt.scale).reshape(4, 1).T
    np.testing.assert_array_equal(jaxq.dequantize(qt), table[codes] * scale)
    with pytest.raises(ValueError, match="expected one of the formats nf4"):
        FOUR_BIT.from_qtensor(qt)


STATE = "weight.quant_state.bitsandbytes__fp4"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not JSON"),
        ("[" * 9000, "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"quant_type": "nf4"}', "quant_type must be one of 'fp4'; got 'nf4'"),
        ('{"quant_type": "fp4", "shape": [4]}', "shape must be two sizes above 0"),
        ('{"quant_type": "fp4", "shape": [4, -64]}', "shape must be two sizes"),
        ('{"quant_type": "fp4", "shape": [4, 64.0]}', "shape must be two sizes"),
        (
            '{"quant_type": "fp4", "shape": [4, 64], "blocksize": 0}',
            "blocksize must be a whole number above 0",
        ),
        (
            '{"quant_type": "fp4", "shape": [4, 64]}',
            "blocksize is missing",
        ),
        (
            '{"shape": [4, 64], "blocksize": 64, "quant_type": "fp4", "dtype": "int8"}',
            "dtype must be one of 'float32', 'bfloat16', 'float16'; got 'int8'",
        ),
        (
            (
                '{"shape": [400000, 6400000], "blocksize": 64, "quant_type": "fp4", '
                '"dtype": "float32"}'
            ),
            "weight is uint8",
        ),
    ],
)
def test_a_state_that_is_damaged(text, match):
    state = np.frombuffer(text.encode(), np.uint8)
    with pytest.raises(ValueError, match=match):
        FOUR_BIT.to_qtensor(four_bit_tensors() | {STATE: state})


def test_groups_that_do_not_divide_a_row_cannot_be_written():
    qt = jaxq.quantize(jnp.asarray(kernel(6, (100, 8))), "nf4")
    with pytest.raises(ValueError, match="groups of 64 do not divide a row of 100"):
        FOUR_BIT.from_qtensor(qt)
    qt = jaxq.quantize(jnp.asarray(kernel(6, (96, 8))), jaxq.QuantSpec("nf4"))
    with pytest.raises(ValueError, match="blocks have 96 numbers, expected one of 32"):
        FOUR_BIT.from_qtensor(qt)


def test_columns_of_another_order_are_refused():
    tensors = {"weight": np.ones((2, 4), np.int8), "SCB": np.ones(2, np.float32)}
    assert INT8.to_qtensor(tensors).shape == (4, 2)
    with pytest.raises(ValueError, match="weight_format is not 0"):
        INT8.to_qtensor(tensors | {"weight_format": np.ones((), np.uint8)})
