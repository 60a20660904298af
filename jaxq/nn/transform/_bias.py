"""Bias correction of one layer: what its quantized weight misses on average.

References:
  Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
  Correction", 2019, section 4.2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxq import methods
from jaxq.nn.transform._weight import as_matrix
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, dequantize


def corrected_bias(
    bias: jax.Array,
    floats: jax.Array,
    qt: QTensor,
    stats: LayerStats,
    fallback: str,
    name: str,
) -> tuple[jax.Array, str]:
    """A layer's bias plus the mean output that its quantized weight misses.

    If the correction increases the error on held-out inputs, the bias stays.

    Args:
      bias: `[*batch, *kept]`.
      floats: the weight.
      qt: the quantized weight.
      stats: of the layer's inputs.
      fallback: "rtn" keeps the bias if the correction does worse, "none" corrects it
        anyway, "raise" raises.
      name: what errors call the weight.

    Returns:
      (the bias, a note for the report).
    """
    rounded = dequantize(qt.with_activation(None), dtype=jnp.float32)
    w, w_hat = as_matrix(qt, floats), as_matrix(qt, rounded)  # [*batch, in, out]
    shift = methods.bias_correction(w, w_hat, stats.mean)  # [*batch, out]
    missing = jnp.matmul(
        stats.held_out,
        w.astype(jnp.float32) - w_hat,
        precision=jax.lax.Precision.HIGHEST,
    )  # [*batch, rows, out]
    # Rows that hold no data are zeros; the correction must not be counted there.
    is_filled = (stats.held_out_ranks >= 0)[..., None]
    corrected = jnp.where(is_filled, missing - shift[..., None, :], 0.0)
    after, before = jnp.sum(corrected**2), jnp.sum(missing**2)
    if bool(after > before) and fallback != "none":
        ratio = float(after / before)
        reason = (
            "bias correction does worse on held-out inputs "
            f"({ratio:.3g} times the error)"
        )
        if fallback == "raise":
            raise ValueError(f"{name}: {reason}. Pass fallback='rtn' or 'none'.")
        return bias, f"{reason}, so the bias stays"
    shifted = bias.astype(jnp.float32) + shift.reshape(bias.shape)
    few_rows = methods.few_tokens(stats, w.shape[-2])
    notes = [note for note in ("bias corrected", few_rows) if note]
    return shifted.astype(bias.dtype), "; ".join(notes)
