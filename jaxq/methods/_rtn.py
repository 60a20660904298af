"""Round to nearest: what every other method is measured against."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.typing import ArrayLike

from jaxq import metrics
from jaxq.methods import _matrix
from jaxq.methods._method import Method
from jaxq.methods._options import refuse, why_not_stochastic
from jaxq.qtensor import QTensor, QuantSpec, as_spec, dequantize, quantize


class RTNInfo(NamedTuple):
    """What rounding cost.

    Attributes:
      sqnr: float32, signal to quantization noise ratio of the weight in dB, one number for each matrix.
    """

    sqnr: jax.Array


def rtn(
    w: ArrayLike, spec: str | QuantSpec, *, name: str = "w"
) -> tuple[QTensor, RTNInfo]:
    """Rounds a weight to nearest, as `quantize(w, spec, contracting=-2)` does: no data, no optimization.

    `codes = round(w / scale)`, by any format and scale rule. So this is also how weights become powers of two
    ("log4"), signs ("binary": the sign and the mean magnitude, which is the best of all such pairs), and ternary
    ("ternary", "ttq", `QuantSpec("ternary", scale_rule="twn")`).

    Args:
      w: float `[in, out]`, or `[..., in, out]`: a stack, each matrix with scales of its own.
      spec: preset name or `QuantSpec`, any but `rounding="stochastic"`, which `quantize` has a key for.
      name: what errors call the weight.

    Returns:
      QTensor with the shape and dtype of `w`, axis -2 contracted; `RTNInfo`, arrays with the leading axes of `w`.

    Raises:
      TypeError: `w` is not a float array.
      ValueError: stochastic rounding, not a matrix, a number that is not finite (outside jit).

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt, info = jaxq.methods.rtn(jnp.array([[0.5], [-1.0], [0.25], [-0.25]]), "binary")
      >>> jaxq.dequantize(qt).ravel().tolist()
      [0.5, -0.5, 0.5, -0.5]

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
      2018, section 2. Miyashita et al., "Convolutional Neural Networks using Logarithmic Data Representation", 2016,
      section 3. Rastegari et al., "XNOR-Net", 2016, section 3.1. Li et al., "Ternary Weight Networks", 2016, section
      2. Zhu et al., "Trained Ternary Quantization", 2017, section 3.
    """
    spec = as_spec(spec, "rtn")
    refuse("rtn", why_not_stochastic(spec, {}))
    return _rtn(_matrix.as_weight(w, "rtn", name), spec)


@functools.partial(jax.jit, static_argnames="spec")
def _rtn(w: jax.Array, spec: QuantSpec) -> tuple[QTensor, RTNInfo]:
    def round_matrix(w: jax.Array) -> tuple[QTensor, RTNInfo]:
        qt = quantize(w, spec, contracting=-2, on_nonfinite="propagate")
        return qt, RTNInfo(metrics.sqnr(w, dequantize(qt)))

    return _matrix.over_stack(round_matrix, w)


def round_to_nearest(w: jax.Array, spec: QuantSpec) -> QTensor:
    """The QTensor of `rtn`, without its info.

    Args:
      w: float `[..., in, out]`. Numbers that are not finite are passed on.
      spec: what to quantize to.

    Raises:
      ValueError: the spec rounds stochastically.
    """
    refuse("rtn", why_not_stochastic(spec, {}))
    return _matrix.over_stack(
        functools.partial(
            quantize, spec=spec, contracting=-2, on_nonfinite="propagate"
        ),
        w,
    )


METHOD = Method("rtn", solve=None, why_not=why_not_stochastic, judged=False)
