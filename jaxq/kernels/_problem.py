"""The static facts of one product. The choice of a kernel depends on nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxq.kernels._rows import Layout

# The dtypes in which kernels read and write scales of codes.
KERNEL_SCALES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Problem:
    """`y[e, m, n] = x[e, m, k] @ decode(w)[e, k, n]`, as kernels see it.

    If `transposed` is True, it is the product of the backward pass:
    `y[e, m, k] = x[e, m, n] @ decode(w)[e, k, n]`, summed over n.

    A kernel gets these raw arrays:

    - x `[e, m, k]`. Its columns have the order of the codes in memory: x[..., j] is
      multiplied with code j. If `transposed`, x is `[e, m, n]`, and the columns of the
      result have the order of the codes in memory.
    - data, the codes: `[e, n, k * bits / 8]` in layout "rows", or
      `[e, k * bits / 8, n]` in layout "columns". 4-bit codes are uint8, with the first
      code in the low half of each byte. 8-bit codes are int8 or uint8. Signed integer
      codes are two's complement. A kernel may also get an index, int32 `[e]`. Then data
      is a stack of any number of matrices, and product i reads matrix `index[i]`.
    - scale `[e, num_groups, n]`, or None. Kernels in
      `_registry.READS_SCALES_AS_STORED` get `[e, n, num_groups]`. A weight is
      `scale * (codes - zero_point)`, or `scale * codebook[codes]`.
    - zero_point: integers with the shape of scale, or None.
    - codebook: float32 `[e, 16]`, or None.

    Attributes:
      e: number of stacked products (layers or experts), 1 for a single product.
      m: rows of x.
      k: length of a row of codes, as it is stored. It includes the padding of a last
        byte, where x is zero.
      n: number of rows of codes.
      bits: bits of a code, 4 or 8.
      signed: True if integer codes are two's complement.
      codebook: True if codes are indices into a table of 16 numbers.
      group: number of codes that share a scale. The last group may have fewer codes. k
        means one scale for each of the n rows of codes.
      zero_point: True if there are zero points.
      layout: order of the codes in memory, "rows" or "columns".
      x_dtype: "bfloat16", "float16", "float32", or "int8". int8 x is multiplied with
        integer codes and accumulates in int32.
      scale_dtype: dtype of scale. None means that there are no scales and that the
        result is the int32 sum.
      out_dtype: dtype of the result. Sums are float32 or int32 for every out_dtype.
      unit: number of codes in a HALVES unit, for 4-bit codes in that packing. Byte j of
        a unit has codes j and j + unit / 2, and all codes of a unit share a scale. The
        codes beyond the last whole unit are a shorter unit. None means that byte j of a
        row has codes 2 * j and 2 * j + 1. Only kernels in `_registry.READS_UNITS` use
        it. They get the columns of x in the order of the codes.
      x_codes: the format of the codes in x, or None if x is not made of codes.
        `x_dtype` is then bfloat16, which holds these codes: float8, or int8 in the
        family "ragged". A kernel multiplies them by integer codes without rounding, and
        scales the sums.
      stack: number of matrices in data if the kernel gets an index, else None.

    Example:
      >>> from jaxq.kernels import Problem, choose
      >>> problem = Problem(e=1, m=16, k=4096, n=4096, bits=4, signed=True,
      ...                   codebook=False, group=128, zero_point=False, layout="rows",
      ...                   x_dtype="bfloat16", scale_dtype="bfloat16",
      ...                   out_dtype="bfloat16")
      >>> problem.codes, problem.num_groups
      ('int4', 32)
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
    unit: int | None = None
    transposed: bool = False
    x_codes: str | None = None
    stack: int | None = None

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to compute."""
        return 0 in (self.e, self.m, self.n, self.k)

    @property
    def num_groups(self) -> int:
        """Number of scales along k."""
        return -(-self.k // self.group) if self.group else 1

    @property
    def num_matrices(self) -> int:
        """Number of matrices in data."""
        return self.e if self.stack is None else self.stack

    @property
    def is_exact(self) -> bool:
        """True if products of codes must not be rounded: scales multiply the sums."""
        return self.x_codes is not None

    @property
    def codes(self) -> str:
        """The kind of codes as the tile table names it, such as "int4", "codebook4"."""
        if self.codebook:
            return f"codebook{self.bits}"
        return f"int{self.bits}" if self.signed else f"uint{self.bits}"


# The reason why no kernel runs if a shape is symbolic.
SYMBOLIC = "its shapes are symbolic, and a kernel needs static shapes"


def why_not_static(*arrays: Any) -> str | None:
    """Returns why no kernel runs if a shape is symbolic, as `jax.export` allows.

    Args:
      *arrays: arrays or abstract values. None is ignored.
    """
    shapes = [array.shape for array in arrays if array is not None]
    if all(isinstance(size, int) for shape in shapes for size in shape):
        return None
    return SYMBOLIC
