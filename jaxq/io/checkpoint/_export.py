"""`export`: a quantized model as a checkpoint of another library."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxq.files import CONFIG, INDEX, SINGLE, Weights, naming_errors, write_directory
from jaxq.io.checkpoint._gguf_export import export_gguf
from jaxq.io.checkpoint._parts import CheckpointParts, is_table, parts_of
from jaxq.io.checkpoint._targets import (
    Target,
    WeightSettings,
    layout_for,
    target,
)
from jaxq.io.layouts import Layout
from jaxq.qtensor import QTensor, dequantize

_CALLER = "jaxq.io.export"
_WEIGHT = ".weight"
_SHARD_BYTES = 5 * 10**9


class _Entry(NamedTuple):
    """The tensors of one parameter, without their numbers.

    Attributes:
      sizes: the number of bytes of each tensor by name.
      module: the path of the module; empty if the weight is not quantized.
      settings: of the quantized weight; None otherwise.
      is_matrix: whether the parameter is a float matrix.
    """

    sizes: Mapping[str, int]
    module: str = ""
    settings: WeightSettings | None = None
    is_matrix: bool = False


def export(
    model: Any,
    path: str | os.PathLike[str],
    *,
    format: str,
    tokenizer: Any = None,
    shard_bytes: int = _SHARD_BYTES,
    **config: Any,
) -> None:
    """Writes a quantized model as a checkpoint that another library reads.

    Codes and scales are written as they are. So the QTensors must be of a spec that the
    format can hold: `jaxq.io.layouts.get(...).spec` returns one.

    If the write fails, the old files stay as they were. If the process is killed while
    the new files take their places, the directory has no `config.json`, and no library
    reads it.

    Args:
      model: a model of `jaxq.models`, or an open checkpoint of
        `jaxq.io.read_checkpoint`.
      path: the directory. It is made if it does not exist. For "gguf", the file, whose
        name ends with ".gguf".
      format: "awq", "bitsandbytes", "compressed-tensors", "fp8" (in blocks), "gguf",
        "gptq", "modelopt" (NVFP4) or "mxfp4" (only the stacks of experts of an open
        checkpoint); or "hf" for floats, where QTensors are dequantized.
      tokenizer: a `tokenizers.Tokenizer`, or None. The files of the tokenizer of a
        checkpoint are copied.
      shard_bytes: a weight file has at most so many bytes, or one parameter.
      **config: more entries of `config.json`, such as `eos_token_id=0`.

    Raises:
      TypeError: `export` does not know the class of the model.
      ValueError: the format is unknown; or weights do not fit the format. One error
        lists all of them. Nothing is written then.
      OSError: the directory cannot be made, or a file cannot be written.

    Example:
      >>> import os, jax.numpy as jnp, numpy as np, jaxq
      >>> from safetensors.numpy import save_file
      >>> os.makedirs("floats", exist_ok=True)
      >>> save_file({"up.weight": np.ones((64, 32), np.float32)},
      ...   "floats/model.safetensors")
      >>> with open("floats/config.json", "w") as file:
      ...   size = file.write("{}")
      >>> with jaxq.io.read_checkpoint("floats") as checkpoint:
      ...   jaxq.io.export(checkpoint, "copy", format="hf")
      >>> sorted(os.listdir("copy"))
      ['config.json', 'model.safetensors']
    """
    parts = parts_of(model, _CALLER)
    files = dict(parts.files) | _tokenizer_files(tokenizer)
    parts = dataclasses.replace(parts, files=files)
    path = Path(path)
    if format == "gguf":
        export_gguf(parts, path, dict(parts.config) | config, _CALLER)
        return
    is_float = format == "hf"
    kind = None if is_float else target(format, _CALLER)
    entries = _entries(parts, kind, format)
    groups = shards(
        {name: sum(e.sizes.values()) for name, e in entries.items()}, shard_bytes
    )
    entries_json = dict(parts.config) | config
    entries_json.pop("quantization_config", None)
    if kind is not None:
        entries_json["quantization_config"] = quantization_config(entries, kind, format)
    texts = dict(parts.files)
    texts[CONFIG] = json_text(entries_json)
    names = shard_names(len(groups))
    if len(groups) > 1:
        texts[INDEX] = index_text(
            {
                file: {k: v for name in group for k, v in entries[name].sizes.items()}
                for file, group in zip(names, groups, strict=True)
            }
        )
    weights = {
        file: _weights_of(parts, group, kind)
        for file, group in zip(names, groups, strict=True)
    }
    with naming_errors(path, _CALLER, "the directory cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
        write_directory(path, weights, texts, _CALLER)


def _weights_of(
    parts: CheckpointParts, group: list[str], kind: Target | None
) -> Weights:
    """Computes the tensors of a weight file."""

    def tensors() -> dict[str, np.ndarray]:
        out: dict[str, np.ndarray] = {}
        for name in group:
            out |= tensors_of(name, parts.read(name), kind)[0]
        return out

    return tensors


# The arrays and the settings of a layout for a QTensor `[in, out]`.
Convert = Callable[[Layout, QTensor], tuple[dict[str, Any], dict[str, Any]]]


def from_qtensor(layout: Layout, qt: QTensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `Layout.from_qtensor`."""
    return layout.from_qtensor(qt)


def tensors_of(
    name: str, value: Any, kind: Target | None, convert: Convert = from_qtensor
) -> tuple[dict[str, np.ndarray], WeightSettings | None]:
    """The tensors of a parameter by name, and the settings of a quantized weight.

    Args:
      name: of the parameter.
      value: an array, or a QTensor `[out, in]`.
      kind: the format; None writes floats.
      convert: computes the arrays of the layout.

    Raises:
      ValueError: the format cannot hold the weight.
    """
    if not isinstance(value, QTensor):
        return {name: np.asarray(value)}, None
    if kind is None:
        return {name: np.asarray(dequantize(value))}, None
    if kind.has_stacks:
        return _tensors_of_stack(name, value, kind, convert)
    if not name.endswith(_WEIGHT):
        raise ValueError("the format only has weights of linear layers")
    if is_table(name):
        raise ValueError(
            "the format only has weights of linear layers, and this is an embedding "
            "table. Leave it in floats"
        )
    inputs = kind.inputs(value)
    layout = layout_for(value, kind.layouts)
    arrays, settings = convert(layout, value.swapaxes(-1, -2))
    module = name.removesuffix(_WEIGHT)
    tensors = {f"{module}.{key}": np.asarray(array) for key, array in arrays.items()}
    return tensors, WeightSettings(settings, inputs)


def _tensors_of_stack(
    name: str, value: QTensor, kind: Target, convert: Convert
) -> tuple[dict[str, np.ndarray], WeightSettings]:
    """`tensors_of` a stack of experts `[*experts, in, out]`."""
    if name.endswith(_WEIGHT):
        raise ValueError(
            "the format only has stacks of experts. Leave other weights in floats"
        )
    inputs = kind.inputs(value)
    arrays, settings = convert(layout_for(value, kind.layouts), value)
    tensors = {f"{name}_{key}": np.asarray(array) for key, array in arrays.items()}
    return tensors, WeightSettings(settings, inputs)


def _entries(
    parts: CheckpointParts, kind: Target | None, format: str
) -> dict[str, _Entry]:
    """What will be written for each parameter.

    Every weight is converted once for this, so that all errors come before the first
    file is written. The arrays are not kept.
    """
    entries, problems = {}, []
    for name in parts.names:
        value = parts.read(name)
        try:
            entries[name] = entry_of(name, value, kind)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(
            f"{_CALLER}: format={format!r} cannot hold these weights:\n{lines}"
        )
    if kind is not None and not any(entry.settings for entry in entries.values()):
        raise ValueError(
            f"{_CALLER}: no weight is quantized, so format={format!r} has nothing to "
            'hold. Use format="hf" for floats.'
        )
    return entries


def entry_of(name: str, value: Any, kind: Target | None) -> _Entry:
    """What is written for a parameter."""
    tensors, settings = tensors_of(name, value, kind)
    sizes = {key: array.nbytes for key, array in tensors.items()}
    if settings is None:
        is_matrix = np.ndim(value) == 2 and name.endswith(_WEIGHT)
        module = name.removesuffix(_WEIGHT) if is_matrix else ""
        return _Entry(sizes, module, None, is_matrix)
    return _Entry(sizes, name.removesuffix(_WEIGHT), settings)


def quantization_config(
    entries: Mapping[str, _Entry], kind: Target, format: str
) -> dict[str, Any]:
    """The `quantization_config` of all weights.

    Raises:
      ValueError: the format has one setting for all weights, and they differ.
    """
    modules = {e.module: e.settings for e in entries.values() if e.settings is not None}
    floats = [entry.module for entry in entries.values() if entry.is_matrix]
    return combined_config(modules, floats, kind, format)


def combined_config(
    modules: Mapping[str, WeightSettings], floats: list[str], kind: Target, format: str
) -> dict[str, Any]:
    """The `quantization_config` of quantized modules.

    Args:
      modules: the settings of each quantized module by its path.
      floats: the paths of modules with a float matrix.
      kind: the format.
      format: its name, for errors.

    Raises:
      ValueError: the format has one setting for all weights, and they differ.
    """
    layers = [module for module in floats if not is_table(f"{module}{_WEIGHT}")]
    try:
        return kind.combine(modules, layers)
    except ValueError as error:
        raise ValueError(f"{_CALLER}: format={format!r}: {error}") from error


def shards(sizes: Mapping[str, int], most_bytes: int) -> list[list[str]]:
    """Groups of neighbouring parameters with at most so many bytes, or one parameter.

    Args:
      sizes: the number of bytes of each parameter by name.
      most_bytes: of a group.
    """
    groups: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room or not groups:
            groups.append([])
            room = most_bytes
        groups[-1].append(name)
        room -= size
    return groups


def shard_names(count: int) -> list[str]:
    """The names of the weight files."""
    if count == 1:
        return [SINGLE]
    return [
        f"model-{number:05d}-of-{count:05d}.safetensors"
        for number in range(1, count + 1)
    ]


def index_text(sizes: Mapping[str, Mapping[str, int]]) -> str:
    """The text of `model.safetensors.index.json`.

    Args:
      sizes: the number of bytes of each tensor, by weight file and by name.
    """
    total = sum(size for tensors in sizes.values() for size in tensors.values())
    files = {name: file for file, tensors in sizes.items() for name in tensors}
    return json_text({"metadata": {"total_size": total}, "weight_map": files})


def json_text(entries: Mapping[str, Any]) -> str:
    """The text of a JSON file."""
    return json.dumps(entries, indent=2, sort_keys=True) + "\n"


def _tokenizer_files(tokenizer: Any) -> dict[str, str]:
    if tokenizer is None:
        return {}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json_text(settings),
    }
