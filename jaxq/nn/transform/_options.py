"""The arguments of `quantize_model` that the loop reads, checked once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxq import formats, methods
from jaxq.nn.calibration import copied_batches
from jaxq.observers import LayerStats
from jaxq.qtensor import ON_NONFINITE, QTensor, QuantSpec, TrainedWeight
from jaxq.recipes import Recipe

ORDERS = ("blocks", "layers")


def _qtensor(floats: jax.Array, qt: QTensor) -> QTensor:
    return qt


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `jaxq.quantize_model` other than the model and the recipe.

    Attributes:
      caller: the name of the public function. Errors begin with this name.
      calibration: a list of batches, statistics by path, or None.
      mask: a function that says which rows of a batch count, or None.
      forward: a function that runs a batch, or None.
      sequential: "blocks", "layers", or "" for all layers together.
      resume: the folder of finished blocks, or None.
      fallback: what to do if a method is worse than rounding to nearest, or if an
        observer's range is worse than a plain range: "rtn", "none" or "raise".
      strict: a rule that matches nothing is an error. A matrix that no rule matches is
        also an error.
      donate: free each float weight when its codes exist.
      key: PRNG key, or None.
      on_nonfinite: what to do about NaN and infinities, as in `jaxq.quantize`.
      progress: show a line of progress. None shows it on a terminal.
      replacement: `replacement(floats, qt)` returns what takes the place of the float
        weight. `quantize_model` puts the QTensor there. Training puts a
        `TrainedWeight` there.

    Raises:
      TypeError: `calibration` is one array instead of batches.
      ValueError: `calibration` repeats without end.
      ValueError: `on_nonfinite`, `fallback` or `sequential` is not one of its choices;
        `donate` is True and `calibration` is not None; `resume` is not None and
        `sequential` is False.
    """

    caller: str = "quantize_model"
    calibration: Iterable[Any] | Mapping[str, LayerStats] | None = None
    mask: Callable[[Any], Any] | None = None
    forward: Callable[..., Any] | None = None
    sequential: bool | str = False
    resume: str | os.PathLike[str] | None = None
    fallback: str = "rtn"
    strict: bool = True
    donate: bool = False
    key: jax.Array | None = None
    on_nonfinite: str = "raise"
    progress: bool | None = None
    replacement: Callable[[jax.Array, QTensor], QTensor | TrainedWeight] = _qtensor

    def __post_init__(self):
        on_nonfinite = f"{self.caller}: on_nonfinite"
        formats.check_choice(on_nonfinite, self.on_nonfinite, ON_NONFINITE)
        fallback = f"{self.caller}: fallback"
        formats.check_choice(fallback, self.fallback, methods.FALLBACKS)
        object.__setattr__(self, "sequential", self._order())
        if self.donate and self.calibration is not None:
            raise ValueError(
                f"{self.caller}: donate=True frees weights that calibration= needs. "
                "Pass only one of the two arguments."
            )
        if self.calibration is None or isinstance(self.calibration, Mapping):
            return
        # An iterator can be read once, and several steps need the batches.
        batches = copied_batches(self.calibration, self.caller)
        object.__setattr__(self, "calibration", batches)

    def _order(self) -> str:
        """The value of `sequential` as "", "blocks" or "layers"."""
        if not isinstance(self.sequential, bool):
            formats.check_choice(f"{self.caller}: sequential", self.sequential, ORDERS)
        if self.resume is not None and not self.sequential:
            raise ValueError(
                f"{self.caller}: resume= keeps finished blocks, but without "
                "sequential= all layers are one block. Pass sequential='blocks' or "
                "'layers'. To keep statistics instead of blocks, save the result of "
                "jaxq.nn.calibrate and pass it as calibration=."
            )
        if isinstance(self.sequential, bool):
            return "blocks" if self.sequential else ""
        return self.sequential

    @property
    def batches(self) -> list[Any] | None:
        """The calibration batches. None if there are no data, or only statistics."""
        return self.calibration if isinstance(self.calibration, list) else None

    @property
    def statistics(self) -> Mapping[str, LayerStats] | None:
        """The statistics that the user passed. None if there are batches or no data."""
        return self.calibration if isinstance(self.calibration, Mapping) else None

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises a ValueError if a recipe needs other options.

        A rule with stochastic rounding needs `key`. A recipe with a rotation needs
        batches instead of statistics.
        """
        for rule in recipe.rules:
            spec = rule.weight
            if self.key is None and isinstance(spec, QuantSpec) and spec.needs_key:
                raise ValueError(
                    f"{self.caller}: the weight= of Rule({rule.pattern!r}) has "
                    "rounding='stochastic', which needs a PRNG key. "
                    "Pass key=jax.random.key(0)."
                )
        if recipe.rotate and self.statistics is not None:
            raise ValueError(
                f"{self.caller}: rotate=True changes the inputs of the layers. "
                "Pass batches as calibration=, not statistics."
            )
