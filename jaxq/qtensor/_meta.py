"""Meta: the static facts about a QTensor."""

from __future__ import annotations

import dataclasses
import math
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
      whole: inside `jax.shard_map`, the geometry of the whole array. `geometry` is then
        that of the device's part. None for a whole array.

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
    whole: Geometry | None = dataclasses.field(default=None, repr=False)

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

    def of_whole(self) -> Meta:
        """The meta of the whole array; `self` unless this is the meta of a part."""
        if self.whole is None:
            return self
        return dataclasses.replace(self, geometry=self.whole, whole=None)

    def with_geometry(self, geometry: Geometry) -> Meta:
        """The same facts about an array with another geometry, which is a whole array.

        A part of an array that is reshaped or sliced is no longer a part of it.
        """
        return dataclasses.replace(self, geometry=geometry, whole=None)

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
          ValueError: `data` is not a dictionary that `to_dict` returned. The error
            names the field.
        """
        for name in ("spec", "geometry", "packing", "dtype", "activation"):
            if name not in data:
                raise ValueError(f"the field {name} is missing")
        activation = data["activation"]
        # Files of the first version have no layout and no outliers.
        layout, outliers = data.get("layout", "rows"), data.get("outliers")
        formats.check_choice("layout", layout, LAYOUTS)
        packings = [packing.value for packing in formats.Packing]
        formats.check_choice("packing", data["packing"], packings)
        if not isinstance(data["dtype"], str):
            raise ValueError(f"dtype must be a name, got {data['dtype']!r:.80}")
        is_number = type(outliers) in (int, float)
        if outliers is not None and not (is_number and 0 <= outliers < math.inf):
            raise ValueError(
                f"outliers must be None or a number of at least 0, got {outliers!r:.80}"
            )
        return cls(
            QuantSpec.from_dict(data["spec"]),
            _geometry_from_dict(data["geometry"]),
            formats.Packing(data["packing"]),
            data["dtype"],
            None if activation is None else QuantSpec.from_dict(activation),
            layout,
            # jax cannot compare numbers with an int of more than 32 bits.
            None if outliers is None else float(outliers),
        )


def input_size(meta: Meta) -> int | None:
    """The contracted elements of the float operand of a product with a QTensor.

    None if there are several contracted axes: a convolution contracts other axes of its
    input than of its kernel.
    """
    geometry = meta.of_whole().geometry
    return geometry.contracted_size if geometry.num_contracted == 1 else None


def _geometry_from_dict(data: Any) -> Geometry:
    """The geometry that `dataclasses.asdict` described, after a check of all types.

    A size of 256.0 would only fail where the sizes are used.
    """
    if not isinstance(data, dict):
        raise ValueError(f"geometry must be a dict, got {data!r:.80}")
    declared = [field.name for field in dataclasses.fields(Geometry)]
    # Files of the first version have no `multiple` and no `flat`.
    for name in declared[:4]:
        if name not in data:
            raise ValueError(f"the field geometry.{name} is missing")
    for name, value in data.items():
        if name not in declared:
            raise ValueError(f"geometry has the unknown field {name!r:.80}")
        if not _is_valid(name, value):
            raise ValueError(f"geometry.{name} is {value!r:.80}")
    fields: dict[str, Any] = dict(data)
    for name, value in fields.items():
        if isinstance(value, list):  # JSON has no tuples
            fields[name] = tuple(value)
    return Geometry(**fields)


def _is_valid(name: str, value: Any) -> bool:
    """Whether a field of a geometry has a value of the right type and sign."""
    if name == "flat":
        return isinstance(value, bool)
    if name in ("num_contracted", "multiple"):
        return type(value) is int and value >= (name == "multiple")
    if not isinstance(value, list | tuple):
        return False
    if name == "order":
        return all(type(axis) is int for axis in value)
    if name == "block_shape":
        return all(
            block is None or (type(block) is int and block >= 1) for block in value
        )
    return all(type(size) is int and size >= 0 for size in value)
