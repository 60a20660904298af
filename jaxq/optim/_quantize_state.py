"""`quantize_state`: an optax transformation whose moments are QTensors."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxq.optim._blocks import blocked
from jaxq.optim._specs import first_spec, second_spec
from jaxq.optim._states import MOMENTS, SECOND, has_known_state, moments_of
from jaxq.qtensor import (
    QTensor,
    QuantSpec,
    check_floats,
    dequantize,
    is_nnx_variable,
    is_qtensor,
    quantize_array,
)
from jaxq.recipes import compile_pattern

_CALLER = "quantize_state"


def quantize_state(
    tx: optax.GradientTransformation,
    spec: str | QuantSpec = "dynamic8",
    *,
    second: str | QuantSpec | None = None,
    where: str | Sequence[str] = (),
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optax transformation so that the moments in its state are QTensors.

    Each update dequantizes the moments, calls `tx.update`, and quantizes the new
    moments. The first update is exactly that of `tx`, because moments start as zeros.

    Moments are fields of known optax states: `mu` and `nu` of Adam and its relatives,
    `mu` of Lion and Muon, `trace` of SGD with momentum, and others. These states may be
    anywhere inside `optax.chain`, `optax.partition`, `optax.MultiSteps`,
    `optax.inject_hyperparams` and other wrappers. All other leaves stay as they are:
    counts, hyperparameters, accumulated gradients, averaged parameters, and moments of
    fewer than `min_size` elements. A second moment that is not 0 never becomes 0,
    because optimizers divide by its root.

    The elements of a block share a scale. A block is a part of the last axis. If the
    last axis is shorter than a block, a block has several rows. A block never crosses
    the border of a shard if `init` gets sharded parameters, or runs under jit with
    Explicit axes. If the last axis of a shard has an odd size, codes of 4 bits take a
    byte each, and `init` warns.

    Args:
      tx: the transformation.
      spec: the format of first moments, and the size of their blocks: "dynamic8",
        "dynamic4", the name of a preset (`jaxq.presets()`), or a `QuantSpec` with
        `PerGroup(size)`. A preset without groups, such as "fp8", gets blocks of 256.
      second: the same for second moments. Their format may be unsigned. None takes
        `spec` if its format is a float of 8 bits or more, "udynamic8" for other formats
        of more than 4 bits, and "ulinear4" for 4 bits and fewer.
      where: patterns for the paths of other leaves to quantize, of any size, for
        example "**/acc_grads/**". A pattern is written as in `jaxq.Rule`.
      min_size: moments with fewer elements are not quantized.

    Returns:
      A transformation with extra arguments. Its state is the state of `tx` with
      QTensors in place of moments. `init` warns if all moments are smaller than
      `min_size`.

    Raises:
      TypeError: `tx` is not an optax transformation, `spec` or `second` is not a name
        or a `QuantSpec`, or (from `init`) a moment is not float32, bfloat16 or float16.
      ValueError: a name is unknown, scales depend on more than one block, rounding is
        stochastic, `spec` cannot represent negative numbers, or `min_size` is not a
        whole number of at least 0. From `init`: a pattern of `where` fits the path of
        no leaf, or the state of `tx` has no moments and `where` names no leaves.

    Example:
      >>> import jax.numpy as jnp, jaxq, optax
      >>> tx = jaxq.optim.quantize_state(optax.adam(1e-3))
      >>> params = {"w": jnp.ones((64, 256))}
      >>> state = tx.init(params)
      >>> state[0].mu["w"]
      QTensor(dynamic8[64x256], PerBlock(along -1), scale=float32, 8.125 bits, float32)
      >>> updates, state = tx.update(params, state, params)
      >>> round(float(updates["w"][0, 0]), 6)
      -0.001

    References:
      Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022; Li et al.,
      "Memory Efficient Optimizers with 4-bit States", 2023.
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"{_CALLER}: tx must be an optax transformation, got {type(tx).__name__}. "
            "Pass for example optax.adamw(1e-3)."
        )
    is_count = isinstance(min_size, int) and not isinstance(min_size, bool)
    if not is_count or min_size < 0:
        raise ValueError(
            f"{_CALLER}: min_size must be a whole number of at least 0, got "
            f"{min_size!r}."
        )
    first = first_spec(spec, _CALLER)
    other = second_spec(second, first, _CALLER)
    patterns = (where,) if isinstance(where, str) else tuple(where)
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        state = inner.init(params)
        leaves, unpacked = [], []
        unmatched = set(patterns)
        moments = moments_of(state, _is_leaf)
        for path, leaf, moment in moments:
            fits = {p for p in patterns if compile_pattern(p).matches(path)}
            unmatched -= fits
            is_moment = moment is not None and _is_large(leaf, min_size)
            if fits or is_moment:
                leaf_spec = other if moment == SECOND else first
                leaf = _quantized(leaf, leaf_spec, moment == SECOND, path)
                if leaf.spec.order != leaf_spec.order:
                    unpacked.append(path)
            leaves.append(leaf)
        # `optax.masked` and `optax.multi_transform` call `init` without parameters if
        # they have none for this transformation.
        if jax.tree.leaves(params):
            if unmatched:
                _raise_unmatched(unmatched, [path for path, _, _ in moments])
            if not any(map(is_qtensor, leaves)):
                _check_any_quantized(state, moments, min_size)
        _warn_of_unpacked(unpacked)
        return jax.tree.structure(state, is_leaf=_is_leaf).unflatten(leaves)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        floats = jax.tree.map(_dequantized, state, is_leaf=is_qtensor)
        updates, new_state = inner.update(updates, floats, params, **extra_args)
        moments = moments_of(state, is_qtensor)
        treedef = jax.tree.structure(state, is_leaf=is_qtensor)
        new_leaves = [
            _requantized(leaf, new_leaf, moment == SECOND)
            for (_, leaf, moment), new_leaf in zip(
                moments, treedef.flatten_up_to(new_state), strict=True
            )
        ]
        return updates, treedef.unflatten(new_leaves)

    return optax.GradientTransformationExtraArgs(init, update)


def _quantized(leaf: Any, spec: QuantSpec, is_second: bool, path: str) -> QTensor:
    """A leaf of a new state as a QTensor.

    An `nnx.Variable` gives a QTensor of Variables with the same metadata. Codes and
    scales have as many axes as the leaf, so its sharding fits them too.
    """
    x = jnp.asarray(leaf.get_value() if is_nnx_variable(leaf) else leaf)
    check_floats(x.dtype, x.shape, path, _CALLER)
    spec, geometry = blocked(x, spec, caller=_CALLER, name=path)
    qt = quantize_array(x, spec, geometry, None, keep_nonzero=is_second)
    return _boxed(qt, leaf) if is_nnx_variable(leaf) else qt


def _dequantized(leaf: Any) -> Any:
    """The floats of a QTensor, in an `nnx.Variable` if the codes are in one."""
    if not is_qtensor(leaf):
        return leaf
    if not is_nnx_variable(leaf.data):
        return dequantize(leaf)
    return _boxed(dequantize(_unboxed(leaf)), leaf.data)


def _requantized(old: Any, new: Any, is_second: bool) -> Any:
    """The new floats of a leaf as a QTensor like `old`, if `old` is a QTensor."""
    if not is_qtensor(old):
        return new
    x = new.get_value() if is_nnx_variable(new) else new
    meta = old.meta
    qt = quantize_array(x, meta.spec, meta.geometry, None, keep_nonzero=is_second)
    # The dtype of a state must not change. Adam's moments of bfloat16 parameters become
    # float32 if the gradients are float32.
    qt = dataclasses.replace(qt, meta=meta)
    return _boxed(qt, old.data) if is_nnx_variable(old.data) else qt


def _is_large(leaf: Any, min_size: int) -> bool:
    """Whether a moment is an array of floats that is worth quantizing."""
    value = leaf.get_value() if is_nnx_variable(leaf) else leaf
    # `optax.tree_map_params` calls `init` with objects that are not arrays.
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return False
    return value.ndim > 0 and value.size >= max(min_size, 1)


def _raise_unmatched(patterns: set[str], paths: list[str]) -> None:
    raise ValueError(
        f"{_CALLER}: no leaf of the state fits where={sorted(patterns)}. Correct the "
        f"pattern. The leaves are {_listed(paths)}."
    )


def _check_any_quantized(
    state: optax.OptState, moments: list[tuple[str, Any, str | None]], min_size: int
) -> None:
    """Raises or warns if `init` quantizes no leaf.

    Args:
      state: the state of the wrapped transformation.
      moments: its leaves, from `moments_of`.
      min_size: as in `quantize_state`.
    """
    if not has_known_state(state):
        known = ", ".join(sorted({state.__name__ for state in MOMENTS}))
        leaves = _listed([path for path, _, _ in moments])
        raise ValueError(
            f"{_CALLER}: the state of tx has no moments that jaxq knows. The known "
            f"states are {known}. Choose leaves of other states by where=, for example "
            f"where='**/mu/**'. The leaves of this state are {leaves or 'none'}."
        )
    if any(_is_large(leaf, 0) for _, leaf, moment in moments if moment):
        warnings.warn(
            f"{_CALLER}: nothing is quantized, because all moments have fewer than "
            f"min_size={min_size} elements. Use a smaller min_size, or tx alone.",
            stacklevel=3,
        )


def _warn_of_unpacked(paths: list[str]) -> None:
    """Warns if the codes of some leaves take more memory than their format says."""
    if paths:
        warnings.warn(
            f"{_CALLER}: the codes of {_listed(paths)} take a whole byte each, because "
            "they cannot be packed without crossing the border of a shard. Shard "
            "another axis than the last one, or change its size.",
            stacklevel=3,
        )


def _listed(paths: list[str]) -> str:
    """The first paths, for errors."""
    shown = ", ".join(repr(path) for path in paths[:8])
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    return f"{shown}{more}"


def _is_leaf(node: Any) -> bool:
    return is_qtensor(node) or is_nnx_variable(node)


def _boxed(tree: Any, variable: Any) -> Any:
    """A copy of an `nnx.Variable` around each array of `tree`."""
    # A Variable is a pytree of its value.
    return jax.tree.map(lambda x: jax.tree.map(lambda _: x, variable), tree)


def _unboxed(tree: Any) -> Any:
    """`tree` with values in place of Variables."""
    return jax.tree.map(
        lambda x: x.get_value() if is_nnx_variable(x) else x,
        tree,
        is_leaf=is_nnx_variable,
    )
