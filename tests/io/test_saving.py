"""Files: everything comes back bit for bit, what does not fit is named, and a crash leaves the old file."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import jaxq
from jaxq import QTensor, Recipe, Rule
from jaxq.nn import QuantizedParam
from tests import tables

ALL = Recipe([Rule(weight="int8")])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def same(a, b):
    """Equal structure, types, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if not hasattr(y, "dtype"):
            assert type(x) is type(y)
            assert x == y or (x != x and y != y)
            continue
        assert isinstance(x, jax.Array)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def back(path, tree):
    jaxq.save(path, tree)
    return jaxq.load(path)


# Trees.


@pytest.mark.parametrize("packing", ["low_first", "high_first", "none"])
def test_packing_and_activation_come_back(path, packing):
    qt = (
        jaxq.relayout(jaxq.quantize(jnp.eye(64, 4), "int4"), packing)
        .with_activation("int8")
        .astype(jnp.bfloat16)
    )
    got = back(path, qt)
    same(got, qt)
    assert got.meta == qt.meta
    assert (jaxq.dequantize(got) == jaxq.dequantize(qt)).all()


def test_trees(path):
    qt = jaxq.quantize(jnp.eye(64, 4), "nf4_dq")
    tree = {
        "list": [1, 2.5, None, "text", True, qt],
        "tuple": (jnp.arange(3), (), [], {}),
        "nested": {"a": {"b": qt}, "": jnp.ones(2)},
        "a/b": jnp.zeros(3),
        "a": {"b": jnp.ones(3, jnp.bfloat16)},
        "__metadata__": jnp.ones(1),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(3),
        "key": jax.random.key(1),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "extremes": (float("inf"), float("-inf"), float("nan"), 2**70, -0.0),
        "bool": jnp.asarray([True, False]),
        "ünïcode \n": jnp.ones(1),
    }
    same(back(path, tree), tree)


def test_names_that_meet_those_of_leaves(path):
    qt = jaxq.quantize(jnp.eye(4), "int8")
    same(back(path, {"w": qt, "w.data": jnp.ones(2), "w.scale": jnp.zeros(1)}), {
        "w": qt, "w.data": jnp.ones(2), "w.scale": jnp.zeros(1)
    })  # fmt: skip
    same(
        back(path, {"": jnp.ones(1), "value": jnp.zeros(1)}),
        {"": jnp.ones(1), "value": jnp.zeros(1)},
    )


@pytest.mark.parametrize("value", [None, 3, 2.5, True, "text", jnp.ones(2), [], {}])
def test_a_single_value(path, value):
    same(back(path, value), value)


DTYPES = [
    d
    for d in vars(ml_dtypes).values()
    if isinstance(d, type) and issubclass(d, np.generic)
]
NOT_ON_CPU = ("int1", "uint1", "float6_e2m3fn", "float6_e3m2fn")
DTYPES = [
    np.dtype(d)
    for d in DTYPES
    if np.dtype(d).itemsize <= 2 and np.dtype(d).name not in NOT_ON_CPU
]
DTYPES += [
    np.dtype(d)
    for d in (
        "bool",
        "int8",
        "int16",
        "int32",
        "uint8",
        "uint16",
        "uint32",
        "float16",
        "float32",
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(path, dtype):
    array = np.asarray([[0, 1, 0], [1, 1, 0]]).astype(dtype)
    same(back(path, {"a": array}), {"a": array})
    same(
        back(path, {"a": array.T, "b": array[:, ::2]}),
        {"a": array.T, "b": array[:, ::2]},
    )


def test_wide_arrays_of_jax_need_x64_to_be_read(path):
    with jax.enable_x64(True):
        jaxq.save(path, {"step": jnp.int64(3), "x": jnp.ones(2, jnp.float64)})
    with pytest.raises(
        ValueError,
        match="step is int64, which jax turns into int32. Set jax_enable_x64",
    ):
        jaxq.load(path)
    with jax.enable_x64(True):
        got = jaxq.load(path)
    assert (got["step"].dtype, got["x"].dtype) == ("int64", "float64")


def test_wide_arrays_of_numpy_come_back(path):
    got = back(path, {"step": np.int64(2**40 + 1), "x": np.array([1e300, 0.1])})
    assert got["step"].dtype == np.int64
    assert int(got["step"]) == 2**40 + 1
    assert (got["x"] == [1e300, 0.1]).all()


def test_named_tuples_come_back_as_dicts(path):
    got = back(path, {"layer": Pair(jnp.ones(2), (Pair(1, None),))})
    same(got, {"layer": {"a": jnp.ones(2), "b": ({"a": 1, "b": None},)}})


def test_big_endian_arrays(path):
    assert back(path, np.arange(3, dtype=">f4")).tolist() == [0.0, 1.0, 2.0]


def test_path_may_be_text_and_the_name_anything(tmp_path):
    for name in (str(tmp_path / "a"), tmp_path / "b.bin"):
        assert back(name, {"x": 1}) == {"x": 1}
    assert sorted(os.listdir(tmp_path)) == ["a", "b.bin"]


def test_the_file_is_plain_safetensors(path):
    jaxq.save(
        path,
        {"w": jaxq.quantize(jnp.eye(64, 4), "nf4_dq"), "b": jnp.ones(2, jnp.bfloat16)},
    )
    with safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == ["b", "w.data", "w.scale.data", "w.scale.scale"]
        assert file.metadata()["format"] == "jaxq"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_overwriting_does_not_touch_what_was_loaded(path):
    first = back(path, {"x": jnp.arange(1000)})
    jaxq.save(path, {"x": jnp.zeros(1000, jnp.int32)})
    same(first, {"x": jnp.arange(1000)})


class Pair(NamedTuple):
    a: int
    b: int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "a/0 has type object, which cannot be saved"),
        (object, "a/0 has type type.* A tree may hold dicts, lists"),
        ({1, 2}, "a/0 has type set"),
        ({3: jnp.ones(1)}, "the keys of a/0 must be strings, got 3"),
        (1j, "a/0 has type complex"),
        (np.ones(2, np.complex64), "a/0 has dtype complex64"),
        (np.asarray(["x"]), "a/0 has dtype <U1"),
        (nnx.Param(jnp.ones(2)), "a/0 has type Param"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "a/0 has type ShapeDtypeStruct"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_cannot_be_saved_is_named(path, value, message):
    path.write_bytes(b"old")
    with pytest.raises(TypeError, match=message):
        jaxq.save(path, {"a": [value]})
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


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
    got = jaxq.load(path, into=other)
    assert nnx.graphdef(got) == nnx.graphdef(model)
    assert logits(got).tobytes() == logits(model).tobytes()
    same(nnx.state(got), nnx.state(model))
    # The model that was filled stays as it was.
    same(nnx.state(other), state)
    assert nnx.graphdef(other) == nnx.graphdef(make(1))
    # Into the same quantized model, into one of shapes only, and without a model.
    if weight:
        same(nnx.state(jaxq.load(path, into=got)), nnx.state(model))
        assert isinstance(got.embed.embedding, QuantizedParam)
    shapes = nnx.eval_shape(lambda: make())
    same(nnx.state(jaxq.load(path, into=shapes)), nnx.state(model))
    flat = jaxq.load(path)
    assert set(flat) >= {
        "embed/embedding",
        "conv/kernel",
        "count",
        "dropout/rngs/key",
        "pair",
    }
    assert isinstance(flat["conv/kernel"], QTensor) == bool(weight)


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
    same(nnx.state(jaxq.load(path, into=make(1))), nnx.state(model))
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
    got = jaxq.load(path, into=Net(nnx.Rngs(1)))
    same(nnx.state(got), nnx.state(model))
    assert got.stack.kernel[...].batch_shape == (3,)
    assert got.first.kernel is got.second.kernel is got.listed[0]
    assert isinstance(got.first.kernel, QuantizedParam)


def linear(seed=0, **more):
    return nnx.Linear(40, 8, rngs=nnx.Rngs(seed), **more)


def quantized(spec="int8", activation=None, **more):
    return jaxq.quantize_model(
        linear(**more), Recipe([Rule(weight=spec, activation=activation)])
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
            r"kernel: QTensor\(kernel: int8.* in the model, float32\[40, 8\] in the file",
        ),
        (
            lambda: quantized(activation="int8"),
            quantized,
            "in the model, .*activation=int8.* in the file",
        ),
        (
            quantized,
            lambda: linear(dot_general=own_dot),
            "kernel: it has a dot_general of its own",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_named(path, saved, into, message):
    jaxq.save(path, saved())
    with pytest.raises(
        ValueError, match=r"(?s)file.safetensors does not fit the model:.*" + message
    ):
        jaxq.load(path, into=into())


def test_all_that_does_not_fit_is_named_at_once(path):
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
        ValueError, match="kernel: quantized in the file, but in no layer jaxq knows"
    ):
        jaxq.load(path, into=Own())
    other = nnx.Einsum("bn,kn->bk", (40, 8), (8,), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"kernel: QTensor.* does not contract the layer's axes \[-1\]"
    ):
        jaxq.load(path, into=other)


def test_a_relaid_model_takes_canonical_codes(path):
    model = quantized("int4")
    jaxq.save(path, model)
    model.kernel.set_value(jaxq.relayout(model.kernel[...], "high_first"))
    x = jnp.ones((2, 40))
    np.testing.assert_allclose(jaxq.load(path, into=model)(x), model(x), rtol=1e-6)


def test_trees_and_models_are_not_each_other(path):
    jaxq.save(path, {"kernel": jnp.ones((40, 8)), "bias": jnp.ones(8)})
    with pytest.raises(
        ValueError, match="holds a tree, not a model. Load it without into="
    ):
        jaxq.load(path, into=linear())
    jaxq.save(path, linear())
    with pytest.raises(TypeError, match="into= must be a flax nnx module, got dict"):
        jaxq.load(path, into={})


def test_paths_that_meet(path):
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


# Files that are not what they should be.


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load: there is no file .*nothing"):
        jaxq.load(tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match=r"save: the folder .*nowhere does not exist"
    ):
        jaxq.save(tmp_path / "nowhere" / "file", {})
    with pytest.raises(FileNotFoundError, match="load: there is no file"):
        jaxq.load(tmp_path)


def test_not_a_jaxq_file(path):
    save_file({"a": np.ones(2, np.float32)}, path)
    with pytest.raises(
        ValueError, match="was not written by jaxq.save.*jaxq.models.load"
    ):
        jaxq.load(path)
    path.write_text("something else, long enough to have a header of eight bytes")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        jaxq.load(path)


def rewrite(path, change):
    """The same tensors under changed metadata."""
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["jaxq"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    change(header, tensors)
    save_file(tensors, path, metadata={"format": "jaxq", "jaxq": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h, t: h.update(version=2),
            "has format version 2. This version of jaxq reads format version 1",
        ),
        (lambda h, t: h.pop("version"), "has format version None"),
        (lambda h, t: h.pop("structure"), "metadata of .* is damaged"),
        (lambda h, t: t.pop("w.data"), "tensor 'w.data' is missing"),
        (
            lambda h, t: t.update(more=np.ones(1)),
            r"holds tensors that its metadata does not name: \['more'\]",
        ),
        (
            lambda h, t: t.update({"w.data": t["w.data"][:-1]}),
            "w is damaged: data is uint8",
        ),
        (
            lambda h, t: t.update({"w.scale": t["w.scale"][:, :-1]}),
            "w is damaged: scale is",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"].update({"is": "odd"}),
            "'odd', which this version does not know",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["spec"].update(format="int5x"),
            "w is not described as a QTensor",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["spec"].update(new=1),
            "w is not described as a QTensor",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["geometry"].pop("order"),
            "w is not described as a QTensor",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["spec"].update(symmetric=False),
            "w .*(damaged|described)",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["geometry"].update(
                num_contracted=0
            ),
            "w is damaged: .*contradicts",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["geometry"].update(
                num_contracted=3
            ),
            "w is damaged: .*contradicts",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["geometry"].update(
                order=[-2, -9]
            ),
            "w is damaged: .*contradicts",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["spec"]["granularity"].update(
                size=32
            ),
            "w is damaged: its spec says",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"].update(dtype="int8"),
            "w is damaged: it dequantizes to int8",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"].update(dtype="float33"),
            "w is damaged: .*float33",
        ),
        (lambda h, t: h["structure"]["items"]["w"].update(dtype=7), "w is damaged: .*"),
        (
            lambda h, t: h["structure"]["items"]["b"].update(dtype="float16"),
            "b is stored as float32 but should be",
        ),
        (lambda h, t: h["structure"]["items"]["b"].update(dtype="float33"), "damaged"),
    ],
)
def test_damaged_metadata(path, change, message):
    jaxq.save(path, {"w": jaxq.quantize(jnp.eye(64, 4), "nf4"), "b": jnp.ones(2)})
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        jaxq.load(path)


@pytest.mark.parametrize("header", ["[1]", '"abc"', "3", "null", "{", ""])
def test_metadata_that_is_no_object(path, header):
    save_file(
        {"a": np.ones(2, np.float32)}, path, metadata={"format": "jaxq", "jaxq": header}
    )
    with pytest.raises(ValueError, match="load: the metadata of .* is damaged"):
        jaxq.load(path)


def test_truncated_files(path):
    jaxq.save(path, {"w": jaxq.quantize(jnp.eye(64, 4), "nf4_dq"), "b": jnp.ones(2)})
    whole = path.read_bytes()
    for length in (
        0,
        1,
        7,
        8,
        9,
        100,
        len(whole) // 2,
        len(whole) - 100,
        len(whole) - 1,
    ):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match="file.safetensors is not a whole safetensors file"
        ):
            jaxq.load(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(
        ValueError, match="file.safetensors is not a whole safetensors file"
    ):
        jaxq.load(path)


def test_flipped_headers_never_crash(path):
    # Some flips change a name or a number to another valid one; no other error than ours may come of the rest.
    jaxq.save(path, {"w": jaxq.quantize(jnp.eye(64, 4), "nf4_dq"), "b": jnp.ones(2)})
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for at in range(0, end, 3):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << (at % 5)
        path.write_bytes(flipped)
        message = None
        try:
            jaxq.load(path)
        except ValueError as error:
            message = str(error)
            refused += 1
        assert message is None or message.startswith("load: "), (at, message)
    assert refused > end / 3 / 2


# Crashes.


@pytest.mark.parametrize("where", ["save_file", "os.fsync", "os.replace"])
def test_a_failure_while_saving_keeps_the_old_file(path, monkeypatch, where):
    jaxq.save(path, {"x": 1})

    def fail(*args, **kwargs):
        if where == "save_file":
            Path(args[1]).write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(f"jaxq.serialization._files.{where}", fail)
    with pytest.raises(OSError, match="disk full"):
        jaxq.save(path, {"x": 2})
    monkeypatch.undo()
    assert jaxq.load(path) == {"x": 1}
    assert os.listdir(path.parent) == [path.name]


KILLED = """
import os, signal, sys, time
import numpy as np
import jaxq
from jaxq.serialization import _files as files
write = files.save_file
def slowly(tensors, name, metadata):
    write(tensors, name, metadata)
    with open(name, "rb+") as file:
        file.truncate(100)
    print("writing", flush=True)
    time.sleep(600)
files.save_file = slowly
jaxq.save(sys.argv[1], {"x": np.ones(100, np.float32)})
"""


def test_a_killed_process_leaves_the_old_file(path):
    jaxq.save(path, {"x": 1})
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    assert jaxq.load(path) == {"x": 1}
    left = [name for name in os.listdir(path.parent) if not name.startswith(".")]
    assert left == [path.name]
    jaxq.save(path, {"x": 2})  # what the crash left does not stand in the way
    assert jaxq.load(path) == {"x": 2}


def test_readers_see_one_whole_file_or_the_other(path):
    values = [{"x": jnp.full(20_000, i)} for i in range(2)]
    jaxq.save(path, values[0])
    script = (
        "import sys, time, numpy as np, jaxq.io\n"
        "print('ready', flush=True)\n"
        "for i in range(60): jaxq.io.save(sys.argv[1], {'x': np.full(20_000, i % 2, np.int32)})\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        while process.poll() is None and time.monotonic() - start < 120:
            x = jaxq.load(path)["x"]
            assert x.shape == (20_000,)
            assert (x == x[0]).all()
    assert process.returncode == 0


class Bare(nnx.Module):
    """Arrays that are in no Variable, in every kind of container, beside a layer."""

    def __init__(self, value: float):
        self.layer = nnx.Linear(32, 4, rngs=nnx.Rngs(0))
        self.table = nnx.data(jnp.full(3, value))
        self.pair = nnx.data((np.full(2, value, np.float32), {"z": jnp.full(1, value)}))
        self.named = nnx.data(Pair(jnp.full(1, value), 3))
        self.codes = nnx.data(jaxq.quantize(jnp.full((32, 1), value), "int8"))


def test_arrays_outside_variables_are_part_of_a_model(path):
    model, _ = jaxq.quantize_model(Bare(2.0), ALL)
    jaxq.save(path, model)
    assert {"table", "pair/0", "pair/1/z", "codes"} <= set(jaxq.load(path))
    got = jaxq.load(path, into=Bare(1.0))
    same(
        jax.tree.leaves(nnx.state(got)),
        [jnp.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))],
    )
    assert isinstance(got.layer.kernel, QuantizedParam)
    other = Bare(1.0)
    other.table = jnp.ones(4)
    jaxq.save(path, model)
    with pytest.raises(
        ValueError, match=r"table: float32\[4\] in the model, float32\[3\] in the file"
    ):
        jaxq.load(path, into=other)
