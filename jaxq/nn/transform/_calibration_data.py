"""The calibration data of one call: batches, or statistics of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxq import methods
from jaxq.nn.calibration import StatsRequest
from jaxq.nn.transform._options import Options
from jaxq.observers import LayerStats, as_stats, empty_stats
from jaxq.recipes import Rule


class _StatisticsSource(Protocol):
    """The part of an adapter that collects statistics."""

    def statistics(
        self, options: Options, wanted: Mapping[str, StatsRequest]
    ) -> Mapping[str, LayerStats]: ...


class CalibrationData:
    """The calibration data of one call. `used` is True once a layer has read them.

    Args:
      model: the adapter of the model. The batches run through this model.
      options: `calibration` is a list of batches, statistics by path, or None.
    """

    def __init__(self, model: _StatisticsSource, options: Options):
        self._model = model
        self._options = options
        self.used = False

    def __bool__(self) -> bool:
        return self._options.calibration is not None

    def statistics(
        self, wanted: Mapping[str, StatsRequest]
    ) -> Mapping[str, LayerStats]:
        """Statistics of the inputs of some layers, in the present state of the model.

        Args:
          wanted: which statistics to collect, by the path of the layer.

        Returns:
          Statistics by path. Empty if there are no data.

        Raises:
          ValueError: the caller passed statistics that do not have one of the layers,
            or whose observer state belongs to another observer.
        """
        if not wanted or not self:
            return {}
        self.used = True
        if self._options.statistics is not None:
            return _checked(self._options.statistics, wanted, self._options.caller)
        return self._model.statistics(self._options, wanted)

    def before_folding(self, paths: Iterable[str]) -> Mapping[str, LayerStats]:
        """Statistics of some layers, before scales are folded into the model.

        Args:
          paths: the layers whose inputs get new scales.

        Raises:
          ValueError: the caller passed statistics instead of batches.
        """
        if self._options.statistics is not None:
            raise ValueError(
                f"{self._options.caller}: a method that folds scales changes the "
                "inputs of the layers, so it needs the batches themselves. Pass "
                "batches as calibration=, not statistics."
            )
        return self.statistics(dict.fromkeys(paths, StatsRequest(hessian=False)))

    def of_multiplied_inputs(
        self, wanted: Mapping[str, StatsRequest]
    ) -> Mapping[str, LayerStats]:
        """Statistics of inputs that are multiplied by `StatsRequest.input_scale`.

        Raises:
          ValueError: the caller passed statistics instead of batches.
        """
        if wanted and self._options.statistics is not None:
            raise ValueError(
                f"{self._options.caller}: a static range of scaled inputs needs the "
                "batches themselves. Pass batches as calibration=, not statistics, or "
                "omit observer= from the rules of "
                f"{', '.join(path or 'the model' for path in wanted)}."
            )
        return self.statistics(wanted)

    def unused_notes(
        self, read_arguments: tuple[str, ...], are_measured: bool
    ) -> list[str]:
        """A note for the report if no layer has read the data.

        Args:
          read_arguments: names of the arguments that the adapter has read itself. The
            note leaves them out.
          are_measured: the report shows the error of the outputs for a batch.
        """
        if self.used:
            return []
        if are_measured:
            return ["no rule needs data: calibration= only measures the output error"]
        names = [
            f"{name}="
            for name in ("calibration", "mask", "forward")
            if name not in read_arguments and getattr(self._options, name) is not None
        ]
        if not names:
            return []
        return [f"not used, because no rule needs data: {', '.join(names)}"]


def needs_statistics(rule: Rule, has_rows: bool, reads_patches: bool = False) -> bool:
    """True if the rule of a layer can use statistics of the layer's input.

    Args:
      rule: the rule of the layer.
      has_rows: the layer multiplies the rows of its input by its weight as a matrix.
      reads_patches: the method of the rule reads the patches of a convolution's input.
    """
    if rule.observer is not None or reads_patches:
        return True
    method = methods.get(rule.method)
    reads_rows = method.solve is not None and (
        method.judged or method.needs_data(dict(rule.options))
    )
    return has_rows and (rule.correct_bias or reads_rows)


def wanted_statistics(
    layers: Iterable[tuple[str, Rule, bool, bool]],
) -> dict[str, StatsRequest]:
    """The statistics to collect for each layer, by path.

    Layers whose rules use no statistics are left out.

    Args:
      layers: path, rule, `has_rows` and `reads_patches` of each layer, as in
        `needs_statistics`.
    """
    wanted = {}
    for path, rule, has_rows, reads_patches in layers:
        if needs_statistics(rule, has_rows, reads_patches):
            fields = methods.get(rule.method).needed_statistics(dict(rule.options))
            hessian = (has_rows or reads_patches) and "hessian" in fields
            observer: Any = rule.observer
            wanted[path] = StatsRequest(observer, hessian, patches=reads_patches)
    return wanted


def of_stack(stats: LayerStats | None, stack: tuple[int, ...]) -> LayerStats | None:
    """Statistics that have the leading axes `[*stack]` of a stack of weights.

    Under linen's `nn.vmap`, all layers of a stack may read the same input. Then the
    statistics have fewer axes than the stack, and are broadcast.
    """
    if stats is None or stats.count.ndim >= len(stack):
        return stats
    missing = stack[: len(stack) - stats.count.ndim]
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (*missing, *leaf.shape)), stats
    )


def _checked(
    statistics: Mapping[str, Any], wanted: Mapping[str, StatsRequest], caller: str
) -> dict[str, LayerStats]:
    """Checks the statistics that the caller passed; returns those of some layers."""
    missing = [path for path in wanted if path not in statistics]
    if missing:
        raise ValueError(
            f"{caller}: calibration= has no statistics of {missing}. Make them "
            "with jaxq.nn.calibrate, or pass batches as calibration=."
        )
    checked = {}
    for path, request in wanted.items():
        like = empty_stats(1, observer=request.observer)
        if request.patches:
            like = like._replace(patches=empty_stats(1))
        stats = as_stats(statistics[path], like)
        if request.observer is not None and stats.observed is not None:
            request.observer.check_state(
                stats.observed, f"calibration of {path or 'the model'}"
            )
        if request.patches and stats.patches is None:
            raise ValueError(
                f"{caller}: the statistics of {path or 'the model'} have no patches, "
                "which the method of this convolution needs. Call jaxq.nn.calibrate "
                "with patches=True, or pass batches as calibration=."
            )
        checked[path] = stats
    return checked
