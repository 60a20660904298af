"""Clipping: a smaller range than the extremes, chosen for each block.

A range that ends before the largest numbers makes the steps smaller for all others: `s^2 / 12` times the numbers
inside, against the squared excess of those outside. Three rules choose where it ends; scales come from the clipped
block, codes from the whole one, so that what lies beyond saturates.
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
from jaxq.methods._method import Method, Solution
from jaxq.methods._notes import few_samples
from jaxq.methods._options import (
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
# The rule that reads each option; `rule` itself is read by all.
_READER = {
    "power": "mse",
    "num": "mse",
    "max_shrink": "mse",
    "inputs": "mse",
    "percentile": "percentile",
    "bins": "entropy",
}


class ClipInfo(NamedTuple):
    """What `clip` chose; every field is float32 `[*num_blocks]`, the shape of the scales.

    Attributes:
      low: where the range of the block ends below.
      high: where it ends above.
      error: sum over the block of what the rule "mse" minimises.
      error_unclipped: the same of plain quantization.
    """

    low: jax.Array
    high: jax.Array
    error: jax.Array
    error_unclipped: jax.Array


class _Range(NamedTuple):
    """Where blocks begin and end, shaped to broadcast against `Geometry.to_blocks`."""

    low: jax.Array
    high: jax.Array


class _Search(NamedTuple):
    """The static choices of `clip`."""

    rule: str
    power: float
    bins: int


class _Amounts(NamedTuple):
    """Its numbers, which need no compilation of their own."""

    num: np.int32
    max_shrink: np.float32
    shares: tuple[np.float32, ...]  # of a block's numbers below each end of its range


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
    """Quantizes `w` with a range of its own choice for each block of the spec's granularity.

    "mse": `T_k = A (1 - max_shrink k / num)`, `k = 0 .. num - 1`, with A the block's largest magnitude; the T of
    least `sum_i c_i |w_i - Q_T(w_i)|^power`, or, given `x`, of least `mean_t (sum_i x_ti (w_i - Q_T(w_i)))^2` over
    the block's part of the products, as AWQ does. T_0 = A is plain quantization. "percentile": `percentile` per cent
    of the block lie inside, by linear interpolation. "entropy": the T whose histogram loses least information when it
    is told in as few levels as the codes have there (`jaxq.observers.entropy`).

    Without `symmetric`, both ends shrink by the same factor; "percentile" leaves half of the rest on either side.

    Args:
      w: float `[in, out]`, or a stack of such matrices with axes in front.
      spec: preset name or `QuantSpec`.
      rule: "mse", "percentile" or "entropy".
      x: float `[..., in]`, inputs of the layer, for "mse" (for a stack: `[tokens, in]`, or stacked like w).
      channel_weight: float `[in]` (or stacked like w), not negative: the weight c of each input channel for "mse",
        `mean_t x_t^2` for example.
      power: exponent of "mse"; None takes 2.
      num: how many ranges "mse" tries; None takes 80.
      max_shrink: how far the last of them is from the first, 0 to 1; None takes 0.8.
      percentile: 0 to 100, for "percentile"; None takes 99.9.
      bins: of each block's histogram, for "entropy": at least the number of levels; None takes 512. Time grows with its
        square.
      name: what errors call w, a parameter's path for example.

    Returns:
      `(qt, info)`: a QTensor with the geometry of `jaxq.quantize(w, spec, contracting=-2)`, and a `ClipInfo`. The
      error of "mse" is at most that of plain quantization: in each block where scales are plain numbers, in total
      where they are quantized themselves.

    Raises:
      TypeError: `w` is not a float array.
      ValueError: shapes that do not meet, an unknown rule, arguments of another rule, numbers out of range.

    Example:
      >>> import jax, jaxq
      >>> from jaxq.methods import clip
      >>> w = jax.random.normal(jax.random.key(0), (128, 4))
      >>> qt, info = clip(w, "int4")
      >>> bool((info.error <= info.error_unclipped).all()), qt.shape
      (True, (128, 4))

    References:
      Banner et al., "Post Training 4-bit Quantization of Convolutional Networks for Rapid-Deployment", 2019, section 3.
      Migacz, "8-bit Inference with TensorRT", GTC 2017 (entropy).
      Lin et al., "AWQ: Activation-aware Weight Quantization", 2023, section 3 (given x).
      Frantar et al., "GPTQ", 2022 (the grid; its code has power=2.4).
    """
    spec = as_spec(spec, "clip")
    formats.check_choice("clip: rule", rule, RULES)
    refuse("clip", _why_not_clipped(spec, {"rule": rule}))
    w = _matrix.as_weight(w, "clip", name)
    if rule != "mse" and (x is not None or channel_weight is not None):
        raise ValueError(
            f"clip: x and channel_weight weigh the error of rule='mse'; rule={rule!r} has none."
        )
    if x is not None and channel_weight is not None:
        raise ValueError("clip: give x or channel_weight, not both.")
    given = {
        "power": power,
        "num": num,
        "max_shrink": max_shrink,
        "percentile": percentile,
        "bins": bins,
    }
    refuse("clip", _unread_option({"rule": rule, **given}))
    check_values(
        "clip",
        _OPTIONS,
        **{option: value for option, value in given.items() if value is not None},
    )
    if x is not None and power not in (None, 2.0):
        raise ValueError(
            f"clip: the error of products is squared; power={power} is for clip without x."
        )
    power, max_shrink = (
        2.0 if power is None else power,
        0.8 if max_shrink is None else max_shrink,
    )
    num, bins = 80 if num is None else num, 512 if bins is None else bins
    percentile = 99.9 if percentile is None else percentile
    statistics = []
    if x is not None:
        statistics = [(as_tokens(x, w, "clip"), 2)]
    elif channel_weight is not None:
        said = "one number for each input"
        given = _matrix.as_statistic(
            channel_weight,
            "channel_weight",
            "clip",
            shape=w.shape[-2:-1],
            said=said,
            w=w,
        )
        statistics = [(given, 1)]
    one_sided = spec.symmetric and spec.offset != "min"
    shares = (
        (percentile / 100,)
        if one_sided
        else ((100 - percentile) / 200, (100 + percentile) / 200)
    )
    amounts = _Amounts(
        np.int32(num), np.float32(max_shrink), tuple(map(np.float32, shares))
    )
    one = functools.partial(
        _clip, amounts=amounts, spec=spec, search=_Search(rule, float(power), int(bins))
    )
    return _matrix.over_stack(one, w, *statistics)


@functools.partial(jax.jit, static_argnames=("spec", "search"))
def _clip(
    w: jax.Array,
    weight: jax.Array | None = None,
    *,
    amounts: _Amounts,
    spec: QuantSpec,
    search: _Search,
) -> tuple[QTensor, ClipInfo]:
    """`weight`: tokens `[tokens, in]`, weights of channels `[in]`, or None."""
    dtype, w = w.dtype, w.astype(jnp.float32)
    geometry = jax.eval_shape(
        lambda v: quantize(v, spec, contracting=-2), w
    ).meta.geometry
    whole = _extremes(w, spec, geometry)

    def error(qt: QTensor) -> jax.Array:
        delta = w - dequantize(qt)
        if weight is not None and weight.ndim == 2:
            return output_error(delta, weight, geometry)
        delta = _powered(delta, search.power)
        return _block_error(
            delta if weight is None else delta * weight[:, None], geometry
        )

    def within(ends: _Range) -> QTensor:
        limited = _map_blocks(
            lambda b: jnp.clip(b, ends.low, ends.high), w, spec, geometry
        )
        return requantize(
            w, quantize(limited, spec, contracting=-2, on_nonfinite="propagate")
        )

    plain = quantize(w, spec, contracting=-2, on_nonfinite="propagate")
    if search.rule == "mse":
        qt, ends, found, unclipped = _least_error(whole, within, error, spec, amounts)
        if not _is_separable(
            spec
        ):  # the best of each block need not be the best of all
            unclipped = error(plain)
            better = jnp.sum(found) <= jnp.sum(unclipped)
            qt, ends, found = jax.tree.map(
                lambda new, old: jnp.where(better, new, old),
                (qt, ends, found),
                (plain, whole, unclipped),
            )
    else:
        if search.rule == "percentile":
            ends = _percentiles(w, whole, spec, geometry, amounts.shares)
        else:
            ends = _least_divergence(w, whole, spec, geometry, search.bins)
        qt = within(ends)
        found, unclipped = error(qt), error(plain)
    info = ClipInfo(*(geometry.scale_from_blocks(v) for v in (*ends, found, unclipped)))
    return qt.astype(dtype), info


def _is_separable(spec: QuantSpec) -> bool:
    """True where what a block becomes depends on its own range alone, and the whole range gives plain codes."""
    plain = (
        isinstance(spec.scale, str)
        and spec.offset != "mean"
        and not spec.rule.has_threshold
    )
    return plain and spec.codes_from == "stored"


def _least_error(
    whole: _Range,
    within: Callable[[_Range], QTensor],
    error: Callable[[QTensor], jax.Array],
    spec: QuantSpec,
    amounts: _Amounts,
) -> tuple[QTensor, _Range, jax.Array, jax.Array]:
    """Tries ranges one at a time: `(qt, its range, its error, error of the whole range)`, the best for each block.

    The last turn is at the best of those before it, so that one program serves both.
    """

    def step(k: jax.Array, carry: tuple) -> tuple:
        _, _, now, unclipped, least, factor = carry
        tried = 1.0 - amounts.max_shrink * k.astype(jnp.float32) / jnp.float32(
            amounts.num
        )
        tried = jnp.where(k < amounts.num, tried, factor)
        qt = within(ends := _shrink(whole, tried, spec))
        now = error(qt)
        better = now < least
        least, factor = jnp.where(better, now, least), jnp.where(better, tried, factor)
        return qt, ends, now, jnp.where(k == 0, now, unclipped), least, factor

    shapes = jax.eval_shape(within, whole)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ones = jnp.ones_like(whole.high)
    carry = (empty, whole, ones, ones, ones * np.float32(np.inf), ones)
    return lax.fori_loop(0, amounts.num + 1, step, carry)[:4]


def _shrink(whole: _Range, factor: jax.Array, spec: QuantSpec) -> _Range:
    """The range made smaller about 0, or about its middle where numbers are counted from their minimum."""
    if spec.offset != "min":
        return _Range(whole.low * factor, whole.high * factor)
    middle = whole.low * 0.5 + whole.high * 0.5
    half = (whole.high * 0.5 - whole.low * 0.5) * factor
    shrunk = _Range(middle - half, middle + half)
    return _Range(
        *(
            jnp.where(factor == 1.0, old, new)
            for old, new in zip(whole, shrunk, strict=True)
        )
    )


def output_error(delta: jax.Array, x: jax.Array, geometry: Geometry) -> jax.Array:
    """`mean_t (sum_k x_tk delta_ko)^2` over each block's part of k, summed over its part of o, in `to_blocks` form.

    Blocks of a flattened array have no such parts; there the products of different channels are left out.
    """
    tokens, k = x.shape
    if geometry.flat:
        return _block_error(delta**2 * jnp.mean(x**2, axis=0)[:, None], geometry)
    padded_n, padded_k = geometry.padded_shape
    size = geometry.block_shape[-1] or padded_k
    block_n = geometry.block_shape[0] or padded_n
    groups = padded_k // size
    n = delta.shape[1]
    xs = jnp.pad(x, ((0, 0), (0, padded_k - k))).reshape(tokens, groups, size)
    ds = jnp.pad(delta, ((0, padded_k - k), (0, padded_n - n))).reshape(
        groups, size, padded_n
    )
    # HIGHEST: matrix units would otherwise read bfloat16.
    dot = functools.partial(
        jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    if size < tokens:  # [size, size] a group is less than [tokens, size]
        moments = dot("tgk,tgl->gkl", xs, xs) / tokens
        error = jnp.sum(ds * dot("gkl,glo->gko", moments, ds), axis=1)
    else:
        error = jnp.mean(dot("tgk,gko->tgo", xs, ds) ** 2, axis=0)
    error = jnp.sum(
        error.reshape(groups, padded_n // block_n if block_n else 0, block_n), axis=2
    )
    return error[:, None, :, None]


def _powered(delta: jax.Array, power: float) -> jax.Array:
    return delta * delta if power == 2.0 else jnp.abs(delta) ** power


def _block_error(error: jax.Array, geometry: Geometry) -> jax.Array:
    blocks = geometry.to_blocks(geometry.pad(geometry.to_view(error)))
    return jnp.sum(blocks, axis=geometry.block_axes, keepdims=True)


def _map_blocks(
    fn: Callable[[jax.Array], jax.Array],
    w: jax.Array,
    spec: QuantSpec,
    geometry: Geometry,
) -> jax.Array:
    """`fn` of the blocks, back in the shape of w."""
    blocks = _blocks(w, spec, geometry)
    return geometry.from_view(geometry.unpad(geometry.from_blocks(fn(blocks))))


def _blocks(w: jax.Array, spec: QuantSpec, geometry: Geometry) -> jax.Array:
    mode = "edge" if spec.offset == "min" else "constant"
    return geometry.to_blocks(geometry.pad(geometry.to_view(w), mode=mode))


def _extremes(w: jax.Array, spec: QuantSpec, geometry: Geometry) -> _Range:
    """The range plain quantization covers: about 0 if symmetric, from the minimum if offset, else with 0 inside."""
    blocks, axes = _blocks(w, spec, geometry), geometry.block_axes
    if spec.symmetric and spec.offset != "min":
        high = jnp.max(jnp.abs(blocks), axis=axes, keepdims=True, initial=0.0)
        return _Range(-high, high)
    low = jnp.min(blocks, axis=axes, keepdims=True, initial=np.inf)
    high = jnp.max(blocks, axis=axes, keepdims=True, initial=-np.inf)
    if spec.offset == "min":
        return _Range(low, high)
    return _Range(jnp.minimum(low, 0.0), jnp.maximum(high, 0.0))


def _percentiles(
    w: jax.Array,
    whole: _Range,
    spec: QuantSpec,
    geometry: Geometry,
    shares: tuple[np.float32, ...],
) -> _Range:
    values, inside = _flat_blocks(w, spec, geometry)
    counts = jnp.sum(inside, axis=-1)
    values = jnp.abs(values) if len(shares) == 1 else values
    found = [_quantile(values, inside, counts, share) for share in shares]
    if len(shares) == 1:
        found = [-found[0], found[0]]
    elif spec.offset != "min":
        found = [jnp.minimum(found[0], 0.0), jnp.maximum(found[1], 0.0)]
    low, high = (v.reshape(whole.low.shape) for v in found)
    empty = low >= high  # of a block that is nearly all zeros nothing would be left
    return _Range(jnp.where(empty, whole.low, low), jnp.where(empty, whole.high, high))


def _quantile(
    values: jax.Array, inside: jax.Array, counts: jax.Array, share: np.float32
) -> jax.Array:
    """Of each row's numbers inside, by linear interpolation between the two nearest ranks."""
    ordered = jnp.sort(jnp.where(inside, values, np.float32(np.inf)), axis=-1)
    position = share * (counts - 1).astype(jnp.float32)
    below = jnp.floor(position)
    lower, upper = (
        jnp.take_along_axis(
            ordered, jnp.clip(rank.astype(jnp.int32), 0, counts - 1)[:, None], axis=-1
        )[:, 0]
        for rank in (below, below + 1)
    )
    return lower + (upper - lower) * (position - below)


def _flat_blocks(
    w: jax.Array, spec: QuantSpec, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    """Each block as a row `[blocks, size]`, and where it holds true numbers."""

    def rows(blocks: jax.Array) -> jax.Array:
        axes = tuple(blocks.ndim + a for a in geometry.block_axes)
        others = tuple(a for a in range(blocks.ndim) if a not in axes)
        size = math.prod(blocks.shape[a] for a in axes)
        return jnp.transpose(blocks, (*others, *axes)).reshape(-1, size)

    true = geometry.to_blocks(geometry.pad(geometry.to_view(jnp.ones(w.shape, bool))))
    return rows(_blocks(w, spec, geometry)), rows(true)


def _least_divergence(
    w: jax.Array, whole: _Range, spec: QuantSpec, geometry: Geometry, bins: int
) -> _Range:
    values, inside = _flat_blocks(w, spec, geometry)
    found = observers.entropy(bins, axis=0).bounds_of(
        values, spec.fmt, symmetric=spec.symmetric, where=inside
    )
    threshold = jnp.maximum(-found[0], found[1]).reshape(whole.low.shape)
    return _Range(
        jnp.maximum(whole.low, -threshold), jnp.minimum(whole.high, threshold)
    )


def _unread_option(options: Mapping[str, Any]) -> str:
    """Says which option the rule does not read; empty if it reads all.

    None and False mean that an option was not set.
    """
    rule = options.get("rule", "mse")
    for name, value in options.items():
        reader = _READER.get(name, rule)
        if value not in (None, False) and reader != rule:
            return (
                f"{name}={value!r} is of rule={reader!r}, and rule={rule!r} does not "
                "read it."
            )
    return ""


def _why_not_clipped(spec: QuantSpec, options: Mapping[str, Any]) -> str:
    """Why a weight cannot be clipped for a spec with these options; empty if it can."""
    if reason := why_not_stochastic(spec, options):
        return reason
    rule = options.get("rule", "mse")
    if rule == "entropy" and spec.offset == "min":
        return (
            "rule='entropy' counts magnitudes, which offset='min' does not start from; "
            "use 'mse'."
        )
    if rule == "entropy" and not _is_even(spec.fmt):
        return (
            f"rule='entropy' counts even steps, which the numbers of {spec.fmt.name} "
            "are not; use 'mse'."
        )
    squared = rule == "mse" and options.get("power", 2.0) == 2.0
    if options.get("inputs", False) and not squared:
        return (
            "inputs=True weighs the squared error of products, which rule='mse' with "
            "power=2 minimises; leave those."
        )
    return ""


def _is_even(fmt: formats.Format) -> bool:
    """True if the numbers of a format are evenly spaced."""
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
    return ("samples",) if options.get("inputs", False) else ()


METHOD = Method(
    "clip",
    _solve_clip,
    options=_OPTIONS,
    check=_unread_option,
    why_not=_why_not_clipped,
    needs_with=_needs_samples,
)
