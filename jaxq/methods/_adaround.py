"""AdaRound: which of its two neighbours on the grid each weight goes to is learned from the layer's inputs.

    soft = low + h(v) (high - low)                      # [in, out], low <= w <= high neighbours on the grid
    h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)
    min over v of ||x w - x soft||^2 / ||x w - x nearest||^2 + rate * mean(1 - |2 h(v) - 1|^beta)

Grid, scales and zero points are those of `quantize` and stay; any format has neighbours. The last term, off at first,
pushes each h(v) to 0 or 1 as beta falls. The error is relative to that of rounding to nearest, so that `regularization`
means the same for layers of any size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxq.methods import _matrix
from jaxq.methods._method import Method, Option, Solution
from jaxq.methods._notes import few_samples
from jaxq.methods._options import (
    COUNT,
    POSITIVE,
    SHARE,
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
    dequantize,
    quantize,
    requantize,
    scale_values,
)

# The rectified sigmoid reaches 0 and 1, so that gradients end there (section 3).
_STRETCH, _SHIFT = 1.2, -0.1


def _are_two_positive_numbers(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(POSITIVE.accepts(v) for v in value)
    )


_OPTIONS = {
    "num_steps": COUNT,
    "batch_size": COUNT,
    "learning_rate": POSITIVE,
    "regularization": number("a number, not negative", least=0, below=float("inf")),
    "warm_start": SHARE,
    "beta": Option(
        _are_two_positive_numbers, "two positive numbers, at first and in the end"
    ),
}


class AdaRoundInfo(NamedTuple):
    """What learning changed.

    Attributes:
      error: float32, mean squared error of the layer's outputs on `x`.
      initial_error: float32, that of rounding to nearest.
      num_changed: int32, weights that do not go to the nearest number.
      improved: float32, share of outputs that are better; the others are rounded to nearest.
      underdetermined: bool, True where there are fewer tokens than inputs: other inputs may be served worse.
    """

    error: jax.Array
    initial_error: jax.Array
    num_changed: jax.Array
    improved: jax.Array
    underdetermined: jax.Array


def adaround(
    w: ArrayLike,
    x: ArrayLike,
    spec: str | QuantSpec,
    *,
    key: jax.Array,
    num_steps: int = 1000,
    learning_rate: float = 1e-2,
    batch_size: int = 256,
    regularization: float = 10.0,
    beta: tuple[float, float] = (20.0, 2.0),
    warm_start: float = 0.2,
    x_float: ArrayLike | None = None,
    name: str = "w",
) -> tuple[QTensor, AdaRoundInfo]:
    """Learns whether each weight is rounded down or up, so that the layer's outputs change least.

    `argmin over {down, up} of ||x_float W - x Q||^2`, relaxed to [0, 1] and solved by Adam. Starts from the weights
    themselves (soft rounding that changes nothing); outputs (columns of W) that end up no better than rounding to
    nearest, measured on all of `x`, are rounded to nearest.

    Args:
      w: float `[in, out]`, or `[..., in, out]`: a stack, each with inputs of its own (by `jax.vmap`).
      x: float `[tokens, in]`, the layer's inputs; `[..., tokens, in]` or one for the whole stack.
      spec: preset name or `QuantSpec`, any but stochastic rounding and the scale rules "ttq" and "twn".
      key: PRNG key, of the order of batches.
      num_steps: steps of Adam.
      learning_rate: of Adam.
      batch_size: tokens in a step.
      regularization: weight of the push to 0 and 1, relative to the error of rounding to nearest.
      beta: its exponent at first and in the end, linear in between.
      warm_start: share of the steps without it.
      x_float: inputs of the same layer in the float network, shape of `x`, where x comes from layers quantized before
        this one: the outputs to be met are those of `x_float` (asymmetric reconstruction). None takes x.
      name: what errors call the weight.

    Returns:
      QTensor with the shape and dtype of `w`, axis -2 contracted; `AdaRoundInfo`, arrays with the leading axes of `w`.

    Raises:
      TypeError: `w`, `x` or `x_float` is not a float array.
      ValueError: shapes that do not fit, numbers out of range, a number that is not finite (outside jit).

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> x = jax.random.normal(jax.random.key(0), (64, 1)) + 0.1 * jax.random.normal(jax.random.key(1), (64, 2))
      >>> w = jnp.array([[0.4, 7.0], [0.4, 7.0]])
      >>> spec = jaxq.QuantSpec("int4", jaxq.PerTensor())
      >>> qt, info = jaxq.methods.adaround(w, x, spec, key=jax.random.key(2))
      >>> sorted(qt.codes()[:, 0].tolist()), jaxq.quantize(w, spec).codes()[:, 0].tolist()
      ([0, 1], [0, 0])

    References:
      Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, section 3.
    """
    spec = as_spec(spec, "adaround")
    refuse("adaround", _why_not_adaround(spec, {}))
    w = _matrix.as_weight(w, "adaround", name)
    said = "inputs [tokens, in]"
    x = _matrix.as_statistic(
        x, "x", "adaround", shape=(None, w.shape[-2]), said=said, w=w
    )
    target = x
    if x_float is not None:
        target = _matrix.as_statistic(
            x_float, "x_float", "adaround", shape=x.shape[-2:], said=said, w=w
        )
    check_values(
        "adaround",
        _OPTIONS,
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        regularization=regularization,
        beta=beta,
        warm_start=warm_start,
    )
    keys = jax.random.split(key, w.shape[:-2]) if w.ndim > 2 else key
    rates = (learning_rate, regularization, *beta, warm_start)
    numbers = _Numbers(*(jnp.float32(v) for v in rates))
    return _adaround(
        w,
        x,
        target,
        keys,
        numbers,
        key.ndim,
        spec,
        num_steps,
        min(batch_size, x.shape[-2]),
    )


class _Numbers(NamedTuple):
    learning_rate: jax.Array
    regularization: jax.Array
    first_beta: jax.Array
    last_beta: jax.Array
    warm_start: jax.Array


@functools.partial(
    jax.jit, static_argnames=("key_ndim", "spec", "num_steps", "batch_size")
)
def _adaround(
    w: jax.Array,
    x: jax.Array,
    target: jax.Array,
    keys: jax.Array,
    numbers: _Numbers,
    key_ndim: int,
    spec: QuantSpec,
    num_steps: int,
    batch_size: int,
):
    one = functools.partial(
        _one, numbers=numbers, spec=spec, num_steps=num_steps, batch_size=batch_size
    )
    return _matrix.over_stack(one, w, (x, 2), (target, 2), (keys, key_ndim))


def _one(
    w: jax.Array,
    x: jax.Array,
    target: jax.Array,
    key: jax.Array,
    numbers: _Numbers,
    spec: QuantSpec,
    num_steps: int,
    batch_size: int,
) -> tuple[QTensor, AdaRoundInfo]:
    nearest = quantize(w, spec, contracting=-2, on_nonfinite="propagate")
    weights = w.astype(jnp.float32)
    low, high, share = _neighbours(weights, nearest)
    rounded = dequantize(nearest, dtype=jnp.float32)

    def column_errors(values: jax.Array) -> jax.Array:
        error = _dot(target, weights) - _dot(x, values)
        return jnp.mean(error * error, axis=0)  # [out]

    before = column_errors(rounded)
    unit = jnp.mean(before)
    unit = jnp.where(unit > 0, unit, 1.0)

    def loss(v: jax.Array, rows: jax.Array, progress: jax.Array) -> jax.Array:
        h = _soft(v)
        error = _dot(target[rows], weights) - _dot(x[rows], low + h * (high - low))
        after = jnp.maximum(progress - numbers.warm_start, 0.0) / jnp.maximum(
            1 - numbers.warm_start, 1e-6
        )
        beta = numbers.first_beta + (numbers.last_beta - numbers.first_beta) * after
        distance = jnp.abs(2 * h - 1)
        # 0^beta has the gradient 0; autodiff would take a logarithm of it.
        push = jnp.mean(1 - jnp.where(distance > 0, distance, 1e-6) ** beta)
        push = jnp.where(progress < numbers.warm_start, 0.0, push)
        return jnp.mean(error * error) / unit + numbers.regularization * push

    optimizer = optax.adam(numbers.learning_rate)

    def step(
        state: tuple[jax.Array, optax.OptState], i: jax.Array
    ) -> tuple[tuple[jax.Array, optax.OptState], None]:
        v, moments = state
        rows = jax.random.choice(
            jax.random.fold_in(key, i), x.shape[0], (batch_size,), replace=False
        )
        gradient = jax.grad(loss)(v, rows, i.astype(jnp.float32) / num_steps)
        # Adam counts its steps in int32 and raises float32 to them, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            change, moments = optimizer.update(gradient, moments)
            moved = optax.apply_updates(v, change)
        return (jnp.asarray(moved), moments), None

    # h(v) = share, so that soft rounding begins at the weights.
    start = jnp.clip((share - _SHIFT) / _STRETCH, 1e-4, 1 - 1e-4)
    v = jnp.log(start) - jnp.log1p(-start)
    (v, _), _ = lax.scan(step, (v, optimizer.init(v)), jnp.arange(num_steps))

    values = jnp.where(v >= 0, high, low)
    after = column_errors(values)
    better = after < before
    learned = requantize(values, nearest)
    codes = jnp.where(better[None], learned.codes(), nearest.codes())
    info = AdaRoundInfo(
        jnp.mean(jnp.where(better, after, before)),
        jnp.mean(before),
        jnp.sum(codes != nearest.codes(), dtype=jnp.int32),
        jnp.mean(better.astype(jnp.float32)),
        jnp.bool_(x.shape[0] < x.shape[1]),
    )
    return nearest.with_codes(codes), info


def _soft(v: jax.Array) -> jax.Array:
    return jnp.clip(_STRETCH * jax.nn.sigmoid(v) + _SHIFT, 0.0, 1.0)


def _neighbours(
    w: jax.Array, nearest: QTensor
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The numbers of the grid below and above each weight, and how far w lies between them, 0 to 1.

    A weight beyond the grid has its outermost number on both sides; one on the grid is the lower of two, so that it too
    may be moved.
    """
    fmt, geometry = nearest.spec.fmt, nearest.meta.geometry
    ordered = np.unique(fmt.values())
    narrow = (
        fmt.kind == "integer" and nearest.spec.symmetric and nearest.spec.offset is None
    )
    if narrow and nearest.spec.scale_rule != "signed_extreme":
        ordered = ordered[ordered >= -fmt.max]
    scale = scale_values(nearest)
    steps = geometry.scale_to_blocks(scale)
    blocks = geometry.to_blocks(geometry.pad(geometry.to_view(w)))
    zero = jnp.zeros_like(steps)
    if nearest.zero_point is not None:
        zero = geometry.scale_to_blocks(nearest.zero_point.astype(jnp.float32))
    offset = jnp.zeros_like(steps)
    if nearest.offset is not None:
        offset = geometry.scale_to_blocks(nearest.offset.astype(jnp.float32))
    safe = jnp.where(steps == 0, 1.0, steps)
    y = jnp.where(steps == 0, zero, (blocks - offset) / safe + zero)
    place = jnp.clip(
        jnp.searchsorted(jnp.asarray(ordered), y, side="right") - 1, 0, ordered.size - 2
    )
    below, above = jnp.asarray(ordered)[place], jnp.asarray(ordered)[place + 1]
    share = jnp.clip((y - below) / (above - below), 0.0, 1.0)
    outside = (y < ordered[0]) | (y > ordered[-1])
    below, above = (
        jnp.where(outside, jnp.clip(y, ordered[0], ordered[-1]), edge)
        for edge in (below, above)
    )

    def back(units: jax.Array) -> jax.Array:
        return geometry.from_view(geometry.unpad(geometry.from_blocks(units)))

    share = jnp.where(
        steps < 0, 1.0 - share, share
    )  # a negative scale turns the grid around
    ends = [back((edge - zero) * steps + offset) for edge in (below, above)]
    return jnp.minimum(*ends), jnp.maximum(*ends), back(share)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(
        a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _why_not_adaround(spec: QuantSpec, options: Mapping[str, Any]) -> str:
    """Why AdaRound cannot quantize to a spec; empty if it can."""
    if reason := why_not_stochastic(spec, options):
        return reason
    if spec.rule.has_threshold:
        return (
            f"scale_rule={spec.scale_rule!r} has no two neighbours to choose from. Use "
            "another scale rule."
        )
    return ""


def _solve_adaround(
    w: jax.Array,
    stats: LayerStats | None,
    spec: QuantSpec,
    *,
    key: jax.Array,
    **options: Any,
) -> Solution:
    assert stats is not None
    qt, _ = adaround(w, stats.samples, spec, key=key, **options)
    return Solution(qt, few_samples(stats, w.shape[-2]))


METHOD = Method(
    "adaround",
    _solve_adaround,
    options=_OPTIONS,
    why_not=_why_not_adaround,
    needs=("samples",),
)
