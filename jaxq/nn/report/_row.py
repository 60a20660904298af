"""One row of a report: what happened to one parameter, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.methods import Solved
from jaxq.nn.report._errors import quantization_errors
from jaxq.nn.report._output_error import LayerErrors
from jaxq.qtensor import QUANTIZED, QTensor, is_traced
from jaxq.recipes import Rule

COLUMNS = (
    "path",
    "kind",
    "shape",
    "format",
    "granularity",
    "method",
    "bits",
    "kB before",
    "kB after",
    "SQNR dB",
    "worst block",
    "clipped",
    "output dB",
    "note",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What happened to one parameter.

    Attributes:
      path: the names that lead to the parameter, joined by "/".
      kind: the kind of its layer. If a variable is in no known layer, the type of the
        variable.
      shape: of the parameter.
      format: the format of its codes. "int8 + int8" names the format of the layer's
        activations too, if they are quantized. None if the parameter stays in floats.
      granularity: the granularity as text, with block sizes, contracted axes and batch
        axes. None if the parameter stays in floats.
      bits_per_element: bits per element, with the scales of all levels.
      bytes_before: of the float parameter.
      bytes_after: of the parameter after quantization.
      sqnr: signal to quantization noise ratio in dB. None if it was not measured.
      worst_block: the largest relative error of a block of 64 adjacent elements along
        the contracted axis. None if it was not measured.
      note: why the parameter stays in floats, or other remarks.
      clipped: the share of numbers outside the range that the format covers at their
        scale. None if it was not measured.
      method: the method that made the codes. "rtn" is rounding to nearest. None if the
        parameter stays in floats.
      loss: the error of the layer's output on held-out inputs, divided by the error of
        rounding to nearest. None without calibration.
      output_sqnr: signal to quantization noise ratio of the layer's output on held-out
        calibration inputs, in dB. The layer runs as in the quantized model, with
        quantized weight and quantized inputs. For a convolution, each tap of its kernel
        counts as a separate product, because calibration keeps single positions of the
        inputs. None without statistics of the inputs, and for a convolution with
        dynamic activation quantization.
      input_range: the static range of the inputs, (low, high). For a stack, the
        smallest and the largest end. None without static activation quantization.
      input_clipped: the share of calibration inputs outside their static range. None
        without static activation quantization.

    Example:
      >>> import jaxq
      >>> from flax import nnx
      >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
      >>> row = jaxq.quantize_model(model, "int8")[1].quantized[0]
      >>> row.path, row.format, row.bits_per_element, row.method
      ('kernel', 'int8', 8.5, 'rtn')
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    format: str | None
    granularity: str | None
    bits_per_element: float
    bytes_before: int
    bytes_after: int
    sqnr: float | None
    worst_block: float | None
    note: str = ""
    clipped: float | None = None
    method: str | None = None
    loss: float | None = None
    output_sqnr: float | None = None
    input_range: tuple[float, float] | None = None
    input_clipped: float | None = None

    def cells(self) -> list[str]:
        """The row as text, in the order of `COLUMNS`. "-" stands for None."""
        loss = "" if self.loss is None else f" ({self.loss:.2f})"
        return [
            self.path,
            self.kind,
            "x".join(map(str, self.shape)),
            self.format or "-",
            self.granularity or "-",
            (self.method or "-") + loss,
            f"{self.bits_per_element:.2f}",
            f"{self.bytes_before / 1e3:.1f}",
            f"{self.bytes_after / 1e3:.1f}",
            "-" if self.sqnr is None else f"{self.sqnr:.1f}",
            "-" if self.worst_block is None else f"{self.worst_block:.3f}",
            "-" if self.clipped is None else f"{self.clipped:.2%}",
            "-" if self.output_sqnr is None else f"{self.output_sqnr:.1f}",
            self._full_note(),
        ]

    def _full_note(self) -> str:
        """The static range of the inputs, and the note."""
        if self.input_range is None:
            return self.note
        low, high = self.input_range
        share = 0.0 if self.input_clipped is None else self.input_clipped
        static_range = f"input {low:.3g}..{high:.3g} clips {share:.2%}"
        return f"{static_range}; {self.note}" if self.note else static_range


def element_names(chosen: np.ndarray) -> str:
    """The elements of a stack where `chosen` is True, as text: "0, 3, 7".

    At most five elements are named.

    Args:
      chosen: bool `[*batch]`.
    """
    names = []
    for index in np.argwhere(chosen)[:5].tolist():
        names.append(str(index[0]) if len(index) == 1 else str(tuple(index)))
    num_more = int(chosen.sum()) - len(names)
    more = f" and {num_more} more" if num_more else ""
    return ", ".join(names) + more


# Rows of parameters that stay in floats.


def skip_reason(rule: Rule | None) -> str:
    """Why a layer with this rule stays in floats."""
    if rule is None:
        return "no rule of the recipe matches"
    return rule.reason or "skipped by the recipe"


def why_not_weight(value: Any, *, in_layer: bool = False) -> str:
    """Why a value that has no slot stays as it is; empty if it may be a weight.

    Args:
      value: an array, a QTensor, or another object of the model.
      in_layer: a layer that jaxq knows holds the value. The value is not its weight.
    """
    if isinstance(value, QUANTIZED):
        return "quantized already, left as it is"
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(value) if hasattr(leaf, "dtype")]
    if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return "no floats, left as it is"
    if not hasattr(value, "dtype"):
        return "not one array, left as it is"
    if len(value.shape) < 2:
        return "not a matrix, left in floats"
    return "not the weight of its layer, left in floats" if in_layer else ""


def float_row(path: str, kind: str, value: Any, note: str) -> Row:
    """The row of a parameter that stays as it is."""
    leaves = [leaf for leaf in jax.tree.leaves(value) if hasattr(leaf, "dtype")]
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    # The leaves of a quantized weight include codes and scales, not only elements.
    is_quantized = isinstance(value, QUANTIZED)
    size = value.size if is_quantized else sum(leaf.size for leaf in leaves)
    bits = 8 * nbytes / size if size else 0.0
    shape = tuple(getattr(value, "shape", ()))
    return Row(path, kind, shape, None, None, bits, nbytes, nbytes, None, None, note)


def other_row(path: str, variable: Any, layers: set[str]) -> Row:
    """The row of a variable that is not the weight of a known layer.

    Args:
      path: of the variable.
      variable: an nnx Variable.
      layers: paths of the layers that jaxq knows.
    """
    value = variable.get_value()
    note = why_not_weight(value, in_layer=path.rpartition("/")[0] in layers)
    note = note or "in no layer jaxq knows, left as it is"
    return float_row(path, type(variable).__name__, value, note)


# Rows of quantized weights.


def planned_row(
    path: str,
    kind: str,
    floats: Any,
    qt: QTensor,
    method: str = "rtn",
    notes: Sequence[str] = (),
) -> Row:
    """The row of a quantized weight, without measured errors.

    Args:
      path: of the weight.
      kind: of its layer.
      floats: the float weight, or a `jax.ShapeDtypeStruct` of it.
      qt: the quantized weight. Its leaves may be `jax.ShapeDtypeStruct`s.
      method: the method that makes the codes.
      notes: remarks. Empty ones are left out.
    """
    return Row(
        path=path,
        kind=kind,
        shape=qt.shape,
        format=_format(qt),
        granularity=_granularity(qt),
        bits_per_element=qt.bits_per_element,
        bytes_before=floats.size * floats.dtype.itemsize,
        bytes_after=qt.nbytes,
        sqnr=None,
        worst_block=None,
        note="; ".join(note for note in notes if note),
        method=method,
    )


def quantized_row(
    path: str,
    kind: str,
    floats: jax.Array,
    qt: QTensor,
    solved: Solved | None,
    notes: Sequence[str] = (),
    errors: LayerErrors = LayerErrors(),  # noqa: B008 (a tuple)
) -> Row:
    """The row of a quantized weight, with its errors unless the weight is traced.

    Args:
      path: of the weight.
      kind: of its layer.
      floats: the float weight.
      qt: the quantized weight.
      solved: what the method returned. None if the weight was rounded to nearest.
      notes: as in `planned_row`.
      errors: what calibration shows about the layer.
    """
    method, method_note, loss = "rtn", "", None
    if solved is not None:
        method, method_note, loss = solved.method, solved.note, solved.loss
    row = planned_row(path, kind, floats, qt, method, (method_note, *notes))
    if is_traced(floats):
        return row  # the errors of a traced weight are unknown
    sqnr, worst_block, clipped = quantization_errors(floats, qt)
    return dataclasses.replace(
        row,
        sqnr=float(sqnr),
        worst_block=float(worst_block),
        clipped=float(clipped),
        loss=loss,
        **errors._asdict(),
    )


def _format(qt: QTensor) -> str:
    """The formats of the codes and of the activations, such as "int8 + int8 static"."""
    name, activation = qt.spec.fmt.name, qt.meta.activation
    if activation is None:
        return name
    static = "" if qt.input_range is None else " static"
    return f"{name} + {activation.fmt.name}{static}"


def _granularity(qt: QTensor) -> str:
    """The granularity as text, for example "PerGroup(32 along -2, batch axes 0)"."""
    geometry = qt.meta.geometry
    name = type(qt.spec.granularity).__name__
    sizes = ",".join(str(b) for b in geometry.block_shape if b not in (None, 1))
    along = ",".join(map(str, geometry.contracted))
    batch = ",".join(map(str, range(len(qt.batch_shape))))
    batch_axes = f", batch axes {batch}" if batch else ""
    return f"{name}({sizes}{' ' if sizes else ''}along {along}{batch_axes})"
