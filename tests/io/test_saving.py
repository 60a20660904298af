"""`jaxq.save` and `jaxq.load`: models come back bit for bit, into a float model or not.

Errors name everything that does not fit the model. tests/serialization tests the file
itself.
"""

import base64
import json
import os
import subprocess
import sys
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from jaxq import QTensor, Recipe, Rule, serialization
from jaxq.nn import QuantizedParam
from tests import tables
from tests.serialization.restored import assert_restored

INT8 = Recipe([Rule(weight="int8")])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


# Files that were written when int4 and int3 had absmax scales, compressed by zlib. They
# hold {"w": quantize(w, preset)} with the w of the test.
OLD_FILES = {
    "int4": (
        "eNqNU0uu0zAUZYCEWAKMKg8hD5G0qqoOYMgABkwYNcW6TW76TB07z3b6eVXFFmAJsATEEt5bCiwB"
        "pviX9rUFiUwin3vPuR8fr+/f89+WUFqjgRIMUErGW1JJVYMhY/IB1lckCb8x2eZkiUozKXIy7qVJ"
        "LycLJkp3yIlRiDlxmDaqLUyr0AUsh+mQUbLChAxmsNYxujrJujIotFRR6hIaLzPpZ0kvm3qswSJy"
        "Qp+Bx4QZBNJcgWg5KGY2Mc9sgkpO3qJ6pWTbRHl27fE0G7kjrEMTls3duQE/mx0Hdz59U9s9KVZ0"
        "qAcL4FF8VnEJJh1GcRegqu2iMNM1rEOs4KxpmJifR2xzotxHBIJCbSguUYS4rCqN5rjLYrEnXAJf"
        "oo5FZImaVkrWIaaNVGgn8rPMUbpZug39bdFSlag8dmHv+iKAoq1pIYVRUBgs9z6YcVks6EHFgq4/"
        "T6lbblgT1pA5oOLh0irgOmz2nzOUh6vzy+1nAbfV2RJMtGK3Cg4b2UY/KLmKGhbizPr2KBPB1/DD"
        "O+OfuBCUgk2gd3508OpZyD1prbXmG8XF7v3wP2ox+UTu4COveI1K0kbaGncnODeCu++ZlIu7GBNN"
        "a6h9EHPs4J37rHJX3j14X9y+8Hfp0D53f41kPMmSdJr47dBQTVvweTKYerLDj7ijY+rwnDtI+sPp"
        "btcL3+Tl5MXDp++br7e/H7+Rn7//tIdfN18+5k8e/Pj2Sbx+ZA9/AM8ffIw="
    ),
    "int3": (
        "eNqNU7uO00AUjcQKiRK+IJrai4izWkVpoECiBCFRraPhxr4OQ+wZ78x1Hhul50OQtkP8Ah+w/Zb8"
        "BA0V83KySRDCjTXn3nMfZ86sznr+2zDOayQogIBzNt6wUukaiI3ZZ1hdsyT8xmyTsQVqI5TM2Lg/"
        "SPoZmwtZuEPGSCNmzGGGdJtTq9EFLEeYkFGInEKGIKxNjC6Psq4JpVE6lvoEjS9zNUyTfjrxWIN5"
        "5IQ5A09IGgbSTINsK9CC1jGP1qFKxt6hfqNV28Ty4sbjg3TkjrAKQ1h25c4N+N3sOrj16eva6qRF"
        "3qEezKGKxadlpYAGl7G4C3DddlGYmhpWIZZXommEnJ1G7HCy2EUkgkZDHBcoQ1yVpUE6nDKf7whT"
        "QVZ+hDr2UQUaXmpVh7AhpdEu5deZoXLrdCL9TWulC9QeO7fXfR5A2dY8V5I05ITFzgrTSuVzvq9i"
        "QTeip9RtRaIJSnipyyrcWwmVCeL+a41if4Fe4mEacDuAWABFQ3aCVLBWbXSFVksThWupEta9B5kI"
        "C+yM6Ox/5EXQGtaB3rnSwcvnIfdotNZacBS13bnif6rF5KNyezf5ijeoFW+U7fFwg1M7uCufKjV/"
        "iAnZtMTts5hhB2/dZyt37d2z983tO/8wuLSP3t8kG1+lyWCSeHV46GYs+CK5mHiyww+4o0Nqesq9"
        "SNLRZLvt9171Xv56evf46+8v5aP329fPPr79MXny/fbnt7P7P6KUeSE="
    ),
}


@pytest.mark.parametrize(("preset", "largest_code"), [("int4", 7), ("int3", 3)])
def test_files_of_the_old_default_keep_their_numbers(path, preset, largest_code):
    columns = np.array([1.0, -0.25], np.float32)
    w = (np.arange(64, dtype=np.float32) % 13 - 6).reshape(32, 2) * columns
    path.write_bytes(zlib.decompress(base64.b64decode(OLD_FILES[preset])))
    qt = jaxq.load(path)["w"]
    assert qt.spec == jaxq.presets()[f"{preset}_absmax"]
    exact = np.abs(w).max(0) * np.float32(1 / largest_code)
    scale = exact.astype(jnp.bfloat16).astype(np.float32)
    codes = np.rint(w * (1 / scale)).clip(-largest_code, largest_code)
    np.testing.assert_array_equal(qt.codes(), codes)
    np.testing.assert_array_equal(jaxq.dequantize(qt), codes * scale)
    np.testing.assert_allclose(jnp.eye(32) @ qt, codes * scale, rtol=1e-6)


# Errors of files.


def test_errors_begin_with_the_public_name(path):
    with pytest.raises(FileNotFoundError, match="^load: there is no file"):
        jaxq.load(path)
    with pytest.raises(FileNotFoundError, match="^save: the folder .* does not exist"):
        jaxq.save(path / "below", {})
    with pytest.raises(TypeError, match="^save: a has type complex"):
        jaxq.save(path, {"a": 1j})
    path.write_bytes(b"too short")
    with pytest.raises(ValueError, match="^load: .* it is not a whole safetensors"):
        jaxq.load(path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, f"{'x/' * 3000}x"])
def test_names_that_no_file_can_have(tmp_path, name):
    path = tmp_path / name
    with pytest.raises((OSError, ValueError), match="save: the file cannot be written"):
        jaxq.save(path, {})
    with pytest.raises((OSError, ValueError), match="load: the file cannot be read"):
        jaxq.load(path)


def test_paths_of_pipes_and_folders(path, tmp_path):
    os.mkfifo(path)
    with pytest.raises(OSError, match=f"load: .* it is a pipe.*{path.name}"):
        jaxq.load(path)
    with pytest.raises(OSError, match=f"save: .* it is a pipe.*{path.name}"):
        jaxq.save(path, {})
    with pytest.raises(IsADirectoryError, match=f"load: .* a folder.*{tmp_path.name}"):
        jaxq.load(tmp_path)


def test_a_system_that_refuses_to_list_or_open(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    jaxq.save(path, {"x": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        with pytest.raises(PermissionError, match=f"save: the file .*{path.name}"):
            jaxq.save(path, {"x": 2})
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        with pytest.raises(PermissionError, match=f"load: the file .*{path.name}"):
            jaxq.load(path)
    assert jaxq.load(path) == {"x": 1}


def test_saving_a_tree_imports_no_flax(path):
    script = "import sys, jaxq; jaxq.save(sys.argv[1], {'x': 1}); print(*sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", script, path], text=True)
    assert "jaxq.serialization" in output.split()
    assert "flax" not in output.split()


def test_trees_are_files_of_serialization(path):
    tree = {"w": jaxq.quantize(jnp.eye(64, 4), "nf4_dq")}
    jaxq.save(path, tree)
    assert_restored(jaxq.load(path), tree)
    assert_restored(serialization.read_tree(path), tree)
    jaxq.save(path, linear())
    with pytest.raises(ValueError, match="read_tree: .* holds a model, not a tree"):
        serialization.read_tree(path)


def test_damaged_transforms(path):
    contents = serialization.Contents("model", {}, {"transforms": 3})
    serialization.write_contents(path, contents, caller="save")
    with pytest.raises(
        ValueError, match="is damaged: transforms must be a dict of names, got 3"
    ):
        jaxq.load(path)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_damaged_models_are_refused_by_name(path, kind):
    if kind == "linen":
        module = linen.Dense(8)
        variables = module.init(jax.random.key(0), jnp.ones((2, 40)))
        _, saved, _ = jaxq.nn.linen.quantize_model(module, variables, INT8)
        into, name = saved, "params/kernel.scale"
    else:
        saved, _ = jaxq.quantize_model(linear(), INT8)
        into, name = linear(1), "kernel.scale"
    jaxq.save(path, saved)
    whole = path.read_bytes()
    assert jax.tree.leaves(jaxq.load(path, into=into))
    end = 8 + int.from_bytes(whole[:8], "little")
    start, _ = json.loads(whole[8:end])[name]["data_offsets"]
    flipped = bytearray(whole)
    flipped[end + start] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=rf"bytes 0 to 31 of {name} do not have"):
        jaxq.load(path, into=into)
    assert jax.tree.leaves(jaxq.load(path, into=into, verify=False))


def test_a_kind_that_this_version_does_not_know(path):
    contents = serialization.Contents("odd", {}, {})
    serialization.write_contents(path, contents, caller="save")
    with pytest.raises(ValueError, match=r"load: .*file\.safetensors holds a 'odd'"):
        jaxq.load(path)


def test_a_quantized_weight_in_the_place_of_a_number(path):
    class Counted(nnx.Module):
        def __init__(self, value):
            self.step = nnx.Variable(value)

    jaxq.save(path, Counted(jaxq.quantize(jnp.ones((4, 4)), "int8")))
    with pytest.raises(ValueError, match="step: int in the model, QTensor"):
        jaxq.load(path, into=Counted(0))


def test_two_leaves_with_one_path(path):
    jaxq.save(path, {"a/b": jnp.ones(1), "a": {"b": jnp.zeros(1)}})
    with pytest.raises(ValueError, match=r"safetensors has two leaves .* 'a/b'"):
        jaxq.load(path, into={"a/b": jnp.ones(1)})


# Models.


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(6, 40, rngs=rngs)
        self.conv = nnx.Conv(40, 8, (3,), rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.out = nnx.Einsum("btd,dn->btn", (8, 40), (40,), rngs=rngs)
        self.count = nnx.Variable(jnp.asarray(3))
        self.pair = nnx.Variable({"a": jnp.ones(2), "b": jnp.asarray(3)})

    def __call__(self, tokens):
        x = self.norm(self.conv(self.embed(tokens)))
        return self.embed.attend(self.dropout(self.out(x)))


TOKENS = jnp.asarray([[0, 1, 5, 2]], jnp.int32)


def make(seed=0):
    return Model(nnx.Rngs(seed))


def logits(model):
    return np.asarray(nnx.jit(lambda m: m(TOKENS))(model))


@pytest.mark.parametrize(
    "weight", tables.thinned([None, "int8", "nf4_dq", "w8a8"], ["nf4_dq"])
)
def test_models(path, weight):
    model = make()
    if weight:
        rule = (
            Rule(weight="int8", activation="int8")
            if weight == "w8a8"
            else Rule(weight=weight)
        )
        model, _ = jaxq.quantize_model(model, Recipe([rule]))
    jaxq.save(path, model)
    other = make(1)
    state = jax.tree.map(lambda leaf: leaf, nnx.state(other))
    loaded = jaxq.load(path, into=other)
    assert nnx.graphdef(loaded) == nnx.graphdef(model)
    assert logits(loaded).tobytes() == logits(model).tobytes()
    assert_restored(nnx.state(loaded), nnx.state(model))
    # The model that was filled stays as it was.
    assert_restored(nnx.state(other), state)
    assert nnx.graphdef(other) == nnx.graphdef(make(1))
    # Into the same quantized model, into one of shapes only, and without a model.
    if weight:
        assert_restored(nnx.state(jaxq.load(path, into=loaded)), nnx.state(model))
        assert isinstance(loaded.embed.embedding, QuantizedParam)
    shapes = nnx.eval_shape(lambda: make())
    assert_restored(nnx.state(jaxq.load(path, into=shapes)), nnx.state(model))
    flat = jaxq.load(path)
    assert set(flat) >= {
        "embed/embedding",
        "conv/kernel",
        "count",
        "dropout/rngs/key",
        "pair",
    }
    assert isinstance(flat["conv/kernel"], QTensor) == bool(weight)


class Activated(nnx.Module):
    """A model that holds functions of jax as attributes."""

    def __init__(self, seed=0):
        self.up = nnx.Linear(16, 16, rngs=nnx.Rngs(seed))
        self.activation = nnx.relu
        self.layers = nnx.Sequential(nnx.Linear(16, 4, rngs=nnx.Rngs(seed)), nnx.silu)

    def __call__(self, x):
        return self.layers(self.activation(self.up(x)))


def test_models_that_hold_functions_of_jax_are_saved(path):
    model, _ = jaxq.quantize_model(Activated(), INT8)
    jaxq.save(path, model)
    loaded = jaxq.load(path, into=Activated(seed=1))
    x = jnp.linspace(-1, 1, 32).reshape(2, 16)
    assert np.asarray(loaded(x)).tobytes() == np.asarray(model(x)).tobytes()


def test_numbers_in_variables(path):
    class Counted(nnx.Module):
        def __init__(self, step):
            self.step = nnx.Variable(step)

    jaxq.save(path, Counted(7))
    assert jaxq.load(path, into=Counted(0)).step.get_value() == 7
    with pytest.raises(ValueError, match=r"step: float in the model, int in the file"):
        jaxq.load(path, into=Counted(0.5))


def test_states(path):
    model = make()
    jaxq.save(path, nnx.state(model))
    assert_restored(nnx.state(jaxq.load(path, into=make(1))), nnx.state(model))
    jaxq.save(path, nnx.state(model, nnx.Param))
    flat = jaxq.load(path)
    assert "count" not in flat
    assert (flat["conv/kernel"] == model.conv.kernel[...]).all()
    with pytest.raises(ValueError, match="count: in the model, missing from the file"):
        jaxq.load(path, into=make())


def test_stacked_and_shared(path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            build = nnx.vmap(lambda r: nnx.Linear(40, 8, rngs=r), in_axes=0, out_axes=0)
            self.stack = nnx.split_rngs(splits=3)(build)(rngs)
            self.first = nnx.Linear(40, 8, rngs=rngs)
            self.second = nnx.Linear(40, 8, rngs=rngs)
            self.second.kernel = self.first.kernel
            self.listed = nnx.List([self.first.kernel])

    model, _ = jaxq.quantize_model(Net(nnx.Rngs(0)), "int4")
    jaxq.save(path, model)
    loaded = jaxq.load(path, into=Net(nnx.Rngs(1)))
    assert_restored(nnx.state(loaded), nnx.state(model))
    assert loaded.stack.kernel[...].batch_shape == (3,)
    assert loaded.first.kernel is loaded.second.kernel is loaded.listed[0]
    assert isinstance(loaded.first.kernel, QuantizedParam)


def linear(seed=0, **options):
    return nnx.Linear(40, 8, rngs=nnx.Rngs(seed), **options)


def quantized(spec="int8", activation=None, **options):
    return jaxq.quantize_model(
        linear(**options), Recipe([Rule(weight=spec, activation=activation)])
    )[0]


def own_dot(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


GROUPS = [jaxq.QuantSpec("int4", jaxq.PerGroup(size)) for size in (20, 8)]


@pytest.mark.parametrize(
    ("saved", "into", "message"),
    [
        (
            quantized,
            lambda: linear(use_bias=False),
            "bias: in the file, not in the model",
        ),
        (
            lambda: linear(use_bias=False),
            linear,
            "bias: in the model, missing from the file",
        ),
        (
            lambda: nnx.Linear(40, 9, rngs=nnx.Rngs(0)),
            linear,
            r"kernel: float32\[40, 8\] in the model, float32\[40, 9",
        ),
        (
            quantized,
            lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0)),
            r"kernel: float32\[8, 8\] in the model, QTensor\(int8\[40x8",
        ),
        (
            lambda: linear(param_dtype=jnp.bfloat16),
            linear,
            r"kernel: float32\[40, 8\] in the model, bfloat16",
        ),
        (
            lambda: quantized(param_dtype=jnp.bfloat16),
            linear,
            r"kernel: float32\[40, 8\] in the model, QTensor",
        ),
        (
            lambda: quantized(GROUPS[0]),
            lambda: quantized(GROUPS[1]),
            r"size=8.* in the model, .*size=20.* in the file",
        ),
        (
            lambda: quantized("int4"),
            lambda: quantized("nf4"),
            r"kernel: QTensor\(.*nf4.* in the model, QTensor\(.*int4.* in",
        ),
        (
            linear,
            quantized,
            r"kernel: QTensor\(kernel: int8.* in the model, float32\[40, 8\] in the",
        ),
        (
            lambda: quantized(activation="int8"),
            quantized,
            "in the model, .*activation=int8.* in the file",
        ),
        (
            quantized,
            lambda: linear(dot_general=own_dot),
            "kernel: its dot_general is a custom function",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_parameter_that_does_not_fit_is_named(path, saved, into, message):
    jaxq.save(path, saved())
    with pytest.raises(
        ValueError, match=r"(?s)file.safetensors does not fit the model:.*" + message
    ):
        jaxq.load(path, into=into())


def test_one_error_names_all_parameters_that_do_not_fit(path):
    jaxq.save(path, quantized())
    with pytest.raises(ValueError) as error:
        jaxq.load(path, into=make())
    assert {"bias", "kernel"} <= {
        line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]
    }
    assert "embed/embedding: in the model, missing" in str(error.value)


def test_a_quantized_weight_in_another_role(path):
    class Own(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((40, 8)))
            self.bias = nnx.Param(jnp.ones(8))

    jaxq.save(path, quantized())
    with pytest.raises(
        ValueError, match="kernel: quantized in the file, but not the weight of a layer"
    ):
        jaxq.load(path, into=Own())
    other = nnx.Einsum("bn,kn->bk", (40, 8), (8,), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"kernel: QTensor.* does not contract the layer's axes \[-1\]"
    ):
        jaxq.load(path, into=other)


def test_a_model_of_another_packing_order_takes_the_codes(path):
    model = quantized("int4")
    jaxq.save(path, model)
    model.kernel.set_value(jaxq.relayout(model.kernel[...], "high_first"))
    x = jnp.ones((2, 40))
    np.testing.assert_allclose(jaxq.load(path, into=model)(x), model(x), rtol=1e-6)


def test_a_tree_is_not_a_model(path):
    jaxq.save(path, {"kernel": jnp.ones((40, 8)), "bias": jnp.ones(8)})
    with pytest.raises(
        ValueError, match="holds a tree, not a model. Load it without into="
    ):
        jaxq.load(path, into=linear())
    jaxq.save(path, linear())
    with pytest.raises(ValueError, match="does not fit into=:\n  bias is only in"):
        jaxq.load(path, into={})


def test_equal_paths_are_an_error(path):
    class Odd(nnx.Module):
        def __init__(self):
            self.a = nnx.Dict(
                {
                    "b/c": nnx.Param(jnp.ones(1)),
                    "b": nnx.Dict({"c": nnx.Param(jnp.ones(1))}),
                }
            )

    with pytest.raises(ValueError, match="two parameters have the path 'a/b/c'"):
        jaxq.save(path, Odd())


class Pair(NamedTuple):
    a: int
    b: int


class Bare(nnx.Module):
    """Arrays outside Variables, in every kind of container, and a layer."""

    def __init__(self, value: float):
        self.layer = nnx.Linear(32, 4, rngs=nnx.Rngs(0))
        self.table = nnx.data(jnp.full(3, value))
        self.pair = nnx.data((np.full(2, value, np.float32), {"z": jnp.full(1, value)}))
        self.named = nnx.data(Pair(jnp.full(1, value), 3))
        self.codes = nnx.data(jaxq.quantize(jnp.full((32, 1), value), "int8"))


def test_arrays_outside_variables_are_part_of_a_model(path):
    model, _ = jaxq.quantize_model(Bare(2.0), INT8)
    jaxq.save(path, model)
    assert {"table", "pair/0", "pair/1/z", "codes"} <= set(jaxq.load(path))
    loaded = jaxq.load(path, into=Bare(1.0))
    assert_restored(
        jax.tree.leaves(nnx.state(loaded)),
        [jnp.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))],
    )
    assert isinstance(loaded.layer.kernel, QuantizedParam)
    other = Bare(1.0)
    other.table = jnp.ones(4)
    jaxq.save(path, model)
    with pytest.raises(
        ValueError, match=r"table: float32\[4\] in the model, float32\[3\] in the file"
    ):
        jaxq.load(path, into=other)
