"""The arrays of a quantized KV cache, and which place holds which token.

Both kinds of arrays are ring buffers. The newest `residual` tokens are in full
precision: token i is in place i mod `residual`. Older tokens are quantized in groups of
`group` tokens: group j is in place j mod `num_groups`. `_append.py` writes the arrays.
`_attention.py` reads the arrays.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.ops.kv_cache._spec import KVCacheSpec
from jaxq.qtensor import PerGroup, QTensor, QuantSpec, quantize


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
    """
    assert isinstance(spec.keys, QuantSpec)
    assert isinstance(spec.values, QuantSpec)
    keys = _quantize_along(k, spec.keys, -2, "keys")
    return keys, _quantize_along(v, spec.values, -1, "values")


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
