"""Arithmetic that rounds after every operation, in numpy float64: the sums here are exact before they are rounded."""

import numpy as np

# name: (mantissa bits, smallest exponent)
GRIDS = {
    "bfloat16": (7, -126),
    "float16": (10, -14),
    "float8_e4m3fn": (3, -6),
    "tfloat32": (10, -126),
}


def to_grid(x, mantissa_bits: int, min_exponent: int) -> np.ndarray:
    """`x` (float64) on the grid, ties to even, no upper end."""
    x = np.asarray(x, np.float64)
    exponent = np.frexp(x)[1] - 1
    unit = np.ldexp(1.0, np.maximum(exponent, min_exponent) - mantissa_bits)
    return np.rint(x / unit) * unit


def running_sum(terms, grid: tuple[int, int], chunk: int | None = None) -> np.ndarray:
    """The sum over the leading axis, rounded after each term; totals of chunks in float32."""
    terms = np.asarray(terms, np.float64)
    total = np.zeros(terms.shape[1:])
    for start in range(0, len(terms), chunk or len(terms) or 1):
        part = np.zeros(terms.shape[1:])
        for term in terms[start : start + (chunk or len(terms))]:
            part = to_grid(part + term, *grid)
        total = (
            part
            if chunk is None
            else (total.astype(np.float32) + part.astype(np.float32)).astype(np.float64)
        )
    return total
