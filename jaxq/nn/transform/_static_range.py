"""Activation quantization of a layer, and its static range, judged on calibration rows.

An observer reads only the inputs. Its rule may not suit the distribution of these
inputs. Then its range gives the layer a large output error. So the output error of the
layer is compared with that of two plain ranges: the extremes of the inputs, and the
range of least squared error over the sampled rows. Rows of large outputs count less
(`row_sqnr_of`). In a stack, the range of each element is judged on its own.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import observers
from jaxq.methods import falls_back, join_notes
from jaxq.nn.report import can_measure_output, element_names, row_sqnr_of
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._slot import Slot
from jaxq.observers import LayerStats, Observer, scaled_stats
from jaxq.processes import to_numpy
from jaxq.qtensor import QTensor, QuantSpec, range_options
from jaxq.recipes import Rule

# An observer's range may have this many dB more output error than the better of the
# plain ranges. A few hundred rows hold few of the numbers that a range clips. So the
# loss on other inputs can be several dB larger.
_TOLERANCE = 1.0

_Bounds = tuple[jax.Array, jax.Array]
# What `QTensor.with_activation` accepts: numpy arrays and numbers too.
_AnyBounds = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]


class StaticRange(NamedTuple):
    """The static range of a layer's input.

    Attributes:
      bounds: (low, high), each float32 `[*batch]`.
      note: remarks for the report, or empty.
    """

    bounds: _Bounds
    note: str

    def with_note(self, note: str) -> StaticRange:
        """The same range with one more remark."""
        return self._replace(note=join_notes(self.note, note))


def with_activation(qt: QTensor, rule: Rule, bounds: _AnyBounds | None) -> QTensor:
    """The quantized weight with the activation quantization of its rule.

    Args:
      qt: the quantized weight. It keeps the threshold for outlier columns that its
        method may have set.
      rule: the rule of the weight.
      bounds: the static range of the inputs, or None.
    """
    if qt.meta.activation is not None and rule.activation is None:
        return qt  # the method itself quantizes the inputs
    outliers = qt.meta.outliers
    return qt.with_activation(rule.activation, outliers=outliers, bounds=bounds)


def static_range(
    slot: Slot,
    floats: jax.Array,
    qt: QTensor,
    stats: LayerStats | None,
    options: Options,
) -> StaticRange | None:
    """The static range of a layer's input. None if the rule has no observer.

    Args:
      slot: the slot of the weight.
      floats: the float weight.
      qt: the quantized weight, without static range.
      stats: statistics of the layer's inputs, with the state of the rule's observer.
      options: `fallback` says what happens if the observer's range is worse than a
        plain range: "rtn" takes the plain range, "none" keeps the observer's range, and
        "raise" raises an error.

    Raises:
      ValueError: the statistics have no state of the observer; all calibration inputs
        of the layer are zero (with offset="min": equal); `fallback` is "raise" and the
        observer's range is worse.
    """
    rule = slot.rule
    if rule is None or rule.observer is None:
        return None
    observed = _observed_range(slot, stats, options.caller)
    if options.fallback == "none":
        return observed
    assert stats is not None
    return _judged_range(observed, slot, floats, qt, stats, options)


def _judged_range(
    observed: StaticRange,
    slot: Slot,
    floats: jax.Array,
    qt: QTensor,
    stats: LayerStats,
    options: Options,
) -> StaticRange:
    """The observer's range, or a plain range where the observer's is worse.

    Args:
      observed: the observer's range.
      slot: as in `static_range`.
      floats: as in `static_range`.
      qt: as in `static_range`.
      stats: as in `static_range`.
      options: as in `static_range`.
    """
    candidates = _candidates(observed.bounds, slot, qt, stats)
    errors = _output_errors(candidates, floats, qt, stats, slot)
    if errors is None:
        not_judged = "its static range is not judged: no sampled rows fit its weight"
        return observed.with_note(not_judged)
    best = np.argmax(errors, axis=0)  # [*batch]
    with np.errstate(invalid="ignore"):
        # NaN if both are infinite.
        excess = np.max(errors, axis=0) - errors[0]  # [*batch]
    is_worse = excess > _TOLERANCE
    if not is_worse.any():
        return observed
    reason = _reason(list(candidates), best, excess, is_worse)
    remedy = (
        "Pass fallback='rtn' to use that range, fallback='none' to keep the range of "
        "the observer, or another observer=."
    )
    problem = f"{options.caller}: {slot.name or 'w'}: {reason}"
    if not falls_back(options.fallback, problem, remedy):
        return observed
    choice = np.where(is_worse, best, 0)
    bounds = _chosen(list(candidates.values()), choice)
    return StaticRange(bounds, observed.note).with_note(
        f"{reason}, so that range is used"
    )


def _candidates(
    observed: _Bounds, slot: Slot, qt: QTensor, stats: LayerStats
) -> dict[str, _Bounds]:
    """The observer's range and the plain ranges, by name. The observer's is first."""
    observer, activation = _observer_and_spec(slot)
    # The range is that of the input after its multiplication by `qt.input_scale`.
    quantized_inputs = (
        stats if qt.input_scale is None else scaled_stats(stats, qt.input_scale)
    )
    plain = _plain_ranges(activation, quantized_inputs, observed)
    return {f"the range of {observer.kind}": observed, **plain}


def _chosen(ranges: list[_Bounds], choice: np.ndarray) -> _Bounds:
    """The range number `choice` of each element of a stack."""
    low, high = (
        jnp.asarray(np.choose(choice, [to_numpy(ends[i]) for ends in ranges]))
        for i in (0, 1)
    )
    return low, high


def _observer_and_spec(slot: Slot) -> tuple[Observer, QuantSpec]:
    """The observer of a slot's rule, and the spec of its activation."""
    assert slot.rule is not None
    observer, activation = slot.rule.observer, slot.rule.activation
    assert isinstance(observer, Observer)
    assert isinstance(activation, QuantSpec)
    return observer, activation


def _observed_range(slot: Slot, stats: LayerStats | None, caller: str) -> StaticRange:
    """The observer's range of a layer's input.

    Raises:
      ValueError: the statistics have no state of the observer; no element of the layer
        has a range.
    """
    observer, activation = _observer_and_spec(slot)
    name = slot.name or "w"
    if stats is None or stats.observed is None:
        raise ValueError(
            f"{caller}: {name}: the statistics passed as calibration= have no "
            f"state of {observer!r}. Make them with "
            "jaxq.nn.calibrate(..., observer=...), or pass the batches themselves as "
            "calibration=."
        )
    bounds, note = _bounds_of_elements(observer, activation, stats)
    if bounds is None:
        value = "zero" if range_options(activation)["include_zero"] else "equal"
        raise ValueError(
            f"{caller}: {name}: all calibration inputs of this weight are "
            f"{value}, so a static range would make every input {value}. Calibrate on "
            "batches that reach the layer, or use dynamic activation quantization "
            "(omit observer=)."
        )
    return StaticRange(bounds, note)


def _bounds_of_elements(
    observer: Observer, spec: QuantSpec, stats: LayerStats
) -> tuple[_Bounds | None, str]:
    """The observer's range, and a note on elements of a stack that have none.

    An expert may have read only zeros. Its range is then the smallest range that covers
    the ranges of all other experts. The result is None if no element has a range.
    """
    kind = range_options(spec)

    def bounds(state: Any) -> _Bounds:
        return observer.bounds(
            state,
            spec.fmt,
            symmetric=kind["symmetric"],
            include_zero=kind["include_zero"],
        )

    for _ in range(stats.count.ndim):
        bounds = jax.vmap(bounds)
    low, high = (to_numpy(end) for end in bounds(stats.observed))
    is_empty = ~(low < high)  # also where an end is NaN
    if is_empty.all():
        return None, ""
    if is_empty.any():
        low = np.where(is_empty, low[~is_empty].min(), low)
        high = np.where(is_empty, high[~is_empty].max(), high)
    return (jnp.asarray(low), jnp.asarray(high)), _unreached_note(is_empty)


def _unreached_note(is_empty: np.ndarray) -> str:
    """The note on elements without calibration inputs. Empty if there are none."""
    if not is_empty.any():
        return ""
    return (
        f"no calibration input reached element {element_names(is_empty)}: the static "
        "range there covers the ranges of the other elements"
    )


def _plain_ranges(
    spec: QuantSpec, stats: LayerStats, observed: _Bounds
) -> dict[str, _Bounds]:
    """The extremes of the inputs, and the range of least squared error, by name.

    If no row reached an element of a stack, the element gets the range of the observer,
    `observed`.
    """
    ends = jnp.stack(stats.extremes, axis=-2)
    extremes = _range_of_each_element(observers.minmax(), spec, ends, None)
    ranges = {"the range of the extremes": extremes}
    # `mse` raises for formats of more than 16 bits, and for asymmetric floats.
    with contextlib.suppress(ValueError):
        is_filled = stats.sample_ranks[..., None] >= 0
        ranges["the range of least squared error"] = _range_of_each_element(
            observers.mse(), spec, stats.samples, is_filled
        )
    return {name: _where_missing(bounds, observed) for name, bounds in ranges.items()}


def _where_missing(bounds: _Bounds, default: _Bounds) -> _Bounds:
    """Replaces each range that is empty or NaN by the range in `default`."""
    low, high = bounds
    is_range = low < high
    return jnp.where(is_range, low, default[0]), jnp.where(is_range, high, default[1])


def _range_of_each_element(
    observer: Observer, spec: QuantSpec, rows: jax.Array, where: jax.Array | None
) -> _Bounds:
    """The range of the rows of each element of a stack, one after the other.

    Args:
      observer: finds the range.
      spec: the quantization of the rows.
      rows: `[*batch, n, K]`.
      where: bool `[*batch, n, 1]`, False for a row that is ignored. None reads all.

    Returns:
      (low, high), each `[*batch]`.
    """
    if rows.ndim > 2:
        return _ranges_in_turn(observer, spec, rows, where)
    return _range_of_rows(observer, spec, rows, where)


# Outside of jit, the loop would be compiled at each call.
@functools.partial(jax.jit, static_argnames=("observer", "spec"))
def _ranges_in_turn(
    observer: Observer, spec: QuantSpec, rows: jax.Array, where: jax.Array | None
) -> _Bounds:
    """`_range_of_each_element` of a stack."""

    def of_element(element: tuple[jax.Array, jax.Array | None]) -> _Bounds:
        return _range_of_each_element(observer, spec, *element)

    low, high = jax.lax.map(of_element, (rows, where))
    return low, high


def _range_of_rows(
    observer: Observer, spec: QuantSpec, rows: jax.Array, where: jax.Array | None
) -> _Bounds:
    """The range of all rows together."""
    kind = range_options(spec)
    return observer.bounds_of(
        rows,
        spec.fmt,
        symmetric=kind["symmetric"],
        include_zero=kind["include_zero"],
        where=where,
    )


def _output_errors(
    candidates: dict[str, _Bounds],
    floats: jax.Array,
    qt: QTensor,
    stats: LayerStats,
    slot: Slot,
) -> np.ndarray | None:
    """The error of the layer's output for each range, in dB, `[range, *batch]`.

    None if there are no held-out rows.
    """
    assert slot.rule is not None
    errors = []
    inputs = slot.inputs(stats)
    for bounds in candidates.values():
        as_run = with_activation(qt, slot.rule, bounds)
        if not can_measure_output(as_run, stats, inputs):
            return None
        errors.append(row_sqnr_of(floats, as_run, stats, inputs))
    # A candidate without a range has no error that could be compared.
    return np.nan_to_num(np.asarray(errors), nan=-np.inf, posinf=np.inf, neginf=-np.inf)


def _reason(
    labels: list[str], best: np.ndarray, excess: np.ndarray, is_worse: np.ndarray
) -> str:
    """Names the ranges with less error than the first range, and by how many dB."""
    names = [labels[i] for i in sorted(set(best[is_worse].flat))]
    where = f" at element {element_names(is_worse)}" if is_worse.ndim else ""
    return (
        f"{labels[0]}{where} has {excess[is_worse].max():.1f} dB more output error on "
        f"calibration inputs than {' or '.join(names)}"
    )
