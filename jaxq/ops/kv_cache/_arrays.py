"""The arrays of a quantized KV cache, and which place in them holds which token.

Tokens enter a ring of places. The newest `residual` tokens are in full precision: token
i is in place i mod `residual`. Older tokens are quantized in groups of `group`: group j
is in place j mod `num_groups`. `_append.py` writes the arrays, `_attention.py` reads
them.
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
    """The fields of `KVCache`, which describes them."""

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
        """How many groups of quantized tokens a slot has place for."""
        return self.keys.shape[2]


def quantize_groups(
    k: jax.Array, v: jax.Array, *, spec: KVCacheSpec
) -> tuple[QTensor, QTensor]:
    """Keys and values of whole groups, each `[b, m, groups, group, h]`, quantized.

    A key scale is shared by the tokens of a group, a value scale by the channels of a
    token (KIVI).
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
    """How many groups of each slot are quantized, int32 `[b]`.

    A group is quantized when its first token is not among the newest `residual` ones.
    """
    return jnp.maximum(0, (lengths - spec.residual + spec.group - 1) // spec.group)


def newest_in_ring(last: jax.Array, num_places: int) -> jax.Array:
    """What each place of a ring holds, if item i is in place i mod `num_places`.

    Args:
      last: int32 `[b]`, the newest item of each slot.
      num_places: places of the ring.

    Returns:
      int32 `[b, num_places]`; negative for a place that is still empty.
    """
    places = jnp.arange(num_places, dtype=jnp.int32)[None]
    return last[:, None] - (last[:, None] - places) % num_places
