"""The layouts by name."""

from __future__ import annotations

from jaxq.formats import unknown_name
from jaxq.io.layouts import (
    _awq,
    _bitsandbytes,
    _compressed_tensors,
    _float8,
    _gguf,
    _gptq,
    _microscaling,
    _modelopt,
)
from jaxq.io.layouts._layout import Layout

_LAYOUTS = {
    layout.name: layout
    for layout in (
        _bitsandbytes.FOUR_BIT,
        _bitsandbytes.INT8,
        _gptq.GPTQ,
        _awq.AWQ,
        _compressed_tensors.COMPRESSED_TENSORS,
        _microscaling.MXFP4,
        _float8.FP8_BLOCK,
        _modelopt.NVFP4,
        _gguf.GGUF,
    )
}


def names() -> list[str]:
    """Returns the names of all layouts, sorted.

    Example:
      >>> import jaxq
      >>> "bitsandbytes_4bit" in jaxq.io.layouts.names()
      True
    """
    return sorted(_LAYOUTS)


def get(name: str) -> Layout:
    """Returns the layout with this name.

    Args:
      name: a name from `names()`. Upper case letters and hyphens are accepted.

    Raises:
      ValueError: no layout has this name. The message suggests similar names.

    Example:
      >>> import jaxq
      >>> jaxq.io.layouts.get("bitsandbytes_int8").tensors
      ('weight', 'SCB', 'weight_format')
    """
    key = str(name).strip().lower().replace("-", "_")
    if key not in _LAYOUTS:
        listing = "jaxq.io.layouts.names()"
        raise ValueError(unknown_name("layout", str(name), _LAYOUTS, listing))
    return _LAYOUTS[key]
