"""The parameters of a Hugging Face directory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxq.files import (
    CONFIG,
    DTYPES,
    TensorFile,
    is_file,
    open_weights,
    parse_json,
    read_text,
    require_file,
)
from jaxq.io.checkpoint._parameter import Parameter, StoredTensor
from jaxq.io.checkpoint._schemes import Scheme, scheme_of

# ModelOpt wrote its settings here before it wrote them to config.json.
_MODELOPT_CONFIG = "hf_quant_config.json"


def read_config(path: Path, caller: str) -> dict[str, Any]:
    """The config of a directory, with its `quantization_config` if it has one.

    Raises:
      FileNotFoundError: there is no `config.json`.
      ValueError: a file is not a JSON object.
    """
    config = _json_object(require_file(path, CONFIG, caller), caller)
    if not config.get("quantization_config"):
        config.pop("quantization_config", None)
        if is_file(path / _MODELOPT_CONFIG, caller):
            entries = _json_object(path / _MODELOPT_CONFIG, caller)
            settings = entries.get("quantization")
            if not isinstance(settings, Mapping):
                raise ValueError(
                    f"{caller}: {path / _MODELOPT_CONFIG}: quantization must be an "
                    "object."
                )
            config["quantization_config"] = {"quant_method": "modelopt", **settings}
    return config


def is_quantized(path: Path, caller: str) -> bool:
    """Whether a directory has quantized weights of another library.

    Raises:
      FileNotFoundError: there is no `config.json`.
      ValueError: a file is not a JSON object.
    """
    return "quantization_config" in read_config(path, caller)


def read_parameters(
    path: Path,
    config: Mapping[str, Any],
    stack: contextlib.ExitStack,
    caller: str,
    *,
    verify: bool,
) -> dict[str, Parameter]:
    """Opens the weight files of a directory, and returns its parameters by name.

    Args:
      path: the directory.
      config: as `read_config` returned it.
      stack: closes the files.
      caller: the name that error messages begin with.
      verify: compare the checksums of files that have them.

    Raises:
      ValueError: as `open_weights` and `scheme_of`; or a tensor of a quantized weight
        is missing.
    """
    files = open_weights(path, stack, caller, verify=verify)
    if "quantization_config" not in config:
        return {name: _float(files[name], name, caller) for name in files}
    try:
        scheme = scheme_of(config["quantization_config"])
        modules = _modules(files, scheme)
        parameters = {}
        quantized_names = set()
        for module in modules:
            parameter = _quantized(files, scheme, module, caller)
            parameters[parameter.name] = parameter
            quantized_names |= {tensor.name for tensor in parameter.tensors.values()}
            quantized_names |= {f"{module}.{name}" for name in scheme.ignored}
        rest = [name for name in files if name not in quantized_names]
        _check_rest(rest, files, scheme, modules)
        if not modules:
            raise ValueError(
                f"quantization_config in {CONFIG} says {scheme.layout.name}, but no "
                f"tensor is named *{scheme.separator}{scheme.marker}. If the weights "
                "are floats, remove quantization_config."
            )
    except ValueError as error:
        text = str(error)
        if text.startswith(f"{caller}: "):
            raise
        raise ValueError(f"{caller}: {path}: {text}") from error
    return parameters | {name: _float(files[name], name, caller) for name in rest}


def _json_object(path: Path, caller: str) -> dict[str, Any]:
    text = read_text(path, caller)
    try:
        value = parse_json(path, text)
    except ValueError as error:
        raise ValueError(f"{caller}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{caller}: {path} is not a JSON object.")
    return value


def _float(file: TensorFile, name: str, caller: str) -> Parameter:
    """A parameter that is one tensor of a file."""
    return Parameter(name, {"weight": _stored(file, name, caller)})


def _stored(file: TensorFile, name: str, caller: str) -> StoredTensor:
    header = file.headers[name]
    if header.dtype not in DTYPES:
        raise ValueError(
            f"{caller}: {file.path}: {name} holds {header.dtype}, which jaxq does not "
            "read."
        )
    return StoredTensor(
        file.path,
        name,
        header.shape,
        DTYPES[header.dtype],
        functools.partial(file.read, name),
        functools.partial(file.read_rows, name),
    )


def _modules(files: Mapping[str, TensorFile], scheme: Scheme) -> list[str]:
    """The paths of the modules with a quantized weight."""
    end = scheme.separator + scheme.marker
    return [
        name.removesuffix(end)
        for name in files
        if name.endswith(end) and len(name) > len(end)
    ]


def _quantized(
    files: Mapping[str, TensorFile], scheme: Scheme, module: str, caller: str
) -> Parameter:
    """The quantized weight of a module."""
    settings = scheme.settings(module)
    marker = f"{module}{scheme.separator}{scheme.marker}"
    if settings is None:
        raise ValueError(
            f"{files[marker].path}: {marker} is there, but the settings leave {module} "
            "in floats."
        )
    names = {
        array: f"{module}{scheme.separator}{array}" for array in scheme.layout.tensors
    }
    tensors = {
        array: _stored(files[name], name, caller)
        for array, name in names.items()
        if name in files
    }
    return Parameter(
        f"{module}{scheme.weight}",
        tensors,
        scheme.layout,
        settings,
        scheme.swaps_axes,
        scheme.inputs(module),
    )


def _check_rest(
    rest: list[str], files: Mapping[str, TensorFile], scheme: Scheme, modules: list[str]
) -> None:
    """Raises if a tensor belongs to a quantized weight whose marker is missing."""
    known = set(modules)
    for name in rest:
        for array in scheme.layout.tensors:
            end = scheme.separator + array
            module = name.removesuffix(end)
            # A float weight has the name "weight" too.
            if array == "weight" or not name.endswith(end) or module in known:
                continue
            raise ValueError(
                f"{files[name].path}: {name} belongs to a quantized weight, and "
                f"{module}{scheme.separator}{scheme.marker} is missing."
            )
