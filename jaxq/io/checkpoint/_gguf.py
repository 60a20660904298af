"""The parameters of a GGUF file, under the names of Hugging Face."""

from __future__ import annotations

import functools
from collections.abc import Mapping
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
            parameter = _parameter(file, name, architecture, config)
            if parameter.name in parameters:
                raise ValueError(f"two tensors are {parameter.name}")
            parameters[parameter.name] = parameter
    except ValueError as error:
        raise ValueError(f"{caller}: {file.path}: {error}.") from error
    return config, parameters


def _parameter(
    file: GgufFile, name: str, architecture: str, config: Mapping[str, Any]
) -> Parameter:
    header = file.headers[name]
    shape = header.array_shape
    target = hf_name(name)
    order = None
    if shape:
        order = row_order(target, architecture, config, shape[0])
    read = functools.partial(file.read, name)
    if order is not None:
        read = functools.partial(_read_rows, file, name, order)
    tensor = StoredTensor(file.path, name, shape, header.dtype, read)
    is_quantized = shape != header.shape
    return Parameter(
        target,
        {"weight": tensor},
        layouts.get("gguf") if is_quantized else None,
        {"type": header.type} if is_quantized else {},
    )


def _read_rows(file: GgufFile, name: str, order: np.ndarray) -> np.ndarray:
    return file.read(name)[order]
