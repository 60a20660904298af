"""Random arrays, and comparisons of pytrees, for all tests.

Numbers come from numpy, so that no shape costs a compilation.
"""

from __future__ import annotations

import jax
import numpy as np


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    """Standard normal numbers, rounded to `dtype`."""
    numbers = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return jax.numpy.asarray(numbers.astype(dtype))


def normal_with_outliers(
    *shape: int, seed: int = 0, dtype: str = "float32"
) -> jax.Array:
    """As `normal`; the first two columns are five times as large."""
    numbers = np.random.default_rng([seed, *shape]).standard_normal(shape)
    numbers[..., :2] *= 5
    return jax.numpy.asarray(numbers.astype(dtype))


def heavy_tailed(
    *shape: int, seed: int = 0, degrees: int = 4, scale: float = 0.03
) -> np.ndarray:
    """Numbers with heavy tails, as weights have: Student's t, times `scale`."""
    numbers = np.random.default_rng(seed).standard_t(degrees, shape)
    return (scale * numbers).astype(np.float32)


def assert_same(actual, expected):
    """The two trees have equal treedefs, dtypes, shapes and bits; NaN equals NaN."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, value in jax.tree.leaves_with_path(actual):
        name = jax.tree_util.keystr(path)
        wanted = np.asarray(_at(expected, path))
        value = np.asarray(value)
        assert (value.dtype, value.shape) == (wanted.dtype, wanted.shape), name
        both_nan = (value != value) & (wanted != wanted)
        equal = _bits(value) == _bits(wanted)
        assert np.all(equal | both_nan), f"{name}: {np.sum(~(equal | both_nan))} differ"


def assert_close(actual, expected, tolerance: float = 1e-5):
    """Leaf by leaf, no number differs by more than `tolerance` of the largest one."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, value in jax.tree.leaves_with_path(actual):
        name = jax.tree_util.keystr(path)
        value = np.asarray(value, np.float64)
        wanted = np.asarray(_at(expected, path), np.float64)
        assert value.shape == wanted.shape, name
        bound = tolerance * np.max(np.abs(wanted), initial=0.0)
        error = np.max(np.abs(value - wanted), initial=0.0)
        assert error <= bound, f"{name}: differs by {error:.3g}, allowed {bound:.3g}"


def _at(tree, path):
    """The leaf of a tree at the path of another tree's leaf."""
    return dict(jax.tree.leaves_with_path(tree))[path]


def _bits(x: np.ndarray) -> np.ndarray:
    """Unsigned integers of the same bits; +0 and -0 differ."""
    if x.dtype.kind in "iub":
        return x
    return x.view(f"u{x.dtype.itemsize}")
