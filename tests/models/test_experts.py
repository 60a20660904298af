"""Mixtures of experts: families against `transformers`, and quantized experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq.models import (
    Decoder,
    DecoderConfig,
    ExpertsConfig,
    generate,
    load,
    norm_groups,
    rotate,
    save,
)
from jaxq.models._expert_kind import EXPERT_LINEAR
from tests import tables
from tests.models.peers import MIXTURES, REASON, make_peer, peer_logits, peer_text

CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    experts=ExpertsConfig(num_experts=3, num_experts_per_token=2, intermediate_size=64),
)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason=REASON)


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers", reason=REASON)


@nnx.jit
def run(model, x):
    return model(x)


def tokens(b=2, t=19):
    return np.random.default_rng(0).integers(0, 97, (b, t)).astype(np.int32)


@pytest.mark.parametrize(
    "name", tables.thinned(MIXTURES, ["mixtral", "qwen2_moe", "gpt_oss"])
)
def test_logits_and_text_are_those_of_transformers(torch, transformers, name, tmp_path):
    peer = make_peer(torch, transformers, MIXTURES, name)
    peer.save_pretrained(tmp_path / "peer")
    model, _ = load(tmp_path / "peer", scan_layers=name in ("mixtral", "gpt_oss"))
    x = tokens()
    expected = peer_logits(torch, peer, x)
    np.testing.assert_allclose(run(model, x), expected, atol=2e-4, rtol=0)
    text = generate(model, x[:, :8], 8)
    np.testing.assert_array_equal(text, peer_text(torch, peer, x[:, :8], 8))
    save(tmp_path / "jaxq", model, dtype=jnp.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "jaxq").eval()
    np.testing.assert_allclose(
        peer_logits(torch, again, x), expected, atol=1e-5, rtol=0
    )


RECIPE = jaxq.Recipe(
    [jaxq.Rule("**/experts/*", weight="int8"), jaxq.Rule("**", skip=True)]
)


@pytest.mark.parametrize("scan_layers", tables.thinned([False, True], [True]))
def test_quantized_experts_are_stacks(scan_layers):
    """Each expert gives the numbers of its own quantized matrix."""
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    model = Decoder(config, rngs=nnx.Rngs(0))
    qmodel, report = jaxq.quantize_model(model, RECIPE)
    kinds = {row.path: row.kind for row in report.rows if row.format == "int8"}
    assert set(kinds.values()) == {"ExpertLinear"}
    assert len(kinds) == 3
    decoded = nnx.clone(model)
    layers = (qmodel.layers, decoded.layers)
    if not scan_layers:
        layers = (qmodel.layers[0], decoded.layers[0])
    quantized, floats = (layer.mlp.experts for layer in layers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        kernel = getattr(quantized, name).kernel.get_value()
        # A scale for each expert and each output.
        assert kernel.scale.size == kernel.shape[-1] * 3
        getattr(floats, name).kernel.set_value(jaxq.dequantize(kernel))
    np.testing.assert_allclose(
        run(qmodel, tokens()), run(decoded, tokens()), atol=1e-5, rtol=1e-5
    )
    jaxpr = str(jax.make_jaxpr(lambda x: qmodel(x))(tokens()))
    assert "ragged" in jaxpr


def test_named_recipes_quantize_experts_and_leave_routers_in_floats():
    report = jaxq.nn.plan(Decoder(CONFIG, rngs=nnx.Rngs(0)), jaxq.recipes.get("int8"))
    formats = {row.path: row.format for row in report.rows}
    assert formats["layers/0/mlp/experts/up_proj/kernel"] == "int8"
    assert formats["layers/0/mlp/router/kernel"] != "int8"


def test_calibration_sees_the_rows_of_each_expert():
    """The second moments of GPTQ are those of the rows that an expert reads."""
    rows = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    found, num_batch = EXPERT_LINEAR.read_rows(rows, None, jnp.array([3, 0, 4]))
    assert (found.shape, num_batch) == ((3, 7, 5), 1)
    moments = np.einsum("eri,erj->eij", found, found)
    np.testing.assert_allclose(moments[0], rows[:3].T @ rows[:3], rtol=1e-5)
    np.testing.assert_array_equal(moments[1], 0)
    np.testing.assert_allclose(moments[2], rows[3:].T @ rows[3:], rtol=1e-5)


@pytest.mark.heavy
def test_gptq_of_experts_is_better_than_rounding():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    batches = [tokens(4, 32)]
    _, report = jaxq.quantize_model(model, "int4_gptq", calibration=batches)
    losses = [row.loss for row in report.rows if row.kind == "ExpertLinear"]
    assert len(losses) == 3
    assert all(loss is None or loss < 1.05 for loss in losses)


def test_scales_do_not_move_into_experts():
    groups = norm_groups(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    sources = [group.source for group in groups]
    assert sources == ["layers/0/input_layernorm", "layers/0/self_attn/v_proj", "norm"]
    with pytest.raises(ValueError, match="the experts are not rotated"):
        rotate(Decoder(CONFIG, rngs=nnx.Rngs(0)), np.eye(32))


def test_errors():
    with pytest.raises(ValueError, match="uses 4 experts, and there are 3"):
        dataclasses.replace(CONFIG.experts, num_experts_per_token=4)
    mixed = dataclasses.replace(CONFIG.experts, layers=(True, False))
    with pytest.raises(ValueError, match="scan_layers needs layers of one kind"):
        dataclasses.replace(
            CONFIG, num_hidden_layers=2, experts=mixed, scan_layers=True
        )
