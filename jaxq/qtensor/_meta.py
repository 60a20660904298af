"""Meta: the static facts about a QTensor."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxq import formats
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._spec import QuantSpec

LAYOUTS = ("rows", "columns")


@dataclasses.dataclass(frozen=True)
class Meta:
    """The static facts about a QTensor: part of its treedef, compared by value.

    Attributes:
      spec: how the array was quantized.
      geometry: shape, axis roles and blocks.
      packing: order of the codes in the bytes of `data`. `relayout` changes it.
      dtype: the dtype that `dequantize` returns by default.
      activation: the spec by which the float operand of a product with this QTensor is
        quantized first. If the QTensor has an `input_range`, this is static activation
        quantization, else dynamic. None is weight-only.
      layout: "rows" stores the codes of a row as neighbours in `data`. "columns" stores
        the contracted axis first. `relayout` changes it.
      outliers: columns of the float operand are multiplied in floats if their largest
        magnitude is at least this number. None quantizes all columns.
      name: the name of the array in error messages, for example the path of a
        parameter. Comparisons of `Meta` ignore the name.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> meta = jaxq.quantize(jnp.ones((64, 8)), "int4").meta
      >>> meta.dtype, meta.layout, meta.stored_shape
      ('float32', 'rows', (8, 32))
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
    def stored_sizes(self) -> tuple[int, ...]:
        """Number of codes along each storage axis of `data`.

        Only a last byte that is not full has padding. Blocks that are not full have
        none: 320 codes in groups of 128 are 320 codes.
        """
        *rows, last = self.geometry.storage_shape
        per_pack = formats.codes_per_pack(self.spec.fmt.bits, self.packing)
        return (*rows, -(-last // per_pack) * per_pack)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of `data` without its batch axes."""
        *rows, last = self.stored_sizes
        if self.packing is not formats.Packing.NONE:
            last = last * self.spec.fmt.bits // 8  # bytes
        return (*rows, last) if self.layout == "rows" else (last, *rows)

    @property
    def pack_unit(self) -> int | None:
        """Number of codes that the packing HALVES arranges together.

        It is the block size if a block fills whole bytes, so that the codes of a block
        stay together. The codes of a last block that is not full are a shorter unit.
        Otherwise it is None, and HALVES arranges a whole row together.
        """
        block = self.geometry.block_shape[-1]
        codes_per_byte = formats.codes_per_pack(self.spec.fmt.bits, self.packing)
        if block is None or block % codes_per_byte:
            return None
        return block

    def to_dict(self) -> dict[str, Any]:
        """A description that JSON can store. `from_dict` returns an equal `Meta`.

        The description does not contain `name`.
        """
        activation = None if self.activation is None else self.activation.to_dict()
        return {
            "spec": self.spec.to_dict(),
            "geometry": dataclasses.asdict(self.geometry),
            "packing": self.packing.value,
            "dtype": self.dtype,
            "activation": activation,
            "layout": self.layout,
            "outliers": self.outliers,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Meta:
        """The inverse of `to_dict`.

        Raises:
          KeyError, TypeError, ValueError: `data` is not a dictionary that `to_dict`
            returned.
        """
        geometry: dict[str, Any] = dict(data["geometry"])
        for field, value in geometry.items():
            if isinstance(value, list):  # JSON has no tuples
                geometry[field] = tuple(value)
        activation = data["activation"]
        # Files of the first version have no layout and no outliers.
        layout = data.get("layout", "rows")
        formats.check_choice("layout", layout, LAYOUTS)
        return cls(
            QuantSpec.from_dict(data["spec"]),
            Geometry(**geometry),
            formats.Packing(data["packing"]),
            data["dtype"],
            None if activation is None else QuantSpec.from_dict(activation),
            layout,
            data.get("outliers"),
        )
