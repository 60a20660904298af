"""The checks of `jax_debug_nans` and `jax_debug_infs`, and where they are switched off.

With these settings, jax raises an error if an operation returns a NaN or an infinity.
Some of jaxq's own steps return such numbers for valid input: a range without a number
yet is (inf, -inf), and a float8 format has codes of NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def allow_nonfinite() -> Iterator[None]:
    """Switches the checks off, for a `with` block or as the decorator of a function.

    It is for functions that check their own input and output. It does not change what a
    function returns, and no function compiles again.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxq.debug_checks import allow_nonfinite
      >>> with jax.debug_infs(True), allow_nonfinite():
      ...     jnp.full((1,), jnp.inf).tolist()
      [inf]
    """
    with jax.debug_nans(False), jax.debug_infs(False):
        yield
