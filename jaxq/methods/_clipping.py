"""Clipping: a range smaller than the extremes, chosen for each block.

If a range ends before the largest numbers, the steps of all other numbers are smaller.
The cost is `s^2 / 12` for each number inside the range, plus the squared excess of the
numbers outside. Three rules choose the range. Scales come from the clipped block. Codes
come from the unclipped block, so numbers beyond the range saturate.

Blocks are arrays as `Geometry.to_blocks` arranges them, `[n_out, size_out, n_in,
size_in]` for a matrix. Ranges and errors are `[n_out, 1, n_in, 1]`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats, observers
from jaxq.methods import _matrix
from jaxq.methods._explicit_axes import on_explicit_axes
from jaxq.methods._method import Method, Solution
from jaxq.methods._method_options import (
    COUNT,
    FLAG,
    POSITIVE,
    SHARE,
    check_values,
    choice,
    number,
    refuse,
    why_not_stochastic,
)
from jaxq.methods._notes import few_samples
from jaxq.methods._tokens import as_tokens
from jaxq.observers import LayerStats
from jaxq.qtensor import (
    Geometry,
    QTensor,
    QuantSpec,
    as_spec,
    dequantize,
    quantize,
    requantize,
)

RULES = ("entropy", "mse", "percentile")
_OPTIONS = {
    "rule": choice(*RULES),
    "power": POSITIVE,
    "num": COUNT,
    "max_shrink": SHARE,
    "percentile": number("0 to 100", least=0, most=100),
    "bins": COUNT,
    "inputs": FLAG,
}
# The rule that reads each option. All rules read `rule`.
_READER = {
    "power": "mse",
    "num": "mse",
    "max_shrink": "mse",
    "inputs": "mse",
    "percentile": "percentile",
    "bins": "entropy",
}
_DEFAULTS = {
    "power": 2.0,
    "num": 80,
    "max_shrink": 0.8,
    "percentile": 99.9,
    "bins": 512,
}


class ClipInfo(NamedTuple):
    """Diagnostics of `clip`; every array is float32 `[*num_blocks]`, like the scales.

    Attributes:
      low: the lower end of the block's range.
      high: the upper end of the block's range.
      error: the error of the block that the rule "mse" minimizes.
      error_unclipped: the same error of plain quantization.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import clip
      >>> _, info = clip(jnp.array([[1.0], [-3.0]]), "int4", max_shrink=0.0)
      >>> info.low.tolist(), info.high.tolist()
      ([[-3.0]], [[3.0]])
    """

    low: jax.Array
    high: jax.Array
    error: jax.Array
    error_unclipped: jax.Array


class _Range(NamedTuple):
    """The ends of each block's range, shaped like blocks with sizes of 1."""

    low: jax.Array
    high: jax.Array


class _Search(NamedTuple):
    """The static choices of `clip`. Another choice is another compiled program."""

    rule: str
    power: float
    bins: int


class _Amounts(NamedTuple):
    """The numeric options of `clip`. They are traced: new values need no compilation.

    Attributes:
      num: number of ranges that "mse" tries.
      max_shrink: the share by which the last of these ranges is smaller than the first.
      shares: for "percentile": share of a block's numbers below each end of its range.
    """

    num: np.int32
    max_shrink: np.float32
    shares: tuple[np.float32, ...]


@on_explicit_axes
def clip(
    w: jax.typing.ArrayLike,
    spec: str | QuantSpec,
    *,
    rule: str = "mse",
    x: jax.typing.ArrayLike | None = None,
    channel_weight: jax.typing.ArrayLike | None = None,
    power: float | None = None,
    num: int | None = None,
    max_shrink: float | None = None,
    percentile: float | None = None,
    bins: int | None = None,
    name: str = "w",
) -> tuple[QTensor, ClipInfo]:
    """Quantizes `w` with a range that is chosen for each block of the spec.

    The rule says how the range is chosen:

    - "mse" tries `T_k = A (1 - max_shrink k / num)`, `k = 0 .. num - 1`, where A is the
      block's largest magnitude. It takes the T of least `sum_i c_i |w_i -
      Q_T(w_i)|^power`, with c the `channel_weight`. Given `x`, it takes the T of least
      `mean_t (sum_i x_ti (w_i - Q_T(w_i)))^2` over the block's part of the products, as
      AWQ does. T_0 = A is plain quantization.
    - "percentile" takes the range that holds `percentile` per cent of the block, by
      linear interpolation.
    - "entropy" takes the T that loses the least information when the histogram is
      reduced to the levels of the codes (`jaxq.observers.entropy`).

    If the spec is not symmetric, both ends shrink by the same factor. "percentile" then
    leaves the same share outside on either side.

    Args:
      w: float `[in, out]`, or a stack of such matrices with axes in front.
      spec: preset name or `QuantSpec`.
      rule: "mse", "percentile" or "entropy".
      x: float `[..., in]`, inputs of the layer, for "mse" (for a stack: `[tokens, in]`,
        or stacked like w).
      channel_weight: float `[in]` (or stacked like w), not negative: the weight c of
        each input channel for "mse", for example `mean_t x_t^2`.
      power: exponent of "mse"; None uses 2.
      num: how many ranges "mse" tries; None uses 80.
      max_shrink: 0 to 1, the share by which the last range of "mse" is smaller than the
        first; None uses 0.8.
      percentile: 0 to 100, for "percentile"; None uses 99.9.
      bins: number of bins in each block's histogram, for "entropy"; at least the number
        of levels. None uses 512. The time grows with the square of `bins`.
      name: the name of the weight in errors.

    Returns:
      `(qt, info)`: a QTensor with the geometry of `jaxq.quantize(w, spec,
      contracting=-2)`, and a `ClipInfo`. The error of "mse" is at most that of plain
      quantization: in each block if scales are plain numbers, in total if scales are
      quantized themselves.

    Raises:
      TypeError: `w`, `x` or `channel_weight` is not a float array.
      ValueError: the rule is unknown, an option belongs to another rule or is out of
        range, both `x` and `channel_weight` are given, shapes do not match, the rule
        does not work for the spec (`jaxq.methods.why_not`), or (outside jit) a number
        is not finite.

    Example:
      >>> import jax
      >>> from jaxq.methods import clip
      >>> w = jax.random.normal(jax.random.key(0), (128, 4))
      >>> qt, info = clip(w, "int4")
      >>> bool((info.error <= info.error_unclipped).all()), qt.shape
      (True, (128, 4))

    References:
      Banner et al., "Post Training 4-bit Quantization of Convolutional Networks for
      Rapid-Deployment", 2019, section 3.
      Migacz, "8-bit Inference with TensorRT", GTC 2017 (entropy).
      Lin et al., "AWQ: Activation-aware Weight Quantization", 2023, section 3 (with x).
      Frantar et al., "GPTQ", 2022 (the grid; its code has power=2.4).
    """
    spec = as_spec(spec, "clip")
    formats.check_choice("clip: rule", rule, RULES)
    refuse("clip", _why_not_clipped(spec, {"rule": rule}))
    w = _matrix.as_weight(w, "clip", name)
    options = {
        "power": power,
        "num": num,
        "max_shrink": max_shrink,
        "percentile": percentile,
        "bins": bins,
    }
    statistics = _error_weights(x, channel_weight, w, rule)
    refuse("clip", _unread_option({"rule": rule, **options}))
    options = _DEFAULTS | {k: v for k, v in options.items() if v is not None}
    check_values("clip", _OPTIONS, **options)
    if x is not None and options["power"] != 2.0:
        raise ValueError(
            f"clip: power={power} cannot be used with x=, because the error of the "
            "outputs is always squared. Leave out power= or x=."
        )
    amounts = _Amounts(
        np.int32(options["num"]),
        np.float32(options["max_shrink"]),
        _shares_below(options["percentile"], spec),
    )
    search = _Search(rule, float(options["power"]), int(options["bins"]))
    clip_matrix = functools.partial(
        _clip_matrix, amounts=amounts, spec=spec, search=search
    )
    return _matrix.over_stack(clip_matrix, w, *statistics)


def _error_weights(
    x: Any, channel_weight: Any, w: jax.Array, rule: str
) -> list[tuple[jax.Array, int]]:
    """The checked weights of the errors of "mse"; empty if there are none.

    Each entry is a pair for `over_stack`: an array, and the number of axes that it has
    for one matrix.
    """
    if rule != "mse" and (x is not None or channel_weight is not None):
        raise ValueError(
            "clip: x and channel_weight weigh the error of rule='mse'; "
            f"rule={rule!r} has no such error. Leave them out."
        )
    if x is not None and channel_weight is not None:
        raise ValueError("clip: got both x and channel_weight. Pass one of them.")
    if x is not None:
        return [(as_tokens(x, w, "clip"), 2)]
    if channel_weight is not None:
        channel_weight = _matrix.as_statistic(
            channel_weight,
            "channel_weight",
            "clip",
            shape=w.shape[-2:-1],
            meaning="one number for each input",
            w=w,
        )
        return [(channel_weight, 1)]
    return []


def _shares_below(percentile: float, spec: QuantSpec) -> tuple[np.float32, ...]:
    """The share of a block's numbers below each end of its range.

    A range that is symmetric about 0 has one share: that of magnitudes below its end.
    """
    if spec.symmetric and spec.offset != "min":
        return (np.float32(percentile / 100),)
    low, high = (100 - percentile) / 200, (100 + percentile) / 200
    return np.float32(low), np.float32(high)


@functools.partial(jax.jit, static_argnames=("spec", "search"))
def _clip_matrix(
    w: jax.Array,
    weight: jax.Array | None = None,
    *,
    amounts: _Amounts,
    spec: QuantSpec,
    search: _Search,
) -> tuple[QTensor, ClipInfo]:
    """Clips one matrix. `weight`: tokens `[tokens, in]`, channels `[in]`, or None."""
    dtype, w = w.dtype, w.astype(jnp.float32)
    plain = quantize(w, spec, contracting=-2, on_nonfinite="propagate")
    geometry = plain.meta.geometry
    whole = _whole_range(w, spec, geometry)

    def error_of(qt: QTensor) -> jax.Array:
        return _weighted_error(w - dequantize(qt), weight, geometry, search.power)

    def quantize_within(ends: _Range) -> QTensor:
        clipped = _map_blocks(
            lambda blocks: jnp.clip(blocks, ends.low, ends.high), w, spec, geometry
        )
        scales = quantize(clipped, spec, contracting=-2, on_nonfinite="propagate")
        return requantize(w, scales)

    if search.rule == "mse":
        qt, ends, error, unclipped = _least_error(
            whole, quantize_within, error_of, spec, amounts
        )
        if not _is_separable(spec):
            # The best range of each block may not be the best for all of them.
            unclipped = error_of(plain)
            better = jnp.sum(error) <= jnp.sum(unclipped)
            qt, ends, error = jax.tree.map(
                lambda new, old: jnp.where(better, new, old),
                (qt, ends, error),
                (plain, whole, unclipped),
            )
    else:
        if search.rule == "percentile":
            ends = _percentile_range(w, whole, spec, geometry, amounts.shares)
        else:
            ends = _entropy_range(w, whole, spec, geometry, search.bins)
        qt = quantize_within(ends)
        error, unclipped = error_of(qt), error_of(plain)
    info = ClipInfo(*(geometry.scale_from_blocks(v) for v in (*ends, error, unclipped)))
    return qt.astype(dtype), info


def _is_separable(spec: QuantSpec) -> bool:
    """True if each block can take its own best range.

    This needs two conditions. The codes of a block depend only on the range of this
    block. With the unclipped range, the codes are those of `quantize`.
    """
    has_plain_scales = isinstance(spec.scale, str) and spec.offset != "mean"
    rounds = not spec.rule.has_threshold
    return has_plain_scales and rounds and spec.codes_from == "stored"


def _least_error(
    whole: _Range,
    quantize_within: Callable[[_Range], QTensor],
    error_of: Callable[[QTensor], jax.Array],
    spec: QuantSpec,
    amounts: _Amounts,
) -> tuple[QTensor, _Range, jax.Array, jax.Array]:
    """Finds the range of least error of each block, by trying one range after another.

    The last step of the loop quantizes in the best ranges. So the quantization is
    compiled only once.

    Returns:
      (the weight quantized in the best ranges, these ranges, their error, the error of
      the whole range).
    """

    def step(k: jax.typing.ArrayLike, carry: tuple) -> tuple:
        _, _, error, unclipped, least, best_factor = carry
        # With jax_disable_jit, k is an int.
        step_number = jnp.asarray(k, jnp.float32)
        shrink = amounts.max_shrink * step_number / jnp.float32(amounts.num)
        factor = jnp.where(k < amounts.num, 1.0 - shrink, best_factor)
        ends = _shrink(whole, factor, spec)
        qt = quantize_within(ends)
        error = error_of(qt)
        better = error < least
        least = jnp.where(better, error, least)
        best_factor = jnp.where(better, factor, best_factor)
        unclipped = jnp.where(k == 0, error, unclipped)
        return qt, ends, error, unclipped, least, best_factor

    shapes = jax.eval_shape(quantize_within, whole)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ones = jnp.ones_like(whole.high)
    carry = (empty, whole, ones, ones, ones * np.float32(np.inf), ones)
    return lax.fori_loop(0, amounts.num + 1, step, carry)[:4]


def _shrink(whole: _Range, factor: jax.Array, spec: QuantSpec) -> _Range:
    """The range scaled by `factor` about 0, or about its middle for offset="min"."""
    if spec.offset != "min":
        return _Range(whole.low * factor, whole.high * factor)
    # Halves first: the sum and the difference of the ends may overflow.
    middle = whole.low * 0.5 + whole.high * 0.5
    half = (whole.high * 0.5 - whole.low * 0.5) * factor
    # middle + half may differ from `high` in float32. Factor 1 must change nothing.
    low = jnp.where(factor == 1.0, whole.low, middle - half)
    high = jnp.where(factor == 1.0, whole.high, middle + half)
    return _Range(low, high)


def _weighted_error(
    delta: jax.Array, weight: jax.Array | None, geometry: Geometry, power: float
) -> jax.Array:
    """The error that "mse" minimizes, for each block: `[n1, 1, n2, 1]`."""
    if weight is not None and weight.ndim == 2:
        return block_output_error(delta, weight, geometry)
    # A product is cheaper than a power, and correctly rounded.
    error = delta * delta if power == 2.0 else jnp.abs(delta) ** power  # [in, out]
    if weight is not None:
        error = error * weight[:, None]
    return _sum_blocks(error, geometry)


def block_output_error(delta: jax.Array, x: jax.Array, geometry: Geometry) -> jax.Array:
    """The error of a layer's outputs that each block of its weight causes.

    It is `mean_t (sum_k x_tk delta_ko)^2` with k over the block's inputs, summed over
    the block's outputs o. A block of a flattened array (`PerFlat`) is not a rectangle
    of inputs and outputs. For such a block, products of different channels are left
    out.

    Args:
      delta: the error of the weight `[in, out]`.
      x: float32 `[tokens, in]`.
      geometry: of the weight.

    Returns:
      float32 `[n_out, 1, n_in, 1]`, as `Geometry.to_blocks` arranges it.
    """
    tokens, k = x.shape
    if geometry.flat:
        return _sum_blocks(delta**2 * jnp.mean(x**2, axis=0)[:, None], geometry)
    padded_n, padded_k = geometry.padded_shape
    size = geometry.block_shape[-1] or padded_k
    block_n = geometry.block_shape[0] or padded_n
    groups = padded_k // size
    n = delta.shape[1]
    x_groups = jnp.pad(x, ((0, 0), (0, padded_k - k))).reshape(tokens, groups, size)
    padding = ((0, padded_k - k), (0, padded_n - n))
    delta_groups = jnp.pad(delta, padding).reshape(groups, size, padded_n)
    # Without HIGHEST, matrix units would read bfloat16.
    dot = functools.partial(
        jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    if size < tokens:
        # Second moments of each group are smaller than its products with all tokens.
        moments = dot("tgk,tgl->gkl", x_groups, x_groups) / tokens  # [g, size, size]
        products = delta_groups * dot("gkl,glo->gko", moments, delta_groups)
        error = jnp.sum(products, axis=1)  # [g, padded_n]
    else:
        error = jnp.mean(dot("tgk,gko->tgo", x_groups, delta_groups) ** 2, axis=0)
    num_blocks_n = padded_n // block_n if block_n else 0
    error = jnp.sum(error.reshape(groups, num_blocks_n, block_n), axis=2)
    return error[:, None, :, None]


def _sum_blocks(error: jax.Array, geometry: Geometry) -> jax.Array:
    """The sum over each block of a matrix `[in, out]`, shaped like a range."""
    blocks = geometry.to_blocks(geometry.pad(geometry.to_view(error)))
    return jnp.sum(blocks, axis=geometry.block_axes, keepdims=True)


def _map_blocks(
    function: Callable[[jax.Array], jax.Array],
    w: jax.Array,
    spec: QuantSpec,
    geometry: Geometry,
) -> jax.Array:
    """Applies a function to the blocks of w, and returns them in the shape of w."""
    blocks = function(_padded_blocks(w, spec, geometry))
    return geometry.from_view(geometry.unpad(geometry.from_blocks(blocks)))


def _padded_blocks(w: jax.Array, spec: QuantSpec, geometry: Geometry) -> jax.Array:
    """The blocks of w. The padding does not change the range of a block."""
    # A range that starts at the minimum may not contain 0, so 0 would extend it.
    mode = "edge" if spec.offset == "min" else "constant"
    return geometry.to_blocks(geometry.pad(geometry.to_view(w), mode=mode))


def _whole_range(w: jax.Array, spec: QuantSpec, geometry: Geometry) -> _Range:
    """The range of plain quantization.

    It is symmetric about 0 for a symmetric spec, starts at the minimum for
    `offset="min"`, and contains 0 otherwise.
    """
    blocks, axes = _padded_blocks(w, spec, geometry), geometry.block_axes
    if spec.symmetric and spec.offset != "min":
        high = jnp.max(jnp.abs(blocks), axis=axes, keepdims=True, initial=0.0)
        return _Range(-high, high)
    low = jnp.min(blocks, axis=axes, keepdims=True, initial=np.inf)
    high = jnp.max(blocks, axis=axes, keepdims=True, initial=-np.inf)
    if spec.offset == "min":
        return _Range(low, high)
    return _Range(jnp.minimum(low, 0.0), jnp.maximum(high, 0.0))


def _percentile_range(
    w: jax.Array,
    whole: _Range,
    spec: QuantSpec,
    geometry: Geometry,
    shares: tuple[np.float32, ...],
) -> _Range:
    """The range of each block with the given shares of its numbers below the ends."""
    values, inside = _blocks_as_rows(w, spec, geometry)
    counts = jnp.sum(inside, axis=-1)
    if len(shares) == 1:
        high = _quantile(jnp.abs(values), inside, counts, shares[0])
        low = -high
    else:
        low = _quantile(values, inside, counts, shares[0])
        high = _quantile(values, inside, counts, shares[1])
        if spec.offset != "min":
            low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    low, high = low.reshape(whole.low.shape), high.reshape(whole.low.shape)
    # If almost all numbers of a block are zero, its range would be empty or leave out
    # most of the other numbers. `observers.percentile` has the same limits.
    tail = 1 - shares[0] if len(shares) == 1 else 1 - (shares[1] - shares[0])
    limit = jnp.minimum(2 * tail, jnp.maximum(tail, 0.5))
    num_others = jnp.sum(inside & (values != 0), axis=-1, dtype=jnp.float32)
    few = num_others <= limit * counts.astype(jnp.float32)
    whole_range = few.reshape(low.shape) | (low >= high)
    return _Range(
        jnp.where(whole_range, whole.low, low), jnp.where(whole_range, whole.high, high)
    )


def _quantile(
    values: jax.Array, inside: jax.Array, counts: jax.Array, share: np.float32
) -> jax.Array:
    """The quantile of each row's numbers.

    It is interpolated linearly between the two nearest ranks.

    Args:
      values: float32 `[rows, size]`.
      inside: bool `[rows, size]`, True for the numbers that count.
      counts: int32 `[rows]`, how many numbers of each row count.
      share: 0 to 1.
    """
    ordered = jnp.sort(jnp.where(inside, values, np.float32(np.inf)), axis=-1)
    position = share * (counts - 1).astype(jnp.float32)
    below = jnp.floor(position)

    def at_rank(rank: jax.Array) -> jax.Array:
        index = jnp.clip(rank.astype(jnp.int32), 0, counts - 1)[:, None]
        return jnp.take_along_axis(ordered, index, axis=-1)[:, 0]

    lower, upper = at_rank(below), at_rank(below + 1)
    return lower + (upper - lower) * (position - below)


def _blocks_as_rows(
    w: jax.Array, spec: QuantSpec, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    """Each block as a row `[blocks, size]`, and a mask that is False for padding."""

    def as_rows(blocks: jax.Array) -> jax.Array:
        axes = tuple(blocks.ndim + a for a in geometry.block_axes)
        outer_axes = tuple(a for a in range(blocks.ndim) if a not in axes)
        size = math.prod(blocks.shape[a] for a in axes)
        return jnp.transpose(blocks, (*outer_axes, *axes)).reshape(-1, size)

    ones = geometry.to_view(jnp.ones(w.shape, bool))
    mask = geometry.to_blocks(geometry.pad(ones))
    return as_rows(_padded_blocks(w, spec, geometry)), as_rows(mask)


def _entropy_range(
    w: jax.Array, whole: _Range, spec: QuantSpec, geometry: Geometry, bins: int
) -> _Range:
    """The range of each block that loses least information; see `observers.entropy`."""
    values, inside = _blocks_as_rows(w, spec, geometry)
    low, high = observers.entropy(bins, axis=0).bounds_of(
        values, spec.fmt, symmetric=spec.symmetric, where=inside
    )
    threshold = jnp.maximum(-low, high).reshape(whole.low.shape)
    return _Range(
        jnp.maximum(whole.low, -threshold), jnp.minimum(whole.high, threshold)
    )


def _unread_option(options: Mapping[str, Any]) -> str:
    """Says which option the rule does not read; empty if it reads all of them.

    None and False mean that an option was not set.
    """
    rule = options.get("rule", "mse")
    for name, value in options.items():
        reader = _READER.get(name, rule)
        if value not in (None, False) and reader != rule:
            return (
                f"{name}={value!r} is for rule={reader!r}; rule={rule!r} does not read "
                "it."
            )
    return ""


def _why_not_clipped(spec: QuantSpec, options: Mapping[str, Any]) -> str:
    """Why a weight cannot be clipped for a spec with these options; empty if it can."""
    reason = why_not_stochastic(spec, options)
    if reason:
        return reason
    rule = options.get("rule", "mse")
    if rule == "entropy" and spec.offset == "min":
        return (
            "rule='entropy' needs a range about 0, and offset='min' has a range from "
            "the minimum. Use rule='mse'."
        )
    if rule == "entropy" and not _is_evenly_spaced(spec.fmt):
        return (
            f"rule='entropy' needs evenly spaced numbers, and those of {spec.fmt.name} "
            "are not. Use rule='mse'."
        )
    minimizes_squares = rule == "mse" and options.get("power", 2.0) == 2.0
    if options.get("inputs", False) and not minimizes_squares:
        return (
            "inputs=True weighs the squared error of products. Only rule='mse' with "
            "power=2 minimizes this error. Leave out rule= and power=."
        )
    return ""


def _is_evenly_spaced(fmt: formats.Format) -> bool:
    steps = np.diff(np.unique(fmt.values()))
    return np.ptp(steps) == 0


def _solve_clip(
    w: jax.Array,
    stats: LayerStats | None,
    spec: QuantSpec,
    *,
    key: jax.Array,
    inputs: bool = False,
    **options: Any,
) -> Solution:
    if not inputs:
        qt, _ = clip(w, spec, **options)
        return Solution(qt)
    assert stats is not None
    qt, _ = clip(w, spec, x=stats.samples, **options)
    return Solution(qt, few_samples(stats, w.shape[-2]))


def _needs_samples(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The statistics that `inputs=True` reads."""
    return ("samples",) if options.get("inputs", False) else ()


METHOD = Method(
    "clip",
    _solve_clip,
    options=_OPTIONS,
    check=_unread_option,
    why_not=_why_not_clipped,
    needs_with=_needs_samples,
)
