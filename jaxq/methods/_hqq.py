"""HQQ: scales and zeros that a few large errors do not pull about, found from the weight alone.

Half-quadratic splitting of `min sum |w - q|^p`, p < 1: an extra matrix e takes what of the error is large, and the grid
is fitted to the rest by least squares, in closed form:

    u = codes behind w on the grid so far                  # in steps, without scale and offset
    d = w - (s u + o)
    e = sign(d) max(|d| - |d|^(p-1) / beta, 0)             # errors in units of s
    o = mean of (w - e) - s u                              # offset="min": the real zero of the paper
    z = round(mean of codes - (w - e) / s)                 # a zero point
    s = sum of (w - e) u / sum of u^2                      # specs without an offset
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
from jaxq.methods._method import Method, Solution
from jaxq.methods._options import (
    NOT_NEGATIVE,
    POSITIVE,
    check_values,
    number,
    refuse,
    why_not_stochastic,
)
from jaxq.observers import LayerStats
from jaxq.qtensor import (
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
    """What optimization changed.

    Attributes:
      error: float32, mean `|w - q|` of the result.
      initial_error: float32, that of rounding to nearest on the grid of `quantize`.
      improved: float32, share of blocks (groups, channels) that left that grid.
    """

    error: jax.Array
    initial_error: jax.Array
    improved: jax.Array


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
    """Fits each block's grid to its weights under a norm that forgives a few large errors; no data.

    `argmin over the grid of sum |w - Q(w)|^norm`, by half-quadratic splitting. What moves depends on the spec:

    | spec | moves |
    |---|---|
    | `offset="min"` | the offset, the real zero of the paper |
    | `symmetric=False` | the zero point, in whole numbers, and the scale |
    | symmetric | the scale |

    Each block keeps the grid with the least mean `|w - q|` it has seen, that of `quantize` included, so no block gets
    worse. Errors are measured in steps of the grid, so that `beta` means the same for weights of any size.

    Args:
      w: float `[in, out]`, or `[..., in, out]`: a stack (by `jax.vmap`).
      spec: preset name or `QuantSpec` whose scales are not quantized themselves (unless the offset moves).
      norm: p, above 0 and below 1.
      beta: weight of the split at the first step.
      kappa: factor of beta from step to step.
      num_steps: steps.
      name: what errors call the weight.

    Returns:
      QTensor with the shape and dtype of `w`, axis -2 contracted; `HQQInfo`, arrays with the leading axes of `w`.

    Raises:
      TypeError: `w` is not a float array.
      ValueError: a spec with quantized scales, stochastic rounding, numbers out of range, a number that is not finite
        (outside jit).

    Example:
      >>> import jax, jaxq
      >>> w = jax.random.normal(jax.random.key(0), (64, 4))
      >>> spec = jaxq.QuantSpec("uint4", jaxq.PerGroup(32), offset="min")
      >>> qt, info = jaxq.methods.hqq(w, spec)
      >>> bool(info.error <= info.initial_error)
      True

    References:
      Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023, section 2.
    """
    spec = as_spec(spec, "hqq")
    refuse("hqq", _why_not_hqq(spec, {}))
    w = _matrix.as_weight(w, "hqq", name)
    check_values(
        "hqq", _OPTIONS, norm=norm, beta=beta, kappa=kappa, num_steps=num_steps
    )
    return _hqq(
        w, spec, np.float32(norm), np.float32(beta), np.float32(kappa), num_steps
    )


@functools.partial(jax.jit, static_argnames=("spec", "num_steps"))
def _hqq(
    w: jax.Array,
    spec: QuantSpec,
    norm: ArrayLike,
    beta: ArrayLike,
    kappa: ArrayLike,
    num_steps: int,
):
    one = functools.partial(
        _one, spec=spec, norm=norm, beta=beta, kappa=kappa, num_steps=num_steps
    )
    return _matrix.over_stack(one, w)


# The leaves of a QTensor that move, by name; each `[*num_blocks]` as it is stored.
_Grid = dict[str, jax.Array]


class _State(NamedTuple):
    grid: _Grid
    best: _Grid
    least: (
        jax.Array
    )  # sum of |w - q| of every block on `best`, as `Geometry.to_blocks` keeps it
    beta: jax.Array


class _Seen(NamedTuple):
    """A weight on a grid, as `Geometry.to_blocks` keeps it; float32."""

    codes: jax.Array
    units: jax.Array  # what the codes stand for, in steps
    steps: jax.Array
    offset: jax.Array
    error: jax.Array  # w - (units * steps + offset)


def _one(
    w: jax.Array,
    spec: QuantSpec,
    norm: ArrayLike,
    beta: ArrayLike,
    kappa: ArrayLike,
    num_steps: int,
):
    start = quantize(w, spec, contracting=-2, on_nonfinite="propagate")
    geometry, axes = start.meta.geometry, start.meta.geometry.block_axes
    view = geometry.to_view(w).astype(jnp.float32)
    blocks = geometry.to_blocks(geometry.pad(view))
    inside = geometry.to_blocks(geometry.pad(jnp.ones_like(view)))  # 0 in the padding
    counts = jnp.maximum(jnp.sum(inside, axis=axes, keepdims=True), 1.0)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(x * inside, axis=axes, keepdims=True)

    def look(grid: _Grid) -> _Seen:
        qt = requantize(w, dataclasses.replace(start, **grid))
        codes = geometry.to_blocks(geometry.to_view_order(qt.stored_codes()))
        scale = scale_values(qt)
        units = decode_blocks(
            dataclasses.replace(qt, scale=jnp.ones_like(scale), offset=None), codes
        )
        steps = geometry.scale_to_blocks(scale)
        offset = jnp.zeros_like(steps)
        if qt.offset is not None:
            offset = geometry.scale_to_blocks(qt.offset.astype(jnp.float32))
        return _Seen(
            codes.astype(jnp.float32),
            units,
            steps,
            offset,
            blocks - (units * steps + offset),
        )

    def move(grid: _Grid, seen: _Seen, beta: jax.Array) -> _Grid:
        safe = jnp.where(seen.steps == 0, 1.0, jnp.abs(seen.steps))
        size = jnp.abs(seen.error) / safe
        # No error is no outlier, though the power of 0 is infinite.
        power = jnp.where(size > 0, size, 1.0) ** (norm - 1)
        outlier = jnp.where(
            size > 0,
            jnp.sign(seen.error) * jnp.maximum(size - power / beta, 0.0) * safe,
            0.0,
        )
        rest = blocks - outlier
        if spec.offset == "min":
            return {
                "offset": _stored(
                    total(rest - seen.units * seen.steps) / counts,
                    grid["offset"],
                    start,
                )
            }
        new, units = {}, seen.units
        if "zero_point" in grid:
            zero = jnp.clip(
                jnp.round(total(seen.codes - rest / safe) / counts),
                spec.fmt.min,
                spec.fmt.max,
            )
            units = seen.codes - zero
            new["zero_point"] = geometry.scale_from_blocks(
                zero.astype(spec.fmt.code_dtype)
            )
        square = total(units * units)
        scale = total((rest - seen.offset) * units) / jnp.where(square > 0, square, 1.0)
        # A scale keeps its sign, which is negative only where spec.scale_rule="signed_extreme" made it so.
        scale = jnp.where((square > 0) & (scale * seen.steps > 0), scale, seen.steps)
        return new | {"scale": _stored(scale, grid["scale"], start)}

    def step(state: _State, _: None) -> tuple[_State, None]:
        seen = look(state.grid)
        error = total(jnp.abs(seen.error))
        better = error < state.least
        chosen = geometry.scale_from_blocks(better)
        best = {
            name: jnp.where(chosen, leaf, state.best[name])
            for name, leaf in state.grid.items()
        }
        least = jnp.where(better, error, state.least)
        return _State(
            move(state.grid, seen, state.beta), best, least, state.beta * kappa
        ), None

    names = ["offset"] if spec.offset == "min" else ["scale", "zero_point"]
    first = {
        name: getattr(start, name) for name in names if getattr(start, name) is not None
    }
    seen, beta = look(first), jnp.asarray(beta, jnp.float32)
    initial = total(jnp.abs(seen.error))
    state = _State(move(first, seen, beta), first, initial, beta * kappa)
    state, _ = lax.scan(step, state, None, length=num_steps)
    improved = jnp.mean((state.least < initial).astype(jnp.float32))
    info = HQQInfo(jnp.sum(state.least) / w.size, jnp.sum(initial) / w.size, improved)
    return requantize(w, dataclasses.replace(start, **state.best)), info


def _stored(x: jax.Array, like: jax.Array, qt: QTensor) -> jax.Array:
    """Numbers of blocks in the dtype and order `like` has; what is not zero stays so, and nothing overflows."""
    fmt, x = formats.get(like.dtype.name), qt.meta.geometry.scale_from_blocks(x)
    magnitude = jnp.clip(
        jnp.abs(x),
        max(fmt.smallest_positive, float(np.finfo(np.float32).tiny)),
        fmt.max,
    )
    return jnp.where(x == 0, 0.0, jnp.sign(x) * magnitude).astype(like.dtype)


def _why_not_hqq(spec: QuantSpec, options: Mapping[str, Any]) -> str:
    """Why HQQ cannot quantize to a spec; empty if it can."""
    if reason := why_not_stochastic(spec, options):
        return reason
    if isinstance(spec.scale, QuantSpec) and spec.offset != "min":
        return (
            f"scales of this spec are quantized themselves ({spec.scale.fmt.name}) and "
            "cannot be moved one by one. Use a spec with scale='float32', 'bfloat16' or "
            "'float16', or with offset='min'."
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
