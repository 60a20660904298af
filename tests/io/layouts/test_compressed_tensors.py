"""The layout of compressed-tensors, against the package and golden words."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.io import layouts
from tests.io.layouts.cases import COMPRESSED, kernel

LAYOUT = layouts.get("compressed_tensors")


class Package:
    """The package compressed-tensors, with numpy arrays in and out."""

    def __init__(self):
        reason = "compares with compressed-tensors"
        self.torch = pytest.importorskip("torch", reason=reason)
        package = pytest.importorskip("compressed_tensors.compressors", reason=reason)
        self.registry = package.BaseCompressor
        self.quantization = pytest.importorskip("compressed_tensors.quantization")

    def scheme(self, settings):
        args = {k: v for k, v in settings.items() if k != "dynamic"}
        weights = self.quantization.QuantizationArgs(**args)
        return self.quantization.QuantizationScheme(targets=["Linear"], weights=weights)

    def decompress(self, tensors, config):
        compressor = self.registry.get_value_from_registry(config["format"])
        arrays = {name: self.tensor(array) for name, array in tensors.items()}
        scheme = self.scheme(config["weights"])
        weight = compressor.decompress(arrays, scheme)["weight"]
        return weight.to(self.torch.float32).numpy()

    def compress(self, w, leaves, config):
        """The arrays of a float weight `[out, in]` with given scales."""
        compressor = self.registry.get_value_from_registry(config["format"])
        arrays = {name: self.tensor(array) for name, array in leaves.items()}
        arrays["weight"] = self.torch.from_numpy(w)
        scheme = self.scheme(config["weights"])
        tensors = compressor.compress(arrays, scheme)
        return {name: self.array(tensor) for name, tensor in tensors.items()}

    def tensor(self, array):
        array = np.array(array)
        if array.dtype.name in ("bfloat16", "float8_e4m3fn"):
            bits = array.view(f"int{8 * array.itemsize}")
            dtype = getattr(self.torch, array.dtype.name)
            return self.torch.from_numpy(bits).view(dtype)
        return self.torch.from_numpy(array)

    def array(self, tensor):
        if tensor.dtype in (self.torch.bfloat16, self.torch.float8_e4m3fn):
            name = str(tensor.dtype).removeprefix("torch.")
            bits = tensor.view(getattr(self.torch, f"int{8 * tensor.itemsize}"))
            return bits.numpy().view(jnp.dtype(name))
        return tensor.numpy()


@pytest.fixture(scope="module")
def package():
    return Package()


ROWS = {name: config for name, (config, _, _) in COMPRESSED.items()}


@pytest.mark.parametrize("config", ROWS.values(), ids=ROWS)
def test_the_package_reads_what_is_written(package, config):
    w = jnp.asarray(kernel(1, (256, 48)))
    spec = LAYOUT.spec(config)
    if spec.scale == "bfloat16":  # the package computes in the dtype of the scale
        spec = spec.replace(scale="float32")
    qt = jaxq.quantize(w, spec)
    tensors, settings = LAYOUT.from_qtensor(qt)
    floats = package.decompress(tensors, settings)
    expected = np.asarray(jaxq.dequantize(qt, dtype=jnp.float32)).T
    # The package computes 4-bit floats in bfloat16, and rounds twice.
    is_float4 = qt.spec.fmt.name == "float4_e2m1fn"
    np.testing.assert_allclose(floats, expected, rtol=0.01 if is_float4 else 1e-6)


def test_the_package_writes_what_is_read(package):
    w = kernel(2, (96, 40)).T.copy()
    blocks = w.reshape(40, 3, 32)
    low, high = blocks.min(-1), blocks.max(-1)
    scale = ((high - low) / 15).astype(np.float32)
    zero = np.clip(np.rint(-8 - low / scale), -8, 7).astype(np.int8)
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
    }
    config = {"format": "pack-quantized", "weights": weights}
    leaves = {"weight_scale": scale, "weight_zero_point": zero}
    tensors = package.compress(w, leaves, config)
    assert tensors["weight_zero_point"].shape == (5, 3)
    qt = LAYOUT.to_qtensor(tensors, config)
    assert qt.spec.fmt.name == "uint4"
    floats = package.decompress(tensors, config)
    np.testing.assert_allclose(jaxq.dequantize(qt).T, floats, rtol=1e-6, atol=1e-7)
    written, _ = LAYOUT.from_qtensor(qt)
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


PACK_4 = {
    "format": "pack-quantized",
    "weights": {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
    },
}


def packed(codes):
    """The arrays of 4-bit codes `[out, in]` with scales of 1."""
    qt = jaxq.quantize(jnp.ones(codes.shape[::-1]), LAYOUT.spec(PACK_4))
    return LAYOUT.from_qtensor(qt.with_codes(jnp.asarray(codes.T, jnp.int8)))


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ([[-8, -7, -6, -5, -4, -3, -2, -1]], [[0x76543210]]),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], [[0xFEDCBA98]]),
        ([[-8, -7, -6]], [[0x210]]),
    ],
)
def test_golden_words(codes, words):
    codes = np.asarray(codes)
    tensors, config = packed(codes)
    assert np.asarray(tensors["weight_packed"]).view(np.uint32).tolist() == words
    assert tensors["weight_shape"].tolist() == list(codes.shape)
    back = LAYOUT.to_qtensor(tensors, config)
    np.testing.assert_array_equal(np.asarray(back.codes()).T, codes)


def test_golden_bytes_of_nvfp4():
    codes = np.arange(16).reshape(1, 16)
    config = {"format": "nvfp4-pack-quantized", "weights": {}}
    qt = jaxq.quantize(jnp.ones((16, 1)), LAYOUT.spec(config))
    qt = qt.with_codes(jnp.asarray(codes.T, jnp.uint8))
    tensors, _ = LAYOUT.from_qtensor(qt)
    assert np.asarray(tensors["weight_packed"]).tobytes().hex() == "1032547698badcfe"


def test_int8_for_activations_is_written_as_bytes():
    w = jnp.asarray(kernel(3, (64, 8)))
    qt = jaxq.quantize(w, "int8")
    assert LAYOUT.from_qtensor(qt)[1]["format"] == "pack-quantized"
    tensors, config = LAYOUT.from_qtensor(qt.with_activation("int8"))
    assert config["format"] == "int-quantized"
    assert (tensors["weight"].dtype, tensors["weight"].shape) == (jnp.int8, (8, 64))
    back = LAYOUT.to_qtensor(tensors, config)
    np.testing.assert_array_equal(jaxq.dequantize(back), jaxq.dequantize(qt))


def test_int8_with_zero_points():
    random = np.random.default_rng(4)
    tensors = {
        "weight": random.integers(-128, 128, (8, 64)).astype(np.int8),
        "weight_scale": random.uniform(0.5, 2, (8, 1)).astype(np.float32),
        "weight_zero_point": random.integers(-9, 9, (8, 1)).astype(np.int8),
    }
    weights = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}
    config = {"format": "int-quantized", "weights": weights}
    qt = LAYOUT.to_qtensor(tensors, config)
    difference = np.float64(tensors["weight"]) - tensors["weight_zero_point"]
    expected = difference * tensors["weight_scale"]
    np.testing.assert_allclose(jaxq.dequantize(qt).T, expected, rtol=1e-6)
    written, settings = LAYOUT.from_qtensor(qt.with_activation("int8"))
    assert settings["weights"]["symmetric"] is False
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array)


def test_groups_in_another_order_have_floats_only():
    random = np.random.default_rng(5)
    codes = random.integers(-8, 8, (8, 64))
    tensors, _ = packed(codes)
    group = random.permutation(np.arange(64) // 32).astype(np.int32)
    scale = random.uniform(0.5, 2, (8, 2)).astype(np.float32)
    tensors = dict(tensors, weight_scale=scale, weight_g_idx=group)
    weights = PACK_4["weights"] | {"strategy": "group", "group_size": 32}
    config = PACK_4 | {"weights": weights}
    with pytest.raises(ValueError, match="weight_g_idx assigns .* Use dequantize=True"):
        LAYOUT.to_qtensor(tensors, config)
    floats = LAYOUT.to_qtensor(tensors, config, dequantize=True)
    np.testing.assert_allclose(floats.T, codes * scale[:, group], rtol=1e-6)
    tensors["weight_g_idx"] = np.arange(64) // 32
    qt = LAYOUT.to_qtensor(tensors, config)
    expected = codes * scale.repeat(32, axis=1)
    np.testing.assert_allclose(jaxq.dequantize(qt).T, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="weight_g_idx holds groups from 2 to 2"):
        LAYOUT.to_qtensor(dict(tensors, weight_g_idx=np.full(64, 2)), config)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_bits": 3}, "the setting num_bits must be one of 4, 8; got 3"),
        ({"type": "float"}, "the setting type must be one of 'int'"),
        ({"strategy": "token"}, "the setting strategy must be one of"),
        ({"strategy": "group"}, "the setting group_size is missing"),
        ({"strategy": "group", "group_size": 4}, "weight_scale is float32"),
        ({"symmetric": False}, "the array weight_zero_point is missing"),
        (
            {"symmetric": False, "strategy": "tensor"},
            "the setting strategy is 'tensor', which has no zero points",
        ),
    ],
)
def test_settings_that_contradict_the_arrays(changes, match):
    tensors, config = packed(np.ones((8, 16), int))
    tensors = dict(tensors, weight_scale=np.ones((8, 1), np.float32))
    with pytest.raises(ValueError, match=match):
        LAYOUT.to_qtensor(tensors, config | {"weights": PACK_4["weights"] | changes})


@pytest.mark.parametrize(
    "shape", [[8, 17], [9, 16], [16, 8], [8], [8, -16], [0, 0], [2**40, 2**40]]
)
def test_a_shape_that_contradicts_the_codes(shape):
    tensors, config = packed(np.ones((8, 16), int))
    changed = dict(tensors, weight_shape=np.asarray(shape, np.int64))
    with pytest.raises(ValueError, match=r"weight_(shape|packed|scale) is"):
        LAYOUT.to_qtensor(changed, config)


def test_other_errors():
    tensors, config = packed(np.ones((8, 16), int))
    with pytest.raises(ValueError, match="the setting format must be one of"):
        LAYOUT.to_qtensor(tensors, {"format": "marlin-24"})
    with pytest.raises(ValueError, match="the setting weights must be a dict"):
        LAYOUT.to_qtensor(tensors, {"format": "pack-quantized"})
    extra = dict(tensors, weight=np.ones((8, 16), np.int8))
    with pytest.raises(ValueError, match="weight does not belong to the format pack"):
        LAYOUT.to_qtensor(extra, config)
    extra = dict(tensors, weight_zero_point=np.ones((1, 1), np.int32))
    with pytest.raises(ValueError, match="weight_zero_point is there, but the sett"):
        LAYOUT.to_qtensor(extra, config)
    qt = jaxq.quantize(jnp.ones((64, 8)), jaxq.QuantSpec("int8", jaxq.PerBlock((8, 8))))
    with pytest.raises(ValueError, match="integers have no blocks of several outputs"):
        LAYOUT.from_qtensor(qt)
