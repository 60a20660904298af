"""What of a QTensor is static: part of its treedef, compared by value."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxq import formats
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._spec import QuantSpec

LAYOUTS = ("rows", "columns")


@dataclasses.dataclass(frozen=True)
class Meta:
    """What of a QTensor is static: part of its treedef, compared by value.

    Attributes:
      spec: how it was quantized.
      geometry: shape, axis roles and blocks.
      packing: order of the codes in `data`; `relayout` changes it.
      dtype: what `dequantize` returns by default.
      activation: how a float array that meets this one in a product is quantized first, by its own extremes or by the
        QTensor's `input_range`; None leaves it in floats.
      layout: "rows": codes of a row are neighbours in `data`; "columns": the row's axis comes first. `relayout` changes
        it.
      outliers: columns of that float array in which a magnitude reaches this are multiplied in floats, not quantized;
        None quantizes all.
      name: what errors call the array, a parameter's path; no part of comparisons.
    """

    spec: QuantSpec
    geometry: Geometry
    packing: formats.Packing
    dtype: str
    activation: QuantSpec | None = None
    layout: Literal["rows", "columns"] = "rows"
    outliers: float | None = None
    name: str = dataclasses.field(default="", compare=False)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of `data` behind its batch axes."""
        *rows, last = self.geometry.padded_shape
        packed = self.packing is not formats.Packing.NONE
        row = last * self.spec.fmt.bits // 8 if packed else last
        return (*rows, row) if self.layout == "rows" else (row, *rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON's own types; `from_dict` is the way back."""
        return {
            "spec": self.spec.to_dict(),
            "geometry": dataclasses.asdict(self.geometry),
            "packing": self.packing.value,
            "dtype": self.dtype,
            "activation": None
            if self.activation is None
            else self.activation.to_dict(),
            "layout": self.layout,
            "outliers": self.outliers,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Meta:
        """The inverse of `to_dict`; a KeyError, TypeError or ValueError where `data` is none of its making."""
        fields: Any = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in data["geometry"].items()
        }
        formats.check_choice("layout", layout := data.get("layout", "rows"), LAYOUTS)
        return cls(
            QuantSpec.from_dict(data["spec"]),
            Geometry(**fields),
            formats.Packing(data["packing"]),
            data["dtype"],
            None
            if data["activation"] is None
            else QuantSpec.from_dict(data["activation"]),
            layout,
            data.get("outliers"),
        )

    @property
    def pack_unit(self) -> int | None:
        """Codes in one HALVES unit: a block where it fills whole bytes, so that blocks stay together, else a row."""
        block = self.geometry.block_shape[-1]
        whole = (
            block is not None
            and block % formats.codes_per_pack(self.spec.fmt.bits, self.packing) == 0
        )
        return block if whole else None
