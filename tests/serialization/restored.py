"""The comparison of a value that was read with the one that was written."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_restored(loaded, saved):
    """Equal structure, and leaves of equal type, dtype, shape and bits.

    A loaded array is a jax array, whatever the saved one was. NaN equals NaN.
    """
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    leaves = zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True)
    for value, expected in leaves:
        if not hasattr(expected, "dtype"):
            assert type(value) is type(expected)
            both_nan = value != value and expected != expected
            assert value == expected or both_nan
            continue
        assert isinstance(value, jax.Array)
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        assert _bytes(value) == _bytes(expected)


def _bytes(array) -> bytes:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array).tobytes()
