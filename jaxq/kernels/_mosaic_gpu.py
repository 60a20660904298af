"""Block-wise quantized matmul on Hopper GPUs: 4- and 8-bit weights decoded in registers, on their way to wgmma.

A decode step reads every weight once for a handful of tokens, so its time is the weight's bytes; 4 bits are read in a
quarter of the time of 16, if decoding keeps up. That leaves three to four instructions a weight, and sets the design:

    y.T[n, m] = sum over groups g:  scale[g, n] * (codes[n, g] @ x[m, g].T)

- The product is transposed. Weights are the left operand of wgmma, which may come from registers: they go from shared
  memory to registers as bytes, become 16-bit numbers there, and never return. x is the right one, 8 to 256 tokens wide.
- Codes are multiplied as they are and each group's sum is scaled, in float32: codes minus zero points are exact in 16
  bits, a scale costs m instead of 2 * group operations a group, and nothing is rounded but the entries of a codebook.
- A 32-bit word of codes becomes pairs of 16-bit numbers by masks alone: the bits of a code under the exponent of 128
  (bfloat16) or 1024 (float16) are that number plus the code. A codebook's entries are fetched a byte at a time by
  `prmt`, which looks up four codes in eight bytes: two instructions a weight.
- Masks meet codes in an order of their own, and no thread gives codes to another. x is put into that order outside:
  4 lanes of a unit hold a word each, and number c of pair i of lane t is column 8 * i + 2 * t + c of the left operand.
- One more warp group feeds `stages` tiles of x, codes and scales through TMA, which fills with zeros what lies beyond
  an edge: weights are never padded or copied. Few tokens need `splits` of k to occupy all SMs; XLA adds up the parts.

Shared memory, in bytes: stages * (2 * bm * bk + warpgroups * bn * (bk * bits / 8 + size of scales * bk / group)) and
warpgroups * bn * bm * 4 for the result, of 227 KB. Registers of a thread: bn * bm / 64 for the sums, bn * bk / 256 for
the weights, of 240.

Served: layout "rows", x in bfloat16 or float16, codes of 4 bits (signed, unsigned, codebook) or 8 bits, scales in any
float dtype, zero points, groups of 32 or of a multiple of 64, one scale a column; any e and m, n in eights, k in 64s.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from jaxq.kernels._problem import Problem

# How 64 rows lie in the registers of a warp group. A word has the place of the four bytes it is made of.
_BYTES = plgpu.Layout.WGMMA_8BIT
_WORDS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
_WEIGHTS = plgpu.Layout.WGMMA  # and of sums
_ROWS = plgpu.Layout.WGMMA.reduce(1)

# The 16-bit number whose last bit counts ones: its bits, and what it is.
_BASE = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def why_not(problem: Problem, device_kind: str | None) -> str | None:
    """Why this kernel does not serve a problem, or None if it does. A device_kind of None is not looked at."""
    p = problem
    if device_kind is not None and not any(name in device_kind for name in _HOPPER):
        return f"it is written for Hopper GPUs, not {device_kind}"
    if p.layout != "rows":
        return 'it reads codes as "rows", with k along them, not as "columns": relayout the weight'
    if p.x_dtype == "int8" or p.scale_dtype is None:
        return "XLA's own int8 product serves int8 x"
    if p.x_dtype not in _BASE:
        return (
            f"its tensor core instruction takes bfloat16 and float16, not {p.x_dtype}"
        )
    if p.bits not in (4, 8) or (p.codebook and p.bits != 4):
        return f"it decodes codes of 4 or 8 bits and codebooks of 16 numbers, not {p.codes}"
    if 0 in (p.e, p.m, p.n, p.k):
        return "the product is empty"
    if p.num_groups > 1 and p.group != 32 and p.group % 64:
        return f"groups have 32 codes or a multiple of 64, not {p.group}"
    if p.n % 8 or p.k % 64:
        return f"TMA copies tiles of 8 rows by 64 codes, and {p.n} by {p.k} would have to be padded"
    return None


def default_tiles(problem: Problem, device_kind: str | None) -> dict:
    """Tiles from shapes alone, for what no table holds."""
    del device_kind
    p = problem
    bm = next((b for b in (8, 16, 32, 64) if p.m <= b), 128)
    bk = 64 if bm == 128 or p.k % 128 or (p.group % 128 and p.group > 64) else 128
    ctas = p.e * pl.cdiv(p.n, 128) * pl.cdiv(p.m, bm)
    splits = 1
    while splits < 16 and 2 * splits * ctas <= 160 and p.k >= 8 * splits * bk:
        splits *= 2
    return {
        "bm": bm,
        "bn": 64,
        "bk": bk,
        "warpgroups": 2,
        "stages": 4 if bm == 128 else 6,
        "splits": splits,
    }


def matmul(
    x: jax.Array,
    data: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    codebook: jax.Array | None,
    *,
    problem: Problem,
    tiles: Mapping[str, int | str],
    interpret: bool = False,
) -> jax.Array:
    """`y[e, m, n]`; see `Problem` for the arrays.

    Args:
      x: `[e, m, k]`.
      data: `[e, n, k * bits / 8]`.
      scale: `[e, k / group, n]`.
      zero_point: like scale, or None.
      codebook: float32 `[e, 16]`, or None.
      problem: static facts; `why_not` has none to object to.
      tiles: bm tokens by bn columns are the sums of a warp group, of which a block has `warpgroups` side by side; bk
        codes are a step, a multiple of the group or the other way round; `stages` steps are in flight; `splits` blocks
        share one k.
      interpret: run on CPU; what only the machine has (register layouts, wgmma) is replaced by its meaning.
    """
    p = problem
    bm, bn, bk, warpgroups, stages, splits = (
        int(tiles[name])
        for name in ("bm", "bn", "bk", "warpgroups", "stages", "splits")
    )
    chunk = (
        bk if p.num_groups == 1 else min(bk, p.group)
    )  # codes whose sum meets one scale
    uneven = p.k % min(bk, 1024 // p.bits) or (p.num_groups > 1 and p.group % chunk)
    if bn % 64 or bm % 8 or chunk % 32 or bk % chunk or uneven:
        raise ValueError(
            f"matmul: no tiles {dict(tiles)} for groups of {p.group} in rows of {p.k}."
        )
    columns, row_bytes = warpgroups * bn, bk * p.bits // 8
    m_blocks, n_blocks, steps = (
        pl.cdiv(p.m, bm),
        pl.cdiv(p.n, columns),
        pl.cdiv(p.k, bk * splits),
    )

    x = jnp.pad(_reorder(x, p), ((0, 0), (0, m_blocks * bm - p.m), (0, 0)))
    inputs = [x, data, _align(scale)] + [
        _align(a) for a in (zero_point,) if a is not None
    ]
    # Sums of a part stay transposed, for XLA to add up. A whole result of 16 bits is turned on its way out, in tiles.
    whole = splits == 1 and p.n % 64 == 0 and jnp.dtype(p.out_dtype).itemsize == 2
    # TMA writes nothing beyond an edge; an interpreter may drop the whole block.
    m, n = (
        (m_blocks * bm, n_blocks * columns) if interpret else (pl.cdiv(p.m, 8) * 8, p.n)
    )
    if whole:
        out = jax.ShapeDtypeStruct((1, p.e, m, n), jnp.dtype(p.out_dtype))
        staging = plgpu.SMEM(
            (warpgroups, bm, bn), out.dtype, transforms=_swizzled(64, 16)
        )
    else:
        out = jax.ShapeDtypeStruct((splits, p.e, n, m_blocks * bm), jnp.float32)
        staging = plgpu.SMEM((warpgroups, bn, bm), out.dtype)

    def kernel(*refs):
        *sources, out_ref, out_smem = refs
        e, s, j, i = (lax.axis_index(name) for name in ("e", "s", "n", "m"))
        mine = lax.axis_index("warpgroup")
        rows = pl.ds(mine * bn, bn)

        def step(_, x_smem, data_smem, *rest):
            scale_smem, *zero_smem, (sums, table) = rest
            words = _as_words(_layout(data_smem[rows, :], _BYTES, interpret), interpret)
            for c in range(bk // chunk):
                part = words[
                    :, c * chunk * p.bits // 32 : (c + 1) * chunk * p.bits // 32
                ]
                zero = [_layout(ref[c, rows], _ROWS, interpret) for ref in zero_smem]
                weights = _decode(part, table, zero, p, interpret)
                taken = x_smem.at[:, pl.ds(c * chunk, chunk)]
                factor = _layout(scale_smem[c, rows], _ROWS, interpret).astype(
                    jnp.float32
                )
                sums = sums + _product(
                    weights, taken, interpret
                ) * lax.broadcast_in_dim(factor, sums.shape, (0,))
            return sums, table

        def compute(pipeline):
            table = (
                tuple(sources[-1][e, place] for place in range(16))
                if p.codebook
                else ()
            )
            sums = _layout(jnp.zeros((bn, bm), jnp.float32), _WEIGHTS, interpret)
            sums, _ = pipeline((sums, table))
            n_rows, m_rows = pl.ds(j * columns + mine * bn, bn), pl.ds(i * bm, bm)
            if whole:
                _store_turned(out_smem.at[mine], sums.astype(out.dtype), interpret)
                target = out_ref.at[s, e, m_rows, n_rows]
            else:
                out_smem[mine] = sums
                target = out_ref.at[s, e, n_rows, m_rows]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[mine], target)
            plgpu.wait_smem_to_gmem(0)

        groups = bk // chunk
        of_group = plgpu.BlockSpec(
            (groups, columns),
            lambda t: ((s * steps + t) * bk // (max(chunk, p.group) * groups), j),
        )
        plgpu.emit_pipeline_warp_specialized(
            step,  # pyright: ignore[reportArgumentType]
            grid=(steps,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec(
                    (bm, bk),
                    lambda t: (i, s * steps + t),
                    transforms=_swizzled(min(chunk, 64), 16),
                ),
                plgpu.BlockSpec(
                    (columns, row_bytes),
                    lambda t: (j, s * steps + t),
                    transforms=_swizzled(row_bytes, 8),
                ),
                *[of_group] * (len(inputs) - 2),
            ],
            wg_axis="warpgroup",
            num_compute_wgs=warpgroups,
            max_concurrent_steps=stages,
            compute_context=compute,
        )(*(ref.at[e] for ref in sources[: len(inputs)]))

    y = plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=[staging],
        grid=(p.e, splits, n_blocks, m_blocks),
        grid_names=("e", "s", "n", "m"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        # Reads beyond an edge give zeros, as TMA does.
        interpret=InterpretGPUParams(
            out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
        )
        if interpret
        else None,
    )(*inputs, *(() if codebook is None else (codebook,)))
    y = y[0] if whole else jnp.swapaxes(y.sum(0), 1, 2).astype(p.out_dtype)
    return y[:, : p.m, : p.n]


def _reorder(x: jax.Array, p: Problem) -> jax.Array:
    """Columns of x in the order in which `_decode` gives weights."""
    num_pairs = 16 // p.bits
    units = x.reshape(
        p.e, p.m, -1, 4, *((num_pairs, 2) if p.codebook else (2, num_pairs))
    )
    pair, number = (4, 5) if p.codebook else (5, 4)
    return units.transpose(0, 1, 2, pair, 3, number).reshape(x.shape)


def _decode(words, table, zero: list, p: Problem, interpret: bool):
    """Words of codes uint32 `[r, w]` as weights without their scales, `[r, w * 32 / bits]` of x's dtype.

    Args:
      words: 4 units of 32 bits lie side by side in each row's 4 lanes.
      table: 16 scalars, or nothing.
      zero: nothing, or zero points `[r]`.
      p: the problem.
      interpret: as in `matmul`.
    """
    dtype = jnp.dtype(p.x_dtype)
    if p.codebook:
        return _look_up(
            words, _table_words(table, words.shape, dtype, interpret), dtype, interpret
        )
    bits, base = _BASE[p.x_dtype]
    ones = np.uint32(0x00010001)  # a factor that writes 16 bits twice
    shifted = [words >> np.uint32(p.bits * pair) for pair in range(16 // p.bits)]
    offset = (
        -(1 << (p.bits - 1)) if p.signed else 0
    )  # code - offset is not negative, and its first bit flipped
    if p.bits == 4 or dtype == jnp.float16:
        mask, flip = (
            ones * np.uint32((1 << p.bits) - 1),
            ones * np.uint32(bits - offset),
        )
        weights = _as_weights([(s & mask) ^ flip for s in shifted], dtype, interpret)
        offset = base - offset
    else:
        # Seven bits fit under the exponent of 128. The eighth, the sign's, turns 128 into 256.
        flip = np.uint32(0 if p.signed else 0x80)
        rest = [
            (s & (ones * np.uint32(0x7F))) ^ (ones * np.uint32(bits)) for s in shifted
        ]
        sign = [
            (s & (ones * np.uint32(0x80))) ^ (ones * (np.uint32(bits) ^ flip))
            for s in shifted
        ]
        weights = _as_weights(rest, dtype, interpret) - _as_weights(
            sign, dtype, interpret
        )
        offset = 0 if p.signed else -128
    for z in zero:
        total = (z.astype(jnp.float32) + np.float32(offset)).astype(dtype)
        return weights - lax.broadcast_in_dim(total, weights.shape, (0,))
    return weights - np.asarray(offset, dtype) if offset else weights


def _table_words(entries, shape: tuple[int, int], dtype, interpret: bool) -> list:
    """16 numbers as 8 words, each an array full of it: the low bytes of four numbers each, then the high ones.

    All of it is scalar work that a compiler moves out of the loop over steps.
    """
    full = [
        _layout(jnp.full(shape, entry), _WORDS, interpret).astype(dtype)
        for entry in entries
    ]
    patterns = [
        lax.bitcast_convert_type(numbers, jnp.uint16).astype(jnp.uint32)
        for numbers in full
    ]
    words = []
    for plane in (0, 8):
        for first in range(0, 16, 4):
            word = jnp.zeros(shape, jnp.uint32)
            for place in range(4):
                byte = (patterns[first + place] >> np.uint32(plane)) & np.uint32(0xFF)
                word = word | (byte << np.uint32(8 * place))
            words.append(word)
    return words


def _look_up(words, table: list, dtype, interpret: bool):
    """Table entries for words of codes: pair i of a word is that of its codes 2 i and 2 i + 1."""
    place = words & np.uint32(0x77777777)
    half = ((words & np.uint32(0x88888888)) >> np.uint32(1)) | np.uint32(0x32103210)
    # prmt looks up four codes in the low 16 bits.
    arrays = [place, half, place >> np.uint32(16), half >> np.uint32(16), *table]

    def fetch(permute, place, half, later_place, later_half, *table):
        pairs = []
        for at, which in ((place, half), (later_place, later_half)):
            low, high = (
                permute(permute(a, b, at), permute(c, d, at), which)
                for a, b, c, d in (table[:4], table[4:])
            )
            pairs += [permute(low, high, 0x5140), permute(low, high, 0x7362)]
        return pairs

    if interpret:
        return _as_weights(fetch(_permute_bytes, *arrays), dtype, interpret)

    # One piece of inline code, because the compiler does not feed one such piece to another.
    @plgpu.inline_mgpu(
        arg_types=(_WORDS,) * len(arrays),
        return_type=plgpu.ShapeDtypeStruct(
            (words.shape[0], 8 * words.shape[1]), dtype, layout=_WEIGHTS
        ),
    )
    def fetch_registers(_, *arrays):
        i32 = ir.IntegerType.get_signless(32)

        def permute(low, high, which):
            return mgpu_utils.prmt(
                low,
                high,
                arith.constant(i32, which) if isinstance(which, int) else which,
            )

        registers = [np.empty_like(arrays[0].registers) for _ in range(4)]
        for index in np.ndindex(registers[0].shape):
            numbers = [
                mgpu_utils.bitcast(array.registers[index], i32) for array in arrays
            ]
            for pair, found in zip(registers, fetch(permute, *numbers), strict=True):
                pair[index] = mgpu_utils.bitcast(found, ir.VectorType.get((1,), i32))
        return _rename(registers, _WEIGHTS, dtype, 2)

    return fetch_registers(*arrays)


def _permute_bytes(low, high, which):
    """prmt: byte b of the result is byte (nibble b of which) of the eight bytes of low and high."""
    which = jnp.full_like(low, which) if isinstance(which, int) else which
    out = jnp.zeros_like(low)
    for byte in range(4):
        place = (which >> np.uint32(4 * byte)) & np.uint32(7)
        source = jnp.where(place < 4, low, high) >> (
            np.uint32(8) * (place & np.uint32(3))
        )
        out = out | ((source & np.uint32(0xFF)) << np.uint32(8 * byte))
    return out


def _product(weights, x_smem, interpret: bool):
    """`weights @ x.T` `[bn, bm]` float32."""
    if interpret:
        return lax.dot_general(
            weights,
            x_smem[...],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    def accumulate(sums):
        plgpu.wgmma(sums, weights, x_smem.T)
        return sums[...]

    return pl.run_scoped(
        accumulate,
        plgpu.WGMMAAccumulatorRef((weights.shape[0], x_smem.shape[0]), jnp.float32),
    )


def _store_turned(target, value, interpret: bool) -> None:
    if interpret:
        target[...] = value.T
    else:
        target.T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)


def _layout(value, layout, interpret: bool):
    return value if interpret else plgpu.layout_cast(value, layout)


def _as_words(data, interpret: bool):
    """Bytes `[r, 4 w]` as uint32 `[r, w]`."""
    shape = (data.shape[0], data.shape[1] // 4)
    if interpret:
        return lax.bitcast_convert_type(data.reshape(*shape, 4), jnp.uint32)

    @plgpu.inline_mgpu(
        arg_types=(_BYTES,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=_WORDS),
    )
    def rename(_, *arrays):
        return _rename([array.registers for array in arrays], _WORDS, jnp.uint32, 1)

    return rename(data)


def _as_weights(pairs: list, dtype, interpret: bool):
    """Pairs uint32 `[r, w]` of 16-bit numbers as one array `[r, 2 * w * len(pairs)]`."""
    rows, width = pairs[0].shape
    shape = (rows, 2 * len(pairs) * width)
    if interpret:
        stacked = jnp.stack(
            [pair.reshape(rows, width // 4, 4) for pair in pairs], axis=2
        )
        return lax.bitcast_convert_type(stacked, dtype).reshape(shape)

    @plgpu.inline_mgpu(
        arg_types=(_WORDS,) * len(pairs),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=_WEIGHTS),
    )
    def rename(_, *pairs):
        return _rename([pair.registers for pair in pairs], _WEIGHTS, dtype, 2)

    return rename(*pairs)


def _rename(parts: list, layout, dtype, length: int):
    """Registers of some arrays as registers of one array."""
    kind = ir.VectorType.get((length,), mgpu_utils.dtype_to_ir_type(jnp.dtype(dtype)))
    registers = _by_unit(parts)
    out = np.empty(registers.shape, dtype=object)
    for index, register in np.ndenumerate(registers):
        out[index] = vector.bitcast(kind, register)
    signed = False if jnp.issubdtype(dtype, jnp.unsignedinteger) else None
    return mgpu.FragmentedArray(
        _registers=out, _layout=layout.to_mgpu(), _is_signed=signed
    )


def _by_unit(parts: list) -> np.ndarray:
    """One thread's registers `[rows / 64, units, ...]` of some arrays, those of one unit of columns together."""
    registers = np.stack(parts, axis=2)
    return registers.reshape(registers.shape[0], -1, *registers.shape[3:])


def _swizzled(row: int, bits: int) -> tuple:
    """Transforms for a tile of rows of that many numbers, in which no two lanes of a load meet in one bank."""
    swizzle = min(128, row * bits // 8)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(
        swizzle
    )


def _align(a: jax.Array) -> jax.Array:
    """Columns padded so that TMA finds every row at a multiple of 16 bytes."""
    return jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % (16 // a.dtype.itemsize))))
