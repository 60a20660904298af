"""`models.load(mesh=, rules=)`: a Hugging Face directory is read onto a mesh."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxq import files, sharding
from jaxq.models import ExpertsConfig, load, save, stacked
from jaxq.models._rope import RopeScaling
from tests.models.test_decoder import make

RULES = {
    "**/*_proj/kernel": P("d", "t"),
    "embed_tokens/embedding": P(None, "t"),
    "**": P(),
}
STACKED = {"**/*_proj/kernel": P("d", None, "t"), "**": P()}


def devices():
    return jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(("scan_layers", "rules"), [(False, RULES), (True, STACKED)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_model_is_where_place_puts_it(scan_layers, rules, dtype, tmp_path):
    save(tmp_path, make(), dtype=jnp.float32)
    mesh, options = devices(), {"scan_layers": scan_layers, "dtype": dtype}
    expected = sharding.place(load(tmp_path, **options)[0], mesh, rules)
    model, _ = load(tmp_path, mesh=mesh, rules=rules, **options)
    state, expected = nnx.state(model), nnx.state(expected)

    def compare(a, b):
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(compare, state, expected)
    assert model(jnp.array([[1, 2, 3]])).shape == (1, 3, model.config.vocab_size)


EXPERTS = ExpertsConfig(num_experts=4, num_experts_per_token=2, intermediate_size=16)
# The family that `save` writes, and how its files hold parameters.
OTHER_FILES = {
    "gpt2": {  # q, k and v in one tensor, kernels [in, out]
        "norm": "layer",
        "gated_mlp": False,
        "learned_positions": True,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "tie_word_embeddings": True,
        **dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), True),
    },
    "mixtral": {"experts": dataclasses.replace(EXPERTS, intermediate_size=48)},
    "gpt_oss": {  # columns of two kernels take turns
        "experts": dataclasses.replace(
            EXPERTS, intermediate_size=48, bias=True, clamp=7.0
        ),
        "attention_sinks": True,
        "sliding_window": 4,
        "attention_bias": True,
        "attention_output_bias": True,
        "rope_scaling": RopeScaling("yarn", 4.0, truncate=False),
    },
}


@pytest.mark.parametrize("family", OTHER_FILES)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_parts_of_tensors_in_other_families(family, scan_layers, tmp_path):
    model = make(**OTHER_FILES[family])
    save(tmp_path, model, dtype=jnp.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == family
    lead = (None,) * scan_layers
    rules = {
        "**/experts/*/kernel": P(*lead, "d", None, "t"),
        "**/*_proj/kernel": P(*lead, "d", "t"),
        "**": P(),
    }
    if family == "gpt2":
        del rules["**/experts/*/kernel"]
    mesh = devices()
    sharded, _ = load(tmp_path, mesh=mesh, rules=rules, scan_layers=scan_layers)
    expected = stacked(model) if scan_layers else model
    jax.tree.map(np.testing.assert_array_equal, nnx.state(sharded), nnx.state(expected))


def test_parameters_without_rules_are_replicated(tmp_path):
    save(tmp_path, make())
    mesh = devices()
    model, _ = load(tmp_path, mesh=mesh)
    for leaf in jax.tree.leaves(nnx.state(model)):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P()), leaf.ndim)


def test_only_parts_are_read(tmp_path, monkeypatch):
    save(tmp_path, make())
    parts = []
    read_parts = files.TensorFile.read_parts

    def recorded(file, name, indices):
        for place, part in read_parts(file, name, indices):
            parts.append((name, part.size))
            yield place, part

    monkeypatch.setattr(files.TensorFile, "read_parts", recorded)
    monkeypatch.setattr(files.TensorFile, "read", None)
    model, _ = load(tmp_path, mesh=devices(), rules=RULES)
    whole = model.layers[0].mlp.up_proj.kernel.size
    name = "model.layers.0.mlp.up_proj.weight"
    assert [size for path, size in parts if path == name] == [whole // 4] * 4


def test_errors(tmp_path):
    save(tmp_path, make())
    with pytest.raises(TypeError, match=r"jaxq\.models\.load: rules= needs mesh="):
        load(tmp_path, rules=RULES)
    with pytest.raises(TypeError, match=r"jaxq\.models\.load: mesh must be a jax"):
        load(tmp_path, mesh="d")
    with pytest.raises(ValueError, match=r"jaxq\.models\.load: the rules \['up'\]"):
        load(tmp_path, mesh=devices(), rules={"up": P(), "**": P()})
