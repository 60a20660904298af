"""Packing of codes with fewer than 8 bits, several codes to a byte.

Libraries pack in different orders, so the order is an argument: see `Packing`. HALVES
is the default for widths that divide 8. To unpack HALVES takes only a shift and a mask
of contiguous bytes. A matmul can use the halves one after the other, without
interleaving the codes. The default for other widths is BITSTREAM.
"""

from __future__ import annotations

import enum
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Packing(enum.Enum):
    """The order of codes inside bytes, and the libraries that use it.

    NONE: one code per byte.
    HALVES: a row is cut into units of `unit` codes. With 4 bits, byte j of a unit has
      code j in its low bits and code j + unit/2 in its high bits. With 2 bits a byte
      has four codes that are unit/4 apart, with 1 bit eight codes that are unit/8
      apart. If `unit` does not divide the row, the codes that are left are a shorter
      unit. Used by jaxq and GGUF.
    LOW_FIRST: a byte has neighbouring codes, the first in its low bits. Used by
      torchao, compressed-tensors, MX and NVFP4.
    HIGH_FIRST: a byte has neighbouring codes, the first in its high bits. Used by
      bitsandbytes.
    BITSTREAM: code i has bits [i*b, (i+1)*b) of a little-endian stream, for any width
      b. Used by GPTQ and compressed-tensors.

    Example:
      >>> import jaxq
      >>> jaxq.formats.Packing("low_first")
      <Packing.LOW_FIRST: 'low_first'>
    """

    NONE = "none"
    HALVES = "halves"
    LOW_FIRST = "low_first"
    HIGH_FIRST = "high_first"
    BITSTREAM = "bitstream"


def default_packing(bits: int) -> Packing:
    """Returns the order that jaxq uses for codes of `bits` bits.

    8 or more bits are not packed. HALVES is for 1, 2 and 4 bits. BITSTREAM is for 3, 5,
    6 and 7 bits.
    """
    if bits >= 8:
        return Packing.NONE
    return Packing.HALVES if 8 % bits == 0 else Packing.BITSTREAM


def codes_per_pack(bits: int, packing: Packing) -> int:
    """Returns the smallest number of codes that fill whole bytes.

    The length of a packed row must be a multiple of this number.

    Raises:
      ValueError: the order does not exist for this width.
    """
    if packing is Packing.NONE:
        return 1
    if not 1 <= bits <= 8:
        raise ValueError(
            f"packing {packing.value!r} takes codes of 1 to 8 bits, not {bits}. Use "
            "packing 'none'."
        )
    if packing is Packing.BITSTREAM:
        return 8 // math.gcd(8, bits)
    if bits == 8 or 8 % bits:
        raise ValueError(
            f"packing {packing.value!r} takes codes of 1, 2 or 4 bits, not {bits}. Use "
            "packing 'bitstream'."
        )
    return 8 // bits


def pack(
    codes: jax.Array,
    bits: int,
    packing: Packing,
    *,
    unit: int | None = None,
    axis: int = -1,
) -> jax.Array:
    """Packs one axis of `codes` into bytes.

    Args:
      codes: integers `[..., n, ...]`. Only the low `bits` bits of each code are used
        (two's complement for negative codes).
      bits: width of a code, 1 to 8.
      packing: order of the codes. NONE returns `codes` unchanged.
      unit: number of codes in one unit, for HALVES only. If it does not divide n, the
        last unit has the codes that are left. None makes the whole row one unit.
      axis: the axis to pack. Packing an inner axis is faster than moving it to the end
        first.

    Returns:
      uint8 `[..., n * bits / 8, ...]`.

    Raises:
      ValueError: the order does not exist for this width, or n codes or `unit` codes do
        not fill whole bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.formats import Packing, pack
      >>> codes = jnp.array([1, 2, 3, 4], jnp.uint8)
      >>> [hex(byte) for byte in pack(codes, 4, Packing.LOW_FIRST).tolist()]
      ['0x21', '0x43']
      >>> [hex(byte) for byte in pack(codes, 4, Packing.HALVES).tolist()]
      ['0x31', '0x42']
    """
    if packing is Packing.NONE:
        return codes
    axis %= codes.ndim
    fields = codes_per_pack(bits, packing)
    n = codes.shape[axis]
    unit = _checked_unit("pack", n, fields, packing, unit)
    codes = codes.astype(jnp.uint8) & np.uint8((1 << bits) - 1)
    if packing is Packing.BITSTREAM:
        packed = _pack_bitstream(jnp.moveaxis(codes, axis, -1), bits, fields)
        return jnp.moveaxis(packed, -1, axis)
    whole = n - n % unit if unit else n
    if whole < n:  # the last unit is shorter
        first, last = jnp.split(codes, [whole], axis=axis)
        units = pack(first, bits, packing, unit=unit, axis=axis)
        shorter = pack(last, bits, packing, axis=axis)
        return jnp.concatenate([units, shorter], axis=axis)
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    if packing is Packing.HALVES:
        num_units = n // unit if unit else 0
        rows = codes.reshape(*before, num_units, fields, unit // fields, *after)
    else:
        rows = codes.reshape(*before, n // fields, fields, *after)
    shifts = [bits * i for i in range(fields)]
    if packing is Packing.HIGH_FIRST:
        shifts.reverse()
    # The axis after `axis` counts the codes of one byte.
    parts = [
        lax.index_in_dim(rows, i, axis + 1, keepdims=False) << np.uint8(shift)
        for i, shift in enumerate(shifts)
    ]
    packed = functools.reduce(jnp.bitwise_or, parts)
    is_last_axis = axis == codes.ndim - 1
    if packing is Packing.HALVES and is_last_axis and (unit // fields) % 4 == 0:
        return _flatten_units(packed)
    return packed.reshape(*before, n // fields, *after)


def _flatten_units(units: jax.Array) -> jax.Array:
    """Reshapes bytes `[..., u, b]` to `[..., u * b]`, by way of 4-byte words.

    A plain reshape has the same result, but it takes three to six times as long on CPU.
    XLA fuses a plain reshape with the loop that computes the codes. The index of the
    scale then changes within the inner loop, so XLA does not vectorize that loop.
    """
    *leading, num_units, num_bytes = units.shape
    words = lax.bitcast_convert_type(
        units.reshape(*leading, num_units, num_bytes // 4, 4), jnp.uint32
    )
    flat = lax.bitcast_convert_type(
        words.reshape(*leading, num_units * (num_bytes // 4)), jnp.uint8
    )
    return flat.reshape(*leading, num_units * num_bytes)


def unpack(
    packed: jax.Array, bits: int, packing: Packing, *, unit: int | None = None
) -> jax.Array:
    """Unpacks the last axis of an array that `pack` returned, as unsigned codes.

    Args:
      packed: uint8 `[..., n * bits / 8]`.
      bits: width of a code, 1 to 8.
      packing: the order in which the codes were packed.
      unit: number of codes in one unit, as in `pack`.

    Returns:
      uint8 `[..., n]`. `as_signed` converts two's complement codes to negative numbers.

    Raises:
      ValueError: the order does not exist for this width, the bytes are not a whole
        number of packs, or `unit` codes do not fill whole bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.formats import Packing, unpack
      >>> unpack(jnp.array([0x21, 0x43], jnp.uint8), 4, Packing.LOW_FIRST).tolist()
      [1, 2, 3, 4]
    """
    if packing is Packing.NONE:
        return packed
    if packing is Packing.BITSTREAM:
        return _unpack_bitstream(packed, bits)
    fields = codes_per_pack(bits, packing)
    *leading, num_bytes = packed.shape
    n = num_bytes * fields
    if packing is Packing.HALVES:
        unit = _checked_unit("unpack", n, fields, packing, unit)
        whole = n - n % unit if unit else n
        if whole < n:  # the last unit is shorter
            first, last = jnp.split(packed, [whole // fields], axis=-1)
            units = unpack(first, bits, packing, unit=unit)
            shorter = unpack(last, bits, packing)
            return jnp.concatenate([units, shorter], axis=-1)
        rows = packed.reshape(*leading, n // unit if unit else 0, unit // fields)
        parts = [field(rows, i, bits) for i in range(fields)]
        return jnp.stack(parts, axis=-2).reshape(*leading, n)
    order = range(fields) if packing is Packing.LOW_FIRST else reversed(range(fields))
    parts = [field(packed, i, bits) for i in order]
    return jnp.stack(parts, axis=-1).reshape(*leading, n)


def field(packed: jax.Array, index: int, bits: int) -> jax.Array:
    """Returns bits `[index * bits, (index + 1) * bits)` of every byte, as uint8."""
    return (packed >> np.uint8(index * bits)) & np.uint8((1 << bits) - 1)


def as_signed(patterns: jax.Array, bits: int) -> jax.Array:
    """Converts unsigned codes of `bits` bits in two's complement to int8 numbers.

    Args:
      patterns: uint8, any shape, each below 2^bits.
      bits: width of a code, 1 to 8.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> jaxq.formats.as_signed(jnp.array([1, 7, 8, 15], jnp.uint8), 4).tolist()
      [1, 7, -8, -1]
    """
    if bits == 8:
        return patterns.astype(jnp.int8)
    # The sign bit moves to bit 7. The arithmetic shift back copies it.
    up = np.int8(8 - bits)
    return (patterns.astype(jnp.int8) << up) >> up


def _checked_unit(
    caller: str, n: int, fields: int, packing: Packing, unit: int | None
) -> int:
    """The number of codes in a unit, at most n.

    Raises:
      ValueError: the row of n codes or a unit does not fill whole bytes.
    """
    if n % fields:
        raise ValueError(
            f"{caller}: {n} codes do not fill whole bytes: {packing.value} takes a "
            f"multiple of {fields} codes. Pad the row with codes."
        )
    if packing is not Packing.HALVES or unit is None:
        return n
    if unit < 1 or unit % fields:
        raise ValueError(
            f"{caller}: unit {unit} must be a positive multiple of {fields} codes."
        )
    return min(unit, n)


def _pack_bitstream(codes: jax.Array, bits: int, fields: int) -> jax.Array:
    """Packs uint8 `[..., n]` as a little-endian stream, `fields` codes at a time."""
    *leading, n = codes.shape
    num_bytes = fields * bits // 8
    packs = codes.reshape(*leading, n // fields, fields)
    parts = []
    for byte in range(num_bytes):
        total = jnp.zeros(packs.shape[:-1], jnp.uint8)
        for i in range(fields):
            shift = i * bits - byte * 8  # first bit of code i, relative to this byte
            if not -bits < shift < 8:
                continue  # code i has no bit in this byte
            code = packs[..., i]
            if shift >= 0:
                total = total | (code << np.uint8(shift))
            else:
                total = total | (code >> np.uint8(-shift))
        parts.append(total)
    return jnp.stack(parts, axis=-1).reshape(*leading, n // fields * num_bytes)


def _unpack_bitstream(packed: jax.Array, bits: int) -> jax.Array:
    """Unpacks uint8 `[..., n * bits / 8]` to `[..., n]`, one pack at a time."""
    fields = codes_per_pack(bits, Packing.BITSTREAM)
    num_bytes = fields * bits // 8
    *leading, size = packed.shape
    if size % num_bytes:
        raise ValueError(
            f"unpack: a row of {size} bytes is not a whole number of packs. At {bits} "
            f"bits a pack has {num_bytes} bytes."
        )
    packs = packed.reshape(*leading, size // num_bytes, num_bytes)
    parts = []
    for i in range(fields):
        first, shift = divmod(i * bits, 8)
        code = packs[..., first] >> np.uint8(shift)
        if shift + bits > 8:  # the code continues in the next byte
            code = code | (packs[..., first + 1] << np.uint8(8 - shift))
        parts.append(code & np.uint8((1 << bits) - 1))
    return jnp.stack(parts, axis=-1).reshape(*leading, size // num_bytes * fields)
