"""What happened to each parameter: one row each, skipped ones with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

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
    "note",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
      path: components joined by "/".
      kind: kind of the layer, or of the variable where it belongs to none.
      shape: of the parameter.
      format: of its codes, "+" the activations' where those are quantized; None where it stays in floats.
      granularity: with its block sizes, or None.
      method: what made the codes ("rtn": rounding to nearest), or None.
      bits_per_element: scales of every level included.
      bytes_before: of the float parameter.
      bytes_after: of what replaced it.
      sqnr: dB, or None.
      worst_block: largest relative error of 64 neighbours along the last axis, or None.
      note: why it was skipped, or what else happened.
      loss: error of the layer's output on held-out inputs, over that of rounding to nearest; None without calibration.
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
    method: str | None = None
    loss: float | None = None

    def cells(self) -> list[str]:
        """The row as text, in the order of `COLUMNS`."""
        return [
            self.path,
            self.kind,
            "x".join(map(str, self.shape)),
            self.format or "-",
            self.granularity or "-",
            (self.method or "-") + ("" if self.loss is None else f" ({self.loss:.2f})"),
            f"{self.bits_per_element:.2f}",
            f"{self.bytes_before / 1e3:.1f}",
            f"{self.bytes_after / 1e3:.1f}",
            "-" if self.sqnr is None else f"{self.sqnr:.1f}",
            "-" if self.worst_block is None else f"{self.worst_block:.3f}",
            self.note,
        ]


@dataclasses.dataclass(frozen=True)
class Report:
    """What `quantize_model` did; print it, or take `rows`.

    Attributes:
      rows: one for each parameter of the model.
    """

    rows: tuple[Row, ...]

    @property
    def quantized(self) -> tuple[Row, ...]:
        """The rows of parameters that were quantized."""
        return tuple(row for row in self.rows if row.format is not None)

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Mean over the quantized parameters, scales included; NaN if there are none."""
        size = sum(8 * row.bytes_after / row.bits_per_element for row in self.quantized if row.bits_per_element)
        return sum(8 * row.bytes_after for row in self.quantized) / size if size else float("nan")

    @property
    def worst(self) -> Row | None:
        """The quantized parameter with the lowest SQNR."""
        rows = [row for row in self.quantized if row.sqnr is not None]
        return min(rows, key=lambda row: row.sqnr or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: rows and totals."""
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {"rows": [dataclasses.asdict(row) for row in self.rows], "totals": totals}

    def to_markdown(self) -> str:
        """A markdown table with a line of totals below."""
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(row.cells()) + " |" for row in self.rows]
        return "\n".join([*lines, "", self._totals()])

    def __str__(self) -> str:
        cells = [list(COLUMNS), *(row.cells() for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, self._totals()])

    def _totals(self) -> str:
        count = len(self.quantized)
        return (
            f"{count} of {len(self.rows)} parameters quantized, {self.bits_per_weight:.3f} bits per weight; "
            f"{self.bytes_before / 1e6:.2f} MB before, {self.bytes_after / 1e6:.2f} MB after"
        )
