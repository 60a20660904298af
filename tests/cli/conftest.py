"""A small model directory, a text, and a function that runs a command."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from flax import nnx

import jaxq
from jaxq.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


class Run(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """stdout as one JSON object. NaN and Infinity are not JSON."""

        def refuse(text):
            raise ValueError(f"{text} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


@pytest.fixture
def run(capsys):
    """Runs a command in this process."""

    def run_command(*arguments) -> Run:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Run(code, *capsys.readouterr())

    return run_command


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A random Llama of one layer, with the tokenizer of the bundled model."""
    _, tokenizer = jaxq.models.load(EXAMPLES / "tiny_llama")
    config = jaxq.models.LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32,
    )
    model = jaxq.models.Llama(config, rngs=nnx.Rngs(0))
    path = tmp_path_factory.mktemp("models") / "small"
    jaxq.models.save(path, model, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A text of a few hundred tokens."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text((EXAMPLES / "heldout.txt").read_text()[:2500])
    return path
