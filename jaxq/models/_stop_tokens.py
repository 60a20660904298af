"""The tokens with which a model ends its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxq.files import CONFIG, GgufFile, is_file, parse_json, read_text

_LOAD = "jaxq.models.load_stop_tokens"
_GENERATION = "generation_config.json"
_NAME = "eos_token_id"
_GGUF = ".gguf"
_GGUF_NAME = "tokenizer.ggml.eos_token_id"


def load_stop_tokens(path: str | Path) -> tuple[int, ...]:
    """Reads the tokens with which a model ends its texts.

    Args:
        path: a Hugging Face directory, or a GGUF file. In a directory, the tokens of
            `generation_config.json` are used. If it has none, those of `config.json`
            are.

    Returns:
        The token ids, for `generate(stop_tokens=...)`. Empty if the files name none.

    Raises:
        ValueError: a file is damaged, or holds something else than token ids.
        OSError: a file cannot be read.

    Example:
        >>> from pathlib import Path
        >>> from jaxq.models import load_stop_tokens
        >>> _ = Path("config.json").write_text('{"eos_token_id": [2, 7]}')
        >>> load_stop_tokens(".")
        (2, 7)
    """
    path = Path(path)
    if path.suffix.lower() == _GGUF:
        with GgufFile(path, _LOAD) as file:
            return _checked(path, file.metadata.get(_GGUF_NAME))
    for file in (path / _GENERATION, path / CONFIG):
        entries = _entries(file)
        tokens = _checked(file, entries.get(_NAME))
        if not tokens and isinstance(entries.get("text_config"), dict):
            tokens = _checked(file, entries["text_config"].get(_NAME))
        if tokens:
            return tokens
    return ()


def _entries(file: Path) -> dict[str, Any]:
    """The JSON object of a file. Empty if the file does not exist."""
    if not is_file(file, _LOAD):
        return {}
    text = read_text(file, _LOAD)
    try:
        entries = parse_json(file, text)
    except ValueError as error:
        raise ValueError(f"{_LOAD}: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{_LOAD}: {file} is not an object of keys and values.")
    return entries


def _checked(file: Path, value: Any) -> tuple[int, ...]:
    """One token id, or a list of them, as a tuple. None gives an empty tuple.

    Raises:
        ValueError: the value is something else.
    """
    if value is None:
        return ()
    tokens = value if isinstance(value, list) else [value]
    # A bool is an int in Python. An id is an index of a table, so it fits int32.
    if not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise ValueError(
            f"{_LOAD}: {file}: {_NAME} is {value!r:.80}; expected a token id, or a "
            "list of them."
        )
    return tuple(tokens)
