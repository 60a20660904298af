"""Which weights are quantized on the same statistics, and in what order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxq.nn.transform._options import Options
from jaxq.nn.transform._slot import Adapter, Slot


def blocks_in_order(
    adapter: Adapter, slots: list[Slot], options: Options
) -> list[list[Slot]]:
    """Splits slots into blocks: each is quantized on the results of those before it.

    Args:
      adapter: of the model.
      slots: those that are quantized.
      options: `sequential` and the batches.

    Returns:
      One block with all slots, unless `sequential` says otherwise.

    Raises:
      ValueError: `sequential` without batches.
    """
    if not options.sequential:
        return [slots]
    if not options.batches:
        raise ValueError(
            f"{options.caller}: sequential={options.sequential!r} needs "
            "calibration=batches. Statistics are of the float model only."
        )
    call_order = adapter.call_order(options)
    return split_into_blocks(slots, call_order, by_array=options.sequential == "layers")


def split_into_blocks(
    slots: Sequence[Slot], call_order: Mapping[str, tuple[int, ...]], *, by_array: bool
) -> list[list[Slot]]:
    """Blocks in the order in which data reach them. Layers without data come first.

    Args:
      slots: of the layers.
      call_order: the layers in order, each with the numbers of the arrays it reads.
      by_array: layers that read the same arrays are a block. Otherwise layers that
        have the same `_block_name` are one.
    """
    position = {path: i for i, path in enumerate(call_order)}
    blocks: dict[Any, list[Slot]] = {}
    for slot in sorted(slots, key=lambda slot: position.get(slot.path, -1)):
        block = call_order.get(slot.path) if by_array else _block_name(slot.path)
        blocks.setdefault(block, []).append(slot)
    return list(blocks.values())


def _block_name(path: str) -> str:
    """The path up to its first number; the whole path if it has no number.

    "layers/3/mlp/up" belongs to the block "layers/3", "layers_3/up" to "layers_3".
    """
    parts = path.split("/")
    for position, part in enumerate(parts):
        if part.rpartition("_")[2].isdigit():
            return "/".join(parts[: position + 1])
    return path
