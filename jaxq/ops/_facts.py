"""Static facts about the operands of a product: all that a decision may depend on.

Facts are read from arrays, `jax.ShapeDtypeStruct`s and QTensors. If an activation is
not quantized yet, its facts follow from its shape and its spec.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxq import formats, kernels
from jaxq.kernels import KERNEL_SCALES
from jaxq.qtensor import (
    ErrorContext,
    Meta,
    QTensor,
    QuantSpec,
    check_floats,
    check_leaves,
    describe,
    resolve,
)


@dataclasses.dataclass(frozen=True)
class ArrayFacts:
    """The facts of an array that is not quantized.

    Attributes:
      shape: sizes of the axes.
      dtype: name of the dtype.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclasses.dataclass(frozen=True)
class CodesFacts:
    """The facts of a QTensor. The shapes of leaves do not contain the batch axes.

    Attributes:
      meta: the static facts of the QTensor.
      batch_shape: sizes of the leading batch axes.
      scale: shape of the scales, and the dtype in which kernels read the scales.
      zero_point: shape and dtype of the zero points, or None.
      offset: shape of the offsets with dtype float32, in which kernels read them; or
        None.
      codebook: shape and dtype of the QTensor's own codebooks, or None.
      static_range: True if the activation has a static range from calibration.
      input_scale: True if the other operand is multiplied by factors first.
    """

    meta: Meta
    batch_shape: tuple[int, ...]
    scale: jax.ShapeDtypeStruct
    zero_point: jax.ShapeDtypeStruct | None
    offset: jax.ShapeDtypeStruct | None
    codebook: jax.ShapeDtypeStruct | None
    static_range: bool = False
    input_scale: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch_shape + self.meta.geometry.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> str:
        """The dtype that `dequantize` returns by default."""
        return self.meta.dtype

    @property
    def fmt(self) -> formats.Format:
        return self.meta.spec.fmt

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    def without_activation(self) -> CodesFacts:
        """The same weight without activation quantization."""
        meta = dataclasses.replace(self.meta, activation=None, outliers=None)
        return dataclasses.replace(self, meta=meta, static_range=False)

    def without_input_scale(self) -> CodesFacts:
        """The same weight without factors for the other operand."""
        return dataclasses.replace(self, input_scale=False)

    def dequantized(self) -> ArrayFacts:
        """The facts of the dequantized array."""
        return ArrayFacts(self.shape, self.dtype)


Facts = ArrayFacts | CodesFacts


def facts_of(operand: Any) -> Facts:
    """The facts of an array, a `jax.ShapeDtypeStruct` or a QTensor.

    Raises:
      TypeError: a leaf of the QTensor has another dtype than its `meta` says.
    """
    if not isinstance(operand, QTensor):
        return ArrayFacts(tuple(operand.shape), jnp.dtype(operand.dtype).name)
    check_leaves(operand, "product")
    num_batch = len(operand.batch_shape)

    def leaf_facts(leaf: Any, dtype: str | None = None) -> jax.ShapeDtypeStruct | None:
        if leaf is None:
            return None
        return jax.ShapeDtypeStruct(leaf.shape[num_batch:], dtype or leaf.dtype)

    scale = leaf_facts(operand.scale, _kernel_scale_dtype(operand.scale))
    assert scale is not None
    return CodesFacts(
        meta=operand.meta,
        batch_shape=operand.batch_shape,
        scale=scale,
        zero_point=leaf_facts(operand.zero_point),
        offset=leaf_facts(operand.offset, "float32"),
        codebook=leaf_facts(operand.codebook),
        static_range=operand.input_range is not None,
        input_scale=operand.input_scale is not None,
    )


def _kernel_scale_dtype(scale: Any) -> str:
    """The dtype in which kernels read a scale.

    Kernels read 16-bit and 32-bit floats. All other scales become float32 first.
    """
    if isinstance(scale, QTensor) or scale.dtype.name not in KERNEL_SCALES:
        return "float32"
    return scale.dtype.name


def activation_facts(
    x: ArrayFacts,
    spec: QuantSpec,
    contracting: tuple[int, ...],
    batch: tuple[int, ...] = (),
) -> CodesFacts:
    """The facts of `quantize(x, spec, contracting=..., batch=...)`.

    This function computes the facts and quantizes nothing.

    Raises:
      TypeError: the dtype of `x` is not float32, bfloat16 or float16.
      ValueError: a block size of `spec` does not divide its axis and `pad` is False; or
        `spec` is symmetric without an offset and its format has no negative numbers.
    """
    check_floats(x.dtype, x.shape, "activation", "quantize")
    if spec.symmetric and spec.offset is None and spec.fmt.min >= 0:
        raise ValueError(
            f"quantize: {spec.fmt.name} has no negative numbers, and a symmetric spec "
            "would clip all negative activations. Use symmetric=False or offset='min'."
        )
    geometry = resolve(
        x.shape,
        spec.granularity,
        contracting,
        batch,
        context=ErrorContext("quantize", "activation", describe(x.dtype, x.shape)),
        multiple=formats.codes_per_pack(spec.fmt.bits, spec.order),
    )
    blocks = geometry.num_blocks
    scale_dtype = spec.scale if spec.scale in KERNEL_SCALES else "float32"
    zero_point = offset = codebook = None
    if not spec.symmetric:
        zero_point = jax.ShapeDtypeStruct(blocks, spec.fmt.code_dtype)
    if spec.offset is not None:
        # A mean is one number for the whole array.
        shape = (1,) * len(blocks) if spec.offset == "mean" else blocks
        offset = jax.ShapeDtypeStruct(shape, jnp.float32)
    if spec.rule.own_codebook:
        codebook = jax.ShapeDtypeStruct((*blocks, spec.fmt.codes().size), jnp.float32)
    return CodesFacts(
        meta=Meta(spec, geometry, spec.order, x.dtype),
        batch_shape=x.shape[: len(batch)],
        scale=jax.ShapeDtypeStruct(blocks, scale_dtype),
        zero_point=zero_point,
        offset=offset,
        codebook=codebook,
    )


def activation_problem(activation: CodesFacts) -> kernels.ActivationProblem | str:
    """The quantization of an activation for kernels, or why no kernel computes it.

    Args:
      activation: the facts of the quantized activation, from `activation_facts`.
    """
    meta = activation.meta
    return kernels.activation_problem(
        activation.shape, meta.dtype, meta.spec, meta.geometry
    )
