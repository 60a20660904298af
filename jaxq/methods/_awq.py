"""AWQ: the input channels that matter most are scaled up before rounding, then every group's range is clipped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.methods import _matrix
from jaxq.methods._clipping import clip as clip_ranges
from jaxq.methods._folding import as_weights, why_not_one_to_one
from jaxq.methods._method import Folding, Method, Solution
from jaxq.methods._notes import few_samples
from jaxq.methods._options import (
    COUNT,
    FLAG,
    SHARE,
    check_values,
    refuse,
    why_not_stochastic,
)
from jaxq.methods._tokens import as_tokens
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, QuantSpec, as_spec, dequantize, quantize

_FLOOR = np.float32(1e-4)


# Options of the search for scales, and those of a rule: a rule cannot set max_tokens,
# since calibration keeps a fixed number of rows.
_SEARCH_OPTIONS = {"duo": FLAG, "num": COUNT, "max_tokens": COUNT}
_OPTIONS = {"duo": FLAG, "num": COUNT, "clip_num": COUNT, "clip_max_shrink": SHARE}


class AWQScaleInfo(NamedTuple):
    """What the search for scales saw.

    Attributes:
      ratio: float32, the exponent of the scales chosen; 0 where scales of 1 were best.
      loss: float32, of the scales chosen.
      loss_unscaled: float32, of scales of 1, that is of rounding to nearest.
      losses: float32 `[num]`, of each exponent tried.
    """

    ratio: jax.Array
    loss: jax.Array
    loss_unscaled: jax.Array
    losses: jax.Array


class AWQInfo(NamedTuple):
    """What `awq` did.

    Attributes:
      scale: float32 `[in]`; the QTensor stands for `w * scale[:, None]`, so its inputs are to be divided by it.
      ratio: float32, the exponent of the scales chosen.
      loss: float32, mean squared error of the layer's output on the tokens looked at.
      loss_unclipped: float32, the same before ranges were clipped.
      loss_unscaled: float32, the same of rounding to nearest.
      clipped: bool, whether clipped ranges were taken.
    """

    scale: jax.Array
    ratio: jax.Array
    loss: jax.Array
    loss_unclipped: jax.Array
    loss_unscaled: jax.Array
    clipped: jax.Array


def awq(
    w: jax.typing.ArrayLike,
    x: jax.typing.ArrayLike,
    spec: str | QuantSpec,
    *,
    clip: bool = True,
    duo: bool = False,
    num: int = 20,
    max_tokens: int = 512,
    name: str = "w",
) -> tuple[QTensor, AWQInfo]:
    """Quantizes `w * s` with the scales s of `awq_scale`, then clips the range of every block.

    `x w = (x / s) (s w)`: the caller divides by `info.scale` in whatever comes before the layer, a norm's gain or the
    output channels of a linear (`fold_scale_into_previous`). Linears that share their input share their scales: use
    `awq_scale` for those, and `clip` for each.

    Ranges are clipped to `A (1 - k / 20)`, k = 0 .. 9 (`clip` with x), where that makes the whole output better. So on
    the tokens looked at the output is never worse than that of rounding to nearest.

    Args:
      w: float `[in, out]`, or a stack of such matrices with axes in front.
      x: float `[..., in]`, inputs of the layer (for a stack: `[tokens, in]`, or stacked like w).
      spec: preset name or `QuantSpec`; the paper has groups of 128, 4 bits and zero points, as "uint4".
      clip: whether to clip; the authors leave out query and key projections.
      duo, num, max_tokens: as in `awq_scale`.
      name: what errors call w, a parameter's path for example.

    Returns:
      `(qt, info)`: the QTensor of `w * s`, with the geometry of `jaxq.quantize(w, spec, contracting=-2)`, and an
      `AWQInfo`.

    Raises:
      TypeError: not float arrays.
      ValueError: shapes that do not meet, no tokens, non-finite numbers.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from jaxq.methods import awq
      >>> x = jax.random.normal(jax.random.key(0), (64, 32)) * jnp.ones((1, 32)).at[0, 5].set(30.0)
      >>> qt, info = awq(jax.random.normal(jax.random.key(1), (32, 8)), x, "int4")
      >>> bool(info.loss < info.loss_unscaled), bool(info.scale[5] == info.scale.max())
      (True, True)

    References:
      Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023, section 3.
    """
    spec = as_spec(spec, "awq")
    refuse("awq", why_not_stochastic(spec, {}))
    w = _matrix.as_weight(w, "awq", name)
    check_values("awq", _SEARCH_OPTIONS, duo=duo, num=num, max_tokens=max_tokens)
    magnitude = jnp.mean(jnp.abs(as_tokens(x, w, "awq")), axis=-2)
    tokens = as_tokens(x, w, "awq", max_tokens)
    one = functools.partial(_awq, spec=spec, clip=clip, duo=duo, num=num)
    return _matrix.over_stack(one, w, (tokens, 2), (magnitude, 1))


def awq_scale(
    weights: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike],
    x: jax.typing.ArrayLike,
    spec: str | QuantSpec,
    *,
    loss: Callable[[tuple[jax.Array, ...]], jax.Array] | None = None,
    duo: bool = False,
    num: int = 20,
    max_tokens: int = 512,
) -> tuple[jax.Array, AWQScaleInfo]:
    """Scales for an input that one or more linears share: `s = a^r / sqrt(max a^r min a^r)`, `a_j = mean_t |x_tj|`.

    r is the best of 0, 1/num, ..., (num - 1)/num: the one of least loss with `Q(w s) / s` in place of w. At r = 0 all
    scales are 1, which is rounding to nearest, so the result is never worse than that on the tokens looked at. With
    `duo`, `s = a^r / (m^(1-r) + 1e-4)`, m_j the mean of `|w_j| / (largest magnitude of its block)`; scales of 1 are
    tried as well. A channel that no token uses keeps the scale 1.

    Args:
      weights: `[in, out]`, or a sequence of `[in, out_i]` that read the same input (q, k and v; gate and up); or stacks
        of such matrices with the same axes in front, which are looked at one by one.
      x: float `[..., in]`, the inputs (for a stack: `[tokens, in]`, or stacked like weights).
      spec: preset name or `QuantSpec`.
      loss: function from a tuple of candidate weights `[in, out_i]`, float32 in the scale of the originals, to a
        scalar to be made small: the error of a whole block, for example. None takes the mean squared error of all
        outputs.
      duo: scales from weights too.
      num: how many exponents are tried.
      max_tokens: no more tokens than this are looked at, taken at even distances; the means a are over all.

    Returns:
      `(s, info)`: float32 `[in]`, and an `AWQScaleInfo`; with the axes of a stack in front. Multiply the rows of every
      weight by s (`fold_scale_into_next`) and divide by it in what comes before (`fold_scale_into_previous`).

    Raises:
      TypeError, ValueError: as `awq`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from jaxq.methods import awq_scale
      >>> x = jax.random.normal(jax.random.key(0), (64, 32)) * jnp.ones((1, 32)).at[0, 5].set(30.0)
      >>> w = jax.random.normal(jax.random.key(1), (2, 32, 8))
      >>> s, info = awq_scale([w[0], w[1]], x, "int4")
      >>> s.shape, bool(info.loss <= info.loss_unscaled)
      ((32,), True)

    References:
      Lin et al., 2023 (see `awq`), section 3.2. AutoAWQ (`duo_scaling`).
    """
    spec = as_spec(spec, "awq_scale")
    matrices = as_weights(weights, "awq_scale")
    check_values("awq_scale", _SEARCH_OPTIONS, duo=duo, num=num, max_tokens=max_tokens)
    magnitude = jnp.mean(jnp.abs(as_tokens(x, matrices[0], "awq_scale")), axis=-2)
    tokens = as_tokens(x, matrices[0], "awq_scale", max_tokens)

    def one(
        w: jax.Array, tokens: jax.Array, magnitude: jax.Array, *others: jax.Array
    ) -> tuple:
        return _awq_scale(
            (w, *others), tokens, magnitude, spec=spec, loss=loss, duo=duo, num=num
        )

    return _matrix.over_stack(
        one, matrices[0], (tokens, 2), (magnitude, 1), *((w, 2) for w in matrices[1:])
    )


@functools.partial(jax.jit, static_argnames=("spec", "clip", "duo", "num"))
def _awq(
    w: jax.Array,
    x: jax.Array,
    magnitude: jax.Array,
    *,
    spec: QuantSpec,
    clip: bool,
    duo: bool,
    num: int,
) -> tuple[QTensor, AWQInfo]:
    dtype, w = w.dtype, w.astype(jnp.float32)
    s, found = _awq_scale((w,), x, magnitude, spec=spec, loss=None, duo=duo, num=num)
    scaled, wanted = w * s[:, None], x / s[None]
    qt = quantize(scaled, spec, contracting=-2, on_nonfinite="propagate")
    unclipped = least = _output_error(wanted, dequantize(qt) - scaled)
    better = jnp.zeros((), bool)
    if clip:
        limited, _ = clip_ranges(scaled, spec, x=wanted, num=10, max_shrink=0.5)
        error = _output_error(wanted, dequantize(limited) - scaled)
        better = error < unclipped
        qt = jax.tree.map(lambda new, old: jnp.where(better, new, old), limited, qt)
        least = jnp.where(better, error, unclipped)
    return qt.astype(dtype), AWQInfo(
        s, found.ratio, least, unclipped, found.loss_unscaled, better
    )


@functools.partial(jax.jit, static_argnames=("spec", "loss", "duo", "num"))
def _awq_scale(
    weights: tuple[jax.Array, ...],
    x: jax.Array,
    magnitude: jax.Array,
    *,
    spec: QuantSpec,
    loss: Callable[[tuple[jax.Array, ...]], jax.Array] | None,
    duo: bool,
    num: int,
) -> tuple[jax.Array, AWQScaleInfo]:
    weights = tuple(w.astype(jnp.float32) for w in weights)
    live = (magnitude > 0) & jnp.isfinite(magnitude)
    ratios = jnp.asarray([i / num for i in range(num)], jnp.float32)
    spread = _mean_share(weights, spec) if duo else None

    def scales(ratio: jax.Array) -> jax.Array:
        s = jnp.where(live, magnitude, 1.0) ** ratio
        if spread is not None:
            s = s / (spread ** (1 - ratio) + _FLOOR)
        s = jnp.maximum(s, _FLOOR)
        low = jnp.min(jnp.where(live, s, np.float32(np.inf)), initial=np.inf)
        high = jnp.max(jnp.where(live, s, 0.0), initial=0.0)
        return jnp.where(live, s / (jnp.sqrt(low) * jnp.sqrt(high)), 1.0)

    def total(s: jax.Array) -> jax.Array:
        rounded = [
            quantize(w * s[:, None], spec, contracting=-2, on_nonfinite="propagate")
            for w in weights
        ]
        candidates = tuple(dequantize(qt) / s[:, None] for qt in rounded)
        if loss is not None:
            return jnp.asarray(loss(candidates), jnp.float32)
        sizes = [w.shape[1] for w in weights]
        errors = [
            _output_error(x, c - w) for c, w in zip(candidates, weights, strict=True)
        ]
        return sum(
            (e * (n / sum(sizes)) for e, n in zip(errors, sizes, strict=True)),
            jnp.zeros((), jnp.float32),
        )

    losses = lax.map(
        lambda ratio: total(scales(ratio)), ratios
    )  # one at a time: weights may be large
    unscaled = total(jnp.ones_like(magnitude)) if duo else losses[0]
    best = jnp.argmin(jnp.where(jnp.isnan(losses), np.float32(np.inf), losses))
    helps = losses[best] < unscaled
    ratio = jnp.where(helps, ratios[best], 0.0)
    s = jnp.where(helps, scales(ratios[best]), 1.0)
    return s, AWQScaleInfo(
        ratio, jnp.where(helps, losses[best], unscaled), unscaled, losses
    )


def _output_error(x: jax.Array, delta: jax.Array) -> jax.Array:
    """Mean squared error of the outputs: `mean (x delta)^2`."""
    # HIGHEST: matrix units would otherwise read bfloat16.
    return jnp.mean(jnp.matmul(x, delta, precision=lax.Precision.HIGHEST) ** 2)


def _mean_share(weights: tuple[jax.Array, ...], spec: QuantSpec) -> jax.Array:
    """Of each input channel, the mean over all outputs of `|w|` over the largest magnitude of its block; `[in]`."""

    def shares(w: jax.Array) -> jax.Array:
        geometry = jax.eval_shape(
            lambda v: quantize(v, spec, contracting=-2), w
        ).meta.geometry
        blocks = jnp.abs(geometry.to_blocks(geometry.pad(geometry.to_view(w))))
        largest = jnp.max(blocks, axis=geometry.block_axes, keepdims=True, initial=0.0)
        share = blocks / jnp.where(largest > 0, largest, 1.0)
        return geometry.from_view(geometry.unpad(geometry.from_blocks(share)))

    return jnp.mean(jnp.concatenate([shares(w) for w in weights], axis=1), axis=1)


def _find_awq_scale(
    source: jax.Array | None,
    weights: Sequence[jax.Array],
    stats: LayerStats,
    spec: QuantSpec,
    options: Mapping[str, Any],
) -> jax.Array:
    """The scale `[..., in]` for weights that read one input; see `Folding.find`."""
    search = {name: options[name] for name in ("duo", "num") if name in options}
    return awq_scale(weights, stats.samples, spec, **search)[0]


def _why_not_scaled(source: jax.Array | None, weights: Sequence[jax.Array]) -> str:
    """Why no scale can be moved; empty if one can. Norms and linears take scales."""
    return "" if source is None else why_not_one_to_one(source, weights)


def _solve_awq(
    w: jax.Array,
    stats: LayerStats | None,
    spec: QuantSpec,
    *,
    key: jax.Array,
    clip_num: int = 20,
    clip_max_shrink: float = 0.5,
    **search: Any,
) -> Solution:
    """The second half of AWQ, clipping. `folding` has moved the scales before."""
    assert stats is not None
    qt, _ = clip_ranges(
        w, spec, x=stats.samples, num=clip_num, max_shrink=clip_max_shrink
    )
    return Solution(qt, few_samples(stats, w.shape[-2]))


METHOD = Method(
    "awq",
    _solve_awq,
    options=_OPTIONS,
    why_not=why_not_stochastic,
    needs=("samples",),
    folding=Folding(_find_awq_scale, _why_not_scaled, without_scales="only clipped"),
)
