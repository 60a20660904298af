"""Chat templates: the text that a model reads for a list of messages.

Hugging Face directories hold a template in the Jinja language, in the file
`tokenizer_config.json` or `chat_template.jinja`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxq.files import is_file

_LOAD = "jaxq.models.load_chat_template"
_CONFIG = "tokenizer_config.json"
_FILE = "chat_template.jinja"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """The chat template of a model. `load_chat_template` reads it.

    Templates run in a sandbox of Jinja that reaches no attribute of Python and changes
    no argument. A hostile template can still run for a long time.

    Args:
        source: the template in the Jinja language.
        special_tokens: texts that the template may use, such as `bos_token`.

    Raises:
        ImportError: the `jinja2` package is not installed.
        ValueError: the source is not a template.

    Example:
        >>> from jaxq.models import ChatTemplate
        >>> template = ChatTemplate(
        ...     "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        ... )
        >>> template([{"role": "user", "content": "Hello"}])
        '<user>Hello'
    """

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None):
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError(
                "ChatTemplate needs the jinja2 package: pip install jaxq[hf]"
            ) from error

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._error = TemplateError
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(
                f"ChatTemplate: the source is not a template of jinja2: {error}."
            ) from error

    def __call__(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        **values: Any,
    ) -> str:
        """The text of a list of messages.

        Args:
            messages: dicts with the keys "role" and "content".
            add_generation_prompt: end the text where the answer of the model begins.
            **values: more values that the template reads, such as `tools`.

        Raises:
            ValueError: the template refuses the messages.
        """
        context = self._special_tokens | {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(**(context | values))
        except self._error as error:
            raise ValueError(
                f"ChatTemplate: the template refuses the messages: {error}."
            ) from error


def load_chat_template(path: str | Path) -> ChatTemplate | None:
    """Reads the chat template of a Hugging Face directory.

    Args:
        path: the directory.

    Returns:
        The template. None if the directory has none.

    Raises:
        ValueError: a file is damaged, or the template is not one of jinja2.
        ImportError: there is a template, and the `jinja2` package is not installed.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> from jaxq.models import load_chat_template
        >>> config = {"chat_template": "{{ bos_token }}{{ messages[0].content }}",
        ...           "bos_token": "<s>"}
        >>> _ = Path("tokenizer_config.json").write_text(json.dumps(config))
        >>> load_chat_template(".")([{"role": "user", "content": "Hello"}])
        '<s>Hello'
    """
    path = Path(path)
    config: Any = {}
    if is_file(path / _CONFIG, _LOAD):
        try:
            config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{_LOAD}: {path / _CONFIG} is damaged: {error}. Download it again."
            ) from error
        if not isinstance(config, dict):
            raise ValueError(
                f"{_LOAD}: {path / _CONFIG} is not an object of keys and values. "
                "Download it again."
            )
    source = _default_template(config.get("chat_template"))
    if is_file(path / _FILE, _LOAD):
        source = (path / _FILE).read_text(encoding="utf-8")
    if source is None:
        return None
    tokens = {name: _token_text(config.get(name)) for name in _SPECIAL_TOKENS}
    return ChatTemplate(source, {name: text for name, text in tokens.items() if text})


def _default_template(templates: Any) -> str | None:
    """The template of a file that may have several, each with a name."""
    if isinstance(templates, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in templates
            if isinstance(entry, dict)
        }
        templates = named.get("default")
    return templates if isinstance(templates, str) else None


def _token_text(token: Any) -> str | None:
    """The text of a special token, which a file has as a text or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes characters of HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
