"""The range of `mse`: no worse than the extremes, and close to the best candidate."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import formats, observers
from tests.observers import oracle
from tests.tables import thinned

SIZE = 400
NORMAL = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
DATA = {
    "normal": NORMAL,
    "outlier": np.concatenate([NORMAL[1:], np.float32([30])]),
    "heavy": np.random.default_rng(1).laplace(size=SIZE).astype(np.float32) ** 3,
    "positive": np.abs(NORMAL) + 1,
}
X = np.stack(list(DATA.values()))
FORMATS = [
    "int4",
    "nf4",
    "float8_e4m3fn",
    "ternary",
    "int8",
    "float4_e2m1fn",
    "uint4",
    "af4",
    "binary",
]
FACTORS = 1 - np.arange(100) / 100


def candidates(x, fmt, symmetric, power):
    """The error of every candidate range of one row."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    if symmetric:
        high = np.abs(x).max()
        low = -high
    ends = [(low * f, high * f) for f in FACTORS]
    return np.array(
        [oracle.quantization_error(x, a, b, fmt, symmetric, power) for a, b in ends]
    )


@pytest.mark.parametrize(
    ("name", "symmetric", "power"),
    thinned(
        [
            *((name, True, 2.0) for name in FORMATS),
            ("int4", False, 2.0),
            ("uint8", False, 2.0),
            ("int4", True, 2.4),
        ],
        [("nf4", True, 2.0), ("int4", False, 2.0), ("int4", True, 2.4)],
    ),
)
def test_the_best_of_all_candidates(name, symmetric, power):
    fmt, obs = formats.get(name), observers.mse(power, axis=0)
    exact = np.asarray(obs.bounds_of(X, fmt, symmetric=symmetric), np.float64)
    streamed = np.asarray(
        obs.bounds(obs.update(obs.init(X), X), fmt, symmetric=symmetric), np.float64
    )
    for i, x in enumerate(X):
        errors = candidates(x, fmt, symmetric, power)
        # float32 sums may choose another one of nearly equal candidates.
        error = oracle.quantization_error(
            x, exact[0, i], exact[1, i], fmt, symmetric, power
        )
        assert error <= errors.min() * (1 + 1e-3)
        assert error <= errors[0] * (1 + 1e-6)
        # A histogram knows only the bin of each number.
        error = oracle.quantization_error(
            x, streamed[0, i], streamed[1, i], fmt, symmetric, power
        )
        assert error <= errors.min() * 1.1
        assert error <= errors[0] * 1.02


def test_the_format_decides():
    obs = observers.mse(axis=0)
    state = obs.update(obs.init(X), X)
    int4, int8 = (np.asarray(obs.bounds(state, fmt)[1]) for fmt in ("int4", "int8"))
    assert int4[0] < int8[0]  # with fewer levels more is clipped


@pytest.mark.heavy
def test_shrink_limits_the_candidates():
    obs = observers.mse(2.4, grid=80, shrink=0.8)
    x = np.concatenate([NORMAL, np.float32([1e4])])
    # With the power 2.4 the outlier decides.
    assert float(obs.bounds_of(x, "int4")[1]) >= 0.2 * 1e4 * (1 - 1e-6)


def test_arguments_are_checked():
    for arguments in (
        {"power": 0},
        {"grid": 0},
        {"grid": 2.5},
        {"shrink": 0},
        {"shrink": 1.5},
    ):
        with pytest.raises(ValueError, match=f"mse: {next(iter(arguments))} must be"):
            observers.mse(**arguments)
    obs, x = observers.mse(), np.ones(3, np.float32)
    with pytest.raises(ValueError, match="float32 has 32 bits, and mse takes"):
        obs.bounds_of(x, "float32")
    with pytest.raises(
        ValueError,
        match="symmetric=False is for codes with a zero point or an offset",
    ):
        obs.bounds_of(x, "nf4", symmetric=False)
    with pytest.raises(ValueError, match="int1 has no positive numbers"):
        obs.bounds_of(x, "int1")


@pytest.mark.parametrize("fmt", ["uint4", "uint8"])
@pytest.mark.parametrize("centre", [1e6, 4e6])
def test_a_range_far_from_zero_does_not_collapse(fmt, centre):
    """Smaller ranges may have equal ends in float32."""
    x = jnp.asarray(centre + np.random.default_rng(0).uniform(-1, 1, 256), jnp.float32)
    observer = jaxq.observers.mse()
    state = observer.update(observer.init(x), x)
    how = {"symmetric": False, "include_zero": False}
    for low, high in (
        observer.bounds_of(x, fmt, **how),
        observer.bounds(state, fmt, **how),
    ):
        assert high - low >= 0.8 * (x.max() - x.min())
    spec = jaxq.QuantSpec(fmt, jaxq.PerTensor(), offset="min")
    errors = [
        float(jaxq.metrics.mse(x, jaxq.dequantize(jaxq.quantize(x, each))))
        for each in (spec, spec.replace(clipping=observer))
    ]
    assert errors[1] <= 1.1 * errors[0]
