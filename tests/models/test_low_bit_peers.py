"""Directories of low-bit weights against `transformers`, and the bytes in memory.

The codes and scales are random or made by torch. `transformers` has no CPU path for
MXFP4 and for fp8 in blocks, so its own functions dequantize the weights of the model
whose logits are expected.
"""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.torch import load_file, save_file

import jaxq
from jaxq.models import load
from tests.models.peers import MIXTURES, REASON, make_peer, peer_logits
from tests.tables import thinned

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 13)).astype(np.int32)
# Sizes with several blocks of 128 codes.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "head_dim": 64,
    "initializer_range": 0.1,
}
# The weights of experts have the groups of 32 inputs that MXFP4 has.
SIZES = {"hidden_size": 64, "intermediate_size": 96}
MXFP4 = {"gpt_oss": ("GptOssConfig", MIXTURES["gpt_oss"][1] | SIZES)}
FP8 = {
    "llama": ("LlamaConfig", WIDE),
    "qwen3": ("Qwen3Config", WIDE),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        MIXTURES["qwen3_moe"][1] | WIDE | {"moe_intermediate_size": 128},
    ),
    "phi3": ("Phi3Config", WIDE | {"num_key_value_heads": 4}),
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason=REASON)


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers", reason=REASON)


@nnx.jit
def run(model, x):
    return model(x)


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def check(torch, transformers, peer, quantize, config, path, **options):
    """Compares logits and bytes of a quantized directory; returns the model.

    Args:
      peer: the model of `transformers`.
      quantize: `quantize(name, tensor)` returns the tensors that take the place of one,
        and its dequantized numbers. None leaves the tensor in floats.
      config: the `quantization_config`.
      path: an empty folder.
      **options: of `load`.
    """
    peer.save_pretrained(path / "floats")
    file = path / "floats/model.safetensors"
    stored, floats = {}, {}
    for name, tensor in load_file(file).items():
        quantized, floats[name] = quantize(name, tensor) or ({name: tensor}, tensor)
        stored |= quantized
    save_file(floats, file, {"format": "pt"})
    (path / "low_bit").mkdir()
    save_file(stored, path / "low_bit/model.safetensors")
    entries = json.loads((path / "floats/config.json").read_text())
    entries["quantization_config"] = config
    (path / "low_bit/config.json").write_text(json.dumps(entries))
    model, _ = load(path / "low_bit", **options)
    # Codes and scales take the bytes of the file, and no float copy is beside them.
    assert nbytes(jax.tree.leaves(nnx.state(model))) == nbytes(stored.values())
    assert nbytes(stored.values()) < 0.6 * nbytes(floats.values())
    again = transformers.AutoModelForCausalLM.from_pretrained(path / "floats").eval()
    expected = peer_logits(torch, again, TOKENS)
    assert np.abs(expected - peer_logits(torch, peer, TOKENS)).max() > 1e-2
    np.testing.assert_allclose(run(model, TOKENS), expected, atol=2e-4, rtol=0)
    return model


@pytest.mark.parametrize("scan_layers", thinned([False, True], [False]))
def test_mxfp4_of_gpt_oss(torch, transformers, scan_layers, tmp_path):
    from transformers.integrations.mxfp4 import dequantize_convertops

    peer = make_peer(torch, transformers, MXFP4, "gpt_oss")

    def quantize(name, tensor):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return None
        num_experts, num_in, num_out = tensor.shape
        shape = (num_experts, num_out, num_in // 32)
        # Any byte is two codes. The exponents give numbers of about 0.1.
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(119, 125, shape, dtype=torch.uint8)
        floats = dequantize_convertops(blocks, scales, torch.float32)
        assert floats.shape == tensor.shape
        stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
        return stored, floats.contiguous()

    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    options = {"scan_layers": scan_layers}
    model = check(torch, transformers, peer, quantize, config, tmp_path, **options)
    layer = model.layers if scan_layers else model.layers[1]
    experts = layer.mlp.experts
    for layer in (experts.gate_proj, experts.up_proj, experts.down_proj):
        kernel = layer.kernel.get_value()
        assert isinstance(kernel, jaxq.QTensor)
        assert kernel.spec.fmt.name == "float4_e2m1fn"
        assert kernel.scale.dtype.name == "float8_e8m0fnu"
        assert kernel.batch_shape == ((2, 4) if scan_layers else (4,))
        assert kernel.data.dtype == np.uint8


@pytest.mark.parametrize("name", thinned(FP8, ["qwen3", "qwen3_moe"]))
def test_fp8_blocks_of_deepseek_and_qwen(torch, transformers, name, tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    peer = make_peer(torch, transformers, FP8, name)
    dequantize = Fp8Dequantize(None)._dequantize_one

    def quantize(name, tensor):
        if not name.endswith("proj.weight"):
            return None
        num_out, num_in = tensor.shape
        blocks = tensor.reshape(num_out // 128, 128, num_in // 128, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        codes = codes.reshape(tensor.shape)
        stored = {name: codes, f"{name}_scale_inv": scale}
        return stored, dequantize(codes, scale, torch.float32)

    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    model = check(torch, transformers, peer, quantize, config, tmp_path)
    mlp = model.layers[1].mlp
    layer = mlp.experts.gate_proj if name == "qwen3_moe" else mlp.gate_proj
    kernel = layer.kernel.get_value()
    assert isinstance(kernel, jaxq.QTensor)
    assert kernel.spec.fmt.name == "float8_e4m3fn"
    assert kernel.spec.granularity.shape == (128, 128)
    assert kernel.data.dtype.itemsize == 1
