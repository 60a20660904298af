"""Gradients of products whose activations are quantized on the fly."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxq.qtensor import QTensor, with_margin


def straight_through(
    dx: jax.Array,
    dweight: QTensor,
    x: jax.Array,
    weight: QTensor,
    ends: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, QTensor]:
    """What passes back through rounding: everything, but for numbers that a known range has clipped.

    Args:
      dx, dweight: gradients of the product of `x` as it is and `weight` without its activation.
      x: activations, before they are quantized.
      weight: with its activation.
      ends: (low, high) of the known range, which broadcast to `x`; None where `weight` has none.

    Returns:
      Gradients of `x` and of `weight`, as a custom derivative must give them.
    """
    if ends is None:
        return dx, dataclasses.replace(dweight, meta=weight.meta)
    assert weight.input_range is not None
    low, high = with_margin(*ends, weight.meta.activation)
    dx = jnp.where((low <= x) & (x <= high), dx, jnp.zeros((), dx.dtype))
    return dx, dataclasses.replace(
        dweight, meta=weight.meta, input_range=jnp.zeros_like(weight.input_range)
    )
