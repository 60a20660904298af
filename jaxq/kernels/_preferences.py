"""When plain XLA is expected to be faster than a kernel that could run.

All numbers are estimates: no device has been measured yet.
"""

from __future__ import annotations

from typing import Any

from jaxq.kernels._codes_problem import CodesProblem
from jaxq.kernels._problem import Problem
from jaxq.kernels._registry import Family

# Number of rows of x from which the whole weight is decoded and multiplied densely. A
# GPU kernel decodes its weights again for every 64 to 256 rows of x. From some number
# of rows on, computing should take longer than reading the decoded weight.
_DENSE_FROM = {"mosaic_gpu": 512, "triton": 512, "triton_transposed": 512}
# Triton looks up a number of a codebook by 15 selects, so a weight takes 16 integer
# instructions (counted by `benchmarks/sass.py`). With more than 64 rows each weight is
# decoded at least twice. This is predicted to take longer than to write the decoded
# weight and read it again.
_DENSE_FROM_OF_CODEBOOKS = {"triton": 65, "triton_transposed": 65}
# On a GPU, XLA multiplies every row by the weights of all experts and keeps one result.
# If there are few experts and each has many rows, this is still expected to take less
# time than a kernel that decodes each weight again for every 64 rows.
_DENSE_FROM_ROWS_OF_EXPERT = 512
_MOST_DENSE_EXPERTS = 2


def why_native(problem: Any, platform: str, family: Family) -> str | None:
    """Returns why XLA multiplies the codes natively, or None if it does not.

    Args:
      problem: a problem of the family.
      platform: "tpu" or "cuda".
      family: the family of kernels.
    """
    if isinstance(problem, CodesProblem) and problem.num_groups == 1:
        return "there is one scale for each row, and XLA multiplies such codes natively"
    if platform != "cuda" or family != "product":
        return None
    assert isinstance(problem, Problem)
    if (problem.x_dtype, problem.bits, problem.num_groups) == ("int8", 8, 1):
        return "XLA has its own int8 product for int8 x and 8-bit codes"
    return None


def why_dense(problem: Any, kernel: str) -> str | None:
    """Returns why XLA decodes the whole weight first, or None if it does not.

    Args:
      problem: a problem that the kernel accepts.
      kernel: name of the kernel.
    """
    if kernel == "ragged_triton":
        return _why_dense_experts(problem)
    dense_from = _DENSE_FROM.get(kernel)
    if isinstance(problem, Problem) and problem.codebook:
        dense_from = _DENSE_FROM_OF_CODEBOOKS.get(kernel, dense_from)
    if dense_from is None or problem.m < dense_from or _has_exact_groups(problem):
        return None
    return (
        f"with {dense_from} or more rows of x, the weight is decoded once and "
        "multiplied densely"
    )


def _has_exact_groups(problem: Any) -> bool:
    """True for float8 codes of x with scales of the weight in groups.

    The kernel runs for any number of rows of such a product. XLA would multiply one
    group after the other, and write and read the sums of each group.
    """
    if not isinstance(problem, Problem):
        return False
    return problem.is_exact and problem.num_groups > 1


def _why_dense_experts(problem: Problem) -> str | None:
    many_rows = problem.m >= _DENSE_FROM_ROWS_OF_EXPERT * problem.e
    if not many_rows or problem.e > _MOST_DENSE_EXPERTS:
        return None
    return (
        f"with {_MOST_DENSE_EXPERTS} or fewer experts and {_DENSE_FROM_ROWS_OF_EXPERT} "
        "or more rows of x for each, the weights are decoded once and multiplied "
        "densely (estimated)"
    )
