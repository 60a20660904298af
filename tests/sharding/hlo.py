"""The collectives of a compiled program, read from its text."""

import math
import re

_COLLECTIVE = re.compile(
    r"= (?P<shapes>\([^=]*?\)|\S+) (?P<kind>all-gather|all-reduce|reduce-scatter"
    r"|all-to-all|collective-permute)(-start)?\("
)
# XLA numbers the parts of long tuples: `(f32[64]{0}, /*index=5*/f32[64]{0})`.
_COMMENT = re.compile(r"/\*.*?\*/")
_SHAPE = re.compile(r"(?P<dtype>[a-z]+\d+\w*)\[(?P<sizes>[\d,]*)\]")
BYTES = {"s8": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "pred": 1, "u16": 2}


def collectives_in(text):
    """The (kind, dtype, bytes of the result) of each collective."""
    found = []
    for match in _COLLECTIVE.finditer(_COMMENT.sub("", text)):
        for shape in _SHAPE.finditer(match["shapes"]):
            sizes = [int(size) for size in shape["sizes"].split(",") if size]
            num_bytes = math.prod(sizes) * BYTES[shape["dtype"]]
            found.append((match["kind"], shape["dtype"], num_bytes))
    return found
