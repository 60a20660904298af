"""The names of layers in files of other libraries.

Each layer of a stack has a name of its own there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flax import nnx

from jaxq.models import Llama
from jaxq.nn.layers import input_transforms
from jaxq.nn.transform import find_layers
from jaxq.training.lora._adapter import AdapterAxes
from jaxq.training.lora._product import HOOKS

# (path of a layer, its number in a stack or None) -> name of a module.
Names = Callable[[str, int | None], str]
# Families whose projections have the names of Llama. Others fuse or rename some.
_LLAMA_NAMES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("smollm3", "granite", "olmo2"),
)


class NamedLayer(NamedTuple):
    """A layer, or one layer of a stack, as other libraries know it.

    Attributes:
      name: of the module.
      layer: path, module and kind.
      number: in the stack. None if the layer is in no stack.
    """

    name: str
    layer: Any
    number: int | None


def named_layers(
    model: nnx.Module, names: Names | None, caller: str
) -> list[NamedLayer]:
    """The layers of a model that can have adapters, with their names.

    Args:
      model: a flax nnx module.
      names: gives the names. None uses the names of Hugging Face for decoders of
        the families in `_LLAMA_NAMES`, and the path with dots for other models.
      caller: the name of the public function. Errors begin with this name.

    Raises:
      ValueError: `names` is None for a stack of layers in another model; or two layers
        have one name.
    """
    if names is None:
        names = _llama_name if _has_llama_names(model) else _dotted(caller)
    named = list(_named(model, names))
    seen: set[str] = set()
    for layer in named:
        if layer.name in seen:
            raise ValueError(
                f"{caller}: names= gives two layers the name {layer.name!r}. "
                "Use the path of the layer and its number in the name."
            )
        seen.add(layer.name)
    return named


def refuse_unsupported(layer: Any, model: nnx.Module, caller: str) -> None:
    """Raises a ValueError if a file of PEFT cannot hold the adapter of a layer."""
    path, module, kind = layer
    if AdapterAxes.of(kind.roles(module)).num_batch:
        raise ValueError(
            f"{caller}: {path} multiplies several matrices (batch axes), and PEFT's "
            "files have one matrix for each layer. Use jaxq.save and jaxq.load."
        )
    if path in input_transforms(model):
        raise ValueError(
            f"{caller}: {path} transforms its input at run time, so its adapter does "
            "not fit the layer of another library. Use jaxq.save and jaxq.load."
        )


def _named(model: nnx.Module, names: Names) -> Iterator[NamedLayer]:
    for layer in find_layers(model):
        path, module, kind = layer
        if kind.hook not in HOOKS:
            continue
        axes = AdapterAxes.of(kind.roles(module))
        stack = axes.stack_of(getattr(module, kind.weight).get_value())
        if not stack:
            yield NamedLayer(names(path, None), layer, None)
            continue
        for number in range(math.prod(stack)):
            yield NamedLayer(names(path, number), layer, number)


def _has_llama_names(model: nnx.Module) -> bool:
    """True if the paths of a model are the names of Hugging Face without "model."."""
    if not isinstance(model, Llama):
        return False
    return model.config.to_hf()["model_type"] in _LLAMA_NAMES


def _llama_name(path: str, number: int | None) -> str:
    name = path.replace("/", ".")
    if number is not None:
        name = name.replace("layers.", f"layers.{number}.", 1)
    return name if name == "lm_head" else f"model.{name}"


def _dotted(caller: str) -> Names:
    def dotted(path: str, number: int | None) -> str:
        if number is not None:
            raise ValueError(
                f"{caller}: {path} is a stack of layers, and their names in a file are "
                "unknown. Pass names=, for example names=lambda path, number: "
                "path.replace('layers/', f'layers/{number}/').replace('/', '.')."
            )
        return path.replace("/", ".")

    return dotted
