"""One parameter of a checkpoint, before it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxq.io.layouts import Layout
from jaxq.qtensor import QTensor, QuantSpec

# Arrays with shapes, tables or JSON are small. Others are not read for their shapes.
_MOST_STATIC_BYTES = 1 << 20
# The groups of the inputs decide whether a QTensor can hold the weight.
_ORDER = "g_idx"


class StoredTensor(NamedTuple):
    """A tensor of a file, which is read later.

    Attributes:
      file: the file, for errors.
      name: of the tensor in the file.
      shape: as `read` returns it.
      dtype: as `read` returns it.
      read: reads it.
      read_rows: reads the rows from a start to a stop. If it is None, `read_row` reads
        the whole tensor.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    read_rows: Callable[[int, int], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """The number of bytes of the array."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    def read_row(self, number: int) -> np.ndarray:
        """One entry of the first axis."""
        if self.read_rows is None:
            return self.read()[number]
        return self.read_rows(number, number + 1)[0]


class Inputs(NamedTuple):
    """How a module quantizes its inputs, as arguments of `QTensor.with_activation`.

    Attributes:
      spec: of the inputs, which are quantized in each call.
      outliers: columns with a number of at least this magnitude stay in floats.
    """

    spec: QuantSpec
    outliers: float | None = None


class Parameter(NamedTuple):
    """A parameter of a checkpoint.

    Attributes:
      name: of the parameter.
      tensors: the tensors that hold it. A parameter that is not quantized has one.
      layout: how the tensors hold the weight; None for one that is not quantized.
      settings: the settings of the layout.
      swaps_axes: True if the parameter has the axes `[out, in]`.
      inputs: how the inputs are quantized; None if they are not.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    layout: Layout | None = None
    settings: Mapping[str, Any] = {}
    swaps_axes: bool = True
    inputs: Inputs | None = None

    @property
    def file(self) -> Path:
        """The file of its first tensor."""
        return next(iter(self.tensors.values())).file

    def read(
        self, caller: str, *, dequantize: bool
    ) -> QTensor | jax.Array | np.ndarray:
        """The value of the parameter.

        Raises:
          ValueError: the tensors do not fit the settings, or no QTensor holds the
            weight. The error names the file and the parameter.
        """
        arrays = {name: tensor.read() for name, tensor in self.tensors.items()}
        if self.layout is None:
            (array,) = arrays.values()
            return array
        return self._converted(arrays, caller, dequantize)

    def read_slice(self, number: int, caller: str) -> jax.Array | np.ndarray:
        """One matrix of a stack, in floats.

        Args:
          number: of the matrix.
          caller: the name that error messages begin with.

        Raises:
          ValueError: as `read`.
        """
        arrays = {
            name: tensor.read_row(number) for name, tensor in self.tensors.items()
        }
        if self.layout is None:
            (array,) = arrays.values()
            return array
        return self._converted(arrays, caller, dequantize=True)

    def eval_shape(
        self, caller: str, known: dict[Any, Any], *, dequantize: bool
    ) -> Any:
        """As `read`, with shapes instead of arrays. Only small arrays are read.

        Args:
          caller: the name that error messages begin with.
          known: results by all that they depend on. Layers of equal shapes are traced
            once.
          dequantize: as in `read`.
        """
        if self.layout is None:
            (tensor,) = self.tensors.values()
            return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
        constants: dict[str, np.ndarray] = {}
        shapes: dict[str, jax.ShapeDtypeStruct] = {}
        for name, tensor in self.tensors.items():
            if name in self.layout.static or name.endswith(_ORDER):
                self._check_small(tensor, caller)
                constants[name] = tensor.read()
            else:
                # Without x64, jax warns if it must narrow a dtype of 64 bits itself.
                dtype = jax.dtypes.canonicalize_dtype(tensor.dtype)
                shapes[name] = jax.ShapeDtypeStruct(tensor.shape, dtype)
        key = (
            self.layout.name,
            json.dumps(self.settings, sort_keys=True, default=repr),
            tuple((name, s.shape, s.dtype) for name, s in shapes.items()),
            tuple((name, array.tobytes()) for name, array in constants.items()),
            self.inputs,
            dequantize,
        )
        if key not in known:
            known[key] = jax.eval_shape(
                lambda arrays: self._converted(arrays | constants, caller, dequantize),
                shapes,
            )
        return known[key]

    def _converted(self, arrays: dict[str, Any], caller: str, dequantize: bool) -> Any:
        """The weight that arrays of the layout hold."""
        assert self.layout is not None
        convert: Any = self.layout.to_qtensor
        try:
            value = convert(arrays, self.settings, dequantize=dequantize)
        except ValueError as error:
            # The arrays of one weight can be in several files.
            files = {str(tensor.file) for tensor in self.tensors.values()}
            raise ValueError(
                f"{caller}: {', '.join(sorted(files))}: {self.name}: {error}"
            ) from error
        if self.inputs is not None and not dequantize:
            spec, outliers = self.inputs
            value = value.with_activation(spec, outliers=outliers)
        return value.swapaxes(-1, -2) if self.swaps_axes else value

    def _check_small(self, tensor: StoredTensor, caller: str) -> None:
        if tensor.nbytes > _MOST_STATIC_BYTES:
            raise ValueError(
                f"{caller}: {tensor.file}: {tensor.name} has {tensor.nbytes} bytes. An "
                f"array of this kind has at most {_MOST_STATIC_BYTES}. The file is "
                "damaged."
            )
