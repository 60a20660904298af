"""Codes of fewer than 8 bits, several to a byte, in a stated order.

The order is data, because the ecosystem has many. Over a row of codes cut into units of `unit` codes:

| order | byte j of a unit holds | who |
|---|---|---|
| HALVES | code j in the low bits, code j + unit/2 above (4 bits; quarters at 2 bits, eighths at 1) | jaxq, GGUF |
| LOW_FIRST | neighbours, the first in the low bits | torchao, compressed-tensors, MX, NVFP4 |
| HIGH_FIRST | neighbours, the first in the high bits | bitsandbytes |
| BITSTREAM | code i at bits [i*b, (i+1)*b) of a little-endian stream; any width | GPTQ, compressed-tensors |

HALVES is the default for widths that divide 8: unpacking it is a shift and a mask on contiguous bytes, and a
matmul can take the halves apart instead of interleaving codes. Other widths are packed as BITSTREAM.
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
    """The order of codes inside bytes; see the module's table."""

    NONE = "none"
    HALVES = "halves"
    LOW_FIRST = "low_first"
    HIGH_FIRST = "high_first"
    BITSTREAM = "bitstream"


def default_packing(bits: int) -> Packing:
    """One code a byte at 8 bits and above, HALVES at 1, 2 and 4, BITSTREAM at 3, 5, 6 and 7."""
    if bits >= 8:
        return Packing.NONE
    return Packing.HALVES if 8 % bits == 0 else Packing.BITSTREAM


def codes_per_pack(bits: int, packing: Packing) -> int:
    """The number of codes that fill whole bytes: a packed row's length is a multiple of it.

    Raises:
      ValueError: the order does not exist at this width.
    """
    if packing is Packing.NONE:
        return 1
    if not 1 <= bits <= 8:
        raise ValueError(
            f"packing {packing.value!r} takes codes of 1 to 8 bits, not {bits}."
        )
    if packing is Packing.BITSTREAM:
        return 8 // math.gcd(8, bits)
    if bits == 8 or 8 % bits:
        raise ValueError(
            f"packing {packing.value!r} takes codes of 1, 2 or 4 bits, not {bits}. Use 'bitstream'."
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
      codes: integers `[..., n, ...]`; the low `bits` bits of each count (two's complement for negative ones).
      bits: width of a code, 1 to 8.
      packing: the order; NONE returns the codes as they are.
      unit: HALVES only: how many codes one unit has; None takes the whole row. Divides n.
      axis: which axis; packing where it stands in memory is faster than moving it last first.

    Returns:
      uint8 `[..., n * bits / 8, ...]`.

    Raises:
      ValueError: n is not a multiple of what fills whole bytes, or of the unit.
    """
    if packing is Packing.NONE:
        return codes
    axis %= codes.ndim
    fields, n = codes_per_pack(bits, packing), codes.shape[axis]
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    unit = _check_unit("pack", n, fields, packing, unit)
    codes = codes.astype(jnp.uint8) & np.uint8((1 << bits) - 1)
    if packing is Packing.BITSTREAM:
        return jnp.moveaxis(
            _pack_bitstream(jnp.moveaxis(codes, axis, -1), bits, fields), -1, axis
        )
    shifts = [bits * i for i in range(fields)]
    if packing is Packing.HALVES:
        rows = codes.reshape(
            *before, n // unit if unit else 0, fields, unit // fields, *after
        )
    else:
        rows = codes.reshape(*before, n // fields, fields, *after)
    if packing is Packing.HIGH_FIRST:
        shifts.reverse()
    parts = [
        lax.index_in_dim(rows, i, axis + 1, keepdims=False) << np.uint8(shifts[i])
        for i in range(fields)
    ]
    packed = functools.reduce(jnp.bitwise_or, parts)
    if (
        packing is Packing.HALVES
        and axis == codes.ndim - 1
        and (unit // fields) % 4 == 0
    ):
        return _flatten_units(packed)
    return packed.reshape(*before, n // fields, *after)


def _flatten_units(units: jax.Array) -> jax.Array:
    """`[..., u, b] -> [..., u * b]` by way of 4-byte words: a fence on XLA:CPU, nothing elsewhere.

    Flattened as bytes, units are folded into the loop that computes the codes. The scale's index then changes within
    the inner loop, which no longer vectorizes: three to six times slower.
    """
    words = lax.bitcast_convert_type(
        units.reshape(*units.shape[:-1], units.shape[-1] // 4, 4), jnp.uint32
    )
    flat = lax.bitcast_convert_type(
        words.reshape(*units.shape[:-2], units.shape[-2] * words.shape[-1]), jnp.uint8
    )
    return flat.reshape(*units.shape[:-2], units.shape[-2] * units.shape[-1])


def unpack(
    packed: jax.Array, bits: int, packing: Packing, *, unit: int | None = None
) -> jax.Array:
    """The codes behind `pack`, as unsigned bit patterns.

    Args:
      packed: uint8 `[..., n * bits / 8]`.
      bits: width of a code.
      packing: the order it was packed in.
      unit: as in `pack`, counted in codes.

    Returns:
      uint8 `[..., n]`; sign-extend with `as_signed` for two's complement codes.

    Raises:
      ValueError: the row is not whole packs, or the unit does not divide it.
    """
    if packing is Packing.NONE:
        return packed
    if packing is Packing.BITSTREAM:
        return _unpack_bitstream(packed, bits)
    fields = codes_per_pack(bits, packing)
    n = packed.shape[-1] * fields
    if packing is Packing.HALVES:
        unit = _check_unit("unpack", n, fields, packing, unit)
        rows = packed.reshape(
            *packed.shape[:-1], n // unit if unit else 0, unit // fields
        )
        parts = [field(rows, i, bits) for i in range(fields)]
        return jnp.stack(parts, axis=-2).reshape(*packed.shape[:-1], n)
    order = range(fields) if packing is Packing.LOW_FIRST else reversed(range(fields))
    return jnp.stack([field(packed, i, bits) for i in order], axis=-1).reshape(
        *packed.shape[:-1], n
    )


def field(packed: jax.Array, index: int, bits: int) -> jax.Array:
    """Bits `[index * bits, (index + 1) * bits)` of every byte, uint8 of the same shape."""
    return (packed >> np.uint8(index * bits)) & np.uint8((1 << bits) - 1)


def as_signed(patterns: jax.Array, bits: int) -> jax.Array:
    """Two's complement bit patterns of `bits` bits as int8 numbers."""
    if bits == 8:
        return patterns.astype(jnp.int8)
    up = np.int8(8 - bits)
    return (patterns.astype(jnp.int8) << up) >> up


def _check_unit(
    caller: str, n: int, fields: int, packing: Packing, unit: int | None
) -> int:
    if n % fields:
        raise ValueError(
            f"{caller}: {n} codes do not fill whole bytes: {packing.value} takes {fields} at a time."
        )
    if packing is not Packing.HALVES or unit is None:
        return n
    if unit < 1 or n % unit or unit % fields:
        raise ValueError(
            f"{caller}: unit {unit} must divide the row of {n} codes and be a multiple of {fields}."
        )
    return unit


def _pack_bitstream(codes: jax.Array, bits: int, fields: int) -> jax.Array:
    num_bytes = fields * bits // 8
    groups = codes.reshape(*codes.shape[:-1], codes.shape[-1] // fields, fields)
    out = []
    for byte in range(num_bytes):
        total = jnp.zeros(groups.shape[:-1], jnp.uint8)
        for i in range(fields):
            shift = i * bits - byte * 8  # where code i starts, seen from this byte
            if -bits < shift < 8:
                code = groups[..., i]
                total = total | (
                    code << np.uint8(shift) if shift >= 0 else code >> np.uint8(-shift)
                )
        out.append(total)
    return jnp.stack(out, axis=-1).reshape(
        *codes.shape[:-1], codes.shape[-1] // fields * num_bytes
    )


def _unpack_bitstream(packed: jax.Array, bits: int) -> jax.Array:
    fields = codes_per_pack(bits, Packing.BITSTREAM)
    num_bytes = fields * bits // 8
    if packed.shape[-1] % num_bytes:
        raise ValueError(
            f"unpack: {packed.shape[-1]} bytes hold no whole pack: at {bits} bits, {num_bytes} at a time."
        )
    groups = packed.reshape(
        *packed.shape[:-1], packed.shape[-1] // num_bytes, num_bytes
    )
    out = []
    for i in range(fields):
        first, shift = divmod(i * bits, 8)
        code = groups[..., first] >> np.uint8(shift)
        if shift + bits > 8:
            code = code | (groups[..., first + 1] << np.uint8(8 - shift))
        out.append(code & np.uint8((1 << bits) - 1))
    return jnp.stack(out, axis=-1).reshape(
        *packed.shape[:-1], packed.shape[-1] // num_bytes * fields
    )
