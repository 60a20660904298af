"""What files hold: the tensors of a file or of a model directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import numpy as np
from flax import nnx

from jaxq import models
from jaxq.files import TensorFile, TensorHeader, parse_json, read_text
from jaxq.io import read_checkpoint
from jaxq.qtensor import QTensor, dequantize
from jaxq.serialization import read_contents

_CALLER = "inspect"
_SUFFIX = "*.safetensors"
_GGUF = ".gguf"
_OWN = "jaxq"


class Stored(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: of the tensor, or the path of the parameter.
        shape: of the tensor. A quantized weight has the shape of the float weight.
        format: the format of the codes, or the dtype.
        granularity: where scales vary. Empty for a tensor that is not quantized.
        num_bytes: in the file, with scales.
        read: reads the tensor as float32.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    granularity: str
    num_bytes: int
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bits(self) -> float:
        """Bits per element, scales included. 0 if there is no element."""
        return 8 * self.num_bytes / self.size if self.size else 0.0


def read_stored(path: Path) -> list[Stored]:
    """The tensors of a safetensors file, or of a directory with such files.

    The weights of a quantized model are read by parameter, with their scales.

    Raises:
        click.UsageError: the directory has no safetensors file.
        ValueError: a file is damaged.
    """
    by = quantization_of(path)
    if path.suffix.lower() == _GGUF or (by and by != _OWN):
        return _of_checkpoint(path)
    files = sorted(path.glob(_SUFFIX)) if path.is_dir() else [path]
    if not files:
        raise click.UsageError(
            f"{path} has no file {_SUFFIX}. Pass a safetensors file, or a directory "
            "with such files."
        )
    tensors: list[Stored] = []
    for file in files:
        tensors += _of_file(file)
    return tensors


def read_reference(path: Path, stored: list[Stored]) -> dict[str, Stored]:
    """The tensors of a reference, by the names of other tensors.

    A model that jaxq quantized has other names and axes than the files of the float
    model. Then the float model is loaded, and its parameters are compared.

    Raises:
        click.UsageError: the reference has none of these tensors.
    """
    names = {tensor.name for tensor in stored}
    reference = {tensor.name: tensor for tensor in read_stored(path)}
    if not names & set(reference) and (path / "config.json").is_file():
        model, _ = models.load(path)
        reference = {tensor.name: tensor for tensor in _of_model(model)}
    if not names & set(reference):
        raise click.UsageError(
            f"--reference {path} has no tensor of these names, such as "
            f"{next(iter(names), 'none')!r}."
        )
    return reference


def quantization_of(path: Path) -> str:
    """The library that quantized a directory, as its config.json says; or empty."""
    if path.suffix.lower() == _GGUF:
        return "GGUF"
    config = path / "config.json"
    if not config.is_file():
        return ""
    entries = parse_json(config, read_text(config, _CALLER))
    if not isinstance(entries, dict):
        raise ValueError(f"{config} is not a JSON object.")
    quantization = entries.get("quantization_config")
    if not isinstance(quantization, dict) or not quantization:
        return ""
    return str(quantization.get("quant_method", "unknown"))


def _of_file(path: Path) -> list[Stored]:
    with TensorFile(path, _CALLER) as file:
        if "jaxq" not in file.metadata:
            return [
                _of_header(path, name, header) for name, header in file.headers.items()
            ]
    contents = read_contents(path, caller=_CALLER)
    if contents.kind != "tree":
        return [_of_value(name, value) for name, value in contents.value.items()]
    leaves = jax.tree.leaves_with_path(contents.value, is_leaf=_is_qtensor)
    return [
        _of_value(jax.tree_util.keystr(key, simple=True, separator="/"), value)
        for key, value in leaves
        if hasattr(value, "dtype")
    ]


def _of_checkpoint(path: Path) -> list[Stored]:
    """The parameters of a checkpoint that another library has quantized."""

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with read_checkpoint(path, dequantize=True, caller=_CALLER) as checkpoint:
                return np.asarray(checkpoint[name], np.float32)

        return read

    with read_checkpoint(path, caller=_CALLER) as checkpoint:
        return [
            _of_value(name, checkpoint.eval_shape(name))._replace(read=reader(name))
            for name in checkpoint
        ]
    raise AssertionError  # the block returns or raises


def _of_header(path: Path, name: str, header: TensorHeader) -> Stored:
    """A tensor that stays in its file until it is read."""

    def read() -> np.ndarray:
        with TensorFile(path, _CALLER) as file:
            return file.read(name).astype(np.float32)

    num_bytes = header.stop - header.start
    return Stored(name, tuple(header.shape), header.dtype, "", num_bytes, read)


def _of_value(name: str, value: Any) -> Stored:
    """An array or a QTensor, or one of shapes."""
    if _is_qtensor(value):
        return Stored(
            name,
            tuple(value.shape),
            value.spec.fmt.name,
            _granularity(value),
            value.nbytes,
            lambda: np.asarray(dequantize(value, dtype=np.float32)),
        )
    dtype = np.dtype(value.dtype)
    return Stored(
        name,
        tuple(value.shape),
        dtype.name,
        "",
        value.size * dtype.itemsize,
        lambda: np.asarray(value, np.float32),
    )


def _granularity(qt: QTensor) -> str:
    """The granularity with the sizes of its blocks: "PerGroup(128)"."""
    shape = qt.meta.geometry.block_shape
    sizes = ", ".join(str(size) for size in shape if size not in (None, 1))
    name = type(qt.spec.granularity).__name__
    return f"{name}({sizes})" if sizes else name


def _of_model(model: nnx.Module) -> list[Stored]:
    """The parameters of a model by their paths."""
    return [
        _of_value("/".join(map(str, path)), variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
    ]


def _is_qtensor(value: Any) -> bool:
    return isinstance(value, QTensor)
