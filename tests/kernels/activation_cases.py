"""Quantizations of rows for the kernels' tests."""

import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq.kernels._quantize_activation import ActivationCall
from jaxq.qtensor import ErrorContext, resolve


def activation_call(
    shape: tuple[int, ...], fmt: str, group: int | None, scale: str = "float32"
) -> ActivationCall:
    """The static facts of `quantize` along the last axis of an array of this shape."""
    granularity = jaxq.PerToken() if group is None else jaxq.PerGroup(group)
    spec = jaxq.QuantSpec(fmt, granularity, scale=scale)
    context = ErrorContext("test", "x", str(shape))
    geometry = resolve(shape, granularity, (-1,), (), context=context, multiple=1)
    return ActivationCall(spec, geometry)


def rows_of(shape: tuple[int, ...], dtype: str, seed: int = 0):
    """Rows of very different sizes, with zeros, NaN, infinities and huge numbers."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(2 * rng.normal(size=(*shape[:-1], 1)))
    flat = x.reshape(-1, shape[-1])
    if len(flat) > 4:
        flat[1] = 0
        flat[2, 3] = np.nan
        flat[3, 5] = -np.inf
        flat[4] *= 1e-6
    with np.errstate(over="ignore"):
        return jnp.asarray(x, dtype)
