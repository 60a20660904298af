"""The two ways to compute a product: in plain XLA, or by a Pallas kernel.

Both take x `[e, m, k]` and the leaves of `Rows`, each with a leading axis e. If the
codes are a stack with an index, a kernel reads the stack in place. Plain XLA first
copies the matrices that it needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.kernels import _tiles
from jaxq.kernels._call import Call, problem_of, with_leaves, without_index
from jaxq.kernels._codes import codes_matmul, is_float8, largest_exact_length
from jaxq.kernels._problem import Problem
from jaxq.kernels._registry import (
    READS_FLOAT8,
    READS_SCALES_AS_STORED,
    READS_UNITS,
    kernel_module,
)
from jaxq.kernels._rows import (
    RowMeta,
    Rows,
    as_rows,
    codes_meta,
    group_size,
    int8_meta,
    num_groups,
)
from jaxq.kernels._xla import (
    transposed_matmul,
    weight_only_matmul,
    whole_numbers_matmul,
)
from jaxq.meshes import compile_time_eval


def xla_form(x: jax.Array, *leaves: jax.Array, call: Call) -> jax.Array:
    """Computes the product in plain XLA.

    This form runs wherever no kernel runs. The tests compare the kernels with it.

    Args:
      x: `[e, m, k]`, or `[e, m, n]` if `call.transposed`.
      *leaves: arrays of the rows in the order of `call.leaves`.
      call: static facts of the product.

    Returns:
      `[e, m, n]`, or `[e, m, k]` if `call.transposed`, in `call.out_dtype`.
    """
    call, arrays = without_index(call, leaves)
    product = functools.partial(_xla_matrix, call=call)
    if x.shape[0] == 1:
        return product(x[0], *(leaf[0] for leaf in arrays))[None]
    is_on_cpu = call.meta.block_bytes is None
    if is_on_cpu and _decodes(x, call.rows(arrays), call.meta):
        # One matrix after the other. Blocks of all matrices together would not fit in
        # the cache.
        return lax.map(lambda args: product(*args), (x, *arrays))
    return jax.vmap(product)(x, *arrays)


def _xla_matrix(x: jax.Array, *leaves: jax.Array, call: Call) -> jax.Array:
    """`xla_form` of a single matrix: x `[m, k]`."""
    rows, meta = as_rows(call.rows(leaves), call.meta)
    if x.dtype == jnp.int8 and _decodes(x, rows, meta):
        # The caller applies the scale of x.
        exact = num_groups(rows) == 1 or _has_exact_products(rows, meta)
        matmul = weight_only_matmul if exact else whole_numbers_matmul
        return matmul(x.astype(jnp.float32), rows, meta).astype(call.out_dtype)
    if is_float8(x.dtype) and meta.block_bytes is None:
        # XLA:CPU has no float8 product. It would widen the codes of the weight as well.
        x = x.astype(jnp.float32)
    if x.dtype == jnp.int8 or is_float8(x.dtype):
        # A scale of 1 makes the sums float32.
        scale = None if rows.scale is None else jnp.ones((1, 1), jnp.float32)
        codes = x if x.dtype == jnp.int8 else lax.bitcast_convert_type(x, jnp.uint8)
        x_rows = Rows(codes, scale, None, None, None)  # pyright: ignore
        y = codes_matmul(x_rows, codes_meta(x.dtype.name, meta.k), rows, meta)
        return y.astype(call.out_dtype)
    if call.meta.layout == "columns" and meta.block_bytes is None:
        # XLA:CPU would multiply columns without a transpose, and its matrix library
        # does not support that in 16-bit floats.
        x = x.astype(jnp.float32)
    matmul = transposed_matmul if call.transposed else weight_only_matmul
    return matmul(x, rows, meta).astype(call.out_dtype)


def _decodes(x: jax.Array, rows: Rows, meta: RowMeta) -> bool:
    """True if the product decodes the weight and multiplies floats.

    On a CPU, products of int8 codes do this as well, because XLA:CPU multiplies packed
    integers, and integers in groups, many times slower than floats. There are two
    exceptions: a group whose sum float32 cannot hold, and int8 weights with one scale
    for each row, which XLA:CPU multiplies fast.
    """
    if x.dtype != jnp.int8:
        return True
    if meta.block_bytes is not None or rows.scale is None:
        return False
    groups = num_groups(rows)
    if meta.packing is formats.Packing.NONE and groups == 1:
        return False
    return group_size(meta, groups) <= _exact_length(rows, meta)


def _has_exact_products(rows: Rows, meta: RowMeta) -> bool:
    """True if float32 holds `x * code * scale` exactly, for int8 x.

    Then the scale may multiply the weight. Only sums are rounded.
    """
    scale_dtype = rows.scale.dtype
    if scale_dtype == jnp.float32:
        return False
    largest_scale = 2 ** (jnp.finfo(scale_dtype).nmant + 1)  # as a whole number
    return _exact_length(rows, meta) >= largest_scale


def _exact_length(rows: Rows, meta: RowMeta) -> int:
    """How many products of int8 codes with these codes float32 can sum exactly."""
    symmetric = rows.zero_point is None
    return largest_exact_length(int8_meta(meta.k), True, meta, symmetric, most=2**24)


def pallas_form(
    x: jax.Array,
    *leaves: jax.Array,
    call: Call,
    kernel: str,
    problem: Problem,
    device_kind: str | None,
) -> jax.Array:
    """Computes the product by a Pallas kernel.

    Args:
      x: `[e, m, k]`, or `[e, m, n]` if `call.transposed`.
      *leaves: arrays of the rows in the order of `call.leaves`.
      call: static facts of the product.
      kernel: name of the kernel.
      problem: the same product as kernels see it.
      device_kind: `jax.Device.device_kind`, or None if unknown. It selects the tiles.

    Returns:
      `[e, m, n]`, or `[e, m, k]` if `call.transposed`, in `call.out_dtype`.
    """
    operands = kernel_operands(call.rows(leaves), call.meta, problem, kernel)
    keeps_order = kernel in READS_UNITS and problem.unit is not None
    if not call.transposed:
        if kernel not in READS_FLOAT8:
            x = x.astype(problem.x_dtype)
        x = pad_columns(x, call.meta)
        x = x if keeps_order else in_memory_order(x, call.meta)
    y = kernel_module(kernel).matmul(
        x,
        *operands,
        problem=problem,
        index=call.index(leaves),
        tiles=_tiles.lookup(kernel, device_kind, problem),
        interpret=call.interpret,
    )
    if not call.transposed:
        return y
    y = y if keeps_order else _in_column_order(y, call.meta)
    return y[..., : call.meta.k]


def kernel_operands(
    rows: Rows, meta: RowMeta, problem: Problem, kernel: str
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """Returns the arrays of a weight as `Problem` describes them.

    Args:
      rows: the weight, each leaf with a leading axis e.
      meta: static facts of the rows.
      problem: the product.
      kernel: name of the kernel. It decides whether scales and zero points are
        `[e, n, g]` or `[e, g, n]`.

    Returns:
      (data, scale, zero_point, codebook).
    """
    codebook = rows.codebook
    if codebook is not None:
        codebook = codebook.reshape(problem.e, -1)
    elif problem.codebook:
        numbers = _numbers_of(meta.fmt)
        codebook = jnp.asarray(np.broadcast_to(numbers, (problem.e, 16)))

    def per_row(leaf: jax.Array | None) -> jax.Array | None:
        """`[e, n or 1, g]` as `[e, n, g]`, or as `[e, g, n]`."""
        if leaf is None:
            return None
        leaf = jnp.broadcast_to(leaf, (problem.e, problem.n, leaf.shape[-1]))
        as_stored = kernel in READS_SCALES_AS_STORED
        return leaf if as_stored else jnp.swapaxes(leaf, 1, 2)

    return rows.data, per_row(rows.scale), per_row(rows.zero_point), codebook


@functools.cache
def _numbers_of(fmt: formats.Format) -> np.ndarray:
    """The number of each of the 16 codes, float32.

    It is a constant of the program. A program that looked the numbers up would launch
    several small kernels, and on a TPU they can take as long as the product.
    """
    with compile_time_eval():
        codes = jnp.arange(16, dtype=fmt.code_dtype)
        return np.asarray(fmt.decode(codes), np.float32)


def interpreted(x: jax.Array, rows: Rows, call: Call) -> jax.Array:
    """Runs the interpreter of the kernel that `call.backend` names.

    The arguments are the same as for `call_matmul`. This function does not use the
    primitive. So it has no derivatives, and `vmap` cannot map over it.
    """
    call, leaves = with_leaves(call, rows)
    single = x.ndim == 2
    args = [array[None] if single else array for array in (x, *leaves)]
    problem = problem_of(call, args[0], args[1:])
    assert isinstance(problem, Problem), problem
    y = pallas_form(
        *args, call=call, kernel=call.backend, problem=problem, device_kind=None
    )
    return y[0] if single else y


def in_memory_order(x: jax.Array, meta: RowMeta) -> jax.Array:
    """Brings `padded_k` columns into the order of the codes in memory.

    Column j of the result belongs to code j in memory. In a byte, the code in the low
    bits comes first.
    """
    if meta.packing is formats.Packing.HALVES:
        return _on_units(_pairs_of_halves, x, meta)
    if meta.packing is formats.Packing.HIGH_FIRST:
        return _swapped_pairs(x)
    return x  # the order of codes is that of memory already


def _in_column_order(y: jax.Array, meta: RowMeta) -> jax.Array:
    """The inverse of `in_memory_order`."""
    if meta.packing is formats.Packing.HALVES:
        return _on_units(_halves_of_pairs, y, meta)
    if meta.packing is formats.Packing.HIGH_FIRST:
        return _swapped_pairs(y)
    return y


def _on_units(
    move: Callable[[jax.Array, int], jax.Array], x: jax.Array, meta: RowMeta
) -> jax.Array:
    """Applies `move(columns, unit)` to the whole units of x and to the last unit.

    The codes beyond the last whole unit are a shorter unit.
    """
    unit = meta.unit or meta.padded_k
    whole = meta.padded_k // unit * unit
    units = move(x[..., :whole], unit)
    if whole == meta.padded_k:
        return units
    last = move(x[..., whole:], meta.padded_k - whole)
    return jnp.concatenate([units, last], axis=-1)


def _pairs_of_halves(x: jax.Array, unit: int) -> jax.Array:
    """Moves columns j and j + unit / 2 of each unit next to each other."""
    units = x.reshape(*x.shape[:2], -1, 2, unit // 2)  # [e, m, units, 2, unit / 2]
    return jnp.swapaxes(units, 3, 4).reshape(x.shape)


def _halves_of_pairs(y: jax.Array, unit: int) -> jax.Array:
    """The inverse of `_pairs_of_halves`."""
    units = y.reshape(*y.shape[:2], -1, unit // 2, 2)  # [e, m, units, unit / 2, 2]
    return jnp.swapaxes(units, 3, 4).reshape(y.shape)


def _swapped_pairs(x: jax.Array) -> jax.Array:
    """Swaps the columns of each byte, whose second code is in its low bits."""
    pairs = x.reshape(*x.shape[:2], -1, 2)  # [e, m, bytes, 2]
    return pairs[..., ::-1].reshape(x.shape)


def pad_columns(x: jax.Array, meta: RowMeta) -> jax.Array:
    """Pads x to `padded_k` columns."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, meta.padded_k - meta.k)))
