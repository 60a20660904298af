"""Blocks of layers, for `sequential`. Each block is quantized with fresh statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxq.nn.transform._options import Options
from jaxq.nn.transform._slot import Adapter, Slot


def blocks_in_order(
    adapter: Adapter, slots: list[Slot], options: Options
) -> list[list[Slot]]:
    """Splits slots into blocks, in the order in which they are quantized.

    Args:
      adapter: the adapter of the model.
      slots: the slots whose weights are quantized.
      options: `sequential` and the batches.

    Returns:
      The blocks. Without `sequential`, this is one block with all slots.

    Raises:
      ValueError: `sequential` is set, and `calibration` is None or statistics.
    """
    if not options.sequential:
        return [slots]
    if not options.batches:
        raise ValueError(
            f"{options.caller}: sequential={options.sequential!r} needs "
            "calibration=batches. Statistics do not suffice, because they describe "
            "the float model only."
        )
    call_order = adapter.call_order(options)
    return split_into_blocks(slots, call_order, by_array=options.sequential == "layers")


def split_into_blocks(
    slots: Sequence[Slot], call_order: Mapping[str, tuple[int, ...]], *, by_array: bool
) -> list[list[Slot]]:
    """Splits slots into blocks, in the order in which the model calls the layers.

    Layers that the model does not call come first.

    Args:
      slots: the slots of the layers.
      call_order: the paths of the layers in the order of their calls, each with the
        numbers of the arrays that the layer reads.
      by_array: True makes one block of the layers that read the same arrays. False
        makes one block of the layers that have the same `_block_name`.
    """
    position = {path: i for i, path in enumerate(call_order)}
    blocks: dict[Any, list[Slot]] = {}
    for slot in sorted(slots, key=lambda slot: position.get(slot.path, -1)):
        block = call_order.get(slot.path) if by_array else _block_name(slot.path)
        blocks.setdefault(block, []).append(slot)
    return list(blocks.values())


def _block_name(path: str) -> str:
    """The path up to its first number, or the whole path if it has no number.

    The block name of "layers/3/mlp/up" is "layers/3". That of "layers_3/up" is
    "layers_3".
    """
    parts = path.split("/")
    for position, part in enumerate(parts):
        if part.rpartition("_")[2].isdigit():
            return "/".join(parts[: position + 1])
    return path
