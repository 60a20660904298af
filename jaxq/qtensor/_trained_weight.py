"""TrainedWeight: a float weight that is trained for its quantized values.

Quantization-aware training keeps each weight in floats. The model computes with the
quantized values of these floats. A `TrainedWeight` holds the floats and the numbers
that determine their quantization: scales, zero points, offsets, codebooks and the
static range of the layer's input. All leaves are floats, so `jax.grad` and optax accept
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.qtensor import _scales
from jaxq.qtensor._bounds import inside_range
from jaxq.qtensor._dequantize import dequantize, scale_values
from jaxq.qtensor._fake_quant import fake_quant, fake_quant_computed
from jaxq.qtensor._fake_range import RangeGradient
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._leaf_dtypes import leaf_dtypes
from jaxq.qtensor._meta import Meta
from jaxq.qtensor._qtensor import QTensor, registered_matmul
from jaxq.qtensor._quantize import quantize_array, store_scale
from jaxq.qtensor._requantize import requantize
from jaxq.qtensor._spec import QuantSpec

# The leaves of a TrainedWeight, in the order of its constructor.
TRAINED_LEAVES = (
    "floats",
    "scale",
    "zero_point",
    "offset",
    "codebook",
    "input_range",
    "input_scale",
    "switch",
    "averaging",
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedWeight:
    """A float weight, and how it is quantized in every product.

    `jaxq.training.prepare` puts it in the place of a weight. `x @ w`, `jaxq.matmul`,
    `jaxq.einsum`, `jaxq.dot_general` and Flax layers multiply by `w.quantize()`. Their
    gradient is that of the product with `w.fake_quant()`. `jaxq.training.convert`
    replaces it by `w.quantize()`.

    Attributes:
      floats: the weight, `[*batch, *shape]`.
      scale: float32 `[*batch, *num_blocks]`, trained scales. None computes the scales
        from the floats.
      zero_point: float32 like `scale`, or None. It is rounded where it is used.
      offset: float32 like the offset of the QTensor, or None.
      codebook: float32 `[*batch, *num_blocks, num_codes]`, or None.
      input_range: float32 `[*batch, 2]`, the (low, high) of static activation
        quantization, or None.
      input_scale: float32 `[*batch, K]`, as in `QTensor`, or None.
      switch: float32 `[*batch]`. Products use the floats if it is 0, and the quantized
        values if it is 1. None always quantizes.
      averaging: float32 `[*batch]`. Products change the moving average `input_range`
        only if it is 1. None always changes it.
      meta: the static facts of `quantize()`.
      range_gradient: how `input_range` is trained, as in `jaxq.fake_quant`. None does
        not train it.
      gradient_scale: multiply the gradients of `scale` and `input_range` by
        `1 / sqrt(n * q)` (LSQ). n is the number of weights that share a scale, or the
        number of input features. q is the largest number of the format.
      decay: if it is a number, `input_range` is a moving average of the ranges of
        inputs, or (0, 0) before the first input.
      record: `record(input_range)` stores the moving average after a product. None
        does not change the average. It is not a part of the pytree, because it belongs
        to one place in a model.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> floats = jax.random.normal(jax.random.key(0), (64, 8))
      >>> qt = jaxq.quantize(floats, "int4")
      >>> w = jaxq.qtensor.TrainedWeight.start(floats, qt)
      >>> bool((jnp.ones((1, 64)) @ w == jnp.ones((1, 64)) @ qt).all())
      True
      >>> slopes = jax.grad(lambda w: (jnp.ones((1, 64)) @ w).sum())(w)
      >>> slopes.floats.shape, slopes.scale.shape
      ((64, 8), (8, 1))

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, section 3.
      Esser et al., "Learned Step Size Quantization", 2020.
    """

    floats: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None
    offset: jax.Array | None
    codebook: jax.Array | None
    meta: Meta
    input_range: jax.Array | None = None
    input_scale: jax.Array | None = None
    switch: jax.Array | None = None
    averaging: jax.Array | None = None
    range_gradient: RangeGradient | None = None
    gradient_scale: bool = False
    decay: float | None = None
    record: Callable[[jax.Array], None] | None = None

    # With None, numpy calls `__rmatmul__` for `array @ w`.
    __array_ufunc__ = None

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        leaves = [(key(name), getattr(self, name)) for name in TRAINED_LEAVES]
        static = (self.meta, self.range_gradient, self.gradient_scale, self.decay)
        return leaves, static

    @classmethod
    def tree_unflatten(cls, static, leaves) -> TrainedWeight:
        meta, range_gradient, gradient_scale, decay = static
        return cls(
            **dict(zip(TRAINED_LEAVES, leaves, strict=True)),
            meta=meta,
            range_gradient=range_gradient,
            gradient_scale=gradient_scale,
            decay=decay,
        )

    @classmethod
    def start(
        cls,
        floats: jax.Array,
        qt: QTensor,
        *,
        trained_scales: bool = True,
        range_gradient: RangeGradient | None = None,
        gradient_scale: bool = False,
    ) -> TrainedWeight:
        """The weight at the start of training. Its quantized values are those of `qt`.

        A float stays as it is if its code is that of `qt`. Otherwise it becomes the
        value of this code. This happens after methods such as GPTQ, which round some
        numbers to a code that is not the nearest.

        Args:
          floats: float array of the shape of `qt`.
          qt: the weight, quantized by any method.
          trained_scales: True trains the scales of `qt`, its zero points, offsets and
            codebooks. False computes them from the floats in every product.
          range_gradient: as in `jaxq.fake_quant`.
          gradient_scale: as in the class.

        Raises:
          ValueError: `trained_scales` is False, and `qt` has a codebook that is not
            computed from the floats.
        """
        if trained_scales:
            leaves = (
                scale_values(qt),
                _as_float32(qt.zero_point),
                _as_float32(qt.offset),
                qt.codebook,
            )
        elif qt.codebook is not None and not qt.spec.rule.own_codebook:
            raise ValueError(
                f"TrainedWeight.start: {qt!r} has a codebook, which cannot be "
                "computed from the floats. Use trained_scales=True."
            )
        else:
            leaves = (None, None, None, None)
        weight = cls(
            floats,
            *leaves,
            qt.meta,
            qt.input_range,
            qt.input_scale,
            range_gradient=range_gradient,
            gradient_scale=gradient_scale,
        )
        same = weight.quantize().codes() == qt.codes()
        start = jnp.where(same, floats, dequantize(qt, dtype=floats.dtype))
        return dataclasses.replace(weight, floats=start)

    # Properties of an array.

    @property
    def spec(self) -> QuantSpec:
        """How the floats are quantized."""
        return self.meta.spec

    @property
    def geometry(self) -> Geometry:
        """Shape, axis roles and blocks, without batch axes."""
        return self.meta.geometry

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.floats.shape)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes."""
        return self.shape[: self.ndim - len(self.geometry.shape)]

    @property
    def ndim(self) -> int:
        """Number of axes, including batch axes."""
        return self.floats.ndim

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.floats.size

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `fake_quant()`, and of products with numbers of this dtype."""
        return jnp.dtype(self.meta.dtype)

    def astype(self, dtype: Any) -> TrainedWeight:
        """The same weight with another `dtype`. The floats do not change.

        Raises:
          TypeError: `dtype` is not a float dtype.
        """
        dtype = jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"TrainedWeight.astype: dtype must be a float dtype, got {dtype}."
            )
        meta = dataclasses.replace(self.meta, dtype=dtype.name)
        return dataclasses.replace(self, meta=meta)

    def __getitem__(self, index: Any) -> TrainedWeight:
        """Weights of a stack: indexes leading batch axes. `w[...]` is `w`.

        Raises:
          TypeError: the index reaches an axis that is not a batch axis.
        """
        if index is Ellipsis:
            return self
        indices = index if isinstance(index, tuple) else (index,)
        has_other = any(i is None or i is Ellipsis for i in indices)
        if has_other or len(indices) > len(self.batch_shape):
            raise TypeError(
                f"{self!r} can be indexed along its {len(self.batch_shape)} batch axes "
                f"only, got {index!r}. Use w.fake_quant() to get an array."
            )
        return jax.tree.map(lambda leaf: leaf[index], self)

    def __repr__(self) -> str:
        if not hasattr(self.floats, "dtype"):
            # A tree of other values, such as labels or shapes.
            leaves = {name: getattr(self, name) for name in TRAINED_LEAVES}
            return f"TrainedWeight({leaves})"
        scales = "computed scales" if self.scale is None else "trained scales"
        return (
            f"TrainedWeight({self.floats.dtype}{list(self.shape)}, "
            f"{self.spec.fmt.name}, {scales})"
        )

    def __matmul__(self, other: Any) -> Any:
        return registered_matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return registered_matmul(other, self)

    # Quantization.

    def quantize(self) -> QTensor:
        """The quantized weight. It has no gradient."""
        floats = jax.lax.stop_gradient(self.floats)
        if self.scale is None:
            if self.input_scale is not None:
                floats = self._divided(floats)
            qt = quantize_array(floats, self.spec, self.geometry, None)
        else:
            qt = requantize(floats, self._grid())
        changes = {"activation", "dtype", "outliers", "name"}
        qt = qt.with_meta(**{name: getattr(self.meta, name) for name in changes})
        return dataclasses.replace(
            qt, input_range=self.input_range, input_scale=self.input_scale
        )

    def fake_quant(self) -> jax.Array:
        """The values of `quantize()`, with gradients to all leaves but `switch`.

        Returns:
          Array of the shape and `dtype` of the weight, bit for bit
          `dequantize(quantize())`.
        """
        if self.scale is None:
            return self._fake_quant_computed()
        grid = self._smooth_grid()
        values = fake_quant(self.floats.astype(jnp.float32), grid)
        if self.zero_point is not None:
            values = values + self._change_of_zero_points()
        return _to_dtype(values, self.dtype)

    def _fake_quant_computed(self) -> jax.Array:
        floats = self.floats.astype(jnp.float32)
        if self.input_scale is not None:
            floats = self._divided(floats)
        values = fake_quant_computed(floats, self.spec, self.geometry)
        if self.input_scale is not None:
            view = self.geometry.to_view(values)
            view = view * self.geometry.contracted_to_view(self.input_scale)
            values = self.geometry.from_view(view)
        return _to_dtype(values, self.dtype)

    def _divided(self, floats: jax.Array) -> jax.Array:
        """The floats, divided by the input scale."""
        assert self.input_scale is not None
        view = self.geometry.to_view(floats).astype(jnp.float32)
        view = view / self.geometry.contracted_to_view(self.input_scale)
        return self.geometry.from_view(view)

    def _grid(self) -> QTensor:
        """A QTensor with the trained scales as they are stored, and codes of 0."""
        spec, geometry = self.spec, self.geometry
        assert self.scale is not None
        constant = jax.lax.stop_gradient
        zero_point = None
        if self.zero_point is not None:
            fmt = spec.fmt
            rounded = jnp.clip(jnp.round(constant(self.zero_point)), fmt.min, fmt.max)
            zero_point = rounded.astype(fmt.code_dtype)
        meta = Meta(spec, geometry, spec.order, self.meta.dtype)
        dtypes = leaf_dtypes(meta)
        offset = None
        if self.offset is not None:
            dtype = dtypes["offset"].name
            offset = _scales.store_in_dtype(constant(self.offset), dtype, signed=True)
        codebook = self.codebook
        scale = store_scale(constant(self.scale), spec, geometry)
        codes = jnp.zeros((*self.batch_shape, *meta.stored_shape), dtypes["data"])
        return QTensor(
            codes,
            scale,
            zero_point,
            offset,
            None if codebook is None else constant(codebook),
            meta,
            input_scale=self.input_scale,
        )

    def _smooth_grid(self) -> QTensor:
        """`_grid()` with float32 scales and offsets that have gradients.

        The gradients pass straight through the rounding of scales and offsets.
        """
        grid = self._grid()
        spec = self.spec.replace(scale="float32")
        scale = jax.lax.stop_gradient(scale_values(grid))
        if self.codebook is None:
            # Entries of a codebook are multiplied by the scale, so either of the two
            # is enough to train. Entries are trained, and their scale is constant.
            change = _change(self.scale)
            if self.gradient_scale:
                change = change * self._scale_factor()
            scale = scale + change
        offset = None
        if grid.offset is not None:
            stored = _scales.load_from_dtype(grid.offset)
            offset = jax.lax.stop_gradient(stored) + _change(self.offset)
        codebook = self.codebook
        if codebook is not None and spec.rule.has_threshold:
            # A ternary weight keeps its zero.
            is_zero = jnp.asarray(spec.fmt.values() == 0)
            codebook = jnp.where(is_zero, jax.lax.stop_gradient(codebook), codebook)
        meta = dataclasses.replace(grid.meta, spec=spec, dtype="float32")
        return dataclasses.replace(
            grid, scale=scale, offset=offset, codebook=codebook, meta=meta
        )

    def _scale_factor(self) -> jax.Array:
        """LSQ's factor of the gradient of a scale, `[*num_blocks]` or 1-sized axes."""
        counts = self.geometry.scale_from_blocks(jnp.asarray(self.geometry.counts()))
        return 1 / jnp.sqrt(jnp.maximum(counts, 1) * np.float32(self.spec.fmt.max))

    def _change_of_zero_points(self) -> jax.Array:
        """Zero, with the derivative of the values with respect to the zero points.

        A clipped number is `scale * (code - zero_point)`. A rounded number does not
        depend on its zero point, because its code moves with it.
        """
        geometry, grid = self.geometry, self._grid()
        scale = geometry.scale_to_blocks(scale_values(grid))
        moved = geometry.scale_to_blocks(_change(self.zero_point)) * scale
        quantized = requantize(jax.lax.stop_gradient(self.floats), grid)
        is_inside = inside_range(jax.lax.stop_gradient(self.floats), quantized)
        inside = geometry.to_blocks(geometry.pad(geometry.to_view(is_inside)))
        change = jnp.where(inside, 0.0, -moved)
        return geometry.from_view(geometry.unpad(geometry.from_blocks(change)))


# The classes that take the place of a weight in a product.
QUANTIZED = QTensor | TrainedWeight


def _as_float32(leaf: jax.Array | None) -> jax.Array | None:
    if leaf is None:
        return None
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf.astype(jnp.float32)
    return _scales.load_from_dtype(leaf)


def _change(x: jax.Array | None) -> jax.Array:
    """Zero, with the derivative of `x`."""
    assert x is not None
    return x - jax.lax.stop_gradient(x)


def _to_dtype(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The float32 numbers x in a narrower dtype, clipped to its range."""
    limit = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
    return jnp.clip(x, -limit, limit).astype(dtype)
