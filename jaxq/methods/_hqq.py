"""HQQ: fits each block's grid to its weights, so that a few large errors count little.

Half-quadratic splitting of `min sum |w - q|^p`, p < 1. An extra matrix e takes the
large part of the errors, and the grid is fitted to the rest by least squares in closed
form:

    u = number of each code on the current grid     # without scale and offset
    d = w - (s u + o)
    e = sign(d) max(|d| - |d|^(p-1) / beta, 0)      # d and e in units of s
    o = mean(w - e - s u)                           # offset="min": the paper's zero
    z = round(mean(codes - (w - e) / s))            # specs with a zero point
    s = sum((w - e) u) / sum(u^2)                   # specs without offset="min"

Sums and means are over a block. Blocks are arrays as `Geometry.to_blocks` arranges
them, `[n_out, size_out, n_in, size_in]`; scales and sums are `[n_out, 1, n_in, 1]`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxq import formats
from jaxq.methods import _matrix
from jaxq.methods._explicit_axes import on_explicit_axes
from jaxq.methods._method import Method, Solution
from jaxq.methods._method_options import (
    NOT_NEGATIVE,
    POSITIVE,
    check_values,
    number,
    refuse,
    why_not_stochastic,
)
from jaxq.observers import LayerStats
from jaxq.qtensor import (
    Geometry,
    QTensor,
    QuantSpec,
    as_spec,
    decode_blocks,
    quantize,
    requantize,
    scale_values,
)

_OPTIONS = {
    "norm": number("above 0 and below 1", above=0, below=1),
    "beta": POSITIVE,
    "kappa": POSITIVE,
    "num_steps": NOT_NEGATIVE,
}


class HQQInfo(NamedTuple):
    """Diagnostics of `hqq`.

    Attributes:
      error: float32, mean `|w - q|` of the result.
      initial_error: float32, mean `|w - q|` of rounding to nearest by `quantize`.
      improved: float32, share of blocks (groups, channels) whose grid changed.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> _, info = jaxq.methods.hqq(jnp.ones((4, 2)), "int4")
      >>> float(info.improved)
      0.0
    """

    error: jax.Array
    initial_error: jax.Array
    improved: jax.Array


@on_explicit_axes
def hqq(
    w: ArrayLike,
    spec: str | QuantSpec,
    *,
    norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    num_steps: int = 20,
    name: str = "w",
) -> tuple[QTensor, HQQInfo]:
    """Fits each block's grid to its weights, so that a few large errors count little.

    `argmin over the grid of sum |w - Q(w)|^norm`, by half-quadratic splitting, without
    data. The spec decides which part of the grid moves:

    | spec | what moves |
    |---|---|
    | `offset="min"` | the offset, the real-valued zero of the paper |
    | `symmetric=False` | the zero point, in whole numbers, and the scale |
    | symmetric | the scale |

    Each block keeps the grid of least mean `|w - q|` over all steps, including the grid
    of `quantize`. So no block gets worse. Errors are measured in steps of the grid, so
    `beta` means the same for weights of any size.

    Args:
      w: float `[in, out]`, or a stack `[..., in, out]` (by `jax.vmap`).
      spec: preset name or `QuantSpec`. Its scales must not be quantized themselves,
        unless it has `offset="min"`.
      norm: the exponent p, above 0 and below 1.
      beta: positive, weight of the split at the first step.
      kappa: positive, factor of beta from step to step.
      num_steps: number of steps, not negative.
      name: the name of the weight in errors.

    Returns:
      `(qt, info)`: a QTensor with the shape and dtype of `w`, axis -2 contracted; and
      an `HQQInfo`, whose arrays have the leading axes of `w`.

    Raises:
      TypeError: `w` is not float32, bfloat16 or float16.
      ValueError: the scales of the spec are quantized themselves, the spec rounds
        stochastically, an option is out of range, `w` is not a matrix, or (outside jit)
        `w` has a number that is not finite.

    Example:
      >>> import jax, jaxq
      >>> w = jax.random.normal(jax.random.key(0), (64, 4))
      >>> spec = jaxq.QuantSpec("uint4", jaxq.PerGroup(32), offset="min")
      >>> qt, info = jaxq.methods.hqq(w, spec)
      >>> bool(info.error <= info.initial_error)
      True

    References:
      Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models",
      2023, section 2.
    """
    spec = as_spec(spec, "hqq")
    refuse("hqq", _why_not_hqq(spec, {}))
    w = _matrix.as_weight(w, "hqq", name)
    check_values(
        "hqq", _OPTIONS, norm=norm, beta=beta, kappa=kappa, num_steps=num_steps
    )
    splitting = _Splitting(np.float32(norm), np.float32(beta), np.float32(kappa))
    return _hqq(w, spec, splitting, num_steps)


class _Splitting(NamedTuple):
    """The numbers of the splitting, traced so that they need no new compilation."""

    norm: ArrayLike
    beta: ArrayLike
    kappa: ArrayLike


@functools.partial(jax.jit, static_argnames=("spec", "num_steps"))
def _hqq(
    w: jax.Array, spec: QuantSpec, splitting: _Splitting, num_steps: int
) -> tuple[QTensor, HQQInfo]:
    fit_matrix = functools.partial(
        _fit_matrix, spec=spec, splitting=splitting, num_steps=num_steps
    )
    return _matrix.over_stack(fit_matrix, w)


# The leaves of a QTensor that move, by name; each is `[*num_blocks]`, as it is stored.
_Leaves = dict[str, jax.Array]


class _State(NamedTuple):
    """What changes from step to step.

    Attributes:
      leaves: the grid of this step.
      best: the best grid of each block so far.
      least: sum of |w - q| of each block on `best`, `[n_out, 1, n_in, 1]`.
      beta: weight of the split in this step.
    """

    leaves: _Leaves
    best: _Leaves
    least: jax.Array
    beta: jax.Array


class _Rounded(NamedTuple):
    """A weight rounded on a grid; all arrays are float32 blocks.

    Attributes:
      codes: the stored codes.
      units: the numbers that the codes stand for, without scale and offset.
      steps: the scale of each block.
      offset: the offset of each block; 0 if the spec has none.
      error: `w - (units * steps + offset)`.
    """

    codes: jax.Array
    units: jax.Array
    steps: jax.Array
    offset: jax.Array
    error: jax.Array


class _BlockSums:
    """Sums over the blocks of a weight, without their padding."""

    def __init__(self, geometry: Geometry, view: jax.Array):
        self.axes = geometry.block_axes
        # 1 for weights, 0 for padding
        self.inside = geometry.to_blocks(geometry.pad(jnp.ones_like(view)))
        self.counts = jnp.maximum(self.total(self.inside), 1.0)

    def total(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x * self.inside, axis=self.axes, keepdims=True)


def _fit_matrix(
    w: jax.Array, spec: QuantSpec, splitting: _Splitting, num_steps: int
) -> tuple[QTensor, HQQInfo]:
    """`hqq` for one matrix `[in, out]`."""
    start = quantize(w, spec, contracting=-2, on_nonfinite="propagate")
    geometry = start.meta.geometry
    view = geometry.to_view(w).astype(jnp.float32)
    blocks = geometry.to_blocks(geometry.pad(view))
    sums = _BlockSums(geometry, view)

    def move(leaves: _Leaves, rounded: _Rounded, beta: jax.Array) -> _Leaves:
        rest = blocks - _large_errors(rounded, splitting.norm, beta)  # w - e
        return _fit_grid(leaves, rounded, rest, sums, start)

    def step(state: _State, _: None) -> tuple[_State, None]:
        rounded = _round_on_grid(w, blocks, state.leaves, start)
        error = sums.total(jnp.abs(rounded.error))
        better = error < state.least
        is_best = geometry.scale_from_blocks(better)
        best = {
            name: jnp.where(is_best, leaf, state.best[name])
            for name, leaf in state.leaves.items()
        }
        least = jnp.where(better, error, state.least)
        leaves = move(state.leaves, rounded, state.beta)
        return _State(leaves, best, least, state.beta * splitting.kappa), None

    names = ["offset"] if spec.offset == "min" else ["scale", "zero_point"]
    leaves = {
        name: getattr(start, name) for name in names if getattr(start, name) is not None
    }
    beta = jnp.asarray(splitting.beta, jnp.float32)
    rounded = _round_on_grid(w, blocks, leaves, start)
    initial = sums.total(jnp.abs(rounded.error))
    first = move(leaves, rounded, beta)
    state = _State(first, leaves, initial, beta * splitting.kappa)
    state, _ = lax.scan(step, state, None, length=num_steps)
    qt = requantize(w, dataclasses.replace(start, **state.best))
    info = HQQInfo(
        error=jnp.sum(state.least) / w.size,
        initial_error=jnp.sum(initial) / w.size,
        improved=jnp.mean((state.least < initial).astype(jnp.float32)),
    )
    return qt, info


def _round_on_grid(
    w: jax.Array, blocks: jax.Array, leaves: _Leaves, start: QTensor
) -> _Rounded:
    """Rounds a weight to nearest on the grid of `start`, with `leaves` replaced."""
    geometry = start.meta.geometry
    qt = requantize(w, dataclasses.replace(start, **leaves))
    codes = geometry.to_blocks(geometry.to_view_order(qt.stored_codes()))
    scale = scale_values(qt)
    unit_grid = dataclasses.replace(qt, scale=jnp.ones_like(scale), offset=None)
    units = decode_blocks(unit_grid, codes)
    steps = geometry.scale_to_blocks(scale)
    offset = jnp.zeros_like(steps)
    if qt.offset is not None:
        offset = geometry.scale_to_blocks(qt.offset.astype(jnp.float32))
    error = blocks - (units * steps + offset)
    return _Rounded(codes.astype(jnp.float32), units, steps, offset, error)


def _large_errors(rounded: _Rounded, norm: ArrayLike, beta: jax.Array) -> jax.Array:
    """The matrix e of the splitting: the large part of each error.

    It is the generalized soft-thresholding of the paper, in units of the step.
    """
    step = jnp.where(rounded.steps == 0, 1.0, jnp.abs(rounded.steps))
    size = jnp.abs(rounded.error) / step
    # An error of 0 has no large part, although its power is infinite.
    power = jnp.where(size > 0, size, 1.0) ** (norm - 1)
    large = jnp.sign(rounded.error) * jnp.maximum(size - power / beta, 0.0) * step
    return jnp.where(size > 0, large, 0.0)


def _fit_grid(
    leaves: _Leaves,
    rounded: _Rounded,
    rest: jax.Array,
    sums: _BlockSums,
    start: QTensor,
) -> _Leaves:
    """Fits the leaves to `rest` by least squares. The codes do not change."""
    spec, geometry = start.spec, start.meta.geometry
    if spec.offset == "min":
        offset = sums.total(rest - rounded.units * rounded.steps) / sums.counts
        return {"offset": _as_stored(offset, leaves["offset"], geometry)}
    new, units = {}, rounded.units
    if "zero_point" in leaves:
        step = jnp.where(rounded.steps == 0, 1.0, jnp.abs(rounded.steps))
        mean = sums.total(rounded.codes - rest / step) / sums.counts
        zero = jnp.clip(jnp.round(mean), spec.fmt.min, spec.fmt.max)
        units = rounded.codes - zero
        stored = geometry.scale_from_blocks(zero.astype(spec.fmt.code_dtype))
        new["zero_point"] = stored
    square = sums.total(units * units)
    scale = sums.total((rest - rounded.offset) * units)
    scale = scale / jnp.where(square > 0, square, 1.0)
    # A scale keeps its sign. Only scale rules with signed scales have negative ones.
    keeps_sign = scale * rounded.steps > 0
    scale = jnp.where((square > 0) & keeps_sign, scale, rounded.steps)
    return new | {"scale": _as_stored(scale, leaves["scale"], geometry)}


def _as_stored(x: jax.Array, like: jax.Array, geometry: Geometry) -> jax.Array:
    """Numbers of blocks in the dtype and order of `like`.

    A nonzero number does not become zero, and no number overflows.
    """
    fmt, x = formats.get(like.dtype.name), geometry.scale_from_blocks(x)
    # A subnormal float32 number may be flushed to zero.
    least = max(fmt.smallest_positive, float(np.finfo(np.float32).tiny))
    magnitude = jnp.clip(jnp.abs(x), least, fmt.max)
    return jnp.where(x == 0, 0.0, jnp.sign(x) * magnitude).astype(like.dtype)


def _why_not_hqq(spec: QuantSpec, options: Mapping[str, Any]) -> str:
    """Why HQQ cannot quantize to a spec; empty if it can."""
    reason = why_not_stochastic(spec, options)
    if reason:
        return reason
    if isinstance(spec.scale, QuantSpec) and spec.offset != "min":
        return (
            f"scales of this spec are quantized themselves ({spec.scale.fmt.name}) and "
            "cannot be moved one by one. Use a spec with scale='float32', 'bfloat16' "
            "or 'float16', or with offset='min'."
        )
    return ""


def _solve_hqq(
    w: jax.Array,
    stats: LayerStats | None,
    spec: QuantSpec,
    *,
    key: jax.Array,
    **options: Any,
) -> Solution:
    qt, _ = hqq(w, spec, **options)
    return Solution(qt)


METHOD = Method("hqq", _solve_hqq, options=_OPTIONS, why_not=_why_not_hqq)
