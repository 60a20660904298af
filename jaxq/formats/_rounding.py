"""Rounding a real number to an integer, in the modes every format shares."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MODES = ("nearest_even", "nearest_away", "toward_zero", "stochastic")


def check_rounding(rounding: str, key: jax.Array | None) -> None:
    """Raises unless `rounding` is known and a key came exactly when it is stochastic."""
    if rounding not in MODES:
        raise ValueError(f"rounding must be one of {', '.join(MODES)}; got {rounding!r}.")
    if rounding == "stochastic" and key is None:
        raise ValueError("rounding='stochastic' needs a PRNG key: pass key=jax.random.key(seed).")
    if rounding != "stochastic" and key is not None:
        raise ValueError(
            f"key= was given but rounding={rounding!r} does not use it. Ask for rounding='stochastic' "
            "(in a QuantSpec: spec.replace(rounding='stochastic')), or drop the key."
        )


def round_to_integer(x: jax.Array, rounding: str, key: jax.Array | None = None) -> jax.Array:
    """`x` rounded to whole numbers, still float32; NaN and infinities pass through.

    Stochastic: `floor(x + u)` with u uniform in [0, 1), so the mean over keys is x (Gupta et al., 2015).
    """
    if rounding == "nearest_even":
        return jnp.round(x)
    if rounding == "nearest_away":
        # trunc(x + 0.5) would lift 0.49999997 to 1: the sum rounds. Compare the fraction, which is exact.
        whole = jnp.trunc(x)
        return whole + jnp.where(jnp.abs(x - whole) >= 0.5, jnp.sign(x), 0.0)
    if rounding == "toward_zero":
        return jnp.trunc(x)
    assert key is not None
    below = jnp.floor(x)
    return below + (jax.random.uniform(key, x.shape, x.dtype) < x - below).astype(x.dtype)
