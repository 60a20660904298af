"""The arrays of a quantized KV cache, and which place holds which token.

Both kinds of arrays are ring buffers. The newest `residual` tokens are in full
precision: token i is in place i mod `residual`. Older tokens are quantized in groups of
`group` tokens: group j is in place j mod `num_groups`. `_append.py` writes the arrays.
`_attention.py` reads the arrays.

Codes lie in memory as the attention kernels read them. The last axis of the codes is
then as long as a register of a TPU is wide, if a head has 128 channels. A TPU pads a
shorter axis, or copies the codes before each kernel.

- Keys have the layout "columns": `[group * bits / 8, h]` for each group.
- A row of 4-bit values holds two tokens, `i` and `i + group / 2`: `[group / 2, h]`
  bytes for each group. Values of other widths have a row for each token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.ops.kv_cache._spec import KVCacheSpec
from jaxq.qtensor import (
    PerChannel,
    PerGroup,
    QTensor,
    QuantSpec,
    dequantize,
    quantize,
    relayout,
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CacheArrays:
    """The fields of a KV cache. The docstring of `KVCache` describes each field."""

    keys: QTensor
    values: QTensor
    recent_keys: jax.Array
    recent_values: jax.Array
    lengths: jax.Array
    spec: KVCacheSpec = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> np.dtype:
        """The dtype of queries, keys and values."""
        return self.recent_keys.dtype

    @property
    def num_groups(self) -> int:
        """The number of places for quantized groups in a slot."""
        return self.keys.shape[2]


def quantize_groups(
    k: jax.Array, v: jax.Array, *, spec: KVCacheSpec
) -> tuple[QTensor, QTensor]:
    """Quantizes keys and values of whole groups, each `[b, m, groups, group, h]`.

    All tokens of a group share a key scale. All channels of a token share a value scale
    (KIVI).

    Returns:
      (keys, values). Keys are `[b, m, groups, group, h]`. Values are the same, or
      `[b, m, groups, group / 2, 2 * h]` if a row holds two tokens.
    """
    assert isinstance(spec.keys, QuantSpec)
    assert isinstance(spec.values, QuantSpec)
    keys = relayout(_quantize_along(k, spec.keys, -2, "keys"), "columns")
    value_spec = spec.values
    pair_size = _group_size_in_pairs(value_spec, *v.shape[-2:])
    if pair_size is not None:
        granularity = PerGroup(pair_size)
        value_spec = value_spec.replace(
            granularity=granularity, packing=value_spec.packing
        )
        v = _in_pairs(v)
    return keys, _quantize_along(v, value_spec, -1, "values")


def dequantize_groups(
    keys: QTensor, values: QTensor, *, spec: KVCacheSpec, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    """The keys and values of `quantize_groups` in floats, `[b, m, groups * group, h]`.

    Args:
      keys: as `quantize_groups` returns them.
      values: likewise.
      spec: how the cache is quantized.
      dtype: dtype of the results.
    """
    b, m, num_groups, group, h = keys.shape
    k, v = dequantize(keys, dtype=dtype), dequantize(values, dtype=dtype)
    if tokens_per_row(values, spec) == 2:
        pairs = v.reshape(b, m, num_groups, group // 2, 2, h)
        v = jnp.swapaxes(pairs, 3, 4)
    shape = (b, m, num_groups * group, h)
    return k.reshape(shape), v.reshape(shape)


def tokens_per_row(values: QTensor, spec: KVCacheSpec) -> int:
    """The number of tokens that a row of quantized values holds, 1 or 2."""
    return spec.group // values.shape[3]


def _in_pairs(v: jax.Array) -> jax.Array:
    """`[..., g, h]` as `[..., g / 2, 2 * h]`: tokens i and i + g / 2 in a row."""
    *lead, group, h = v.shape
    halves = v.reshape(*lead, 2, group // 2, h)
    return jnp.swapaxes(halves, -3, -2).reshape(*lead, group // 2, 2 * h)


def _group_size_in_pairs(spec: QuantSpec, group: int, h: int) -> int | None:
    """The group size of values with two tokens in a row; None for one token in a row.

    Both arrangements give the same codes and scales. A byte and a scale must not belong
    to two tokens.
    """
    granularity = spec.granularity
    if isinstance(granularity, PerGroup):
        size = min(granularity.size, h)
    elif isinstance(granularity, PerChannel):
        size = h
    else:
        return None
    fits = h % size == 0 and size % 2 == 0 and group % 2 == 0
    return size if spec.fmt.bits == 4 and fits else None


def _quantize_along(x: jax.Array, spec: QuantSpec, axis: int, name: str) -> QTensor:
    granularity = spec.granularity
    if isinstance(granularity, PerGroup) and granularity.size > x.shape[axis]:
        # A group of tokens, or a head, is shorter than the group size of the spec.
        shorter = dataclasses.replace(granularity, size=x.shape[axis])
        spec = spec.replace(granularity=shorter, packing=spec.packing)
    return quantize(
        x,
        spec,
        contracting=axis,
        batch=(0, 1, 2),
        on_nonfinite="propagate",
        name=name,
    )


def num_quantized(lengths: jax.Array, spec: KVCacheSpec) -> jax.Array:
    """The number of quantized groups of each slot, int32 `[b]`.

    A group is quantized when its first token is no longer one of the newest `residual`
    tokens.
    """
    return jnp.maximum(0, (lengths - spec.residual + spec.group - 1) // spec.group)


def newest_in_ring(last: jax.Array, num_places: int) -> jax.Array:
    """The newest item in each place of a ring buffer.

    Item i is in place i mod `num_places`.

    Args:
      last: int32 `[b]`, the index of the newest item of each slot; -1 if there is none.
      num_places: number of places in the ring buffer.

    Returns:
      int32 `[b, num_places]`, the index of an item; negative for an empty place.
    """
    places = jnp.arange(num_places, dtype=jnp.int32)[None]
    return last[:, None] - (last[:, None] - places) % num_places
