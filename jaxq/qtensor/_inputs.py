"""Checks of the arguments of `quantize` and `fake_quant`: arrays, axes and keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq import formats
from jaxq.processes import has_remote_parts, to_numpy
from jaxq.qtensor._geometry import ErrorContext, Geometry, describe, resolve
from jaxq.qtensor._product_operand import ProductOperand
from jaxq.qtensor._qtensor import QTensor
from jaxq.qtensor._spec import QuantSpec

ON_NONFINITE = ("raise", "propagate", "zero", "saturate")
# The dtypes of float arrays that can be quantized, or multiplied by a QTensor.
FLOATS = ("float32", "bfloat16", "float16")


def check_input(
    w: Any,
    spec: QuantSpec,
    contracting: tuple[int, ...] | int | None,
    batch: tuple[int, ...] | int,
    *,
    caller: str,
    name: str,
) -> tuple[jax.Array, Geometry]:
    """The array to quantize and its geometry.

    Args:
      w: the argument that the user passed as the array.
      spec: how the array will be quantized.
      contracting: as in `quantize`.
      batch: as in `quantize`.
      caller: the public function, for error messages.
      name: the name of the array in error messages.

    Raises:
      TypeError: `w` is a QTensor or a `TrainedWeight`, or not a float32, bfloat16 or
        float16 array.
      ValueError: the format has no negative numbers, and the spec is symmetric without
        an offset; or the axes are not valid, as in `resolve`.
    """
    if isinstance(w, QTensor):
        raise TypeError(
            f"{caller}: {name} is already a QTensor: {w!r}. Pass "
            f"jaxq.dequantize({name}) to quantize it again."
        )
    if isinstance(w, ProductOperand):
        raise TypeError(
            f"{caller}: {name} must be a float array, got {w!r}. Pass {name}.floats, "
            f"the float weight, or {name}.fake_quant(), its quantized values."
        )
    dtype = np.dtype(getattr(w, "dtype", None) or np.asarray(w).dtype)
    if dtype.kind in "OSU":
        raise TypeError(
            f"{caller}: {name} must be one float array, got {type(w).__name__}. Call "
            f"{caller} separately for each array."
        )
    is_python = isinstance(w, float | list | tuple)
    if is_python and dtype == np.float64:
        dtype = np.dtype(np.float32)  # a Python number has no fixed width
    is_list = isinstance(w, list | tuple)
    check_floats(dtype, np.shape(w), name, caller, listed=is_list)
    if spec.symmetric and spec.offset is None and spec.fmt.min >= 0:
        raise ValueError(
            f"{caller}: {spec.fmt.name} has no negative numbers, and a symmetric spec "
            f"would clip all negative numbers of {name}. Use symmetric=False or "
            "offset='min'."
        )
    array = describe(dtype.name, np.shape(w))
    geometry = resolve(
        np.shape(w),
        spec.granularity,
        contracting,
        batch,
        context=ErrorContext(caller, name, array),
        multiple=formats.codes_per_pack(spec.fmt.bits, spec.order),
    )
    return jnp.asarray(w, dtype), geometry


def check_floats(
    dtype: Any, shape: tuple[int, ...], name: str, caller: str, *, listed: bool = False
) -> None:
    """Raises TypeError unless the dtype is float32, bfloat16 or float16.

    Args:
      dtype: the dtype of the array.
      shape: the shape of the array, for the error message.
      name: the name of the array in error messages.
      caller: the public function, for error messages.
      listed: True if the array is a Python list or tuple.

    Raises:
      TypeError: the dtype is not float32, bfloat16 or float16.

    Example:
      >>> import jaxq
      >>> jaxq.qtensor.check_floats("bfloat16", (2, 3), "w", "quantize")
    """
    dtype = np.dtype(dtype)
    if dtype.name in FLOATS:
        return
    if dtype.kind == "c":
        remedy = "Pass the real and imaginary parts."
    elif listed:
        remedy = f"Pass jnp.asarray({name}, jnp.float32)."
    else:
        remedy = f"Pass {name}.astype(jnp.float32)."
    raise TypeError(
        f"{caller}: {name} must be float32, bfloat16 or float16, got {name}: "
        f"{describe(dtype.name, shape)}. {remedy}"
    )


def raise_if_not_finite(
    x: jax.Array,
    name: str,
    caller: str,
    remedy: str = (
        "Clean the array, or pass on_nonfinite='zero', 'saturate' or 'propagate'."
    ),
) -> None:
    """Raises ValueError if `x` contains NaN or an infinity.

    Args:
      x: a float array that is not traced.
      name: the name of the array in error messages.
      caller: the public function, for error messages.
      remedy: the last sentence of the message.

    Raises:
      ValueError: `x` contains NaN or an infinity. The message contains the index of the
        first such number and how many there are.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> jaxq.qtensor.raise_if_not_finite(jnp.ones(3), "w", "quantize")
    """
    # `x` is concrete, but a function around this call may be traced.
    with jax.ensure_compile_time_eval():
        finite = jnp.isfinite(x)
        # An array of several processes is gathered only for the error.
        if has_remote_parts(finite) and bool(finite.all()):
            return
        finite = to_numpy(finite)
    if finite.all():
        return
    first = np.unravel_index(int(np.argmin(finite)), finite.shape)
    index = tuple(int(i) for i in first)
    number = to_numpy(x)[index].astype(np.float32)
    raise ValueError(
        f"{caller}: {name}[{', '.join(map(str, index))}] is {number}, one of "
        f"{int((~finite).sum())} non-finite numbers ({name}: "
        f"{describe(x.dtype.name, x.shape)}). {remedy}"
    )


def is_traced(x: Any) -> bool:
    """True inside jit, vmap and grad, where values are unknown."""
    return isinstance(x, Tracer)


def check_key(
    levels: tuple[QuantSpec, ...], key: jax.Array | None, caller: str
) -> None:
    """Checks that the user passed a key if one is needed, and only then.

    Args:
      levels: the specs of all levels, the outermost level first.
      key: the key that the user passed, or None.
      caller: the public function, for error messages.

    Raises:
      ValueError: a level rounds stochastically and `key` is None, or no level rounds
        stochastically and `key` is given.
    """
    is_stochastic = [level.rounding == "stochastic" for level in levels]
    if any(is_stochastic) and key is None:
        where = "" if is_stochastic[0] else " of the scale"
        raise ValueError(
            f"{caller}: rounding='stochastic'{where} needs a PRNG key. Pass "
            "key=jax.random.key(seed)."
        )
    if key is not None and not any(is_stochastic):
        raise ValueError(
            f"{caller}: key= was given but rounding={levels[0].rounding!r} does not "
            "use it. Use spec.replace(rounding='stochastic'), or leave out key=."
        )
