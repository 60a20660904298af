"""Words of codes: which bytes a thread reads, and the same arithmetic in two ways."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.kernels import _mosaic_gpu as kernel
from jaxq.kernels import _words

THREADS = np.arange(128)


def places(layout, shape):
    """The number of an array that each register of each thread holds.

    Returns:
      Flat indices `[warp, lane, *registers, vector]`.
    """
    layout = layout.to_mgpu()
    index = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        split = index.ndim - len(tile)
        pairs = [
            (size // t, t) for size, t in zip(index.shape[split:], tile, strict=True)
        ]
        index = index.reshape(
            *index.shape[:split], *(size for pair in pairs for size in pair)
        )
        outer, inner = range(split, index.ndim, 2), range(split + 1, index.ndim, 2)
        index = index.transpose(*range(split), *outer, *inner)
    (warp,), lanes = layout.warp_dims, layout.lane_dims
    moved = [index.ndim + dim for dim in (warp, *lanes, layout.vector_dim)]
    registers = [dim for dim in range(index.ndim) if dim not in moved]
    index = index.transpose(*moved[:-1], *registers, moved[-1])
    return index.reshape(4, 32, *index.shape[3:-1], index.shape[-1])


@pytest.mark.parametrize("function", [_words.and_xor, _words.choose_bits])
def test_lop3_computes_the_function(function):
    """The instruction takes bit 4 a + 2 b + c of its table for the bits a, b and c."""
    table = _words.lop3_table(function)
    for a, b, c in itertools.product((0, 1), repeat=3):
        assert table >> (4 * a + 2 * b + c) & 1 == function(a, b, c) & 1


def test_lop3_tables_are_those_of_the_manual():
    """PTX ISA, lop3: the table of a function is its value for 0xF0, 0xCC and 0xAA."""
    assert _words.lop3_table(lambda a, b, c: a & b & c) == 0x80
    assert _words.lop3_table(lambda a, b, c: a | b | c) == 0xFE
    assert _words.lop3_table(lambda a, b, c: a & b & ~c) == 0x40


def swizzled(data: np.ndarray, tile_bytes: int) -> np.ndarray:
    """Shared memory as TMA writes it: rows of 8, in tiles, pieces of 16 bytes moved."""
    rows, row_bytes = data.shape
    memory = np.empty(rows * row_bytes, data.dtype)
    for row, column in np.ndindex(rows, row_bytes):
        tile = row // 8 * (row_bytes // tile_bytes) + column // tile_bytes
        address = tile * 8 * tile_bytes + row % 8 * tile_bytes + column % tile_bytes
        flip = address >> 7 & (tile_bytes // 16 - 1)
        memory[address ^ flip << 4] = data[row, column]
    return memory


def bytes_of_threads(memory, row_bytes, tile_bytes, block, half, piece):
    """The bytes a0 a1 b0 b1 of every thread: `[128, 4]`."""
    piece_of_tile = piece % (tile_bytes // 16)
    offset = _words.code_offset(THREADS, row_bytes, tile_bytes, piece_of_tile)
    offset = offset + _words.fixed_offset(block, half, piece, row_bytes, tile_bytes)
    first = offset[:, None] + np.arange(2)
    return np.concatenate([memory[first], memory[first + _words.BLOCK]], axis=1)


@pytest.mark.parametrize("row_bytes", [16, 32, 64, 128, 256])
def test_threads_read_their_bytes(row_bytes):
    """Lane t reads bytes 2 t and 2 t + 1 of 8 bytes, in the rows that wgmma wants."""
    tile_bytes = min(row_bytes, 128)
    data = np.arange(128 * row_bytes).reshape(128, row_bytes)
    memory = swizzled(data, tile_bytes)
    lane = THREADS % 32
    for block, half, piece in np.ndindex(2, 2, row_bytes // 16):
        got = bytes_of_threads(memory, row_bytes, tile_bytes, block, half, piece)
        row = 64 * block + 16 * (THREADS // 32) + 8 * half + lane // 4
        column = 16 * piece + 2 * (lane % 4)
        expected = data[row[:, None], column[:, None] + np.array([0, 1, 8, 9])]
        np.testing.assert_array_equal(got, expected)


CASES = [(4, 32, False), (4, 64, False), (4, 128, True), (4, 64, True), (8, 0, False)]


@pytest.mark.parametrize(("bits", "unit", "is_table"), CASES)
def test_registers_and_interpreter_agree_on_columns(bits, unit, is_table):
    """A register holds the columns that wgmma takes from it, and they are in order.

    The words of the threads are decoded as arrays. The instructions compute the same
    functions. The expected columns come from the codes alone.
    """
    columns = 128
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << bits, (64, columns))
    data = codes
    if bits == 4:
        halves = codes.reshape(64, -1, 2, unit // 2)
        data = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(64, -1)
    row_bytes = data.shape[1]
    memory = swizzled(data.astype(np.uint8), min(row_bytes, 128))
    table = jnp.asarray(np.arange(256), jnp.uint32)
    table = (table & 15) | (table >> 4) << 16  # number i is the pattern i

    def decode(words):
        if is_table:
            return _words.look_up_pairs(_words.Arrays, words, table)
        return _words.decode_pairs(_words.Arrays, words, bits, False, "float16")[0]

    def numbers(pairs):  # uint16, without the base
        pairs = np.stack([np.asarray(pair) for pair in pairs], -1)
        halves = np.stack([pairs & 0xFFFF, pairs >> 16], -1)
        return halves if is_table else halves - _words.BASE["float16"][0]

    # The interpreter: all columns in order.
    words = _words.gather_array(jnp.asarray(data, jnp.uint8), is_table)
    arrays = _words.numbers_array(decode(words), bits, unit, jnp.uint16)
    base = 0 if is_table else _words.BASE["float16"][0]
    np.testing.assert_array_equal(np.asarray(arrays) - base, codes)

    # The registers: `[warp, lane, block of columns, half of 16 rows, number]`.
    of_registers = places(kernel._WEIGHTS, (64, columns))
    of_registers = of_registers.reshape(128, columns // 8, 2, 2)
    blocks = _words.column_blocks(row_bytes, bits, unit)
    order = [0, 1, 2, 3] if is_table else [0, 2, 1, 3]
    for piece, half in np.ndindex(row_bytes // 16, 2):
        got = bytes_of_threads(memory, row_bytes, min(row_bytes, 128), 0, half, piece)
        words = (got[:, order].astype(np.uint32) << (8 * np.arange(4))).sum(1)
        decoded = numbers(decode(jnp.asarray(words, jnp.uint32)))  # [128, pairs, 2]
        expected = codes.ravel()[of_registers[:, blocks[piece], half]]
        np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bytes_decode_exactly(dtype):
    """Every signed byte: the numbers minus the sign part minus the offset."""
    codes = np.arange(-128, 128).astype(np.int8)
    words = _words.gather_array(jnp.asarray(codes.reshape(1, -1)), False)
    parts = _words.decode_pairs(_words.Arrays, words, 8, True, dtype)
    first, *rest = (
        np.asarray(_words.numbers_array(part, 8, 0, jnp.dtype(dtype)), np.float64)
        for part in parts
    )
    weights = first - sum(rest) - _words.offset(8, True, dtype)
    np.testing.assert_array_equal(weights[0], codes)


def test_the_table_has_all_pairs():
    codebook = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)
    table = np.asarray(_words.pair_table(codebook, jnp.bfloat16))
    patterns = np.asarray(codebook.astype(jnp.bfloat16)).view(np.uint16)
    index = np.arange(256)
    np.testing.assert_array_equal(table & 0xFFFF, patterns[index % 16])
    np.testing.assert_array_equal(table >> 16, patterns[index // 16])
