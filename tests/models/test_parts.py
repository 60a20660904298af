"""`models.load(mesh=, rules=)`: a Hugging Face directory is read onto a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxq import files, sharding
from jaxq.models import load, save
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


def test_parameters_without_rules_are_replicated(tmp_path):
    save(tmp_path, make())
    mesh = devices()
    model, _ = load(tmp_path, mesh=mesh)
    for leaf in jax.tree.leaves(nnx.state(model)):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P()), leaf.ndim)


def test_only_parts_are_read(tmp_path, monkeypatch):
    save(tmp_path, make())
    parts = []
    read_part = files.TensorFile.read_part

    def recorded(file, name, index):
        part = read_part(file, name, index)
        parts.append((name, part.size))
        return part

    monkeypatch.setattr(files.TensorFile, "read_part", recorded)
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
