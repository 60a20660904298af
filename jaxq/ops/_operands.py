"""The operands of a product: arrays and QTensors, which may be in Flax variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxq.qtensor import QUANTIZED, QTensor, TrainedWeight, describe

Operand = jax.typing.ArrayLike | QTensor | TrainedWeight


def as_operands(*operands: Operand, caller: str) -> tuple[Any, ...]:
    """Takes operands out of Flax variables and makes jax arrays of all but QTensors.

    Raises:
      TypeError: one operand is a QTensor, and another operand is a numpy array whose
        dtype jax would narrow (int64 or float64 without `jax_enable_x64`).
    """
    values = [value_of(operand) for operand in operands]
    quantized = next((value for value in values if isinstance(value, QUANTIZED)), None)
    if quantized is not None:
        for value in values:
            if isinstance(value, np.ndarray) and _loses_dtype(value):
                check_float_partner(value, quantized, caller)
    return tuple(
        value if isinstance(value, QUANTIZED) else jnp.asarray(value)
        for value in values
    )


def check_one_mesh(operands: Sequence[Any], caller: str) -> None:
    """Raises ValueError if operands are on different meshes, one of them explicit.

    Args:
      operands: arrays, QTensors and other pytrees of arrays or shapes.
      caller: name of the function, for errors.
    """
    meshes = [(operand, _mesh_of_operand(operand)) for operand in operands]
    meshes = [(operand, mesh) for operand, mesh in meshes if mesh is not None]
    if not any(AxisType.Explicit in mesh.axis_types for _, mesh in meshes):
        return
    for operand, mesh in meshes[1:]:
        first, first_mesh = meshes[0]
        if tuple(mesh.shape.items()) != tuple(first_mesh.shape.items()):
            raise ValueError(
                f"{caller}: the operands are on different meshes. {_shown(first)} is "
                f"on the mesh {dict(first_mesh.shape)}, and {_shown(operand)} is on "
                f"the mesh {dict(mesh.shape)}. Move one of them with "
                "jaxq.sharding.place(operand, mesh, spec)."
            )


def _mesh_of_operand(operand: Any) -> Any:
    """The mesh of an array, or of the leaves of a pytree; None if there is none."""
    for leaf in jax.tree.leaves(operand):
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        sharding = leaf.sharding if is_shape else jax.typeof(leaf).sharding
        mesh = getattr(sharding, "mesh", None)
        if mesh is not None and not mesh.empty:
            return mesh
    return None


def _shown(operand: Any) -> str:
    """An operand in an error: the dtype and the shape of an array."""
    if isinstance(operand, jax.Array | jax.ShapeDtypeStruct):
        return describe(operand.dtype.name, operand.shape)
    return repr(operand)


def value_of(operand: Any) -> Any:
    """The value of a Flax variable; every other operand unchanged."""
    get_value = getattr(operand, "get_value", None)
    return operand if get_value is None else get_value()


def _loses_dtype(array: np.ndarray) -> bool:
    return jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype


def check_float_partner(lhs: Any, rhs: Any, caller: str) -> None:
    """Raises TypeError if integers or float64 numbers are multiplied by a QTensor."""
    for x, other in ((lhs, rhs), (rhs, lhs)):
        if isinstance(x, QUANTIZED) or not isinstance(other, QUANTIZED):
            continue
        shown = describe(x.dtype.name, x.shape)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{caller}: {shown} cannot be multiplied by {other!r}. Pass floats, or "
                "quantize this operand as well."
            )
        if x.dtype == jnp.float64:
            raise TypeError(
                f"{caller}: {shown} cannot be multiplied by {other!r}: products with a "
                "QTensor are summed in float32. Pass x.astype(jnp.float32)."
            )
