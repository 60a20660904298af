"""The parameters of a GGUF file, under the names of Hugging Face."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.files import GgufFile
from jaxq.io import layouts
from jaxq.io.checkpoint._gguf_names import config_of, hf_name, row_order
from jaxq.io.checkpoint._parameter import Parameter, StoredTensor

SUFFIX = ".gguf"
# The text of tokenizer.json, which the format has a name for.
TOKENIZER = "tokenizer.huggingface.json"


def is_gguf(path: Path) -> bool:
    """Whether a path has the suffix of a GGUF file."""
    return path.suffix.lower() == SUFFIX


def read_gguf(
    file: GgufFile, caller: str
) -> tuple[dict[str, Any], dict[str, Parameter]]:
    """The Hugging Face config of an open file, and its parameters by name.

    Raises:
      ValueError: the architecture is unknown, a value is missing, or two tensors have
        one name. The error names the file.
    """
    shapes = {name: header.shape for name, header in file.headers.items()}
    try:
        config, architecture = config_of(file.metadata, shapes)
        parameters: dict[str, Parameter] = {}
        for name in file.headers:
            for parameter in _parameters(file, name, architecture, config):
                if parameter.name in parameters:
                    raise ValueError(f"two tensors are {parameter.name}")
                parameters[parameter.name] = parameter
    except ValueError as error:
        raise ValueError(f"{caller}: {file.path}: {error}.") from error
    return config, parameters


def _parameters(
    file: GgufFile, name: str, architecture: str, config: Mapping[str, Any]
) -> Iterator[Parameter]:
    """The parameters that a tensor holds: one, or one for each expert.

    Raises:
      ValueError: a stack does not have the experts of the config.
    """
    target = hf_name(name, config["model_type"])
    if "{}" not in target:
        yield _parameter(file, name, target, architecture, config)
        return
    shape, num_experts = file.headers[name].shape, config["num_local_experts"]
    if len(shape) < 2 or shape[0] != num_experts:
        raise ValueError(
            f"{name} has the shape {list(shape)}, expected {num_experts} experts"
        )
    for expert in range(num_experts):
        hf = target.format(expert)
        yield _parameter(file, name, hf, architecture, config, expert=expert)


def _parameter(
    file: GgufFile,
    name: str,
    target: str,
    architecture: str,
    config: Mapping[str, Any],
    *,
    expert: int | None = None,
) -> Parameter:
    """A parameter of a file.

    Args:
      file: open.
      name: of the tensor in the file.
      target: the name of the parameter.
      architecture: of the file.
      config: of Hugging Face.
      expert: the number of the expert; None if the tensor is no stack of experts.
    """
    header = file.headers[name]
    shape = header.array_shape if expert is None else header.array_shape[1:]
    order = None
    if shape:
        order = row_order(target, architecture, config, shape[0])
    read = functools.partial(file.read, name, expert)
    if order is not None:
        read = functools.partial(_read_rows, file, name, order)
    tensor = StoredTensor(file.path, name, shape, header.dtype, read)
    is_quantized = header.array_shape != header.shape
    return Parameter(
        target,
        {"weight": tensor},
        layouts.get("gguf") if is_quantized else None,
        {"type": header.type} if is_quantized else {},
    )


def _read_rows(file: GgufFile, name: str, order: np.ndarray) -> np.ndarray:
    return file.read(name)[order]
