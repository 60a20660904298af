"""The order of codes in memory: packing, rows or columns; and codes in the order of the array's axes."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.qtensor._meta import LAYOUTS

if TYPE_CHECKING:  # QTensor's methods come here
    from jaxq.qtensor._qtensor import QTensor


def relayout(qt: QTensor, target: formats.Packing | str) -> QTensor:
    """`qt` with its codes in another order in memory; the numbers stay what they are.

    Args:
      qt: any QTensor.
      target: a `jaxq.formats.Packing` or its value, "low_first" for example (NONE keeps one code a byte): the order of
        codes in bytes. Or "rows", as `quantize` stores them and GPU kernels want them, `[*batch, *kept, k]`; or
        "columns", as TPU kernels want them, `[*batch, k, *kept]`.

    Raises:
      ValueError: the order does not exist at this width, or blocks run across rows and columns are asked for.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.eye(64), "int4")
      >>> jaxq.relayout(qt, "columns").data.shape
      (32, 64)
    """
    if target in LAYOUTS:
        return _turn(qt, target)  # pyright: ignore[reportArgumentType]
    if isinstance(target, str):
        formats.check_choice(
            "relayout: target", target, [*(p.value for p in formats.Packing), *LAYOUTS]
        )
    return _turn(_relayout(_turn(qt, "rows"), formats.Packing(target)), qt.meta.layout)


def _turn(qt: QTensor, layout: Literal["rows", "columns"]) -> QTensor:
    if layout == qt.meta.layout:
        return qt
    if qt.meta.geometry.flat:
        raise ValueError(
            f"relayout: blocks of {qt!r} run across rows, which have no columns of their own."
        )
    first = len(qt.batch_shape)
    ends = (-1, first) if layout == "columns" else (first, -1)
    return dataclasses.replace(
        qt._with(layout=layout), data=jnp.moveaxis(qt.data, *ends)
    )


# Compiled whole: outside jit, many small programs would take longer to compile and to run.


@functools.partial(jax.jit, inline=True)
def unpacked(qt: QTensor) -> jax.Array:
    geometry = qt.meta.geometry
    return geometry.from_view(geometry.unpad(geometry.to_view_order(qt.stored_codes())))


@functools.partial(jax.jit, static_argnames="packing", inline=True)
def _relayout(qt: QTensor, packing: formats.Packing) -> QTensor:
    bits = qt.spec.fmt.bits
    geometry, changed = qt.meta.geometry, qt._with(packing=packing)
    # The stored row is a multiple of what the first packing needed; another order may need more.
    multiple = math.lcm(geometry.multiple, formats.codes_per_pack(bits, packing))
    changed = changed._with(geometry=dataclasses.replace(geometry, multiple=multiple))
    wider = changed.meta.geometry
    codes = _pad_last(qt.stored_codes(), wider.padded_shape[-1], qt.spec.fmt.zero_code)
    data = formats.pack(codes, bits, packing, unit=changed.meta.pack_unit)
    changed = dataclasses.replace(changed, data=data)
    blocks = wider.num_blocks[-1]
    if blocks == geometry.num_blocks[-1]:
        return changed
    if isinstance(qt.scale, type(qt)):
        raise ValueError(
            f"relayout: {packing.value!r} fills whole bytes of {qt!r} with {blocks - geometry.num_blocks[-1]} blocks "
            f"more, and quantized scales cannot grow. Quantize with packing={packing.value!r}."
        )
    zero_point = None if qt.zero_point is None else _pad_last(qt.zero_point, blocks)
    offset = (
        _pad_last(qt.offset, blocks)
        if qt.offset is not None and qt.spec.offset == "min"
        else qt.offset
    )
    codebook = None if qt.codebook is None else _pad_last(qt.codebook, blocks, axis=-2)
    scale = _pad_last(cast(jax.Array, qt.scale), blocks)
    return dataclasses.replace(
        changed, scale=scale, zero_point=zero_point, offset=offset, codebook=codebook
    )


def _pad_last(leaf: jax.Array, size: int, value: int = 0, axis: int = -1) -> jax.Array:
    widths = [(0, 0)] * leaf.ndim
    widths[axis] = (0, size - leaf.shape[axis])
    return jnp.pad(leaf, widths, constant_values=np.asarray(value, leaf.dtype))
