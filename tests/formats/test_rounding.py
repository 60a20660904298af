"""Random bits for stochastic rounding: uniform, from the index and the key only."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxq.formats import _rounding

N = 1 << 20


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_bits(key, shape, dtype="uint32"):
    return _rounding.random_bits(key, shape, np.dtype(dtype))


def centred(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64) / 2.0**32 - 0.5


def correlation(a, b) -> float:
    """The correlation, in standard deviations of that of independent numbers."""
    return float(np.mean(centred(a) * centred(b)) * 12 * np.sqrt(len(a)))


def test_every_bit_is_fair():
    x = np.asarray(random_bits(jax.random.key(0), (N,)))
    ones = np.array([((x >> i) & 1).mean() for i in range(32)])
    assert np.abs(ones - 0.5).max() < 4 / (2 * np.sqrt(N))
    # The low half decides how bfloat16 rounds. Its 65,536 values must be equally likely
    # (chi-squared test).
    counts = np.bincount(x & 0xFFFF, minlength=1 << 16)
    chi = np.sum((counts - N / 2**16) ** 2) / (N / 2**16)
    assert abs(chi - 65535) < 4 * np.sqrt(2 * 65535)


def test_neighbours_and_keys_are_uncorrelated():
    x = np.asarray(random_bits(jax.random.key(0), (N,)))
    for lag in (1, 2, 3, 16, 64, 1024, 65536):
        assert abs(correlation(x[lag:], x[:-lag])) < 4, lag
    for other in (
        jax.random.key(1),
        jax.random.fold_in(jax.random.key(0), 1),
        jax.random.PRNGKey(7),
    ):
        assert abs(correlation(x, random_bits(other, (N,)))) < 4
    many = jax.vmap(lambda key: random_bits(key, (2,)))(
        jax.random.split(jax.random.key(3), 1 << 14)
    )
    assert abs(np.mean(centred(many[:, 0]))) < 4 / np.sqrt(12 * (1 << 14))
    assert abs(correlation(many[:, 0], many[:, 1])) < 4


def test_bits_depend_on_key_and_index_only():
    key = jax.random.key(5)
    flat = random_bits(key, (24,))
    np.testing.assert_array_equal(random_bits(key, (2, 3, 4)).ravel(), flat)
    np.testing.assert_array_equal(random_bits(key, (6,)), flat[:6])
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    sharding = NamedSharding(mesh, P("d"))
    sharded = jax.jit(lambda: random_bits(key, (24,)), out_shardings=sharding)()
    np.testing.assert_array_equal(sharded, flat)
    assert random_bits(key, ()).shape == ()
    assert random_bits(key, (0, 3)).shape == (0, 3)


def test_uniform_numbers():
    uniform = jax.jit(lambda key: _rounding.random_uniform(key, (N,)))
    x = np.asarray(uniform(jax.random.key(0)))
    assert x.dtype == np.float32
    assert (x >= 0).all()
    assert (x < 1).all()
    assert abs(x.mean() - 0.5) < 4 / np.sqrt(12 * N)


def test_64_bits():
    with jax.enable_x64(True):
        x = np.asarray(random_bits(jax.random.key(0), (1 << 14,), "uint64"))
        assert x.dtype == np.uint64
        low = (x & np.uint64(2**32 - 1)).astype(np.uint32)
        high = (x >> np.uint64(32)).astype(np.uint32)
        assert abs(correlation(low, high)) < 4

        @jax.jit
        def rounded(x, key):
            return _rounding.round_to_float(
                x,
                mantissa_bits=7,
                min_exponent=-126,
                largest=1e30,
                rounding="stochastic",
                key=key,
            )

        many = rounded(np.full(1 << 14, 1 + 2.0**-9), jax.random.key(1))
        assert set(np.asarray(many).tolist()) == {1.0, 1 + 2.0**-7}
        assert abs(np.mean(np.asarray(many) > 1) - 0.25) < 0.02
