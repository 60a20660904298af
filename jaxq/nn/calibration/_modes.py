"""Eval mode and train mode of a model while calibration batches run through it.

In train mode, dropout removes numbers at random and scales the others up, and batch
normalization uses the statistics of each batch. Ranges and moments of such inputs are
not those of the model in use.

An nnx module keeps its mode in attributes, so calibration runs an eval copy. A linen
module gets its mode as arguments of each call. Calibration cannot change them, and says
so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import linen, nnx

# The attributes that `nnx.Module.eval` sets to True.
_EVAL_ATTRIBUTES = ("deterministic", "use_running_average")


def eval_copy(model: nnx.Module) -> Any:
    """A copy of a model in eval mode. It shares its arrays with the model."""
    copy = nnx.clone(model)
    copy.eval()
    return copy


def train_mode_note(model: nnx.Module) -> str:
    """The note of a report on a model that is in train mode. Empty in eval mode."""
    modules = [
        "/".join(map(str, path)) or "the model itself"
        for path, module in nnx.iter_modules(model)
        if any(getattr(module, name, None) is False for name in _EVAL_ATTRIBUTES)
    ]
    if not modules:
        return ""
    return (
        f"the model is in train mode ({_listing(modules)}). The calibration batches "
        "ran in eval mode. The quantized model is in train mode again"
    )


def linen_train_mode(
    module: linen.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """Says what one call of a linen module does in train mode. Empty in eval mode.

    Args:
      module: the module that is called.
      args: the arguments of its `__call__`.
      kwargs: the named arguments of its `__call__`.
    """
    path = "/".join(module.path) or type(module).__name__
    if isinstance(module, linen.BatchNorm):
        if _flag(module, "use_running_average", args[1:2], kwargs) is False:
            return f"{path} normalizes by the statistics of each batch"
        return ""
    if isinstance(module, linen.Dropout):
        rate, positional = module.rate, args[1:2]
    elif isinstance(module, linen.MultiHeadDotProductAttention):
        rate, positional = module.dropout_rate, ()
    else:
        return ""
    if rate and _flag(module, "deterministic", positional, kwargs) is False:
        return f"{path} drops numbers at random"
    return ""


def linen_train_mode_note(calls: Mapping[str, None]) -> str:
    """A note on the calls that `linen_train_mode` described. Empty without any."""
    if not calls:
        return ""
    return (
        f"the calibration batches ran in train mode: {_listing(list(calls))}. Ranges "
        "and statistics are not those of eval mode. Pass the arguments of eval mode "
        "(deterministic=True, use_running_average=True, train=False) in the batches "
        "or in forward="
    )


def _flag(
    module: Any, name: str, positional: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The flag of one call: an argument, or the attribute of the module."""
    value = kwargs.get(name, positional[0] if positional else None)
    return getattr(module, name) if value is None else value


def _listing(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
