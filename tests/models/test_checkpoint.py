"""Hugging Face directories: read as `transformers` reads them, written, and errors."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxq.evaluation import perplexity
from jaxq.files import NewFile
from jaxq.models import _checkpoint as checkpoint_module
from jaxq.models import load, save
from jaxq.models.decoder import DecoderLayer
from tests.arrays import assert_same
from tests.models.peers import DENSE, REASON, make_peer, peer_logits
from tests.models.test_decoder import make

EXAMPLES = Path(__file__).parents[2] / "examples"


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
    "name", ["llama", "tied", "biases", "llama3", "qwen2", "mistral"]
)
def test_transformers_reads_directories_of_save(torch, transformers, name, tmp_path):
    make_peer(torch, transformers, DENSE, name).save_pretrained(tmp_path / "peer")
    model, _ = load(tmp_path / "peer")
    save(tmp_path / "jaxq", model, dtype=jnp.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "jaxq").eval()
    np.testing.assert_allclose(
        run(model, tokens()), peer_logits(torch, again, tokens()), atol=2e-4, rtol=0
    )


def test_sharded_checkpoints(torch, transformers, tmp_path):
    peer = make_peer(torch, transformers, DENSE, "llama")
    peer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, _ = load(tmp_path)
    np.testing.assert_allclose(
        run(model, tokens()), peer_logits(torch, peer, tokens()), atol=2e-4, rtol=0
    )
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="has no model-00002"):
        load(tmp_path)


def test_trained_model_is_the_same_in_transformers(torch, transformers):
    directory = EXAMPLES / "tiny_llama"
    model, tokenizer = load(directory, scan_layers=True)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    peer_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = (EXAMPLES / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    ids = np.asarray(tokenizer.encode(text).ids)
    np.testing.assert_array_equal(peer_tokenizer(text)["input_ids"], ids)
    assert tokenizer.decode(ids.tolist()) == text
    value = perplexity(model, ids)
    peer_value = perplexity(lambda x: jnp.asarray(peer_logits(torch, peer, x)), ids)
    assert peer_value == pytest.approx(value, rel=1e-3)
    # A trained model is far better than the frequencies of tokens alone.
    frequencies = np.bincount(ids)[ids] / len(ids)
    assert value < np.exp(-np.log(frequencies).mean()) / 3


# Round trips and errors, without transformers


@pytest.fixture
def written(tmp_path):
    model = make(head_dim=8)
    save(tmp_path, model, dtype=jnp.float32)
    return tmp_path, model


def rewrite(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"scan_layers": True}]
)
def test_round_trip_is_exact(changes, tmp_path):
    model = make(head_dim=8, **changes)
    save(tmp_path, model, dtype=jnp.float32)
    for scan in (False, True):
        again, _ = load(tmp_path, scan_layers=scan)
        assert again.config == dataclasses.replace(model.config, scan_layers=scan)
        if scan == model.config.scan_layers:
            arrays = nnx.to_pure_dict(nnx.state(again))
            assert_same(arrays, nnx.to_pure_dict(nnx.state(model)))
        else:
            np.testing.assert_allclose(
                run(again, tokens()), run(model, tokens()), atol=1e-5, rtol=0
            )


def test_bfloat16_files_are_exact_in_float32(written):
    path, model = written
    save(path, model)
    kernel = model.layers[1].mlp.up_proj.kernel[...]
    stored = load_file(path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    loaded = load(path)[0].layers[1].mlp.up_proj.kernel[...]
    assert loaded.dtype == jnp.float32
    np.testing.assert_array_equal(
        loaded, kernel.astype(jnp.bfloat16).astype(jnp.float32)
    )
    low = load(path, dtype=jnp.bfloat16)[0]
    assert all(
        leaf.dtype == jnp.bfloat16
        for leaf in jax.tree.leaves(nnx.state(low, nnx.Param))
    )
    assert run(low, tokens()).dtype == jnp.float32


def test_kernels_are_stored_transposed(written):
    path, _ = written
    stored = load_file(path / "model.safetensors")[
        "model.layers.0.mlp.down_proj.weight"
    ]
    assert stored.shape == (32, 48)
    np.testing.assert_array_equal(
        load(path)[0].layers[0].mlp.down_proj.kernel[...], stored.T
    )


def test_one_error_lists_all_wrong_tensors(written):
    path, _ = written

    def damage(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(8, np.float32)
        tensors["lm_head.weight"] = np.zeros((96, 32), np.float32)

    rewrite(path, damage)
    message = (
        "missing tensors: model.layers.0.mlp.up_proj.weight, model.norm.weight; "
        "unexpected tensors: model.layers.0.self_attn.q_norm.weight; "
        r"wrong shapes: lm_head.weight is \[96, 32\], expected \[97, 32\]"
    )
    with pytest.raises(ValueError, match=message):
        load(path)


def test_transposed_tensor_is_an_error(written):
    path, _ = written
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(path, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    with pytest.raises(
        ValueError, match=r"up_proj.weight is \[32, 48\], expected \[48, 32\]"
    ):
        load(path)


def test_head_beside_a_tied_embedding_must_equal_it(tmp_path):
    save(tmp_path, make(head_dim=8, tie_word_embeddings=True))
    rewrite(
        tmp_path,
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}),
    )
    load(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * 2}))
    with pytest.raises(
        ValueError, match="lm_head.weight that differs from model.embed_tokens.weight"
    ):
        load(tmp_path)


def test_rotary_tables_of_old_checkpoints_are_ignored(written):
    path, _ = written
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    rewrite(path, lambda t: t.update(table))
    load(path)


def test_integer_tensors_are_an_error(written):
    path, _ = written
    rewrite(path, lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}))
    with pytest.raises(ValueError, match="model.norm.weight holds I8"):
        load(path)


def test_unsupported_config_is_an_error(written):
    path, _ = written
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(ValueError, match=r"says gptq, but no tensor is named \*\.qw"):
        load(path)


def test_missing_files_are_errors(written, tmp_path):
    path, _ = written
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load(tmp_path / "nowhere")
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        load(path)
    # A save was killed before the first config of this directory.
    (path / "config.json").unlink()
    (path / f".config.json.{'0' * 16}.partial").touch()
    message = "no config.json, because a save was interrupted.* has no other file"
    with pytest.raises(FileNotFoundError, match=message):
        load(path)


def test_errors_of_the_system_name_the_function_and_the_path(tmp_path):
    model = make(head_dim=8)
    path = tmp_path / "model"
    path.touch()
    with pytest.raises(OSError, match=r"jaxq\.models\.save: the directory .*/model"):
        save(path, model)
    with pytest.raises(OSError, match=r"jaxq\.models\.save: the directory .*/model/x"):
        save(path / "x", model)
    with pytest.raises(ValueError, match=r"jaxq\.models\.save: the directory .*null"):
        save(tmp_path / "a\0b", model)
    with pytest.raises(FileNotFoundError, match=r"jaxq\.models\.load: .*no config"):
        load(path)
    path.unlink()
    save(path, model)
    for name in ("model.safetensors", "config.json"):
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(OSError, match=rf"jaxq\.models\.load: .*a pipe.*{name}"):
            load(path)


def test_tokenizer_without_its_package_is_an_error(written, monkeypatch):
    path, _ = written
    (path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install jaxq\[hf\]"):
        load(path)


def test_tokenizer_round_trip(written):
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra installs it")
    path, model = written
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    )
    save(path, model, tokenizer=tokenizer, eos_token_id=1)
    assert load(path)[1].encode("b").ids == [1]
    assert json.loads((path / "config.json").read_text())["eos_token_id"] == 1


def test_saving_other_parameters_is_an_error(tmp_path):
    model = make(head_dim=8)
    model.layers[0].mlp.up_proj.kernel_scale = nnx.Param(jnp.ones(3))
    with pytest.raises(
        ValueError,
        match="of a float Decoder in layers.0.mlp.up_proj.kernel_scale",
    ):
        save(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_model_does_not_need_its_directory_after_loading(written):
    path, model = written
    again, _ = load(path)
    shutil.rmtree(path)
    np.testing.assert_array_equal(run(again, tokens()), run(model, tokens()))


def test_damaged_weights_are_an_error(written):
    path, _ = written
    weights = (path / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(weights) - 1000):
        (path / "model.safetensors").write_bytes(weights[:size])
        with pytest.raises(ValueError, match="model.safetensors is damaged"):
            load(path)


def test_damaged_config_is_an_error(written):
    path, _ = written
    for text in ("", "[]", "{"):
        (path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            load(path)


def test_damaged_index_is_an_error(written):
    path, _ = written
    index = path / "model.safetensors.index.json"
    for text in ("{", "{}", "[]", '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json is damaged"):
            load(path)
    names = dict.fromkeys(load_file(path / "model.safetensors"), "model.safetensors")
    shutil.copy(path / "model.safetensors", path / "other.safetensors")
    for change, message in (
        (
            {"model.norm.more": "model.safetensors"},
            "index.json is damaged: model.norm.more is not in model.safetensors",
        ),
        (
            {"model.norm.weight": "other.safetensors"},
            " is both in model.safetensors and in other.safe",
        ),
    ):
        index.write_text(json.dumps({"weight_map": names | change}))
        with pytest.raises(ValueError, match=message):
            load(path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/hostname", "a/b", "..", "", "a\\b", "a\0"]
)
def test_an_index_names_no_file_outside_its_directory(written, name):
    path, _ = written
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(
        ValueError, match=r"index\.json names the file .* for model.norm"
    ):
        load(path)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_config_of_many_layers_builds_none(written, monkeypatch, scan_layers):
    path, _ = written
    config = json.loads((path / "config.json").read_text())
    text = json.dumps(config | {"num_hidden_layers": 10**9})
    (path / "config.json").write_text(text)

    def fail(*args, **kwargs):
        raise AssertionError("a layer was built")

    monkeypatch.setattr("jaxq.models.decoder.DecoderLayer.__init__", fail)
    message = r"config\.json: num_hidden_layers is 1000000000, .* of 2 layers"
    with pytest.raises(ValueError, match=message):
        load(path, scan_layers=scan_layers)


def test_a_comparison_with_the_config_does_not_build_every_layer(tmp_path, monkeypatch):
    save(tmp_path, make(head_dim=8, num_hidden_layers=5))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 96}))
    build = DecoderLayer.__init__
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        build(*args, **kwargs)

    monkeypatch.setattr(DecoderLayer, "__init__", counted)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[97, 32\]"):
        load(tmp_path)
    # One for the parameters outside the layers, and one for those of a layer.
    assert count == 2


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_config_of_large_sizes_allocates_nothing(written, key):
    path, _ = written
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: 2**31 - 1}))
    with pytest.raises(ValueError, match="does not fit its config.json: wrong shapes"):
        load(path)


def test_a_directory_that_changes_while_it_is_read(written, monkeypatch):
    path, _ = written
    other = make(head_dim=8, rope_theta=5.0)
    opened = checkpoint_module.open_weights

    def interrupted(*args, **kwargs):
        save(path, other)
        return opened(*args, **kwargs)

    monkeypatch.setattr(checkpoint_module, "open_weights", interrupted)
    with pytest.raises(ValueError, match="changed while it was read. Load it again"):
        load(path)


def test_long_lists_of_tensors_are_cut(written):
    path, _ = written
    more = {f"extra.{i:03d}": np.ones(1, np.float32) for i in range(100)}
    rewrite(path, lambda tensors: tensors.update(more))
    with pytest.raises(ValueError, match=r"extra\.019 and 80 more\."):
        load(path)


def test_damaged_tokenizer_is_an_error(written):
    path, _ = written
    (path / "tokenizer.json").write_text("{")
    pytest.importorskip("tokenizers", reason="reads a tokenizer: pip install jaxq[hf]")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        load(path)


def test_integer_dtype_is_an_error(written):
    path, _ = written
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got int8"):
        load(path, dtype="int8")


# Interrupted saves.

# The calls of a save that change the directory, in order. A save that stops before any
# of them must leave a directory that is whole, or that `load` refuses.
CHANGES = ("open", "fsync", "unlink", "replace")


class Stopped(BaseException):
    """Stands for a kill: nothing may handle it."""


def save_until(path, model, monkeypatch, stop):
    """Saves, and stops before the change number `stop`. False if there is none."""
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > stop:
                raise Stopped
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, counted(getattr(os, name)))
        # A kill closes files and removes none.
        patch.setattr(
            NewFile, "_discard", lambda self: self._file and self._file.close()
        )
        try:
            save(path, model, dtype=jnp.float32)
        except Stopped:
            return False
    return True


def state_of(path):
    """What a directory says about its model; None if it has no config."""
    if not (path / "config.json").exists():
        return None
    config = json.loads((path / "config.json").read_text())
    weights = load_file(path / "model.safetensors")
    return config["rope_theta"], float(weights["model.norm.weight"][0])


def test_an_interrupted_save_leaves_one_model_or_none(tmp_path, monkeypatch):
    old = make(head_dim=8)
    # The same shapes and another base: only the config says which model it is.
    new = make(head_dim=8, rope_theta=500.0)
    old.norm.scale.set_value(jnp.full(32, 1.0))
    new.norm.scale.set_value(jnp.full(32, 2.0))
    states = []
    for stop in range(100):
        path = tmp_path / str(stop)
        save(path, old, dtype=jnp.float32)
        is_whole = save_until(path, new, monkeypatch, stop)
        states.append(state_of(path))
        if states.count(None) == 1 and states[-1] is None:
            message = (
                r"config\.json, because a save was interrupted.* model\.safetensors"
            )
            with pytest.raises(FileNotFoundError, match=message):
                load(path)
        # The next save works whatever the interrupted one left.
        save(path, new, dtype=jnp.float32)
        assert state_of(path) == (500.0, 2.0)
        assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
        if is_whole:
            break
    order = [(old.config.rope_theta, 1.0), None, (500.0, 2.0)]
    positions = [order.index(state) for state in states]
    assert positions == sorted(positions)
    assert set(positions) == {0, 1, 2}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_failing_save_keeps_the_old_directory(tmp_path, monkeypatch, name):
    class Tokenizer:
        def to_str(self, pretty):
            return "{}"

    model = make(head_dim=8)
    save(tmp_path, model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = NewFile.write

    def fail(self, data):
        if self.path.name == name:
            raise OSError("disk full")
        write(self, data)

    monkeypatch.setattr(NewFile, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, model, tokenizer=Tokenizer(), dtype=jnp.float32)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_over_a_directory_with_an_index(written):
    path, model = written
    names = dict.fromkeys(load_file(path / "model.safetensors"), "old.safetensors")
    shutil.move(path / "model.safetensors", path / "old.safetensors")
    index = {"weight_map": names}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    model.norm.scale.set_value(model.norm.scale[...] + 1)
    save(path, model, dtype=jnp.float32)
    again, _ = load(path)
    np.testing.assert_array_equal(again.norm.scale[...], model.norm.scale[...])


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "model"
    path.mkdir()
    # The name that earlier versions wrote to.
    (path / f".config.json.{os.getpid()}").symlink_to(victim)
    save(path, make(head_dim=8))
    assert victim.read_text() == "precious"


def test_saving_in_a_dtype_without_enough_bits_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float64.*got int8"):
        save(tmp_path, make(head_dim=8), dtype="int8")
