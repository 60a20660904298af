"""`Layout`: how another library arranges a quantized weight in arrays.

A layout has pure functions between a dict of arrays and a QTensor. Arrays have the
names of the library's files, without the path of the module. A layout does not know
files, folders or models. (The layouts "rows" and "columns" of a QTensor are something
else: the order of its codes.)

Other libraries store the weight of a linear layer as `[out, in]`, as torch does. A
QTensor represents the kernel `[in, out]`, as Flax does. No data is transposed for this:
a QTensor stores its codes as `[out, in]` too. `qt.T` has the axes of torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import jax

from jaxq.io.layouts._stored import StoredWeight
from jaxq.io.layouts._tensors import Settings, WeightTensors
from jaxq.qtensor import QTensor, QuantSpec, dequantize

Tensors = Mapping[str, Any]
Written = tuple[dict[str, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How another library arranges a quantized weight in arrays.

    `jaxq.io.layouts.get` returns a layout. Leading axes are stacked experts, where the
    layout has them.

    Attributes:
      name: the name of the layout, for `get`.
      tensors: the names that the arrays of a weight can have. Not every weight has all.
      static: the arrays of these that hold shapes, tables or JSON. Under jit they must
        be numpy arrays, not arguments of the compiled function.
      summary: what the layout holds, in one line.
      make_spec: computes `spec`.
      read: computes `to_qtensor`.
      write: computes `from_qtensor`. None if jaxq only reads the layout.
      read_for_floats: computes `to_qtensor(dequantize=True)`. None if `read` does.
      has_batch: True if the arrays may have leading axes for stacked experts.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> layout = jaxq.io.layouts.get("gptq")
      >>> spec = layout.spec({"bits": 4, "group_size": 32, "sym": True})
      >>> qt = jaxq.quantize(jnp.ones((64, 32)), spec)
      >>> tensors, config = layout.from_qtensor(qt)
      >>> tensors["qweight"].shape, config["checkpoint_format"]
      ((8, 32), 'gptq_v2')
      >>> layout.to_qtensor(tensors, config)
      QTensor(int4[64x32], PerGroup(32 along -2), scale=float16, 4.5 bits, float16)
    """

    name: str
    summary: str
    tensors: tuple[str, ...]
    make_spec: Callable[[Settings], QuantSpec] = dataclasses.field(repr=False)
    read: Callable[[WeightTensors, Settings], QTensor] = dataclasses.field(repr=False)
    write: Callable[[StoredWeight], Written] | None = dataclasses.field(
        default=None, repr=False
    )
    read_for_floats: Callable[[WeightTensors, Settings], QTensor] | None = (
        dataclasses.field(default=None, repr=False)
    )
    static: tuple[str, ...] = ()
    has_batch: bool = False

    def spec(self, config: Mapping[str, Any] | None = None) -> QuantSpec:
        """A spec whose QTensors this layout can hold.

        Args:
          config: as in `to_qtensor`.

        Raises:
          ValueError: a setting is missing, or the layout does not have its value.

        Example:
          >>> import jaxq
          >>> jaxq.io.layouts.get("gguf").spec({"type": "Q8_0"}).granularity
          PerGroup(size=32, axis=None, pad=False)
        """
        return self.make_spec(Settings(self.name, config or {}))

    @overload
    def to_qtensor(
        self,
        tensors: Tensors,
        config: Mapping[str, Any] | None = None,
        *,
        dtype: Any = None,
        dequantize: Literal[False] = False,
    ) -> QTensor: ...

    @overload
    def to_qtensor(
        self,
        tensors: Tensors,
        config: Mapping[str, Any] | None = None,
        *,
        dtype: Any = None,
        dequantize: Literal[True],
    ) -> jax.Array: ...

    def to_qtensor(
        self,
        tensors: Tensors,
        config: Mapping[str, Any] | None = None,
        *,
        dtype: Any = None,
        dequantize: bool = False,
    ) -> QTensor | jax.Array:
        """The weight that arrays of this layout hold, with the same codes and scales.

        Args:
          tensors: numpy or jax arrays by their names in the library's files, without
            the path of the module, such as "qweight".
          config: the settings of the library that say how the weight was quantized.
            docs/interop.md lists them. Other settings are ignored.
          dtype: the dtype of the weight. None takes the one that the arrays imply.
          dequantize: True returns floats `[*batch, in, out]`. Some weights have no
            QTensor, and their error names this argument.

        Returns:
          A QTensor of shape `[*batch, in, out]`, or floats.

        Raises:
          ValueError: an array is missing, unknown, or has another shape or dtype than
            the settings imply; a scale is not finite (outside jit); or no QTensor holds
            the weight. The error names the array.
        """
        source = WeightTensors(self.name, tensors, self.tensors, self.static)
        settings = Settings(self.name, config or {})
        read = self.read
        if dequantize and self.read_for_floats is not None:
            read = self.read_for_floats
        qt = read(source, settings)
        if dtype is not None:
            qt = qt.astype(dtype)
        return _floats(qt) if dequantize else qt

    def from_qtensor(self, qt: QTensor) -> Written:
        """The arrays of this layout that hold a QTensor, and the settings.

        Codes and scales are written as they are. A scale is only converted to another
        dtype if that is exact. The activation spec of the QTensor is not written: it
        belongs to the settings of the layer.

        Args:
          qt: a QTensor with one contracted and one kept axis, such as that of a kernel
            `[in, out]`.

        Returns:
          (arrays by name, settings), arguments of `to_qtensor`.

        Raises:
          TypeError: `qt` is not a QTensor.
          ValueError: the layout is read only, or cannot hold the QTensor. The error
            says why.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> layout = jaxq.io.layouts.get("mxfp4")
          >>> tensors, _ = layout.from_qtensor(jaxq.quantize(jnp.eye(64), "mxfp4"))
          >>> {name: array.shape for name, array in tensors.items()}
          {'blocks': (64, 2, 16), 'scales': (64, 2)}
        """
        if self.write is None:
            raise ValueError(
                f"{self.name}: jaxq only reads this layout. jaxq.io.layouts.names() "
                "lists the others."
            )
        return self.write(StoredWeight(self.name, qt, has_batch=self.has_batch))


def _floats(qt: QTensor) -> jax.Array:
    return dequantize(qt)  # `to_qtensor` has an argument of this name
