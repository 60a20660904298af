"""The static facts of one attention over quantized groups of a KV cache."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """The part of attention that reads quantized groups, as kernels see it.

    Each group has `rows` rows of h bytes. With 8-bit codes a row is one token. With
    4-bit codes a row holds tokens i and i + rows:

    - keys `[b, m, groups, rows, h]`: byte c of row i has channel c of token i in its
      low half, and of token i + rows in its high half.
    - values `[b, m, groups, rows, h]`: the first h / 2 bytes of row i are token i, and
      the others are token i + rows. Byte c of a token has channel c in its low half,
      and channel c + h / 2 in its high half.

    Codes are two's complement. The other arrays are

    - key scales `[b, m, groups, h]`: tokens of a group share them.
    - value scales `[b, m, groups, rows, tokens per row]`.
    - queries `[b, m, n, h]`.

    Attributes:
      b: number of slots.
      m: number of key heads.
      n: number of queries that read one key head: query heads times tokens.
      h: size of a head.
      groups: number of places for groups.
      group: number of tokens of a group.
      bits: bits of a code, 4 or 8.
      dtype: dtype of queries, and of keys and values after decoding.
      scale: scores are multiplied by this number.
      window: the largest number of tokens that a query reads, or None.
    """

    b: int
    m: int
    n: int
    h: int
    groups: int
    group: int
    bits: int
    dtype: str
    scale: float
    window: int | None

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to compute."""
        return 0 in (self.b, self.m, self.n, self.h, self.groups)

    @property
    def parts(self) -> int:
        """Number of tokens in a row."""
        return 8 // self.bits

    @property
    def rows(self) -> int:
        """Number of rows of a group."""
        return self.group // self.parts
