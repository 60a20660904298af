"""Bias correction: what quantization shifts on average, given back through the layer's bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.methods import _matrix
from jaxq.qtensor import QTensor, dequantize


def bias_correction(
    w: jax.typing.ArrayLike,
    qt: QTensor | jax.typing.ArrayLike,
    x_mean: jax.typing.ArrayLike,
    *,
    x_mean_quantized: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """The mean by which a quantized layer's output falls short: `E[x] w - E[x_q] w_q`.

    Added to the bias, it gives the quantized layer the mean output of the original one, on the data of `x_mean`.

    Args:
      w: float `[in, out]`, or a stack of such matrices with axes in front.
      qt: QTensor of that shape, or its dequantized values.
      x_mean: float `[in]` (or stacked like w), the mean input of the layer in the original model.
      x_mean_quantized: float `[in]`, its mean input in the quantized model, where layers before it have changed it;
        None takes `x_mean`, which corrects the error of `w` alone.

    Returns:
      float32 `[..., out]`, what to add to the bias.

    Raises:
      TypeError: not float arrays.
      ValueError: shapes that do not meet; non-finite numbers.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq.methods import bias_correction
      >>> w = jnp.array([[0.26], [1.27]])
      >>> bias_correction(w, jaxq.quantize(w, "int8"), jnp.array([1.0, 0.0])).shape
      (1,)

    References:
      Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2
      (here with the empirical mean, appendix D).
    """
    w = _matrix.as_weight(w, "bias_correction")
    if not isinstance(qt, QTensor):
        qt = _matrix.as_weight(qt, "bias_correction", "qt")
    if qt.shape != w.shape:
        raise ValueError(
            f"bias_correction: shapes differ: w is {_matrix.describe(w)}, qt is {qt!r}."
        )
    statistics = []
    for name, mean in (("x_mean", x_mean), ("x_mean_quantized", x_mean_quantized)):
        if mean is not None:
            said = "one mean for each input"
            mean = _matrix.as_statistic(
                mean, name, "bias_correction", shape=w.shape[-2:-1], said=said, w=w
            )
            statistics.append(mean)
    return _bias_correction(
        w, qt.with_activation(None) if isinstance(qt, QTensor) else qt, *statistics
    )


@jax.jit
def _bias_correction(
    w: jax.Array,
    qt: QTensor | jax.Array,
    before: jax.Array,
    after: jax.Array | None = None,
) -> jax.Array:
    w_hat = (
        dequantize(qt, dtype=jnp.float32)
        if isinstance(qt, QTensor)
        else qt.astype(jnp.float32)
    )
    w = w.astype(jnp.float32)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        # HIGHEST: matrix units would otherwise read bfloat16.
        return jnp.einsum("...i,...io->...o", x, w, precision=lax.Precision.HIGHEST)

    shift = product(before, w - w_hat)  # [..., out]; the small difference first
    return shift if after is None else shift + product(before - after, w_hat)
