"""`Slot`, a weight that a rule may quantize, and `Adapter`, the model around it.

The loop in `_loop.py` works on slots. There is one `Slot` for each weight that a rule
may quantize. Flax nnx models, Flax linen modules and plain trees of arrays each have an
`Adapter`. It lists the slots of a model and puts the results back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from jaxq import methods
from jaxq.nn.calibration import StatsRequest
from jaxq.nn.layers import LayerKind, LinenKind, Roles
from jaxq.nn.report import Inputs, Row, product_note
from jaxq.nn.transform._calibration_data import CalibrationData
from jaxq.nn.transform._folding import Outcome
from jaxq.nn.transform._model_error import Run
from jaxq.nn.transform._options import Options
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, TrainedWeight
from jaxq.recipes import Rule


class Kind(Protocol):
    """The attributes of a layer kind that the loop reads.

    `LayerKind` and `LinenKind` in `jaxq.nn.layers` explain them.
    """

    @property
    def name(self) -> str: ...
    @property
    def watched(self) -> bool: ...
    @property
    def windowed(self) -> bool: ...
    @property
    def corrects_bias(self) -> bool: ...
    @property
    def read_patches(self) -> Any: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """One weight that a rule may quantize.

    Attributes:
      path: the path of the layer, for rules and statistics. Components are joined by
        "/".
      name: the path of the weight, for the report and errors.
      kind: the record of the layer's kind.
      value: the float weight. It may be a `jax.ShapeDtypeStruct` in a plan.
      weight: identifies the weight. Layers that share a weight have slots with equal
        `weight`, and the loop quantizes this weight once.
      place: the place of the weight in the model. Only the adapter reads it.
      rule: the rule that matches the layer. None if no rule matches.
      contracting: the axes of `value` that the product contracts.
      batch: the leading axes of `value` that stack several weights. Each of these
        weights has its own statistics.
      roles: the roles of the axes of one layer's weight. None for an array of a tree.
      problem: why the weight cannot be quantized. Empty if it can be quantized.
      notes: remarks for the report.
      planned: the quantized weight with `jax.ShapeDtypeStruct`s instead of arrays. None
        before the check, and for a weight that stays in floats.
      product_note: the note of `planned` on how its product runs.
      scales: where the scales of the rule's method are. None if the method has no
        scales, or if the layer can have none.
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
    product_note: str = ""
    scales: Outcome | None = None

    @property
    def chosen(self) -> bool:
        """True if the rule quantizes the weight."""
        return self.rule is not None and self.rule.weight is not None

    @property
    def has_rows(self) -> bool:
        """True if calibration sees the input, and a matrix multiplies its rows."""
        return self.kind.watched and not self.kind.windowed

    @property
    def has_patches(self) -> bool:
        """True if calibration sees the patches of a convolution's input."""
        return self.kind.windowed and self.kind.read_patches is not None

    @property
    def reads_patches(self) -> bool:
        """True if the rule's method needs the patches of a convolution's input.

        Methods that move scales round the kernel of a convolution to nearest.
        """
        if self.rule is None or not self.has_patches:
            return False
        method = methods.get(self.rule.method)
        if method.matrices_only or method.folding is not None:
            return False
        return method.needs_data(dict(self.rule.options))

    def matrix_stats(self, stats: LayerStats | None) -> LayerStats | None:
        """The statistics of the rows that the weight multiplies as a matrix.

        Those of a convolution have a leading axis of groups. None if there are none.
        """
        if stats is None or self.has_rows:
            return stats
        return stats.patches

    def inputs(self, stats: LayerStats) -> Inputs:
        """How the layer reads its inputs.

        The channels of a Flax convolution are the last contracted axis of its kernel.
        Kernels of other code may have another order. Their axis of channels is known
        if only one contracted axis has as many numbers as a row.
        """
        if not self.kind.windowed:
            return Inputs(windowed=False)
        ndim, shape = self.value.ndim, self.value.shape
        axes = [axis % ndim - ndim for axis in self.contracting]
        if isinstance(self.kind, LayerKind | LinenKind):
            return Inputs(True, max(axes), stats.patches is not None)
        fitting = [axis for axis in axes if shape[axis] == stats.mean.shape[-1]]
        return Inputs(True, fitting[0] if len(fitting) == 1 else None)

    def note_on_product(self, qt: QTensor) -> str:
        """The note on how the product of the layer runs, see `product_note`.

        A product is planned again only if `qt` has other static facts than `planned`.
        This happens if the method fell back, or if the weight scales its input.

        Args:
          qt: the quantized weight.
        """
        if jax.tree.structure(qt) == jax.tree.structure(self.planned):
            return self.product_note
        return product_note(qt, self.roles)

    @property
    def label(self) -> str:
        """The path and the kind of the layer, for errors."""
        return f"{self.path or 'the model itself'} ({self.kind.name})"


class Inventory(NamedTuple):
    """The slots of a model, and what the checks of rules need in addition.

    Attributes:
      slots: every weight that a rule may quantize, with its rule.
      other_rules: rules that match an array outside of slots. They count as used.
      unmatched: descriptions of matrices that seem to be weights, are not in a layer
        that jaxq knows, and are not matched by a rule.
      refused: messages for errors. Each names an array outside of slots that a rule
        quantizes, although the array cannot become a QTensor.
    """

    slots: list[Slot]
    other_rules: Sequence[Rule] = ()
    unmatched: Sequence[str] = ()
    refused: Sequence[str] = ()


class Adapter(Protocol):
    """The interface of the loop to a model. An adapter changes its copy of the model.

    Attributes:
      caller: the name of the public function. Errors begin with this name.
      noun: the word for what rules match: "layer" or "parameter".
      no_folding: why scales cannot be moved between layers. Empty if they can be moved.
        The layers then keep their scales if the method has `Folding.at_run_time`.
      data_arguments: the arguments that give calibration data, for errors.
      unmatched_remedy: a sentence for errors: how to quantize a matrix in
        `Inventory.unmatched`.
      read_arguments: the names of arguments about data that the adapter itself reads.
        The report does not call them unused.
      keys_follow_slots: True assigns PRNG keys to weights in the order of the slots.
        False assigns them in the order in which the weights are quantized.
      notes: remarks on the whole model for the report.
    """

    caller: str
    noun: str
    no_folding: str
    data_arguments: str
    unmatched_remedy: str
    read_arguments: tuple[str, ...]
    keys_follow_slots: bool
    notes: tuple[str, ...]

    def inventory(self) -> Inventory:
        """Lists the weights. The specs of the rules are not checked yet."""
        ...

    def problems(self, slots: Sequence[Slot]) -> list[str]:
        """Finds problems that only this kind of model can have, one line for each."""
        ...

    def state(self) -> Any:
        """A tree of the model's arrays. Its digest identifies a run for `resume`."""
        ...

    def arrays(self) -> Iterable[Any]:
        """The arrays of the model, each as often as it is used."""
        ...

    def fold(
        self, slots: list[Slot], data: CalibrationData | None, options: Options
    ) -> list[Slot]:
        """Moves scales into previous layers, for the methods that fold scales.

        Args:
          slots: all slots of the model.
          data: calibration data. None for a plan, which does not change the model.
          options: `fallback`.

        Returns:
          The slots of the changed model, with `Slot.scales`.
        """
        ...

    def call_order(self, options: Options) -> Mapping[str, tuple[int, ...]]:
        """The paths of the layers, in the order in which the model calls them.

        Each path maps to one number for each array that the layer reads. Layers that
        read the same array have the same number.
        """
        ...

    def statistics(
        self, options: Options, wanted: Mapping[str, StatsRequest]
    ) -> Mapping[str, LayerStats]:
        """Statistics of some layers' inputs, in the present state of the model."""
        ...

    def bias(self, slot: Slot) -> jax.Array | None:
        """The bias of a layer. None if the layer has no bias."""
        ...

    def put_bias(self, slot: Slot, bias: jax.Array) -> None:
        """Replaces the bias of a layer."""
        ...

    def put_weight(self, slot: Slot, weight: QTensor | TrainedWeight) -> None:
        """Replaces the weight of a layer. The loop calls it for each chosen slot."""
        ...

    def finish(self) -> Any:
        """The quantized model."""
        ...

    def runs(self, options: Options) -> tuple[Run, Run]:
        """The float model and the quantized model, to run batches through both.

        The loop calls it after `finish`, and only if there are batches.
        """
        ...

    def rows(self, rows: Mapping[Hashable, Row]) -> list[Row]:
        """The rows of the report, in order.

        Args:
          rows: the rows of the slots, by `Slot.weight`. The adapter adds the others.
        """
        ...
