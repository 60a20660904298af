"""Bytes, 32-bit words, and codes with an offset instead of a sign.

Words are little endian, as in the files: the lowest byte of a word comes first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.formats import Packing
from jaxq.meshes import compile_time_eval


def word_bytes(words: jax.Array) -> jax.Array:
    """`[..., n]` of any width of whole bytes as uint8 `[..., n * itemsize]`."""
    if words.dtype.itemsize == 1:
        return lax.bitcast_convert_type(words, jnp.uint8)
    parts = lax.bitcast_convert_type(words, jnp.uint8)  # [..., n, itemsize]
    return parts.reshape(*words.shape[:-1], -1)


def int32_words(data: jax.Array) -> jax.Array:
    """uint8 `[..., 4 n]` as int32 `[..., n]`."""
    parts = data.reshape(*data.shape[:-1], data.shape[-1] // 4, 4)
    return lax.bitcast_convert_type(parts, jnp.int32)


def float16_at(blocks: jax.Array, start: int) -> jax.Array:
    """The float16 in two bytes of each block: uint8 `[..., size]` to `[...]`."""
    return lax.bitcast_convert_type(blocks[..., start : start + 2], jnp.float16)


def bytes_of_float16(values: jax.Array) -> jax.Array:
    """float16 `[...]` as uint8 `[..., 2]`."""
    return lax.bitcast_convert_type(values, jnp.uint8)


def flip_signs(data: jax.Array, bits: int, packing: Packing) -> jax.Array:
    """Packed signed codes as codes plus 2^(bits-1), or the reverse.

    Both differ in the highest bit of each code.

    Args:
      data: packed codes `[..., bytes]`, uint8, or int8 codes that are not packed.
      bits: width of a code.
      packing: how the codes are packed.
    """
    if bits == 8:
        return lax.bitcast_convert_type(data, jnp.uint8) ^ np.uint8(0x80)
    num_codes = 8 if packing is Packing.BITSTREAM else 8 // bits
    tops = np.full(num_codes, 1 << (bits - 1), np.uint8)
    with compile_time_eval():
        pattern = np.asarray(formats.pack(jnp.asarray(tops), bits, packing))
    repeats = -(-data.shape[-1] // pattern.size)
    row = np.tile(pattern, repeats)[: data.shape[-1]]
    return data ^ row.reshape(*(1,) * (data.ndim - 1), -1)
