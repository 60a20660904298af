"""Bias correction: adds the mean output error of a quantized weight to the bias.

References:
  Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
  Correction", 2019, section 4.2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxq import methods
from jaxq.nn.report import element_names
from jaxq.nn.transform._weight import as_matrix
from jaxq.observers import LayerStats
from jaxq.processes import to_numpy
from jaxq.qtensor import QTensor, dequantize


def corrected_bias(
    bias: jax.Array,
    floats: jax.Array,
    qt: QTensor,
    stats: LayerStats,
    fallback: str,
    name: str,
) -> tuple[jax.Array, str]:
    """Adds the mean error of a layer's output, caused by rounding, to its bias.

    If the correction increases the error on held-out inputs, the bias stays.

    Args:
      bias: `[*batch, *kept]`.
      floats: the float weight, of the shape of `qt`.
      qt: the quantized weight.
      stats: statistics of the layer's inputs.
      fallback: what to do if the correction increases the error. "rtn" keeps the bias,
        "none" corrects it anyway, "raise" raises an error.
      name: the name of the weight in errors.

    Returns:
      (the bias, a note for the report).

    Raises:
      ValueError: `fallback` is "raise" and the correction increases the error on
        held-out inputs.
    """
    rounded = dequantize(qt.with_activation(None), dtype=jnp.float32)
    w, w_hat = as_matrix(qt, floats), as_matrix(qt, rounded)  # [*batch, in, out]
    shift = methods.bias_correction(w, w_hat, stats.mean)  # [*batch, out]
    missing = jnp.matmul(
        stats.held_out,
        w.astype(jnp.float32) - w_hat,
        precision=jax.lax.Precision.HIGHEST,
    )  # [*batch, rows, out]
    # Unused rows of `held_out` are zeros. The correction must not count as an error
    # there.
    is_filled = (stats.held_out_ranks >= 0)[..., None]
    corrected = jnp.where(is_filled, missing - shift[..., None, :], 0.0)
    after, before = jnp.sum(corrected**2), jnp.sum(missing**2)
    is_worse = bool(after > before)
    if is_worse:
        ratio = float(after / before)
        reason = (
            "bias correction increases the error on held-out inputs "
            f"({ratio:.3g} times the error without it)"
        )
        remedy = "Pass fallback='rtn' to keep the bias, or 'none' to correct it anyway."
        if methods.falls_back(fallback, f"{name}: {reason}", remedy):
            return bias, f"{reason}, so the bias stays"
    shifted = bias.astype(jnp.float32) + shift.reshape(bias.shape)
    notes = ["bias corrected"]
    is_unreached = to_numpy(stats.count) == 0
    if is_unreached.any():
        names = element_names(is_unreached)
        notes[0] += f", but not for element {names}, which no calibration row reached"
    else:
        notes.append(methods.few_tokens(stats, w.shape[-2]))
    return shifted.astype(bias.dtype), methods.join_notes(*notes)
