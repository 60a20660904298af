"""Models from directories whose weights another library has quantized."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import models
from jaxq.io import layouts
from tests import tables
from tests.io.checkpoint import directories
from tests.io.checkpoint.directories import CASES, tensors_of
from tests.models.test_decoder import make

# Not GPT-OSS's mxfp4, which has names of experts.
ROWS = [name for name in directories.ROWS if name != "mxfp4"]
ALWAYS = ["nf4 nested", "gptq 4", "awq", "fp8 block", "modelopt nvfp4"]
# Sizes that all layouts can hold. Groups have up to 128 inputs.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9)).astype(np.int32)


@nnx.jit
def run(model, x):
    return model(x)


def write_quantized(path, model, row):
    """Writes a float model with its projections in a layout; returns the config."""
    models.save(path, model, dtype=jnp.float32)
    with jaxq.io.read_checkpoint(path) as checkpoint:
        floats = {name: np.asarray(checkpoint[name]) for name in checkpoint}
        config = checkpoint.config
    spec = layouts.get(CASES[row].layout).spec(CASES[row].config)
    tensors, settings = {}, {}
    for name, array in floats.items():
        if not name.endswith("_proj.weight"):
            tensors[name] = array
            continue
        qt = jaxq.quantize(jnp.asarray(array.T), spec)
        arrays, settings = tensors_of(row, name.removesuffix(".weight"), qt)
        tensors |= arrays
    directories.write(path, tensors, settings, **config)


@pytest.mark.parametrize("row", tables.thinned(ROWS, ALWAYS))
def test_logits_are_those_of_the_quantized_model(tmp_path, row):
    model = make(**SIZES)
    write_quantized(tmp_path, model, row)
    spec = layouts.get(CASES[row].layout).spec(CASES[row].config)
    # LLM.int8 quantizes the inputs too.
    recipe = "llm_int8" if row == "llm_int8" else spec
    expected, _ = jaxq.quantize_model(model, recipe)
    loaded, tokenizer = models.load(tmp_path)
    assert tokenizer is None
    kernel = loaded.layers[0].mlp.up_proj.kernel[...]
    assert isinstance(kernel, jaxq.QTensor)
    assert kernel.spec.fmt == spec.fmt
    # Codes are the same. Two scales can differ in the last bit, see docs/interop.md.
    np.testing.assert_allclose(
        run(loaded, TOKENS), run(expected, TOKENS), atol=1e-5, rtol=0
    )


# The formats of `export`, with a row of weights for each.
EXPORTED = {
    "awq": "awq",
    "bitsandbytes": "nf4",
    "compressed-tensors": "compressed-tensors pack 4",
    "fp8": "fp8 block",
    "gptq": "gptq 4",
    "modelopt": "modelopt nvfp4",
}


@pytest.mark.parametrize("fmt", tables.thinned(EXPORTED, ["bitsandbytes", "gptq"]))
def test_an_exported_model_comes_back(tmp_path, fmt):
    row = CASES[EXPORTED[fmt]]
    model = make(**SIZES)
    qmodel, _ = jaxq.quantize_model(model, layouts.get(row.layout).spec(row.config))
    # The layers are stacked here and in a list there, and the files are small.
    stacked = models.stacked(qmodel)
    jaxq.io.export(stacked, tmp_path, format=fmt, shard_bytes=100_000, eos_token_id=3)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 3
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    loaded, _ = models.load(tmp_path)
    np.testing.assert_array_equal(run(loaded, TOKENS), run(qmodel, TOKENS))


def test_a_checkpoint_becomes_floats(tmp_path):
    write_quantized(tmp_path / "gptq", make(**SIZES), "gptq 4")
    (tmp_path / "gptq/tokenizer.json").write_text("{}")
    with jaxq.io.read_checkpoint(tmp_path / "gptq") as checkpoint:
        jaxq.io.export(checkpoint, tmp_path / "floats", format="hf")
        name = "model.layers.1.self_attn.q_proj.weight"
        expected = jaxq.dequantize(checkpoint[name])
    with jaxq.io.read_checkpoint(tmp_path / "floats") as floats:
        assert not floats.is_quantized(name)
        assert "quantization_config" not in floats.config
        np.testing.assert_array_equal(floats[name], np.asarray(expected))
    assert (tmp_path / "floats/tokenizer.json").read_text() == "{}"


def test_weights_that_do_not_fit_are_listed_and_nothing_is_written(tmp_path):
    qmodel, _ = jaxq.quantize_model(make(**SIZES), "nf4")
    path = tmp_path / "out"
    message = r"format='gptq' cannot hold these weights:(\n.*){14}$"
    with pytest.raises(ValueError, match=message):
        jaxq.io.export(qmodel, path, format="gptq")
    with pytest.raises(ValueError, match="format 'gtpq'. Did you mean 'gptq'"):
        jaxq.io.export(qmodel, path, format="gtpq")
    with pytest.raises(ValueError, match="no weight is quantized"):
        jaxq.io.export(make(**SIZES), path, format="gptq")
    with pytest.raises(TypeError, match="cannot write a Linear"):
        jaxq.io.export(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), path, format="gptq")
    assert not path.exists()


# The formats that quantize inputs, with a recipe for each.
WITH_INPUTS = {
    "w8a8": "compressed-tensors",
    "fp8_dynamic": "compressed-tensors",
    "llm_int8": "bitsandbytes",
}


@pytest.mark.parametrize("recipe", WITH_INPUTS)
def test_the_quantization_of_inputs_comes_back(tmp_path, recipe):
    qmodel, _ = jaxq.quantize_model(make(**SIZES), recipe)
    jaxq.io.export(qmodel, tmp_path, format=WITH_INPUTS[recipe])
    loaded, _ = models.load(tmp_path)
    kernel = loaded.layers[0].mlp.up_proj.kernel[...]
    original = qmodel.layers[0].mlp.up_proj.kernel[...]
    assert kernel.meta.activation == original.meta.activation
    assert kernel.meta.outliers == original.meta.outliers
    np.testing.assert_allclose(
        run(loaded, TOKENS), run(qmodel, TOKENS), atol=1e-5, rtol=0
    )
    for fmt in {"bitsandbytes", "compressed-tensors"} - {WITH_INPUTS[recipe]}:
        with pytest.raises(ValueError, match="it quantizes its inputs"):
            jaxq.io.export(qmodel, tmp_path / "out", format=fmt)


def test_compressed_tensors_says_how_inputs_are_quantized(tmp_path):
    qmodel, _ = jaxq.quantize_model(make(**SIZES), "w8a8")
    jaxq.io.export(qmodel, tmp_path, format="compressed-tensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["format"] == "int-quantized"
    assert group["input_activations"]["strategy"] == "token"
    assert group["input_activations"]["dynamic"]


def test_stacked_layers(tmp_path):
    write_quantized(tmp_path, make(**SIZES), "gptq 4")
    loaded, _ = models.load(tmp_path)
    stacked, _ = models.load(tmp_path, scan_layers=True)
    assert stacked.layers.mlp.up_proj.kernel[...].batch_shape == (2,)
    np.testing.assert_allclose(
        run(stacked, TOKENS), run(loaded, TOKENS), atol=1e-5, rtol=0
    )


def test_weights_stay_quantized_in_memory(tmp_path):
    write_quantized(tmp_path, make(**SIZES), "nf4")
    loaded, _ = models.load(tmp_path)
    kernels = [
        leaf
        for leaf in jax.tree.leaves(nnx.state(loaded), is_leaf=jaxq.qtensor.is_qtensor)
        if isinstance(leaf, jaxq.QTensor)
    ]
    assert len(kernels) == 7 * 2
    assert sum(qt.nbytes for qt in kernels) < sum(qt.size for qt in kernels) * 4.6 / 8


# Groups of 128 inputs are not cut.
RULES = {
    "**/gate_proj/kernel": P(None, "t"),
    "**/up_proj/kernel": P(None, "t"),
    "**/down_proj/kernel": P("t", None),
    "embed_tokens/embedding": P(None, "d"),
    "**": P(),
}


def devices():
    shape = (jax.device_count() // 2, 2)
    return jax.make_mesh(shape, ("d", "t"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("row", tables.thinned(["gptq 4", "fp8 block"], ["fp8 block"]))
def test_a_quantized_directory_on_a_mesh(tmp_path, row):
    write_quantized(tmp_path, make(**SIZES), row)
    mesh = devices()
    whole, _ = models.load(tmp_path)
    expected = jaxq.sharding.place(whole, mesh, RULES)
    model, _ = models.load(tmp_path, mesh=mesh, rules=RULES)
    kernel = model.layers[0].mlp.down_proj.kernel[...]
    assert kernel.data.sharding.spec == P(None, "t")  # stored as [out, in]

    def compare(a, b):
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(compare, nnx.state(model), nnx.state(expected))
    np.testing.assert_allclose(run(model, TOKENS), run(whole, TOKENS), atol=1e-4)


def test_rules_are_checked_before_weights_are_read(tmp_path, monkeypatch):
    write_quantized(tmp_path, make(**SIZES), "gptq 4")
    mesh = devices()
    monkeypatch.setattr(jaxq.io.Checkpoint, "__getitem__", None)
    with pytest.raises(ValueError, match=r"jaxq\.models\.load: the rules \['up'\]"):
        models.load(tmp_path, mesh=mesh, rules={"up": P(), "**": P()})
    rules = {"**/down_proj/kernel": P(("d", "t")), "**": P()}
    with pytest.raises(ValueError, match="not whole groups of 128 codes"):
        models.load(tmp_path, mesh=mesh, rules=rules)


def test_shapes_are_compared_before_weights_are_read(tmp_path, monkeypatch):
    write_quantized(tmp_path, make(**SIZES), "gptq 4")
    config = json.loads((tmp_path / "config.json").read_text())
    text = json.dumps(config | {"intermediate_size": 512})
    (tmp_path / "config.json").write_text(text)
    monkeypatch.setattr(models._checkpoint, "filled_with_quantized", None)
    with pytest.raises(ValueError, match=r"up_proj.weight is \[256, 128\], expected"):
        models.load(tmp_path)
