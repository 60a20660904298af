"""A weight that may be quantized, and what the loop asks of the model that holds it.

The loop in `_loop.py` works on slots: one `Slot` for each weight that a rule may
quantize. Flax nnx models, Flax linen modules and plain trees of arrays differ. Each of
them has an `Adapter`, which lists the slots and puts the results back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from jaxq.nn.calibration import StatsRequest
from jaxq.nn.layers import Roles
from jaxq.nn.report import Row
from jaxq.nn.transform._calibration_data import CalibrationData
from jaxq.nn.transform._folding import Outcome
from jaxq.nn.transform._options import Options
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor
from jaxq.recipes import Rule


class Kind(Protocol):
    """What the loop reads of a layer kind. The records in `jaxq.nn.layers` have it."""

    @property
    def name(self) -> str: ...
    @property
    def watched(self) -> bool: ...
    @property
    def windowed(self) -> bool: ...
    @property
    def corrects_bias(self) -> bool: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """One weight that a rule may quantize.

    Attributes:
      path: of the layer. Rules and statistics use it. Components are joined by "/".
      name: of the weight. The report and errors use it.
      kind: the record of the layer's kind.
      value: the float weight. It may be a `jax.ShapeDtypeStruct` in a plan.
      weight: identifies the weight. Layers that share a weight have slots with equal
        `weight`; the loop quantizes it once.
      place: where the adapter put the weight. Only the adapter reads it.
      rule: what the recipe does with the layer. None if no rule matches.
      contracting: the axes of `value` that the product contracts.
      batch: the leading axes of `value` that have statistics of their own.
      roles: of the axes in one layer. None for an array of a tree.
      problem: why the weight cannot be quantized. Empty if it can.
      notes: remarks for the report.
      planned: the QTensor that there will be, made of `jax.ShapeDtypeStruct`s. None
        before the check, and for a weight that stays in floats.
      scales: what happened to the scales that the rule's method moves into the layer
        before. None if there are no such scales.
    """

    path: str
    name: str
    kind: Kind
    value: Any
    weight: Hashable
    place: Any
    rule: Rule | None
    contracting: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    roles: Roles | None = None
    problem: str = ""
    notes: tuple[str, ...] = ()
    planned: QTensor | None = None
    scales: Outcome | None = None

    @property
    def chosen(self) -> bool:
        """The rule quantizes the weight."""
        return self.rule is not None and self.rule.weight is not None

    @property
    def has_rows(self) -> bool:
        """Calibration sees rows of the input that meet the weight as a matrix."""
        return self.kind.watched and not self.kind.windowed

    @property
    def label(self) -> str:
        """What errors call the layer."""
        return f"{self.path or 'the model itself'} ({self.kind.name})"


class Inventory(NamedTuple):
    """What an adapter lists.

    Attributes:
      slots: every weight that a rule may quantize, with its rule.
      other_rules: rules that match something else, so that they count as used.
      unmatched: descriptions of matrices that look like weights, belong to no layer
        that jaxq knows, and have no rule.
    """

    slots: list[Slot]
    other_rules: Sequence[Rule] = ()
    unmatched: Sequence[str] = ()


class Adapter(Protocol):
    """A model, as the loop sees it. The adapter changes its own copy of the model.

    Attributes:
      caller: the public function. Errors begin with it.
      noun: what rules match: "layer" or "parameter".
      no_folding: why no scales can be moved between layers. Empty if they can.
      no_data: why no data pass through the model. Empty if they can.
      unmatched_remedy: what to do about `Inventory.unmatched`.
      read_arguments: arguments about data that the adapter itself used, so that the
        report does not call them unused.
      keys_follow_slots: PRNG keys are given out in the order of the slots. Otherwise
        they are given out in the order in which weights are quantized.
      notes: remarks on the whole model for the report.
    """

    caller: str
    noun: str
    no_folding: str
    no_data: str
    unmatched_remedy: str
    read_arguments: tuple[str, ...]
    keys_follow_slots: bool
    notes: tuple[str, ...]

    def inventory(self) -> Inventory:
        """Lists the weights. Nothing is checked that needs a rule's spec."""
        ...

    def problems(self, slots: Sequence[Slot]) -> list[str]:
        """Problems that only this kind of model has, one line each."""
        ...

    def state(self) -> Any:
        """A tree of the model's arrays, which identifies a run that may be resumed."""
        ...

    def arrays(self) -> Iterable[Any]:
        """The arrays of the model, each as often as it is used."""
        ...

    def fold(
        self, slots: list[Slot], data: CalibrationData | None, fallback: str
    ) -> list[Slot]:
        """Moves scales into the layers before, for the methods that do this.

        Args:
          slots: all of the model.
          data: calibration data; None for a plan, which changes nothing.
          fallback: as in `quantize_model`.

        Returns:
          The slots of the changed model, with `Slot.scales`.
        """
        ...

    def call_order(self, options: Options) -> Mapping[str, tuple[int, ...]]:
        """The layers in the order in which the first batch reaches them.

        Each has the numbers of the arrays that it reads. Layers that read one array
        have the same number.
        """
        ...

    def statistics(
        self, options: Options, wanted: Mapping[str, StatsRequest]
    ) -> Mapping[str, LayerStats]:
        """Statistics of some layers' inputs, in the model as it is now."""
        ...

    def bias(self, slot: Slot) -> jax.Array | None:
        """The bias of a layer; None if it has none."""
        ...

    def put_bias(self, slot: Slot, bias: jax.Array) -> None:
        """Replaces the bias of a layer."""
        ...

    def put_weight(self, slot: Slot, qt: QTensor) -> None:
        """Replaces the weight of a layer. The loop calls it for each chosen slot."""
        ...

    def finish(self) -> Any:
        """The quantized model."""
        ...

    def rows(self, rows: Mapping[Hashable, Row]) -> list[Row]:
        """The rows of the report, in order.

        Args:
          rows: the rows of the slots, by `Slot.weight`. The adapter adds the others.
        """
        ...
