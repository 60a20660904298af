"""TrainedWeight: a float weight in quantization-aware training.

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
from jaxq.qtensor._dequantize import dequantize, scale_values, stored_values
from jaxq.qtensor._fake_quant import (
    fake_quant,
    fake_quant_computed,
    quantize_computed,
    zero_with_gradient,
)
from jaxq.qtensor._fake_range import RangeGradient
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._initial_steps import (
    is_unusable,
    middle_code,
    usable_codebook,
    usable_scale,
)
from jaxq.qtensor._leaf_dtypes import leaf_dtypes
from jaxq.qtensor._meta import Meta
from jaxq.qtensor._product_operand import ProductOperand
from jaxq.qtensor._qtensor import QTensor
from jaxq.qtensor._quantize import store_scale
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
class TrainedWeight(ProductOperand):
    """A float weight, and how it is quantized in every product.

    `jaxq.training.prepare` puts it in the place of a weight. `x @ w`, `jaxq.matmul`,
    `jaxq.einsum`, `jaxq.dot_general` and Flax layers multiply by `w.quantize()`. Their
    gradient is that of the product with `w.fake_quant()`. `jaxq.training.convert` puts
    `w.quantize()` in the place of `w`.

    Attributes:
      floats: the weight, `[*batch, *shape]`.
      scale: float32 `[*batch, *num_blocks]`, trained scales. It is a `TrainedWeight` if
        the spec quantizes its scales, as in the preset "nvfp4". None computes the
        scales from the floats.
      zero_point: float32 like `scale`, or None. It is rounded where it is used.
      offset: float32 like the offset of the QTensor, or None.
      codebook: float32 `[*batch, *num_blocks, num_codes]`, or None.
      input_range: float32 `[*batch, 2]`, the (low, high) of static activation
        quantization, or None.
      input_scale: float32 `[*batch, K]`, as in `QTensor`, or None. It is not trained.
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
      record: a function. `record(input_range)` stores the moving average after a
        product. None does not change the average. The function is not a part of the
        pytree, because it belongs to one layer of a model.

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
    scale: jax.Array | TrainedWeight | None
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

    floats_expression = "w.fake_quant()"

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

        A float stays as it is if its code is the same as in `qt`. Otherwise it becomes
        the value of the code in `qt`. This happens after methods such as GPTQ, which
        round some numbers to a code that is not the nearest.

        The scale of a block of zeros is 0, and would never train. So the block starts
        with the mean scale of the other blocks. In a weight of zeros, the largest
        number of the format starts as `1 / sqrt(k)`, where k is the number of inputs. A
        zero point starts in the middle of the format. Equal entries of a codebook are
        spread in the same way. The quantized values of the block stay the same, but for
        formats without 0 ("binary"), and for rounding in specs with offset="min".

        Args:
          floats: float array of the shape of `qt`.
          qt: the weight, quantized by any method.
          trained_scales: True trains the scales, zero points, offsets and codebooks of
            `qt`. False computes them from the floats in every product. The quantized
            values are then those of `qt` only if the scales of `qt` are those that are
            computed.
          range_gradient: as in `jaxq.fake_quant`.
          gradient_scale: as in the class.

        Raises:
          ValueError: the spec of `qt` rounds stochastically; or `trained_scales` is
            False, and `qt` has a codebook that is not computed from the floats.
        """
        if qt.spec.needs_key:
            raise ValueError(
                f"TrainedWeight.start: {qt!r} rounds stochastically, which needs a key "
                "in every product. Use rounding='nearest_even'."
            )
        if trained_scales:
            weight = _with_steps(floats, qt)
        elif qt.codebook is not None and not qt.spec.rule.own_codebook:
            raise ValueError(
                f"TrainedWeight.start: {qt!r} has a codebook, which cannot be "
                "computed from the floats. Use trained_scales=True."
            )
        else:
            weight = cls(floats, None, None, None, None, qt.meta)
        weight = dataclasses.replace(
            weight,
            input_range=qt.input_range,
            input_scale=qt.input_scale,
            range_gradient=range_gradient,
            gradient_scale=gradient_scale,
        )
        has_same_code = weight.quantize().codes() == qt.codes()
        start = jnp.where(has_same_code, floats, dequantize(qt, dtype=floats.dtype))
        return dataclasses.replace(weight, floats=start)

    def with_scale(self, scale: jax.Array) -> TrainedWeight:
        """The same weight with other scales.

        Args:
          scale: float32 `[*batch, *num_blocks]`. A block keeps its scale if the new
            scale is 0. If the spec quantizes its scales, they have scales of their own,
            which are computed from `scale`.
        """
        old_scale = self.scale
        if isinstance(old_scale, TrainedWeight):
            old_scale = old_scale.floats
        if old_scale is not None:
            scale = jnp.where(is_unusable(scale), old_scale, scale)
        stored = store_scale(scale, self.spec, self.geometry)
        return dataclasses.replace(self, scale=_trained_scale(scale, stored))

    def with_computed_steps(self) -> TrainedWeight:
        """The same floats with the scales, zero points and offsets of these floats.

        They are those of rounding to nearest. A codebook is computed too if its spec
        computes it, as "ttq" does. A weight with another codebook, and a weight without
        trained scales, stay as they are.
        """
        has_own_codebook = self.codebook is None or self.spec.rule.own_codebook
        if self.scale is None or not has_own_codebook:
            return self
        floats = jax.lax.stop_gradient(self.floats)
        qt = quantize_computed(floats, self.spec, self.geometry, self.input_scale)
        steps = _with_steps(floats, qt)
        names = ("scale", "zero_point", "offset", "codebook")
        changes = {name: getattr(steps, name) for name in names}
        return dataclasses.replace(self, **changes)

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

    def __repr__(self) -> str:
        if not hasattr(self.floats, "dtype"):
            # A tree of other values, such as labels or shapes.
            leaves = {name: getattr(self, name) for name in TRAINED_LEAVES}
            return f"TrainedWeight({leaves})"
        scales = "computed scales" if self.scale is None else "trained scales"
        array = f"{self.floats.dtype}{list(self.shape)}"
        return f"TrainedWeight({array}, {self.spec.fmt.name}, {scales})"

    # Quantization.

    def quantize(self) -> QTensor:
        """The quantized weight. It has no gradient."""
        return jax.lax.stop_gradient(self)._quantize()

    def _quantize(self) -> QTensor:
        if self.scale is None:
            qt = quantize_computed(
                self.floats, self.spec, self.geometry, self.input_scale
            )
        else:
            qt = requantize(self.floats, self._grid())
        changes = ("activation", "dtype", "outliers", "name")
        qt = qt.with_meta(**{name: getattr(self.meta, name) for name in changes})
        return dataclasses.replace(
            qt, input_range=self.input_range, input_scale=self.input_scale
        )

    def fake_quant(self) -> jax.Array:
        """The values of `quantize()`, with gradients.

        The floats, scales, zero points, offsets and codebooks have gradients. The
        gradient of a zero point is `-scale` for a number that is clipped, and 0 for
        other numbers. This follows from the gradient of an offset in LSQ+. All other
        gradients are those of `jaxq.fake_quant`.

        Returns:
          Array of the shape and `dtype` of the weight, bit for bit
          `dequantize(quantize())`.
        """
        floats = self.floats.astype(jnp.float32)
        if self.scale is None:
            values = fake_quant_computed(
                floats, self.spec, self.geometry, self.input_scale
            )
        else:
            values = fake_quant(floats, self._smooth_grid())
        return _to_dtype(values, self.dtype)

    def _grid(self) -> QTensor:
        """A QTensor with the trained scales as they are stored, and codes of 0."""
        meta = Meta(self.spec, self.geometry, self.spec.order, self.meta.dtype)
        dtypes = leaf_dtypes(meta)
        if isinstance(self.scale, TrainedWeight):
            scale = self.scale.quantize()
        else:
            assert self.scale is not None
            scale = store_scale(self.scale, self.spec, self.geometry)
        zero_point = offset = None
        if self.zero_point is not None:
            fmt = self.spec.fmt
            zero_point = jnp.clip(jnp.round(self.zero_point), fmt.min, fmt.max)
            zero_point = zero_point.astype(dtypes["zero_point"])
        if self.offset is not None:
            dtype = dtypes["offset"].name
            offset = _scales.store_in_dtype(self.offset, dtype, signed=True)
        codes = jnp.zeros((*self.batch_shape, *meta.stored_shape), dtypes["data"])
        return QTensor(
            codes,
            scale,
            zero_point,
            offset,
            self.codebook,
            meta,
            input_scale=self.input_scale,
        )

    def _smooth_grid(self) -> QTensor:
        """`_grid()` with float32 scales and offsets that have gradients.

        The gradients pass straight through the rounding of scales, zero points and
        offsets.
        """
        grid = jax.lax.stop_gradient(self)._grid()
        spec = self.spec.replace(scale="float32")
        stored_scale = scale_values(grid)
        scale = stored_scale
        if self.codebook is None:
            # The entries of a codebook are multiplied by the scale, so it is enough to
            # train one of the two. With a codebook, only the entries are trained.
            scale = stored_scale + self._change_of_scales()
        offset = None
        if grid.offset is not None:
            assert self.offset is not None
            offset = _scales.load_from_dtype(grid.offset)
            offset = offset + zero_with_gradient(self.offset)
        elif self.zero_point is not None:
            # A zero point shifts the range as an offset of `-scale * zero_point` does.
            # `grid` contains the zero point. So the offset is 0 here, and has only the
            # derivative.
            offset = -stored_scale * zero_with_gradient(self.zero_point)
        codebook = self.codebook
        if codebook is not None and spec.rule.has_threshold:
            # The 0 of ternary codes is not trained.
            is_zero = jnp.asarray(spec.fmt.values() == 0)
            codebook = jnp.where(is_zero, jax.lax.stop_gradient(codebook), codebook)
        meta = dataclasses.replace(grid.meta, spec=spec, dtype="float32")
        return dataclasses.replace(
            grid, scale=scale, offset=offset, codebook=codebook, meta=meta
        )

    def _change_of_scales(self) -> jax.Array:
        """Zero, with the derivative of the scales."""
        scale = self.scale
        if isinstance(scale, TrainedWeight):
            scale = scale.fake_quant()
        assert scale is not None
        change = zero_with_gradient(scale)
        if not self.gradient_scale:
            return change
        # LSQ's factor of the gradient.
        counts = self.geometry.scale_from_blocks(jnp.asarray(self.geometry.counts()))
        factor = jnp.maximum(counts, 1) * np.float32(self.spec.fmt.max)
        return change / jnp.sqrt(factor)


# The classes that take the place of a weight in a product.
QUANTIZED = QTensor | TrainedWeight


def is_quantized(x: Any) -> bool:
    """True for a QTensor or TrainedWeight: an `is_leaf=` of functions on trees."""
    return isinstance(x, QUANTIZED)


def _with_steps(floats: jax.Array, qt: QTensor) -> TrainedWeight:
    """The floats with the scales, zero points, offsets and codebooks of `qt`.

    A block of zeros gets steps that can be trained, see `TrainedWeight.start`.
    """
    fmt, geometry = qt.spec.fmt, qt.meta.geometry
    stored_scale = stored_values(qt.scale)
    scale = usable_scale(stored_scale, floats, fmt.max, geometry)
    is_empty = is_unusable(stored_scale)
    zero_point, offset = _as_float32(qt.zero_point), _as_float32(qt.offset)
    if zero_point is not None:
        zero_point = jnp.where(is_empty, middle_code(fmt), zero_point)
    if offset is not None and qt.spec.offset == "min":
        # All numbers of the block are the old offset.
        offset = jnp.where(is_empty, offset - middle_code(fmt) * scale, offset)
    codebook = qt.codebook
    if codebook is not None:
        codebook = usable_codebook(codebook, floats, qt.spec, geometry)
    return TrainedWeight(
        floats,
        _trained_scale(scale, qt.scale),
        zero_point,
        offset,
        codebook,
        qt.meta,
    )


def _trained_scale(
    values: jax.Array, stored: jax.Array | QTensor
) -> jax.Array | TrainedWeight:
    """The leaf `scale` of a TrainedWeight.

    Args:
      values: float32 scales.
      stored: the scales as they are stored.
    """
    return _with_steps(values, stored) if isinstance(stored, QTensor) else values


def _as_float32(leaf: jax.Array | None) -> jax.Array | None:
    if leaf is None:
        return None
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf.astype(jnp.float32)
    return _scales.load_from_dtype(leaf)


def _to_dtype(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The float32 numbers x in a narrower dtype, clipped to its range."""
    limit = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
    return jnp.clip(x, -limit, limit).astype(dtype)
