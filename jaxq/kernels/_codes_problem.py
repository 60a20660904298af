"""The static facts of a product of codes in groups, as kernels see it."""

from __future__ import annotations

import dataclasses

from jaxq import formats
from jaxq.kernels._codes import is_native_float, largest_exact_length
from jaxq.kernels._problem import KERNEL_SCALES, why_not_static
from jaxq.kernels._rows import RowMeta, Rows, group_size, num_groups


@dataclasses.dataclass(frozen=True)
class CodesProblem:
    """`y[e, m, n]` float32, the product of two operands of codes with scales in groups.

        y[m, n] = sum over groups g of
            a_scale[m, g] * b_scale[n, g] * (a[m, group g] @ b[n, group g].T)

    Attributes:
      e: number of stacked products.
      m: rows of a.
      n: rows of b.
      k: contracted length.
      group: number of codes that share a scale along k. It divides k.
      codes: the format in which codes are multiplied: "int8" or a float8 format.
      a_groups: number of scales of a row of a: k / group, 1 for one scale a row, or 0
        if a has no scales.
      b_groups: k / group, or 1.
      b_codes: the format of b: None for that of a, or "int4". 4-bit codes are in HALVES
        packing, and a unit is a group. Byte j of a unit has codes j and j + group / 2.
      stack: number of matrices in b if the kernel gets an index, else None.
    """

    e: int
    m: int
    n: int
    k: int
    group: int
    codes: str
    a_groups: int
    b_groups: int
    b_codes: str | None = None
    stack: int | None = None

    @property
    def is_packed(self) -> bool:
        """True if a byte of b has two codes."""
        return self.b_codes == "int4"

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to compute."""
        return 0 in (self.e, self.m, self.n, self.k)

    @property
    def num_matrices(self) -> int:
        """Number of matrices in b."""
        return self.e if self.stack is None else self.stack

    @property
    def num_groups(self) -> int:
        return self.k // self.group

    @property
    def is_integer(self) -> bool:
        return self.codes == "int8"


def codes_problem(
    a: Rows, a_meta: RowMeta, b: Rows, b_meta: RowMeta
) -> CodesProblem | str:
    """Returns the product as kernels see it, or the reason why no kernel computes it.

    Only shapes and dtypes are read, so leaves may be abstract values.

    Args:
      a: codes and scales `[e, m, ...]`.
      a_meta: static facts of a.
      b: codes and scales `[e, n, ...]`.
      b_meta: static facts of b.
    """
    symbolic = why_not_static(a.data, b.data)
    if symbolic is not None:
        return symbolic
    names = a_meta.fmt.name, b_meta.fmt.name
    is_packed = names[1] == "int4"
    is_served = names[0] == "int8" or is_native_float(a_meta.fmt)
    if not is_served or (names[0] != names[1] and not is_packed):
        return (
            "a kernel multiplies int8 or float8 codes by codes of the same format, or "
            f"of int4, not {names[0]} by {names[1]}"
        )
    for rows, meta in ((a, a_meta), (b, b_meta)):
        if rows.scale is None or rows.zero_point is not None:
            return "a kernel multiplies symmetric codes with scales"
        if rows.scale.dtype.name not in KERNEL_SCALES:
            return f"a kernel reads scales in {', '.join(KERNEL_SCALES)}"
        packing = formats.Packing.NONE
        if meta is b_meta and is_packed:
            packing = formats.Packing.HALVES
        if meta.layout != "rows" or meta.packing is not packing:
            return f'codes must lie in layout "rows", in {packing.value!r} packing'
    groups = num_groups(a), num_groups(b)
    group = a_meta.k
    if max(groups) > 1:
        group = group_size(a_meta if groups[0] > 1 else b_meta, max(groups))
    reason = _why_not_group(group, groups, a_meta, b_meta)
    if reason is not None:
        return reason
    e, m = a.data.shape[:2]
    n = b.data.shape[1]
    b_codes = "int4" if is_packed else None
    return CodesProblem(e, m, n, a_meta.k, group, names[0], *groups, b_codes)


def _why_not_group(
    group: int, groups: tuple[int, int], a_meta: RowMeta, b_meta: RowMeta
) -> str | None:
    """Returns why no kernel multiplies groups of this size, or None if one may.

    Args:
      group: number of codes that share a scale.
      groups: number of scales of a row of a, and of b.
      a_meta: static facts of a.
      b_meta: static facts of b.
    """
    if group * max(groups) != a_meta.k:
        return f"the last group of {a_meta.k} codes in groups of {group} is not full"
    if a_meta.fmt.name == "int8":
        longest = largest_exact_length(a_meta, True, b_meta, True)
        if group > longest:
            return (
                f"int32 can sum {longest} products of int8 and {b_meta.fmt.name} codes "
                f"without overflow, and a sum has {group}"
            )
    if b_meta.fmt.name != "int4" or max(groups) == 1 or b_meta.unit == group:
        return None
    if groups[1] == 1:
        return (
            f"the activation has scales for groups of {group} codes, and the int4 "
            f"weight has one scale for {b_meta.k} codes; quantize the weight in the "
            f"same groups, with PerGroup({group})"
        )
    return f"a group of {group} codes is not packed as one unit"
