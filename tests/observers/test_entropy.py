"""The thresholds of `entropy` against an oracle that follows TensorRT's steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import formats, observers
from jaxq.observers import _entropy, _numbers
from jaxq.observers._observer import RangeKind
from tests.observers import oracle
from tests.tables import thinned

BINS = 64
SIZE = 12000


def data() -> np.ndarray:
    """Rows with and without outliers, gaps and repeated numbers."""
    random = np.random.default_rng(0)
    rows = [
        random.standard_normal(SIZE),
        random.laplace(size=SIZE) * 1e-20,
        np.where(np.arange(SIZE) < 2, 40.0, random.standard_normal(SIZE)),
        random.uniform(-1, 1, SIZE),
        np.where(
            random.uniform(size=SIZE) < 0.5, 0.0, np.abs(random.standard_normal(SIZE))
        ),
        random.integers(-9, 10, SIZE) * 1e30,
        np.full(SIZE, -3.3),
    ]
    return np.stack(rows).astype(np.float32)


CASES = [
    ("int4", True),
    ("uint4", True),
    ("uint4", False),
    ("int8", True),
    ("int8", False),
]


@pytest.mark.parametrize(
    ("name", "symmetric"), thinned(CASES, [("int4", True), ("uint4", False)])
)
def test_thresholds(name, symmetric):
    x, fmt = data(), formats.get(name)
    bins = BINS if fmt.bits == 4 else 512
    obs = observers.entropy(bins, axis=0)
    state = obs.update(obs.init(x), x)
    low, high = (np.asarray(b) for b in obs.bounds(state, name, symmetric=symmetric))
    threshold = np.maximum(-low, high)
    expected = np.float32(
        [oracle.entropy_threshold(row, bins, fmt, symmetric) for row in x]
    )
    np.testing.assert_array_equal(threshold, expected)
    # Without a clipped row this test would say little.
    assert (threshold < np.abs(x).max(axis=1)).any()
    if not symmetric:
        np.testing.assert_array_equal(
            low, np.maximum(np.minimum(x.min(axis=1), 0), -expected)
        )
        np.testing.assert_array_equal(
            high, np.minimum(np.maximum(x.max(axis=1), 0), expected)
        )
    bounds = obs.bounds_of(x, name, symmetric=symmetric)
    np.testing.assert_array_equal(np.stack(bounds), np.stack([low, high]))


def test_numbers_of_levels():
    int8, uint4 = formats.get("int8"), formats.get("uint4")
    assert oracle.entropy_levels(int8, True, 9, 9) == 128
    assert oracle.entropy_levels(uint4, True, 9, 0) == 16
    # Codes with a zero point: all codes for one side, or half of them for each.
    assert [
        oracle.entropy_levels(uint4, False, *reach)
        for reach in ((9, 0), (0, 9), (9, 9))
    ] == [16, 16, 8]
    symmetric, asymmetric = RangeKind.SYMMETRIC, RangeKind.WITH_ZERO
    assert _entropy._num_levels_range(int8, symmetric) == (128, 128)
    assert _entropy._num_levels_range(uint4, symmetric) == (16, 16)
    assert _entropy._num_levels_range(uint4, asymmetric) == (8, 16)
    assert _entropy._num_levels_range(int8, asymmetric) == (128, 256)


def test_the_best_bin_is_the_oracles():
    # 16 bins and 4 levels, as in the published example, with gaps and counts beyond.
    h = np.array([90, 60, 41, 30, 22, 14, 9, 0, 4, 3, 1, 2, 0, 0, 0, 1], np.uint32)
    h[0] = 0  # the first bin does not count, whatever it has
    divergences = [
        oracle.entropy_divergence(h, i, 4) if i >= 4 else np.inf for i in range(17)
    ]
    both = np.stack([h, np.zeros_like(h)])
    both[:, 0] = [90, 7]
    search = jax.jit(
        functools.partial(
            _entropy.best_bin,
            fmt=formats.get("int3"),
            range_kind=RangeKind.SYMMETRIC,
        )
    )
    best, used = search(_numbers.as_count(jnp.asarray(both)))
    assert (int(best), int(used)) == (int(np.argmin(divergences)), 16)
    # Bin 13 is empty, and there are counts beyond it.
    assert np.isinf(divergences[13])
    # Counts that are 2^33 times as large give the same bin.
    many = _numbers.Count(jnp.zeros((2, 16), jnp.uint32), jnp.asarray(both * 2))
    assert int(search(many)[0]) == int(best)


def test_numbers_without_loss_are_not_clipped():
    search = jax.jit(
        functools.partial(
            _entropy.best_bin,
            fmt=formats.get("int4"),
            range_kind=RangeKind.SYMMETRIC,
        )
    )
    for h in (np.full(16, 5), np.zeros(16), np.repeat([3, 0], 8)):
        both = np.stack([h, np.zeros_like(h)]).astype(np.uint32)
        best, used = search(_numbers.as_count(jnp.asarray(both)))
        assert int(best) >= int(used)


def test_a_full_bin_does_not_hide_the_other_numbers():
    # Normalized images of digits: four fifths are the background, -0.4242. If the
    # threshold were this number, its divergence would be close to 0.
    random = np.random.default_rng(0)
    is_background = random.uniform(size=SIZE) < 0.8
    x = np.where(is_background, -0.4242, random.uniform(-0.4242, 2.82, SIZE))
    for name, levels in (("int8", 128), ("int4", 8)):
        threshold = float(observers.entropy().bounds_of(np.float32(x), name)[1])
        left_out = np.mean(np.abs(x) > threshold)
        assert left_out <= 1 / 32 / levels
        assert threshold > 2.5


def test_levels_need_bins():
    with pytest.raises(
        ValueError, match="int8 has more levels than the histogram has bins, 64"
    ):
        observers.entropy(64).bounds_of(np.ones(3, np.float32), "int8")
