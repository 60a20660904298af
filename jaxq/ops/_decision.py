"""What runs for a product: integer dot, float8 dot, Pallas kernel or XLA form.

This file decides which numbers are multiplied (codes or floats), in which dtypes, and
what is quantized or dequantized first. `dot_general`, `conv_general_dilated` and
`explain` each call a function `plan_...` of this file. The operations then carry out
the `Plan` that the function returns. `take` and `ragged_dot` can run in one way only,
so this file checks their operands. Only `explain` makes a plan of `ragged_dot`. A
decision depends only on static facts (`_facts.py`). Nothing is quantized or traced
here.

`jaxq.kernels` decides the rest: `_dispatch.py` chooses a Pallas kernel or the XLA form
of a product. Inside the XLA form, `_forms.py` and `_codes.py` choose the order of the
loops and the blocks of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import kernels
from jaxq.kernels import is_exact_in_float8, is_native_float, largest_exact_length
from jaxq.ops._dimension_numbers import DimensionNumbers, batch_first, mirrored
from jaxq.ops._facts import (
    ArrayFacts,
    CodesFacts,
    Facts,
    activation_facts,
    activation_problem,
    facts_of,
)
from jaxq.ops._plan import Path, Plan, Preparation
from jaxq.ops._platform_choice import choose_on, with_choice
from jaxq.ops._weight_rows import row_meta, row_shapes, why_not_rows
from jaxq.qtensor import QTensor

_INT32_MAX = 2**31 - 1
_NARROW_FLOATS = ("bfloat16", "float16")
_NO_KERNEL = (
    "a kernel multiplies a quantized weight by floats, or by int8 or float8 codes with "
    "one scale per row; this product has no such form"
)


# Products.


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What happens before a product. `plan` adds these facts to the product's plan.

    Attributes:
      reason: why operands are prepared, the beginning of `Plan.reason`.
      before: as in `Plan`.
      activation: as in `Plan`.
      outliers: as in `Plan`.
      outlier_product: as in `Plan`.
    """

    reason: str = ""
    before: tuple[Preparation, ...] = ()
    activation: Literal["dynamic", "static"] | None = None
    outliers: float | None = None
    outlier_product: Plan | None = None

    def left_dequantized(self, problem: str) -> _Prepared:
        """The same preparations, and then dequantization of the left operand."""
        return dataclasses.replace(
            self,
            reason=f"{self.reason}the left operand is dequantized, because {problem}; ",
            before=(*self.before, "dequantize_left"),
        )

    def left_quantized(self, fmt: str, kind: Literal["dynamic", "static"]) -> _Prepared:
        """The same preparations, and then quantization of the left operand."""
        return dataclasses.replace(
            self,
            reason=f"{self.reason}{kind} activation quantization to {fmt}; ",
            before=(*self.before, "quantize_left"),
            activation=kind,
        )

    def input_scaled(self, *, swapped: bool) -> _Prepared:
        """The same preparations, and then multiplication of the activation by factors.

        Args:
          swapped: the activation is the right operand.
        """
        return dataclasses.replace(
            self,
            reason=f"{self.reason}the input is multiplied by input_scale; ",
            before=(*self.before, "scale_right" if swapped else "scale_left"),
        )

    def plan(
        self,
        path: Path,
        reason: str,
        accumulate: str = "float32",
        *,
        swapped: bool = False,
        x_dtype: str | None = None,
        result: str = "float32",
    ) -> Plan:
        """The plan of the product that follows the preparations."""
        return Plan(
            path,
            accumulate,
            swapped,
            self.reason + reason,
            before=self.before,
            activation=self.activation,
            outliers=self.outliers,
            outlier_product=self.outlier_product,
            x_dtype=x_dtype,
            result=result,
        )


def plan_dot(
    lhs: Any, rhs: Any, dims: DimensionNumbers, result: str = "float32"
) -> Plan:
    """The plan for `lax.dot_general(lhs, rhs, dims)`.

    Args:
      lhs: array, `jax.ShapeDtypeStruct` or QTensor.
      rhs: array, `jax.ShapeDtypeStruct` or QTensor.
      dims: dimension numbers that passed `check_sizes`.
      result: dtype to which the caller casts the sums.

    Raises:
      TypeError: the weight has an activation spec, and the activation is not float32,
        bfloat16 or float16.
      ValueError: the weight has an activation spec, and a block size of this spec does
        not divide the contracted axis of the activation.
    """
    return _plan_product(facts_of(lhs), facts_of(rhs), dims, result)


def _plan_product(lhs: Facts, rhs: Facts, dims: DimensionNumbers, result: str) -> Plan:
    prepared = _Prepared()
    if isinstance(lhs, CodesFacts) and isinstance(rhs, CodesFacts):
        return _plan_two_quantized(lhs, rhs, dims, prepared)
    if isinstance(lhs, CodesFacts):
        assert isinstance(rhs, ArrayFacts)
        return _plan_weight(rhs, lhs, dims, result, prepared, swapped=True)
    if isinstance(rhs, CodesFacts):
        return _plan_weight(lhs, rhs, dims, result, prepared, swapped=False)
    accumulate = _accumulate_dtype(jnp.dtype(lhs.dtype), jnp.dtype(rhs.dtype)).name
    return Plan("dense", accumulate, False, "no operand is quantized")


def _plan_weight(
    x: ArrayFacts,
    weight: CodesFacts,
    dims: DimensionNumbers,
    result: str,
    prepared: _Prepared,
    *,
    swapped: bool,
) -> Plan:
    """The plan for floats times a quantized weight.

    If the weight has an input scale, the floats are multiplied by it first. If the
    weight has an activation spec, the floats are quantized then.
    """
    if weight.input_scale and _contracts_rows(weight, dims, 0 if swapped else 1):
        weight = weight.without_input_scale()
        prepared = prepared.input_scaled(swapped=swapped)
    if weight.meta.activation is not None:
        return _plan_activation(x, weight, dims, prepared, swapped=swapped)
    weight_side = 0 if swapped else 1
    # The values of the weight must not be rounded or overflow in a narrower dtype of x.
    keeps_dtype = x.dtype == weight.dtype and x.dtype in _NARROW_FLOATS
    widening = _widening(x.dtype, weight.dtype)

    def plan(path: Path, reason: str) -> Plan:
        return prepared.plan(
            path,
            reason + widening,
            swapped=swapped,
            x_dtype=x.dtype if keeps_dtype else "float32",
            result=result if result in _NARROW_FLOATS else "float32",
        )

    geometry = weight.meta.geometry
    contracted = _negative(dims[0][weight_side], weight.ndim)
    problem = _why_not_batch(weight, dims[1][weight_side], "the weight")
    problem = problem or why_not_rows(weight.meta)
    is_plain = set(contracted) == set(geometry.contracted)
    is_transposed = set(contracted) == set(geometry.kept)
    if not problem and weight.input_scale:
        problem = (
            f"axes {sorted(contracted)} are contracted and its input_scale belongs to "
            f"axes {list(geometry.contracted)}"
        )
    if not problem and not is_plain and not is_transposed:
        problem = (
            f"axes {sorted(contracted)} are contracted and its blocks run along "
            f"{list(geometry.contracted)}"
        )
    if problem:
        reason = f"the whole weight is dequantized, because {problem}"
        return plan("dequantize", reason)
    if is_plain:
        reason = f"{weight.fmt.name} codes are decoded in blocks of rows"
        return plan("weight_only", reason)
    reason = (
        f"kept axes {sorted(contracted)} are contracted: the products of blocks of "
        "decoded rows are added up"
    )
    return plan("weight_only_transposed", reason)


def _widening(x_dtype: str, weight_dtype: str) -> str:
    """The part of a reason that says that x is widened to float32; "" if it is not."""
    if x_dtype == weight_dtype or x_dtype not in _NARROW_FLOATS:
        return ""
    return (
        f"; x is widened from {x_dtype} to float32, because the "
        f"weight is {weight_dtype}; to avoid this, quantize the weight from {x_dtype}, "
        f'or use weight.astype("{x_dtype}")'
    )


def _plan_activation(
    x: ArrayFacts,
    weight: CodesFacts,
    dims: DimensionNumbers,
    prepared: _Prepared,
    *,
    swapped: bool,
) -> Plan:
    """The plan that quantizes the activation and then multiplies two QTensors."""
    spec, kind = weight.meta.activation, _activation_kind(weight)
    assert spec is not None
    outliers = weight.meta.outliers
    exception, outlier_product = "", None
    if outliers is not None:
        bare = weight.without_activation()
        sides = (bare, x) if swapped else (x, bare)
        outlier_product = _plan_product(*sides, dims, "float32")
        exception = (
            f", except columns with a magnitude of at least {outliers:g}, which are "
            "multiplied in floats"
        )
    step = "quantize_right" if swapped else "quantize_left"
    prepared = _Prepared(
        f"{prepared.reason}{kind} activation quantization to {spec.fmt.name}"
        f"{exception}; ",
        (*prepared.before, step),
        kind,
        outliers,
        outlier_product,
    )
    lhs, rhs, quantized_dims = _quantized_sides(x, weight, dims, swapped=swapped)
    return _plan_two_quantized(lhs, rhs, quantized_dims, prepared)


def _quantized_sides(
    x: ArrayFacts, weight: CodesFacts, dims: DimensionNumbers, *, swapped: bool
) -> tuple[CodesFacts, CodesFacts, DimensionNumbers]:
    """The quantized activation, the weight, and the dimension numbers of their product.

    The activation is the left operand, also if the weight was on the left. Otherwise
    `jax.vmap(lambda v: qt @ v)` would make a copy of the weight for each v.
    """
    spec, side = weight.meta.activation, 1 if swapped else 0
    assert spec is not None
    order, quantized_dims = batch_first(x.ndim, dims, side)
    activation = activation_facts(
        ArrayFacts(tuple(x.shape[axis] for axis in order), x.dtype),
        spec,
        contracting=tuple(quantized_dims[0][side]),
        batch=tuple(quantized_dims[1][side]),
    )
    if swapped:
        quantized_dims = mirrored(quantized_dims)
    return activation, weight.without_activation(), quantized_dims


def _activation_kind(weight: CodesFacts) -> Literal["dynamic", "static"]:
    return "static" if weight.static_range else "dynamic"


def _plan_two_quantized(
    lhs: CodesFacts, rhs: CodesFacts, dims: DimensionNumbers, prepared: _Prepared
) -> Plan:
    if is_native_float(lhs.fmt) and _is_narrow(rhs):
        plan = _plan_float8(lhs, rhs, dims, prepared, swapped=False)
    elif is_native_float(rhs.fmt) and _is_narrow(lhs):
        plan = _plan_float8(rhs, lhs, dims, prepared, swapped=True)
    else:
        plan = None
    if plan is not None:
        return plan
    problem = _why_not_codes(lhs, rhs, dims)
    if problem:
        floats, prepared = lhs.dequantized(), prepared.left_dequantized(problem)
        return _plan_weight(floats, rhs, dims, "float32", prepared, swapped=False)
    # If the left operand is int8 with one scale for each row, this scale is applied to
    # the result, so that kernels multiply only integers by the weight.
    is_int8 = lhs.fmt.name == "int8" and lhs.symmetric
    is_int8_rows = is_int8 and row_shapes(lhs)["scale"].shape[-1] == 1
    return prepared.plan(
        "codes",
        _reason_for_codes(lhs, rhs),
        "float32" if is_native_float(rhs.fmt) else "int32",
        x_dtype="int8" if is_int8_rows else None,
    )


def _is_narrow(operand: CodesFacts) -> bool:
    """True if float8 codes may multiply this operand: bfloat16 holds its codes."""
    return operand.fmt.bits < 8


def _plan_float8(
    x: CodesFacts,
    weight: CodesFacts,
    dims: DimensionNumbers,
    prepared: _Prepared,
    *,
    swapped: bool,
) -> Plan | None:
    """The plan for float8 codes times a weight in a narrower format; None if none fits.

    If x has one scale for each row, this scale is applied to the result. The codes are
    multiplied by the weight like float activations, and every float dtype holds them.

    Args:
      x: the operand with float8 codes.
      weight: the other operand.
      dims: dimension numbers of the product.
      prepared: what happens before the product.
      swapped: the weight is the left operand.
    """
    x_side, weight_side = (1, 0) if swapped else (0, 1)
    contracted, batch = dims
    problem = (
        _why_not_operand(x, contracted[x_side], batch[x_side], "x")
        or _why_not_axes(weight, contracted[weight_side], batch[weight_side], "")
        or _why_not_order(x, weight, contracted[x_side], contracted[weight_side])
    )
    if problem or not x.symmetric:
        return None
    plan = functools.partial(prepared.plan, "codes", swapped=swapped)
    reason = f"{x.fmt.name} codes are multiplied by {weight.fmt.name} weights"
    if row_shapes(x)["scale"].shape[-1] == 1:
        one_scale = math.prod(x.scale.shape) == 1 and not x.batch_shape
        rows = "" if one_scale else "each row of "
        reason += f"; the scale of {rows}the activation multiplies the result"
        return plan(reason, x_dtype=_dtype_of_float8(x, weight))
    # The numbers of the weight must fit in float8, or in bfloat16.
    is_exact = weight.fmt.kind == "integer" or is_exact_in_float8(weight.fmt)
    has_codes = weight.offset is None and weight.codebook is None
    if is_exact and has_codes and _why_not_groups(x, weight) is None:
        return plan(f"{reason} in groups")
    return None


def _dtype_of_float8(x: CodesFacts, weight: CodesFacts) -> str:
    """The dtype in which float8 codes of `x` reach the product with a weight.

    Integer codes need no other dtype: products of codes are exact. Real numbers of a
    weight would be rounded in a narrower dtype than their own.
    """
    if weight.fmt.kind == "integer" and weight.offset is None:
        return x.fmt.name
    keeps_dtype = x.dtype == weight.dtype and x.dtype in _NARROW_FLOATS
    return x.dtype if keeps_dtype else "float32"


def _reason_for_codes(lhs: CodesFacts, rhs: CodesFacts) -> str:
    reason = f"{lhs.fmt.name} x {rhs.fmt.name} products of codes"
    if is_native_float(rhs.fmt):
        return reason
    if not lhs.symmetric or not rhs.symmetric:
        reason += " with zero points"
    most = largest_exact_length(
        row_meta(lhs.meta), lhs.symmetric, row_meta(rhs.meta), rhs.symmetric
    )
    num_parts = -(-rhs.meta.geometry.contracted_size // most)
    if num_parts > 1:
        reason += (
            f", in {num_parts} parts of at most {most} codes along k, so that each sum "
            "fits int32"
        )
    return reason


def _why_not_codes(
    lhs: CodesFacts, rhs: CodesFacts, dims: DimensionNumbers
) -> str | None:
    """Why codes cannot be multiplied by codes; None if they can."""
    for side, operand in enumerate((lhs, rhs)):
        name = f"the {('left', 'right')[side]} operand"
        problem = _why_not_operand(operand, dims[0][side], dims[1][side], name)
        if problem:
            return problem
    all_integers = lhs.fmt.kind == rhs.fmt.kind == "integer"
    all_floats = is_native_float(lhs.fmt) and is_native_float(rhs.fmt)
    if not all_integers and not all_floats:
        return f"codes of {lhs.fmt.name} and {rhs.fmt.name} do not multiply natively"
    problem = _why_not_order(lhs, rhs, dims[0][0], dims[0][1])
    return problem or _why_not_groups(lhs, rhs)


def _why_not_operand(
    operand: CodesFacts, contracting: Sequence[int], batch: Sequence[int], name: str
) -> str | None:
    """Why the codes of one operand cannot be multiplied; None if they can."""
    problem = _why_not_axes(operand, contracting, batch, name)
    if problem:
        return problem
    if operand.offset is not None:
        return f"{name}, {operand.fmt.name}, has a real offset"
    if operand.codebook is not None:
        return f"{name}, {operand.fmt.name}, has its own codebook"
    return None


def _why_not_axes(
    operand: CodesFacts, contracting: Sequence[int], batch: Sequence[int], name: str
) -> str | None:
    """Why a product does not contract the rows of an operand; None if it does."""
    problem = _why_not_batch(operand, batch, name) or why_not_rows(operand.meta)
    if problem:
        return problem
    contracted = _negative(contracting, operand.ndim)
    shared = operand.meta.geometry.contracted
    if set(contracted) != set(shared):
        return (
            f"axes {sorted(contracted)} of {name} are contracted, not axes "
            f"{sorted(shared)}, along which its scales are shared"
        )
    if operand.input_scale:
        return f"{name} has an input_scale, and codes cannot be multiplied by it"
    return None


def _why_not_order(
    lhs: CodesFacts,
    rhs: CodesFacts,
    lhs_contracting: Sequence[int],
    rhs_contracting: Sequence[int],
) -> str | None:
    """Why rows of both operands have different orders of codes; None if they agree."""
    lhs_order = _flattening_order(lhs, lhs_contracting)
    if lhs_order == _flattening_order(rhs, rhs_contracting):
        return None
    return "the contracted axes are flattened in different orders"


def _why_not_batch(operand: CodesFacts, batch: Sequence[int], name: str) -> str | None:
    """Why the product's batch axes are not those of the operand; None if they are."""
    axes = [axis % operand.ndim for axis in batch]
    num_batch = len(operand.batch_shape)
    if axes == list(range(num_batch)):
        return None
    return (
        f"the product has batch axes {axes} of {name}, which has {num_batch} leading "
        "batch axes"
    )


def _contracts_rows(weight: CodesFacts, dims: DimensionNumbers, side: int) -> bool:
    """True if a product contracts the axes along which `input_scale` varies."""
    contracted = set(_negative(dims[0][side], weight.ndim))
    same_axes = contracted == set(weight.meta.geometry.contracted)
    return same_axes and _why_not_batch(weight, dims[1][side], "") is None


def _flattening_order(operand: CodesFacts, contracting: Sequence[int]) -> list[int]:
    """The positions in `contracting` of the axes that the operand flattens to k."""
    pairs = _negative(contracting, operand.ndim)
    return [pairs.index(axis) for axis in operand.meta.geometry.contracted]


def _why_not_groups(lhs: CodesFacts, rhs: CodesFacts) -> str | None:
    """Why the groups along k do not match; None if they match."""
    geometries = (lhs.meta.geometry, rhs.meta.geometry)
    sizes = [geometry.block_shape[-1] for geometry in geometries]
    groups = [geometry.num_blocks[-1] for geometry in geometries]
    any_flat = any(geometry.flat for geometry in geometries)
    equal = groups[0] == groups[1] and sizes[0] == sizes[1]
    if any_flat or 0 in groups or (1 not in groups and not equal):
        return f"their groups along k differ ({sizes[0]} and {sizes[1]})"
    return None


def plan_of_term(plan: Plan, lhs: Any, rhs: Any) -> Plan:
    """The plan of a product of parts, if the products are summed over devices.

    The terms are not rounded before the sum. If codes are multiplied and each row has
    one scale, the terms are int32 and are scaled after the sum. So the result has the
    bits of one device.

    Args:
      plan: the plan of the whole product.
      lhs: the whole left operand after the preparations `plan.before`.
      rhs: the whole right operand.
    """
    sides = facts_of(lhs), facts_of(rhs)
    is_integer = plan.path == "codes" and _has_integer_sum(*sides)
    return dataclasses.replace(plan, result="int32" if is_integer else "float32")


def _has_integer_sum(lhs: Facts, rhs: Facts) -> bool:
    """True if int32 holds the whole sum of codes, and rows have one scale."""
    for operand in (lhs, rhs):
        if not isinstance(operand, CodesFacts) or operand.fmt.kind != "integer":
            return False
        if row_shapes(operand)["scale"].shape[-1] != 1:
            return False
    assert isinstance(lhs, CodesFacts)
    assert isinstance(rhs, CodesFacts)
    longest = largest_exact_length(
        row_meta(lhs.meta), lhs.symmetric, row_meta(rhs.meta), rhs.symmetric
    )
    return rhs.meta.geometry.contracted_size <= longest


# Kernels.


def plan_on_platform(
    lhs: Any, rhs: Any, dims: DimensionNumbers, platform: str, num_devices: int = 1
) -> Plan:
    """`plan_dot` with the kernel that runs on a platform, or why none runs.

    Args:
      lhs: as in `plan_dot`.
      rhs: as in `plan_dot`.
      dims: as in `plan_dot`.
      platform: "cpu", "tpu", "cuda", ...
      num_devices: the number of devices over which XLA partitions the program.

    Raises:
      TypeError: as in `plan_dot`.
      ValueError: as in `plan_dot`.
    """
    sides = lhs, rhs = facts_of(lhs), facts_of(rhs)
    plan = _plan_product(lhs, rhs, dims, "float32")
    if plan.path == "codes" and plan.x_dtype is None:
        codes = _codes_problem(plan, lhs, rhs, dims)
        choice = choose_on(platform, codes, num_devices, "codes")
    else:
        problem = _kernel_problem(plan, lhs, rhs, dims)
        choice = choose_on(platform, problem, num_devices)
    if choice.reason is not None and plan.outlier_product is not None:
        # The product of the outlier columns may still have a kernel.
        lhs, rhs = _without_activation(lhs), _without_activation(rhs)
        problem = _kernel_problem(plan.outlier_product, lhs, rhs, dims)
        choice = choose_on(platform, problem, num_devices)
    activation = _activation_choice(plan, *sides, dims, platform, num_devices)
    return _with_activation_choice(with_choice(plan, choice, platform), activation)


def derivative_on_platform(
    lhs: Any, rhs: Any, dims: DimensionNumbers, platform: str, num_devices: int = 1
) -> Plan:
    """The plan of the product that computes the gradient of the activation.

    The gradient passes straight through a quantized activation. So it is the gradient
    of the product in floats. It contracts the axes of the weight that the product
    keeps.

    Args:
      lhs: as in `plan_dot`. At least one operand is not quantized.
      rhs: as in `plan_dot`.
      dims: dimension numbers of the product itself.
      platform: as in `plan_on_platform`.
      num_devices: as in `plan_on_platform`.
    """
    lhs, rhs = _without_activation(facts_of(lhs)), _without_activation(facts_of(rhs))
    forward = _plan_product(lhs, rhs, dims, "float32")
    gradient = "the gradient of the activation"
    if forward.path == "weight_only":
        path = "weight_only_transposed"
        reason = f"{gradient} adds up the products of blocks of decoded rows"
    elif forward.path == "weight_only_transposed":
        path, reason = "weight_only", f"{gradient} decodes codes in blocks of rows"
    else:
        path, reason = forward.path, f"{gradient}: {forward.reason}"
    plan = Plan(
        path,
        forward.accumulate,
        forward.swapped,
        reason,
        x_dtype=forward.x_dtype,
        result=forward.x_dtype or forward.result,
    )
    problem = _kernel_problem(plan, lhs, rhs, dims)
    return with_choice(plan, choose_on(platform, problem, num_devices), platform)


def _with_activation_choice(plan: Plan, choice: kernels.Choice | None) -> Plan:
    """The plan with what quantizes the activation; None if it is not quantized."""
    if choice is None:
        return plan
    return dataclasses.replace(
        plan,
        activation_kernel=choice.backend,
        why_no_activation_kernel=choice.reason,
    )


def _activation_choice(
    plan: Plan,
    lhs: Facts,
    rhs: Facts,
    dims: DimensionNumbers,
    platform: str,
    num_devices: int,
) -> kernels.Choice | None:
    """What quantizes the activation on a platform; None if it is not quantized."""
    if plan.activation is None:
        return None
    swapped = "quantize_right" in plan.before
    x, weight = (rhs, lhs) if swapped else (lhs, rhs)
    assert isinstance(x, ArrayFacts)
    assert isinstance(weight, CodesFacts)
    activation, _, _ = _quantized_sides(x, weight, dims, swapped=swapped)
    return _choose_activation(plan.activation, activation, platform, num_devices)


def _choose_activation(
    kind: Literal["dynamic", "static"],
    activation: CodesFacts,
    platform: str,
    num_devices: int,
) -> kernels.Choice:
    """What quantizes an activation with these facts on a platform."""
    if kind == "static":
        reason = "a static range leaves only one launch"
        return kernels.Choice("xla", reason, preferred=True)
    problem = activation_problem(activation)
    return choose_on(platform, problem, num_devices, "activation")


def _without_activation(operand: Facts) -> Facts:
    if isinstance(operand, CodesFacts):
        return operand.without_activation()
    return operand


def _codes_problem(
    plan: Plan, lhs: Facts, rhs: Facts, dims: DimensionNumbers
) -> kernels.CodesProblem | str:
    """A product of codes as kernels see it, or why no kernel computes it."""
    lhs, rhs, _ = _operands_after(plan, lhs, rhs, dims)
    sides = []
    for operand in (rhs, lhs) if plan.swapped else (lhs, rhs):
        assert isinstance(operand, CodesFacts)
        fields: dict[str, Any] = dict.fromkeys(kernels.Rows._fields)
        fields.update(row_shapes(operand))
        sides += [kernels.Rows(**fields), row_meta(operand.meta)]
    return kernels.codes_problem(*sides)


def _kernel_problem(
    plan: Plan, lhs: Facts, rhs: Facts, dims: DimensionNumbers
) -> kernels.Problem | str:
    """The product as a `kernels.Problem`, or the reason why no kernel computes it.

    Args:
      plan: the plan of the product.
      lhs: the facts of the left operand before the preparations `plan.before`.
      rhs: the facts of the right operand before the preparations `plan.before`.
      dims: the dimension numbers before the preparations `plan.before`.
    """
    lhs, rhs, dims = _operands_after(plan, lhs, rhs, dims)
    is_weight_only = plan.path in ("weight_only", "weight_only_transposed")
    if not is_weight_only and plan.x_dtype is None:
        return _NO_KERNEL
    x_side = 1 if plan.swapped else 0
    x, weight = (rhs, lhs) if plan.swapped else (lhs, rhs)
    assert isinstance(weight, CodesFacts)
    leaves = row_shapes(weight)
    call = kernels.Call(
        row_meta(weight.meta),
        tuple(leaves),
        plan.result,
        transposed=plan.path == "weight_only_transposed",
    )
    num_rows = _free_size(x, dims[0][x_side], dims[1][x_side])
    stack, geometry = math.prod(weight.batch_shape), weight.meta.geometry
    summed = geometry.kept if call.transposed else geometry.contracted
    length = math.prod(geometry.shape[axis] for axis in summed)
    x_rows = jax.ShapeDtypeStruct((stack, num_rows, length), plan.x_dtype)
    return kernels.problem_of(call, x_rows, list(leaves.values()))


def _operands_after(
    plan: Plan, lhs: Facts, rhs: Facts, dims: DimensionNumbers
) -> tuple[Facts, Facts, DimensionNumbers]:
    """The operands and the dimension numbers after the preparations `plan.before`."""
    for step in plan.before:
        if step == "dequantize_left":
            assert isinstance(lhs, CodesFacts)
            lhs = lhs.dequantized()
            continue
        if step in ("scale_left", "scale_right"):
            continue  # the factors change neither the shapes nor the codes
        swapped = step == "quantize_right"
        x, weight = (rhs, lhs) if swapped else (lhs, rhs)
        assert isinstance(x, ArrayFacts)
        assert isinstance(weight, CodesFacts)
        lhs, rhs, dims = _quantized_sides(x, weight, dims, swapped=swapped)
    return lhs, rhs, dims


# Convolutions.


def plan_conv(
    x: Any,
    kernel: QTensor,
    *,
    channel: int,
    batch: int = 0,
    mixed: bool = False,
) -> Plan:
    """The plan for a convolution of any kind with a quantized kernel.

    Args:
      x: array, `jax.ShapeDtypeStruct` or QTensor. If the activation spec has one scale
        for each example, only the dtype, the number of axes and the size of the batch
        axis matter. A small array is then enough.
      kernel: QTensor; the leaves may be `jax.ShapeDtypeStruct`s.
      channel: the axis of `kernel` that becomes the features of the result.
      batch: the batch axis of `x`.
      mixed: True if one example of the result is a sum over several examples of `x`
        (`batch_group_count` above 1).

    Returns:
      A plan with the path "codes" (integer codes, sums in int32) or "dequantize" (both
      operands in floats, sums in float32).

    Raises:
      TypeError: the kernel has an activation spec, and `x` is an array that is not
        float32, bfloat16 or float16.
      ValueError: the kernel has an activation spec that does not fit the shape of `x`.
        Or the kernel has an outlier threshold, or both an input scale and an activation
        spec.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from jaxq.ops import plan_conv
      >>> kernel = jaxq.quantize(jnp.ones((3, 3, 4, 8)), "int8", contracting=(0, 1, 2))
      >>> x = jax.ShapeDtypeStruct((1, 5, 5, 4), jnp.float32)
      >>> plan_conv(x, kernel.with_activation("int8"), channel=3).path
      'codes'
    """
    x_facts, kernel_facts = facts_of(x), facts_of(kernel)
    assert isinstance(kernel_facts, CodesFacts)
    if kernel.meta.outliers is not None:
        raise ValueError(
            f"conv_general_dilated: {kernel!r} has an outlier threshold, and the input "
            "of a convolution has no columns. Use with_activation without outliers=."
        )
    if kernel_facts.input_scale and kernel.meta.activation is not None:
        raise ValueError(
            f"conv_general_dilated: {kernel!r} has an input_scale and quantizes its "
            "input. The input cannot be multiplied first, because the factors differ "
            "between the positions of the window. Use kernel.with_activation(None), "
            "or kernel.with_input_scale(None)."
        )
    batch, channel = batch % x_facts.ndim, channel % kernel_facts.ndim
    spec, bare_kernel = kernel_facts.meta.activation, kernel_facts.without_activation()
    if spec is None or isinstance(x_facts, CodesFacts):
        return _plan_conv(x_facts, bare_kernel, channel, batch, mixed, _Prepared())
    contracting = tuple(axis for axis in range(x_facts.ndim) if axis != batch)
    activation = activation_facts(x_facts, spec, contracting)
    kind = _activation_kind(kernel_facts)
    prepared = _Prepared().left_quantized(spec.fmt.name, kind)
    return _plan_conv(activation, bare_kernel, channel, batch, mixed, prepared)


def _plan_conv(
    x: Facts,
    kernel: CodesFacts,
    channel: int,
    batch: int,
    mixed: bool,
    prepared: _Prepared,
) -> Plan:
    problem = "the input is not quantized"
    if isinstance(x, CodesFacts):
        problem = _why_not_conv_codes(x, kernel, batch, channel)
        if not problem and mixed and math.prod(x.meta.geometry.num_blocks) > 1:
            problem = "batch groups add up examples with different scales"
    if problem:
        reason = f"the whole kernel is dequantized, because {problem}"
        return prepared.plan("dequantize", reason)
    assert isinstance(x, CodesFacts)
    reason = f"{x.fmt.name} x {kernel.fmt.name} convolution of codes"
    return prepared.plan("codes", reason, "int32")


def _why_not_conv_codes(
    x: CodesFacts, kernel: CodesFacts, batch: int, channel: int
) -> str | None:
    """Why the codes of `x` and `kernel` cannot be convolved; None if they can."""
    for name, operand, kept in (("input", x, batch), ("kernel", kernel, channel)):
        geometry = operand.meta.geometry
        is_symmetric = operand.symmetric and operand.offset is None
        is_integer = operand.fmt.kind == "integer" and operand.codebook is None
        if not is_symmetric or not is_integer:
            return f"the {name}, {operand.fmt.name}, is not in symmetric integers"
        if operand.input_scale:
            return f"the {name} has an input_scale"
        if operand.batch_shape or geometry.flat or geometry.num_blocks[-1] != 1:
            granularity = operand.meta.spec.granularity
            return f"the {name} has several scales for one output, {granularity}"
        blocks = zip(geometry.kept, geometry.num_blocks, strict=False)
        scaled_axes = {axis for axis, num_blocks in blocks if num_blocks > 1}
        if scaled_axes - {kept - operand.ndim}:
            return f"the {name} has scales along axes {sorted(scaled_axes)}"
    # int32 must hold the sum of all products of extreme codes.
    num_terms = math.prod(kernel.shape) // kernel.shape[channel]
    largest = [int(max(op.fmt.max, -op.fmt.min)) for op in (x, kernel)]
    if num_terms * math.prod(largest) > _INT32_MAX:
        return f"the sum of {num_terms} products may exceed int32"
    return None


# Rows of a table, and rows sorted by expert.


def check_table(table: QTensor) -> None:
    """Raises a ValueError unless `take` can dequantize single rows of a table.

    The table must be `[n, d]` with scales shared along axis -1, and without tiles
    (`PerBlock`) of several rows.
    """
    geometry = table.meta.geometry
    is_matrix = geometry.order == (-2, -1) and geometry.num_contracted == 1
    if not is_matrix or geometry.flat or table.batch_shape:
        raise ValueError(
            "take: the table must be [n, d] with scales shared along axis -1, got "
            f"{table!r}. Quantize it with contracting=(-1,)."
        )
    if geometry.block_shape[0] not in (1, None):
        raise ValueError(
            f"take: the blocks of {table!r} cross rows. "
            "Use jaxq.dequantize(table)[indices]."
        )


def ragged_x_dtype(x: Any, weights: QTensor) -> str:
    """The dtype in which `ragged_dot` multiplies the rows of `x` by weights.

    Args:
      x: the rows, sorted by expert.
      weights: the stack of quantized weights.

    Raises:
      ValueError: the weights are not `[e, k, n]` quantized with `contracting=-2` and
        `batch=0`, or the weights have blocks that cross rows (`PerFlat`).
    """
    geometry = weights.meta.geometry
    is_stack = len(weights.batch_shape) == 1 and geometry.contracted == (-2,)
    if not is_stack or geometry.kept != (-1,) or why_not_rows(weights.meta):
        raise ValueError(
            "ragged_dot: weights must be [e, k, n], quantized with contracting=-2 and "
            f"batch=0, and their blocks must not cross rows; got {weights!r}."
        )
    return x.dtype.name if x.dtype == weights.dtype else "float32"


def ragged_activation(x: Any, weights: QTensor) -> CodesFacts | None:
    """The facts of the quantized rows of `ragged_dot`; None without activation spec.

    Args:
      x: the rows, sorted by expert, `[m, k]`.
      weights: the stack of quantized weights.

    Raises:
      ValueError: the spec does not fit the shape of `x`, rows share a scale, or there
        is an outlier threshold.
    """
    spec = weights.meta.activation
    if spec is None:
        return None
    if weights.meta.outliers is not None:
        raise ValueError(
            f"ragged_dot: {weights!r} has an outlier threshold, and outlier columns "
            "differ between experts. Use with_activation without outliers=."
        )
    m, k = x.shape
    # With a static range, rows are a batch axis: each row has the range of its expert.
    is_static = weights.input_range is not None
    shape, batch = ((m, 1, k), (0,)) if is_static else ((m, k), ())
    facts = ArrayFacts(shape, x.dtype.name)
    activation = activation_facts(facts, spec, (len(shape) - 1,), batch)
    geometry = activation.meta.geometry
    *kept, _ = geometry.block_shape
    if not is_static and (geometry.flat or any(block != 1 for block in kept)):
        raise ValueError(
            f"ragged_dot: the activation spec of {weights!r} has "
            f"{spec.granularity} scales, which rows of several experts would share. "
            "Use PerToken() or PerGroup(size), or a static range (bounds=)."
        )
    return activation


def ragged_rows_dtype(x: Any, weights: QTensor) -> str:
    """The dtype in which `ragged_dot` multiplies quantized rows by weights.

    "int8" and float8 mean that codes with one scale per row are multiplied as they are.
    This is exact, as in a product with one weight. Where codes become floats again, the
    dtype is float32 if the product with one weight multiplies codes, because a narrower
    dtype would round scaled weights.

    Args:
      x: the rows, sorted by expert, `[m, k]`.
      weights: the stack of quantized weights with an activation spec.

    Raises:
      ValueError: as in `ragged_activation`.
    """
    activation, weight = ragged_activation(x, weights), facts_of(weights)
    assert activation is not None
    assert isinstance(weight, CodesFacts)
    x_dtype, fmt = ragged_x_dtype(x, weights), weight.fmt
    if weight.offset is not None or weight.codebook is not None:
        return x_dtype
    if activation.offset is not None or activation.codebook is not None:
        return x_dtype
    is_codes = activation.fmt.name == "int8" or is_native_float(activation.fmt)
    has_one_scale = activation.scale.shape[-1] == 1
    if fmt.kind == "integer" and is_codes and activation.symmetric and has_one_scale:
        return activation.fmt.name
    has_exact_groups = is_exact_in_float8(fmt) and not has_one_scale
    if fmt.kind == "integer" or is_native_float(fmt) or has_exact_groups:
        return "float32"
    return x_dtype


def plan_ragged(x: Any, weights: QTensor, platform: str, num_devices: int = 1) -> Plan:
    """The plan of `ragged_dot`, with the kernel that runs on a platform.

    Args:
      x: array or `jax.ShapeDtypeStruct` `[m, k]`.
      weights: the stack of quantized weights; the leaves may be shapes.
      platform: "cpu", "tpu", "cuda", ...
      num_devices: the number of devices over which XLA partitions the program.

    Raises:
      ValueError: as in `ragged_x_dtype`.
    """
    x_dtype, facts = ragged_x_dtype(x, weights), facts_of(weights)
    assert isinstance(facts, CodesFacts)
    activation = ragged_activation(x, weights)
    if activation is not None:
        x_dtype = ragged_rows_dtype(x, weights)
    leaves = row_shapes(facts)
    call = kernels.Call(row_meta(weights.meta), tuple(leaves), "float32")
    problem = kernels.ragged_problem(
        call, x.shape[0], list(leaves.values()), jnp.dtype(x_dtype)
    )
    choice = choose_on(platform, problem, num_devices, "ragged")
    prepared = _Prepared()
    if facts.input_scale:
        prepared = prepared.input_scaled(swapped=False)
    path, activation_choice = "weight_only", None
    if activation is not None:
        kind = _activation_kind(facts)
        prepared = prepared.left_quantized(activation.fmt.name, kind)
        activation_choice = _choose_activation(kind, activation, platform, num_devices)
        if x_dtype == activation.fmt.name:
            path = "codes"
        else:
            problem = f"its codes are multiplied in {x_dtype}"
            prepared = prepared.left_dequantized(problem)
    reason = f"each row is multiplied by the {facts.fmt.name} weight of its expert"
    if path == "codes":
        reason += ", without rounding, and the scale of the row multiplies the result"
    else:
        reason += _widening(x.dtype.name, facts.dtype)
    plan = prepared.plan(path, reason, x_dtype=x_dtype)
    plan = _with_activation_choice(plan, activation_choice)
    return with_choice(plan, choice, platform)


# Dtypes of sums and results.


def accumulate_dtype(*operands: Any) -> np.dtype:
    """The dtype in which products of these operands are summed.

    It is the dtype that the operands promote to. The exceptions are narrow dtypes:
    int32 for integers below 32 bits, float32 for floats below 32 bits.
    """
    return _accumulate_dtype(*(jnp.dtype(operand.dtype) for operand in operands))


def result_dtype(*operands: Any) -> np.dtype:
    """The dtype of a product without `preferred_element_type`.

    It is the dtype that the operands promote to. The exceptions are integers below 32
    bits and float8: for them it is the dtype of the sums.
    """
    dtypes = [jnp.dtype(operand.dtype) for operand in operands]
    promoted = _promoted(dtypes)
    if jnp.issubdtype(promoted, jnp.floating) and promoted.itemsize == 2:
        return promoted
    return _accumulate_dtype(*dtypes)


def _accumulate_dtype(*dtypes: np.dtype) -> np.dtype:
    promoted = _promoted(dtypes)
    if promoted.itemsize >= 4 or promoted == jnp.bool:
        return promoted
    is_integer = jnp.issubdtype(promoted, jnp.integer)
    return jnp.dtype(jnp.int32 if is_integer else jnp.float32)


def _promoted(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The dtype that all promote to. float8 promotes only to the same float8."""

    def promote(a: np.dtype, b: np.dtype) -> np.dtype:
        return a if a == b else jnp.promote_types(a, b)

    return functools.reduce(promote, dtypes)


# Axes.


def _negative(axes: Sequence[int], ndim: int) -> list[int]:
    return [axis - ndim if axis >= 0 else axis for axis in axes]


def _free_size(x: Facts, contracting: Sequence[int], batch: Sequence[int]) -> int:
    """The number of rows of `x` in each product: the size of the free axes of `x`."""
    bound = {axis % x.ndim for axis in (*contracting, *batch)}
    return math.prod(size for axis, size in enumerate(x.shape) if axis not in bound)
