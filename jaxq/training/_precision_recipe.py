"""Recipes of low-precision training: how the operands of each product are quantized.

A layer computes three products: the result `y = x w` in the forward pass, and the
gradients `dx = dy w^T` and `dw = x^T dy` in the backward pass. Each product has its own
`ProductSpec`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxq import formats
from jaxq.methods import hadamard_matrix
from jaxq.qtensor import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
)
from jaxq.training._delayed_scaling import DelayedScaling
from jaxq.training._factors import has_two_targets


@dataclasses.dataclass(frozen=True)
class ProductSpec:
    """How the two operands of one product are quantized.

    The granularity of a spec is relative to the axes that the product contracts.
    `PerGroup(32)` means groups along these axes. `PerChannel()` means one scale for
    each index of the other axes. `PerBlock((128, 128))` means tiles of the operand as a
    matrix.

    Args:
      lhs: the spec of the left operand, None leaves it in floats. The left operand is
        `x` in the forward pass, `dy` in `dx = dy w^T`, and `x` in `dw = x^T dy`.
      rhs: the spec of the right operand: `w`, `w` and `dy`.
      hadamard: None, or the size of a random Hadamard rotation. Both operands are
        rotated along the contracted axes in blocks of this size before they are
        quantized. The product does not change, but outliers become smaller.

    Raises:
      TypeError: `lhs` or `rhs` is not a `QuantSpec` or None.
      ValueError: a spec names an axis, or no Hadamard matrix of the size can be built.

    Example:
      >>> import jaxq
      >>> int8 = jaxq.QuantSpec("int8", jaxq.PerChannel())
      >>> product = jaxq.training.ProductSpec(int8, int8)
      >>> product.needs_key
      False
    """

    lhs: QuantSpec | None
    rhs: QuantSpec | None
    hadamard: int | None = None

    def __post_init__(self):
        for name in ("lhs", "rhs"):
            spec = getattr(self, name)
            if not isinstance(spec, QuantSpec | None):
                raise TypeError(
                    f"ProductSpec: {name} must be a jaxq.QuantSpec or None, got "
                    f"{spec!r}. jaxq.presets() has specs by name."
                )
            if spec is not None and getattr(spec.granularity, "axis", None) is not None:
                raise ValueError(
                    f"ProductSpec: {spec.granularity} names an axis, but the product "
                    "determines the axis. Leave out axis=."
                )
        if self.hadamard is not None:
            hadamard_matrix(self.hadamard)

    @property
    def needs_key(self) -> bool:
        """True if an operand is rounded stochastically."""
        specs = (self.lhs, self.rhs)
        return any(spec is not None and spec.needs_key for spec in specs)


@dataclasses.dataclass(frozen=True)
class LowPrecision:
    """A recipe of low-precision training.

    Args:
      forward: how the operands of `y = x w` are quantized.
      input_gradient: how the operands of `dx = dy w^T` are quantized.
      weight_gradient: how the operands of `dw = x^T dy` are quantized.
      delayed: the scales of `x` and `w` come from earlier steps. Their specs must be
        `PerTensor()`. Gradients `dy` always use the scale of their own step. None uses
        the scales of the present step everywhere.
      four_over_six: map the largest magnitude of each block to 6 or to 4, whichever has
        the smaller squared error. This is for operands as in "nvfp4" that are rounded
        to nearest.

    Raises:
      TypeError: a product is not a `ProductSpec`.
      ValueError: `delayed` is given, and a spec of `x` or `w` is not `PerTensor()`; or
        `four_over_six` is True, and no operand can use it.

    Example:
      >>> import dataclasses, jaxq
      >>> recipe = jaxq.training.low_precision_recipes()["nvfp4"]
      >>> recipe = dataclasses.replace(recipe, four_over_six=True)
      >>> recipe.needs_key
      True

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
      NVIDIA, "Pretraining Large Language Models with NVFP4", 2025.
      Cook et al., "Four Over Six: More Accurate NVFP4 Quantization with Adaptive Block
      Scaling", 2025.
    """

    forward: ProductSpec
    input_gradient: ProductSpec
    weight_gradient: ProductSpec
    delayed: DelayedScaling | None = None
    four_over_six: bool = False

    def __post_init__(self):
        for name in ("forward", "input_gradient", "weight_gradient"):
            product = getattr(self, name)
            if not isinstance(product, ProductSpec):
                raise TypeError(
                    f"LowPrecision: {name} must be a jaxq.training.ProductSpec, got "
                    f"{product!r}."
                )
        specs = [spec for p in self._products for spec in (p.lhs, p.rhs)]
        if self.four_over_six and not any(map(has_two_targets, specs)):
            raise ValueError(
                "LowPrecision: four_over_six=True is for specs with "
                "format='float4_e2m1fn', rounded to nearest, whose scale is a "
                "float8_e4m3fn QuantSpec with PerTensor(). No product has such a spec."
            )
        if self.delayed is not None:
            self._check_delayed()

    def _check_delayed(self) -> None:
        """Raises a ValueError unless x and w have one scale for a tensor."""
        constant = (
            self.forward.lhs,
            self.forward.rhs,
            self.input_gradient.rhs,
            self.weight_gradient.lhs,
        )
        for spec in constant:
            if spec is not None and not isinstance(spec.granularity, PerTensor):
                raise ValueError(
                    "LowPrecision: delayed scaling has one scale for a tensor, but a "
                    f"spec of x or w has {spec.granularity}. Use jaxq.PerTensor()."
                )

    @property
    def needs_key(self) -> bool:
        """True if an operand of a product is rounded stochastically."""
        return any(product.needs_key for product in self._products)

    @property
    def uses_random_numbers(self) -> bool:
        """True if a key has an effect: for stochastic rounding, or for rotations."""
        is_rotated = any(p.hadamard is not None for p in self._products)
        return self.needs_key or is_rotated

    @property
    def _products(self) -> tuple[ProductSpec, ...]:
        return (self.forward, self.input_gradient, self.weight_gradient)


def low_precision_recipes() -> dict[str, LowPrecision]:
    """Every named recipe of low-precision training.

    Example:
      >>> import jaxq
      >>> list(jaxq.training.low_precision_recipes())
      ['fp8', 'fp8_block', 'fp8_delayed', 'int8', 'mxfp8', 'nvfp4']
    """
    return dict(sorted(_RECIPES.items()))


def as_low_precision(recipe: str | LowPrecision, caller: str) -> LowPrecision:
    """The recipe of a name, or the recipe itself.

    Raises:
      TypeError: `recipe` is neither a name nor a `LowPrecision`.
      ValueError: no recipe has this name.
    """
    if isinstance(recipe, LowPrecision):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(
            f"{caller}: recipe must be a name or a jaxq.training.LowPrecision, got "
            f"{recipe!r}."
        )
    name = recipe.strip().lower().replace("-", "_")
    if name in _RECIPES:
        return _RECIPES[name]
    listing = "jaxq.training.low_precision_recipes()"
    problem = formats.unknown_name("recipe", recipe, _RECIPES, listing)
    raise ValueError(f"{caller}: {problem}")


def _uniform(x: QuantSpec, w: QuantSpec, dy: QuantSpec) -> LowPrecision:
    """A recipe that quantizes a tensor by one spec in both of its products."""
    return LowPrecision(
        forward=ProductSpec(x, w),
        input_gradient=ProductSpec(dy, w),
        weight_gradient=ProductSpec(x, dy),
    )


def _int8() -> LowPrecision:
    nearest = QuantSpec("int8", PerChannel())
    return _uniform(nearest, nearest, nearest.replace(rounding="stochastic"))


def _fp8() -> LowPrecision:
    e4m3 = QuantSpec("float8_e4m3fn", PerTensor())
    return _uniform(e4m3, e4m3, QuantSpec("float8_e5m2", PerTensor()))


def _block_scaled(x: Any, w: Any) -> LowPrecision:
    """float8_e4m3fn with a power of two as the scale of each block, rounded up.

    No number is clipped. bfloat16 holds the products of codes and scales.
    """
    x, w = (
        QuantSpec(
            "float8_e4m3fn",
            granularity,
            scale="float8_e8m0fnu",
            scale_rule="mx_round_up",
        )
        for granularity in (x, w)
    )
    return _uniform(x, w, x)


def _nvfp4() -> LowPrecision:
    """NVIDIA (2025), section 4: rotation and stochastic rounding where they help."""
    x = QuantSpec(
        "float4_e2m1fn",
        PerGroup(16, pad=True),
        scale=QuantSpec("float8_e4m3fn", PerTensor()),
        packing=formats.Packing.NONE,
    )
    w = x.replace(granularity=PerBlock((16, 16), pad=True))
    # With more headroom no number is clipped, and stochastic rounding is unbiased.
    dy = x.replace(rounding="stochastic", headroom="unbiased")
    return LowPrecision(
        forward=ProductSpec(x, w),
        input_gradient=ProductSpec(dy, w),
        weight_gradient=ProductSpec(x, dy, hadamard=16),
    )


_RECIPES = {
    "fp8": _fp8(),
    "fp8_block": _block_scaled(PerGroup(128, pad=True), PerBlock((128, 128), pad=True)),
    "fp8_delayed": dataclasses.replace(_fp8(), delayed=DelayedScaling()),
    "int8": _int8(),
    "mxfp8": _block_scaled(PerGroup(32, pad=True), PerGroup(32, pad=True)),
    "nvfp4": _nvfp4(),
}
