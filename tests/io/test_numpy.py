"""Dicts of numpy arrays: every preset comes back bit for bit, also through files."""

import io
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load, save

import jaxq
from jaxq.io import from_numpy, to_numpy
from tests import tables
from tests.serialization.restored import assert_restored


def through_savez(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    return np.load(file)  # without pickle


def tree(preset):
    w = jax.random.normal(jax.random.key(0), (2, 96, 8))
    stack = jaxq.quantize(w, preset, contracting=-2, batch=(0,))
    one = jaxq.quantize(w[0].astype(jnp.bfloat16), preset).with_activation("int8")
    return {"layers": [{"stack": stack, "one": one}], "step": 3, "b": jnp.ones(2)}


@tables.over_presets
def test_presets_come_back_from_savez(preset):
    arrays = to_numpy(tree(preset))
    assert all(type(array) is np.ndarray for array in arrays.values())
    assert all(array.dtype.kind in "biufU" for array in arrays.values())
    loaded = from_numpy(through_savez(arrays))
    assert_restored(loaded, tree(preset))
    assert loaded["layers"][0]["one"].meta == tree(preset)["layers"][0]["one"].meta


def test_the_numbers_can_be_read_without_jaxq():
    qt = jaxq.quantize(jnp.asarray(np.arange(12.0).reshape(4, 3)), "int8")
    arrays = to_numpy({"a": {"w": qt}})
    assert sorted(arrays) == ["__metadata__", "a/w.data", "a/w.scale"]
    values = arrays["a/w.data"].astype(np.float32) * arrays["a/w.scale"]  # [out, in]
    np.testing.assert_array_equal(values.T, jaxq.dequantize(qt))
    metadata = json.loads(str(arrays["__metadata__"]))
    entry = metadata["structure"]["items"]["a"]["items"]["w"]
    assert jaxq.QuantSpec.from_dict(entry["spec"]) == qt.spec


def test_the_same_arrays_as_in_a_file(tmp_path):
    value = tree("nf4_dq")
    arrays = to_numpy(value)
    jaxq.save(tmp_path / "file", value)
    in_file = load((tmp_path / "file").read_bytes())
    assert sorted(in_file) == sorted(set(arrays) - {"__metadata__"})
    for name, array in in_file.items():
        np.testing.assert_array_equal(array, arrays[name])


def test_other_containers():
    arrays = to_numpy(jaxq.quantize(jnp.eye(64), "nf4"))
    assert_restored(from_numpy(pickle.loads(pickle.dumps(arrays))), from_numpy(arrays))
    text = str(arrays.pop("__metadata__"))
    loaded = load(save(arrays))
    assert_restored(
        from_numpy({**loaded, "__metadata__": text}),
        jaxq.quantize(jnp.eye(64), "nf4"),
    )


def test_models():
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    qmodel, _ = jaxq.quantize_model(model, "int8")
    with pytest.raises(TypeError, match=r"Linear is a module. Pass nnx.state\(model\)"):
        to_numpy(qmodel)
    loaded = from_numpy(to_numpy(nnx.state(qmodel)))
    assert_restored(loaded["kernel"], qmodel.kernel[...])


def test_what_to_numpy_did_not_make():
    arrays = to_numpy({"w": jaxq.quantize(jnp.eye(64), "int4")})

    def refused(message, **changes):
        changed = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
        with pytest.raises(ValueError, match=f"^jaxq.io.from_numpy: .*{message}"):
            from_numpy(changed)

    text = str(arrays["__metadata__"])
    data = arrays["w.data"]
    refused("no '__metadata__'", __metadata__=None)
    refused("the metadata cannot be parsed", __metadata__="{")
    refused("the metadata have no structure", __metadata__="[]")
    refused("version 9", __metadata__=text.replace('"version": 1', '"version": 9'))
    refused("the tensor 'w.data' is missing", **{"w.data": None})
    refused(r"do not name the arrays \['more'\]", more=np.ones(1))
    refused("w is wrong: data is uint8", **{"w.data": data[:-1]})
    refused("w.data is stored as int16 but", **{"w.data": data.astype(np.int16)})
    with pytest.raises(TypeError, match="expected a dict of numpy arrays, got list"):
        from_numpy([])
    deep = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(ValueError, match="to_numpy: the tree is nested too deeply"):
        to_numpy(deep)
