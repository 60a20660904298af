"""QTensor: codes, scale, zero point and offset under one roof, a pytree that looks like the array it stands for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.core import Tracer

from jaxq import formats
from jaxq.qtensor._layout import unpacked
from jaxq.qtensor._meta import Meta
from jaxq.qtensor._presets import as_spec
from jaxq.qtensor._reshape import reshape
from jaxq.qtensor._spec import QuantSpec, as_static

# The arrays of a QTensor, in the order of its constructor.
LEAVES = ("data", "scale", "zero_point", "offset", "codebook", "input_range")


class _NoArray:
    """What jax.numpy gets that wants a QTensor as an array: the text of its error."""

    def __init__(self, qt: QTensor):
        self.qt = qt

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"expected an array, got {self!r}.")

    def __repr__(self) -> str:
        return (
            f"{self.qt!r} (a quantized array: write x @ qt, jaxq.matmul(x, qt) or jaxq.einsum(..., qt), or take its "
            "floats with jaxq.dequantize(qt))"
        )


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A quantized array, `scale * (codes - zero_point) + offset`.

    Made by `jaxq.quantize`. It has the shape and dtype of the array it stands for and works with `jax.jit`, `vmap`,
    `lax.scan` and `jax.tree.map`: batch axes lead in every leaf, so `jax.tree.map(lambda a: a[i], qt)` is layer i of
    a stack. Multiply with `@`, `jaxq.matmul`, `jaxq.einsum`, `jaxq.dot_general`; everything else that would need
    floats raises and names `jaxq.dequantize`. It never turns into a float array by itself.

    Attributes:
      data: stored codes: uint8 (packed below 8 bits) or int8, `[*batch, *kept, K]`.
      scale: array or QTensor, `[*batch, *num_blocks]`.
      zero_point: integer array like `scale`, or None.
      offset: float array like `scale` (one number where it is a mean), or None.
      codebook: float32 `[*batch, *num_blocks, num_codes]`, what the codes stand for where this array has numbers of its
        own (in units of the scale); None where they are the format's.
      meta: static facts: spec, geometry, packing, dtype.
      input_range: float32 `[*batch, 2]`, least and greatest number that `meta.activation` covers where it is static;
        None where each input is quantized by its own extremes.
    """

    data: jax.Array
    scale: jax.Array | QTensor
    zero_point: jax.Array | None
    offset: jax.Array | None
    codebook: jax.Array | None
    meta: Meta
    input_range: jax.Array | None = None

    # numpy must not take over `array @ qt`, and nothing may convert a QTensor to an array unasked.
    __array_ufunc__ = None

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return [(key(name), getattr(self, name)) for name in LEAVES], self.meta

    @classmethod
    def tree_unflatten(cls, meta: Meta, leaves) -> QTensor:
        return cls(**dict(zip(LEAVES, leaves, strict=True)), meta=meta)

    # What it looks like from outside.

    @property
    def spec(self) -> QuantSpec:
        return self.meta.spec

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes, read off the leaves.

        Raises:
          ValueError: the leaves are not those of the geometry, as after `vmap` or `scan` over an axis of a stack that
            is not its first (of a stack of as many arrays as one has rows, nothing tells).
        """
        shape, stored = tuple(self.data.shape), self.meta.stored_shape
        batch = shape[: len(shape) - len(stored)]
        if shape != batch + stored:
            raise ValueError(
                f"QTensor: codes {list(shape)} do not end in {list(stored)}, as those of an array "
                f"{list(self.meta.geometry.shape)} do. Only leading batch axes may be mapped over: use in_axes=0."
            )
        return batch

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch_shape + self.meta.geometry.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.meta.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of every leaf, scales of every level and padding included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_element(self) -> float:
        """`8 * nbytes / size`; 0 for an empty array."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    def codes(self) -> jax.Array:
        """The codes, unpacked: `spec.format.code_dtype`, shape and axis order of the array."""
        return unpacked(self)

    def stored_codes(self) -> jax.Array:
        """The codes, unpacked, in storage order and with their padding: `[*batch, *padded]`."""
        batch, fmt = (
            self.batch_shape,
            self.spec.fmt,
        )  # raises where the leaves are not those of the geometry
        data = (
            self.data
            if self.meta.layout == "rows"
            else jnp.moveaxis(self.data, len(batch), -1)
        )
        patterns = formats.unpack(
            data, fmt.bits, self.meta.packing, unit=self.meta.pack_unit
        )
        if fmt.code_dtype == np.int8:
            return formats.as_signed(patterns, fmt.bits)
        return patterns

    def with_codes(self, codes: jax.Array) -> QTensor:
        """The same scales with other codes.

        Args:
          codes: `spec.format.code_dtype`, shape and axis order of the array, as `codes()` gives them.
        """
        geometry, fmt = self.meta.geometry, self.spec.fmt
        if codes.shape != self.shape or codes.dtype != fmt.code_dtype:
            raise ValueError(
                f"QTensor.with_codes: expected {fmt.code_dtype.name}{list(self.shape)}, "
                f"got {codes.dtype.name}{list(codes.shape)}."
            )
        stored = geometry.to_storage(geometry.to_view(codes))
        widths = [
            (0, padded - size)
            for padded, size in zip(
                geometry.padded_shape, geometry.storage_shape, strict=True
            )
        ]
        widths = [(0, 0)] * (stored.ndim - len(widths)) + widths
        return self.with_stored_codes(
            jnp.pad(
                stored, widths, constant_values=np.asarray(fmt.zero_code, stored.dtype)
            )
        )

    def with_stored_codes(self, codes: jax.Array) -> QTensor:
        """The same scales with other codes, in storage order and with their padding, as `stored_codes()` gives them."""
        data = formats.pack(
            codes, self.spec.fmt.bits, self.meta.packing, unit=self.meta.pack_unit
        )
        if self.meta.layout == "columns":
            data = jnp.moveaxis(data, -1, len(self.batch_shape))
        return dataclasses.replace(self, data=data)

    # Moving axes.

    def astype(self, dtype: Any) -> QTensor:
        """The same codes, with another dtype for `dequantize` to return."""
        dtype = jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"QTensor.astype: only float dtypes, got {dtype}. For the codes use qt.codes()."
            )
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise TypeError(
                f"QTensor.astype: jax has no {dtype} here. Set jax_enable_x64, or use float32."
            )
        return self._with(dtype=dtype.name)

    def with_activation(
        self,
        spec: str | QuantSpec | None,
        *,
        outliers: float | None = None,
        bounds: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] | None = None,
    ) -> QTensor:
        """The same codes; float arrays they meet in a product are quantized by `spec` on the fly (w8a8 and its like).

        Args:
          spec: preset name or `QuantSpec` for the other operand, scales shared along the contracted axes; None goes
            back to float activations. The gradient passes straight through the rounding of activations.
          outliers: columns of the other operand with a magnitude of at least this, 6.0 in LLM.int8(), are not quantized
            but multiplied in floats, and the sums are added; None quantizes all. Which columns is seen anew in every
            call, so both products have full size: for accuracy, not for speed (Dettmers et al., 2022).
          bounds: (low, high) of the other operand, float `[]` or `[*batch]`, as `jaxq.observers` find them: one range
            for the whole of it, whose scale is known beforehand; what is beyond is clipped, and has no gradient. The
            spec is then taken per tensor. None looks at each operand anew.

        Raises:
          ValueError: a spec or options that do not go together.
        """
        activation = None if spec is None else as_spec(spec, "with_activation")
        if activation is not None and activation.rounding == "stochastic":
            raise ValueError(
                "with_activation: rounding='stochastic' needs a key at every call; quantize x yourself."
            )
        if outliers is not None and (activation is None or not outliers >= 0):
            raise ValueError(
                f"with_activation: outliers={outliers} needs an activation spec, and a number of at least 0."
            )
        changed = self._with(
            activation=activation,
            outliers=None if outliers is None else float(outliers),
        )
        if bounds is None:
            return dataclasses.replace(changed, input_range=None)
        if activation is None or outliers is not None:
            raise ValueError(
                "with_activation: bounds= needs an activation spec, and no outliers=."
            )
        if len(bounds) != 2:
            raise ValueError(
                f"with_activation: bounds must be (low, high), got {len(bounds)} of them."
            )
        low, high = bounds
        ends = [
            jnp.broadcast_to(jnp.asarray(end, jnp.float32), self.batch_shape)
            for end in (low, high)
        ]
        if not any(isinstance(end, Tracer) for end in ends):
            known = [np.asarray(end) for end in ends]
            if (
                not all(np.isfinite(end).all() for end in known)
                or not (known[0] < known[1]).all()
            ):
                raise ValueError(
                    f"with_activation: bounds must be finite, low < high, got {known[0]} and {known[1]}."
                )
        changed = changed._with(activation=as_static(activation, "with_activation"))
        return dataclasses.replace(changed, input_range=jnp.stack(ends, axis=-1))

    @property
    def T(self) -> QTensor:
        """The transpose of a QTensor without batch axes: no data moves, only the names of axes."""
        if self.batch_shape:
            raise TypeError(
                f"QTensor.T: {self!r} has batch axes. Use swapaxes(-1, -2), or slice the batch first."
            )
        return self._permute(tuple(range(-1, -1 - self.ndim, -1)))

    def swapaxes(self, axis1: int, axis2: int) -> QTensor:
        """Exchanges two axes that are not batch axes; no data moves.

        Raises:
          ValueError: an axis is out of range or a batch axis.
        """
        inner = len(self.meta.geometry.shape)
        axes = [a - self.ndim if a >= 0 else a for a in (axis1, axis2)]
        for axis in axes:
            if not -inner <= axis < 0:
                raise ValueError(
                    f"QTensor.swapaxes: axis {axis} is not one of the last {inner} axes of {self!r}."
                )
        order = list(range(-inner, 0))
        order[axes[0]], order[axes[1]] = order[axes[1]], order[axes[0]]
        return self._permute(tuple(order))

    def _permute(self, axes: tuple[int, ...]) -> QTensor:
        """Logical axis i becomes what was axis `axes[i]` (negative numbers)."""
        geometry, n = self.meta.geometry, len(axes)
        renamed = {old: new - n for new, old in enumerate(axes)}
        changed = dataclasses.replace(
            geometry,
            shape=tuple(geometry.shape[a] for a in axes),
            order=tuple(renamed[a] for a in geometry.order),
        )
        return self._with(geometry=changed)

    def reshape(self, *shape: int | tuple[int, ...], order: str = "C") -> QTensor:
        """Splits or merges neighbouring kept axes; the contracted axes must come out as they are.

        Raises:
          ValueError: the sizes do not fit, a contracted or batch axis or a block would be cut, or `order` is not "C".
        """
        formats.check_choice("order", order, ("C",))
        sizes = (
            shape[0]
            if len(shape) == 1 and isinstance(shape[0], tuple | list)
            else shape
        )
        return reshape(self, tuple(int(s) for s in sizes))  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: Any) -> QTensor:
        """`qt[i]`, `qt[a:b]`, `qt[...]` on batch axes."""
        entries = [
            e
            for e in (index if isinstance(index, tuple) else (index,))
            if e is not Ellipsis
        ]
        if len(entries) > len(self.batch_shape) or any(e is None for e in entries):
            raise IndexError(
                f"QTensor: only batch axes can be indexed, and {self!r} has {len(self.batch_shape)}. "
                "For other axes index jaxq.dequantize(qt)."
            )
        if not entries:
            return self
        return jax.tree.map(lambda leaf: leaf[tuple(entries)], self)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self):
        if not self.batch_shape:
            raise TypeError(
                f"QTensor: only batch axes can be iterated over, and {self!r} has none."
            )
        return (self[i] for i in range(len(self)))

    # Multiplying. `jaxq.ops` registers its `matmul` here, see `register_matmul`.

    def __matmul__(self, other: Any) -> Any:
        return _matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return _matmul(other, self)

    # Everything else needs floats, and says so.

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # No QTensor turns into an array, but jax.numpy names an operand in its errors only if it says that it can.
            # Not raised here: jax's operators ask as well, and leave `x @ qt` to `qt` when they get no array.
            if name == "__jax_array__":
                return lambda: _NoArray(self)
            said = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name.startswith("_"):
                raise AttributeError(said)
            # Not repr(self), which may have come here itself.
            size = "x".join(map(str, self.meta.geometry.shape))
            if hasattr(type(self), name):  # a property that found no array
                said = f"{name!r} of a QTensor is unknown"
                remedy = "Its leaves are no arrays; jaxq.combine puts the halves of jaxq.partition together"
            else:
                remedy = (
                    "It is a quantized array: take its floats with jaxq.dequantize(qt)"
                )
            raise AttributeError(
                f"{said}: {self.meta.name or 'QTensor'} {self.spec.fmt.name}[{size}]. {remedy}."
            )

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{self!r} does not turn into an array by itself. Use jaxq.dequantize(qt) or qt.codes()."
        )

    def _refuse(self, *args: Any) -> NoReturn:
        raise TypeError(
            f"{self!r} multiplies with @, jaxq.matmul, jaxq.einsum and jaxq.dot_general; all else needs "
            "floats: use jaxq.dequantize(qt)."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = (
        __rtruediv__
    ) = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = (
        __pow__
    ) = __rpow__ = _refuse
    __neg__ = __pos__ = __abs__ = __invert__ = __round__ = __lt__ = __le__ = __gt__ = (
        __ge__
    ) = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _refuse
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _refuse
    __float__ = __int__ = __complex__ = __bool__ = _refuse

    def __eq__(self, other: Any) -> bool:
        """Identity, as pytrees and caches compare; comparing with numbers or arrays would need floats and raises."""
        if isinstance(
            other, jax.Array | np.ndarray | np.generic | int | float | complex
        ):
            self._refuse()
        return self is other

    __hash__ = object.__hash__

    # Showing.

    def __repr__(self) -> str:
        spec = self.spec
        try:
            bits = f"{self.bits_per_element:.4g} bits"
        except (AttributeError, TypeError, ValueError):
            bits = f"leaves={type(self.data).__name__}"
        size = "x".join(map(str, self._shown_shape()))
        name = f"{self.meta.name}: " if self.meta.name else ""
        parts = [
            f"{name}{spec.fmt.name}[{size}]",
            f"{type(spec.granularity).__name__}{self._blocks()}",
        ]
        parts.append(f"scale={_scale_name(spec)}")
        if not spec.rule.is_default:
            parts.append(spec.scale_rule)
        if not isinstance(spec.clipping, str):
            parts.append(f"clipping={spec.clipping.kind}")
        if not spec.symmetric:
            parts.append("asymmetric")
        if spec.offset:
            parts.append(f"offset={spec.offset}")
        if self.meta.layout != "rows":
            parts.append(self.meta.layout)
        if self.meta.activation is not None:
            static = "" if self.input_range is None else " static"
            parts.append(f"activation={self.meta.activation.fmt.name}{static}")
        if self.meta.outliers is not None:
            parts.append(f"outliers from {self.meta.outliers:g}")
        return f"QTensor({', '.join(parts)}, {bits}, {self.meta.dtype})"

    def _shown_shape(self) -> tuple[Any, ...]:
        try:
            return self.shape
        except (
            AttributeError,
            TypeError,
            ValueError,
        ):  # leaves that are not arrays or not its own, as transforms make
            return "...", *self.meta.geometry.shape

    def _blocks(self) -> str:
        geometry = self.meta.geometry
        sizes = [b for b in geometry.block_shape if b not in (None, 1)]
        along = ",".join(map(str, geometry.contracted))
        return f"({','.join(map(str, sizes))}{' ' if sizes else ''}along {along})"

    def __treescope_repr__(self, path: Any, subtree_renderer: Any) -> Any:
        from treescope import repr_lib

        leaves = {
            name: getattr(self, name)
            for name in LEAVES
            if getattr(self, name) is not None
        }
        attributes = {
            "shape": self._shown_shape(),
            "dtype": self.meta.dtype,
            "spec": self.spec,
        } | leaves
        return repr_lib.render_object_constructor(
            object_type=type(self),
            attributes=attributes,
            path=path,
            subtree_renderer=subtree_renderer,
        )

    def _with(self, **changes: Any) -> QTensor:
        return dataclasses.replace(self, meta=dataclasses.replace(self.meta, **changes))


def register_matmul(function: Callable[[Any, Any], Any]) -> None:
    """Makes `function(lhs, rhs)` the product behind `x @ qt` and `qt @ x`.

    `jaxq.ops` is above this package, so this package cannot import it. Instead
    `jaxq.ops` calls this function when it is imported, which `import jaxq` does.

    Args:
      function: the product of an array or QTensor with another.

    Example:
      >>> import jaxq
      >>> jaxq.qtensor.register_matmul(jaxq.matmul)
    """
    global _matmul
    _matmul = function


def _matmul(lhs: Any, rhs: Any) -> Any:
    raise RuntimeError("QTensor: `@` needs jaxq.ops. Run `import jaxq` first.")


# Exported programs name the types of their arguments.
export.register_pytree_node_serialization(
    QTensor,
    serialized_name="jaxq.QTensor",
    serialize_auxdata=lambda meta: json.dumps(meta.to_dict()).encode(),
    deserialize_auxdata=lambda data: Meta.from_dict(json.loads(data)),
)


def _scale_name(spec: QuantSpec) -> str:
    if isinstance(spec.scale, QuantSpec):
        return f"{spec.scale.fmt.name}*{_scale_name(spec.scale)}"
    return spec.scale
