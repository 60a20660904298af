"""Calibration: what the inputs of a model's layers look like, from batches of real data.

A copy of the model gets a `Probe` in the hook of each layer; running batches through it under jit updates the probes'
statistics, one `LayerStats` a layer, whose size does not depend on how much data passes. What is counted are rows of
the input: tokens, unless a mask says that they are padding. An eighth of each sequence, another one from batch to
batch, is held out of all statistics, for judging methods that were fitted to the others.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx
from jax import lax

from jaxq.nn.layers import find_kind, weight_axes
from jaxq.observers import LayerStats, Observer, empty_stats, update_stats


class _Statistic(nnx.Variable):
    """What a probe has seen."""


class Wanted(NamedTuple):
    """What to count of a layer's input.

    Attributes:
      observer: that watches all its numbers, or None.
      hessian: second moments too.
    """

    observer: Observer | None = None
    hessian: bool = True


# Set while a batch is traced: which rows count, the paths of layers in the order in which they are reached, and the
# inputs they are called with where those alone are looked for.
_MASK: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar(
    "mask", default=None
)
_REACHED: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "reached", default=None
)
_CALLS: contextvars.ContextVar[dict[str, list[Any]] | None] = contextvars.ContextVar(
    "calls", default=None
)


class Probe(nnx.Module):
    """Stands in a layer's hook: looks at the input and passes the product on.

    Args:
      path: of the layer.
      product: what was in the hook.
      stats: to begin with.
      observer: whose state is in them, or None.
      windowed: the product is a convolution, whose rows are places with their channels.
    """

    def __init__(
        self,
        path: str,
        product: Callable[..., Any],
        stats: LayerStats,
        observer: Observer | None,
        windowed: bool,
    ):
        self.path = path
        self.windowed = windowed
        self.observer = observer
        self.product = product
        self.stats = _Statistic(stats)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[1] if isinstance(args[0], str) else args[0]
        if record_call(self.path, x[0] if isinstance(x, tuple) else x):
            return self.product(*args, **kwargs)
        if isinstance(args[0], str):  # einsum(subscripts, x, w)
            rows, _ = einsum_rows(args[0], args[1])
        elif self.windowed:  # conv_general_dilated(x, w, ...) or promote_dtype((x, w, bias), ...), channels last
            rows = args[0][0] if isinstance(args[0], tuple) else args[0]
        else:  # dot_general(x, w, dims)
            (contracted, _), (batch, _) = args[2]
            rows = contracted_rows(args[0], tuple(contracted), tuple(batch))
        try:
            self.stats.set_value(
                updated(self.stats.get_value(), rows, self.path, self.observer)
            )
        except errors.TraceContextError as error:
            raise ValueError(
                f"calibrate: {self.path or 'the model'} is called inside jax.jit, jax.checkpoint, jax.vmap or a "
                "jax.lax loop, out of which no statistics come. Use nnx.jit, nnx.remat or nnx.scan, or leave the layer "
                "out: by layers= of calibrate, or by a rule without observer= and without a method that needs data."
            ) from error
        reached = _REACHED.get()
        if reached is not None and self.path not in reached:
            reached.append(self.path)
        return self.product(*args, **kwargs)


def updated(
    stats: LayerStats, x: jax.Array, path: str, observer: Observer | None
) -> LayerStats:
    """Statistics of a layer with the rows of one call in them.

    Args:
      stats: so far.
      x: `[*batch, *free, K]` with as many batch axes as the statistics have.
      path: of the layer, for errors.
      observer: whose state is in the statistics, or None.
    """
    num_batch = stats.count.ndim
    free = x.shape[num_batch:-1]
    counts, parts = _rows_that_count(free, path), _parts(free)
    update: Callable[..., LayerStats] = functools.partial(
        update_stats, observer=observer
    )
    for _ in range(num_batch):
        update = jax.vmap(update, in_axes=(0, 0, None, None))
    return update(
        stats, x.reshape(*x.shape[:num_batch], -1, x.shape[-1]), counts, parts
    )


def contracted_rows(
    x: jax.Array, contracted: tuple[int, ...], batch: tuple[int, ...]
) -> jax.Array:
    """`[*batch, *free, K]` of an operand."""
    free = [a for a in range(x.ndim) if a not in contracted and a not in batch]
    x = jnp.transpose(x, (*batch, *free, *contracted))
    return x.reshape(*x.shape[: x.ndim - len(contracted)], -1)


def einsum_rows(subscripts: str, x: jax.Array) -> tuple[jax.Array, int]:
    """The same of the left operand of an einsum with a kernel, and how many batch axes there are."""
    inputs, out = subscripts.replace(" ", "").split("->")
    left, right = inputs.split(",")
    missing = x.ndim - len(left.replace("...", ""))
    names = list(left.replace("...", "\0" * missing)) if "..." in left else list(left)
    contracted = [names.index(c) for c in right if c in names and c not in out]
    batch = []
    for c in right:  # as the layer's roles have it: leading axes of the kernel
        if c not in names or c not in out:
            break
        batch.append(names.index(c))
    return contracted_rows(x, tuple(contracted), tuple(batch)), len(batch)


def _rows_that_count(free: tuple[int, ...], path: str) -> jax.Array:
    mask = _MASK.get()
    if mask is None:
        return jnp.ones((int(np.prod(free)),), bool)
    if tuple(mask.shape) != tuple(free[: mask.ndim]):
        raise ValueError(
            f"calibrate: the mask is {list(mask.shape)}, and the rows of {path} are {list(free)}: "
            "which of them count is not known. Skip the layer, or pass batches without padding."
        )
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise TypeError(
            f"calibrate: the mask must be bool, or integers 0 and 1, got {mask.dtype.name}."
        )
    mask = mask.astype(bool).reshape(*mask.shape, *(1 for _ in free[mask.ndim :]))
    return jnp.broadcast_to(mask, free).reshape(-1)


def _parts(free: tuple[int, ...]) -> jax.Array:
    """Which rows are held out together, as numbers along the batch: eighths of a sequence, or all of a short one."""
    sequences, length = (free[0], int(np.prod(free[1:]))) if free else (1, 1)
    within = (
        jnp.arange(length, dtype=jnp.int32)
        * (8 if length >= 8 else 0)
        // max(length, 1)
    )
    return (jnp.arange(sequences, dtype=jnp.int32)[:, None] + within[None]).reshape(-1)


# How a batch is run.


@contextlib.contextmanager
def masked(counts: jax.Array | None) -> Iterator[None]:
    """While a batch is traced: which of its rows count."""
    token = _MASK.set(counts)
    try:
        yield
    finally:
        _MASK.reset(token)


def run(model: nnx.Module, batch: Any, forward: Callable | None) -> Any:
    """`forward(model, batch)`, or the model on an array, a tuple of arguments or a dict of named ones."""
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, dict):
        return model(**batch)  # pyright: ignore[reportCallIssue]
    return model(*batch) if isinstance(batch, tuple) else model(batch)  # pyright: ignore[reportCallIssue]


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    hessian: bool = True,
    observer: Observer | None = None,
    start: Mapping[str, LayerStats] | None = None,
    progress: bool | None = None,
) -> dict[str, LayerStats]:
    """Statistics of what reaches each layer of a model, over batches of data.

    Args:
      model: a flax nnx module; it stays as it is. Layers may be quantized or not.
      batches: inputs of the model: an array, a tuple of arguments or a dict of named ones each; shapes may differ, and
        each new shape is compiled once. What is no array (`{"x": x, "train": False}`) is passed as it is.
      layers: paths of the layers to look at; None takes every Linear, LinearGeneral, Einsum, Conv and ConvTranspose.
        Rows of a convolution are places of its input with their channels, and have no second moments.
      mask: gives the rows of a batch that count, bool `[b, t]` (or `[b]`), False for padding.
      forward: how to run a batch, `forward(model, batch)`; its result is not looked at.
      hessian: collect `[K, K]` second moments too, 4 K^2 bytes a layer.
      observer: watches all numbers of each layer's input (`jaxq.observers`, without `axis=`); its state is
        `stats.observed`, and `observer.bounds(stats.observed, "int8")` the range for static quantization.
      start: statistics of batches seen before, to go on from; also as dicts of their fields, as files keep them. All
        layers looked at must be in them, and keep theirs where no batch reaches them.
      progress: show a line of progress; None does so on a terminal.

    Returns:
      Path of each layer to its `LayerStats`, in the order in which a batch reaches them.

    Raises:
      TypeError: not an nnx module.
      ValueError: no batch; a path that is no layer; a layer that no batch reached, or inside a transform of jax's own;
        a number that is not finite, with the layer's path; a mask that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import errors, nnx
      >>> stats = jaxq.nn.calibrate(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), [jnp.ones((8, 4))])
      >>> float(stats[""].count), stats[""].hessian.shape
      (7.0, (4, 4))
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"calibrate: model must be a flax nnx Module, got {type(model).__name__}."
        )
    every = Wanted(observer, hessian)
    wanted = None if layers is None else dict.fromkeys(layers, every)
    how: Any = {"mask": mask, "forward": forward, "progress": progress}
    return calibrated(model, batches, wanted, every, start=start, **how)


def calibrated(
    model: nnx.Module,
    batches: Iterable[Any],
    wanted: Mapping[str, Wanted] | None,
    every: Wanted = Wanted(),  # noqa: B008 (a tuple)
    *,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    start: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> dict[str, LayerStats]:
    """`calibrate` with statistics of each layer's own, in one pass.

    Args:
      model: as there, like what follows.
      batches: inputs.
      wanted: path of each layer to what to count; None takes `every` of all.
      every: what to count without `wanted`.
      mask: which rows count.
      forward: how to run a batch.
      start: statistics to go on from.
      progress: show a line of progress.
    """
    copy = nnx.clone(model)
    probes = dict(_attach(copy, wanted, every))
    if start is not None:
        _go_on(probes, start)
    reached: list[str] = []

    @nnx.jit
    def step(copy: nnx.Module, batch: Batch, counts: Any) -> None:
        token = _REACHED.set(reached)
        try:
            with masked(counts):
                run(copy, batch.given(), forward)
        finally:
            _REACHED.reset(token)

    num_batches = 0
    for batch in shown(as_batches(batches, "calibrate"), "calibrating", progress):
        step(copy, Batch.of(batch), None if mask is None else jnp.asarray(mask(batch)))
        num_batches += 1
    if not num_batches:
        raise ValueError(
            "calibrate: there is no batch. An iterator that was used before is empty; pass a list."
        )
    # jit gives the probes' new states back to the copy's own.
    found = {path: probe.stats.get_value() for path, probe in probes.items()}
    never = [path or "the model itself" for path in found if path not in reached]
    if never and start is None:
        raise ValueError(
            f"calibrate: no batch reached {', '.join(never)}, or not by the layer's own product (a subclass that "
            "multiplies by its kernel itself). What goes in there is unknown: skip it in the recipe."
        )
    check_stats(found)
    return {
        path: found[path]
        for path in [*reached, *(path for path in found if path not in reached)]
    }


def call_order(
    model: nnx.Module, batch: Any, forward: Callable | None
) -> dict[str, tuple[int, ...]]:
    """Layers in the order in which a batch reaches them, each with the numbers of the arrays that it is called with.

    Layers that read one array have one number. The model is traced, and nothing is computed.
    """
    copy = nnx.clone(model)
    dict(_attach(copy, None, Wanted(hessian=False)))
    graph, state = nnx.split(copy)

    def trace(state: Any, batch: Batch) -> None:
        run(nnx.merge(graph, state), batch.given(), forward)

    return traced_order(trace, state, Batch.of(batch))


def record_call(path: str, x: Any) -> bool:
    """Notes what a layer is called with, if only that is looked for."""
    calls = _CALLS.get()
    if calls is None:
        return False
    calls.setdefault(path, []).append(x)
    return True


def traced_order(trace: Callable[..., None], *args: Any) -> dict[str, tuple[int, ...]]:
    """`call_order` of a function that calls layers, which are watched by `_CALLS`."""
    calls: dict[str, list[Any]] = {}
    token = _CALLS.set(calls)
    try:
        jax.eval_shape(trace, *args)
    finally:
        _CALLS.reset(token)
    numbers: dict[int, int] = {}  # all inputs are alive, so that identities stay theirs
    return {
        path: tuple(numbers.setdefault(id(x), len(numbers)) for x in xs)
        for path, xs in calls.items()
    }


def _attach(
    model: nnx.Module, wanted: Mapping[str, Wanted] | None, every: Wanted
) -> Iterator[tuple[str, Probe]]:
    """Puts a probe into each layer of a model."""
    known = {}
    for path, module in nnx.iter_modules(model):
        kind = find_kind(module)
        if kind is not None and kind.hook is not None:
            known["/".join(map(str, path))] = (module, kind)
    missing = [path for path in wanted or () if path not in known]
    if missing:
        raise ValueError(
            f"calibrate: no layer that can be looked into at {missing}. Layers here: {list(known)}."
        )
    if not known:
        raise ValueError(
            "calibrate: the model has no Linear, LinearGeneral, Einsum or Conv."
        )
    for path, (module, kind) in known.items():
        if wanted is not None and path not in wanted:
            continue
        observer, hessian = every if wanted is None else wanted[path]
        hook = kind.hook
        assert hook is not None
        weight = getattr(module, kind.weight).get_value()
        contracting, batch = weight_axes(module, kind)
        k = (
            module.in_features
            if kind.windowed
            else int(np.prod([weight.shape[a] for a in contracting]))
        )
        prefix = tuple(weight.shape[a] for a in batch)
        stats = empty_stats(k, hessian=hessian and not kind.windowed, observer=observer)
        stats = jax.tree.map(
            lambda a, p=prefix: jnp.broadcast_to(a, (*p, *a.shape)), stats
        )
        probe = Probe(
            path,
            getattr(module, hook) or lax.dot_general,
            stats,
            observer,
            kind.windowed,
        )
        setattr(module, hook, nnx.data(probe))
        yield path, probe


def _go_on(probes: Mapping[str, Probe], start: Mapping[str, Any]) -> None:
    for path, probe in probes.items():
        given = going_on(
            start.get(path), probe.stats.get_value(), path or "the model", "calibrate"
        )
        probe.stats.set_value(given)


def going_on(given: Any, empty: LayerStats, path: str, caller: str) -> LayerStats:
    """Statistics to go on from, as `empty` has them.

    Raises:
      ValueError: none are given, or of another kind of input.
    """
    stats = None if given is None else as_stats(given, empty)
    if [(v.shape, v.dtype) for v in jax.tree.leaves(stats)] != [
        (v.shape, v.dtype) for v in jax.tree.leaves(empty)
    ]:
        raise ValueError(
            f"{caller}: start has no statistics of {path}, or of other shapes."
        )
    assert stats is not None
    return stats


def as_stats(given: Any, like: Any) -> Any:
    """Named tuples of arrays again, where files keep them as dicts of their fields.

    Args:
      given: statistics of a layer, or a part of them.
      like: the same part of others, which says what it is.

    Raises:
      ValueError: a field is missing, or not one of those.
    """
    if given is None or like is None:
        return given
    if hasattr(like, "_fields"):
        fields = given._asdict() if hasattr(given, "_fields") else given
        if not isinstance(fields, Mapping) or set(fields) - set(like._fields):
            what = list(fields) if isinstance(fields, Mapping) else type(given).__name__
            raise ValueError(
                f"calibrate: a {type(like).__name__} has the fields {list(like._fields)}, got {what}."
            )
        return type(like)(
            **{
                name: as_stats(fields.get(name), getattr(like, name))
                for name in like._fields
            }
        )
    if isinstance(like, tuple | list):
        return type(like)(as_stats(a, b) for a, b in zip(given, like, strict=True))
    return jnp.asarray(given)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["rest", "structure"],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch on its way into jit: arrays are traced, all else (train=False, method="encode") stays what it is.

    Attributes:
      arrays: by their places among the leaves.
      rest: the other leaves, None where there is an array.
      structure: of the batch.
    """

    arrays: dict[int, jax.Array]
    rest: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, batch: Any) -> Batch:
        leaves, structure = jax.tree.flatten(batch)
        arrays = {
            i: jnp.asarray(v)
            for i, v in enumerate(leaves)
            if hasattr(v, "shape") and hasattr(v, "dtype")
        }
        return cls(
            arrays,
            tuple(None if i in arrays else v for i, v in enumerate(leaves)),
            structure,
        )

    def given(self) -> Any:
        """The batch as it was given."""
        return jax.tree.unflatten(
            self.structure, [self.arrays.get(i, v) for i, v in enumerate(self.rest)]
        )


def as_batches(batches: Iterable[Any], caller: str) -> Iterable[Any]:
    """The batches; a lone array or dict is none, though one could iterate over it."""
    if isinstance(batches, jax.Array | np.ndarray | str | dict):
        raise TypeError(
            f"{caller}: batches must be an iterable of them, got one {type(batches).__name__}: pass [x]."
        )
    return batches


def check_stats(found: Mapping[str, LayerStats]) -> None:
    """Raises where statistics are of nothing, or not finite."""
    problems = []
    for path, stats in found.items():
        kept = (
            np.isfinite(np.asarray(stats.samples)).all()
            and np.isfinite(np.asarray(stats.held_out)).all()
        )
        if not np.all(np.isfinite(stats.mean)) or not np.all(
            np.isfinite(stats.absmean)
        ):
            channel = int(
                np.argmin(
                    np.isfinite(np.asarray(stats.absmean))
                    .reshape(-1, stats.mean.shape[-1])
                    .all(0)
                )
            )
            problems.append(
                f"{path or 'the model'}: channel {channel} of its input is not finite"
            )
        elif not kept:
            problems.append(
                f"{path or 'the model'}: a row of its input that is held out for judging is not finite"
            )
        elif not np.any(np.asarray(stats.count) > 0):
            problems.append(
                f"{path or 'the model'}: no row counted. Either the mask is False everywhere, or its statistics were "
                "lost: a plain jax.lax.scan over layers throws states away. Put the layers in a list first: for a "
                "Llama of scan_layers=True, jaxq.models.unrolled(model), and jaxq.models.stacked(quantized) afterwards"
            )
    if problems:
        raise ValueError("calibrate: " + "; ".join(problems) + ".")


def shown(items: Iterable[Any], what: str, progress: bool | None) -> Iterator[Any]:
    """The items, with a line on stderr that says how far it is."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from items
        return
    total = f"/{len(items)}" if hasattr(items, "__len__") else ""  # pyright: ignore[reportArgumentType]
    try:
        for i, item in enumerate(items):
            print(f"\r{what}: {i}{total}", end="", file=sys.stderr, flush=True)
            yield item
    finally:
        print(f"\r{what}: done{' ' * 16}", file=sys.stderr, flush=True)
