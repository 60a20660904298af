"""Methods by name: one matrix, the statistics of its inputs, and a judgement on inputs that the method has not seen."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats, ops
from jaxq.methods import _limits, _matrix
from jaxq.methods._adaround import adaround
from jaxq.methods._clipping import clip
from jaxq.methods._gptq import gptq
from jaxq.methods._hqq import hqq
from jaxq.methods._kmeans import kmeans
from jaxq.methods._limits import why_not
from jaxq.methods._rtn import rtn
from jaxq.observers import LayerStats
from jaxq.qtensor import Granularity, PerChannel, QTensor, QuantSpec, dequantize

FALLBACKS = ("rtn", "none", "raise")


class Solved(NamedTuple):
    """A weight that a method has quantized.

    Attributes:
      qt: the result.
      method: what made it: the method asked for, or "rtn" where that fell back.
      note: why it fell back, or what else is worth knowing; empty if nothing.
      loss: mean squared error of the layer's output on held-out inputs over that of rounding to nearest; None without
        inputs, and for methods whose weight is the rounded one.
    """

    qt: QTensor
    method: str
    note: str
    loss: float | None


class _Made(NamedTuple):
    """What a method made of a weight, and what is worth knowing; `rounded` where it could not but round to nearest."""

    qt: QTensor
    note: str = ""
    rounded: bool = False


class Method(NamedTuple):
    """How a method is called.

    Attributes:
      solve: `(w, stats, spec, key, **options) -> _Made`.
      options: keyword arguments that a rule may give.
      needs_data: it cannot do without statistics.
      judged: its weight is another than rounding gives, and is compared with that on held-out inputs.
    """

    solve: Callable[..., _Made]
    options: tuple[str, ...]
    needs_data: bool
    judged: bool = True


def names() -> list[str]:
    """The methods that recipes can name."""
    return sorted(METHODS)


def solve(
    method: str,
    w: jax.Array,
    stats: LayerStats | None,
    spec: QuantSpec,
    *,
    options: Mapping[str, Any] | None = None,
    fallback: str = "rtn",
    key: jax.Array | None = None,
    name: str = "w",
) -> Solved:
    """Quantizes a weight by a named method, and falls back to rounding to nearest where that does better.

    Better is a smaller error of the layer's output on the held-out rows of `stats`, which no method sees. Of a stack,
    each matrix is judged by itself.

    Args:
      method: one of `jaxq.methods.names()`.
      w: float `[in, out]`, or a stack of such matrices with axes in front.
      stats: statistics of its inputs, with the axes of the stack in front; None where there are none.
      spec: what to quantize to.
      options: keyword arguments of the method.
      fallback: "rtn", "none" (keep the method's result), or "raise".
      key: PRNG key, for methods that draw.
      name: what errors call the weight.

    Returns:
      A `Solved`.

    Raises:
      ValueError: an unknown method; one that needs statistics without any; `fallback="raise"` and it did worse.

    Example:
      >>> import jax, jaxq
      >>> w = jax.random.normal(jax.random.key(0), (64, 8))
      >>> jaxq.methods.solve("clip", w, None, jaxq.presets()["int4"]).method
      'clip'
    """
    formats.check_choice("solve: method", method, names())
    formats.check_choice("solve: fallback", fallback, FALLBACKS)
    found = METHODS[method]
    if found.needs_data and stats is None:
        raise ValueError(
            f"{name}: method {method!r} needs the layer's inputs: pass calibration data."
        )
    options = dict(options or {})
    check_options(f"{name}: method {method!r}", method, options)
    if found.judged and (why := why_not(method, spec, options)):
        raise ValueError(f"{name}: method {method!r}: {why}")
    if stats is not None:
        _check_stats(stats, w, method, name)
    key = jax.random.key(0) if key is None else key
    _matrix.raise_if_not_finite(w, name, method)
    qt, note, rounded = found.solve(w, stats, spec, key, **options)
    if rounded:
        if fallback == "raise":
            raise ValueError(f"{name}: {method}: {note}. Pass fallback='rtn'.")
        return Solved(qt, "rtn", note, None)
    if not found.judged or stats is None:
        return Solved(qt, method, note, None)
    if int(np.sum(stats.num_held_out)) == 0:
        return Solved(
            qt, method, _say(note, "not judged: too few rows to hold some out"), None
        )
    nearest, _ = rtn(
        w, spec.replace(granularity=own_granularity(method, options, spec))
    )
    if (
        qt.meta.activation is not None
    ):  # inputs all of whose columns are quantized alike
        nearest = nearest.with_activation(qt.meta.activation)
    ours, theirs = (
        np.asarray(output_error(w, q, stats.held_out)) for q in (qt, nearest)
    )  # [...]
    if not np.all(np.isfinite(ours + theirs)):
        raise ValueError(
            f"{name}: the error of its output on held-out inputs is not finite ({ours}; rtn: {theirs})."
        )
    worse = ours > theirs
    if not worse.any() or fallback == "none":
        return Solved(qt, method, note, _ratio(ours, theirs))
    said = f"{method} is worse than rtn on held-out inputs ({_ratio(ours[worse], theirs[worse]):.3g} times its error)"
    if not worse.all():
        said += f" in {worse.sum()} of {worse.size} matrices"
    if fallback == "raise":
        raise ValueError(f"{name}: {said}. Pass fallback='rtn' or 'none'.")
    mixed = not worse.all() and jax.tree.structure(qt) == jax.tree.structure(nearest)
    if mixed:
        qt = _instead(worse, nearest, qt)
        return Solved(
            qt,
            method,
            _say(f"{said}, so rtn there", note),
            _ratio(np.minimum(ours, theirs), theirs),
        )
    if ours.sum() <= theirs.sum():  # a codebook is no scale, so it is all or none
        return Solved(qt, method, _say(said, note), _ratio(ours, theirs))
    return Solved(nearest, "rtn", _say(f"{said}, so rtn", note), 1.0)


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(ours.sum() / theirs.sum()) if theirs.sum() else 1.0


def _instead(where: np.ndarray, there: QTensor, elsewhere: QTensor) -> QTensor:
    """One QTensor where the matrices of a stack are chosen, another one elsewhere."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(
            where.reshape(*where.shape, *(1 for _ in a.shape[where.ndim :])), a, b
        )

    return jax.tree.map(choose, there, elsewhere)


def check_options(caller: str, method: str, options: Mapping[str, Any]) -> None:
    """Raises a ValueError for an option that the method does not have, with those it has, or that is out of range."""
    for option in options:
        if option not in METHODS[method].options:
            known = METHODS[method].options
            text = (
                formats.unknown_name("option", option, known, f"{list(known)}")
                if known
                else f"unknown option {option!r}; it has none."
            )
            raise ValueError(f"{caller}: options: {text}")
    _limits.check_numbers(f"{caller}: options", method, **options)
    if method == "clip":
        _limits.check_clipping(f"{caller}: options", options)


def own_granularity(
    method: str, options: Mapping[str, Any], spec: QuantSpec
) -> Granularity:
    """Where the scales of a method's result vary: tables of k-means are large, and one a channel is the default."""
    default = PerChannel() if method == "kmeans" else spec.granularity
    return options.get("granularity", default)


def _check_stats(stats: LayerStats, w: jax.Array, method: str, name: str) -> None:
    """Raises where statistics are not those of this weight's input."""
    expected = (*w.shape[:-2], w.shape[-2])
    if tuple(stats.mean.shape) != expected:
        raise ValueError(
            f"{name}: its statistics are of inputs {list(stats.mean.shape)}, expected {list(expected)}."
        )
    if method == "gptq" and stats.hessian is None:
        raise ValueError(
            f"{name}: method 'gptq' needs second moments; calibrate with hessian=True."
        )
    if (
        method == "gptq"
        and stats.hessian is not None
        and not bool(jnp.isfinite(stats.hessian).all())
    ):
        largest = float(np.max(stats.absmax))
        raise ValueError(
            f"{name}: the second moments of its inputs are not finite: magnitudes up to {largest:.3g} are too large to "
            "be squared in float32. Scale its inputs down, or use another method."
        )


@jax.jit
def output_error(w: jax.Array, qt: QTensor, x: jax.Array) -> jax.Array:
    """`sum (x W - x Q)^2` of each matrix, `[...]`; x is quantized too, where Q has it so.

    Args:
      w: float `[..., in, out]`.
      qt: of the same shape.
      x: float32 `[..., tokens, in]`; rows of zeros count for nothing.
    """
    if qt.meta.activation is not None:
        product = functools.partial(ops.matmul, preferred_element_type=jnp.float32)
        for _ in range(w.ndim - 2):
            product = jax.vmap(product)
        exact = jnp.matmul(
            x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        return jnp.sum(jnp.square(exact - product(x, qt)), axis=(-2, -1))
    delta = w.astype(jnp.float32) - dequantize(
        qt.with_activation(None), dtype=jnp.float32
    )
    return jnp.sum(
        jnp.square(jnp.matmul(x, delta, precision=jax.lax.Precision.HIGHEST)),
        axis=(-2, -1),
    )


def few_tokens(stats: LayerStats, k: int) -> str:
    """What to say where there are fewer rows than inputs."""
    count = int(np.min(stats.count))
    if count == 0 and np.size(stats.count) > 1:
        return f"{np.sum(np.asarray(stats.count) == 0)} of {np.size(stats.count)} matrices never reached"
    return f"only {count} rows for {k} inputs" if count < k else ""


def few_samples(stats: LayerStats, k: int) -> str:
    """What to say where fewer rows than inputs were kept."""
    if 0 < np.sum(np.asarray(stats.count) == 0) < np.size(stats.count):
        return few_tokens(stats, k)
    count = int(np.min(stats.num_samples))
    return f"fitted to {count} rows of {k} inputs" if count < k else ""


def _say(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _rtn(w, stats, spec, key):
    return _Made(rtn(w, spec)[0])


def _clip(w, stats, spec, key, **options):
    if options.pop("inputs", False):
        if stats is None:
            raise ValueError(
                "clip: inputs=True weighs errors by the layer's inputs: pass calibration data."
            )
        return _Made(
            clip(w, spec, x=stats.samples, **options)[0],
            few_samples(stats, w.shape[-2]),
        )
    return _Made(clip(w, spec, **options)[0])


def _hqq(w, stats, spec, key, **options):
    return _Made(hqq(w, spec, **options)[0])


def _kmeans(w, stats, spec, key, **options):
    how: dict[str, Any] = options | {
        "granularity": own_granularity("kmeans", options, spec)
    }
    return _Made(kmeans(w, spec.fmt.bits, **how)[0])


def _gptq(w, stats, spec, key, **options):
    qt, info = gptq(w, stats.hessian, spec, **options)
    damp, fell = options.get("damp", 0.01), np.asarray(info.fell_back)
    where = "" if fell.all() else f" in {fell.sum()} of {fell.size} matrices"
    singular = (
        f"its hessian is not positive definite{where}, so rtn" if fell.any() else ""
    )
    more = (
        f"damping {float(np.max(info.damp)):.3g}"
        if float(np.max(info.damp)) > 1.01 * damp and not singular
        else ""
    )
    dead = int(np.sum(info.num_dead))
    said = _say(
        singular,
        more,
        f"{dead} dead inputs" if dead else "",
        few_tokens(stats, w.shape[-2]),
    )
    if dead and dead == info.num_dead.size * w.shape[-2]:
        return _Made(qt, f"all of its {dead} inputs are dead, so rtn", True)
    return _Made(qt, said, bool(fell.all()))


def _adaround(w, stats, spec, key, **options):
    return _Made(
        adaround(w, stats.samples, spec, key=key, **options)[0],
        few_samples(stats, w.shape[-2]),
    )


def _awq(w, stats, spec, key, **options):
    """The second half of AWQ; scales have been folded into the weights by then."""
    num, max_shrink = options.get("clip_num", 20), options.get("clip_max_shrink", 0.5)
    clipped = clip(w, spec, x=stats.samples, num=num, max_shrink=max_shrink)[0]
    return _Made(clipped, few_samples(stats, w.shape[-2]))


def _llm_int8(w, stats, spec, key, threshold: float = 6.0):
    return _Made(rtn(w, spec)[0].with_activation("int8", outliers=threshold))


def _folded(w, stats, spec, key, **options):
    """Rounding: scales have been folded into the weights by then."""
    return _Made(rtn(w, spec)[0])


def _options(function: Callable[..., Any], *more: str) -> tuple[str, ...]:
    """The names of a function's keyword arguments that are settings, no arrays."""
    arrays = ("channel_weight", "key", "name", "x", "x_float")
    found = inspect.signature(function).parameters.values()
    return tuple(
        sorted(
            {
                *(
                    p.name
                    for p in found
                    if p.kind is p.KEYWORD_ONLY and p.name not in arrays
                ),
                *more,
            }
        )
    )


METHODS = {
    "adaround": Method(_adaround, _options(adaround), True),
    "awq": Method(_awq, ("clip_max_shrink", "clip_num", "duo", "num"), True),
    "clip": Method(_clip, _options(clip, "inputs"), False),
    "equalize": Method(_folded, ("power_of_two",), False, judged=False),
    "gptq": Method(_gptq, _options(gptq), True),
    "hqq": Method(_hqq, _options(hqq), False),
    "kmeans": Method(_kmeans, _options(kmeans), False),
    "llm_int8": Method(_llm_int8, ("threshold",), False),
    "rtn": Method(_rtn, (), False, judged=False),
    "smoothquant": Method(_folded, ("alpha",), True, judged=False),
}
