"""Flax linen: calibration passes over a module and its variables.

An interceptor (`flax.linen.intercept_methods`) sees the calls of the layers. The module
does not change. The compiled step returns the statistics as plain arrays. Statistics of
a layer inside `nn.scan`, `nn.remat` or `nn.vmap` cannot leave that transform. Such a
layer raises an error.
"""

from __future__ import annotations

import contextvars
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen

from jaxq.debug_checks import allow_nonfinite
from jaxq.nn.calibration._batches import Batch, run_batches
from jaxq.nn.calibration._call_order import record_call, trace_call_order
from jaxq.nn.calibration._held_out_rows import add_patches, add_rows, only_rows
from jaxq.nn.calibration._modes import (
    draws_random_numbers,
    linen_train_mode,
    linen_train_mode_note,
)
from jaxq.nn.calibration._programs import Reached, cached_program
from jaxq.nn.calibration._stats import (
    StatsRequest,
    StatsRequests,
    check_stats,
    continued_stats,
    initial_stats,
)
from jaxq.nn.layers import Forward, LinenKind, find_call, linen_kinds
from jaxq.observers import LayerStats, Observer, as_stats, empty_stats

# Set while a batch is traced: paths of the layers, in the order of their first calls.
_REACHED: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "reached", default=None
)


@allow_nonfinite()
def calibrate(
    module: linen.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Forward | None = None,
    hessian: bool = True,
    patches: bool = False,
    observer: Observer | None = None,
    start: Mapping[str, LayerStats] | None = None,
    progress: bool | None = None,
) -> dict[str, LayerStats]:
    """Collects statistics of the inputs of a linen module's layers.

    The layers are Dense, DenseGeneral, Einsum, Conv and ConvTranspose. A row of a
    convolution's input is the vector of channels at one spatial position. The second
    moments of a convolution are those of its patches.

    The experts of a mixture of experts may be a stack: layers under `jax.vmap`, or the
    batch axes of an einsum. An expert may then read zeros for the tokens of other
    experts. In such a stack, rows of zeros do not count.

    The batches must run in eval mode, by their arguments or by `forward`. If a layer
    drops numbers or normalizes by the batch, a warning is given.

    Args:
      module: a linen module.
      variables: the variables that `module.apply` takes.
      batches: inputs of the module. Each is an array, a tuple of arguments or a dict of
        named arguments. The dict may have arguments of `apply` too (`method=`). Values
        that are not arrays are passed as they are.
      layers: paths of the layers ("blocks_0/mlp/up"). None means all layers.
      mask: `mask(batch)` returns a bool array `[b, t]` or `[b]` that is False for
        padding.
      forward: `forward(module, variables, batch)` runs a batch. None uses
        `module.apply`.
      hessian: collect second moments `[K, K]` too.
      patches: collect the statistics of the patches of convolutions too, as in
        `jaxq.nn.calibrate`.
      observer: as in `jaxq.nn.calibrate`.
      start: statistics of earlier batches, as in `jaxq.nn.calibrate`.
      progress: show a progress line. None shows the line if stderr is a terminal.

    Returns:
      A dict from the path of each layer to its `LayerStats`, in the order in which a
      batch reaches the layers.

    Raises:
      TypeError: `module` is not a linen module; `batches` is a single batch; the mask
        is neither bool nor integer.
      ValueError: there is no batch; no batch reached a path in `layers`; a layer is
        inside `nn.scan` or another lifted transform; an input of a layer is not finite;
        the mask does not fit the rows of a layer; no row of a layer counts; `start` has
        no statistics of a layer, or they have other shapes or dtypes.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(2), jnp.ones((8, 4))
      >>> variables = module.init(jax.random.key(0), x)
      >>> stats = jaxq.nn.linen.calibrate(module, variables, [x])
      >>> float(stats[""].count), stats[""].hessian.shape
      (7.0, (4, 4))
    """
    if not isinstance(module, linen.Module):
        raise TypeError(
            "linen.calibrate: module must be a flax linen Module, got "
            f"{type(module).__name__}. For an nnx module, use jaxq.nn.calibrate."
        )
    request = StatsRequest(observer, hessian, patches=patches)
    stats, note = collect_linen_stats(
        module,
        variables,
        batches,
        None if layers is None else dict.fromkeys(layers, request),
        request,
        mask=mask,
        forward=forward,
        start=start,
        progress=progress,
    )
    if note:
        warnings.warn(f"linen.calibrate: {note}.", stacklevel=2)
    return stats


def collect_linen_stats(
    module: linen.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    requests: Mapping[str, StatsRequest] | None,
    default: StatsRequest = StatsRequest(),  # noqa: B008 (a tuple)
    *,
    mask: Callable[[Any], Any] | None = None,
    forward: Forward | None = None,
    start: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, LayerStats], str]:
    """`calibrate` with a separate request for each layer, in one pass over the data.

    It does not warn. It returns a note if the batches run in train mode.

    Args:
      module: as in `calibrate`.
      variables: as in `calibrate`.
      batches: as in `calibrate`.
      requests: what to collect, by path of the layer. None uses `default` for all
        layers.
      default: what to collect for each layer if `requests` is None.
      mask: as in `calibrate`.
      forward: as in `calibrate`.
      start: as in `calibrate`.
      progress: as in `calibrate`.

    Returns:
      (the statistics by path, the note). The note is empty in eval mode.
    """
    watcher = _Watcher(module, StatsRequests(requests, default), forward, start)

    def step(batch: Batch, counts: jax.Array | None) -> None:
        watcher.run(variables, batch, counts)

    run_batches(step, batches, caller="linen.calibrate", mask=mask, progress=progress)
    stats = watcher.result()
    check_stats(stats, "linen.calibrate")
    return stats, linen_train_mode_note(watcher.train_mode_calls, watcher.draws)


class _Watcher:
    """Runs batches through a linen module and keeps the statistics of its layers.

    Args:
      module: a linen module.
      requests: what to collect for each layer.
      forward: `forward(module, variables, batch)` runs a batch. None uses `apply`.
      start: statistics of earlier batches, or None.
    """

    def __init__(
        self,
        module: linen.Module,
        requests: StatsRequests,
        forward: Forward | None,
        start: Mapping[str, Any] | None,
    ):
        self._requests = requests
        self._stats: dict[str, Any] = jax.tree.map(jnp.asarray, dict(start or {}))
        self._step = _program(
            module, requests, forward, start is not None, linen_kinds()
        )
        # Paths of the layers in the order of their first calls.
        self.order: list[str] = []
        # What layers do in train mode, in the order of their calls.
        self.train_mode_calls: dict[str, None] = {}
        # True if a batch draws random numbers.
        self.draws = False
        self._structures: set[Any] = set()

    def run(self, variables: Any, batch: Batch, counts: jax.Array | None) -> None:
        """Adds a batch to the statistics."""
        arguments = (variables, self._stats, batch, counts)
        # An error is raised by the trace, which adds the layers to this list.
        traced: list[str] = []
        token = _REACHED.set(traced)
        try:
            # Only batches with other static values can differ in what they draw.
            structure = jax.tree.structure(batch)
            if structure not in self._structures:
                self._structures.add(structure)
                jaxpr = self._step.trace(*arguments).jaxpr
                self.draws |= draws_random_numbers(jaxpr.jaxpr)
            self._stats, reached = self._step(*arguments)
        except jax.errors.UnexpectedTracerError:
            layer = traced[-1] if traced else "a layer"
            raise ValueError(
                f"linen.calibrate: {layer} is inside nn.scan, nn.remat, nn.jit or "
                "nn.vmap, so its input cannot be seen. Build the module without this "
                "transform, or leave the layer out. To leave it out, pass layers= to "
                "calibrate, or use a rule without observer= and without a method that "
                "needs data."
            ) from None
        finally:
            _REACHED.reset(token)
        self.order.extend(p for p in reached.paths if p not in self.order)
        self.train_mode_calls.update(dict.fromkeys(reached.train_mode))

    def result(self) -> dict[str, LayerStats]:
        """The statistics by path.

        Layers that a batch reached come first, in the order of their first calls. The
        other layers have the statistics of `start`.
        """
        stats = self._stats
        missing = [path for path in self._requests.paths if path not in stats]
        if missing or not stats:
            layers = missing or "a Dense, DenseGeneral, Einsum, Conv or ConvTranspose"
            raise ValueError(
                f"linen.calibrate: no batch reached {layers}. Check the paths and the "
                "batches."
            )
        result = {path: stats[path] for path in self.order}
        for path in stats:
            if path not in result and path in self._requests:
                # No call has shown the size of the input. `as_stats` reads only types
                # from its second argument, so any size works.
                observer = self._requests[path].observer
                result[path] = as_stats(stats[path], empty_stats(1, observer=observer))
        return result


@cached_program
def _program(
    module: linen.Module,
    requests: StatsRequests,
    forward: Forward | None,
    continues: bool,
    kinds: tuple[LinenKind, ...],
) -> Any:
    """Returns a jitted function that adds a batch to the statistics of the layers.

    Args:
      module: a linen module.
      requests: what to collect for each layer.
      forward: `forward(module, variables, batch)` runs a batch. None uses `apply`.
      continues: there are statistics of earlier batches.
      kinds: all kinds of layers. With another kind, the program sees other layers.
    """

    @jax.jit
    def step(
        variables: Any, stats: dict[str, Any], batch: Batch, counts: Any
    ) -> tuple[dict[str, Any], Reached]:
        updated, order, train_mode_calls = dict(stats), [], {}

        def watch(
            call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
        ) -> Any:
            layer_call = find_call(context)
            if context.method_name == "__call__":
                train_mode = linen_train_mode(context.module, args, kwargs)
                if train_mode:
                    train_mode_calls[train_mode] = None
            path = "/".join(context.module.path)
            is_watched = layer_call is not None and layer_call.kind.watched
            if layer_call is not None and is_watched and path in requests:
                is_first = path not in order
                if is_first:
                    order.append(path)
                    _note_reached(path)
                layer = _Layer(context.module, layer_call.kind, requests[path])
                updated[path] = layer.with_call(
                    updated.get(path), args, kwargs, continues=continues and is_first
                )
            return call(*args, **kwargs)

        with only_rows(counts), linen.intercept_methods(watch):
            run_linen(module, variables, batch.whole(), forward)
        return updated, Reached(tuple(order), tuple(train_mode_calls))

    return step


def _note_reached(path: str) -> None:
    """Adds a layer to the list for errors. There is a list unless a user traces."""
    reached = _REACHED.get()
    if reached is not None:
        reached.append(path)


class _Layer(NamedTuple):
    """A layer whose input is watched, while its module is traced."""

    module: linen.Module
    kind: LinenKind
    request: StatsRequest

    def with_call(
        self,
        stats: Any,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        continues: bool,
    ) -> LayerStats:
        """The statistics of the layer after one more call.

        Args:
          stats: the statistics before the call, or None.
          args: the arguments of the call.
          kwargs: the named arguments of the call.
          continues: `stats` are those of earlier batches, as the user passed them.
        """
        path, request = "/".join(self.module.path), self.request
        x, args, kwargs = _split_input(args, kwargs)
        assert self.kind.read_rows is not None
        rows, num_batch = self.kind.read_rows(
            self.module, jnp.asarray(x), *args, **kwargs
        )
        batch = rows.shape[:num_batch]
        patches, sizes = None, None
        if request.patches and self.kind.read_patches is not None:
            patches = self.kind.read_patches(
                self.module, jnp.asarray(x), *args, **kwargs
            )
            sizes = patches.shape[0], patches.shape[-1]
        empty = initial_stats(
            request,
            rows.shape[-1],
            batch,
            windowed=self.kind.windowed,
            patches=sizes,
        )
        if continues:
            name = path or "the module"
            stats = continued_stats(stats, empty, name, "linen.calibrate")
        factors = None
        if request.input_scale is not None:
            factors = jnp.asarray(request.input_scale)
        stats = empty if stats is None else stats
        stats = add_rows(stats, rows, path, request.observer, factors)
        return stats if patches is None else add_patches(stats, patches, path)


def linen_call_order(
    module: linen.Module, variables: Any, batch: Any, forward: Forward | None
) -> dict[str, tuple[int, ...]]:
    """The same as `call_order` of `_nnx.py`, for a linen module."""

    trace = _Trace(LinenFunction(module, forward), linen_kinds())
    return trace_call_order(trace, variables, Batch.of(batch))


@dataclasses.dataclass(frozen=True)
class LinenFunction:
    """A linen module as a function of its variables. Equal modules are equal functions.

    Attributes:
      module: a linen module.
      forward: `forward(module, variables, batch)` runs a batch. None uses `apply`.
    """

    module: linen.Module
    forward: Forward | None

    def __call__(self, variables: Any, batch: Any) -> Any:
        return run_linen(self.module, variables, batch, self.forward)


@dataclasses.dataclass(frozen=True)
class _Trace:
    """Runs a batch, and records the calls of the layers.

    Attributes:
      function: runs the batch.
      kinds: all kinds of layers. With another kind, the trace sees other layers.
    """

    function: LinenFunction
    kinds: tuple[LinenKind, ...]

    def __call__(self, variables: Any, batch: Batch) -> None:
        def watch(
            call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
        ) -> Any:
            layer_call = find_call(context)
            if layer_call is not None and layer_call.kind.watched:
                x, _, _ = _split_input(args, kwargs)
                record_call("/".join(context.module.path), x)
            return call(*args, **kwargs)

        with linen.intercept_methods(watch):
            self.function(variables, batch.whole())


def _split_input(
    args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, tuple, dict[str, Any]]:
    """Splits a call into its input and the other arguments.

    The input is the first argument. Flax names this argument `inputs`.
    """
    if args:
        return args[0], args[1:], kwargs
    others = {name: value for name, value in kwargs.items() if name != "inputs"}
    return kwargs["inputs"], (), others


def run_linen(
    module: linen.Module, variables: Any, batch: Any, forward: Forward | None
) -> Any:
    """Runs a batch: an array, a tuple of arguments or a dict of named arguments."""
    if forward is not None:
        return forward(module, variables, batch)
    if isinstance(batch, dict):
        return module.apply(variables, **batch)
    return module.apply(variables, *(batch if isinstance(batch, tuple) else (batch,)))
