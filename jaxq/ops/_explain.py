"""`explain`: what `dot_general` or `ragged_dot` does on a platform, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxq.ops._decision import (
    derivative_on_platform,
    plan_on_platform,
    plan_ragged,
)
from jaxq.ops._dimension_numbers import (
    DimensionNumbers,
    align_matmul,
    as_tuples,
    check_sizes,
    nonnegative,
)
from jaxq.ops._operands import Operand, check_float_partner, check_one_mesh, value_of
from jaxq.ops._plan import Plan
from jaxq.ops._plan_of_parts import mesh_of, plan_of_parts, plan_of_ragged_parts
from jaxq.ops._platform_choice import known_platform, num_devices_of
from jaxq.ops._ragged import check_ragged
from jaxq.qtensor import QTensor, TrainedWeight


def explain(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers | None = None,
    *,
    group_sizes: Any = None,
    platform: str | None = None,
    derivative: bool = False,
    mesh: Any = None,
) -> Plan:
    """Which path `dot_general` takes, which kernel runs it, and why.

    With `group_sizes`, it explains `jaxq.ops.ragged_dot` instead. `KVCache.explain`
    explains attention over a quantized KV cache.

    Nothing is computed. On a mesh each device multiplies its parts of the operands, and
    runs its own kernel. The plan says which parts, and which collectives there are.
    This needs mesh axes of type Explicit. Otherwise XLA partitions the product, and no
    kernel runs.

    Args:
      lhs: array, `jax.ShapeDtypeStruct` or QTensor. A `TrainedWeight` multiplies as
        its `quantize()`.
      rhs: likewise.
      dimension_numbers: as in `dot_general`. None uses the dimension numbers of
        `matmul`.
      group_sizes: integers `[e]` or their `jax.ShapeDtypeStruct`, as in `ragged_dot`.
        Then `lhs` are the rows of x and `rhs` are the weights of the experts. Only the
        shape matters.
      platform: "cpu", "tpu", "cuda", "gpu" (the same as "cuda") or "rocm"; None uses
        the default backend of jax.
      derivative: True explains the product that `jax.grad` runs for the gradient of the
        activation, instead of the product itself. In this product a `TrainedWeight`
        multiplies as its `fake_quant()`, an array of floats.
      mesh: a mesh, or a `jax.sharding.AbstractMesh`, that is in use when the product
        runs. The operands have the shardings of their arrays or
        `jax.ShapeDtypeStruct`s, and are replicated if they have none. None uses the
        mesh of operands with explicit axes, or that of `jax.set_mesh`.

    Returns:
      A `Plan`. Print it to read it.

    Raises:
      TypeError: `mesh` is not a mesh; or contracted or batch axes differ in size,
        repeat or do not exist; or integers or float64 numbers are multiplied by a
        QTensor; or `derivative` is True and both operands are quantized, so that no
        activation has a gradient.
      ValueError: `platform` is unknown; or `dimension_numbers` is None and `matmul`
        cannot multiply operands of these shapes; or the weight has an activation spec
        with which this product cannot be quantized; or `group_sizes` is given together
        with `dimension_numbers` or `derivative`.

      With `group_sizes`, it raises what `ragged_dot` raises.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> x, qt = jnp.ones((2, 32)), jaxq.quantize(jnp.eye(32), "nf4")
      >>> print(jaxq.explain(x, qt, platform="cpu"))
      weight_only (accumulates in float32): nf4 codes are decoded in blocks of rows
      >>> jaxq.explain(x, qt, platform="tpu").kernel
      'tpu'
      >>> jaxq.explain(x, qt, platform="tpu", derivative=True).kernel
      'tpu_transposed'
    """
    if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            "explain: mesh must be a jax.sharding.Mesh or AbstractMesh, got "
            f"{type(mesh).__name__}."
        )
    mesh = mesh_of(mesh, lhs, rhs)
    num_devices = num_devices_of(lhs, rhs)
    lhs, rhs = _as_described(lhs, derivative), _as_described(rhs, derivative)
    check_one_mesh((lhs, rhs), "explain")
    platform = known_platform(platform, "explain")
    if group_sizes is not None:
        if dimension_numbers is not None or derivative:
            raise ValueError(
                "explain: with group_sizes it explains ragged_dot, which has no "
                "dimension numbers and whose gradient runs in plain XLA. Leave out "
                "dimension_numbers and derivative."
            )
        check_ragged(lhs, rhs, _as_described(group_sizes, False), "explain")
        assert isinstance(rhs, QTensor)
        if mesh is None or mesh.size == 1:
            return plan_ragged(lhs, rhs, platform, num_devices)

        def plan_on_one(x: Any, weights: QTensor) -> Plan:
            return plan_ragged(x, weights, platform)

        plan = plan_of_ragged_parts(lhs, rhs, mesh, plan_on_one)
        if isinstance(plan, Plan):
            return plan
        return _partitioned(plan_ragged(lhs, rhs, platform, mesh.size), plan)
    if dimension_numbers is None:
        lhs, rhs, dims = align_matmul(lhs, rhs)
    else:
        dims = as_tuples(dimension_numbers, "explain")
    check_sizes(lhs, rhs, dims, "explain")
    check_float_partner(lhs, rhs, "explain")
    if derivative and isinstance(lhs, QTensor) and isinstance(rhs, QTensor):
        raise TypeError(
            f"explain: derivative=True needs a float operand, got {lhs!r} and {rhs!r}. "
            "Codes have no gradient. Pass the activation as an array."
        )
    if mesh is None or mesh.size == 1:
        plan = derivative_on_platform if derivative else plan_on_platform
        return plan(lhs, rhs, dims, platform, num_devices)
    return _plan_of_devices(lhs, rhs, dims, platform, mesh, derivative)


def _plan_of_devices(
    lhs: Any, rhs: Any, dims: Any, platform: str, mesh: Any, derivative: bool
) -> Plan:
    """The plan of a product whose parts are on the devices of a mesh."""
    dims = nonnegative(lhs, rhs, dims)
    plan_whole = derivative_on_platform if derivative else plan_on_platform

    def plan_on_one(lhs: Any, rhs: Any, dims: DimensionNumbers) -> Plan:
        return plan_whole(lhs, rhs, dims, platform)

    plan = plan_of_parts(lhs, rhs, dims, mesh, plan_on_one, derivative=derivative)
    if isinstance(plan, Plan):
        return plan
    return _partitioned(plan_whole(lhs, rhs, dims, platform, mesh.size), plan)


def _partitioned(plan: Plan, reason: str) -> Plan:
    """The plan of a product that XLA partitions, with the reason."""
    return dataclasses.replace(plan, why_no_kernel=f"{plan.why_no_kernel} ({reason})")


def _as_described(operand: Any, derivative: bool) -> Any:
    """The operand as `dot_general` multiplies it, or its shapes.

    A trained weight becomes a QTensor of shapes, or an array of shapes in a derivative.
    Lists and numbers become arrays.
    """
    operand = value_of(operand)
    if isinstance(operand, TrainedWeight):
        values = TrainedWeight.fake_quant if derivative else TrainedWeight.quantize
        return jax.eval_shape(values, operand)
    return operand if hasattr(operand, "ndim") else jnp.asarray(operand)
