"""int8 codes of x times integer codes of a weight with Triton, for GPUs.

It serves activations with one scale per row, which the caller applies, and weights in
int8 with scales in groups (w8a8) or in int4 (w4a8). The program is that of
`_codes_triton`, without scales of x. The matrix unit multiplies int8 and accumulates in
int32.

The kernel has run in the interpreter and has been compiled for an H200. It has not been
timed on a device.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from jaxq.kernels import _codes_triton
from jaxq.kernels._codes_problem import CodesProblem
from jaxq.kernels._problem import Problem


def why_not(problem: Problem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can."""
    p = problem
    if p.x_dtype != "int8" or p.scale_dtype is None:
        return "it takes int8 x and weights with scales"
    if p.layout != "rows":
        return 'it reads codes in layout "rows", not "columns"'
    if not p.signed or p.codebook or p.zero_point:
        return f"it multiplies symmetric signed integers, not {p.codes}"
    if p.is_empty:
        return "the product is empty"
    if p.k % p.group:
        return f"the last group of {p.k} codes in groups of {p.group} is not full"
    if p.bits == 4 and p.unit != p.group:
        return "the codes of a group are not packed as one HALVES unit"
    return _codes_triton.why_not(_codes_problem(p), device_kind)


def default_tiles(problem: Problem, device_kind: str | None) -> dict[str, int]:
    """Returns the tiles of `_codes_triton`. They are estimated, not measured."""
    del device_kind
    return _codes_triton.default_tiles(_codes_problem(problem))


def matmul(
    x: jax.Array,
    data: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    codebook: jax.Array | None,
    *,
    problem: Problem,
    tiles: Mapping[str, int | str],
    index: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes `x @ decode(data)` as `Problem` states it.

    Args:
      x: int8 `[e, m, k]`.
      data: `[e, n, k * bits / 8]`.
      scale: `[e, n, num_groups]`.
      zero_point: None.
      codebook: None.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: the sizes of a program, as `default_tiles` returns them.
      index: int32 `[e]`, the matrix of `data` that each product reads. `data` then has
        any number of matrices. None means that product e reads matrix e.
      interpret: True to run on a CPU.

    Returns:
      `[e, m, n]` in `problem.out_dtype`.
    """
    assert zero_point is None
    assert codebook is None
    y = _codes_triton.matmul(
        x,
        None,
        data,
        scale,
        problem=_codes_problem(problem),
        tiles={name: int(size) for name, size in tiles.items()},
        index=index,
        interpret=interpret,
    )
    return y.astype(problem.out_dtype)


def _codes_problem(p: Problem) -> CodesProblem:
    b_codes = "int4" if p.bits == 4 else "int8"
    return CodesProblem(
        p.e,
        p.m,
        p.n,
        p.k,
        p.group,
        "int8",
        a_groups=0,
        b_groups=p.num_groups,
        b_codes=b_codes,
        stack=p.stack,
    )
