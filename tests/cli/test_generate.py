"""`jaxq generate`, against `jaxq.models.generate`."""

import jax
import jax.numpy as jnp

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


def test_wrong_arguments(run, model_dir):
    words = ["generate", model_dir, "--prompt"]
    assert "has no token" in run(*words, "").err
    result = run(*words, "a", "--cache", "int5")
    assert result.code == 1
    assert "int5" in result.err
    assert run(*words, "a", "--temperature", "-1").code == 2
