"""QTensor: the quantized array.

A QTensor is a pytree of codes, scale, zero point and offset. It has the shape and dtype
of the array that it represents.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.core import Tracer
from jax.sharding import PartitionSpec

from jaxq import formats
from jaxq.meshes import call_on_auto_axes
from jaxq.processes import to_numpy
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._leaf_dtypes import check_leaves
from jaxq.qtensor._meta import Meta, input_size
from jaxq.qtensor._presets import as_activation_spec
from jaxq.qtensor._product_operand import ProductOperand
from jaxq.qtensor._reshape import (
    AxisGroup,
    groups_of_scale,
    match_axes,
    regroup,
    why_not_regroup,
)
from jaxq.qtensor._shard_map import meta_of_part
from jaxq.qtensor._spec import QuantSpec, activation_problem, as_static
from jaxq.qtensor._storage_axes import explicit_axes

# The arrays of a QTensor, in the order of its constructor.
LEAVES = (
    "data",
    "scale",
    "zero_point",
    "offset",
    "codebook",
    "input_range",
    "input_scale",
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor(ProductOperand):
    """A quantized array, `scale * (codes - zero_point) + offset`.

    `jaxq.quantize` returns a QTensor. A QTensor has the shape and dtype of the array
    that it represents. It works with `jax.jit`, `vmap`, `lax.scan` and `jax.tree.map`.
    Batch axes come first in every leaf, so `jax.tree.map(lambda a: a[i], qt)` is layer
    i of a stack.

    Multiply with `@`, `jaxq.matmul`, `jaxq.einsum` or `jaxq.dot_general`. Every other
    operation needs floats and raises TypeError. The message names `jaxq.dequantize`. A
    QTensor never becomes a float array implicitly.

    Inside `jax.shard_map` with the specs of `jaxq.sharding.specs`, a QTensor is the
    device's part of the array, and has the shape and the blocks of this part.

    Attributes:
      data: stored codes, uint8 (packed below 8 bits) or int8, `[*batch, *kept, K]`. A
        last block that is not full has no padding, only a last byte has.
      scale: array or QTensor, `[*batch, *num_blocks]`.
      zero_point: integer array with the shape of `scale`, or None.
      offset: float array with the shape of `scale`; one number per batch element for
        `offset="mean"`; or None.
      codebook: float32 `[*batch, *num_blocks, num_codes]`, the value of each code
        divided by the scale. None if codes have the values of the format.
      meta: static facts: spec, geometry, packing, dtype.
      input_range: float32 `[*batch, 2]`, the (low, high) of the static range of
        `meta.activation`. None for dynamic activation quantization.
      input_scale: float32 `[*batch, K]`, one factor for each row of the array, in the
        order of the contracted axes in storage. None if all factors are 1. See
        `with_input_scale`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.eye(64), "int8")
      >>> qt
      QTensor(int8[64x64], PerChannel(along -2), scale=float32, 8.5 bits, float32)
      >>> (jnp.ones((2, 64)) @ qt).shape
      (2, 64)
    """

    data: jax.Array
    scale: jax.Array | QTensor
    zero_point: jax.Array | None
    offset: jax.Array | None
    codebook: jax.Array | None
    meta: Meta
    input_range: jax.Array | None = None
    input_scale: jax.Array | None = None

    floats_expression = "jaxq.dequantize(qt)"

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        # jax compares the static facts of a QTensor before and inside `shard_map`.
        meta = self.meta.of_whole()
        return [(key(name), getattr(self, name)) for name in LEAVES], meta

    @classmethod
    def tree_unflatten(cls, meta: Meta, leaves) -> QTensor:
        by_name = dict(zip(LEAVES, leaves, strict=True))
        meta = meta_of_part(meta, by_name["data"], by_name["scale"])
        return cls(**by_name, meta=meta)

    # Properties of an array.

    @property
    def spec(self) -> QuantSpec:
        """How the array was quantized."""
        return self.meta.spec

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes, read from the shape of `data`.

        Raises:
          ValueError: the shape of `data` does not fit the geometry. This happens inside
            `vmap` or `scan` over an axis that is not the first axis of a stack. The
            exception is an axis of the same size as the first axis, which cannot be
            detected.
        """
        shape, stored = tuple(self.data.shape), self.meta.stored_shape
        batch = shape[: len(shape) - len(stored)]
        if shape != batch + stored:
            raise ValueError(
                f"QTensor: codes of shape {list(shape)} must end in {list(stored)} for "
                f"an array of shape {list(self.meta.geometry.shape)}. Only leading "
                "batch axes may be mapped over: use in_axes=0, and quantize a stack "
                "with batch=(0,). In shard_map, pass it with "
                "in_specs=jaxq.sharding.specs(qt, PartitionSpec(...), mesh=mesh), or "
                "whole with in_specs=PartitionSpec()."
            )
        return batch

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this QTensor represents."""
        return self.batch_shape + self.meta.geometry.shape

    @property
    def ndim(self) -> int:
        """Number of axes, including batch axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype that `dequantize` returns by default."""
        return jnp.dtype(self.meta.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, including the scales of every level."""
        # Flax prints a model with leaves that have only a shape and a dtype.
        return sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(self)
        )

    @property
    def bits_per_element(self) -> float:
        """`8 * nbytes / size`; 0 for an empty array."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    # Codes.

    def codes(self) -> jax.Array:
        """The unpacked codes in logical axis order, with `spec.fmt.code_dtype`.

        Raises:
          TypeError: a leaf has another dtype than `meta` says.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> qt = jaxq.quantize(jnp.array([[0.5], [-1.0]]), "int8")
          >>> qt.codes().tolist()
          [[64], [-127]]
        """
        check_leaves(self, "QTensor.codes")
        axes = explicit_axes(self.meta, len(self.batch_shape), self.data)
        return call_on_auto_axes(_logical_codes, PartitionSpec(*axes), self)

    def stored_codes(self) -> jax.Array:
        """The unpacked codes in storage order, padded to whole blocks.

        The padding is not stored. Here it has the code of zero.

        Returns:
          `[*batch, *padded]`, where `padded` is `meta.geometry.padded_shape`.
        """
        num_batch = len(self.batch_shape)  # raises if the leaves do not fit
        fmt, data = self.spec.fmt, self.data
        if self.meta.layout == "columns":
            data = jnp.moveaxis(data, num_batch, -1)
        patterns = formats.unpack(
            data, fmt.bits, self.meta.packing, unit=self.meta.pack_unit
        )
        if fmt.code_dtype == np.int8:
            patterns = formats.as_signed(patterns, fmt.bits)
        return self._padded(patterns)

    def with_codes(self, codes: jax.Array) -> QTensor:
        """The same scales with other codes.

        Args:
          codes: array of the dtype, shape and axis order of `codes()`.

        Raises:
          ValueError: the dtype or the shape differs from that of `codes()`.
        """
        geometry, fmt = self.meta.geometry, self.spec.fmt
        if codes.shape != self.shape or codes.dtype != fmt.code_dtype:
            raise ValueError(
                "QTensor.with_codes: codes must be "
                f"{fmt.code_dtype.name}{list(self.shape)}, got "
                f"{codes.dtype.name}{list(codes.shape)}."
            )
        stored = geometry.to_storage(geometry.to_view(codes))
        return self.with_stored_codes(self._padded(stored))

    def with_stored_codes(self, codes: jax.Array) -> QTensor:
        """The same scales with other codes.

        Args:
          codes: array of the dtype, shape and axis order of `stored_codes()`. Its
            padding is left out.
        """
        sizes = (slice(size) for size in self.meta.stored_sizes)
        stored = codes[(..., *sizes)]
        data = formats.pack(
            stored, self.spec.fmt.bits, self.meta.packing, unit=self.meta.pack_unit
        )
        if self.meta.layout == "columns":
            data = jnp.moveaxis(data, -1, len(self.batch_shape))
        return dataclasses.replace(self, data=data)

    def _padded(self, codes: jax.Array) -> jax.Array:
        """Codes in storage order, padded to whole blocks with the code of zero."""
        padded = self.meta.geometry.padded_shape
        num_batch = codes.ndim - len(padded)
        sizes = zip(padded, codes.shape[num_batch:], strict=True)
        missing = [size - stored for size, stored in sizes]
        if not any(missing):
            return codes
        widths = [(0, 0)] * num_batch + [(0, n) for n in missing]
        zero_code = np.asarray(self.spec.fmt.zero_code, codes.dtype)
        return jnp.pad(codes, widths, constant_values=zero_code)

    # Static facts.

    def with_meta(self, **changes: Any) -> QTensor:
        """The same leaves with some fields of `meta` changed."""
        return dataclasses.replace(self, meta=dataclasses.replace(self.meta, **changes))

    def astype(self, dtype: Any) -> QTensor:
        """The same codes with another default dtype for `dequantize`.

        Raises:
          TypeError: `dtype` is not a float dtype, or is float64 without
            `jax_enable_x64`.
        """
        dtype = jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"QTensor.astype: dtype must be a float dtype, got {dtype}. For the "
                "codes use qt.codes()."
            )
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise TypeError(
                f"QTensor.astype: {dtype} needs jax_enable_x64=True. Set "
                "jax_enable_x64, or use float32."
            )
        return self.with_meta(dtype=dtype.name)

    def with_activation(
        self,
        spec: str | QuantSpec | None,
        *,
        outliers: float | None = None,
        bounds: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] | None = None,
    ) -> QTensor:
        """The same codes with dynamic or static activation quantization (w8a8).

        A product of this QTensor and a float operand then quantizes the float operand
        first. The gradient passes straight through this rounding. Such a product has no
        forward-mode derivative (`jax.jvp`), except in `jaxq.ops.ragged_dot`.

        Args:
          spec: preset name or `QuantSpec` for the float operand. Its scales are shared
            along the contracted axes. The names "int4" and "int3" mean "int4_absmax"
            and "int3_absmax" here. None is weight-only.
          outliers: columns of the float operand are multiplied in floats if their
            largest magnitude is at least this number. All other columns are quantized,
            and the two products are added. LLM.int8() uses 6.0 (Dettmers et al., 2022).
            None quantizes all columns. The outlier columns are determined in every
            call, so both products have the full size. This improves accuracy, not
            speed.
          bounds: (low, high) for static activation quantization, float `[]` or
            `[*batch]`. `jaxq.observers` compute such bounds. The float operand then has
            one scale that does not depend on the call, and the spec becomes per tensor.
            Numbers outside are clipped and have no gradient. None is dynamic activation
            quantization.

        Raises:
          TypeError: `spec` is neither a name nor a `QuantSpec`.
          ValueError: the preset is unknown; the spec rounds stochastically or names an
            axis; its groups do not divide the contracted axis; `outliers` is negative;
            `outliers` or `bounds` is given without a spec; or both are given. With
            `bounds` also: a bound is not finite; low is not less than high; the
            granularity has groups, tiles or flat blocks; or the scale of the spec
            depends on more than a range.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> qt = jaxq.quantize(jnp.eye(32), "int8").with_activation("int8")
          >>> jaxq.explain(jnp.ones((2, 32)), qt).path
          'codes'
        """
        activation = (
            None if spec is None else as_activation_spec(spec, "with_activation")
        )
        if activation is not None:
            problem = activation_problem(activation, input_size(self.meta))
            if problem:
                raise ValueError(f"with_activation: {problem}")
        if outliers is not None:
            if activation is None or not outliers >= 0:
                raise ValueError(
                    "with_activation: outliers must be at least 0, and needs an "
                    f"activation spec; got outliers={outliers} and spec={spec!r}."
                )
            outliers = float(outliers)
        if bounds is None:
            changed = self.with_meta(activation=activation, outliers=outliers)
            return dataclasses.replace(changed, input_range=None)
        if activation is None or outliers is not None:
            raise ValueError(
                "with_activation: bounds= needs an activation spec, and cannot be used "
                "together with outliers=."
            )
        input_range = _static_range(bounds, self.batch_shape)
        static = as_static(activation, "with_activation")
        changed = self.with_meta(activation=static, outliers=None)
        return dataclasses.replace(changed, input_range=input_range)

    def with_input_scale(self, scale: jax.typing.ArrayLike | None) -> QTensor:
        """The same codes with one factor for each input channel.

        The QTensor then represents `diag(scale) @ W`, where W is the array without the
        factors. `dequantize` multiplies the rows of W by the factors. A product of a
        float operand and this QTensor multiplies the float operand instead:
        `x @ (diag(scale) @ W) = (x * scale) @ W`. It does so before the operand is
        quantized (`with_activation`), so the range of static activation quantization is
        that of `x * scale`. The factors are applied in float32, and `x * scale` has the
        dtype of x.

        AWQ and SmoothQuant quantize `diag(s) @ w` and set the factors `1 / s` where
        these cannot be folded into a previous layer.

        Args:
          scale: float `[K]` or `[*batch, K]`, above 0. K is the product of the sizes of
            the contracted axes, and follows their order in storage
            (`meta.geometry.contracted`). `[K]` is shared by all batch elements. None
            removes the factors.

        Raises:
          TypeError: `scale` is not an array of floats.
          ValueError: `scale` has another shape, or (outside jit) a number that is not
            finite or not above 0.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> qt = jaxq.quantize(jnp.ones((2, 1)), "int8")
          >>> qt = qt.with_input_scale(jnp.array([1.0, 0.5]))
          >>> jaxq.dequantize(qt).tolist(), (jnp.array([[3.0, 4.0]]) @ qt).tolist()
          ([[1.0], [0.5]], [[5.0]])
        """
        if scale is not None:
            scale = _input_scale(scale, self)
        return dataclasses.replace(self, input_scale=scale)

    # Moving, splitting and merging axes.

    @property
    def T(self) -> QTensor:
        """The transpose of a QTensor without batch axes; no data moves.

        Raises:
          TypeError: the QTensor has batch axes.
        """
        if self.batch_shape:
            raise TypeError(
                f"QTensor.T: {self!r} has batch axes. Use swapaxes(-1, -2), or slice "
                "the batch first."
            )
        return self._permute(tuple(range(-1, -1 - self.ndim, -1)))

    def swapaxes(self, axis1: int, axis2: int) -> QTensor:
        """Exchanges two axes that are not batch axes; no data moves.

        Raises:
          ValueError: an axis is out of range, or an axis is a batch axis.
        """
        inner = len(self.meta.geometry.shape)
        axes = [a - self.ndim if a >= 0 else a for a in (axis1, axis2)]
        for axis in axes:
            if not -inner <= axis < 0:
                raise ValueError(
                    f"QTensor.swapaxes: axis {axis} is not one of the last {inner} "
                    f"axes of {self!r}. Use jnp.swapaxes on jaxq.dequantize(qt)."
                )
        order = list(range(-inner, 0))
        order[axes[0]], order[axes[1]] = order[axes[1]], order[axes[0]]
        return self._permute(tuple(order))

    def _permute(self, axes: tuple[int, ...]) -> QTensor:
        """Moves the old axis `axes[i]` to position i; `axes` are negative numbers."""
        geometry = self.meta.geometry
        new_axis = {old: new - len(axes) for new, old in enumerate(axes)}

        def permuted(geometry: Geometry) -> Geometry:
            return dataclasses.replace(
                geometry,
                shape=tuple(geometry.shape[a] for a in axes),
                order=tuple(new_axis[a] for a in geometry.order),
            )

        whole = None if self.meta.whole is None else permuted(self.meta.whole)
        return self.with_meta(geometry=permuted(geometry), whole=whole)

    def reshape(self, *shape: Any, order: str = "C") -> QTensor:
        """Splits or merges neighbouring kept axes; no code moves.

        Args:
          *shape: the new sizes, or one tuple of sizes. One size may be -1. The batch
            axes and the contracted axes must keep their sizes.
          order: "C", the only order.

        Raises:
          ValueError: the number of elements, a batch axis or a contracted axis would
            change; a block would be cut; the axes to merge are not neighbours in
            storage; an array without elements would change its shape; or `order` is not
            "C".
        """
        formats.check_choice("order", order, ("C",))
        is_tuple = len(shape) == 1 and isinstance(shape[0], tuple | list)
        sizes = shape[0] if is_tuple else shape
        return _reshaped(self, tuple(int(size) for size in sizes))

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{self!r} does not become an array implicitly. Use jaxq.dequantize(qt) or "
            "qt.codes()."
        )

    # Printing.

    def __repr__(self) -> str:
        spec, meta = self.spec, self.meta
        try:
            bits = f"{self.bits_per_element:.4g} bits"
        except (AttributeError, TypeError, ValueError):  # see _printed_shape
            bits = f"leaves={type(self.data).__name__}"
        size = "x".join(map(str, self._printed_shape()))
        name = f"{meta.name}: " if meta.name else ""
        parts = [
            f"{name}{spec.fmt.name}[{size}]",
            f"{type(spec.granularity).__name__}({self._printed_blocks()})",
            f"scale={_scale_name(spec)}",
        ]
        if not spec.rule.is_default:
            parts.append(spec.scale_rule)
        if not isinstance(spec.clipping, str):
            parts.append(f"clipping={spec.clipping.kind}")
        if not spec.symmetric:
            parts.append("asymmetric")
        if spec.offset:
            parts.append(f"offset={spec.offset}")
        if meta.layout != "rows":
            parts.append(meta.layout)
        if meta.activation is not None:
            static = "" if self.input_range is None else " static"
            parts.append(f"activation={meta.activation.fmt.name}{static}")
        if meta.outliers is not None:
            parts.append(f"outliers from {meta.outliers:g}")
        if self.input_scale is not None:
            parts.append("input_scale")
        return f"QTensor({', '.join(parts)}, {bits}, {meta.dtype})"

    def _printed_shape(self) -> tuple[Any, ...]:
        try:
            return self.shape
        except (AttributeError, TypeError, ValueError):
            # jax transforms build QTensors with leaves that are not arrays, or that do
            # not fit the geometry.
            return "...", *self.meta.geometry.shape

    def _printed_blocks(self) -> str:
        geometry = self.meta.geometry
        sizes = [str(block) for block in geometry.block_shape if block not in (None, 1)]
        axes = ",".join(map(str, geometry.contracted))
        return f"{','.join(sizes)}{' ' if sizes else ''}along {axes}"

    def __treescope_repr__(self, path: Any, subtree_renderer: Any) -> Any:
        from treescope import repr_lib  # lazy: only notebooks have it

        attributes: dict[str, Any] = {
            "shape": self._printed_shape(),
            "dtype": self.meta.dtype,
            "spec": self.spec,
        }
        for name in LEAVES:
            if getattr(self, name) is not None:
                attributes[name] = getattr(self, name)
        return repr_lib.render_object_constructor(
            object_type=type(self),
            attributes=attributes,
            path=path,
            subtree_renderer=subtree_renderer,
        )


def is_qtensor(x: Any) -> bool:
    """True for a QTensor: an `is_leaf=` of functions on trees."""
    return isinstance(x, QTensor)


# `jax.export` stores the type names of the arguments of a program.
export.register_pytree_node_serialization(
    QTensor,
    serialized_name="jaxq.QTensor",
    serialize_auxdata=lambda meta: json.dumps(meta.to_dict()).encode(),
    deserialize_auxdata=lambda data: Meta.from_dict(json.loads(data)),
)


# Compiled as a whole: outside jit, many small programs take longer to compile and run.
@functools.partial(jax.jit, inline=True)
def _logical_codes(qt: QTensor) -> jax.Array:
    geometry = qt.meta.geometry
    view = geometry.to_view_order(qt.stored_codes())
    return geometry.from_view(geometry.unpad(view))


def _static_range(bounds: Any, batch_shape: tuple[int, ...]) -> jax.Array:
    """`QTensor.input_range`, float32 `[*batch, 2]`, from bounds of `with_activation`.

    Raises:
      ValueError: `bounds` is not a pair, a bound is not finite, or low is not less than
        high.
    """
    if len(bounds) != 2:
        raise ValueError(
            "with_activation: bounds must be (low, high), got a tuple of length "
            f"{len(bounds)}."
        )
    low, high = (
        jnp.broadcast_to(jnp.asarray(bound, jnp.float32), batch_shape)
        for bound in bounds
    )
    if not isinstance(low, Tracer) and not isinstance(high, Tracer):
        lows, highs = to_numpy(low), to_numpy(high)
        finite = np.isfinite(lows).all() and np.isfinite(highs).all()
        if not finite or not (lows < highs).all():
            raise ValueError(
                "with_activation: bounds must be finite, and low < high; got "
                f"{lows} and {highs}."
            )
    return jnp.stack([low, high], axis=-1)


def _input_scale(scale: jax.typing.ArrayLike, qt: QTensor) -> jax.Array:
    """`QTensor.input_scale`, float32 `[*batch, K]`, from `with_input_scale`.

    Raises:
      TypeError: `scale` is not an array of floats.
      ValueError: `scale` has another shape, or (outside jit) a number that is not
        finite or not above 0.
    """
    array = jnp.asarray(scale)
    shown = f"{array.dtype.name}{list(array.shape)}"
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"with_input_scale: scale must be floats, got {shown}. Pass "
            "scale.astype(jnp.float32)."
        )
    num_inputs, batch = qt.meta.geometry.contracted_size, qt.batch_shape
    if array.shape not in ((num_inputs,), (*batch, num_inputs)):
        batched = f" or {[*batch, num_inputs]}" if batch else ""
        raise ValueError(
            f"with_input_scale: scale must be [{num_inputs}]{batched}, one factor for "
            f"each input channel of {qt!r}, got {shown}."
        )
    array = array.astype(jnp.float32)
    if not isinstance(array, Tracer):
        factors = to_numpy(array)
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise ValueError(
                "with_input_scale: scale must be finite and above 0, got numbers from "
                f"{factors.min()} to {factors.max()}. Use 1 for a channel that needs "
                "no factor."
            )
    return jnp.broadcast_to(array, (*batch, num_inputs))


def _reshaped(qt: QTensor, sizes: tuple[int, ...]) -> QTensor:
    """`QTensor.reshape` of a tuple of sizes."""
    geometry, batch = qt.meta.geometry, qt.batch_shape
    problem = f"QTensor.reshape: {qt!r} cannot become {list(sizes)}: "
    if sizes.count(-1) == 1:
        others = -math.prod(sizes)
        if others:
            sizes = tuple(qt.size // others if n == -1 else n for n in sizes)
    inner = sizes[len(batch) :]
    same_size = min(sizes, default=0) >= 0 and math.prod(sizes) == qt.size
    if not same_size or sizes[: len(batch)] != batch:
        raise ValueError(
            problem + "the number of elements and the batch axes must not change."
        )
    if 0 in geometry.shape and inner != geometry.shape:
        raise ValueError(problem + "an array without elements must keep its shape.")
    groups = match_axes(geometry.shape, inner)
    reason = why_not_regroup(geometry, groups)
    if reason is not None:
        raise ValueError(problem + reason)
    changed = _regrouped(qt, groups, inner)
    if changed is None:
        raise ValueError(
            problem + "blocks of codes or of scales would be cut. Reshape "
            "jaxq.dequantize(qt)."
        )
    return changed


def _regrouped(
    qt: QTensor, groups: list[AxisGroup], sizes: tuple[int, ...]
) -> QTensor | None:
    """The QTensor with its kept axes split and merged; None if a block would be cut."""
    old = qt.meta.geometry
    new = regroup(old, groups, sizes)
    if new is None:
        return None
    if old.flat:  # the leaves are flat and stay as they are
        return dataclasses.replace(qt, meta=qt.meta.with_geometry(new))
    scale = qt.scale
    if isinstance(scale, QTensor):
        scale_groups = groups_of_scale(old, new, groups)
        scale = _regrouped(scale, scale_groups, new.num_blocks)
        if scale is None:
            return None
    return _with_geometry(qt, scale, new)


def _with_geometry(
    qt: QTensor, scale: jax.Array | QTensor, geometry: Geometry
) -> QTensor:
    """The QTensor with `scale` and all other leaves reshaped to `geometry`.

    A scale that is a QTensor already has its new shape.
    """
    batch, num_blocks = qt.batch_shape, geometry.num_blocks
    if not isinstance(scale, QTensor):
        scale = scale.reshape(*batch, *num_blocks)
    zero_point, offset, codebook = qt.zero_point, qt.offset, qt.codebook
    if zero_point is not None:
        zero_point = zero_point.reshape(*batch, *num_blocks)
    if offset is not None:
        is_mean = qt.spec.offset == "mean"
        offset_shape = (1,) * len(num_blocks) if is_mean else num_blocks
        offset = offset.reshape(*batch, *offset_shape)
    if codebook is not None:
        codebook = codebook.reshape(*batch, *num_blocks, codebook.shape[-1])
    meta = qt.meta.with_geometry(geometry)
    return dataclasses.replace(
        qt,
        data=qt.data.reshape(*batch, *meta.stored_shape),
        scale=scale,
        zero_point=zero_point,
        offset=offset,
        codebook=codebook,
        meta=meta,
    )


def _scale_name(spec: QuantSpec) -> str:
    """The formats of the scales of all levels, for example `uint4*float32`."""
    if isinstance(spec.scale, QuantSpec):
        return f"{spec.scale.fmt.name}*{_scale_name(spec.scale)}"
    return spec.scale
