"""Files of trees: values come back bit for bit, and damaged files are refused.

A crash leaves the old file whole.
"""

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import time
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
from jaxq import files, serialization
from tests.serialization.restored import assert_restored


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def write_and_read(path, tree):
    serialization.write_tree(path, tree)
    return serialization.read_tree(path)


# Trees.


@pytest.mark.parametrize("packing", ["low_first", "high_first", "none"])
def test_packing_and_activation_come_back(path, packing):
    qt = (
        jaxq.relayout(jaxq.quantize(jnp.eye(64, 4), "int4"), packing)
        .with_activation("int8")
        .astype(jnp.bfloat16)
    )
    loaded = write_and_read(path, qt)
    assert_restored(loaded, qt)
    assert loaded.meta == qt.meta
    assert (jaxq.dequantize(loaded) == jaxq.dequantize(qt)).all()


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
    assert_restored(write_and_read(path, tree), tree)


def test_paths_that_equal_names_of_leaves(path):
    qt = jaxq.quantize(jnp.eye(4), "int8")
    tree = {"w": qt, "w.data": jnp.ones(2), "w.scale": jnp.zeros(1)}
    assert_restored(write_and_read(path, tree), tree)
    tree = {"": jnp.ones(1), "value": jnp.zeros(1)}
    assert_restored(write_and_read(path, tree), tree)


@pytest.mark.parametrize("value", [None, 3, 2.5, True, "text", jnp.ones(2), [], {}])
def test_a_single_value(path, value):
    assert_restored(write_and_read(path, value), value)


# XLA on CPU does not have these.
NOT_ON_CPU = ("int1", "uint1", "float6_e2m3fn", "float6_e3m2fn")
INTEGERS = ("int8", "int16", "int32", "uint8", "uint16", "uint32")
DTYPES = [np.dtype(name) for name in ("bool", *INTEGERS, "float16", "float32")]
for value in vars(ml_dtypes).values():
    if isinstance(value, type) and issubclass(value, np.generic):
        dtype = np.dtype(value)
        if dtype.itemsize <= 2 and dtype.name not in NOT_ON_CPU:
            DTYPES.append(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(path, dtype):
    array = np.asarray([[0, 1, 0], [1, 1, 0]]).astype(dtype)
    assert_restored(write_and_read(path, {"a": array}), {"a": array})
    not_contiguous = {"a": array.T, "b": array[:, ::2]}
    assert_restored(write_and_read(path, not_contiguous), not_contiguous)


def test_jax_arrays_of_64_bits_need_x64_to_be_read(path):
    with jax.enable_x64(True):
        serialization.write_tree(
            path, {"step": jnp.int64(3), "x": jnp.ones(2, jnp.float64)}
        )
    with pytest.raises(
        ValueError,
        match="step is int64, which jax turns into int32. Set jax_enable_x64",
    ):
        serialization.read_tree(path)
    with jax.enable_x64(True):
        loaded = serialization.read_tree(path)
    assert (loaded["step"].dtype, loaded["x"].dtype) == ("int64", "float64")


def test_numpy_arrays_of_64_bits_come_back(path):
    loaded = write_and_read(
        path, {"step": np.int64(2**40 + 1), "x": np.array([1e300, 0.1])}
    )
    assert loaded["step"].dtype == np.int64
    assert int(loaded["step"]) == 2**40 + 1
    assert (loaded["x"] == [1e300, 0.1]).all()


def test_named_tuples_come_back_as_dicts(path):
    loaded = write_and_read(path, {"layer": Pair(jnp.ones(2), (Pair(1, None),))})
    assert_restored(loaded, {"layer": {"a": jnp.ones(2), "b": ({"a": 1, "b": None},)}})


def test_big_endian_arrays(path):
    assert write_and_read(path, np.arange(3, dtype=">f4")).tolist() == [0.0, 1.0, 2.0]


def test_path_may_be_text_and_the_name_anything(tmp_path):
    for name in (str(tmp_path / "a"), tmp_path / "b.bin"):
        assert write_and_read(name, {"x": 1}) == {"x": 1}
    assert sorted(os.listdir(tmp_path)) == ["a", "b.bin"]


def test_the_file_is_plain_safetensors(path):
    serialization.write_tree(
        path,
        {"w": jaxq.quantize(jnp.eye(64, 4), "nf4_dq"), "b": jnp.ones(2, jnp.bfloat16)},
    )
    with safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == ["b", "w.data", "w.scale.data", "w.scale.scale"]
        assert file.metadata()["format"] == "jaxq"


def test_overwriting_does_not_touch_what_was_loaded(path):
    first = write_and_read(path, {"x": jnp.arange(1000)})
    serialization.write_tree(path, {"x": jnp.zeros(1000, jnp.int32)})
    assert_restored(first, {"x": jnp.arange(1000)})


class Pair(NamedTuple):
    a: int
    b: int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "a/0 has type object, which cannot be saved"),
        (object, "a/0 has type type.* A tree may hold pytrees"),
        ({1, 2}, "a/0 has type set"),
        ({3: jnp.ones(1)}, "the keys of a/0 must be strings, got 3"),
        (1j, "a/0 has type complex"),
        (np.ones(2, np.complex64), "a/0 has dtype complex64"),
        (np.asarray(["x"]), "a/0 has dtype <U1"),
        (np.ma.masked_array([1, 2], [0, 1]), "a/0 is a masked array"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "a/0 has type Linear"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "a/0 has type ShapeDtypeStruct"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_value_that_cannot_be_saved_is_named(path, value, message):
    path.write_bytes(b"old")
    with pytest.raises(TypeError, match=message):
        serialization.write_tree(path, {"a": [value]})
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


def test_keys_that_utf8_does_not_have(path):
    with pytest.raises(ValueError, match="write_tree: the key .* of a has half of a"):
        serialization.write_tree(path, {"a": {"\ud800": jnp.ones(1)}})


def test_the_same_tree_gives_the_same_bytes(path):
    tree = {"w": jaxq.quantize(jnp.eye(64, 4), "nf4_dq"), "b": [1.5, jnp.ones(2)]}
    serialization.write_tree(path, tree)
    first = path.read_bytes()
    for _ in range(6):
        serialization.write_tree(path, jax.tree.map(lambda leaf: leaf, tree))
        assert path.read_bytes() == first


# Files that are not what they should be.


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"read_tree: there is no file .*nothing"
    ):
        serialization.read_tree(tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match=r"write_tree: the folder .*nowhere does not exist"
    ):
        serialization.write_tree(tmp_path / "nowhere" / "file", {})
    with pytest.raises(IsADirectoryError, match="read_tree: .* it is a folder"):
        serialization.read_tree(tmp_path)


def test_not_a_jaxq_file(path):
    save_file({"a": np.ones(2, np.float32)}, path)
    with pytest.raises(
        ValueError, match="was not written by jaxq.save.*jaxq.models.load"
    ):
        serialization.read_tree(path)
    path.write_text("something else, long enough to have a header of eight bytes")
    with pytest.raises(ValueError, match="is damaged: it is not a whole safetensors"):
        serialization.read_tree(path)


def rewrite(path, change):
    """The same tensors under changed metadata."""
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["jaxq"])
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    change(header, tensors)
    save_file(tensors, path, metadata={"format": "jaxq", "jaxq": json.dumps(header)})


# Codes of a weight `[20, 2]` in groups of 16, as written when the padding of the last
# group was stored: 12 codes of padding a row.
OLD_CODES = {
    "int4": "2510dd2aeb1240570a090a0000000000126d5999559632b307010c0f00000000",
    "nf4": "be8733b0518bd7ef70707077777777778bf3e000ee0fca1c7f79727577777777",
}


@pytest.mark.parametrize("fmt", OLD_CODES)
def test_files_with_stored_padding_load(path, fmt):
    w = np.random.default_rng(0).integers(-9, 10, (20, 2)).astype(np.float32)
    qt = jaxq.quantize(w, jaxq.QuantSpec(fmt, jaxq.PerGroup(16, pad=True)))
    serialization.write_tree(path, {"w": qt})
    old = np.frombuffer(bytes.fromhex(OLD_CODES[fmt]), np.uint8).reshape(2, 16)
    rewrite(path, lambda header, tensors: tensors.update({"w.data": old}))
    loaded = serialization.read_tree(path)["w"]
    assert loaded.data.shape == (2, 10)
    assert_restored(loaded, qt)
    # Codes of another length are still damage.
    rewrite(path, lambda header, tensors: tensors.update({"w.data": old[:, :12]}))
    with pytest.raises(ValueError, match="w is wrong: data is uint8"):
        serialization.read_tree(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h, t: h.update(version=2),
            "has format version 2. This version of jaxq reads format version 1",
        ),
        (lambda h, t: h.pop("version"), "has format version None"),
        (lambda h, t: h.pop("structure"), "no structure"),
        (lambda h, t: t.pop("w.data"), "tensor 'w.data' is missing"),
        (
            lambda h, t: t.update(more=np.ones(1)),
            r"holds tensors that its metadata do not name: \['more'\]",
        ),
        (
            lambda h, t: t.update({"w.data": t["w.data"][:-1]}),
            "w is wrong: data is uint8",
        ),
        (
            lambda h, t: t.update({"w.scale": t["w.scale"][:, :-1]}),
            "w is wrong: scale is",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"].update({"is": "odd"}),
            "'odd', which this version of jaxq does not know",
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
            "w .*(wrong|described)",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["geometry"].update(
                num_contracted=0
            ),
            "w is wrong: .*contradicts",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["geometry"].update(
                num_contracted=3
            ),
            "w is wrong: .*contradicts",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["geometry"].update(
                order=[-2, -9]
            ),
            "w is wrong: .*contradicts",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"]["spec"]["granularity"].update(
                size=32
            ),
            "w is wrong: its spec says",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"].update(dtype="int8"),
            "w is wrong: it dequantizes to int8",
        ),
        (
            lambda h, t: h["structure"]["items"]["w"].update(dtype="float33"),
            "w is wrong: .*float33",
        ),
        (lambda h, t: h["structure"]["items"]["w"].update(dtype=7), "dtype must be a"),
        (
            lambda h, t: h["structure"]["items"]["b"].update(dtype="float16"),
            "b is stored as float32 but should be",
        ),
        (lambda h, t: h["structure"]["items"]["b"].update(dtype="float33"), "damaged"),
    ],
)
def test_damaged_metadata(path, change, message):
    serialization.write_tree(
        path, {"w": jaxq.quantize(jnp.eye(64, 4), "nf4"), "b": jnp.ones(2)}
    )
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        serialization.read_tree(path)


@pytest.mark.parametrize(
    ("spec", "leaf", "value", "message"),
    [
        (
            "ternary",
            "data",
            0xAA,
            r"its data has codes that ternary does not have: \[-2\]",
        ),
        ("uint4", "zero_point", 16, "its zero point has numbers that are not codes"),
        ("uint3", "zero_point", 8, "its zero point has numbers that are not codes"),
    ],
)
def test_values_that_are_not_codes(path, spec, leaf, value, message):
    if spec == "uint3":
        spec = jaxq.presets()["uint4"].replace(format="uint3")
    qt = jaxq.quantize(jnp.eye(64, 4), spec)
    damaged = jnp.full_like(getattr(qt, leaf), value)
    serialization.write_tree(path, {"w": dataclasses.replace(qt, **{leaf: damaged})})
    with pytest.raises(ValueError, match=f"w is wrong: {message}"):
        serialization.read_tree(path)


def item(name):
    """The entry of an item of the tree in a header."""
    return lambda header: header["structure"]["items"][name]


def leaf(name):
    """The entry of a leaf of the QTensor w in a header."""
    return lambda header: item("w")(header)["leaves"][name]


# Metadata that would only fail, or give wrong numbers, where the value is used.
HOSTILE = [
    (item("w"), {"outliers": "x"}, "outliers must be None or a number"),
    (item("w"), {"outliers": -1.0}, "outliers must be None or a number"),
    (item("w"), {"packing": 3}, "packing must be one of"),
    (item("w"), {"layout": "x"}, "layout must be one of"),
    (item("w"), {"activation": 5}, "expected a dict with the fields of a"),
    (item("w"), {"shape": [64.0, 4]}, r"w has the shape \[64.0, 4\]"),
    (item("w"), {"shape": "64"}, "w has the shape '64'"),
    (item("w"), {"dtype": "float64"}, "w dequantizes to float64, .*jax_enable_x64"),
    (item("w"), {"dtype": "f4,("}, "it dequantizes to f4"),
    (item("w"), {"leaves": []}, "w"),
    (lambda h: item("w")(h)["geometry"], {"shape": [64.0, 4]}, "geometry.shape is"),
    (lambda h: item("w")(h)["geometry"], {"multiple": 0}, "geometry.multiple is 0"),
    (lambda h: item("w")(h)["geometry"], {"flat": 1}, "geometry.flat is 1"),
    (lambda h: item("w")(h)["geometry"], {"block_shape": [None, 1.0]}, "block_shape"),
    (lambda h: item("w")(h)["spec"], {"packing": 3}, "packing must be None or one of"),
    (lambda h: item("w")(h)["spec"], {"headroom": "x"}, "headroom must be a number"),
    (
        lambda h: item("w")(h)["spec"],
        {"format": {"type": []}},
        "unknown kind of format",
    ),
    (lambda h: item("w")(h)["spec"], {"granularity": 3}, "unknown granularity 3"),
    (item("w"), {"is": "array", "tensor": []}, r"the tensor \[\] is missing"),
    (item("b"), {"dtype": "f4,("}, "b has the unknown dtype 'f4"),
    (item("b"), {"dtype": []}, r"b has the unknown dtype \[\]"),
    (item("b"), {"tensor": "w.scale"}, "two values are described as the tensor"),
    (item("b"), {"is": []}, r"b is described as \[\]"),
    (item("b"), {"is": "list", "items": "ab"}, "the items of a list must be a list"),
    (item("b"), {"is": "dict", "items": []}, "the items of a dict must be a dict"),
    (item("b"), {"is": "value", "value": []}, "a value must be a number or a text"),
    (item("b"), {"is": "key", "impl": "x", "data": {"is": "value", "value": 1}}, "b"),
    (leaf("scale"), {"is": "value", "value": 1}, "scale is described as a int"),
    (leaf("data"), {"is": "value", "value": None}, "data is described as a NoneType"),
]


def with_axis(axis):
    return lambda spec: spec["granularity"].update(type="PerChannel", axis=axis)


# Specs of inputs that would fail in the first product.
ACTIVATIONS = [
    *((with_axis(axis), "names an axis") for axis in (7, 64, 10**18, 1, -2)),
    (lambda spec: spec.update(rounding="stochastic"), "needs a key at every call"),
    (
        lambda spec: spec.update(granularity={"type": "PerGroup", "size": 7}),
        "does not divide the 64 contracted elements",
    ),
    (
        lambda spec: spec.update(
            granularity={"type": "PerGroup", "size": 2**40, "pad": True}
        ),
        "are too large",
    ),
]


@pytest.mark.parametrize(("change", "message"), ACTIVATIONS)
def test_activations_that_no_product_could_use(path, change, message):
    w = jaxq.quantize(jnp.eye(64, 4), "int8").with_activation("int8")
    serialization.write_tree(path, {"w": w})
    rewrite(path, lambda header, tensors: change(item("w")(header)["activation"]))
    message = rf"^read_tree: .*\.safetensors .*w is wrong: .* activation .*{message}"
    with pytest.raises(ValueError, match=message):
        serialization.read_tree(path)


def test_outliers_and_ranges_that_no_product_could_use(path):
    def refused(qt, message, **changes):
        serialization.write_tree(path, {"w": qt})
        rewrite(path, lambda header, tensors: item("w")(header).update(changes))
        with pytest.raises(ValueError, match=f"w is wrong: {message}"):
            serialization.read_tree(path)

    qt = jaxq.quantize(jnp.eye(64, 4), "int8")
    serialization.write_tree(path, {"w": qt.with_activation("int8", outliers=6.0)})
    rewrite(path, lambda header, tensors: item("w")(header).update(outliers=2**31))
    assert (jnp.ones((2, 64)) @ serialization.read_tree(path)["w"]).shape == (2, 4)
    groups = jaxq.presets()["int4"].to_dict()
    static = qt.with_activation("int8", bounds=(-1.0, 1.0))
    refused(qt, "it has outliers and no activation spec", outliers=6.0)
    refused(static, "it has both an input_range and outliers", outliers=6.0)
    refused(static, "its input_range cannot be used: PerGroup", activation=groups)


@pytest.mark.parametrize(("entry", "change", "message"), HOSTILE)
def test_hostile_metadata_is_refused_by_name(path, entry, change, message):
    serialization.write_tree(
        path, {"w": jaxq.quantize(jnp.eye(64, 4), "nf4"), "b": jnp.ones(2)}
    )
    rewrite(path, lambda header, tensors: entry(header).update(change))
    with pytest.raises(ValueError, match=rf"^read_tree: .*\.safetensors .*{message}"):
        serialization.read_tree(path)


def test_a_tensor_that_many_entries_name_is_read_once(path, monkeypatch):
    serialization.write_tree(path, {"x": jnp.ones(1_000)})

    def multiply(header, tensors):
        entry = header["structure"]["items"]["x"]
        header["structure"]["items"] = {str(i): entry for i in range(1_000)}

    rewrite(path, multiply)
    reads = []
    read = files.TensorFile.read
    monkeypatch.setattr(
        files.TensorFile, "read", lambda self, name: reads.append(1) or read(self, name)
    )
    with pytest.raises(ValueError, match=r"file\.safetensors .*two values are .* 'x'"):
        serialization.read_tree(path)
    assert len(reads) == 1


def test_blocks_far_larger_than_the_array(path):
    spec = jaxq.QuantSpec("ternary", jaxq.PerGroup(64, pad=True))
    serialization.write_tree(path, {"w": jaxq.quantize(jnp.eye(64, 4), spec)})

    def enlarge(header, tensors):
        entry = item("w")(header)
        entry["spec"]["granularity"]["size"] = 10**12
        entry["geometry"]["block_shape"][-1] = 10**12

    rewrite(path, enlarge)
    with pytest.raises(ValueError, match="w is wrong: its blocks of .* far larger"):
        serialization.read_tree(path)


def test_trees_that_are_nested_too_deeply(path):
    tree = []
    for _ in range(2_000):
        tree = [tree]
    with pytest.raises(ValueError, match=r"file\.safetensors .*nested too deeply"):
        serialization.write_tree(path, tree)
    deep = "[" * 100_000 + "]" * 100_000
    start = '{"version": 1, "kind": "tree", "structure": '
    for text in (deep, start + deep + "}"):
        save_file({}, path, metadata={"format": "jaxq", "jaxq": text})
        with pytest.raises(ValueError, match=r"file\.safetensors is damaged"):
            serialization.read_tree(path)
    entry = '{"is": "list", "items": [' * 900 + "]}" * 900
    text = start + entry + "}"
    save_file({}, path, metadata={"format": "jaxq", "jaxq": text})
    with pytest.raises(ValueError, match=r"file\.safetensors .*(deeply|parsed)"):
        serialization.read_tree(path)


def test_damaged_data_need_verify_false(path):
    tree = {"w": jaxq.quantize(jnp.eye(64, 4), "nf4"), "b": jnp.ones(2)}
    serialization.write_tree(path, tree)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"file\.safetensors .*of w.data .*checksum"):
        serialization.read_tree(path)
    damaged = serialization.read_tree(path, verify=False)
    assert (damaged["w"].codes() != tree["w"].codes()).sum() == 1
    # A file of an earlier version has no checksums.
    rewrite(path, lambda header, tensors: None)
    assert_restored(serialization.read_tree(path), damaged)


@pytest.mark.parametrize("header", ["[1]", '"abc"', "3", "null", "{", ""])
def test_metadata_that_is_not_an_object(path, header):
    save_file(
        {"a": np.ones(2, np.float32)}, path, metadata={"format": "jaxq", "jaxq": header}
    )
    with pytest.raises(ValueError, match=r"read_tree: .*file\.safetensors is damaged"):
        serialization.read_tree(path)


def test_truncated_files(path):
    serialization.write_tree(
        path, {"w": jaxq.quantize(jnp.eye(64, 4), "nf4_dq"), "b": jnp.ones(2)}
    )
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
            ValueError,
            match="file.safetensors is damaged: it is not a whole",
        ):
            serialization.read_tree(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(
        ValueError,
        match="file.safetensors is damaged: it is not a whole",
    ):
        serialization.read_tree(path)


def test_flipped_headers_never_crash(path):
    # Some flips change a name or a number to another valid one. Others must raise an
    # error of read_tree, and no other error.
    serialization.write_tree(
        path, {"w": jaxq.quantize(jnp.eye(64, 4), "nf4_dq"), "b": jnp.ones(2)}
    )
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for at in range(0, end, 3):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << (at % 5)
        path.write_bytes(flipped)
        message = None
        try:
            serialization.read_tree(path)
        except ValueError as error:
            message = str(error)
            refused += 1
        assert message is None or message.startswith("read_tree: "), (at, message)
    assert refused > end / 3 / 2


# Crashes.


@pytest.mark.parametrize("where", ["write_tensors", "os.fsync", "os.replace"])
def test_a_failure_while_saving_keeps_the_old_file(path, monkeypatch, where):
    serialization.write_tree(path, {"x": 1})

    def fail(*args, **kwargs):
        if where == "write_tensors":
            args[0].write(b"half of it")
        raise OSError("disk full")

    room = "serialization._files" if where == "write_tensors" else "files._new_file"
    monkeypatch.setattr(f"jaxq.{room}.{where}", fail)
    with pytest.raises(OSError, match="disk full"):
        serialization.write_tree(path, {"x": 2})
    monkeypatch.undo()
    assert serialization.read_tree(path) == {"x": 1}
    assert os.listdir(path.parent) == [path.name]


KILLED = """
import sys, time
import numpy as np
from jaxq import files, serialization
from jaxq.serialization import _files as files
def slowly(file, tensors, metadata):
    file.write(bytes(100_000))
    print("writing", flush=True)
    time.sleep(600)
files.write_tensors = slowly
serialization.write_tree(sys.argv[1], {"x": np.ones(100, np.float32)})
"""


def test_a_killed_process_leaves_the_old_file(path):
    serialization.write_tree(path, {"x": 1})
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
    assert serialization.read_tree(path) == {"x": 1}
    assert len(os.listdir(path.parent)) == 2
    # The next save removes what the killed one left.
    serialization.write_tree(path, {"x": 2})
    assert serialization.read_tree(path) == {"x": 2}
    assert os.listdir(path.parent) == [path.name]


def test_a_reader_sees_either_the_old_or_the_new_file(path):
    values = [{"x": jnp.full(20_000, i)} for i in range(2)]
    serialization.write_tree(path, values[0])
    script = """
import sys
import numpy as np
from jaxq import files, serialization
print("ready", flush=True)
for i in range(60):
    serialization.write_tree(sys.argv[1], {"x": np.full(20_000, i % 2, np.int32)})
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        while process.poll() is None and time.monotonic() - start < 120:
            x = serialization.read_tree(path)["x"]
            assert x.shape == (20_000,)
            assert (x == x[0]).all()
    assert process.returncode == 0
