"""Round to nearest (RTN): the baseline of all other methods.

A weight `[in, out]` is quantized without data and without optimization.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.typing import ArrayLike

from jaxq import metrics
from jaxq.methods import _matrix
from jaxq.methods._explicit_axes import on_explicit_axes
from jaxq.methods._method import Method
from jaxq.methods._method_options import refuse, why_not_stochastic
from jaxq.qtensor import QTensor, QuantSpec, as_spec, dequantize, quantize


class RTNInfo(NamedTuple):
    """Diagnostics of `rtn`.

    Attributes:
      sqnr: float32, signal to quantization noise ratio of the weight in dB; one number
        for each matrix.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> _, info = jaxq.methods.rtn(jnp.array([[0.1], [1.0]]), "int8")
      >>> bool(info.sqnr > 40)
      True
    """

    sqnr: jax.Array


@on_explicit_axes
def rtn(
    w: ArrayLike, spec: str | QuantSpec, *, name: str = "w"
) -> tuple[QTensor, RTNInfo]:
    """Rounds a weight to nearest, as `quantize(w, spec, contracting=-2)` does.

    `codes = round(w / scale)`, for every format and scale rule. This includes powers of
    two ("log4"), signs ("binary") and ternary weights ("ternary", "ttq",
    `QuantSpec("ternary", scale_rule="twn")`). "binary" keeps the sign of each weight
    and the mean magnitude, which has the least squared error.

    Args:
      w: float `[in, out]`, or a stack `[..., in, out]`; each matrix has its own scales.
      spec: preset name or `QuantSpec`. Its rounding must not be "stochastic". Use
        `quantize` with a key for that.
      name: the name of the weight in errors.

    Returns:
      `(qt, info)`: a QTensor with the shape and dtype of `w`, axis -2 contracted; and
      an `RTNInfo`, whose arrays have the leading axes of `w`.

    Raises:
      TypeError: `w` is not float32, bfloat16 or float16.
      ValueError: the spec rounds stochastically, `w` has fewer than two axes or no
        elements, or (outside jit) `w` has a number that is not finite.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> w = jnp.array([[0.5], [-1.0], [0.25], [-0.25]])
      >>> qt, info = jaxq.methods.rtn(w, "binary")
      >>> jaxq.dequantize(qt).ravel().tolist()
      [0.5, -0.5, 0.5, -0.5]

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, section 2.
      Miyashita et al., "Convolutional Neural Networks using Logarithmic Data
      Representation", 2016, section 3.
      Rastegari et al., "XNOR-Net", 2016, section 3.1.
      Li et al., "Ternary Weight Networks", 2016, section 2.
      Zhu et al., "Trained Ternary Quantization", 2017, section 3.
    """
    spec = as_spec(spec, "rtn")
    refuse("rtn", why_not_stochastic(spec, {}))
    return _rtn(_matrix.as_weight(w, "rtn", name), spec)


def round_to_nearest(
    w: jax.Array, spec: QuantSpec, key: jax.Array | None = None
) -> QTensor:
    """Returns the QTensor of `rtn`, without the info.

    A spec with `rounding="stochastic"` rounds stochastically, as `quantize` does.

    Args:
      w: float `[..., in, out]`. NaN and infinities raise no error: their blocks become
        NaN.
      spec: what to quantize to.
      key: PRNG key. Only a spec that rounds stochastically needs it.
    """
    if spec.needs_key:
        return quantize(
            w,
            spec,
            contracting=-2,
            batch=tuple(range(w.ndim - 2)),
            key=key,
            on_nonfinite="propagate",
        )
    round_matrix = functools.partial(
        quantize, spec=spec, contracting=-2, on_nonfinite="propagate"
    )
    return _matrix.over_stack(round_matrix, w)


@functools.partial(jax.jit, static_argnames="spec")
def _rtn(w: jax.Array, spec: QuantSpec) -> tuple[QTensor, RTNInfo]:
    def round_matrix(w: jax.Array) -> tuple[QTensor, RTNInfo]:
        qt = quantize(w, spec, contracting=-2, on_nonfinite="propagate")
        return qt, RTNInfo(metrics.sqnr(w, dequantize(qt)))

    return _matrix.over_stack(round_matrix, w)


# The record refuses no spec: a model's weight can also be rounded stochastically.
METHOD = Method("rtn", solve=None, judged=False)
