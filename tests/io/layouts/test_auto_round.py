"""GPTQ and AWQ words against the packers of the package auto-round."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.io import layouts
from tests.io.layouts.cases import kernel

REASON = "compares words with auto-round"


def module(name):
    pytest.importorskip("torch", reason=REASON)
    return pytest.importorskip(name, reason=REASON)


def torch_linear(torch, qt):
    """A float layer with the numbers of a QTensor."""
    linear = torch.nn.Linear(*qt.shape, bias=False)
    floats = np.asarray(jaxq.dequantize(qt, dtype=jnp.float32))
    linear.weight.data = torch.from_numpy(floats.T.copy())
    return linear


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("name", "version"),
    [("qlinear_torch", "gptq_v2"), ("qlinear_torch_zp", "gptq")],
)
def test_words_of_gptq(bits, name, version):
    packer = module(f"auto_round_extension.torch.{name}")
    torch = module("torch")
    gptq = layouts.get("gptq")
    spec = gptq.spec({"bits": bits, "group_size": 32, "sym": False})
    # Numbers below 0 in each group, so that no zero point is 0: version 1 has none.
    w = kernel(bits, (96, 64))
    w[::32] = -4
    qt = jaxq.quantize(jnp.asarray(w), spec)
    assert np.asarray(qt.zero_point).min() > 0
    layer = packer.QuantLinear(bits, 32, 96, 64, False)
    layer.device = "cpu"
    scale, zero = (
        torch.from_numpy(np.asarray(leaf, np.float32))
        for leaf in (qt.scale, qt.zero_point)
    )
    group = torch.from_numpy((np.arange(96) // 32).astype(np.int32))
    layer.pack(torch_linear(torch, qt), scale, zero, group, device="cpu")

    tensors, config = gptq.from_qtensor(qt)
    np.testing.assert_array_equal(tensors["qweight"], layer.qweight.numpy())
    np.testing.assert_array_equal(tensors["scales"], layer.scales.numpy())
    if version == "gptq_v2":
        np.testing.assert_array_equal(tensors["qzeros"], layer.qzeros.numpy())
    arrays = {
        name: getattr(layer, name).numpy() for name in ("qweight", "qzeros", "scales")
    }
    back = gptq.to_qtensor(arrays, config | {"checkpoint_format": version})
    np.testing.assert_array_equal(back.data, qt.data)
    np.testing.assert_array_equal(back.zero_point, qt.zero_point)


def test_words_of_awq():
    packer = module("auto_round.export.export_to_awq.utils")
    torch = module("torch")
    awq = layouts.get("awq")
    qt = jaxq.quantize(jnp.asarray(kernel(1, (64, 32))), awq.spec({"group_size": 32}))
    scale = torch.from_numpy(np.asarray(qt.scale).T.copy())
    zero = torch.from_numpy(np.asarray(qt.zero_point).T.astype(np.int32))
    layer = packer.WQLinear_GEMM.from_linear(
        torch_linear(torch, qt), 4, 32, scales=scale, zeros=zero, device="cpu"
    )
    tensors, config = awq.from_qtensor(qt)
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, getattr(layer, name).numpy())
    floats = packer.dequantize_gemm(
        layer.qweight, layer.qzeros, layer.scales, 4, 32
    ).numpy()
    back = awq.to_qtensor(tensors, config)
    np.testing.assert_array_equal(jaxq.dequantize(back), floats)
