"""AdaRound: learns from the layer's inputs whether each weight is rounded down or up.

    soft = low + h(v) (high - low)          # [in, out], low <= w <= high on the grid
    h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)
    min over v of  ||x w - x soft||^2 / ||x w - x nearest||^2
                   + rate * mean(1 - |2 h(v) - 1|^beta)

`low` and `high` are the two neighbours of a weight on the grid of `quantize`. The grid,
its scales and its zero points do not change. So AdaRound works for any format. The
last term is off at first. Later it pushes each h(v) to 0 or 1 while beta falls. The
error is relative to the error of rounding to nearest, so `regularization` means the
same for layers of any size.
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
from jaxq.methods._explicit_axes import on_explicit_axes
from jaxq.methods._method import Method, Option, Solution
from jaxq.methods._method_options import (
    COUNT,
    POSITIVE,
    SHARE,
    check_values,
    number,
    refuse,
    why_not_stochastic,
)
from jaxq.methods._notes import few_samples
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
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return all(POSITIVE.accepts(v) for v in value)


_OPTIONS = {
    "num_steps": COUNT,
    "batch_size": COUNT,
    "learning_rate": POSITIVE,
    "regularization": number("a number, not negative", least=0, below=float("inf")),
    "warm_start": SHARE,
    "beta": Option(
        _are_two_positive_numbers, "two positive numbers, for the start and the end"
    ),
}


class AdaRoundInfo(NamedTuple):
    """Diagnostics of `adaround`.

    Attributes:
      error: float32, mean squared error of the layer's outputs on `x`.
      initial_error: float32, the same error of rounding to nearest.
      num_changed: int32, number of weights that are not rounded to nearest.
      improved: float32, share of outputs with a smaller error. The weights of the other
        outputs are rounded to nearest.
      underdetermined: bool, True if there are fewer tokens than inputs. The result may
        then be worse for other inputs.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> w, x, key = jnp.ones((4, 2)), jnp.ones((3, 4)), jax.random.key(0)
      >>> _, info = jaxq.methods.adaround(w, x, "int8", key=key, num_steps=1)
      >>> bool(info.underdetermined)
      True
    """

    error: jax.Array
    initial_error: jax.Array
    num_changed: jax.Array
    improved: jax.Array
    underdetermined: jax.Array


@on_explicit_axes
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
    """Learns whether each weight is rounded down or up, from the layer's inputs.

    `argmin over {down, up} of ||x_float W - x Q||^2`, relaxed to [0, 1] and solved by
    Adam. It starts from soft rounding that gives the weights themselves. In the end,
    the error of each output (column of W) on all of `x` is compared with the error of
    rounding to nearest. If the error is not smaller, the column is rounded to nearest.

    Args:
      w: float `[in, out]`, or a stack `[..., in, out]` (by `jax.vmap`).
      x: float `[tokens, in]`, the layer's inputs. For a stack: shared by all matrices,
        or `[..., tokens, in]`.
      spec: preset name or `QuantSpec`. Stochastic rounding and the scale rules with a
        threshold ("ttq", "twn") raise a ValueError.
      key: PRNG key for the order of the batches.
      num_steps: number of steps of Adam.
      learning_rate: positive, of Adam.
      batch_size: number of tokens in a step.
      regularization: not negative, weight of the push to 0 and 1, relative to the error
        of rounding to nearest.
      beta: exponent of the push at the start and at the end, positive, linear in
        between.
      warm_start: 0 to 1, share of the steps without the push.
      x_float: inputs of the same layer in the float network, shape of `x`. Pass them if
        x comes from layers that are quantized already: the outputs should then match
        those of `x_float` (asymmetric reconstruction). None uses x.
      name: the name of the weight in errors.

    Returns:
      `(qt, info)`: a QTensor with the shape and dtype of `w`, axis -2 contracted; and
      an `AdaRoundInfo`, whose arrays have the leading axes of `w`.

    Raises:
      TypeError: `w`, `x` or `x_float` is not a float array.
      ValueError: shapes do not match, an option is out of range, AdaRound cannot
        quantize to the spec, or (outside jit) a number is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> key = jax.random.key(0)
      >>> x = jax.random.normal(key, (64, 1)) + 0.1 * jax.random.normal(key, (64, 2))
      >>> w = jnp.array([[0.4, 7.0], [0.4, 7.0]])
      >>> spec = jaxq.QuantSpec("int4", jaxq.PerTensor())
      >>> qt, info = jaxq.methods.adaround(w, x, spec, key=jax.random.key(2))
      >>> sorted(qt.codes()[:, 0].tolist())
      [0, 1]
      >>> jaxq.quantize(w, spec).codes()[:, 0].tolist()
      [0, 0]

    References:
      Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization",
      2020, section 3.
    """
    spec = as_spec(spec, "adaround")
    refuse("adaround", _why_not_adaround(spec, {}))
    w = _matrix.as_weight(w, "adaround", name)
    shape, meaning = (None, w.shape[-2]), "inputs [tokens, in]"
    x = _matrix.as_statistic(x, "x", "adaround", shape=shape, meaning=meaning, w=w)
    target = x
    if x_float is not None:
        target = _matrix.as_statistic(
            x_float, "x_float", "adaround", shape=x.shape[-2:], meaning=meaning, w=w
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
    learning = _Learning(*(jnp.float32(v) for v in rates))
    sizes = _Sizes(num_steps, min(batch_size, x.shape[-2]))
    return _adaround(w, x, target, keys, learning, key.ndim, spec, sizes)


class _Learning(NamedTuple):
    """The numbers of the optimization, traced so that they need no new compilation."""

    learning_rate: jax.Array
    regularization: jax.Array
    first_beta: jax.Array
    last_beta: jax.Array
    warm_start: jax.Array


class _Sizes(NamedTuple):
    """The static sizes of the optimization."""

    num_steps: int
    batch_size: int


@functools.partial(jax.jit, static_argnames=("key_ndim", "spec", "sizes"))
def _adaround(
    w: jax.Array,
    x: jax.Array,
    target: jax.Array,
    keys: jax.Array,
    learning: _Learning,
    key_ndim: int,
    spec: QuantSpec,
    sizes: _Sizes,
) -> tuple[QTensor, AdaRoundInfo]:
    learn_matrix = functools.partial(
        _learn_matrix, learning=learning, spec=spec, sizes=sizes
    )
    return _matrix.over_stack(learn_matrix, w, (x, 2), (target, 2), (keys, key_ndim))


def _learn_matrix(
    w: jax.Array,
    x: jax.Array,
    target: jax.Array,
    key: jax.Array,
    learning: _Learning,
    spec: QuantSpec,
    sizes: _Sizes,
) -> tuple[QTensor, AdaRoundInfo]:
    """`adaround` for one matrix `[in, out]`; `x` and `target` are `[tokens, in]`."""
    nearest = quantize(w, spec, contracting=-2, on_nonfinite="propagate")
    weights = w.astype(jnp.float32)
    grid = _neighbours(weights, nearest)

    def column_errors(values: jax.Array) -> jax.Array:
        error = _float32_dot(target, weights) - _float32_dot(x, values)
        return jnp.mean(error * error, axis=0)  # [out]

    before = column_errors(dequantize(nearest, dtype=jnp.float32))
    unit = jnp.mean(before)
    unit = jnp.where(unit > 0, unit, 1.0)

    def loss(v: jax.Array, rows: jax.Array, progress: jax.Array) -> jax.Array:
        h = _soft_step(v)
        soft = grid.low + h * (grid.high - grid.low)
        error = _float32_dot(target[rows], weights) - _float32_dot(x[rows], soft)
        push = learning.regularization * _push_to_ends(h, progress, learning)
        return jnp.mean(error * error) / unit + push

    v = _learn(loss, grid.share, key, x.shape[0], learning, sizes)
    values = jnp.where(v >= 0, grid.high, grid.low)
    after = column_errors(values)
    better = after < before  # [out]
    learned = requantize(values, nearest)
    codes = jnp.where(better[None], learned.codes(), nearest.codes())
    info = AdaRoundInfo(
        error=jnp.mean(jnp.where(better, after, before)),
        initial_error=jnp.mean(before),
        num_changed=jnp.sum(codes != nearest.codes(), dtype=jnp.int32),
        improved=jnp.mean(better.astype(jnp.float32)),
        underdetermined=jnp.bool_(x.shape[0] < x.shape[1]),
    )
    return nearest.with_codes(codes), info


def _learn(
    loss: Any,
    share: jax.Array,
    key: jax.Array,
    num_tokens: int,
    learning: _Learning,
    sizes: _Sizes,
) -> jax.Array:
    """The variables v `[in, out]` after all steps of Adam.

    Args:
      loss: `(v, rows, progress) -> scalar`; progress goes from 0 to 1.
      share: where each weight is between its neighbours, 0 to 1.
      key: PRNG key for the order of the batches.
      num_tokens: number of tokens to draw from.
      learning: numbers of the optimization.
      sizes: the static sizes of the optimization.
    """
    optimizer = optax.adam(learning.learning_rate)

    def step(
        state: tuple[jax.Array, optax.OptState], i: jax.Array
    ) -> tuple[tuple[jax.Array, optax.OptState], None]:
        v, moments = state
        rows = jax.random.choice(
            jax.random.fold_in(key, i), num_tokens, (sizes.batch_size,), replace=False
        )
        progress = i.astype(jnp.float32) / sizes.num_steps
        gradient = jax.grad(loss)(v, rows, progress)
        # Adam counts its steps in int32 and raises float32 numbers to that power.
        # Strict dtype promotion, which the user may have set, refuses this.
        with jax.numpy_dtype_promotion("standard"):
            change, moments = optimizer.update(gradient, moments)
            new_v = optax.apply_updates(v, change)
        return (jnp.asarray(new_v), moments), None

    # h(v) = share, so that soft rounding starts at the weights.
    start = jnp.clip((share - _SHIFT) / _STRETCH, 1e-4, 1 - 1e-4)
    v = jnp.log(start) - jnp.log1p(-start)
    state = (v, optimizer.init(v))
    (v, _), _ = lax.scan(step, state, jnp.arange(sizes.num_steps))
    return v


def _soft_step(v: jax.Array) -> jax.Array:
    """The rectified sigmoid h."""
    return jnp.clip(_STRETCH * jax.nn.sigmoid(v) + _SHIFT, 0.0, 1.0)


def _push_to_ends(h: jax.Array, progress: jax.Array, learning: _Learning) -> jax.Array:
    """The regularizer `mean(1 - |2 h - 1|^beta)`; 0 during the warm start."""
    warm_start = learning.warm_start
    after = jnp.maximum(progress - warm_start, 0.0) / jnp.maximum(1 - warm_start, 1e-6)
    beta = learning.first_beta + (learning.last_beta - learning.first_beta) * after
    distance = jnp.abs(2 * h - 1)
    # 0^beta has the gradient 0; autodiff would take the logarithm of 0.
    push = jnp.mean(1 - jnp.where(distance > 0, distance, 1e-6) ** beta)
    return jnp.where(progress < warm_start, 0.0, push)


class _Neighbours(NamedTuple):
    """The two neighbours of each weight on the grid, `[in, out]`.

    Attributes:
      low: the neighbour below.
      high: the neighbour above.
      share: where the weight is between them, 0 (low) to 1 (high).
    """

    low: jax.Array
    high: jax.Array
    share: jax.Array


def _neighbours(w: jax.Array, nearest: QTensor) -> _Neighbours:
    """Finds the neighbours of each weight on the grid of `nearest`.

    For a weight beyond the grid, both neighbours are the outermost number. A weight on
    the grid is the lower of the two, so that it may move up.
    """
    geometry = nearest.meta.geometry
    numbers = _grid_numbers(nearest)
    steps = geometry.scale_to_blocks(scale_values(nearest))
    blocks = geometry.to_blocks(geometry.pad(geometry.to_view(w)))
    zero = jnp.zeros_like(steps)
    if nearest.zero_point is not None:
        zero = geometry.scale_to_blocks(nearest.zero_point.astype(jnp.float32))
    offset = jnp.zeros_like(steps)
    if nearest.offset is not None:
        offset = geometry.scale_to_blocks(nearest.offset.astype(jnp.float32))
    # Weights in units of the grid, where its numbers are those of the format.
    safe = jnp.where(steps == 0, 1.0, steps)
    y = jnp.where(steps == 0, zero, (blocks - offset) / safe + zero)
    position = jnp.searchsorted(jnp.asarray(numbers), y, side="right") - 1
    position = jnp.clip(position, 0, numbers.size - 2)
    below = jnp.asarray(numbers)[position]
    above = jnp.asarray(numbers)[position + 1]
    share = jnp.clip((y - below) / (above - below), 0.0, 1.0)
    outside = (y < numbers[0]) | (y > numbers[-1])
    outermost = jnp.clip(y, numbers[0], numbers[-1])
    below = jnp.where(outside, outermost, below)
    above = jnp.where(outside, outermost, above)
    # A negative scale reverses the order of the grid.
    share = jnp.where(steps < 0, 1.0 - share, share)

    def from_blocks(values: jax.Array) -> jax.Array:
        return geometry.from_view(geometry.unpad(geometry.from_blocks(values)))

    first = from_blocks((below - zero) * steps + offset)
    second = from_blocks((above - zero) * steps + offset)
    return _Neighbours(
        jnp.minimum(first, second), jnp.maximum(first, second), from_blocks(share)
    )


def _grid_numbers(nearest: QTensor) -> np.ndarray:
    """The numbers that codes of `nearest` may stand for, ascending."""
    spec, fmt = nearest.spec, nearest.spec.fmt
    numbers = np.unique(fmt.values())
    is_symmetric = spec.symmetric and spec.offset is None
    # Symmetric integers use the narrow range, unless the scale has a sign.
    if fmt.kind == "integer" and is_symmetric and not spec.rule.signed:
        numbers = numbers[numbers >= -fmt.max]
    return numbers


def _float32_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(
        a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _why_not_adaround(spec: QuantSpec, options: Mapping[str, Any]) -> str:
    """Why AdaRound cannot quantize to a spec; empty if it can."""
    reason = why_not_stochastic(spec, options)
    if reason:
        return reason
    if spec.rule.has_threshold:
        return (
            f"scale_rule={spec.scale_rule!r} rounds by a threshold, so a weight has no "
            "two neighbours to choose from. Use another scale rule."
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
