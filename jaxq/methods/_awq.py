"""AWQ: scales up the input channels that matter most, then clips every block's range.

A channel matters if its inputs are large. The channel's row of the weight is multiplied
by a scale before rounding, and the channel's input is divided by the same scale:
`x w = (x / s) (s w)`. Then `jaxq.methods.clip` with `x` chooses the ranges.
"""

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
from jaxq.methods._explicit_axes import on_explicit_axes
from jaxq.methods._folding import as_weights, why_not_one_to_one
from jaxq.methods._method import Folding, Method, Solution
from jaxq.methods._method_options import (
    COUNT,
    FLAG,
    SHARE,
    check_values,
    refuse,
    why_not_stochastic,
)
from jaxq.methods._notes import few_samples
from jaxq.methods._tokens import as_tokens
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, QuantSpec, as_spec, dequantize, quantize

# The least scale before normalization.
_LEAST_SCALE = np.float32(1e-4)
# Options of the search for scales, and options of a rule. A rule cannot set max_tokens,
# since calibration keeps a fixed number of rows.
_SEARCH_OPTIONS = {"duo": FLAG, "num": COUNT, "max_tokens": COUNT}
_OPTIONS = {"duo": FLAG, "num": COUNT, "clip_num": COUNT, "clip_max_shrink": SHARE}


class AWQScaleInfo(NamedTuple):
    """Diagnostics of `awq_scale`.

    Attributes:
      ratio: float32, the exponent of the chosen scales; 0 if scales of 1 were best.
      loss: float32, loss of the chosen scales.
      loss_unscaled: float32, loss of scales of 1, that is of rounding to nearest.
      losses: float32 `[num]`, loss of each exponent that was tried.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import awq_scale
      >>> _, info = awq_scale(jnp.ones((4, 2)), jnp.ones((3, 4)), "int4", num=5)
      >>> info.losses.shape
      (5,)
    """

    ratio: jax.Array
    loss: jax.Array
    loss_unscaled: jax.Array
    losses: jax.Array


class AWQInfo(NamedTuple):
    """Diagnostics of `awq`.

    Attributes:
      scale: float32 `[in]`. The QTensor stands for `w * scale[:, None]`, so the inputs
        of the layer must be divided by `scale`.
      ratio: float32, the exponent of the chosen scales.
      loss: float32, mean squared error of the layer's output on the tokens used.
      loss_unclipped: float32, the same error before ranges were clipped.
      loss_unscaled: float32, the same error of rounding to nearest.
      clipped: bool, True if the clipped ranges are used.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import awq
      >>> _, info = awq(jnp.ones((4, 2)), jnp.ones((3, 4)), "int4")
      >>> info.scale.tolist()
      [1.0, 1.0, 1.0, 1.0]
    """

    scale: jax.Array
    ratio: jax.Array
    loss: jax.Array
    loss_unclipped: jax.Array
    loss_unscaled: jax.Array
    clipped: jax.Array


@on_explicit_axes
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
    """Quantizes `w * s` with the scales s of `awq_scale`, and clips all ranges.

    `x w = (x / s) (s w)`. The caller divides the outputs of the previous layer by
    `info.scale`: the gain of a norm, or the output channels of a linear layer
    (`fold_scale_into_previous`).
    Linear layers that share their input share their scales: use `awq_scale` for all of
    them and `clip` for each.

    Ranges are clipped to `A (1 - k / 20)`, k = 0 .. 9 (`clip` with x), if this makes
    the error of the whole output smaller. So on the tokens used, the error is never
    larger than that of rounding to nearest.

    Args:
      w: float `[in, out]`, or a stack of such matrices with axes in front.
      x: float `[..., in]`, inputs of the layer (for a stack: `[tokens, in]`, or stacked
        like w).
      spec: preset name or `QuantSpec`. The paper has groups of 128, 4 bits and zero
        points, as "uint4".
      clip: whether to clip. The authors do not clip query and key projections.
      duo: as in `awq_scale`.
      num: as in `awq_scale`.
      max_tokens: as in `awq_scale`.
      name: the name of the weight in errors.

    Returns:
      `(qt, info)`: the QTensor of `w * s`, with the geometry of `jaxq.quantize(w, spec,
      contracting=-2)`, and an `AWQInfo`.

    Raises:
      TypeError: an argument is not a float array.
      ValueError: shapes do not match, there are no tokens, `num` or `max_tokens` is
        less than 1, the spec rounds stochastically, or (outside jit) a number is not
        finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxq.methods import awq
      >>> x = jax.random.normal(jax.random.key(0), (64, 32))
      >>> x = x * jnp.ones((1, 32)).at[0, 5].set(30.0)
      >>> qt, info = awq(jax.random.normal(jax.random.key(1), (32, 8)), x, "int4")
      >>> bool(info.loss < info.loss_unscaled), bool(info.scale[5] == info.scale.max())
      (True, True)

    References:
      Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
      Acceleration", 2023, section 3.
    """
    spec = as_spec(spec, "awq")
    refuse("awq", why_not_stochastic(spec, {}))
    w = _matrix.as_weight(w, "awq", name)
    check_values("awq", _SEARCH_OPTIONS, duo=duo, num=num, max_tokens=max_tokens)
    # The mean magnitude is over all tokens `[in]`; the loss uses fewer tokens.
    magnitude = jnp.mean(jnp.abs(as_tokens(x, w, "awq")), axis=-2)
    tokens = as_tokens(x, w, "awq", max_tokens)
    awq_matrix = functools.partial(_awq, spec=spec, clip=clip, duo=duo, num=num)
    return _matrix.over_stack(awq_matrix, w, (tokens, 2), (magnitude, 1))


@on_explicit_axes
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
    """Finds the scales of an input that one or more linear layers share.

    `s = a^r / sqrt(max a^r min a^r)` with `a_j = mean_t |x_tj|`. The exponent r is the
    best of 0, 1/num, ..., (num - 1)/num: the one of least loss if `Q(w s) / s` replaces
    w. At r = 0 all scales are 1, so the result on the tokens used is never worse than
    rounding to nearest. A channel that no token uses keeps the scale 1.

    With `duo`, `s = a^r / (m^(1-r) + 1e-4)`, where m_j is the mean of `|w_j| / (largest
    magnitude of its block)`. Scales of 1 are tried as well.

    Args:
      weights: `[in, out]`, or a sequence of `[in, out_i]` that read the same input (q,
        k and v; gate and up), or stacks of such matrices with the same axes in front.
        Each matrix of a stack gets its own scales.
      x: float `[..., in]`, the inputs (for a stack: `[tokens, in]`, or stacked like the
        weights).
      spec: preset name or `QuantSpec`.
      loss: function from a tuple of candidate weights `[in, out_i]` to a scalar that is
        minimized, for example the error of a whole block. The candidates are float32,
        in the scale of the original weights. None uses the mean squared error of all
        outputs.
      duo: True makes the scales depend on the weights too.
      num: at least 1, how many exponents are tried.
      max_tokens: at least 1. The loss uses at most this number of tokens, which are
        evenly spaced. The means a are over all tokens.

    Returns:
      `(s, info)`: float32 `[in]`, and an `AWQScaleInfo`, with the axes of a stack in
      front. Multiply the rows of every weight by s (`fold_scale_into_next`), and divide
      the outputs of the previous layer by s (`fold_scale_into_previous`).

    Raises:
      TypeError: an argument is not a float array.
      ValueError: shapes do not match, `weights` is empty, there are no tokens, `num` or
        `max_tokens` is less than 1, or (outside jit) a number is not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxq.methods import awq_scale
      >>> x = jax.random.normal(jax.random.key(0), (64, 32))
      >>> x = x * jnp.ones((1, 32)).at[0, 5].set(30.0)
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

    def scale_of_matrices(
        w: jax.Array, tokens: jax.Array, magnitude: jax.Array, *other_weights: jax.Array
    ) -> tuple[jax.Array, AWQScaleInfo]:
        return _awq_scale(
            (w, *other_weights),
            tokens,
            magnitude,
            spec=spec,
            loss=loss,
            duo=duo,
            num=num,
        )

    return _matrix.over_stack(
        scale_of_matrices,
        matrices[0],
        (tokens, 2),
        (magnitude, 1),
        *((w, 2) for w in matrices[1:]),
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
    s, search = _awq_scale((w,), x, magnitude, spec=spec, loss=None, duo=duo, num=num)
    scaled_w, scaled_x = w * s[:, None], x / s[None]
    qt = quantize(scaled_w, spec, contracting=-2, on_nonfinite="propagate")
    unclipped = least = _mean_squared_output(scaled_x, dequantize(qt) - scaled_w)
    better = jnp.zeros((), bool)
    if clip:
        clipped, _ = clip_ranges(scaled_w, spec, x=scaled_x, num=10, max_shrink=0.5)
        error = _mean_squared_output(scaled_x, dequantize(clipped) - scaled_w)
        better = error < unclipped
        # The best range of each block may not be the best for the whole output.
        qt = jax.tree.map(lambda new, old: jnp.where(better, new, old), clipped, qt)
        least = jnp.where(better, error, unclipped)
    info = AWQInfo(s, search.ratio, least, unclipped, search.loss_unscaled, better)
    return qt.astype(dtype), info


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
    loss = _output_loss(weights, x) if loss is None else loss
    spread = _mean_share(weights, spec) if duo else None

    def loss_of(s: jax.Array) -> jax.Array:
        candidates = []
        for w in weights:
            qt = quantize(
                w * s[:, None], spec, contracting=-2, on_nonfinite="propagate"
            )
            candidates.append(dequantize(qt) / s[:, None])
        return jnp.asarray(loss(tuple(candidates)), jnp.float32)

    def loss_of_ratio(ratio: jax.Array) -> jax.Array:
        return loss_of(_scale_of_ratio(ratio, magnitude, spread))

    ratios = jnp.asarray([i / num for i in range(num)], jnp.float32)
    # One at a time, since candidate weights may be large.
    losses = lax.map(loss_of_ratio, ratios)  # [num]
    unscaled = loss_of(jnp.ones_like(magnitude)) if duo else losses[0]
    best = jnp.argmin(jnp.where(jnp.isnan(losses), np.float32(np.inf), losses))
    helps = losses[best] < unscaled
    s = jnp.where(helps, _scale_of_ratio(ratios[best], magnitude, spread), 1.0)
    info = AWQScaleInfo(
        ratio=jnp.where(helps, ratios[best], 0.0),
        loss=jnp.where(helps, losses[best], unscaled),
        loss_unscaled=unscaled,
        losses=losses,
    )
    return s, info


def _scale_of_ratio(
    ratio: jax.Array, magnitude: jax.Array, spread: jax.Array | None
) -> jax.Array:
    """The normalized scale `[in]` of an exponent; 1 for channels that no token uses."""
    live = (magnitude > 0) & jnp.isfinite(magnitude)
    s = jnp.where(live, magnitude, 1.0) ** ratio
    if spread is not None:
        s = s / (spread ** (1 - ratio) + _LEAST_SCALE)
    s = jnp.maximum(s, _LEAST_SCALE)
    least = jnp.min(jnp.where(live, s, np.float32(np.inf)), initial=np.inf)
    greatest = jnp.max(jnp.where(live, s, 0.0), initial=0.0)
    # Two roots, because the product of the least and the greatest number may overflow
    # or underflow float32.
    return jnp.where(live, s / (jnp.sqrt(least) * jnp.sqrt(greatest)), 1.0)


def _output_loss(
    weights: tuple[jax.Array, ...], x: jax.Array
) -> Callable[[tuple[jax.Array, ...]], jax.Array]:
    """The default loss: the mean squared error over the outputs of all weights."""
    num_outputs = sum(w.shape[1] for w in weights)

    def loss(candidates: tuple[jax.Array, ...]) -> jax.Array:
        total = jnp.zeros((), jnp.float32)
        for candidate, w in zip(candidates, weights, strict=True):
            error = _mean_squared_output(x, candidate - w)
            total = total + error * (w.shape[1] / num_outputs)
        return total

    return loss


def _mean_squared_output(x: jax.Array, delta: jax.Array) -> jax.Array:
    """Mean squared error of the outputs: `mean (x delta)^2`."""
    # HIGHEST: matrix units would otherwise read bfloat16.
    return jnp.mean(jnp.matmul(x, delta, precision=lax.Precision.HIGHEST) ** 2)


def _mean_share(weights: tuple[jax.Array, ...], spec: QuantSpec) -> jax.Array:
    """How large the weights of each input channel are within their blocks.

    It is the mean over outputs of `|w| / (largest magnitude of the block)`: float32
    `[in]`.
    """

    def shares(w: jax.Array) -> jax.Array:
        shape = jax.eval_shape(lambda v: quantize(v, spec, contracting=-2), w)
        geometry = shape.meta.geometry
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
    """The scale `[..., in]` of weights that read one input; see `Folding.find`."""
    search = {name: options[name] for name in ("duo", "num") if name in options}
    scale, _ = awq_scale(weights, stats.samples, spec, **search)
    return scale


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
    **search_options: Any,
) -> Solution:
    """Clips ranges, the second half of AWQ. `folding` has moved the scales before."""
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
    folding=Folding(
        _find_awq_scale,
        _why_not_scaled,
        at_run_time=True,
        without_scales="only clipped",
    ),
)
