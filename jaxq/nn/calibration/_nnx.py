"""Flax nnx: calibration passes over a model.

A copy of the model in eval mode gets a `Probe` in the hook of each layer. Batches run
through the copy under jit, and each probe updates the statistics of its layer's input.
The size of the statistics does not depend on the amount of data.
"""

from __future__ import annotations

import contextvars
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx

from jaxq.debug_checks import allow_nonfinite
from jaxq.nn.calibration._batches import Batch, run_batches
from jaxq.nn.calibration._call_order import record_call, trace_call_order
from jaxq.nn.calibration._held_out_rows import add_patches, add_rows, only_rows
from jaxq.nn.calibration._modes import ForcedTrainMode, eval_copy
from jaxq.nn.calibration._programs import Reached, cached_program
from jaxq.nn.calibration._stats import (
    StatsRequest,
    StatsRequests,
    check_stats,
    continued_stats,
    initial_stats,
)
from jaxq.nn.layers import LayerKind, find_kind, patches_shape, weight_axes
from jaxq.observers import LayerStats, Observer

# Set while a batch is traced: paths of the layers, in the order of their first calls.
_REACHED: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "reached", default=None
)


@allow_nonfinite()
def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    hessian: bool = True,
    patches: bool = False,
    observer: Observer | None = None,
    start: Mapping[str, LayerStats] | None = None,
    progress: bool | None = None,
) -> dict[str, LayerStats]:
    """Collects statistics of the inputs of a model's layers over batches of data.

    The batches run through a copy of the model in eval mode (`model.eval()`). Dropout
    is off, and batch normalization uses its running averages. An argument of a call or
    a flag of the model can still set train mode. A warning then says so.

    The experts of a mixture of experts may be a stack: layers under `jax.vmap`, or the
    batch axes of an einsum. An expert may then read zeros for the tokens of other
    experts. In such a stack, rows of zeros do not count.

    Args:
      model: a flax nnx module. It does not change. Layers may be quantized or not.
      batches: inputs of the model. Each is an array, a tuple of arguments or a dict of
        named arguments. Values that are not arrays (`{"x": x, "train": False}`) are
        passed as they are. Shapes may differ. Each new shape is compiled once.
      layers: paths of the layers. None means all layers of the kinds Linear,
        LinearGeneral, Einsum, Conv and ConvTranspose, and of registered kinds with a
        `hook`. A row of a convolution's input is the vector of channels at one spatial
        position. The second moments of a convolution are those of its patches.
      mask: `mask(batch)` returns a bool array `[b, t]` or `[b]` that is False for
        padding.
      forward: `forward(model, batch)` runs a batch. Its result is ignored. None calls
        the model. The function is compiled. Later calls with the same function, equal
        modules and equal shapes use the compiled program again.
      hessian: collect second moments `[K, K]` too, 4 K^2 bytes for each layer.
      patches: collect the statistics of the patches of convolutions too
        (`LayerStats.patches`). A patch is one window of the input as a row. Methods
        such as GPTQ need them. A patch has as many numbers as the window has times the
        channels, so its second moments can be large.
      observer: an observer from `jaxq.observers`, without `axis=`. It observes all
        numbers of each layer's input. `stats.observed` is the observer's state. The
        range for static activation quantization is
        `observer.bounds(stats.observed, "int8")`.
      start: statistics of earlier batches, by path. The new batches are added to these
        statistics. An entry may be a dict of the fields of `LayerStats`, as in a file.
        Every layer must have an entry. A layer that no batch reaches keeps its earlier
        statistics.
      progress: show a progress line. None shows the line if stderr is a terminal.

    Returns:
      A dict from the path of each layer to its `LayerStats`, in the order in which a
      batch reaches the layers.

    Raises:
      TypeError: `model` is not an nnx module; `batches` is a single batch; the mask is
        neither bool nor integer.
      ValueError: there is no batch; a path in `layers` is not a layer; the model has no
        layer; no batch reached a layer; a layer is called inside a transform of jax,
        such as `jax.jit`; an input of a layer is not finite; the mask does not fit the
        rows of a layer; no row of a layer counts; `start` has no statistics of a layer,
        or they have other shapes or dtypes.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> stats = jaxq.nn.calibrate(model, [jnp.ones((8, 4))])
      >>> float(stats[""].count), stats[""].hessian.shape
      (7.0, (4, 4))
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"calibrate: model must be a flax nnx Module, got {type(model).__name__}. "
            "For a linen module, use jaxq.nn.linen.calibrate."
        )
    request = StatsRequest(observer, hessian, patches=patches)
    train_mode = ForcedTrainMode(model, run_model, forward)
    stats = collect_stats(
        model,
        batches,
        None if layers is None else dict.fromkeys(layers, request),
        request,
        mask=mask,
        forward=forward,
        start=start,
        progress=progress,
        watch=train_mode.add,
    )
    note = train_mode.note()
    if note:
        warnings.warn(f"calibrate: {note}.", stacklevel=2)
    return stats


def collect_stats(
    model: nnx.Module,
    batches: Iterable[Any],
    requests: Mapping[str, StatsRequest] | None,
    default: StatsRequest = StatsRequest(),  # noqa: B008 (a tuple)
    *,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    start: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    watch: Callable[[Batch], None] | None = None,
) -> dict[str, LayerStats]:
    """`calibrate` with a separate request for each layer, in one pass over the data.

    It does not warn.

    Args:
      model: as in `calibrate`.
      batches: as in `calibrate`.
      requests: what to collect, by path of the layer. None uses `default` for all
        layers.
      default: what to collect for each layer if `requests` is None.
      mask: as in `calibrate`.
      forward: as in `calibrate`.
      start: as in `calibrate`.
      progress: as in `calibrate`.
      watch: called with each batch after it has run.
    """
    copy = eval_copy(model)
    probes = dict(_attach_probes(copy, StatsRequests(requests, default)))
    if start is not None:
        _continue(probes, start)
    reached: list[str] = []

    run = _program(forward)

    def step(batch: Batch, counts: jax.Array | None) -> None:
        paths = run(copy, batch, counts).paths
        reached.extend(path for path in paths if path not in reached)
        if watch is not None:
            watch(batch)

    run_batches(step, batches, caller="calibrate", mask=mask, progress=progress)
    # nnx.jit has written the new states into the probes of `copy`.
    stats = {path: probe.stats.get_value() for path, probe in probes.items()}
    not_reached = [path for path in stats if path not in reached]
    if not_reached and start is None:
        names = ", ".join(path or "the model itself" for path in not_reached)
        raise ValueError(
            f"calibrate: no batch reached {names}, or the layer does not call its hook "
            "(a subclass that multiplies by its kernel itself, for example). Pass "
            "batches that reach the layer, or skip the layer in the recipe."
        )
    check_stats(stats, "calibrate")
    return {path: stats[path] for path in (*reached, *not_reached)}


@cached_program
def _program(forward: Callable[[Any, Any], Any] | None) -> Callable[..., Reached]:
    """Runs a batch through a model with probes, under jit."""

    @nnx.jit
    def run(copy: nnx.Module, batch: Batch, counts: Any) -> Reached:
        reached: list[str] = []
        token = _REACHED.set(reached)
        try:
            with only_rows(counts):
                run_model(copy, batch.whole(), forward)
        finally:
            _REACHED.reset(token)
        return Reached(tuple(reached))

    return run


def call_order(
    model: nnx.Module, batch: Any, forward: Callable | None
) -> dict[str, tuple[int, ...]]:
    """Finds the order in which a batch reaches the layers of a model.

    The model is traced, so no layer is computed. The result is that of
    `trace_call_order`.
    """
    copy = eval_copy(model)
    dict(_attach_probes(copy, StatsRequests(None, StatsRequest(hessian=False))))
    graph, state = nnx.split(copy)
    return trace_call_order(_Trace(NnxFunction(graph, forward)), state, Batch.of(batch))


@dataclasses.dataclass(frozen=True)
class NnxFunction:
    """An nnx model as a function of its state. Equal models give equal functions.

    Attributes:
      graph: the graph of the model.
      forward: `forward(model, batch)` runs a batch. None calls the model.
    """

    graph: nnx.GraphDef
    forward: Callable[[Any, Any], Any] | None

    def __call__(self, state: Any, batch: Any) -> Any:
        return run_model(nnx.merge(self.graph, state), batch, self.forward)


@dataclasses.dataclass(frozen=True)
class _Trace:
    """Runs a batch that was an argument of a jitted function."""

    function: NnxFunction

    def __call__(self, state: Any, batch: Batch) -> None:
        self.function(state, batch.whole())


def run_model(model: Any, batch: Any, forward: Callable | None) -> Any:
    """Runs a batch: an array, a tuple of arguments or a dict of named arguments.

    Args:
      model: an nnx module.
      batch: its input.
      forward: `forward(model, batch)` runs the batch. None calls the model.
    """
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


class _Statistic(nnx.Variable):
    """The statistics that a probe has collected."""


class _InputScale(nnx.Variable):
    """The factors by which a probe multiplies its input."""


class Probe(nnx.Module):
    """Replaces a layer's hook. It collects statistics and calls the original function.

    Args:
      path: of the layer.
      kind: of the layer. It says how to read the input from the hook's arguments.
      product: the original function of the hook.
      stats: the initial statistics.
      request: what to collect.
    """

    def __init__(
        self,
        path: str,
        kind: LayerKind,
        product: Callable[..., Any],
        stats: LayerStats,
        request: StatsRequest,
    ):
        self.path = path
        self.kind = kind
        self.observer = request.observer
        self.product = product
        self.stats = _Statistic(stats)
        factors = request.input_scale
        # A variable, because nnx.scan slices the factors of a stack with the layer.
        self.input_scale = (
            None if factors is None else _InputScale(jnp.asarray(factors))
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = self.kind.read_input(*args, **kwargs)
        if not record_call(self.path, x):
            rows, _ = self.kind.read_rows(*args, **kwargs)
            patches = None
            if self.stats.get_value().patches is not None:
                assert self.kind.read_patches is not None
                patches = self.kind.read_patches(*args, **kwargs)
            self._add(rows, patches)
        return self.product(*args, **kwargs)

    def _add(self, rows: jax.Array, patches: jax.Array | None) -> None:
        """Adds the rows and the patches of one call to the statistics."""
        try:
            factors = self.input_scale
            stats = add_rows(
                self.stats.get_value(),
                rows,
                self.path,
                self.observer,
                None if factors is None else factors.get_value(),
            )
            if patches is not None:
                stats = add_patches(stats, patches, self.path)
            self.stats.set_value(stats)
        except errors.TraceContextError as error:
            raise ValueError(
                f"calibrate: {self.path or 'the model'} is called inside jax.jit, "
                "jax.checkpoint, jax.vmap or a jax.lax loop. Statistics cannot leave "
                "these transforms. Use nnx.jit, nnx.remat or nnx.scan, or leave the "
                "layer out. To leave it out, pass layers= to calibrate, or use a rule "
                "without observer= and without a method that needs data."
            ) from error
        reached = _REACHED.get()
        if reached is not None and self.path not in reached:
            reached.append(self.path)


def _attach_probes(
    model: nnx.Module, requests: StatsRequests
) -> Iterator[tuple[str, Probe]]:
    """Puts a probe into each layer of a model, and yields (path, probe) pairs."""
    layers = {}
    for path, module in nnx.iter_modules(model):
        kind = find_kind(module)
        if kind is not None and kind.watched:
            layers["/".join(map(str, path))] = (module, kind)
    missing = [path for path in requests.paths if path not in layers]
    if missing:
        raise ValueError(
            f"calibrate: there is no layer whose input can be seen at {missing}. Such "
            f"layers of the model are {list(layers)}."
        )
    if not layers:
        raise ValueError(
            "calibrate: the model has no layer whose input can be seen: no Linear, "
            "LinearGeneral, Einsum, Conv or ConvTranspose. Register other layers with "
            "jaxq.nn.register_layer."
        )
    for path, (module, kind) in layers.items():
        if path in requests:
            probe = _probe(path, module, kind, requests[path])
            setattr(module, kind.hook, nnx.data(probe))
            yield path, probe


def _probe(path: str, module: Any, kind: LayerKind, request: StatsRequest) -> Probe:
    """The probe of a layer, with empty statistics."""
    shape = getattr(module, kind.weight).get_value().shape
    contracting, batch_axes = weight_axes(module, kind)
    patches = None
    if kind.num_channels is not None:
        k = kind.num_channels(module)
        if request.patches and kind.read_patches is not None:
            patches = patches_shape(shape, contracting, k)
    else:
        k = int(np.prod([shape[axis] for axis in contracting]))
    batch = tuple(shape[axis] for axis in batch_axes)
    stats = initial_stats(request, k, batch, windowed=kind.windowed, patches=patches)
    assert kind.hook is not None
    product = getattr(module, kind.hook) or kind.plain_product
    assert product is not None
    return Probe(path, kind, product, stats, request)


def _continue(probes: Mapping[str, Probe], start: Mapping[str, Any]) -> None:
    """Gives probes the statistics of earlier batches."""
    for path, probe in probes.items():
        empty = probe.stats.get_value()
        stats = continued_stats(
            start.get(path), empty, path or "the model", "calibrate"
        )
        probe.stats.set_value(stats)
