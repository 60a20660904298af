"""Cross-layer equalization: two layers in a row get the same range in every channel.

For the function between the layers, `f(s x) = s f(x)` must hold for positive s. Then
the outputs of the first layer can be divided by `s [hidden]`, and the rows of the
second weight can be multiplied by it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.methods import _matrix
from jaxq.methods._explicit_axes import on_explicit_axes
from jaxq.methods._folding import why_not_one_to_one
from jaxq.methods._method import Folding, Method
from jaxq.methods._method_options import FLAG, why_not_stochastic
from jaxq.observers import LayerStats
from jaxq.qtensor import QuantSpec


class EqualizeInfo(NamedTuple):
    """Diagnostics of `equalize`; every array is float32 `[hidden]`.

    Attributes:
      scale: the numbers by which the outputs of the first layer were divided.
      range1: largest magnitude of each output channel of the first layer, before it was
        rescaled.
      range2: largest magnitude of each input channel of the second layer, before it was
        rescaled.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import equalize
      >>> _, info = equalize(jnp.array([[8.0, 1.0]]), jnp.array([[2.0], [4.0]]))
      >>> info.range1.tolist(), info.range2.tolist()
      ([8.0, 1.0], [2.0, 4.0])
    """

    scale: jax.Array
    range1: jax.Array
    range2: jax.Array


@on_explicit_axes
def equalize(
    w1: jax.typing.ArrayLike,
    w2: jax.typing.ArrayLike,
    bias1: jax.typing.ArrayLike | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array | None], EqualizeInfo]:
    """Rescales hidden channels so that both layers have the same range in each.

    `s_i = sqrt(r1_i / r2_i)` with r1 and r2 the largest magnitudes of a channel in `w1`
    and `w2`. For a positively homogeneous function f (`f(s x) = s f(x)` for s > 0:
    ReLU, leaky ReLU, the identity),

        f(x w1 + b1) w2 = f(x (w1 / s) + b1 / s) (s w2)

    and then `max |w1_i| / s_i = max |w2_i| s_i = sqrt(r1_i r2_i)`. A channel that is
    all zeros in one of the weights keeps the scale 1.

    Args:
      w1: float `[..., in, hidden]`, output channels last: a Flax Dense or Conv kernel.
      w2: float `[..., hidden, out]`, input channels second to last.
      bias1: float `[hidden]`, bias of the first layer, or None.
      power_of_two: round scales to powers of two. Then the rescaling is exact, as long
        as no number leaves the range of its dtype, and the ranges are equal within a
        factor of two.

    Returns:
      `((w1 / s, w2 * s, bias1 / s), info)`: arrays in their own dtypes, and an
      `EqualizeInfo`.

    Raises:
      TypeError: an argument is not a float array.
      ValueError: the hidden sizes differ, a weight is not a matrix, or (outside jit) a
        number is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import equalize
      >>> w1, w2 = jnp.array([[8.0, 1.0]]), jnp.array([[2.0], [4.0]])
      >>> (w1, w2, _), info = equalize(w1, w2)
      >>> w1.tolist(), w2.tolist(), info.scale.tolist()
      ([[4.0, 2.0]], [[4.0], [2.0]], [2.0, 0.5])

    References:
      Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
      Correction", 2019, section 4.1.
    """
    w1 = _matrix.as_weight(w1, "equalize", "w1")
    w2 = _matrix.as_weight(w2, "equalize", "w2")
    if w1.shape[-1] != w2.shape[-2]:
        raise ValueError(
            "equalize: w1 must be [..., in, hidden] and w2 [..., hidden, out], got w1: "
            f"{_matrix.dtype_and_shape(w1)}, w2: {_matrix.dtype_and_shape(w2)}."
        )
    hidden = w1.shape[-1]
    bias = None
    if bias1 is not None:
        bias = _matrix.as_statistic(
            bias1,
            "bias1",
            "equalize",
            shape=(hidden,),
            meaning="one number for each hidden channel",
            w=w1,
        )
    axes1 = tuple(range(w1.ndim - 1))
    axes2 = (*range(w2.ndim - 2), w2.ndim - 1)
    range1 = jnp.max(jnp.abs(w1), axis=axes1, initial=0.0).astype(jnp.float32)
    range2 = jnp.max(jnp.abs(w2), axis=axes2, initial=0.0).astype(jnp.float32)
    live = (range1 > 0) & (range2 > 0)
    # Roots first, because the quotient of two float32 numbers may overflow.
    s = jnp.sqrt(jnp.where(live, range1, 1.0)) / jnp.sqrt(jnp.where(live, range2, 1.0))
    if power_of_two:
        s = nearest_power_of_two(s)
    scale1 = s.reshape((1,) * (w1.ndim - 1) + (hidden,))
    scale2 = s.reshape((1,) * (w2.ndim - 2) + (hidden, 1))
    new_w1 = (w1.astype(jnp.float32) / scale1).astype(w1.dtype)
    new_w2 = (w2.astype(jnp.float32) * scale2).astype(w2.dtype)
    new_bias = None if bias is None else (bias / s).astype(jnp.asarray(bias1).dtype)
    return (new_w1, new_w2, new_bias), EqualizeInfo(s, range1, range2)


def nearest_power_of_two(s: jax.Array) -> jax.Array:
    """The powers of two next to positive float32 numbers, by ratio.

    The threshold between 1 and 2 is the square root of 2.
    """
    mantissa, exponent = jnp.frexp(s)  # mantissa in [0.5, 1)
    rounded = jnp.where(mantissa > np.float32(2**-0.5), exponent, exponent - 1)
    return jnp.ldexp(jnp.ones_like(s), rounded)


def _find_equalizing_scale(
    source: jax.Array | None,
    weights: Sequence[jax.Array],
    stats: LayerStats | None,
    spec: QuantSpec,
    options: Mapping[str, Any],
) -> jax.Array:
    """The scale `[..., hidden]` between two linear layers; see `Folding.find`."""
    assert source is not None
    equalize_matrices = functools.partial(equalize, **options)
    # `equalize` takes the maxima over all leading axes; a stack has scales of its own.
    for _ in range(weights[0].ndim - 2):
        equalize_matrices = jax.vmap(equalize_matrices)
    _, info = equalize_matrices(source, weights[0])
    return info.scale


def _why_not_equalized(source: jax.Array | None, weights: Sequence[jax.Array]) -> str:
    """Why no scale can be moved; empty if one can. The source must be linear."""
    if source is None:
        return "not equalized: the previous layer is not a linear layer"
    return why_not_one_to_one(source, weights)


METHOD = Method(
    "equalize",
    solve=None,
    options={"power_of_two": FLAG},
    why_not=why_not_stochastic,
    folding=Folding(_find_equalizing_scale, _why_not_equalized, judges_source=True),
    judged=False,
)
