"""What a checkpoint is made of, from a model or from another checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxq.io.checkpoint._checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class CheckpointParts:
    """A checkpoint that is about to be written.

    Attributes:
      config: the JSON of `config.json`, without `quantization_config`.
      names: of the parameters, in the order of the files.
      read: returns an array or a QTensor by name, with the axes of a float checkpoint:
        the weight of a linear layer is `[out, in]`.
      files: other files by name, such as those of a tokenizer.
    """

    config: Mapping[str, Any]
    names: tuple[str, ...]
    read: Callable[[str], Any]
    files: Mapping[str, str | bytes] = dataclasses.field(default_factory=dict)


_TABLE = re.compile(r"(^|[._])(embed\w*|wte|wpe|shared)\.weight$")


def is_table(name: str) -> bool:
    """Whether a parameter is an embedding table, by its name."""
    return bool(_TABLE.search(name))


_PARTS: dict[type, Callable[[Any], CheckpointParts]] = {}

# Files that belong to the model and not to the form of its weights.
_PASSED_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)


def register_model(model_class: type, parts: Callable[[Any], CheckpointParts]) -> None:
    """Says how `export` writes the models of a class.

    Args:
      model_class: of the models.
      parts: returns the `CheckpointParts` of a model.
    """
    _PARTS[model_class] = parts


def parts_of(source: Any, caller: str) -> CheckpointParts:
    """The parts of a model or of an open checkpoint.

    Raises:
      TypeError: `export` does not know the class of the model.
    """
    if isinstance(source, Checkpoint):
        return _parts_of_checkpoint(source)
    for model_class in type(source).__mro__:
        if model_class in _PARTS:
            return _PARTS[model_class](source)
    raise TypeError(
        f"{caller}: cannot write a {type(source).__name__}. Pass a model of "
        "jaxq.models, or a checkpoint of jaxq.io.read_checkpoint."
    )


def companion_files(path: Path) -> dict[str, bytes]:
    """The files of a directory that do not depend on its weights: bytes by name.

    These are the files of the tokenizer, the chat template and the settings of
    generation. Files that do not exist are left out.
    """
    files = {name: path / name for name in _PASSED_FILES}
    return {name: file.read_bytes() for name, file in files.items() if file.is_file()}


def _parts_of_checkpoint(checkpoint: Checkpoint) -> CheckpointParts:
    config = dict(checkpoint.config)
    config.pop("quantization_config", None)
    files: dict[str, str | bytes] = dict(companion_files(checkpoint.path))
    if checkpoint.tokenizer is not None:
        files["tokenizer.json"] = checkpoint.tokenizer
    return CheckpointParts(config, tuple(checkpoint), checkpoint.__getitem__, files)
