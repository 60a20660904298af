"""The errors of a quantized weight that a report shows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import metrics
from jaxq.qtensor import Geometry, QTensor, dequantize, inside_range

# The number of adjacent elements in one block of the "worst block" error.
_BLOCK = 64


def quantization_errors(
    floats: jax.Array, qt: QTensor
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Measures a quantized weight.

    Args:
      floats: the float weight.
      qt: the quantized weight.

    Returns:
      SQNR in dB; the largest relative error of a block of 64 numbers along the
      contracted axis; the share of numbers that were clipped.
    """
    # One after the other, so that little more than one dequantized weight is in memory.
    clipped = _clipped_share(floats, qt)
    back = dequantize(qt.with_activation(None), dtype=jnp.float32)
    sqnr, worst_block = _errors_of(floats, back, qt.meta.geometry)
    return sqnr, worst_block, clipped


@jax.jit
def _clipped_share(floats: jax.Array, qt: QTensor) -> jax.Array:
    """The share of numbers outside the range that the format covers at their scale."""
    # Nothing is clipped if the weight has its own codebook.
    if qt.codebook is not None or not floats.size:
        return jnp.float32(0)
    return jnp.mean(~inside_range(floats, qt), dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames="geometry")
def _errors_of(
    floats: jax.Array, back: jax.Array, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    """SQNR in dB, and the relative error of the worst block.

    The arrays are measured in up to 16 parts, one after another. Only one part is
    converted to float32 at a time.
    """
    view, back_view = geometry.to_view(floats), geometry.to_view(back)
    axis = geometry.k_position - len(geometry.storage_shape)
    # Parts are cut along axis 0. If blocks run along axis 0, a part has whole blocks.
    unit = _BLOCK if axis + view.ndim == 0 else 1
    num_parts = next(
        n for n in (16, 8, 4, 2, 1) if view.shape[0] % (n * unit) == 0 or n == 1
    )

    def errors_of_part(pair: tuple[jax.Array, jax.Array]) -> tuple:
        w, w_hat = (part.astype(jnp.float32) for part in pair)
        return (
            metrics.squares(w),
            metrics.squares(w - w_hat),
            metrics.worst_block(w, w_hat, size=_BLOCK, axis=axis),
        )

    parts = tuple(
        a.reshape(num_parts, -1, *a.shape[1:]) if a.size else a[None]
        for a in (view, back_view)
    )  # each [num_parts, ...]
    signal, noise, worst = jax.lax.map(errors_of_part, parts)
    sqnr = metrics.decibels(_total(*signal), _total(*noise))
    # A block with NaN is the worst block, but a maximum may ignore NaN.
    is_lost = jnp.isnan(worst).any()
    return sqnr, jnp.where(is_lost, np.float32(np.nan), jnp.max(worst))


def _total(sums: jax.Array, units: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum over all parts, as `metrics.squares` returns it: (sum, unit).

    The sum of the squares of a part is `sum * unit**2`. All sums are converted to the
    largest unit, so that no square overflows.
    """
    unit = jnp.max(units)
    return jnp.sum(sums * (units / unit) ** 2), unit
