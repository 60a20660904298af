"""`quantize_checkpoint` of experts, one by one in the files and in stacks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import models
from jaxq.io import layouts, quantize_checkpoint, read_checkpoint
from jaxq.io.checkpoint import _stream
from tests.io.checkpoint import directories
from tests.models.test_decoder import make

EXPERTS = models.ExpertsConfig(
    num_experts=3,
    num_experts_per_token=2,
    intermediate_size=64,
    shared_intermediate_size=96,
)
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
SIZES["num_hidden_layers"] = 1
TOKENS = jnp.asarray([[1, 2, 3, 4, 5]])
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def logits(model):
    return np.asarray(jax.jit(model)(TOKENS))


# qwen2_moe has a shared expert, and calls its router "gate". Mixtral has other names
# for all modules of experts.
@pytest.mark.parametrize("shared", [96, None], ids=["qwen2_moe", "mixtral"])
def test_experts_one_by_one_become_those_of_quantize_model(tmp_path, shared):
    experts = dataclasses.replace(EXPERTS, shared_intermediate_size=shared)
    models.save(tmp_path / "floats", make(**SIZES, experts=experts), dtype="bfloat16")
    entries = json.loads((tmp_path / "floats/config.json").read_text())
    assert entries["model_type"] == ("qwen2_moe" if shared else "mixtral")
    spec = layouts.get("gptq").spec({"bits": 4, "group_size": 32, "sym": True})
    done = quantize_checkpoint(
        tmp_path / "floats", tmp_path / "out", spec, format="gptq"
    )
    routers = [name for name, note in done.items() if "router" in note]
    assert len(routers) == (2 if shared else 1)
    assert (
        sum("experts.1" in name for name, note in done.items() if note == "int4") == 3
    )
    model, _ = models.load(tmp_path / "floats")
    expected, _ = jaxq.quantize_model(model, spec)
    streamed, _ = models.load(tmp_path / "out")
    kernel = streamed.layers[0].mlp.experts.up_proj.kernel[...]
    assert kernel.shape == (3, 64, 64)
    own = expected.layers[0].mlp.experts.up_proj.kernel[...]
    np.testing.assert_array_equal(kernel.codes(), own.codes())
    np.testing.assert_array_equal(logits(streamed), logits(expected))


def stacked_directory(path, dtype=np.float32):
    rng = np.random.default_rng(0)
    tensors = {
        STACK: rng.normal(size=(5, 64, 32)).astype(dtype),
        f"{STACK}_bias": rng.normal(size=(5, 32)).astype(dtype),
        "model.layers.0.self_attn.q_proj.weight": np.ones((64, 64), dtype),
        "model.layers.0.mlp.router.weight": np.ones((5, 64), dtype),
    }
    directories.write(path, tensors, None)
    return tensors


def test_a_stack_is_written_matrix_by_matrix(tmp_path, monkeypatch):
    tensors = stacked_directory(tmp_path / "floats")
    shapes = []
    quantized_weight = _stream.quantized_weight

    def recorded(weight, step, *rest):
        shapes.append(weight.shape)
        return quantized_weight(weight, step, *rest)

    monkeypatch.setattr(_stream, "quantized_weight", recorded)
    done = quantize_checkpoint(
        tmp_path / "floats", tmp_path / "out", "mxfp4", format="mxfp4"
    )
    # The first one is the trial of the shape.
    assert shapes == [(64, 32)] * 6
    assert done[STACK] == "float4_e2m1fn"
    assert "not a stack" in done["model.layers.0.self_attn.q_proj.weight"]
    expected = jaxq.quantize(jnp.asarray(tensors[STACK]), "mxfp4", batch=0)
    with read_checkpoint(tmp_path / "out") as checkpoint:
        qt = checkpoint[STACK]
        assert qt.shape == (5, 64, 32)
        np.testing.assert_array_equal(qt.codes(), expected.codes())
        floats = jaxq.dequantize(qt, dtype="float32")
        np.testing.assert_array_equal(floats, jaxq.dequantize(expected))
        for name, tensor in tensors.items():
            if name != STACK:
                np.testing.assert_array_equal(checkpoint[name], tensor)
    # The reverse: the stack of a quantized source is read matrix by matrix too.
    quantize_checkpoint(tmp_path / "out", tmp_path / "again", "mxfp4", format="mxfp4")
    with read_checkpoint(tmp_path / "again") as checkpoint:
        np.testing.assert_array_equal(checkpoint[STACK].codes(), expected.codes())


def test_a_stack_stays_in_floats_in_other_formats(tmp_path):
    tensors = stacked_directory(tmp_path / "floats")
    done = quantize_checkpoint(tmp_path / "floats", tmp_path / "out", "int8")
    assert 'only format="mxfp4"' in done[STACK]
    with read_checkpoint(tmp_path / "out") as checkpoint:
        np.testing.assert_array_equal(checkpoint[STACK], tensors[STACK])
