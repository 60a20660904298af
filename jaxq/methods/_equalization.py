"""Cross-layer equalization: two layers share out their ranges through a function that lets scales pass."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.methods import _matrix
from jaxq.methods._folding import why_not_one_to_one
from jaxq.methods._method import Folding, Method
from jaxq.methods._options import FLAG, why_not_stochastic
from jaxq.observers import LayerStats
from jaxq.qtensor import QuantSpec


class EqualizeInfo(NamedTuple):
    """What `equalize` did, each float32 `[hidden]`.

    Attributes:
      scale: what the first layer's outputs were divided by.
      range1: largest magnitude of each output channel of the first layer before.
      range2: largest magnitude of each input channel of the second layer before.
    """

    scale: jax.Array
    range1: jax.Array
    range2: jax.Array


def equalize(
    w1: jax.typing.ArrayLike,
    w2: jax.typing.ArrayLike,
    bias1: jax.typing.ArrayLike | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array | None], EqualizeInfo]:
    """Rescales hidden channels so that both layers have the same range in each: `s_i = sqrt(r1_i / r2_i)`.

    With f positively homogeneous (`f(s x) = s f(x)` for s > 0: ReLU, leaky ReLU, none),

        f(x w1 + b1) w2 = f(x (w1 / s) + b1 / s) (s w2)

    and then `max |w1_i| / s_i = max |w2_i| s_i = sqrt(r1_i r2_i)`. A channel that is all zeros on one side is left
    alone.

    Args:
      w1: float `[..., in, hidden]`, output channels last: a Flax Dense or Conv kernel.
      w2: float `[..., hidden, out]`, input channels last but one.
      bias1: float `[hidden]`, bias of the first layer, or None.
      power_of_two: round scales to powers of two, which makes the rescaling exact (as long as nothing leaves the
        dtype's range) and the ranges equal within a factor of two.

    Returns:
      `((w1 / s, w2 * s, bias1 / s), EqualizeInfo)`, each in its own dtype.

    Raises:
      TypeError: not float arrays.
      ValueError: hidden sizes differ; non-finite numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import equalize
      >>> (w1, w2, _), info = equalize(jnp.array([[8.0, 1.0]]), jnp.array([[2.0], [4.0]]))
      >>> w1.tolist(), w2.tolist(), info.scale.tolist()
      ([[4.0, 2.0]], [[4.0], [2.0]], [2.0, 0.5])

    References:
      Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.1.
    """
    w1, w2 = (
        _matrix.as_weight(w, "equalize", name) for w, name in ((w1, "w1"), (w2, "w2"))
    )
    if w1.shape[-1] != w2.shape[-2]:
        raise ValueError(
            f"equalize: w1 must be [..., in, hidden] and w2 [..., hidden, out], got w1: {_matrix.describe(w1)}, "
            f"w2: {_matrix.describe(w2)}."
        )
    hidden = w1.shape[-1]
    bias = None
    if bias1 is not None:
        said = "one number for each hidden channel"
        bias = _matrix.as_statistic(
            bias1, "bias1", "equalize", shape=(hidden,), said=said, w=w1
        )
    range1 = jnp.max(jnp.abs(w1), axis=tuple(range(w1.ndim - 1)), initial=0.0).astype(
        jnp.float32
    )
    range2 = jnp.max(
        jnp.abs(w2), axis=(*range(w2.ndim - 2), w2.ndim - 1), initial=0.0
    ).astype(jnp.float32)
    live = (range1 > 0) & (range2 > 0)
    # Roots first: the quotient of two float32 numbers may leave their range.
    s = jnp.sqrt(jnp.where(live, range1, 1.0)) / jnp.sqrt(jnp.where(live, range2, 1.0))
    if power_of_two:
        s = nearest_power_of_two(s)
    out1 = (
        w1.astype(jnp.float32) / s.reshape((1,) * (w1.ndim - 1) + (hidden,))
    ).astype(w1.dtype)
    out2 = (
        w2.astype(jnp.float32) * s.reshape((1,) * (w2.ndim - 2) + (hidden, 1))
    ).astype(w2.dtype)
    out_bias = None if bias is None else (bias / s).astype(jnp.asarray(bias1).dtype)
    return (out1, out2, out_bias), EqualizeInfo(s, range1, range2)


def nearest_power_of_two(s: jax.Array) -> jax.Array:
    """Of positive float32 numbers, by ratio: the threshold between 1 and 2 is the root of 2."""
    mantissa, exponent = jnp.frexp(s)
    return jnp.ldexp(
        jnp.ones_like(s),
        jnp.where(mantissa > np.float32(2**-0.5), exponent, exponent - 1),
    )


def _find_equalizing_scale(
    source: jax.Array | None,
    weights: Sequence[jax.Array],
    stats: LayerStats | None,
    spec: QuantSpec,
    options: Mapping[str, Any],
) -> jax.Array:
    """The scale `[..., hidden]` between two linear layers; see `Folding.find`."""
    assert source is not None
    scale_of = functools.partial(equalize, **options)
    for _ in range(weights[0].ndim - 2):
        scale_of = jax.vmap(scale_of)
    _, info = scale_of(source, weights[0])
    return info.scale


def _why_not_equalized(source: jax.Array | None, weights: Sequence[jax.Array]) -> str:
    """Why no scale can be moved; empty if one can. Only a linear layer has a range."""
    if source is None:
        return "not equalized: what comes before it is no linear"
    return why_not_one_to_one(source, weights)


METHOD = Method(
    "equalize",
    solve=None,
    options={"power_of_two": FLAG},
    why_not=why_not_stochastic,
    folding=Folding(_find_equalizing_scale, _why_not_equalized, judges_source=True),
    judged=False,
)
