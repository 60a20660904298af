"""How a float array travels between devices: as codes and scales.

A float array is one row of numbers on the wire. Neighbouring numbers share a scale.
The last group may be shorter. Codes of 4 bits travel in pairs, two to a byte.

Every leaf travels as an unsigned integer of its width. Some backends convert an array
of float8 or bfloat16 to a wider dtype before they send it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxq.meshes import explicit_spec, names_in
from jaxq.qtensor import (
    PerGroup,
    QTensor,
    QuantSpec,
    as_spec,
    check_floats,
    check_key,
    dequantize,
    quantize,
)

AxisName = Any  # a name or a tuple of names, as in jax.lax
# The number of neighbours that share a scale, for presets without groups.
_GROUP = 256


def wire_spec(spec: str | QuantSpec, caller: str, argument: str = "spec") -> QuantSpec:
    """The spec by which a row of numbers is quantized. It has `PerGroup`.

    Args:
      spec: preset name or `QuantSpec`. A preset without groups gets groups of 256.
      caller: the public function, for error messages.
      argument: the name of the argument, for error messages.

    Raises:
      TypeError: `spec` is neither a name nor a `QuantSpec`.
      ValueError: the preset is unknown, or a `QuantSpec` has no groups.
    """
    resolved = as_spec(spec, f"{caller}: {argument}")
    granularity = resolved.granularity
    if isinstance(granularity, PerGroup):
        size = granularity.size
    elif isinstance(spec, str):
        size = _GROUP
    else:
        raise ValueError(
            f"{caller}: {argument}= has granularity {granularity}, but scales on the "
            "wire belong to groups of neighbouring numbers. Use "
            f"spec.replace(granularity=jaxq.PerGroup({_GROUP}))."
        )
    return resolved.replace(granularity=PerGroup(size, pad=True))


def device_key(
    key: Array | None, axis_name: AxisName, specs: list[QuantSpec], caller: str
) -> Array | None:
    """A key that differs between devices; None if no spec rounds stochastically.

    Raises:
      ValueError: a spec needs a key and `key` is None, or no spec needs it.
    """
    num_devices(axis_name, caller)  # raises if the axis is not mapped
    levels = tuple(level for spec in specs for level in spec.levels)
    check_key(levels, key, caller)
    if key is None:
        return None
    return jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def encode(rows: Array, spec: QuantSpec, key: Array | None, step: int = 0) -> QTensor:
    """Quantizes rows of numbers; a NaN or an infinity makes its group NaN.

    Args:
      rows: float `[n]`, or `[num_rows, n]`. No group belongs to two rows.
      spec: a result of `wire_spec`.
      key: a result of `device_key`.
      step: a number that differs between the arrays that share a key.
    """
    batch = tuple(range(rows.ndim - 1))
    if not spec.needs_key:
        key = None
    elif key is not None:
        key = jax.random.fold_in(key, step)
    return quantize(
        rows, spec, contracting=-1, batch=batch, key=key, on_nonfinite="propagate"
    )


def decode(qt: QTensor) -> Array:
    """The float32 numbers of rows that `encode` quantized."""
    return dequantize(qt, dtype=jnp.float32)


def exchange_and_sum(
    pieces: Array, axis_name: AxisName, spec: QuantSpec, key: Array | None, step: int
) -> tuple[Array, Array]:
    """Sends piece i to device i, and sums what the device receives.

    Args:
      pieces: float32 `[num_devices, n]`.
      axis_name: the mapped axes.
      spec: a result of `wire_spec`.
      key: a result of `device_key`.
      step: as in `encode`.

    Returns:
      The sum of the pieces for this device, float32 `[n]`. And what rounding took away
      from each piece that it sent, float32 `[num_devices, n]`.
    """
    sent = encode(pieces, spec, key, step)
    received = move(sent, lambda leaf: jax.lax.all_to_all(leaf, axis_name, 0, 0))
    return decode(received).sum(axis=0), pieces - decode(sent)


def move(qt: QTensor, collective: Callable[[Array], Array]) -> QTensor:
    """Applies a collective to the bits of each leaf."""
    return jax.tree.map(lambda leaf: move_leaf(leaf, collective), qt)


def move_leaf(leaf: Array, collective: Callable[[Array], Array]) -> Array:
    """Applies a collective to the bits of one array."""
    bits = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    words = jax.lax.bitcast_convert_type(leaf, bits)
    return jax.lax.bitcast_convert_type(collective(words), leaf.dtype)


def num_devices(axis_name: AxisName, caller: str) -> int:
    """The number of devices along the mapped axes.

    Raises:
      ValueError: the function is not mapped over such an axis.
    """
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"{caller}: no axis {axis_name!r} is mapped here. Call {caller} inside "
            "jax.shard_map over a mesh with this axis."
        ) from None


def position_of_axis(
    axis: int, ndim: int, caller: str, argument: str, path: str
) -> int:
    """The axis as a number of at least 0.

    Raises:
      ValueError: there is no such axis.
    """
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"{caller}: {argument}={axis} does not exist. For {path} it must be in "
            f"[{-ndim}, {ndim})."
        )
    return axis % ndim


def varying_axes(x: Array) -> frozenset[Any]:
    """The mapped axes along which jax knows that `x` differs between devices.

    It is always empty with `jax.shard_map(..., check_vma=False)`.
    """
    return jax.typeof(x).manual_axis_type.varying


def as_varying(x: Array, axis_name: AxisName) -> Array:
    """The array with a type that may differ between devices along the mapped axes."""
    if not is_type_checked(axis_name):
        return x
    names = names_in(axis_name)
    missing = tuple(name for name in names if name not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def is_type_checked(axis_name: AxisName) -> bool:
    """Whether types tell which arrays differ between devices (`check_vma=True`)."""
    return bool(varying_axes(jax.lax.axis_index(axis_name)))


def float_array(leaf: Any, path: str, axis_name: AxisName, caller: str) -> Array:
    """The leaf of a tree as an array that can be flattened on each device.

    Raises:
      TypeError: it is not a float32, bfloat16 or float16 array.
      ValueError: it is sharded over a mesh axis that is not mapped.
    """
    array = jnp.asarray(leaf)
    check_floats(array.dtype, array.shape, path, caller)
    entries = [entry for entry in explicit_spec(array) if entry is not None]
    if entries:
        raise ValueError(
            f"{caller}: {path} is sharded over the mesh axes {entries}, which are not "
            f"mapped. Only {axis_name!r} is. Leave out axis_names= of jax.shard_map, "
            "or add these axes, so that the function gets the part of each device."
        )
    return array
