"""What the loop knows of a model's data: batches, or statistics made before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from jaxq import methods
from jaxq.nn.calibration import StatsRequest, as_stats
from jaxq.nn.transform._options import Options
from jaxq.observers import LayerStats, empty_stats
from jaxq.recipes import Rule


class _Model(Protocol):
    def statistics(
        self, options: Options, wanted: Mapping[str, StatsRequest]
    ) -> Mapping[str, LayerStats]: ...


class CalibrationData:
    """The data of one call, and whether a layer has used them.

    Args:
      model: the adapter of the model that the batches run through.
      options: with the batches or the statistics.
    """

    def __init__(self, model: _Model, options: Options):
        self._model = model
        self._options = options
        self.used = False

    def __bool__(self) -> bool:
        return self._options.calibration is not None

    def statistics(
        self, wanted: Mapping[str, StatsRequest]
    ) -> Mapping[str, LayerStats]:
        """Statistics of some layers, in the model as it is now.

        Args:
          wanted: what to count for each path.

        Returns:
          Statistics by path. Empty without data.

        Raises:
          ValueError: the statistics that the caller passed miss a layer, or the state
            of an observer is of another kind.
        """
        if not wanted or not self:
            return {}
        self.used = True
        if self._options.statistics is not None:
            return _checked(self._options.statistics, wanted)
        return self._model.statistics(self._options, wanted)

    def before_folding(self, paths: Iterable[str]) -> Mapping[str, LayerStats]:
        """Statistics of the layers whose inputs get new scales.

        Raises:
          ValueError: the caller passed statistics instead of batches.
        """
        if self._options.statistics is not None:
            raise ValueError(
                f"{self._options.caller}: a method that folds scales changes what "
                "reaches the layers, so it needs the batches themselves as "
                "calibration=, not statistics."
            )
        return self.statistics(dict.fromkeys(paths, StatsRequest(hessian=False)))

    def unused_notes(self, read_arguments: tuple[str, ...]) -> list[str]:
        """What the report says of data that no layer has used.

        Args:
          read_arguments: names of arguments that the adapter used itself.
        """
        if self.used:
            return []
        names = [
            f"{name}="
            for name in ("calibration", "mask", "forward")
            if name not in read_arguments and getattr(self._options, name) is not None
        ]
        if not names:
            return []
        return [f"not used, because no rule needs data: {', '.join(names)}"]


def needs_statistics(rule: Rule, has_rows: bool) -> bool:
    """True if data about a layer's input, if there are any, have a use for its rule.

    Args:
      rule: of the layer.
      has_rows: rows of the input meet the weight as a matrix.
    """
    if rule.observer is not None:
        return True
    method = methods.get(rule.method)
    reads_rows = method.solve is not None and (
        method.judged or method.needs_data(dict(rule.options))
    )
    return has_rows and (rule.correct_bias or reads_rows)


def wanted_statistics(
    layers: Iterable[tuple[str, Rule, bool]],
) -> dict[str, StatsRequest]:
    """What to count of the inputs of some layers.

    Args:
      layers: path, rule and whether rows of the input meet the weight as a matrix.
    """
    wanted = {}
    for path, rule, has_rows in layers:
        if needs_statistics(rule, has_rows):
            fields = methods.get(rule.method).needed_statistics(dict(rule.options))
            observer: Any = rule.observer
            wanted[path] = StatsRequest(observer, has_rows and "hessian" in fields)
    return wanted


def _checked(
    statistics: Mapping[str, Any], wanted: Mapping[str, StatsRequest]
) -> dict[str, LayerStats]:
    """The statistics of the wanted layers, from those that the caller passed."""
    missing = [path for path in wanted if path not in statistics]
    if missing:
        raise ValueError(
            f"quantize_model: calibration has no statistics of {missing}. Make them "
            "with jaxq.nn.calibrate, or pass batches as calibration=."
        )
    checked = {}
    for path, request in wanted.items():
        like = empty_stats(1, observer=request.observer)
        stats = as_stats(statistics[path], like)
        if request.observer is not None and stats.observed is not None:
            request.observer.check_state(
                stats.observed, f"calibration of {path or 'the model'}"
            )
        checked[path] = stats
    return checked
