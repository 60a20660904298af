"""Codes in 32-bit words: how the Hopper kernel decodes them, and in which order.

The same arithmetic runs in two ways. On the device a word is a register, and the
operations are machine instructions. In the interpreter a word is an array, and the
operations are those of jax. An operation that is one `lop3` instruction on the device
is written once, as a Python function of bits.

Which bytes a thread needs follows from wgmma. Its left operand comes from registers:
in every 8 columns, lane t of the four lanes of a row holds columns 2 * t and 2 * t + 1.
In memory these two columns are two neighbouring bytes, at byte 2 * t of 8 bytes:

- 8-bit codes: the bytes are the two codes.
- 4-bit codes in HALVES packing: the low halves of the bytes are two neighbouring codes,
  and the high halves are two more codes, half a unit later.

So a lane reads two bytes of each of two blocks of 8 bytes, and puts them into one word.
The columns of x then need no other order than the one in which they lie in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

# Columns of a block of 8 bytes, whose codes are neighbours.
BLOCK = 8

# A factor that writes a 16-bit pattern into both halves of a word.
_TWICE = 0x00010001

# For each dtype, the number whose last mantissa bit has the value 1: its bits, and its
# value.
BASE = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}


# Operations on three words that are one `lop3` instruction.


def and_xor(word: Any, mask: Any, flip: Any) -> Any:
    return (word & mask) ^ flip


def choose_bits(first: Any, second: Any, mask: Any) -> Any:
    """The bits of `first` where the mask is set, else the bits of `second`."""
    return (first & mask) | (second & ~mask)


def lop3_table(function: Callable) -> int:
    """The immediate of the `lop3` instruction that computes a function of three bits.

    Bit 4 * a + 2 * b + c of the immediate is the function's result for the bits a, b
    and c.
    """
    return function(0xF0, 0xCC, 0xAA) & 0xFF


class Arrays:
    """Operations on words as jax arrays, for the interpreter."""

    @staticmethod
    def lop3(function: Callable, word: Any, second: Any, third: int) -> Any:
        if isinstance(second, int):
            second = np.uint32(second)
        return function(word, second, np.uint32(third))

    @staticmethod
    def right(word: Any, count: int) -> Any:
        return word >> np.uint32(count) if count else word

    @staticmethod
    def left(word: Any, count: int) -> Any:
        return word << np.uint32(count)

    @staticmethod
    def look_up(table: Any, word: Any, byte: int) -> Any:
        """The entry of a table of 256 words that a byte of each word selects."""
        index = (word >> np.uint32(8 * byte)) & np.uint32(0xFF)
        return jnp.take(table, index.astype(jnp.int32))


class Registers:
    """Operations on words in registers, as MLIR values of type i32."""

    @staticmethod
    def lop3(function: Callable, word: Any, second: Any, third: int) -> Any:
        # The compiler makes two instructions of two operations with immediates.
        if isinstance(second, int):
            second = _constant(second)
        text = f"lop3.b32 $0, $1, $2, $3, {lop3_table(function):#x};"
        return _asm(text, word, second, _constant(third))

    @staticmethod
    def right(word: Any, count: int) -> Any:
        return arith.shrui(word, _constant(count)) if count else word

    @staticmethod
    def left(word: Any, count: int) -> Any:
        # A multiplication runs on the FMA pipe, which has time, unlike the ALU pipe.
        return arith.muli(word, _constant(1 << count))

    @staticmethod
    def look_up(table: Any, word: Any, byte: int) -> Any:
        """The entry of a table in shared memory. See `PairTable`."""
        return table.entry(word, byte)


def _constant(value: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, value if value < 1 << 31 else value - (1 << 32))


# Decoding.


def decode_pairs(
    operations: Any, word: Any, bits: int, signed: bool, dtype: str
) -> list[list]:
    """Decodes a word of two blocks of integer codes.

    Args:
      operations: `Arrays` or `Registers`.
      word: two bytes of each of two blocks, in the order of `gather_word`.
      bits: bits of a code, 4 or 8.
      signed: True for codes in two's complement.
      dtype: dtype of the numbers.

    Returns:
      Words with a pair of 16-bit numbers each, in the order of `column_blocks`. If
      there is a second list of such words, it must be subtracted from the first. The
      numbers are the codes plus `offset(bits, signed, dtype)`.
    """
    pattern, _ = BASE[dtype]
    shifts = (0, 8, 4, 12) if bits == 4 else (0, 8)
    shifted = [operations.right(word, shift) for shift in shifts]

    def fields(mask: int, flip: int) -> list:
        return [
            operations.lop3(and_xor, value, mask * _TWICE, flip * _TWICE)
            for value in shifted
        ]

    if not has_sign_part(bits, dtype):
        # The code becomes the last mantissa bits. A signed code plus 2^(bits - 1) is
        # not negative. In two's complement that is the same pattern with its sign bit
        # flipped.
        half = 1 << (bits - 1) if signed else 0
        return [fields((1 << bits) - 1, pattern + half)]
    # Only seven bits fit in the mantissa of 128. The eighth bit, which is the sign of
    # signed codes, goes into a second number: 128, or 256 if the bit is set. The second
    # number is subtracted from the first. For unsigned codes the eighth bit is flipped.
    flip = 0 if signed else 0x80
    return [fields(0x7F, pattern), fields(0x80, pattern ^ flip)]


def has_sign_part(bits: int, dtype: str) -> bool:
    """True if the eighth bit of a code does not fit in the mantissa of the dtype."""
    return bits == 8 and dtype == "bfloat16"


def offset(bits: int, signed: bool, dtype: str) -> int:
    """What must be subtracted from the numbers of `decode_pairs`."""
    if has_sign_part(bits, dtype):
        return 0 if signed else -128
    return BASE[dtype][1] + (1 << (bits - 1) if signed else 0)


def look_up_pairs(operations: Any, word: Any, table: Any) -> list:
    """Looks up the pairs of numbers of a word of two blocks of 4-bit codes.

    Args:
      operations: `Arrays` or `Registers`.
      word: two bytes of each of two blocks, in the order of `gather_word`.
      table: entry `i + 16 * j` has number i in its low half and number j in its high
        half.

    Returns:
      Words with a pair of 16-bit numbers each, in the order of `column_blocks`.
    """
    # A byte of an index has the same halves of two neighbouring bytes. Shifts to the
    # left leave the indices in bytes 1 and 3.
    left_4, left_8 = operations.left(word, 4), operations.left(word, 8)
    low = operations.lop3(choose_bits, left_8, left_4, 0x0F000F00)
    high = operations.lop3(choose_bits, left_4, word, 0x0F000F00)
    return [
        operations.look_up(table, index, byte)
        for index in (low, high)
        for byte in (1, 3)
    ]


def column_blocks(num_bytes: int, bits: int, unit: int) -> np.ndarray:
    """Which block of 8 columns each pair of a word belongs to.

    Args:
      num_bytes: bytes of a row.
      bits: bits of a code, 4 or 8.
      unit: number of codes in a HALVES unit, for 4 bits.

    Returns:
      `[words, pairs]`: `[num_bytes / 16, 4]` for 4 bits, `[num_bytes / 16, 2]` for 8.
    """
    if bits == 8:
        return np.arange(num_bytes // BLOCK).reshape(-1, 2)
    # [units, halves, words, 2]: the blocks of the low halves come first.
    blocks = np.arange(num_bytes // 4).reshape(-1, 2, unit // 32, 2)
    return blocks.transpose(0, 2, 1, 3).reshape(-1, 4)


def gather_array(data: jax.Array, together: bool) -> jax.Array:
    """The words of all lanes, as the interpreter has them.

    Args:
      data: bytes `[r, b]`.
      together: True for the order a0 a1 b0 b1 of the bytes, else a0 b0 a1 b1.

    Returns:
      uint32 `[r, b / 16, 4]`, with an axis of lanes.
    """
    rows, num_bytes = data.shape
    pairs = data.reshape(rows, num_bytes // 16, 2, 4, 2)  # [r, words, block, lane, 2]
    order = (0, 1, 3, 2, 4) if together else (0, 1, 3, 4, 2)
    return lax.bitcast_convert_type(
        pairs.transpose(order).reshape(rows, -1, 4, 4), jnp.uint32
    )


def numbers_array(pairs: list, bits: int, unit: int, dtype: Any) -> jax.Array:
    """Puts the pairs of all lanes into columns, as the interpreter has them.

    The order is that of `column_blocks`, written as a transpose: a kernel in the
    interpreter cannot contain an array of indices.

    Args:
      pairs: words `[r, w, 4]`.
      bits: bits of a code, 4 or 8.
      unit: number of codes in a HALVES unit, for 4 bits.
      dtype: dtype of the numbers.

    Returns:
      `[r, 8 * w * len(pairs)]`.
    """
    words = jnp.stack(pairs, 2)  # [r, w, pairs, lane]
    rows = words.shape[0]
    numbers = lax.bitcast_convert_type(words, dtype)  # [r, w, pairs, lane, 2]
    if bits == 4:
        # [r, units, words, halves, blocks of a word, columns]
        units = numbers.reshape(rows, -1, unit // 32, 2, 2, BLOCK)
        numbers = units.transpose(0, 1, 3, 2, 4, 5)
    return numbers.reshape(rows, -1)


@dataclasses.dataclass(frozen=True)
class Number:
    """A 32-bit number in a register, with the operators of Python's integers."""

    value: Any

    def __add__(self, other: Any) -> Number:
        return Number(arith.addi(self.value, _value(other)))

    def __mul__(self, other: Any) -> Number:
        return Number(arith.muli(self.value, _value(other)))

    def __and__(self, other: Any) -> Number:
        return Number(arith.andi(self.value, _value(other)))

    def __xor__(self, other: Any) -> Number:
        return Number(arith.xori(self.value, _value(other)))

    def __rshift__(self, other: Any) -> Number:
        return Number(arith.shrui(self.value, _value(other)))


def code_offset(thread: Any, row_bytes: int, tile_bytes: int, piece: int) -> Any:
    """Where a thread's first two bytes of a piece of 16 bytes lie in shared memory.

    They are in the first of the two rows of the thread. The codes lie in tiles of 8
    rows by `tile_bytes` bytes, one tile after the other along a row. Within a tile, TMA
    flips bits 4 to 6 of an address by bits 7 to 9.

    Args:
      thread: number of the thread, an integer or a `Number`.
      row_bytes: bytes of a row.
      tile_bytes: bytes of a row of a tile: 32, 64 or 128.
      piece: which 16 bytes of the tile's row.
    """
    warp, lane = (thread >> 5) & 3, thread & 31
    row_of_tile = (lane >> 2) * tile_bytes
    flip = (row_of_tile >> 3) & (tile_bytes - 16)
    start = warp * (16 * row_bytes) + row_of_tile + (lane & 3) * 2
    return start + (flip ^ (16 * piece))


def fixed_offset(
    block: int, half: int, piece: int, row_bytes: int, tile_bytes: int
) -> int:
    """What is added to `code_offset`, the same for all threads.

    Args:
      block: which 64 rows.
      half: 0 for the first row of a thread, 1 for the second, 8 rows later.
      piece: which 16 bytes of the row.
      row_bytes: bytes of a row.
      tile_bytes: bytes of a row of a tile.
    """
    tile = 16 * piece // tile_bytes
    return (64 * block + 8 * half) * row_bytes + tile * 8 * tile_bytes


class CodeMemory:
    """The codes of one warp group in shared memory, as one thread reads them.

    Args:
      ref: bytes `[rows, row_bytes]`.
      row_bytes: bytes of a row.
      tile_bytes: bytes of a row of a tile, see `code_offset`.
    """

    def __init__(self, ref: Any, row_bytes: int, tile_bytes: int):
        i32 = ir.IntegerType.get_signless(32)
        # The move hides from LLVM that the base grows by the same step in a loop. LLVM
        # would keep all addresses in registers and add the step to each of them.
        self._base = _asm(
            "mov.u32 $0, $1;", llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref))
        )
        self._sizes = row_bytes, tile_bytes

    def word(self, block: int, half: int, piece: int, together: bool) -> Any:
        """The word of this thread of one piece of 16 bytes of a row.

        Args:
          block: which 64 rows.
          half: which half of the 16 rows of a warp.
          piece: which 16 bytes of the row.
          together: True for the order a0 a1 b0 b1 of the bytes, else a0 b0 a1 b1.
        """
        piece_of_tile = piece % (self._sizes[1] // 16)
        # This offset does not change from step to step. Only the base does.
        offset = code_offset(_thread(), *self._sizes, piece_of_tile)
        address = arith.addi(self._base, offset.value)
        fixed = fixed_offset(block, half, piece, *self._sizes)
        first = self._two_bytes(address, fixed)
        second = self._two_bytes(address, fixed + BLOCK)
        if together:
            # A multiplication, because a `prmt` would run on the ALU pipe.
            return _asm("mad.lo.u32 $0, $2, 65536, $1;", first, second)
        return mgpu_utils.prmt(first, second, _constant(0x5140))

    @staticmethod
    def _two_bytes(address: Any, fixed: int) -> Any:
        i8, i16, i32 = (ir.IntegerType.get_signless(width) for width in (8, 16, 32))
        pointer = llvm.inttoptr(llvm.PointerType.get(3), address)
        pointer = mgpu_utils.getelementptr(pointer, [fixed], i8)
        return arith.extui(i32, llvm.load(i16, pointer))


def column_registers(
    ref: Any, column: Any, rows: int, width: int, dtype: Any
) -> np.ndarray:
    """Reads a column of a matrix in shared memory: the two rows of a thread of each 64.

    Args:
      ref: the matrix `[rows, width]`.
      column: number of the column, as an MLIR value.
      rows: number of rows, a multiple of 64.
      width: number of columns.
      dtype: dtype of the matrix.

    Returns:
      Vectors of one number, `[rows / 64, 2]`.
    """
    kind = mgpu_utils.dtype_to_ir_type(jnp.dtype(dtype))
    vector_kind = ir.VectorType.get((1,), kind)
    base, thread = mgpu_utils.memref_ptr(ref), _thread()
    row = ((thread >> 5) & 3) * 16 + ((thread & 31) >> 2)
    start = mgpu_utils.getelementptr(base, [(row * width + column).value], kind)
    registers = np.empty((rows // 64, 2), dtype=object)
    for block, half in np.ndindex(*registers.shape):
        offset = (64 * block + 8 * half) * width
        pointer = mgpu_utils.getelementptr(start, [offset], kind)
        registers[block, half] = llvm.load(vector_kind, pointer)
    return registers


def _asm(text: str, *operands: Any) -> Any:
    """One instruction with a 32-bit result."""
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=r", *("r" for _ in operands)])
    return llvm.inline_asm(i32, operands, text, constraints)


def _thread() -> Number:
    """The number of this thread in its block."""
    i32 = ir.IntegerType.get_signless(32)
    return Number(arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x)))


def _value(number: Any) -> Any:
    if isinstance(number, Number):
        return number.value
    return _constant(number) if isinstance(number, int) else number


# The table of pairs in shared memory.

# Entry i begins at byte 256 * i. Its first 128 bytes have one copy for each lane of a
# warp. So the lanes of a warp always read different banks. The index is the second byte
# of an address, where a `prmt` puts it.
TABLE_SHAPE = (256, 64)


class PairTable:
    """A table of pairs in shared memory, as one thread reads and writes it.

    Args:
      ref: uint32 memory of shape `TABLE_SHAPE`.
    """

    def __init__(self, ref: Any):
        i32 = ir.IntegerType.get_signless(32)
        self._base = Number(llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref)))
        self._lane = _thread() & 31

    def entry(self, word: Any, byte: int) -> Any:
        """The entry that a byte of the word selects, from this lane's copy."""
        # Byte 0 is the lane's offset, and bytes 2 and 3 are zero as its byte 1 is.
        selector = _constant(0x5504 | byte << 4)
        offset = mgpu_utils.prmt(word, (self._lane * 4).value, selector)
        i32 = ir.IntegerType.get_signless(32)
        return llvm.load(i32, self._pointer(Number(offset)))

    def fill(self, codebook: Any, num_threads: int, dtype: Any) -> None:
        """Writes the whole table, all computing threads together.

        Args:
          codebook: float32 memory of 16 numbers.
          num_threads: number of threads that call this.
          dtype: dtype of the numbers of a pair, 16 bits.
        """
        for start in range(0, 256, num_threads):
            # With 384 threads some entries are written twice, with the same number.
            index = (_thread() + start) & 255
            self._store(index, _pair(codebook, index, dtype))

    def _store(self, index: Number, pair: Any) -> None:
        """Writes all copies of one entry, 16 bytes at a time."""
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        copies = vector.broadcast(four, pair)
        for turn in range(8):
            # The lanes of a warp write different banks at the same time.
            chunk = (self._lane + turn) & 7
            llvm.store(copies, self._pointer(index * 256 + chunk * 16))

    def _pointer(self, offset: Number) -> Any:
        address = (self._base + offset).value
        return llvm.inttoptr(llvm.PointerType.get(3), address)


def _pair(codebook: Any, index: Number, dtype: Any) -> Any:
    """Two numbers of the codebook as one word: `index % 16` and `index / 16`."""
    i16, i32 = (ir.IntegerType.get_signless(width) for width in (16, 32))
    base, f32 = mgpu_utils.memref_ptr(codebook), ir.F32Type.get()

    def number(place: Number) -> Any:
        wide = llvm.load(f32, mgpu_utils.getelementptr(base, [place.value], f32))
        narrow = arith.truncf(mgpu_utils.dtype_to_ir_type(jnp.dtype(dtype)), wide)
        return arith.extui(i32, arith.bitcast(i16, narrow))

    low, high = number(index & 15), number(index >> 4)
    return arith.ori(low, arith.shli(high, _constant(16)))


def pair_table(codebook: jax.Array, dtype: Any) -> jax.Array:
    """The table of pairs as an array, uint32 `[256]`, for the interpreter."""
    patterns = lax.bitcast_convert_type(codebook.astype(dtype), jnp.uint16)
    patterns = patterns.astype(jnp.uint32)
    return (patterns[None, :] | patterns[:, None] << np.uint32(16)).reshape(256)
