"""The report of `quantize_model`: a row for each parameter, and totals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from jaxq.nn.report._render import as_markdown, as_rich_table, as_text
from jaxq.nn.report._row import Row


# A report is a pytree without arrays, so that functions under jit can return it.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Report:
    """What `quantize_model` did. Print it, or read `rows`.

    `rich.print` and notebooks show a table.

    Attributes:
      rows: one row for each parameter of the model.
      notes: remarks on the whole model. With `strict=False`, rules that matched nothing
        are an example.
      output_sqnr: signal to quantization noise ratio of the model's outputs on the
        first calibration batch, in dB. It compares the float model with the quantized
        model, over all floats of the outputs. None without batches, or if a note says
        why it was not measured.

    Example:
      >>> import jaxq
      >>> from flax import nnx
      >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
      >>> report = jaxq.quantize_model(model, "int8")[1]
      >>> [row.path for row in report.rows], report.bits_per_weight
      (['bias', 'kernel'], 8.5)
      >>> print(str(report).splitlines()[-1])
      1 of 2 parameters quantized, 8.500 bits per weight; 0.00 MB before, 0.00 MB after
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    output_sqnr: float | None = None

    @property
    def quantized(self) -> tuple[Row, ...]:
        """The rows of parameters that were quantized."""
        return tuple(row for row in self.rows if row.format is not None)

    @property
    def bytes_before(self) -> int:
        """The bytes of all parameters before quantization."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """The bytes of all parameters after quantization."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """The mean bits per weight of the quantized parameters, scales included.

        NaN if no parameter is quantized.
        """
        # An array without elements is left out, because its scales would count.
        rows = [row for row in self.quantized if 0 not in row.shape]
        size = sum(math.prod(row.shape) for row in rows)
        return 8 * sum(row.bytes_after for row in rows) / size if rows else math.nan

    @property
    def worst(self) -> Row | None:
        """The quantized parameter with the lowest SQNR. None if none was measured."""
        rows = [row for row in self.quantized if row.sqnr is not None]
        return min(rows, key=lambda row: row.sqnr or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Rows, totals and notes, ready for JSON.

        JSON has no infinity and no NaN. These values become text. A `bits_per_weight`
        of NaN becomes None.

        Example:
          >>> import jaxq
          >>> from flax import nnx
          >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
          >>> totals = jaxq.quantize_model(model, "int8")[1].to_dict()["totals"]
          >>> totals["quantized"], totals["bytes_after"]
          (1, 576)
        """
        bits = self.bits_per_weight
        output = _json_ready({"output_sqnr": self.output_sqnr})
        return {
            "rows": [_json_ready(dataclasses.asdict(row)) for row in self.rows],
            "totals": {
                "parameters": len(self.rows),
                "quantized": len(self.quantized),
                "bits_per_weight": None if np.isnan(bits) else bits,
                "bytes_before": self.bytes_before,
                "bytes_after": self.bytes_after,
                **output,
            },
            "notes": [*self.notes],
        }

    def to_markdown(self) -> str:
        """A markdown table with the totals below it."""
        return as_markdown(self.rows, self.totals)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def __rich__(self) -> Any:
        return as_rich_table(self.rows, self.totals)

    def __str__(self) -> str:
        return as_text(self.rows, self.totals)

    @property
    def totals(self) -> str:
        """One line of totals, then the notes."""
        totals = (
            f"{len(self.quantized)} of {len(self.rows)} parameters quantized, "
            f"{self.bits_per_weight:.3f} bits per weight; "
            f"{self.bytes_before / 1e6:.2f} MB before, "
            f"{self.bytes_after / 1e6:.2f} MB after"
        )
        if self.output_sqnr is not None:
            totals += f"; outputs of a calibration batch: {self.output_sqnr:.1f} dB"
        return "\n".join([totals, *self.notes])


def _json_ready(row: dict[str, Any]) -> dict[str, Any]:
    """A row with infinities and NaN as text."""
    return {
        name: str(value)
        if isinstance(value, float) and not np.isfinite(value)
        else value
        for name, value in row.items()
    }
