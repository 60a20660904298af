"""The parts of a product with a quantized weight, for programs over several devices.

| letter | axis | a part has |
|---|---|---|
| e | stacked products | whole products |
| m | rows of x | whole rows |
| n | rows of codes | whole rows |
| k | codes of a row | whole groups, bytes and units of the packing |

A product is summed over k, or over n if the weight is transposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxq import formats
from jaxq.kernels._call import Call
from jaxq.kernels._parts import Letters, Parts
from jaxq.kernels._problem import why_not_static
from jaxq.kernels._rows import group_size, num_groups


def product_parts(avals: Sequence[Any], call: Call) -> Parts | None:
    """The parts of a product. None if its shapes are symbolic.

    Args:
      avals: abstract values of x and of the leaves of the weight.
      call: static facts of the product.
    """
    if why_not_static(*avals) is not None:
        return None
    x, *leaves = avals
    rows, meta = call.rows(leaves), call.meta
    n = rows.data.shape[1 if meta.layout == "rows" else 2]
    e, m, _ = x.shape
    units = {"e": e, "m": m, "n": n, "k": _units_along_k(call, rows)}
    stack = None if call.has_index else "e"
    k = "k" if units["k"] > 1 else None
    letters: dict[str, Letters] = {
        "data": (stack, "n", k) if meta.layout == "rows" else (stack, k, "n"),
        "index": ("e",),
    }
    for name in ("scale", "zero_point", "offset", "codebook"):
        leaf = getattr(rows, name)
        if leaf is not None:
            per_row = "n" if leaf.shape[1] == n else None
            own = k if leaf.shape[2] > 1 else None
            entries = (None,) * (leaf.ndim - 3)  # those of a codebook
            letters[name] = ("e", per_row, own, *entries)
    along_x, along_y = ("n", k) if call.transposed else (k, "n")

    def part_of_call(shards: dict[str, int]) -> Call:
        """The same product for a part."""
        summed = shards[_summed(call)] > 1
        out_dtype = call.out_dtype
        if summed and out_dtype != "int32":
            out_dtype = "float32"  # the terms of a sum are not rounded
        part = dataclasses.replace(
            meta, k=meta.k // shards["k"], padded_k=meta.padded_k // shards["k"]
        )
        return dataclasses.replace(call, meta=part, out_dtype=out_dtype)

    return Parts(
        operands=(("e", "m", along_x), *(letters[name] for name in call.leaves)),
        result=("e", "m", along_y),
        units=units,
        first=1 + call.leaves.index("data"),
        part=part_of_call,
        summed=_summed(call),
    )


def _summed(call: Call) -> str:
    return "n" if call.transposed else "k"


def _units_along_k(call: Call, rows: Any) -> int:
    """The number of units along k. It is 1 if a row cannot be cut."""
    meta = call.meta
    if meta.k != meta.padded_k:
        return 1  # the last part would have padding
    unit = formats.codes_per_pack(meta.fmt.bits, meta.packing)
    if meta.packing is formats.Packing.HALVES:
        unit = meta.unit or meta.padded_k
    groups = num_groups(rows)
    if groups > 1:
        group = group_size(meta, groups)
        if group * groups != meta.padded_k:
            return 1  # the last group has fewer codes
        unit = math.lcm(unit, group)
    return meta.padded_k // unit if unit and meta.padded_k % unit == 0 else 1
