"""MXFP4, fp8 in blocks and NVFP4, against transformers and ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq.io import layouts
from tests.io.layouts.cases import kernel

MXFP4 = layouts.get("mxfp4")
FP8 = layouts.get("fp8_block")
NVFP4 = layouts.get("modelopt_nvfp4")
E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])


def random_blocks(shape):
    random = np.random.default_rng(0)
    return {
        "blocks": random.integers(0, 256, (*shape, 16)).astype(np.uint8),
        "scales": random.integers(118, 133, shape).astype(np.uint8),
    }


@pytest.mark.parametrize("shape", [(8, 3), (2, 8, 3), (2, 4, 8, 1)])
def test_blocks_of_gpt_oss(shape):
    tensors = random_blocks(shape)
    qt = MXFP4.to_qtensor(tensors)
    *batch, num_out, num_groups = shape
    assert qt.shape == (*batch, 32 * num_groups, num_out)
    low, high = tensors["blocks"] & 15, tensors["blocks"] >> 4
    codes = np.stack([low, high], -1).reshape(*shape, 32)
    scale = 2.0 ** (tensors["scales"].astype(int) - 127)
    expected = (E2M1[codes] * scale[..., None]).reshape(*batch, num_out, -1)
    values = np.asarray(jaxq.dequantize(qt, dtype=jnp.float32))
    np.testing.assert_array_equal(values, np.swapaxes(expected, -1, -2))
    written, _ = MXFP4.from_qtensor(qt)
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array)


def test_transformers_has_the_same_numbers_of_gpt_oss():
    torch = pytest.importorskip("torch", reason="transformers needs torch")
    mxfp4 = pytest.importorskip(
        "transformers.integrations.mxfp4", reason="compares with transformers"
    )
    tensors = random_blocks((2, 8, 3))
    arrays = [torch.from_numpy(tensors[name]) for name in ("blocks", "scales")]
    floats = mxfp4.convert_moe_packed_tensors(*arrays, dtype=torch.float32)
    qt = MXFP4.to_qtensor(tensors)
    values = jaxq.dequantize(qt, dtype=jnp.float32)
    np.testing.assert_array_equal(values, floats.numpy())


def test_a_stack_of_experts_keeps_its_batch_axes():
    w = jnp.asarray(kernel(1, (3, 64, 16)))
    qt = jaxq.quantize(w, "mxfp4", contracting=(-2,), batch=(0,))
    tensors, config = MXFP4.from_qtensor(qt)
    assert tensors["blocks"].shape == (3, 16, 2, 16)
    back = MXFP4.to_qtensor(tensors, config)
    assert back.batch_shape == (3,)
    expert = jax.tree.map(lambda leaf: leaf[1], back)
    np.testing.assert_array_equal(
        jaxq.dequantize(expert, dtype=jnp.float32), jaxq.dequantize(qt)[1]
    )


@pytest.mark.parametrize("shape", [(256, 128), (200, 300), (2, 100, 200), (7, 5)])
def test_blocks_of_fp8(shape):
    random = np.random.default_rng(2)
    *batch, num_out, num_in = shape
    weight = random.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
    blocks = (*batch, -(-num_out // 128), -(-num_in // 128))
    scale = random.uniform(0.5, 2, blocks).astype(np.float32)
    tensors = {"weight": weight, "weight_scale_inv": scale}
    qt = FP8.to_qtensor(tensors, {"weight_block_size": [128, 128]})
    expected = weight.astype(np.float64)
    expected *= scale.repeat(128, -2)[..., :num_out, :].repeat(128, -1)[..., :num_in]
    values = np.swapaxes(jaxq.dequantize(qt, dtype=jnp.float32), -1, -2)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    written, config = FP8.from_qtensor(qt)
    assert config["weight_block_size"] == [128, 128]
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array)


def test_transformers_has_the_same_numbers_of_fp8():
    torch = pytest.importorskip("torch", reason="transformers needs torch")
    fp8 = pytest.importorskip(
        "transformers.integrations.finegrained_fp8", reason="compares with transformers"
    )
    qt = jaxq.quantize(jnp.asarray(kernel(3, (256, 384))), FP8.spec())
    tensors, _ = FP8.from_qtensor(qt)
    bits = np.array(tensors["weight"]).view(np.int8)
    weight = torch.from_numpy(bits).view(torch.float8_e4m3fn)
    scale = torch.from_numpy(np.array(tensors["weight_scale_inv"]))
    operation = fp8.Fp8Dequantize.__new__(fp8.Fp8Dequantize)
    floats = operation._dequantize_one(weight, scale, output_dtype=torch.float32)
    np.testing.assert_allclose(jaxq.dequantize(qt).T, floats.numpy(), rtol=1e-6)


def test_oblong_blocks():
    spec = FP8.spec({"weight_block_size": [64, 128]})
    assert spec.granularity == jaxq.PerBlock((128, 64), pad=True)
    for value in ([128], [0, 128], [128.0, 128], "128"):
        with pytest.raises(ValueError, match="the setting weight_block_size must be"):
            FP8.spec({"weight_block_size": value})
    with pytest.raises(ValueError, match="the setting fmt must be one of 'e4m3'"):
        FP8.to_qtensor({}, {"fmt": "e5m2"})


def test_power_of_two_scales_of_fp8():
    weight = np.ones((256, 128), ml_dtypes.float8_e4m3fn)
    scale = np.full((2, 1), 0.25, ml_dtypes.float8_e8m0fnu)
    qt = FP8.to_qtensor({"weight": weight, "weight_scale_inv": scale})
    assert qt.spec.scale == "float8_e8m0fnu"
    assert (np.asarray(jaxq.dequantize(qt, dtype=jnp.float32)) == 0.25).all()


@pytest.mark.parametrize("batch", [(), (3,)])
def test_nvfp4_of_modelopt(batch):
    random = np.random.default_rng(4)
    scale = random.uniform(0.5, 400, (*batch, 8, 4)).astype(ml_dtypes.float8_e4m3fn)
    tensors = {
        "weight": random.integers(0, 256, (*batch, 8, 32)).astype(np.uint8),
        "weight_scale": scale,
        "weight_scale_2": random.uniform(1e-3, 1e-2, batch).astype(np.float32),
    }
    tensors["weight_scale_2"] = np.asarray(tensors["weight_scale_2"], np.float32)
    qt = NVFP4.to_qtensor(tensors)
    low, high = tensors["weight"] & 15, tensors["weight"] >> 4
    codes = np.stack([low, high], -1).reshape(*batch, 8, 4, 16)
    factor = tensors["weight_scale_2"][..., None, None].astype(np.float64)
    expected = E2M1[codes] * (scale.astype(np.float64) * factor)[..., None]
    values = np.swapaxes(jaxq.dequantize(qt, dtype=jnp.float32), -1, -2)
    np.testing.assert_allclose(values, expected.reshape(*batch, 8, 64), rtol=3e-7)
    written, _ = NVFP4.from_qtensor(qt)
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array)


def test_presets_are_written():
    w = jnp.asarray(kernel(5, (128, 16)))
    for layout, preset in ((MXFP4, "mxfp4"), (NVFP4, "nvfp4")):
        qt = jaxq.quantize(w, preset)  # another packing
        tensors, config = layout.from_qtensor(qt)
        back = layout.to_qtensor(tensors, config, dtype=jnp.float32)
        np.testing.assert_array_equal(jaxq.dequantize(back), jaxq.dequantize(qt))
    for preset in ("fp8", "mxfp8", "nf4"):
        with pytest.raises(ValueError, match="expected the format float4_e2m1fn"):
            MXFP4.from_qtensor(jaxq.quantize(w, preset))
    with pytest.raises(ValueError, match="are not groups of 32"):
        MXFP4.from_qtensor(jaxq.quantize(w, "nvfp4"))
    with pytest.raises(ValueError, match="in rows of 100 are not groups of 32"):
        MXFP4.from_qtensor(jaxq.quantize(w[:100], "mxfp4"))


def test_rows_that_are_no_whole_number_of_groups():
    tensors, _ = NVFP4.from_qtensor(jaxq.quantize(jnp.ones((32, 8)), "nvfp4"))
    with pytest.raises(ValueError, match="weight has rows of 24 codes, no multiple"):
        NVFP4.to_qtensor(dict(tensors, weight=np.zeros((8, 12), np.uint8)))
