"""`Checkpoint`: the parameters of a checkpoint by name, read one by one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.files import GgufFile, is_file, read_text
from jaxq.io.checkpoint import _directory
from jaxq.io.checkpoint._directory import read_config, read_parameters
from jaxq.io.checkpoint._gguf import TOKENIZER, is_gguf, read_gguf
from jaxq.io.checkpoint._parameter import Parameter
from jaxq.qtensor import QTensor

_CALLER = "jaxq.io.read_checkpoint"


class Checkpoint(Mapping[str, Any]):
    """The parameters of a checkpoint by name. `read_checkpoint` returns it.

    A parameter is read when it is asked for, and not kept. Its name and its axes are
    those of the float checkpoint. So the weight of a linear layer is `[out, in]`, and
    `x @ checkpoint[name].T` is the product.

    - A quantized weight is a QTensor with the codes and scales of the file.
    - Another parameter is a numpy array.

    A checkpoint holds open files. Use it in a `with` block, or call `close`.

    Attributes:
      path: the directory or the file.
      config: the JSON of `config.json`. That of a GGUF file is made from its metadata.
      tokenizer: the text of `tokenizer.json`; None if there is none.

    Example:
      >>> import os, numpy as np, jaxq
      >>> from safetensors.numpy import save_file
      >>> os.makedirs("my_model", exist_ok=True)
      >>> weights = {"up_proj.weight": np.ones((16, 32), np.float32)}
      >>> save_file(weights, "my_model/model.safetensors")
      >>> with open("my_model/config.json", "w") as file:
      ...   size = file.write("{}")
      >>> with jaxq.io.read_checkpoint("my_model") as checkpoint:
      ...   print(list(checkpoint), checkpoint["up_proj.weight"].shape)
      ['up_proj.weight'] (16, 32)
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        parameters: Mapping[str, Parameter],
        stack: contextlib.ExitStack,
        *,
        caller: str,
        dequantize: bool,
        tokenizer: str | None = None,
    ):
        self.path, self.config, self.tokenizer = path, config, tokenizer
        self._parameters = dict(parameters)
        self._stack = stack
        self._caller, self._dequantize = caller, dequantize
        self._known_shapes: dict[Any, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self._stack.close()

    def __getitem__(self, name: str) -> QTensor | jax.Array | np.ndarray:
        parameter = self._parameters[name]
        return parameter.read(self._caller, dequantize=self._dequantize)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __repr__(self) -> str:
        number = sum(map(self.is_quantized, self))
        path = str(self.path)
        return f"Checkpoint({path!r}, {len(self)} parameters, {number} quantized)"

    def eval_shape(self, name: str) -> QTensor | jax.ShapeDtypeStruct:
        """The parameter with a `jax.ShapeDtypeStruct` for each array.

        Reads headers and small arrays only. Shapes, dtypes and settings are checked
        as `checkpoint[name]` checks them.

        Raises:
          KeyError: there is no parameter with this name.
          ValueError: as `checkpoint[name]`.
        """
        parameter = self._parameters[name]
        return parameter.eval_shape(
            self._caller, self._known_shapes, dequantize=self._dequantize
        )

    def read_slice(self, name: str, number: int) -> jax.Array | np.ndarray:
        """One matrix of a stack of matrices, in floats: `checkpoint[name][number]`.

        Only this matrix is read from a safetensors file.

        Args:
          name: of the parameter.
          number: of the matrix.

        Raises:
          KeyError: there is no parameter with this name.
          ValueError: as `checkpoint[name]`.
        """
        return self._parameters[name].read_slice(number, self._caller)

    def fingerprint(self) -> dict[str, list[int]]:
        """Size and time of change of each file, by name."""
        files = {
            tensor.file
            for parameter in self._parameters.values()
            for tensor in parameter.tensors.values()
        }
        status = {file.name: os.stat(file) for file in sorted(files)}
        return {name: [s.st_size, s.st_mtime_ns] for name, s in status.items()}

    def is_quantized(self, name: str) -> bool:
        """Whether the files hold a parameter in quantized form."""
        return self._parameters[name].layout is not None


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    dequantize: bool = False,
    verify: bool = True,
    caller: str = _CALLER,
) -> Checkpoint:
    """Opens a checkpoint of another library.

    Reads Hugging Face directories of safetensors files. `quantization_config` in
    `config.json` says how weights are quantized: by bitsandbytes, GPTQ, AWQ,
    compressed-tensors, fp8 in blocks (DeepSeek, Qwen), NVFP4 of ModelOpt, or MXFP4 as
    GPT-OSS ships it. A directory without it has float weights.

    Reads GGUF files of the architectures llama (also Mixtral), qwen2, qwen3 and
    qwen3moe too. Their parameters get the names of Hugging Face, and the order of rows
    that these have.

    Headers are read and checked now, and tensors when they are asked for. Dynamic
    quantization of inputs to 8 bits is read too. Static ranges of inputs and the
    quantization of caches are not.

    Args:
      path: the directory, or a file whose name ends with ".gguf".
      dequantize: return floats instead of QTensors. Some weights have no QTensor, for
        example those of GPTQ with `desc_act`. Their error names this argument.
      verify: compare the checksums of files that jaxq wrote. Other files have none.
      caller: the name that error messages begin with.

    Returns:
      A `Checkpoint`, which is a mapping from names to QTensors and arrays.

    Raises:
      FileNotFoundError: there is no `config.json`, or a weight file is missing.
      ValueError: a file is damaged; the index names a file outside the directory; the
        library or its settings are unknown; or tensors of a quantized weight are
        missing. The error names the file and the tensor.

    Example:
      >>> import os, numpy as np, jaxq
      >>> from safetensors.numpy import save_file
      >>> os.makedirs("my_model", exist_ok=True)
      >>> weights = {"up_proj.weight": np.ones((16, 32), np.float32)}
      >>> save_file(weights, "my_model/model.safetensors")
      >>> with open("my_model/config.json", "w") as file:
      ...   size = file.write("{}")
      >>> with jaxq.io.read_checkpoint("my_model") as checkpoint:
      ...   checkpoint.eval_shape("up_proj.weight")
      ShapeDtypeStruct(shape=(16, 32), dtype=float32)
    """
    path = Path(path)
    tokenizer: str | None = None
    with contextlib.ExitStack() as stack:
        if is_gguf(path):
            file = stack.enter_context(GgufFile(path, caller))
            config, parameters = read_gguf(file, caller)
            text = file.metadata.get(TOKENIZER)
            tokenizer = text if isinstance(text, str) else None
        else:
            config, parameters = _open_directory(path, stack, caller, verify)
            if is_file(path / "tokenizer.json", caller):
                tokenizer = read_text(path / "tokenizer.json", caller)
        return Checkpoint(
            path,
            config,
            parameters,
            stack.pop_all(),
            caller=caller,
            dequantize=dequantize,
            tokenizer=tokenizer,
        )
    raise AssertionError  # an ExitStack does not hide errors


def is_quantized(path: str | os.PathLike[str], caller: str = _CALLER) -> bool:
    """Whether a checkpoint has quantized weights. A GGUF file always counts as one.

    Raises:
      FileNotFoundError: a directory has no `config.json`.
      ValueError: a file is not a JSON object.
    """
    path = Path(path)
    return is_gguf(path) or _directory.is_quantized(path, caller)


def _open_directory(
    path: Path, stack: contextlib.ExitStack, caller: str, verify: bool
) -> tuple[dict[str, Any], dict[str, Parameter]]:
    """The config and the parameters of a directory."""
    config = read_config(path, caller)
    parameters = read_parameters(path, config, stack, caller, verify=verify)
    # A save that replaced the directory meanwhile wrote another config.
    if read_config(path, caller) != config:
        raise ValueError(f"{caller}: {path} changed while it was read. Read it again.")
    return config, parameters
