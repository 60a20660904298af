"""`jaxq generate`, against `jaxq.models.generate`."""

import io
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxq


def test_the_text_is_that_of_generate(run, model_dir):
    model, tokenizer = jaxq.models.load(model_dir)
    ids = tokenizer.encode("def f(").ids
    words = ["generate", model_dir, "--prompt", "def f(", "--tokens", "5"]
    result = run(*words, "--json")
    expected = jaxq.models.generate(model, jnp.asarray([ids]), 5)[0, len(ids) :]
    assert result.json["tokens"] == expected.tolist()
    assert result.json["text"] == tokenizer.decode(expected.tolist())
    assert run(*words).out == f"def f({result.json['text']}\n"


def test_sampling_has_a_seed(run, model_dir):
    model, tokenizer = jaxq.models.load(model_dir)
    ids = tokenizer.encode("def f(").ids
    words = ["generate", model_dir, "--prompt", "def f(", "--tokens", "5", "--json"]
    sampled = run(*words, "--temperature", "2", "--seed", "7", "--cache", "int8")
    expected = jaxq.models.generate(
        model,
        jnp.asarray([ids]),
        5,
        key=jax.random.key(7),
        temperature=2.0,
        cache="int8",
    )
    assert sampled.json["tokens"] == expected[0, len(ids) :].tolist()


def test_sampling_options_are_those_of_generate(run, model_dir, monkeypatch):
    options = {}

    def record(model, tokens, num_tokens, **settings):
        options.update(settings)

    monkeypatch.setattr("jaxq.models.generate", record)
    words = ["generate", model_dir, "--prompt", "a", "--temperature", "0.5"]
    assert run(*words, "--top-k", "4", "--top-p", "0.9", "--seed", "3").code == 0
    expected = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "key": 3, "cache": None}
    assert {name: options[name] for name in expected} == expected


class Pipe(io.RawIOBase):
    """Keeps what has arrived."""

    def __init__(self):
        self.data = b""

    def writable(self):
        return True

    def write(self, data):
        self.data += bytes(data)
        return len(data)


def test_a_text_goes_through_a_pipe_while_it_is_made(model_dir, monkeypatch):
    pipe, seen = Pipe(), []
    generate = jaxq.models.generate

    def watched(*arguments, on_token, **settings):
        def add(row):
            on_token(row)
            seen.append(pipe.data.decode())

        return generate(*arguments, on_token=add, **settings)

    monkeypatch.setattr("jaxq.models.generate", watched)
    buffered = io.TextIOWrapper(io.BufferedWriter(pipe), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", buffered)
    words = ["generate", str(model_dir), "--prompt", "def f(", "--tokens", "5"]
    assert jaxq.cli.main(words) == 0
    assert len(set(seen)) > 3
    text = pipe.data.decode()
    assert all(text.startswith(part) for part in ["def f(", *seen])


def edited(model_dir, tmp_path, name, **entries):
    """A copy of the model whose JSON file has other entries."""
    out = tmp_path / "edited"
    shutil.copytree(model_dir, out)
    file = out / name
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return out


def test_the_end_token_and_a_stop_text_end_the_text(run, model_dir, tmp_path):
    words = ["--prompt", "def f(", "--tokens", "5"]
    whole = run("generate", model_dir, *words, "--json").json
    # The text ends with the first of these tokens.
    end = whole["tokens"][2]
    count = whole["tokens"].index(end) + 1
    path = edited(model_dir, tmp_path, "config.json", eos_token_id=[end, 2047])
    result = run("generate", path, *words, "--json")
    assert result.json["tokens"] == whole["tokens"][:count]
    stop = whole["text"][3:5]
    result = run("generate", model_dir, *words, "--stop", stop, "--stop", "#!#")
    assert result.out == f"def f({whole['text'].partition(stop)[0]}\n"


def test_a_chat_template(run, model_dir, tmp_path):
    pytest.importorskip("jinja2", reason="templates need it: pip install jaxq[hf]")
    words = ["--prompt", "x", "--tokens", "3", "--chat"]
    result = run("generate", model_dir, *words)
    assert result.code == 2
    assert "has no chat template" in result.err
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}answer:{% endif %}"
    )
    path = edited(model_dir, tmp_path, "tokenizer_config.json", chat_template=template)
    result = run("generate", path, *words)
    plain = ["--prompt", "user: x\nanswer:", "--tokens", "3", "--json"]
    assert result.out == run("generate", model_dir, *plain).json["text"] + "\n"


def test_wrong_arguments(run, model_dir):
    words = ["generate", model_dir, "--prompt"]
    assert "has no token" in run(*words, "").err
    result = run(*words, "a", "--cache", "int5")
    assert result.code == 1
    assert "int5" in result.err
    assert run(*words, "a", "--temperature", "-1").code == 2
    for option in (("--top-k", "3"), ("--top-p", "0.5")):
        assert "need a --temperature" in run(*words, "a", *option).err
    assert run(*words, "a", "--temperature", "1", "--top-p", "0").code == 2


def test_an_encoder_is_no_language_model(run, model_dir, text, monkeypatch):
    monkeypatch.setattr("jaxq.models.Decoder", jaxq.models.Encoder)
    for words in (["generate", "--prompt", "a"], ["evaluate", "--text", text]):
        result = run(words[0], model_dir, *words[1:])
        assert result.code == 2
        assert "is an encoder" in result.err
