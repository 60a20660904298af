"""Bias correction: the layer's bias compensates the mean error of its weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.methods import _matrix
from jaxq.methods._explicit_axes import on_explicit_axes
from jaxq.qtensor import QTensor, dequantize


@on_explicit_axes
def bias_correction(
    w: jax.typing.ArrayLike,
    qt: QTensor | jax.typing.ArrayLike,
    x_mean: jax.typing.ArrayLike,
    *,
    x_mean_quantized: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Returns the mean error of a layer's output: `E[x] w - E[x_q] w_q`.

    Add it to the bias. Then the quantized layer has the same mean output as the
    original layer, on the data of `x_mean`.

    Args:
      w: float `[in, out]`, or a stack of such matrices with axes in front.
      qt: QTensor of that shape, or its dequantized values.
      x_mean: float `[in]` (or stacked like w), the mean input of the layer in the
        original model.
      x_mean_quantized: float `[in]` (or stacked like w), the mean input of the layer in
        the quantized model, in which the layers before are quantized as well. None
        takes `x_mean`, and corrects the error of `w` only.

    Returns:
      float32 `[..., out]`, to be added to the bias.

    Raises:
      TypeError: an argument is not a float array.
      ValueError: shapes do not match, or (outside jit) a number is not finite.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq.methods import bias_correction
      >>> w = jnp.array([[0.26], [1.27]])
      >>> bias_correction(w, jaxq.quantize(w, "int8"), jnp.array([1.0, 0.0])).shape
      (1,)

    References:
      Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
      Correction", 2019, section 4.2 (here with the empirical mean, appendix D).
    """
    w = _matrix.as_weight(w, "bias_correction")
    if not isinstance(qt, QTensor):
        qt = _matrix.as_weight(qt, "bias_correction", "qt")
    if qt.shape != w.shape:
        raise ValueError(
            "bias_correction: qt must have the shape of w, got w: "
            f"{_matrix.dtype_and_shape(w)}, qt: {qt!r}."
        )
    means = []
    for name, mean in (("x_mean", x_mean), ("x_mean_quantized", x_mean_quantized)):
        if mean is not None:
            mean = _matrix.as_statistic(
                mean,
                name,
                "bias_correction",
                shape=w.shape[-2:-1],
                meaning="one mean for each input",
                w=w,
            )
            means.append(mean)
    if isinstance(qt, QTensor):
        qt = qt.with_activation(None)
    return _bias_correction(w, qt, *means)


@jax.jit
def _bias_correction(
    w: jax.Array,
    qt: QTensor | jax.Array,
    x_mean: jax.Array,
    x_mean_quantized: jax.Array | None = None,
) -> jax.Array:
    if isinstance(qt, QTensor):
        w_hat = dequantize(qt, dtype=jnp.float32)
    else:
        w_hat = qt.astype(jnp.float32)
    w = w.astype(jnp.float32)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        # HIGHEST: matrix units would otherwise read bfloat16.
        return jnp.einsum("...i,...io->...o", x, w, precision=lax.Precision.HIGHEST)

    # The small difference of weights comes first. The difference of the two large
    # products would lose most of its digits.
    shift = product(x_mean, w - w_hat)  # [..., out]
    if x_mean_quantized is None:
        return shift
    return shift + product(x_mean - x_mean_quantized, w_hat)
