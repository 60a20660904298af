"""Packing: all widths, orders and units against numpy, and bytes of other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import (
    Packing,
    as_signed,
    codes_per_pack,
    default_packing,
    field,
    pack,
    unpack,
)
from tests.arrays import assert_same
from tests.tables import thinned

SUB_BYTE = [Packing.HALVES, Packing.LOW_FIRST, Packing.HIGH_FIRST]
CASES = [
    *((bits, order) for bits in (1, 2, 4) for order in SUB_BYTE),
    *((b, Packing.BITSTREAM) for b in range(1, 9)),
]
FEW = [
    (4, Packing.HALVES),
    (2, Packing.HALVES),
    (4, Packing.LOW_FIRST),
    (1, Packing.HIGH_FIRST),
]
FEW += [(bits, Packing.BITSTREAM) for bits in (3, 5, 8)]
over_cases = pytest.mark.parametrize(
    ("bits", "order"), thinned(CASES, FEW), ids=lambda v: getattr(v, "value", v)
)


def random_codes(bits: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(np.uint8)


def by_bits(codes: np.ndarray, bits: int, order: Packing, unit: int) -> np.ndarray:
    """One row of codes as bytes. numpy unpacks and packs the bits, lowest bit first."""
    code_bits = np.unpackbits(codes[:, None], axis=1, bitorder="little")
    code_bits = code_bits[:, :bits]  # [n, bits]
    per_byte = 8 // bits
    if order is Packing.HALVES:
        # Byte j has the codes j, j + unit/per_byte, ... of its unit.
        code_bits = code_bits.reshape(-1, per_byte, unit // per_byte, bits)
        code_bits = code_bits.swapaxes(1, 2)
    elif order is Packing.HIGH_FIRST:
        code_bits = code_bits.reshape(-1, per_byte, bits)[:, ::-1]
    return np.packbits(code_bits.reshape(-1), bitorder="little")


@over_cases
def test_bytes_equal_those_of_numpy(bits, order):
    codes = random_codes(bits, 48)
    units = (48, 16) if order is Packing.HALVES else (None,)
    expected = [by_bits(codes, bits, order, unit or 48) for unit in units]

    @jax.jit
    def pack_and_unpack(codes, stored):
        packed = [pack(codes, bits, order, unit=unit) for unit in units]
        unpacked = [
            unpack(data, bits, order, unit=unit)
            for data, unit in zip(stored, units, strict=True)
        ]
        return packed, unpacked

    packed, unpacked = pack_and_unpack(codes, expected)
    assert_same(packed, expected)
    assert_same(unpacked, [codes] * len(units))


@over_cases
def test_round_trip(bits, order):
    # One program for all shapes: empty rows, one row, several rows, rows under vmap.
    units = (None, 16, 32) if order is Packing.HALVES else (None,)
    inputs = [random_codes(bits, *shape) for shape in ((0,), (3, 0), (32,), (2, 3, 64))]

    def round_trip(codes, unit=None):
        packed = pack(codes, bits, order, unit=unit)
        assert packed.shape == (*codes.shape[:-1], codes.shape[-1] * bits // 8)
        return unpack(packed, bits, order, unit=unit)

    @jax.jit
    def round_trips(inputs):
        results = [[round_trip(codes, unit) for codes in inputs] for unit in units]
        return results, jax.vmap(round_trip)(inputs[-1])

    results, mapped = round_trips(inputs)
    for unpacked in results:
        assert_same(unpacked, inputs)
    assert_same(mapped, inputs[-1])


@over_cases
def test_signed_codes_keep_their_sign(bits, order):
    if bits == 1:
        return  # one bit has no sign
    codes = random_codes(bits, 48).astype(np.int16) - (1 << (bits - 1))
    codes = codes.astype(np.int8)

    def round_trip(codes):
        return as_signed(unpack(pack(codes, bits, order), bits, order), bits)

    @jax.jit
    def round_trips(*inputs):
        return [round_trip(codes) for codes in inputs]

    for unpacked in round_trips(codes, codes.astype(np.int32)):
        np.testing.assert_array_equal(unpacked, codes)


def test_no_packing_returns_the_same_array():
    codes = jnp.asarray(random_codes(8, 5))
    assert pack(codes, 8, Packing.NONE) is codes
    assert unpack(codes, 8, Packing.NONE) is codes


def test_compressed_tensors_words():
    # The rows are -8 to -1 and 0 to 7, with 8 added. The layout "pack-quantized" has
    # little-endian int32 words.
    rows = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    packed = np.asarray(pack(jnp.asarray(rows + np.int8(8)), 4, Packing.LOW_FIRST))
    assert packed.view("<u4").tolist() == [[0x76543210], [0xFEDCBA98]]


def test_bitsandbytes_bytes():
    # The first of two codes is in the upper half of the byte.
    codes = jnp.asarray([1, 2, 15, 0], jnp.uint8)
    assert pack(codes, 4, Packing.HIGH_FIRST).tolist() == [0x12, 0xF0]


def test_gguf_q4_0_blocks():
    # Byte j of a block of 32 has element j in its low bits and element j + 16 in its
    # high bits.
    codes = random_codes(4, 64)
    packed = np.asarray(pack(jnp.asarray(codes), 4, Packing.HALVES, unit=32))
    packed = packed.reshape(2, 16)
    blocks = codes.reshape(2, 32)
    np.testing.assert_array_equal(packed & 15, blocks[:, :16])
    np.testing.assert_array_equal(packed >> 4, blocks[:, 16:])


@pytest.mark.parametrize(("bits", "unit"), [(4, 8), (4, 64), (2, 16), (1, 32)])
def test_the_last_unit_may_be_shorter(bits, unit):
    codes = random_codes(bits, 40)
    packed = pack(jnp.asarray(codes), bits, Packing.HALVES, unit=unit)
    whole = 40 // unit * unit
    cut = [(codes[:whole], unit), (codes[whole:], 40 - whole)]
    expected = [by_bits(part, bits, Packing.HALVES, n) for part, n in cut if part.size]
    np.testing.assert_array_equal(packed, np.concatenate(expected))
    assert unpack(packed, bits, Packing.HALVES, unit=unit).tolist() == codes.tolist()
    inner = pack(jnp.asarray(codes)[:, None], bits, Packing.HALVES, unit=unit, axis=0)
    np.testing.assert_array_equal(inner[:, 0], packed)


def test_gptq_three_bit_words():
    # 32 codes fill three little-endian 32-bit words. The 11th code has bits in both the
    # first and the second word.
    codes = random_codes(3, 32)
    stream = sum(int(code) << (3 * i) for i, code in enumerate(codes))
    packed = np.asarray(pack(jnp.asarray(codes), 3, Packing.BITSTREAM))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(3)]
    assert packed.view("<u4").tolist() == words


def test_field():
    packed = jnp.asarray([0b11100100], jnp.uint8)
    assert [field(packed, i, 2).item() for i in range(4)] == [0, 1, 2, 3]


def test_default_packing_and_codes_per_pack():
    assert {bits: default_packing(bits).value for bits in range(1, 9)} == {
        **dict.fromkeys((1, 2, 4), "halves"),
        **dict.fromkeys((3, 5, 6, 7), "bitstream"),
        8: "none",
    }
    assert default_packing(16) is Packing.NONE
    counts = [codes_per_pack(bits, Packing.BITSTREAM) for bits in range(1, 9)]
    assert counts == [8, 4, 8, 2, 8, 4, 8, 1]


def test_sizes_that_do_not_fit_raise():
    codes = jnp.zeros((2, 30), jnp.uint8)
    with pytest.raises(ValueError, match="takes codes of 1, 2 or 4 bits, not 3"):
        pack(codes, 3, Packing.LOW_FIRST)
    message = "pack: 30 codes do not fill whole bytes: halves takes a multiple of 4"
    with pytest.raises(ValueError, match=message):
        pack(codes, 2, Packing.HALVES)
    message = "pack: 30 codes do not fill whole bytes: bitstream takes a multiple of 8"
    with pytest.raises(ValueError, match=message):
        pack(codes, 3, Packing.BITSTREAM)
    with pytest.raises(ValueError, match="unit 15 must be a positive multiple of 2"):
        pack(codes, 4, Packing.HALVES, unit=15)
    with pytest.raises(ValueError, match="unit 0 must"):
        pack(codes, 4, Packing.HALVES, unit=0)
    with pytest.raises(ValueError, match="unpack: unit 21"):
        unpack(codes, 4, Packing.HALVES, unit=21)
    with pytest.raises(ValueError, match="unpack: a row of 31 bytes .* has 3 bytes"):
        unpack(jnp.zeros((2, 31), jnp.uint8), 3, Packing.BITSTREAM)
    for bits in (0, 9, 16):
        with pytest.raises(ValueError, match="1 to 8 bits"):
            pack(codes, bits, Packing.BITSTREAM)
