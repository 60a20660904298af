"""Sums that round after every addition, in numpy float64.

Each sum of two numbers is exact in float64 before it is rounded.
"""

import numpy as np

# name: (mantissa bits, smallest exponent)
GRIDS = {
    "bfloat16": (7, -126),
    "float16": (10, -14),
    "float8_e4m3fn": (3, -6),
    "tfloat32": (10, -126),
}


def to_grid(x, mantissa_bits: int, min_exponent: int) -> np.ndarray:
    """`x` (float64) rounded to a grid without largest number, ties to even."""
    x = np.asarray(x, np.float64)
    exponent = np.frexp(x)[1] - 1
    unit = np.ldexp(1.0, np.maximum(exponent, min_exponent) - mantissa_bits)
    return np.rint(x / unit) * unit


def running_sum(terms, grid: tuple[int, int], chunk: int | None = None) -> np.ndarray:
    """The sum over the leading axis, rounded after each term.

    With `chunk`, each chunk has its own rounded sum. The sums of chunks are added in
    float32.
    """
    terms = np.asarray(terms, np.float64)
    total = np.zeros(terms.shape[1:])
    for start in range(0, len(terms), chunk or len(terms) or 1):
        part = np.zeros(terms.shape[1:])
        for term in terms[start : start + (chunk or len(terms))]:
            part = to_grid(part + term, *grid)
        if chunk is None:
            return part
        total = total.astype(np.float32) + part.astype(np.float32)
        total = total.astype(np.float64)
    return total
