"""Flax linen: calibration passes over a module and its variables.

Modules are watched through `flax.linen.intercept_methods`, and nothing of theirs is changed. Statistics are carried
through the compiled step as plain arrays, so what is inside `nn.scan`, `nn.remat` or `nn.vmap` cannot be watched, and
is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from jaxq.nn.calibration._nnx import (
    Batch,
    Wanted,
    as_batches,
    as_stats,
    check_stats,
    going_on,
    masked,
    record_call,
    shown,
    traced_order,
    updated,
)
from jaxq.nn.layers import LinenKind, find_call
from jaxq.observers import LayerStats, Observer, empty_stats


def calibrate(
    module: linen.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[linen.Module, Any, Any], Any] | None = None,
    hessian: bool = True,
    observer: Observer | None = None,
    start: Mapping[str, LayerStats] | None = None,
    progress: bool | None = None,
) -> dict[str, LayerStats]:
    """Statistics of what reaches each Dense, DenseGeneral, Einsum, Conv and ConvTranspose of a linen module.

    Rows of a convolution are places of its input with their channels, and have no second moments.

    Args:
      module: a linen module.
      variables: as `module.apply` takes them.
      batches: inputs: an array, a tuple of arguments or a dict of named ones each, of `apply` too (`method=`). What is
        no array is passed as it is.
      layers: paths ("blocks_0/mlp/up") of the layers to look at; None takes all.
      mask: gives the rows of a batch that count, bool `[b, t]` (or `[b]`), False for padding.
      forward: how to run a batch, `forward(module, variables, batch)`.
      hessian: collect `[K, K]` second moments too.
      observer: as in `jaxq.nn.calibrate`.
      start: statistics of batches seen before, to go on from, as in `jaxq.nn.calibrate`.
      progress: show a line of progress; None does so on a terminal.

    Returns:
      Path of each layer to its `LayerStats`, in the order in which a batch reaches them.

    Raises:
      TypeError: not a linen module.
      ValueError: no batch; a path that no batch reached; a layer inside `nn.scan` or its like; a number that is not
        finite; a mask that does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(2), jnp.ones((8, 4))
      >>> stats = jaxq.nn.linen.calibrate(module, module.init(jax.random.key(0), x), [x])
      >>> float(stats[""].count), stats[""].hessian.shape
      (7.0, (4, 4))
    """
    if not isinstance(module, linen.Module):
        raise TypeError(
            f"linen.calibrate: module must be a flax linen Module, got {type(module).__name__}."
        )

    every = Wanted(observer, hessian)
    wanted = None if layers is None else dict.fromkeys(layers, every)
    how: Any = {"mask": mask, "forward": forward, "progress": progress}
    return calibrated(module, variables, batches, wanted, every, start=start, **how)


def calibrated(
    module: linen.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    wanted: Mapping[str, Wanted] | None,
    every: Wanted = Wanted(),  # noqa: B008 (a tuple)
    *,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[linen.Module, Any, Any], Any] | None = None,
    start: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> dict[str, LayerStats]:
    """`calibrate` with statistics of each layer's own, in one pass; as `jaxq.nn` has it."""
    order: list[str] = []

    @jax.jit
    def step(
        variables: Any, stats: dict[str, Any], batch: Batch, counts: Any
    ) -> dict[str, Any]:
        seen = dict(stats)

        def watch(
            call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
        ) -> Any:
            path = "/".join(context.module.path)
            found = find_call(context)
            if (
                found is not None
                and found.kind.watched
                and (wanted is None or path in wanted)
            ):
                observer, hessian = every if wanted is None else wanted[path]
                rows, num_batch = _rows_of(context.module, found.kind, args, kwargs)
                empty = empty_stats(
                    rows.shape[-1],
                    hessian=hessian and not found.kind.windowed,
                    observer=observer,
                )
                prefix = rows.shape[:num_batch]
                empty = jax.tree.map(
                    lambda a: jnp.broadcast_to(a, (*prefix, *a.shape)), empty
                )
                if path not in order:
                    order.append(path)
                    if start is not None:
                        seen[path] = going_on(
                            seen.get(path),
                            empty,
                            path or "the module",
                            "linen.calibrate",
                        )
                seen[path] = updated(seen.get(path, empty), rows, path, observer)
            return call(*args, **kwargs)

        with masked(counts), linen.intercept_methods(watch):
            _run(module, variables, batch.given(), forward)
        return seen

    stats: dict[str, Any] = jax.tree.map(jnp.asarray, dict(start or {}))
    num_batches = 0
    for batch in shown(as_batches(batches, "linen.calibrate"), "calibrating", progress):
        counts = None if mask is None else jnp.asarray(mask(batch))
        try:
            stats = step(variables, stats, Batch.of(batch), counts)
        except jax.errors.UnexpectedTracerError:
            raise ValueError(
                f"linen.calibrate: {order[-1] if order else 'a layer'} is inside nn.scan, nn.remat, nn.jit or nn.vmap, "
                "whose inputs cannot be seen from outside. Build the module without it, or leave the layer "
                "out: by layers= of calibrate, or by a rule without observer= and without a method that needs data."
            ) from None
        num_batches += 1
    if not num_batches:
        raise ValueError(
            "linen.calibrate: there is no batch. An iterator that was used before is empty; pass a list."
        )
    missing = [path for path in wanted or () if path not in stats]
    if missing or not stats:
        raise ValueError(
            f"linen.calibrate: no batch reached {missing or 'a Dense, DenseGeneral, Einsum or Conv'}."
        )
    kept = [
        path
        for path in stats
        if path not in order and (wanted is None or path in wanted)
    ]
    found = {path: stats[path] for path in order}
    for path in kept:  # what they are of, no call has told
        observer = (every if wanted is None else wanted[path]).observer
        found[path] = as_stats(stats[path], empty_stats(1, observer=observer))
    check_stats(found)
    return found


def call_order(
    module: linen.Module,
    variables: Any,
    batch: Any,
    forward: Callable[[linen.Module, Any, Any], Any] | None,
) -> dict[str, tuple[int, ...]]:
    """Layers in the order in which a batch reaches them, and what they are called with; as `jaxq.nn` has it."""

    def trace(variables: Any, batch: Batch) -> None:
        def watch(
            call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
        ) -> Any:
            found = find_call(context)
            if found is not None and found.kind.watched:
                record_call(
                    "/".join(context.module.path), args[0] if args else kwargs["inputs"]
                )
            return call(*args, **kwargs)

        with linen.intercept_methods(watch):
            _run(module, variables, batch.given(), forward)

    return traced_order(trace, variables, Batch.of(batch))


def _run(
    module: linen.Module, variables: Any, batch: Any, forward: Callable[..., Any] | None
) -> Any:
    if forward is not None:
        return forward(module, variables, batch)
    if isinstance(batch, dict):
        return module.apply(variables, **batch)
    return module.apply(variables, *(batch if isinstance(batch, tuple) else (batch,)))


def _rows_of(
    module: Any, kind: LinenKind, args: tuple, kwargs: dict[str, Any]
) -> tuple[jax.Array, int]:
    """`[*batch, *free, K]` of the input of a layer, and the number of batch axes."""
    others = dict(kwargs)
    x, *rest = args if args else (others.pop("inputs"),)
    assert kind.read_rows is not None
    return kind.read_rows(module, jnp.asarray(x), *rest, **others)
