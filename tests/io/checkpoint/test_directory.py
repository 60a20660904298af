"""Directories of other libraries: what is read, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.io import read_checkpoint
from tests.arrays import assert_same
from tests.io.checkpoint import directories
from tests.io.checkpoint.directories import CASES, INEXACT, ROWS, tensors_of, write

MODULE = "model.layers.0.mlp.up_proj"


def as_kernel(value, row):
    """The QTensor [in, out] of a parameter."""
    return value if row == "mxfp4" else value.T


@pytest.mark.parametrize("row", ROWS)
def test_codes_and_scales_of_every_layout_come_back(tmp_path, row):
    qt = directories.quantized(row)
    tensors, config = tensors_of(row, MODULE, qt)
    norm = np.arange(4, dtype=np.float32)
    write(tmp_path, tensors | {"model.norm.weight": norm}, config)
    with read_checkpoint(tmp_path) as checkpoint:
        name = MODULE if row == "mxfp4" else f"{MODULE}.weight"
        assert set(checkpoint) == {name, "model.norm.weight"}
        assert checkpoint.is_quantized(name)
        value = as_kernel(checkpoint[name], row)
        shapes = as_kernel(checkpoint.eval_shape(name), row)
        np.testing.assert_array_equal(checkpoint["model.norm.weight"], norm)
    assert isinstance(value, jaxq.QTensor)
    assert value.meta == shapes.meta
    np.testing.assert_array_equal(value.codes(), qt.codes())
    floats = jaxq.dequantize(value, dtype="float32")
    expected = np.asarray(jaxq.dequantize(qt, dtype="float32"))
    rtol = 2e-7 if row in INEXACT or row == "compressed-tensors nvfp4" else 0
    np.testing.assert_allclose(floats, expected, rtol=rtol, atol=0)
    with read_checkpoint(tmp_path, dequantize=True) as checkpoint:
        floats = jnp.asarray(checkpoint[name])
    assert_same(as_kernel(floats, row), jaxq.dequantize(value))


def test_gptq_words_of_numpy(tmp_path):
    """A file that numpy packed, against the formula in float64."""
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (64, 32)), rng.integers(0, 15, (2, 32))
    scales = rng.uniform(0.01, 0.1, (2, 32)).astype(np.float16)

    def words(fields):  # [n * 8, m] -> [n, m], the first field in the lowest bits
        parts = fields.reshape(-1, 8, fields.shape[1]).astype(np.uint32)
        shifts = (4 * np.arange(8, dtype=np.uint32))[None, :, None]
        return (parts << shifts).sum(1, dtype=np.uint32).view(np.int32)

    tensors = {
        f"{MODULE}.qweight": words(codes),
        f"{MODULE}.qzeros": np.ascontiguousarray(words(zeros.T).T),
        f"{MODULE}.scales": scales,
    }
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    group = np.arange(64) // 32
    # The first version stores zero - 1.
    for version, shift in (("gptq", 1), ("gptq_v2", 0)):
        write(tmp_path, tensors, settings | {"checkpoint_format": version})
        with read_checkpoint(tmp_path) as checkpoint:
            weight = jaxq.dequantize(checkpoint[f"{MODULE}.weight"], dtype="float32")
        expected = scales[group].astype(np.float64) * (codes - zeros[group] - shift)
        np.testing.assert_array_equal(np.asarray(weight), expected.T)


def test_settings_of_single_modules(tmp_path):
    wide, config = tensors_of("gptq 8", "a")
    narrow, _ = tensors_of("gptq 4", "b")
    dynamic = {"+:.*b$": {"bits": 4, "group_size": 128}, "-:skipped.*": {}}
    write(tmp_path, wide | narrow, config | {"dynamic": dynamic})
    with read_checkpoint(tmp_path) as checkpoint:
        bits = {name: checkpoint[name].spec.fmt.bits for name in checkpoint}
    assert bits == {"a.weight": 8, "b.weight": 4}


def test_groups_of_compressed_tensors(tmp_path):
    wide, config = tensors_of("compressed-tensors pack 8", "x.down_proj")
    narrow, other = tensors_of("compressed-tensors pack 4", "x.up_proj")
    groups = {
        "group_0": {**config["config_groups"]["group_0"], "targets": ["re:.*down.*"]},
        "group_1": other["config_groups"]["group_0"],
    }
    write(tmp_path, wide | narrow, config | {"config_groups": groups})
    with read_checkpoint(tmp_path) as checkpoint:
        bits = {name: checkpoint[name].spec.fmt.bits for name in checkpoint}
    assert bits == {"x.down_proj.weight": 8, "x.up_proj.weight": 4}


def test_modelopt_config_in_a_file_of_its_own(tmp_path):
    tensors, _ = tensors_of("modelopt nvfp4", MODULE)
    tensors[f"{MODULE}.input_scale"] = np.ones((), np.float32)
    write(tmp_path, tensors, None)
    quantization = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
    text = json.dumps({"quantization": quantization})
    (tmp_path / "hf_quant_config.json").write_text(text)
    with read_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == {f"{MODULE}.weight"}
        assert checkpoint[f"{MODULE}.weight"].spec.fmt.name == "float4_e2m1fn"


def test_desc_act_needs_dequantize(tmp_path):
    tensors, config = tensors_of("gptq 4", MODULE)
    order = np.arange(256)[::-1].astype(np.int32)
    tensors[f"{MODULE}.g_idx"] = np.ascontiguousarray(order // 128)
    write(tmp_path, tensors, config | {"desc_act": True})
    with read_checkpoint(tmp_path) as checkpoint:
        message = rf"model.safetensors: {MODULE}.weight: gptq: g_idx .*dequantize=True"
        with pytest.raises(ValueError, match=message):
            checkpoint[f"{MODULE}.weight"]
        with pytest.raises(ValueError, match="g_idx"):
            checkpoint.eval_shape(f"{MODULE}.weight")
    with read_checkpoint(tmp_path, dequantize=True) as checkpoint:
        assert checkpoint[f"{MODULE}.weight"].shape == (64, 256)


# Refused. Each row changes a good directory and names a part of the error.


def _drop(name):
    return lambda tensors, config: tensors.pop(f"{MODULE}.{name}")


def _set(name, **changes):
    def change(tensors, config):
        array = tensors[f"{MODULE}.{name}"]
        tensors[f"{MODULE}.{name}"] = array.astype(changes.get("dtype", array.dtype))
        if "value" in changes:
            array = tensors[f"{MODULE}.{name}"] = array.copy()
            array.flat[0] = changes["value"]

    return change


def _config(**changes):
    return lambda tensors, config: config.update(changes)


GROUPS = {"g": {"targets": ["Linear"], "weights": None}}
TWO = {"a": {"targets": ["Linear"]}, "b": {"targets": ["Linear"], "format": "x"}}
SLOW = {"a": {"targets": ["re:(a+)+$"]}, "b": {"targets": ["re:.*"]}}
REFUSED = {
    "a missing array": ("gptq 4", _drop("scales"), "scales is missing"),
    "a missing marker": ("gptq 4", _drop("qweight"), "up_proj.qweight is missing"),
    "a wrong group size": ("awq", _config(group_size=32), r"qzeros is .*expected"),
    "a group size that is text": ("awq", _config(group_size="x"), "group_size must be"),
    "NaN scales": ("gptq 4", _set("scales", value=np.nan), "scales .*not finite"),
    "wrong dtypes": ("awq", _set("scales", dtype=np.int8), "scales is int8"),
    "unknown bits": ("gptq 4", _config(bits=5), "bits must be one of"),
    "unknown version": ("gptq 4", _config(checkpoint_format="v9"), "checkpoint_format"),
    "unknown method": ("awq", _config(quant_method="aqlm"), "quant_method 'aqlm'"),
    "no method": ("awq", _config(quant_method=None), "quant_method"),
    "no groups": (
        "compressed-tensors pack 4",
        _config(config_groups=[]),
        "config_groups must be",
    ),
    "no settings": (
        "compressed-tensors pack 4",
        _config(config_groups=GROUPS),
        "weights must be a dict",
    ),
    "rotated inputs": (
        "compressed-tensors pack 4",
        _config(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}),
        "transform_config says that inputs are transformed",
    ),
    "sparse weights": (
        "compressed-tensors pack 4",
        _config(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config is .*sparse-24-bitmask",
    ),
    "two groups": (
        "compressed-tensors pack 4",
        _config(config_groups=TWO),
        "2 groups that may be",
    ),
    "a slow pattern": (
        "compressed-tensors pack 4",
        _config(config_groups=SLOW),
        "could take very long",
    ),
    "a float module": (
        "gptq 4",
        _config(dynamic={"-:.*up_proj": {}}),
        "settings leave .*up_proj in floats",
    ),
    "no block size": ("fp8 block", _config(weight_block_size=None), "is null"),
    "other algorithms": ("modelopt nvfp4", _config(quant_algo="FP8"), "quant_algo"),
    "bad JSON of a weight": (
        "nf4",
        _set("weight.quant_state.bitsandbytes__nf4", value=0),
        "is not JSON",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_weight_is_refused_by_name(tmp_path, name):
    row, change, message = REFUSED[name]
    tensors, config = tensors_of(row, MODULE)
    change(tensors, config)
    write(tmp_path, tensors, config)
    with (
        pytest.raises(ValueError, match=message) as caught,
        read_checkpoint(tmp_path) as checkpoint,
    ):
        checkpoint[f"{MODULE}.weight"]
    assert str(tmp_path) in str(caught.value)


STATIC_INPUTS = {"num_bits": 8, "type": "int", "dynamic": False, "strategy": "tensor"}


def test_settings_that_are_not_read_give_a_warning(tmp_path):
    tensors, config = tensors_of("compressed-tensors pack 4", MODULE)
    (group,) = config["config_groups"].values()
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    group["input_activations"] = STATIC_INPUTS
    write(tmp_path, tensors, config)
    with (
        pytest.warns(UserWarning, match="these products use float inputs"),
        pytest.warns(UserWarning, match="kv_cache_scheme is not read"),
        read_checkpoint(tmp_path) as checkpoint,
    ):
        value = checkpoint[f"{MODULE}.weight"]
    assert value.meta.activation is None


def test_large_static_arrays_are_not_read(tmp_path):
    tensors, config = tensors_of("nf4", MODULE)
    tensors[f"{MODULE}.weight.quant_map"] = np.zeros(1 << 19, np.float32)
    write(tmp_path, tensors, config)
    with (
        pytest.raises(ValueError, match="quant_map has 2097152 bytes"),
        read_checkpoint(tmp_path) as checkpoint,
    ):
        checkpoint.eval_shape(f"{MODULE}.weight")


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin, a pickle"):
        read_checkpoint(tmp_path)


def test_equal_keys_are_refused(tmp_path):
    write(tmp_path, {"a": np.ones(1)}, None)
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="the name 'a' is there twice"):
        read_checkpoint(tmp_path)


def test_shards(tmp_path):
    tensors, config = tensors_of("awq", MODULE)
    write(tmp_path, {}, config)
    (tmp_path / "model.safetensors").unlink()
    shards = {}
    for number, (name, array) in enumerate(tensors.items()):
        file = f"model-{number}.safetensors"
        directories.save_file({name: array}, tmp_path / file)
        shards[name] = file
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with read_checkpoint(tmp_path) as checkpoint:
        assert checkpoint[f"{MODULE}.weight"].shape == (64, 256)
    outside = dict(shards, **{f"{MODULE}.scales": "../model.safetensors"})
    index.write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(ValueError, match="must be in the directory of the index"):
        read_checkpoint(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(FileNotFoundError, match="has no model-1.safetensors"):
        read_checkpoint(tmp_path)


def test_every_row_is_a_case():
    assert set(ROWS) <= set(CASES)
    assert len(ROWS) > 15
