"""`quantize_checkpoint` with statistics: what `quantize_model` gives with the same."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import models
from jaxq.io import layouts, quantize_checkpoint, read_checkpoint
from jaxq.io.checkpoint import _stream_plan
from tests.models.test_decoder import make

SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
SPEC = layouts.get("gptq").spec({"bits": 4, "group_size": 32, "sym": True})
RECIPE = jaxq.Recipe(
    [
        *jaxq.recipes.get("int4").rules[:-1],
        jaxq.Rule(weight=SPEC, method="gptq"),
    ]
)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A directory in floats, its model, and the statistics of its layers."""
    path = tmp_path_factory.mktemp("floats")
    models.save(path, make(**SIZES, num_hidden_layers=1), dtype="float32")
    model, _ = models.load(path)
    tokens = np.random.default_rng(3).integers(0, 97, (4, 64)).astype(np.int32)
    return path, model, jaxq.nn.calibrate(model, [tokens])


def test_gptq_is_that_of_quantize_model(calibrated, tmp_path):
    path, model, stats = calibrated
    expected, _ = jaxq.quantize_model(model, RECIPE, calibration=stats)
    jaxq.save(tmp_path / "stats.safetensors", stats)
    for number, source in enumerate((stats, tmp_path / "stats.safetensors")):
        out = tmp_path / str(number)
        quantize_checkpoint(path, out, RECIPE, format="gptq", statistics=source)
        streamed, _ = models.load(out)
        for layer in ("self_attn.q_proj", "mlp.down_proj"):
            module, name = layer.split(".")
            own = getattr(getattr(streamed.layers[0], module), name).kernel[...]
            other = getattr(getattr(expected.layers[0], module), name).kernel[...]
            np.testing.assert_array_equal(own.codes(), other.codes())
            np.testing.assert_array_equal(own.scale, other.scale)
    # The data matter: rounding to nearest gives other codes.
    with read_checkpoint(path) as floats:
        weight = jnp.asarray(floats["model.layers.0.self_attn.q_proj.weight"])
    nearest = jaxq.quantize(weight.T, SPEC)
    kernel = streamed.layers[0].self_attn.q_proj.kernel[...]
    assert (kernel.codes() != nearest.codes()).any()


def test_what_is_missing_is_named(calibrated, tmp_path):
    path, _, stats = calibrated
    part = {name: value for name, value in stats.items() if "o_proj" not in name}
    with pytest.raises(ValueError, match=r"no layer for .*o_proj\.weight"):
        quantize_checkpoint(path, tmp_path, RECIPE, format="gptq", statistics=part)
    with pytest.raises(ValueError, match=r"'gptq', which needs data.*statistics="):
        quantize_checkpoint(path, tmp_path, RECIPE, format="gptq")
    with pytest.raises(ValueError, match="moves scales between layers"):
        quantize_checkpoint(path, tmp_path, "int4_awq", statistics=stats)
    with pytest.raises(ValueError, match="no static ranges"):
        quantize_checkpoint(path, tmp_path, "w8a8_static", statistics=stats)
    jaxq.save(tmp_path / "list.safetensors", [jnp.zeros(2)])
    with pytest.raises(ValueError, match="does not hold a dict"):
        quantize_checkpoint(
            path, tmp_path, RECIPE, statistics=tmp_path / "list.safetensors"
        )
    assert not list(tmp_path.glob("model*"))


def test_the_statistics_of_an_expert_are_a_slice(tmp_path):
    """Layer 0 has an expert 0: the numbers in a path are told apart."""
    stats = {"layers/0/mlp/experts/gate_proj": {}, "layers/0/self_attn/q_proj": {}}
    prefix = "model.layers.0"
    place = {
        f"{prefix}.block_sparse_moe.experts.0.w1.weight": 0,
        f"{prefix}.mlp.experts.2.gate_proj.weight": 2,
        f"{prefix}.self_attn.q_proj.weight": None,
    }
    for name, expert in place.items():
        found = _stream_plan._place(name, set(), stats)
        assert found is not None
        assert found.expert == expert
