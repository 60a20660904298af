"""The operands of a product: arrays and QTensors, which may be in Flax variables."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
