"""Writes a GGUF file from the parts of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.files import NewFile, NewTensor, remove_leftovers, write_gguf
from jaxq.io import layouts
from jaxq.io.checkpoint._gguf import SUFFIX, TOKENIZER, is_gguf
from jaxq.io.checkpoint._gguf_names import (
    architecture_of,
    gguf_name,
    is_router,
    metadata_of,
    row_order,
)
from jaxq.io.checkpoint._parts import CheckpointParts
from jaxq.qtensor import QTensor

_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# The types of tokens of llama.cpp.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def export_gguf(
    parts: CheckpointParts, path: Path, config: Mapping[str, Any], caller: str
) -> None:
    """Writes a GGUF file.

    Args:
      parts: the checkpoint.
      path: the file, whose name ends with ".gguf".
      config: the Hugging Face config.
      caller: the name that error messages begin with.

    Raises:
      ValueError: GGUF does not have the architecture, or a weight does not fit. One
        error lists all such weights.
    """
    if not is_gguf(path):
        raise ValueError(f'{caller}: {path} must end with "{SUFFIX}", a file of GGUF.')
    try:
        architecture = architecture_of(config)
    except ValueError as error:
        raise ValueError(f"{caller}: format='gguf': {error}.") from error
    tensors = _tensors(parts, architecture, config, caller)
    metadata = metadata_of(config, architecture)
    metadata |= _tokenizer(parts.files.get("tokenizer.json"), config)
    remove_leftovers(path.parent, path.name)
    with NewFile(path, caller) as file:
        write_gguf(file, metadata, tensors)


def _tensors(
    parts: CheckpointParts, architecture: str, config: Mapping[str, Any], caller: str
) -> dict[str, NewTensor]:
    """The tensors of the file by name. Experts of a layer are stacked.

    Raises:
      ValueError: a tensor of the file cannot hold a parameter. One error lists them.
    """
    tensors: dict[str, NewTensor] = {}
    stacks: dict[str, dict[int, NewTensor]] = {}
    problems = []
    for name in parts.names:
        try:
            target = gguf_name(name, config["model_type"])
            if target is None:
                raise ValueError(f"the architecture {architecture} does not have it")
            tensor_name, expert = target
            tensor = _tensor(parts, name, tensor_name, architecture, config)
            if expert is None:
                tensors[tensor_name] = tensor
                continue
            experts = stacks.setdefault(tensor_name, {})
            _check_same_kind(tensor, next(iter(experts.values()), tensor))
            experts[expert] = tensor
            tensors[tensor_name] = tensor  # the stack takes this place below
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{caller}: format='gguf' cannot hold these weights:\n{lines}")
    return tensors | {name: _stack(experts) for name, experts in stacks.items()}


def _check_same_kind(tensor: NewTensor, other: NewTensor) -> None:
    """Raises a ValueError if two experts have different types or shapes."""
    if (tensor.type, tensor.shape) != (other.type, other.shape):
        raise ValueError(
            f"it is {tensor.type}{list(tensor.shape)}, and another expert of its layer "
            f"is {other.type}{list(other.shape)}"
        )


def _stack(experts: Mapping[int, NewTensor]) -> NewTensor:
    """The tensor of all experts of a layer, in the order of their numbers."""
    in_order = [experts[number] for number in sorted(experts)]

    def read() -> np.ndarray:
        return np.stack([tensor.read() for tensor in in_order])

    return NewTensor(in_order[0].type, (len(in_order), *in_order[0].shape), read)


def _tensor(
    parts: CheckpointParts,
    name: str,
    target: str,
    architecture: str,
    config: Mapping[str, Any],
) -> NewTensor:
    """A tensor of the file. Its numbers are computed when they are written.

    Args:
      parts: the checkpoint.
      name: of the parameter.
      target: the name of the tensor in the file.
      architecture: of the file.
      config: of Hugging Face.
    """
    value = parts.read(name)
    shape = tuple(value.shape)
    kind = _kind(value, target)

    def read() -> np.ndarray:
        value = parts.read(name)
        if isinstance(value, QTensor):
            arrays, _ = layouts.get("gguf").from_qtensor(value.swapaxes(-1, -2))
            array = np.asarray(arrays["weight"])
        else:
            array = np.asarray(value)
            if kind == "F32":
                array = array.astype(np.float32)
        order = row_order(name, architecture, config, shape[0]) if shape else None
        return array if order is None else array[np.argsort(order)]

    return NewTensor(kind, shape, read)


def _kind(value: Any, target: str) -> str:
    """The type of the tensor `target` that holds a parameter."""
    if isinstance(value, QTensor):
        if value.meta.activation is not None:
            raise ValueError("it quantizes its inputs, and GGUF cannot say so")
        _, settings = layouts.get("gguf").from_qtensor(value.swapaxes(-1, -2))
        return settings["type"]
    dtype = np.dtype(value.dtype).name
    if dtype not in _FLOATS:
        raise ValueError(f"it is {dtype}, expected one of {', '.join(_FLOATS)}")
    # llama.cpp computes norms, biases and routers in float32.
    return "F32" if value.ndim < 2 or is_router(target) else _FLOATS[dtype]


def _tokenizer(text: str | bytes | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a tokenizer.

    `tokenizer.json` is written as it is. A byte-level BPE like that of GPT-2 is also
    written in the form that llama.cpp reads.
    """
    if text is None:
        return {}
    text = text.decode() if isinstance(text, bytes) else text
    values: dict[str, Any] = {TOKENIZER: text}
    entries = json.loads(text)
    model, before = entries.get("model") or {}, entries.get("pre_tokenizer") or {}
    is_gpt2 = model.get("type") == "BPE" and before.get("type") == "ByteLevel"
    if not is_gpt2 or not before.get("use_regex", True):
        return values
    tokens = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, _NORMAL)
    for added in entries.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added.get("special") else _USER_DEFINED
    if sorted(tokens) != list(range(len(tokens))):
        return values
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in model["merges"]
    ]
    values |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [tokens[i] for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [kinds[i] for i in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
    }
    for name in ("bos_token_id", "eos_token_id"):
        if isinstance(config.get(name), int):
            values[f"tokenizer.ggml.{name}"] = config[name]
    return values
