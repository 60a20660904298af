"""Responses in a JSONL file: filters, duplicates, stopped runs, and rows of tokens."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.distillation import read_responses, responder, write_responses
from tests.distillation.models import Letters, MeanModel, mean_logits, params

PROMPTS = ["abc", "b", "nn", "abcd", "f", "gg", "a"]


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shout(prompts):
    return [prompt.upper() for prompt in prompts]


def sampling_responder():
    return responder(
        (mean_logits, params()),
        Letters(),
        num_tokens=4,
        temperature=1.0,
        stop_token=1,
    )


class Stopping:
    """Answers some prompts, and is stopped then."""

    def __init__(self, respond, calls):
        self.respond, self.calls = respond, calls

    def __call__(self, *arguments):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.respond(*arguments)


def test_responses_are_the_teachers():
    teacher = (mean_logits, params())
    respond = responder(teacher, Letters(), num_tokens=4, stop_token=1)
    together = respond(PROMPTS)
    assert together == [respond([prompt])[0] for prompt in PROMPTS]
    # In numpy, token by token.
    expected = []
    for prompt in PROMPTS:
        tokens = Letters().encode(prompt)
        start = len(tokens)
        for _ in range(4):
            mean = np.asarray(params()["embed"])[tokens].mean(0)
            tokens.append(int(np.argmax(mean @ np.asarray(params()["head"]))))
            if tokens[-1] == 1:
                break
        expected.append(Letters().decode([i for i in tokens[start:] if i != 1]))
    assert together == expected


def test_a_tokenizer_that_returns_an_object_with_ids():
    class Encoding:
        def __init__(self, ids):
            self.ids = ids

    class WithIds(Letters):
        def encode(self, text):
            return Encoding(super().encode(text))

        def decode(self, ids):
            return " ".join(map(str, ids))

    respond = responder(MeanModel(), WithIds(), num_tokens=3)
    responses = respond(["ab", "c"])
    assert [len(text.split()) for text in responses] == [3, 3]
    with pytest.raises(ValueError, match="the prompt '' has no token"):
        respond(["ab", ""])


def test_filters_and_duplicates(tmp_path):
    path = tmp_path / "data.jsonl"
    prompts = ["aa", "b", "AA", "long one", "c", "c"]
    counts = write_responses(
        path,
        prompts,
        shout,
        filters=[
            lambda record: len(record["response"]) <= 3,
            lambda record: record["prompt"] != "b",
        ],
        unique=lambda record: record["response"],
        batch_size=2,
    )
    assert counts == {"written": 2, "filtered": 2, "duplicates": 2, "resumed": 0}
    assert records(path) == [
        {"index": 0, "prompt": "aa", "response": "AA"},
        {"index": 4, "prompt": "c", "response": "C"},
    ]


def test_labels_and_soft_labels(tmp_path):
    path = tmp_path / "labels.jsonl"

    def classify(prompts):
        return [
            {"label": np.int64(len(prompt)), "logits": jnp.array([0.5, 2.0])}
            for prompt in prompts
        ]

    write_responses(path, ["a", "bé\n"], classify)
    assert records(path)[1] == {
        "index": 1,
        "prompt": "bé\n",
        "response": {"label": 3, "logits": [0.5, 2.0]},
    }
    with pytest.raises(TypeError, match=r"is a dict, not text.*json.loads"):
        read_responses(path, Letters())


@pytest.mark.parametrize("cut", [0, 1, 30], ids=["whole", "newline lost", "half line"])
@pytest.mark.parametrize("calls", [0, 2])
def test_a_stopped_run_continues_to_the_same_bytes(tmp_path, cut, calls):
    path, whole = tmp_path / "data.jsonl", tmp_path / "whole.jsonl"
    options = {
        "key": jax.random.key(0),
        "batch_size": 3,
        "filters": [lambda record: "c" not in record["response"]],
        "unique": lambda record: record["response"][:1],
    }
    respond = sampling_responder()
    write_responses(whole, PROMPTS, respond, **options)
    with pytest.raises(KeyboardInterrupt):
        write_responses(path, PROMPTS, Stopping(respond, calls), **options)
    if path.stat().st_size:
        os.truncate(path, path.stat().st_size - cut)
    num_lines = path.read_bytes().count(b"\n")
    counts = write_responses(path, PROMPTS, respond, **options)
    assert path.read_bytes() == whole.read_bytes()
    assert counts["resumed"] == num_lines
    assert counts["written"] == len(records(whole)) > 2
    # A finished file does not change either.
    write_responses(path, PROMPTS, respond, **options)
    assert path.read_bytes() == whole.read_bytes()


def test_finished_batches_are_not_answered_again(tmp_path):
    path = tmp_path / "data.jsonl"
    write_responses(path, PROMPTS, shout, batch_size=2)
    # 7 prompts: the last line is that of the only prompt of batch 3.
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    batches = []

    def respond(prompts):
        batches.append(prompts)
        return shout(prompts)

    write_responses(path, PROMPTS, respond, batch_size=2)
    assert batches == [PROMPTS[4:6], PROMPTS[6:]]
    assert [record["index"] for record in records(path)] == list(range(7))


KILLED = """
import sys, time
from jaxq.distillation import write_responses
def respond(prompts):
    time.sleep(0.05)
    return [prompt.upper() for prompt in prompts]
prompts = [f"prompt {i}" for i in range(2000)]
write_responses(sys.argv[1], prompts, respond, batch_size=4)
"""


def test_a_killed_process_loses_nothing_it_wrote(tmp_path):
    path = tmp_path / "data.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)])
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 12):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    prompts = [f"prompt {i}" for i in range(2000)]
    counts = write_responses(path, prompts, shout)
    assert counts["resumed"] >= 12
    assert records(path) == [
        {"index": i, "prompt": prompt, "response": prompt.upper()}
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ('{"index": 0, "prompt": "x", "response": ""}\n', "written for other prompts"),
        (
            '{"index": 9, "prompt": "abc", "response": ""}\n',
            "written for other prompts",
        ),
        ('{"text": "abc"}\n', "line 1 of"),
        ('{"index": 0, "prompt": "abc", "response": ""}\n' * 2, "line 2 of"),
        ('{"index": "0", "prompt": "abc", "response": ""}\n', "line 1 of"),
        ('not json\n{"index": 0', "line 1 of"),
        ("Dear diary", "ends in a line that is not a record"),
    ],
)
def test_other_files_are_refused(tmp_path, contents, message):
    path = tmp_path / "data.jsonl"
    path.write_text(contents)
    with pytest.raises(ValueError) as error:
        write_responses(path, PROMPTS, shout)
    assert message in str(error.value)
    assert path.read_text() == contents


def test_bad_arguments(tmp_path):
    path = tmp_path / "data.jsonl"
    with pytest.raises(TypeError, match=r"Pass a list: \[prompt\]"):
        write_responses(path, "abc", shout)
    with pytest.raises(TypeError, match="prompt 1 is a int"):
        write_responses(path, ["a", 1], shout)
    with pytest.raises(FileNotFoundError, match="Create it first"):
        write_responses(tmp_path / "no" / "data.jsonl", PROMPTS, shout)
    with pytest.raises(ValueError, match="batch_size is 0"):
        write_responses(path, PROMPTS, shout, batch_size=0)
    with pytest.raises(ValueError, match="respond returned 1 responses for 7 prompts"):
        write_responses(path, PROMPTS, lambda prompts: prompts[:1])
    for responses, shown in (
        ("abc", "one string"),
        (None, "None"),
        (iter("abc"), "a str_ascii_iterator"),
        ({"a": 1, "b": 2, "c": 3}, "a dict"),
        (np.float32(1), "a float32"),
    ):
        with pytest.raises(TypeError, match=f"respond returned {shown} for 3 prompts"):
            write_responses(path, PROMPTS[:3], lambda prompts, r=responses: r)
    with pytest.raises(TypeError, match="batch_size is 2.5; expected an integer"):
        write_responses(path, PROMPTS, shout, batch_size=2.5)
    with pytest.raises(ValueError, match="prompt 1 has a lone surrogate"):
        write_responses(path, ["a", "b\ud800"], shout)
    with pytest.raises(
        ValueError, match="to prompt 0 cannot be written: it has a lone"
    ):
        write_responses(path, PROMPTS, lambda prompts: [{"text": "b\ud800"}] * 7)
    with pytest.raises(ValueError, match="response to prompt 0 cannot be written"):
        write_responses(path, PROMPTS, lambda prompts: [float("nan")] * 7)
    with pytest.raises(TypeError, match="a response has a set"):
        write_responses(path, PROMPTS, lambda prompts: [{1}] * 7)
    with pytest.raises(ValueError, match="pass key="):
        write_responses(path, PROMPTS, sampling_responder())
    assert path.read_bytes() == b""
    with pytest.raises(ValueError, match="has no record"):
        read_responses(path, Letters())


def test_bad_arguments_of_responder():
    for options, error, message in (
        ({"num_tokens": 0}, ValueError, "responder: num_tokens is 0"),
        ({"num_tokens": 2.0}, TypeError, "responder: num_tokens is 2.0"),
        ({"temperature": -1}, ValueError, "responder: temperature is -1"),
        ({"temperature": np.inf}, ValueError, "responder: temperature is inf"),
        ({"temperature": "a"}, TypeError, "responder: temperature is 'a'"),
    ):
        with pytest.raises(error, match=message):
            responder(MeanModel(), Letters(), **{"num_tokens": 2} | options)
    assert responder(MeanModel(), Letters(), num_tokens=2)([]) == []


def test_responder_with_x64():
    respond = responder(MeanModel(), Letters(), num_tokens=3)
    expected = respond(PROMPTS)
    with jax.enable_x64(True):
        assert respond(PROMPTS) == expected


def test_progress_goes_to_stderr(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_responses(path, PROMPTS, Stopping(shout, 2), batch_size=2, progress=True)
    write_responses(path, PROMPTS, shout, batch_size=2, progress=True)
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.replace("\r", "\n").split("\n")
    assert "batches of responses: 2/4" in lines
    assert lines[-2].rstrip() == "batches of responses: 4/4"


def test_rows_of_tokens(tmp_path):
    path = tmp_path / "data.jsonl"
    write_responses(path, ["ab", "c"], lambda prompts: ["d", "efg"])
    with open(path, "a") as file:
        file.write('{"index": 2, "pro')
    tokens, mask = read_responses(path, Letters(), stop_token=1, length=6)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[2, 3, 5, 1, 0, 0], [4, 6, 7, 8, 1, 0]]
    assert mask.astype(int).tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]]
    tokens, mask = read_responses(path, Letters(), pad_token=9)
    assert tokens.tolist() == [[2, 3, 5, 9], [4, 6, 7, 8]]
    with pytest.raises(ValueError, match="prompt 1 and its response have 4 tokens"):
        read_responses(path, Letters(), length=3)
