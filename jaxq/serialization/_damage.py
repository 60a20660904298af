"""Checks that the leaves of a QTensor from a file fit its description.

Reading a damaged file must raise an error. Otherwise the QTensor would fail later, or
give wrong numbers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxq import formats
from jaxq.qtensor import (
    Geometry,
    PerBlock,
    PerFlat,
    PerGroup,
    QTensor,
    QuantSpec,
    activation_problem,
    as_static,
    input_size,
    leaf_dtypes,
)

# An array in large groups has at most so many numbers of padding for each of its own.
_MOST_PADDING = 4096
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
# Arrays of these dtypes are stored as they are.
NATIVE = ("bool", *_INTEGERS, "float16", "float32", "float64")
_ML_DTYPES = [
    np.dtype(value)
    for value in vars(ml_dtypes).values()
    if isinstance(value, type) and issubclass(value, np.generic)
]
_DTYPES = {
    **{name: np.dtype(name) for name in NATIVE},
    **{dtype.name: dtype for dtype in _ML_DTYPES},
}


def dtype_of(name: Any) -> np.dtype | None:
    """The dtype with this name; None if no array of a file can have it.

    numpy understands more texts than names. It evaluates some of them.
    """
    return _DTYPES.get(name) if isinstance(name, str) else None


def damage_of(qt: QTensor, shape: tuple[int, ...], *, values: bool) -> str | None:
    """The first contradiction in a QTensor from a file, or None if there is none.

    Args:
      qt: the QTensor, made from the file without any check.
      shape: the shape that the file states.
      values: look at the codes too. If it is False, the leaves may be shapes.
    """
    return (
        _geometry_damage(qt, shape)
        or _presence_damage(qt)
        or _scale_damage(qt)
        or _activation_damage(qt)
        or _leaf_damage(qt, shape)
        or (_value_damage(qt) if values else None)
    )


def _geometry_damage(qt: QTensor, shape: tuple[int, ...]) -> str | None:
    """Contradictions among shape, axes, blocks and dtype."""
    geometry = qt.meta.geometry
    ndim = len(geometry.shape)
    if shape[len(shape) - ndim :] != geometry.shape:
        return f"shape {list(shape)} does not end in {list(geometry.shape)}"
    is_permutation = sorted(geometry.order) == list(range(-ndim, 0))
    if not is_permutation or not 0 <= geometry.num_contracted <= ndim:
        return (
            f"its geometry contradicts itself: it has {ndim} axes in the order "
            f"{list(geometry.order)}, and {geometry.num_contracted} of them are "
            "contracted"
        )
    padding_damage = _padding_damage(geometry)
    if padding_damage:
        return padding_damage
    if not geometry.follows(qt.spec.granularity):
        return (
            f"its spec says {qt.spec.granularity}, its geometry says blocks of "
            f"{list(geometry.block_shape)}"
        )
    dtype = dtype_of(qt.meta.dtype)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return f"it dequantizes to {qt.meta.dtype}, which is not a float dtype"
    return None


def _padding_damage(geometry: Geometry) -> str | None:
    """Blocks that are far larger than the array, so that computing fills memory."""
    if len(geometry.block_shape) != len(geometry.storage_shape):
        return f"its blocks are {list(geometry.block_shape)}"
    size = math.prod(geometry.storage_shape)
    if math.prod(geometry.padded_shape) > max(_MOST_PADDING * size, 1 << 20):
        return (
            f"its blocks of {list(geometry.block_shape)} are far larger than its shape "
            f"{list(geometry.shape)}"
        )
    return None


def _presence_damage(qt: QTensor) -> str | None:
    """Optional leaves that are missing, or that the spec does not have."""
    spec = qt.spec
    has_zero_point, has_offset = qt.zero_point is not None, qt.offset is not None
    if has_zero_point == spec.symmetric or has_offset == (spec.offset is None):
        return "its zero point or its offset is missing, or its spec does not have one"
    has_codebook = qt.codebook is not None
    needs_codebook = spec.rule.own_codebook
    # The method k-means finds a codebook for each array of a codebook format.
    may_have_codebook = needs_codebook or spec.fmt.kind == "codebook"
    unexpected = has_codebook and not may_have_codebook
    if unexpected or (needs_codebook and not has_codebook):
        return "its codebook is missing, or its spec does not allow one"
    if qt.input_range is not None and qt.meta.activation is None:
        return "it has an input_range, but its spec does not quantize inputs"
    return None


def _scale_damage(qt: QTensor) -> str | None:
    """Whether the scale is quantized as the spec says."""
    scale_spec = qt.spec.scale
    if isinstance(scale_spec, QuantSpec) != isinstance(qt.scale, QTensor):
        return "either its scale or the scale of its spec is quantized, but not both"
    if isinstance(qt.scale, QTensor) and qt.scale.spec != scale_spec:
        return "the spec of its quantized scale is not the `scale` of its own spec"
    return None


def _activation_damage(qt: QTensor) -> str | None:
    """An activation spec that no product with the QTensor could use."""
    activation, outliers = qt.meta.activation, qt.meta.outliers
    if activation is None:
        return None if outliers is None else "it has outliers and no activation spec"
    problem = activation_problem(activation, input_size(qt.meta))
    if problem:
        return f"its activation spec cannot be used: {problem}"
    block_size = _block_size(activation)
    if block_size > max(_MOST_PADDING * qt.meta.geometry.contracted_size, 1 << 20):
        return f"the blocks of its activation spec are too large: {block_size} elements"
    if qt.input_range is None:
        return None
    if outliers is not None:
        return "it has both an input_range and outliers"
    try:
        as_static(activation, "its input_range cannot be used")
    except ValueError as error:
        return str(error)
    return None


def _block_size(spec: QuantSpec) -> int:
    """The elements of a block that a granularity names. 0 if it names no sizes."""
    granularity = spec.granularity
    if isinstance(granularity, PerBlock):
        return math.prod(granularity.shape)
    return granularity.size if isinstance(granularity, PerGroup | PerFlat) else 0


def _leaf_damage(qt: QTensor, shape: tuple[int, ...]) -> str | None:
    """A leaf whose shape or dtype does not follow from spec and geometry."""
    for name, (expected_shape, dtype) in _expected_leaves(qt, shape).items():
        leaf: Any = getattr(qt, name)
        dtype_fits = dtype is None or leaf.dtype == dtype
        if tuple(leaf.shape) != expected_shape or not dtype_fits:
            return (
                f"{name} is {leaf.dtype}{list(leaf.shape)}, expected "
                f"{dtype or ''}{list(expected_shape)}"
            )
    return None


def _expected_leaves(
    qt: QTensor, shape: tuple[int, ...]
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each leaf by name. None means that any dtype is allowed."""
    spec, geometry = qt.spec, qt.meta.geometry
    batch = shape[: len(shape) - len(geometry.shape)]
    blocks = (*batch, *geometry.num_blocks)
    is_mean = spec.offset == "mean"
    shapes = {
        "data": (*batch, *qt.meta.stored_shape),
        "scale": blocks,
        "zero_point": blocks,
        "offset": (*batch, *(1,) * len(geometry.num_blocks)) if is_mean else blocks,
        "codebook": (*blocks, spec.fmt.codes().size),
        "input_range": (*batch, 2),
        "input_scale": (*batch, geometry.contracted_size),
    }
    dtypes = leaf_dtypes(qt.meta)
    return {
        name: (leaf_shape, dtypes.get(name))
        for name, leaf_shape in shapes.items()
        if getattr(qt, name) is not None
    }


def _value_damage(qt: QTensor) -> str | None:
    """Codes or zero points outside the codes of the format.

    Each part that this process has is looked at on its own device.
    """
    fmt = qt.spec.fmt
    zero_points = [] if qt.zero_point is None else _local_parts(qt.zero_point)
    for part in map(np.asarray, zero_points):
        if (part < fmt.min).any() or (part > fmt.max).any():
            return f"its zero point has numbers that are not codes of {fmt.name}"
    valid = np.sort(fmt.codes())
    if valid.size == 1 << fmt.bits and fmt.bits in (1, 2, 3, 4, 8):
        return None
    for part in _parts_of_codes(qt):
        invalid = np.setdiff1d(_codes_in(qt, part), valid)
        if invalid.size:
            return f"its data has codes that {fmt.name} does not have: {invalid[:4]}"
    return None


def _codes_in(qt: QTensor, data: jax.Array) -> np.ndarray:
    """The different codes in `data`, or in a part of it.

    Codes of the padding of blocks are left out: a file says how large blocks are.
    """
    fmt = qt.spec.fmt
    if qt.meta.layout == "columns":
        data = jnp.moveaxis(data, len(qt.batch_shape), -1)
    patterns = formats.unpack(data, fmt.bits, qt.meta.packing, unit=qt.meta.pack_unit)
    if fmt.code_dtype == np.int8:
        patterns = formats.as_signed(patterns, fmt.bits)
    return np.unique(np.asarray(patterns))


def _parts_of_codes(qt: QTensor) -> list[jax.Array]:
    parts = _local_parts(qt.data)
    bytes_of_pack = math.lcm(qt.spec.fmt.bits, 8) // 8
    is_packed = qt.meta.packing is not formats.Packing.NONE
    if is_packed and any(part.shape[-1] % bytes_of_pack for part in parts):
        # A code lies in two bytes of different devices.
        return [qt.data] if qt.data.is_fully_addressable else []
    return parts


def _local_parts(leaf: Any) -> list[jax.Array]:
    """The different parts of an array on the devices of this process."""
    if len(leaf.sharding.device_set) == 1:
        return [leaf]
    return list({str(s.index): s.data for s in leaf.addressable_shards}.values())
