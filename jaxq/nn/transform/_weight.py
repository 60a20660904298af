"""One weight by its rule: rounded, solved by a method on the layer's inputs, told how to quantize those.

What every way to quantize a model shares, whether its weights are variables of nnx modules, parameters of linen ones or
leaves of a tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import methods
from jaxq.nn.transform._folding import FOLDED, Outcome
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, QuantSpec, check_floats, dequantize, quantize
from jaxq.recipes import Rule


def quantize_weight(
    floats: jax.Array,
    rule: Rule,
    axes: tuple[Sequence[int], Sequence[int]],
    stats: LayerStats | None,
    *,
    fallback: str,
    key: jax.Array,
    name: str,
    on_nonfinite: str,
    rows: bool = True,
    outcome: Outcome | None = None,
    stochastic: bool = False,
) -> tuple[QTensor, methods.Solved | None]:
    """A weight as its rule wants it, and what its method says; None of rounding to nearest.

    Args:
      floats: the weight.
      rule: with a `QuantSpec` as weight.
      axes: contracted and batch axes.
      stats: of the layer's inputs, or None.
      fallback: as in `jaxq.quantize_model`.
      key: PRNG key.
      name: what errors call the weight.
      on_nonfinite: as in `jaxq.quantize`.
      rows: rows of the input meet the weight as a matrix; those of a convolution, places with their channels, do not.
      outcome: what became of the scales of the layer's group, if its method folds some.
      stochastic: round with the key where the spec says so.
    """
    contracting, batch = axes
    qt = quantize(
        floats,
        nearest_spec(rule),
        contracting=tuple(contracting),
        batch=tuple(batch),
        key=key if stochastic else None,
        on_nonfinite=on_nonfinite,
        name=name,
    )
    solved = None
    if rule.method in (
        "equalize",
        "smoothquant",
    ):  # their scales are in the floats by now
        note = unscaled_note(rule, outcome)
        solved = methods.Solved(
            qt, "rtn" if note else rule.method, note, outcome.loss if outcome else None
        )
    elif rule.method != "rtn":
        solved = _solve(qt, floats, stats if rows else None, rule, fallback, key, name)
        qt = solved.qt
        if rule.method == "awq":
            solved = _with_scales(solved, unscaled_note(rule, outcome), outcome)
    return with_inputs(qt, rule, static_bounds(rule, stats, name)), solved


def dry_run(
    w: Any, rule: Rule, contracting: Sequence[int], batch: Sequence[int], name: str
) -> QTensor:
    """Raises what quantizing a weight would raise; nothing is computed.

    Args:
      w: float array.
      rule: with a weight.
      contracting: axes of `w`.
      batch: axes of `w`.
      name: what errors call it.

    Returns:
      The QTensor there would be, of `jax.ShapeDtypeStruct`s.
    """
    axes = tuple(contracting)
    found = methods.METHODS[rule.method]
    check_floats(
        w.dtype, w.shape, name, "quantize"
    )  # before jax makes float32 of what it cannot hold

    def made(v: jax.Array) -> QTensor:
        key = jax.random.key(
            0
        )  # whether there is one is told when the numbers are there
        spec = nearest_spec(rule)
        drawn = key if spec.rounding == "stochastic" else None
        qt = quantize(
            v, spec, contracting=axes, batch=tuple(batch), key=drawn, name=name
        )
        needs_data = found.needs_data or dict(rule.options).get("inputs", False)
        if (
            rule.method != "rtn" and not needs_data
        ):  # the others give codes and scales like these
            qt = _solve(qt, v, None, rule, "rtn", key, name).qt
        return with_inputs(qt, rule, None if rule.observer is None else (0.0, 1.0))

    return jax.eval_shape(made, jax.ShapeDtypeStruct(w.shape, w.dtype))


def unscaled_note(rule: Rule, outcome: Outcome | None) -> str:
    """What a report says of a layer whose method wants scales in front of it and has none; else empty."""
    if rule.method not in FOLDED or (outcome is not None and outcome.taken):
        return ""
    why = "nothing before it can take its scales" if outcome is None else outcome.note
    return f"only clipped: {why}" if rule.method == "awq" else why


def _with_scales(
    solved: methods.Solved, unscaled: str, outcome: Outcome | None
) -> methods.Solved:
    """What AWQ's second half, clipping, made of a weight, with what is known of its first, the scales."""
    if unscaled or outcome is None:
        return solved._replace(note="; ".join(n for n in (unscaled, solved.note) if n))
    loss = None
    if solved.loss is not None and outcome.loss is not None:
        loss = solved.loss * outcome.loss
    if solved.method == "rtn":
        return solved._replace(
            method="awq",
            loss=loss,
            note="only scaled: clipping does worse on held-out inputs",
        )
    return solved._replace(loss=loss)


def corrected_bias(
    bias: jax.Array,
    floats: jax.Array,
    qt: QTensor,
    stats: LayerStats,
    fallback: str,
    name: str,
) -> tuple[jax.Array, str]:
    """A layer's bias with what its quantized weight falls short of on average, and what a report says of it.

    The bias stays as it is where the outputs on held-out inputs are nearer to the float layer's without.

    Args:
      bias: `[*batch, *kept]`.
      floats: the weight.
      qt: what became of it.
      stats: of the layer's inputs.
      fallback: as in `jaxq.quantize_model`.
      name: what errors call the weight.
    """
    back = dequantize(qt.with_activation(None), dtype=jnp.float32)
    w, w_hat = _matrix(qt, floats), _matrix(qt, back)
    shift = methods.bias_correction(w, w_hat, stats.mean)  # [*batch, out]
    missing = jnp.matmul(
        stats.held_out,
        w.astype(jnp.float32) - w_hat,
        precision=jax.lax.Precision.HIGHEST,
    )
    counts = (stats.held_out_ranks >= 0)[..., None]
    after = jnp.sum(jnp.where(counts, missing - shift[..., None, :], 0.0) ** 2)
    before = jnp.sum(missing**2)
    note = "; ".join(
        n for n in ("bias corrected", methods.few_tokens(stats, w.shape[-2])) if n
    )
    if bool(after > before) and fallback != "none":
        worse = f"bias correction does worse on held-out inputs ({float(after / before):.3g} times the error)"
        if fallback == "raise":
            raise ValueError(f"{name}: {worse}. Pass fallback='rtn' or 'none'.")
        return bias, f"{worse}, so none"
    return (bias.astype(jnp.float32) + shift.reshape(bias.shape)).astype(
        bias.dtype
    ), note


def _matrix(qt: QTensor, floats: jax.Array) -> jax.Array:
    """An array of a QTensor's shape as its matrix `[*batch, in, out]`."""
    geometry = qt.meta.geometry
    view = geometry.to_storage(geometry.to_view(floats))
    return jnp.swapaxes(
        view.reshape(*qt.batch_shape, -1, geometry.contracted_size), -1, -2
    )


def with_inputs(
    qt: QTensor, rule: Rule, bounds: tuple[Any, Any] | None = None
) -> QTensor:
    """A weight that quantizes its inputs as a rule says; columns of outliers that its method set apart stay so.

    Args:
      qt: the weight.
      rule: its rule.
      bounds: the static range of its input, or None.
    """
    outliers = qt.meta.outliers
    if qt.meta.activation is not None and rule.activation is None:
        return qt  # as its method says
    return qt.with_activation(rule.activation, outliers=outliers, bounds=bounds)


def static_bounds(
    rule: Rule, stats: LayerStats | None, name: str
) -> tuple[jax.Array, jax.Array] | None:
    """The range of a layer's input that its rule's observer found; None where the rule has none.

    Args:
      rule: of the layer.
      stats: of its input.
      name: what errors call the weight.
    """
    if rule.observer is None:
        return None
    assert isinstance(rule.activation, QuantSpec)
    assert not isinstance(rule.observer, str)
    if stats is None or stats.observed is None:
        raise ValueError(
            f"quantize_model: the statistics given have no state of {rule.observer!r}. Make them with "
            "jaxq.nn.calibrate(..., observer=...), or pass the batches themselves as calibration=."
        )
    observer, spec = rule.observer, rule.activation

    def bounds(state: Any) -> tuple[jax.Array, jax.Array]:
        return observer.bounds(
            state, spec.fmt, symmetric=spec.symmetric and spec.offset is None
        )

    for _ in range(stats.count.ndim):
        bounds = jax.vmap(bounds)
    low, high = bounds(stats.observed)
    if not bool(np.all(np.asarray(low) < np.asarray(high))):
        raise ValueError(
            f"quantize_model: {name}: calibration has seen no input of it but zeros, so a static range would make them "
            "all zero. Calibrate on data that reach it, or quantize its inputs on the fly (no observer=)."
        )
    return low, high


def _solve(
    own: QTensor,
    floats: jax.Array,
    stats: LayerStats | None,
    rule: Rule,
    fallback: str,
    key: jax.Array,
    name: str,
) -> methods.Solved:
    """A weight by the method of its rule; `own` is what the result's axes and blocks are to be."""
    assert isinstance(rule.weight, QuantSpec)
    solved = methods.solve(
        rule.method,
        _matrix(own, floats),
        stats,
        rule.weight,
        options=dict(rule.options),
        fallback=fallback,
        key=key,
        name=name,
    )
    return solved._replace(qt=_in_place_of(solved.qt, own, rule.method, name))


def nearest_spec(rule: Rule) -> QuantSpec:
    """How a rule's weight is rounded to nearest: in the blocks of its method, where that has some of its own."""
    assert isinstance(rule.weight, QuantSpec)
    granularity = methods.own_granularity(rule.method, dict(rule.options), rule.weight)
    return rule.weight.replace(granularity=granularity)


def _in_place_of(qt: QTensor, own: QTensor, method: str, name: str) -> QTensor:
    """The QTensor of a matrix as that of an array with more axes, which is stored in the same order."""
    matrix, whole = qt.meta, own.meta
    batch = own.batch_shape

    def fit(leaf: jax.Array | None, like: jax.Array | None) -> jax.Array | None:
        if leaf is None or like is None:
            return leaf
        if leaf.size != like.size:
            raise ValueError(
                f"{name}: method {method!r} sees the weight as a matrix, in which {whole.spec.granularity} means "
                "something else. Use PerChannel, PerGroup or PerTensor."
            )
        return leaf.reshape(like.shape)

    data = fit(qt.data, own.data)
    codebook = qt.codebook
    if codebook is not None:
        codebook = codebook.reshape(
            *batch, *whole.geometry.num_blocks, codebook.shape[-1]
        )
    meta = dataclasses.replace(
        whole,
        spec=matrix.spec,
        packing=matrix.packing,
        activation=matrix.activation,
        outliers=matrix.outliers,
    )
    scale = (
        jax.tree.map(fit, qt.scale, own.scale)
        if isinstance(qt.scale, QTensor)
        else fit(qt.scale, _scale_like(own, qt))
    )
    if isinstance(scale, QTensor):
        assert isinstance(own.scale, QTensor)
        scale = dataclasses.replace(scale, meta=own.scale.meta)
    like = _scale_like(own, qt)
    return QTensor(
        data, scale, fit(qt.zero_point, like), fit(qt.offset, like), codebook, meta
    )  # pyright: ignore[reportArgumentType]


def _scale_like(own: QTensor, qt: QTensor) -> jax.Array:
    return jnp.empty((*own.batch_shape, *own.meta.geometry.num_blocks), jnp.float32)
