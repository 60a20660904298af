"""Data that a teacher writes: prompts and responses in a JSONL file.

Each line is `{"index": 3, "prompt": "...", "response": ...}`. A run that was killed can
leave an incomplete last line. The next run removes this line and continues.

References:
  Kim and Rush, Sequence-Level Knowledge Distillation, 2016.
  Hsieh et al., Distilling Step-by-Step, 2023.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.distillation._arguments import whole_number
from jaxq.distillation._generate import (
    checked_temperature,
    generate,
    response_mask,
)
from jaxq.progress import with_progress

_LONE_SURROGATE = (
    "has a lone surrogate, half of a character, which UTF-8 does not have. Remove it "
    'with text.encode("utf-8", "replace").decode().'
)


def responder(
    teacher: Any,
    tokenizer: Any,
    *,
    num_tokens: int,
    temperature: float = 0.0,
    stop_token: int | None = None,
) -> Callable[..., list[str]]:
    """A function that answers prompts with a language model.

    The prompts of a call are padded to the same length. This length is a power of two,
    so that only few programs are compiled.

    Args:
      teacher: a causal model, as in `generate`.
      tokenizer: `encode(text)` returns token ids, or an object with the token ids in
        its attribute `ids`. `decode(ids)` returns text.
      num_tokens: the largest number of tokens of a response.
      temperature: 0 takes the most probable token. Above 0, the function needs a key.
      stop_token: ends a response. It is not part of the text.

    Returns:
      `respond(prompts, key=None)`. It maps a list of strings to a list of strings.

    Raises:
      TypeError: `num_tokens` is not an integer, or the temperature is not one number.
      ValueError: `num_tokens` is below 1; the temperature is negative or not finite.
        `respond` raises ValueError if a prompt has no token or a key is missing.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> class Letters:
      ...     def encode(self, text):
      ...         return [ord(letter) - ord("a") for letter in text]
      ...     def decode(self, ids):
      ...         return "".join(chr(i + ord("a")) for i in ids)
      >>> next_letter = jnp.roll(jnp.eye(26), 1, axis=1)
      >>> teacher = lambda tokens: next_letter[tokens]
      >>> respond = jaxq.distillation.responder(teacher, Letters(), num_tokens=3)
      >>> respond(["abc", "x"])
      ['def', 'yza']
    """

    num_tokens = whole_number(num_tokens, "num_tokens", "responder")
    temperature = checked_temperature(temperature, "responder")

    def respond(prompts: Sequence[str], key: jax.Array | None = None) -> list[str]:
        if not prompts:
            return []
        encoded = [_encode(tokenizer, prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, encoded, strict=True):
            if not ids:
                raise ValueError(
                    f"responder: the prompt {prompt!r} has no token. Put a start token "
                    "in front of every prompt."
                )
        longest = max(len(ids) for ids in encoded)
        width = 1 << (longest - 1).bit_length()  # the next power of two
        tokens, mask = generate(
            teacher,
            _padded(encoded, width, 0),
            num_tokens,
            lengths=jnp.asarray([len(ids) for ids in encoded], jnp.int32),
            key=key,
            temperature=temperature,
            stop_token=stop_token,
        )
        rows = zip(np.asarray(tokens), np.asarray(mask), strict=True)
        responses = (row[is_response].tolist() for row, is_response in rows)
        return [
            tokenizer.decode([token for token in ids if token != stop_token])
            for ids in responses
        ]

    return respond


def write_responses(
    path: str | os.PathLike[str],
    prompts: Iterable[str],
    respond: Callable[..., Sequence[Any]],
    *,
    filters: Sequence[Callable[[dict[str, Any]], bool]] = (),
    unique: Callable[[dict[str, Any]], Hashable] | None = None,
    batch_size: int = 8,
    key: jax.Array | None = None,
    progress: bool | None = None,
) -> dict[str, int]:
    """Answers prompts, and writes each answer to a JSONL file.

    If a run was stopped, the same call continues it. If `respond` and the filters are
    pure functions, the final file is the same as without the interruption.

    A record is `{"index": int, "prompt": str, "response": ...}`.

    Args:
      path: the file. Its folder must exist.
      prompts: strings. All of them are read at the start.
      respond: maps a list of prompts to a list of responses of the same length. A
        response is anything that JSON has, or an array: text, a label, the logits of a
        classifier. `responder` makes such a function from a language model.
      filters: functions that take a record and return whether to keep it. A record is
        written if all filters return True.
      unique: a function that takes a record and returns a hashable value, for example
        `lambda record: record["response"]`. If several records pass the filters and
        have the same value, only the first one is written.
      batch_size: the number of prompts in one call of `respond`.
      key: PRNG key. If it is given, `respond` is called as `respond(prompts, key)`,
        with another key for each batch. This key depends only on `key` and the number
        of the batch.
      progress: show a progress line. None shows the line if stderr is a terminal.

    Returns:
      Counts: "written" (lines in the file), "filtered" and "duplicates" (records of
      this run that were not written), "resumed" (lines of earlier runs).

    Raises:
      TypeError: `prompts` is a single string, or a prompt is not a string; `respond`
        returned no list, or something that JSON does not have.
      FileNotFoundError: the folder does not exist.
      ValueError: the file was written for other prompts, or is damaged before its last
        line; `respond` returned another number of responses, or a NaN; a prompt or a
        response has a lone surrogate, which UTF-8 does not have.

    Example:
      >>> import pathlib, tempfile, jaxq
      >>> path = pathlib.Path(tempfile.mkdtemp(), "data.jsonl")
      >>> shout = lambda prompts: [prompt.upper() for prompt in prompts]
      >>> short = lambda record: len(record["response"]) <= 3
      >>> counts = jaxq.distillation.write_responses(
      ...     path, ["yes", "maybe", "yes"], shout, filters=[short],
      ...     unique=lambda record: record["response"])
      >>> counts
      {'written': 1, 'filtered': 1, 'duplicates': 1, 'resumed': 0}
      >>> print(path.read_text(), end="")
      {"index": 0, "prompt": "yes", "response": "YES"}
    """
    caller = "write_responses"
    prompts = _checked_prompts(prompts, caller)
    batch_size = whole_number(batch_size, "batch_size", caller)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{caller}: the folder {path.parent} does not exist. Create it first."
        )
    old_records = _resume(path, prompts, caller)
    known = set() if unique is None else {unique(record) for record in old_records}
    first = old_records[-1]["index"] + 1 if old_records else 0
    num_batches = -(-len(prompts) // batch_size)
    first_batch = first // batch_size
    counts = {
        "written": len(old_records),
        "filtered": 0,
        "duplicates": 0,
        "resumed": len(old_records),
    }
    numbers = range(first_batch, num_batches)
    with open(path, "ab") as file:
        for number in with_progress(
            numbers, "batches of responses", progress, start=first_batch
        ):
            records = _answer(prompts, number, batch_size, respond, key, caller)
            lines = []
            for record in records:
                if record["index"] < first:
                    continue
                if not all(keep(record) for keep in filters):
                    counts["filtered"] += 1
                    continue
                if unique is not None:
                    identity = unique(record)
                    if identity in known:
                        counts["duplicates"] += 1
                        continue
                    known.add(identity)
                lines.append(_line(record, caller))
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            counts["written"] += len(lines)
    return counts


def read_responses(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    length: int | None = None,
    stop_token: int | None = None,
    pad_token: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Reads text that `write_responses` wrote, as token rows for training.

    Args:
      path: the JSONL file. An incomplete last line is not read.
      tokenizer: as in `responder`. Prompt and response are encoded separately.
      length: t, the width of the rows. None takes the length of the longest row.
      stop_token: is appended to each response, so that the student learns to stop.
      pad_token: fills the rows.

    Returns:
      tokens: int32 [n, t], prompt and response of each record.
      mask: bool [n, t], True for the tokens of the response.

    Raises:
      TypeError: a response is not text. Read such a file with `json.loads`.
      ValueError: the file has no record, or a damaged line, or a row is longer than
        `length`.

    Example:
      >>> import os, tempfile, jaxq
      >>> class Bytes:
      ...     def encode(self, text):
      ...         return list(text.encode())
      ...     def decode(self, ids):
      ...         return bytes(ids).decode()
      >>> path = os.path.join(tempfile.mkdtemp(), "data.jsonl")
      >>> _ = jaxq.distillation.write_responses(path, ["ab"], lambda prompts: ["c"])
      >>> tokens, mask = jaxq.distillation.read_responses(path, Bytes(), stop_token=1)
      >>> tokens.tolist(), mask.tolist()
      ([[97, 98, 99, 1]], [[False, False, True, True]])
    """
    caller = "read_responses"
    whole_lines, _, _ = Path(path).read_bytes().rpartition(b"\n")
    records = _parse(whole_lines, Path(path), caller)
    if not records:
        raise ValueError(f"{caller}: {path} has no record.")
    rows, prompt_lengths = [], []
    end = [] if stop_token is None else [stop_token]
    for record in records:
        if not isinstance(record["response"], str):
            raise TypeError(
                f"{caller}: the response to prompt {record['index']} is a "
                f"{type(record['response']).__name__}, not text. Read the file with "
                "json.loads, line by line."
            )
        prompt = _encode(tokenizer, record["prompt"])
        rows.append([*prompt, *_encode(tokenizer, record["response"]), *end])
        prompt_lengths.append(len(prompt))
    lengths = [len(row) for row in rows]
    longest = int(np.argmax(lengths))
    if length is not None and lengths[longest] > length:
        raise ValueError(
            f"{caller}: the prompt {records[longest]['index']} and its response have "
            f"{lengths[longest]} tokens, more than length={length}. Pass "
            f"length={lengths[longest]}, or exclude long records by a filter of "
            "write_responses."
        )
    tokens = _padded(rows, length or lengths[longest], pad_token)
    mask = response_mask(
        tokens, jnp.asarray(prompt_lengths), lengths=jnp.asarray(lengths)
    )
    return tokens, np.asarray(mask)


def _answer(
    prompts: list[str],
    number: int,
    batch_size: int,
    respond: Callable[..., Sequence[Any]],
    key: jax.Array | None,
    caller: str,
) -> list[dict[str, Any]]:
    """The records of a batch."""
    start = number * batch_size
    batch = prompts[start : start + batch_size]
    keys = () if key is None else (jax.random.fold_in(key, number),)
    responses = respond(batch, *keys)
    expected = "It must return a list with one response for each prompt."
    if not _is_list(responses):
        raise TypeError(
            f"{caller}: respond returned {_kind(responses)} for {len(batch)} prompts. "
            f"{expected}"
        )
    if len(responses) != len(batch):
        raise ValueError(
            f"{caller}: respond returned {len(responses)} responses for {len(batch)} "
            f"prompts. {expected}"
        )
    return [
        {"index": start + i, "prompt": prompt, "response": response}
        for i, (prompt, response) in enumerate(zip(batch, responses, strict=True))
    ]


def _is_list(responses: Any) -> bool:
    """Whether this is a list, a tuple or an array of responses."""
    if isinstance(responses, jax.Array | np.ndarray):
        return responses.ndim > 0
    return hasattr(responses, "__len__") and not isinstance(
        responses, str | bytes | Mapping | Set
    )


def _kind(responses: Any) -> str:
    if responses is None:
        return "None"
    if isinstance(responses, str):
        return "one string"
    return f"a {type(responses).__name__}"


def _line(record: dict[str, Any], caller: str) -> str:
    """A record as a line of JSON. Arrays become lists."""
    try:
        text = json.dumps(
            record, ensure_ascii=False, allow_nan=False, default=_plain_value
        )
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{caller}: the response to prompt {record['index']} cannot be written: "
            f"it {_LONE_SURROGATE}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{caller}: the response to prompt {record['index']} cannot be written: "
            f"{error}. JSON has no NaN and no infinity. Check the teacher."
        ) from error
    return f"{text}\n"


def _plain_value(value: Any) -> Any:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return np.asarray(value).tolist()
    raise TypeError(
        f"write_responses: a response has a {type(value).__name__}, which JSON does not"
        " have. Return text, numbers, lists, dicts or arrays."
    )


def _resume(path: Path, prompts: list[str], caller: str) -> list[dict[str, Any]]:
    """The records of an earlier run. An incomplete last line is removed."""
    if not path.exists():
        return []
    contents = path.read_bytes()
    whole_lines, newline, half_line = contents.rpartition(b"\n")
    records = _parse(whole_lines, path, caller)
    start = b'{"index": '
    if not half_line.startswith(start[: len(half_line)]):
        raise ValueError(
            f"{caller}: {path} ends in a line that is not a record. Choose another "
            "file."
        )
    for record in records:
        index = record["index"]
        if index >= len(prompts) or prompts[index] != record["prompt"]:
            raise ValueError(
                f"{caller}: {path} was written for other prompts: its record {index} "
                f"has the prompt {record['prompt'][:40]!r}. Choose another file, or "
                "delete this one."
            )
    if half_line:
        os.truncate(path, len(whole_lines) + len(newline))
    return records


def _parse(whole_lines: bytes, path: Path, caller: str) -> list[dict[str, Any]]:
    """The records of whole lines, after a check of each line."""
    records = []
    last_index = -1
    for number, line in enumerate(whole_lines.split(b"\n"), 1):
        if not whole_lines:
            break
        try:
            record = json.loads(line)
            is_record = {"index", "prompt", "response"} <= set(record)
            is_next = is_record and record["index"] > last_index
        except (ValueError, TypeError):
            is_next = False
        if not is_next:
            raise ValueError(
                f"{caller}: line {number} of {path} is not a record with prompt, "
                "response and an index above that of the line before. Delete the line, "
                "or choose another file."
            )
        last_index = record["index"]
        records.append(record)
    return records


def _checked_prompts(prompts: Iterable[str], caller: str) -> list[str]:
    if isinstance(prompts, str):
        raise TypeError(f"{caller}: prompts is one string. Pass a list: [prompt].")
    prompts = list(prompts)
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(
                f"{caller}: prompt {number} is a {type(prompt).__name__}; expected a "
                "string."
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{caller}: prompt {number} {_LONE_SURROGATE}") from error
    return prompts


def _encode(tokenizer: Any, text: str) -> list[int]:
    encoding = tokenizer.encode(text)
    return list(getattr(encoding, "ids", encoding))


def _padded(rows: Sequence[Sequence[int]], width: int, pad_token: int) -> np.ndarray:
    tokens = np.full((len(rows), width), pad_token, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens
