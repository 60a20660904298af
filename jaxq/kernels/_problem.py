"""The static facts of one block-wise product, all that the choice of a kernel may depend on."""

from __future__ import annotations

import dataclasses

from jaxq.kernels._rows import Layout


@dataclasses.dataclass(frozen=True)
class Problem:
    """`y[e, m, n] = x[e, m, k] @ decode(w)[e, k, n]`, as kernels see it.

    Kernels get raw arrays:

    - x `[e, m, k]`: columns in the order in which codes lie in memory, so that x[..., j] meets code j.
    - data: codes, `[e, n, k * bits / 8]` as "rows" or `[e, k * bits / 8, n]` as "columns". At 4 bits uint8 with the
      first code in the low half of a byte, at 8 bits int8 or uint8. Signed integer codes are two's complement.
    - scale `[e, k / group, n]`, or None: `decode = scale * (codes - zero_point)`, or `scale * codebook[codes]`.
    - zero_point: integers like scale, or None.
    - codebook: float32 `[e, 16]`, or None.

    Attributes:
      e: stacked products: layers or experts; 1 for a single one.
      m: rows of x.
      k: contracted length, a multiple of group; padding stands for zeros of x.
      n: columns of the result.
      bits: width of a code, 4 or 8.
      signed: integer codes are two's complement.
      codebook: codes are places in a table of 16 numbers.
      group: codes that share a scale, k for one scale a column of the result.
      zero_point: there are zero points.
      layout: how codes lie.
      x_dtype: "bfloat16", "float16", "float32", or "int8", which meets integer codes in int32 sums.
      scale_dtype: of scale, or None: there are no scales and the result is the int32 sum.
      out_dtype: of the result; sums are float32 or int32 whatever it is.
    """

    e: int
    m: int
    k: int
    n: int
    bits: int
    signed: bool
    codebook: bool
    group: int
    zero_point: bool
    layout: Layout
    x_dtype: str
    scale_dtype: str | None
    out_dtype: str

    @property
    def num_groups(self) -> int:
        """Scales along k."""
        return self.k // self.group if self.group else 1

    @property
    def codes(self) -> str:
        """Name of what the codes are, as the tile table has it: "int4", "uint4", "codebook4", "int8", "uint8"."""
        kind = "codebook" if self.codebook else "int" if self.signed else "uint"
        return f"{kind}{self.bits}"
