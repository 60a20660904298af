"""`KVCache`: a quantized KV cache with keys per channel and values per token (KIVI).

Keys have channels that are large in every token. Values do not have such channels.
Therefore the tokens of a group share one scale for each channel of the keys, and every
token has separate scales for its values. The newest `residual` tokens stay in full
precision. A group is quantized once, from the original numbers, when the first token of
the group is no longer one of these newest tokens. The stored bits depend only on the
tokens. They do not depend on whether tokens are appended one by one or together.

| leaf | shape | content |
|---|---|---|
| `keys` | QTensor `[b, m, num_groups, group, h]` | quantized groups |
| `values` | QTensor `[b, m, num_groups, group, h]` | quantized groups; see below |
| `recent_keys`, `recent_values` | `[b, m, residual, h]` | tokens in full precision |
| `lengths` | int32 `[b]` | number of tokens in each slot |

Groups are QTensors with batch axes `[b, m, num_groups]`, so these axes come first in
every leaf. A row of 4-bit values holds two tokens: such values are `[b, m, num_groups,
group / 2, 2 * h]`. `_arrays.py` says why, and it alone depends on this.

References:
  Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024.
  Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, section
  4 (rotated keys and queries).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq.ops._operands import check_one_mesh
from jaxq.ops._plan import Plan
from jaxq.ops._plan_of_parts import mesh_of
from jaxq.ops._platform_choice import known_platform, num_devices_of
from jaxq.ops.kv_cache._append import append
from jaxq.ops.kv_cache._arrays import CacheArrays, quantize_groups
from jaxq.ops.kv_cache._attention import attend
from jaxq.ops.kv_cache._plan import plan_attention, plan_attention_on_mesh
from jaxq.ops.kv_cache._spec import KVCacheSpec, as_kv_cache_spec, whole_number
from jaxq.processes import to_numpy
from jaxq.qtensor import FLOATS, QuantSpec, describe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KVCache(CacheArrays):
    """Keys and values of the tokens so far, with one slot for each text of a batch.

    A KVCache is a pytree, and its shapes are static. `KVCache.empty` makes a cache
    without tokens. `append` returns a cache with more tokens. Both work under `jax.jit`
    and `lax.scan`. Donate the cache to a jitted function to reuse the memory. Each slot
    has its own length. `reset` empties slots.

    Attributes:
      keys: QTensor `[b, m, num_groups, group, h]`. Group j is in place j mod
        num_groups.
      values: QTensor `[b, m, num_groups, group, h]`. 4-bit values are
        `[b, m, num_groups, group / 2, 2 * h]`, two tokens in a row.
      recent_keys: `[b, m, residual, h]`, in full precision. Token i is in place i mod
        residual.
      recent_values: `[b, m, residual, h]`, in full precision.
      lengths: int32 `[b]`, the number of tokens in each slot.
      spec: how the cache is quantized.
      length: how many tokens a slot can hold.
      window: the largest number of tokens that a query reads, with its own token. None
        sets no limit.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> cache = jaxq.ops.KVCache.empty(
      ...     "int4", batch=2, num_heads=1, length=256, head_dim=64, dtype=jnp.float32
      ... )
      >>> k, v = jax.random.normal(jax.random.key(0), (2, 2, 100, 1, 64))
      >>> cache = jax.jit(jaxq.ops.KVCache.append)(cache, k, v)
      >>> q = jnp.ones((2, 1, 4, 64))
      >>> jax.jit(jaxq.ops.KVCache.attend)(cache, q).shape, cache.lengths.tolist()
      ((2, 1, 4, 64), [100, 100])

    References:
      Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024.
    """

    @classmethod
    def empty(
        cls,
        spec: str | QuantSpec | KVCacheSpec,
        *,
        batch: int,
        num_heads: int,
        length: int,
        head_dim: int,
        window: int | None = None,
        dtype: Any = "bfloat16",
    ) -> KVCache:
        """Makes a cache without tokens.

        Args:
          spec: preset name or `QuantSpec` for keys and values, or a `KVCacheSpec`.
          batch: number of slots, b.
          num_heads: number of key heads, m. The number of query heads may be a multiple
            of m.
          length: how many tokens a slot can hold.
          head_dim: size of a head, h.
          window: a query reads its own token and the `window - 1` tokens before it.
            Tokens that no later query reads may be overwritten. With None a query reads
            all tokens up to its own.
          dtype: float32, bfloat16 or float16: the dtype of queries, keys, values and of
            the stored tokens in full precision.

        Raises:
          ValueError: a size is less than 1; a preset is unknown; or the group size of a
            spec without `pad=True` does not divide `group` (keys) or `head_dim`
            (values).
          TypeError: a size is not a whole number, or `dtype` is not float32, bfloat16
            or float16.

        Example:
          >>> import jaxq
          >>> jaxq.ops.KVCache.empty(
          ...     "int8", batch=1, num_heads=2, length=64, head_dim=8
          ... ).lengths.tolist()
          [0]
        """
        spec = as_kv_cache_spec(spec, "KVCache.empty")
        b = whole_number("KVCache.empty: batch", batch)
        m = whole_number("KVCache.empty: num_heads", num_heads)
        length = whole_number("KVCache.empty: length", length)
        h = whole_number("KVCache.empty: head_dim", head_dim)
        if window is not None:
            window = whole_number("KVCache.empty: window", window)
        dtype = jnp.dtype(dtype)
        if dtype.name not in FLOATS:
            raise TypeError(
                f"KVCache.empty: dtype must be one of {', '.join(FLOATS)}, got "
                f"{dtype.name}."
            )
        num_groups = _num_group_places(spec, length, window)
        groups = jax.ShapeDtypeStruct((b, m, num_groups, spec.group, h), dtype)
        shapes = jax.eval_shape(
            functools.partial(quantize_groups, spec=spec), groups, groups
        )
        keys, values = jax.tree.map(_zero_bits, shapes)
        recent = jnp.zeros((b, m, spec.residual, h), dtype)
        lengths = jnp.zeros((b,), jnp.int32)
        no_values = jnp.zeros_like(recent)
        return cls(keys, values, recent, no_values, lengths, spec, length, window)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves: codes, scales, tokens in full precision and lengths."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def append(
        self, k: jax.Array, v: jax.Array, *, count: jax.typing.ArrayLike | None = None
    ) -> KVCache:
        """Appends tokens to each slot and returns the new cache.

        Args:
          k: keys `[b, t, m, h]` in the cache's dtype, after any rotary embedding. If a
            key contains NaN or infinity, the same channel of its group becomes NaN when
            the group is quantized. Every query of the slot that reads this group then
            becomes NaN.
          v: values `[b, t, m, h]`. If a value contains NaN or infinity, all numbers of
            its token that share a scale become NaN when the group is quantized.
          count: int32 `[b]`. Slot i takes the first `count[i]` of the t tokens. None
            takes all t tokens in every slot.

        Returns:
          The new cache. The bits do not depend on whether tokens come one by one or
          together, nor on jit. The exceptions are scale rules that compute a mean, as
          in the preset "ternary": the last bit of a sum depends on the compiled
          program.

        Raises:
          TypeError: `k` or `v` is not an array of the cache's dtype.
          ValueError: `k` or `v` is not `[b, t, m, h]`; `count` is not int32 `[b]` in
            `[0, t]`; or a slot gets more tokens than `length`. Under jit the lengths
            are unknown, so no error is raised and the oldest tokens are overwritten.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> cache = jaxq.ops.KVCache.empty(
          ...     "int8", batch=2, num_heads=1, length=64, head_dim=8, dtype=jnp.float32
          ... )
          >>> k = v = jnp.ones((2, 4, 1, 8))
          >>> cache.append(k, v, count=jnp.array([4, 2])).lengths.tolist()
          [4, 2]
        """
        self._check_arrays("append", k=k, v=v)
        b, t = k.shape[:2]
        if count is None:
            count = np.full((b,), t, np.int32)
        else:
            count = self._checked_count(count, t, "append")
        if not isinstance(self.lengths, Tracer) and not isinstance(count, Tracer):
            self._check_length(to_numpy(count))
        return append(self, k, v, jnp.asarray(count, jnp.int32))

    def attend(
        self,
        q: jax.Array,
        k: jax.Array | None = None,
        v: jax.Array | None = None,
        *,
        count: jax.typing.ArrayLike | None = None,
        scale: float | None = None,
        block: int = 256,
    ) -> jax.Array:
        """`softmax(scale q k^T) v`: each query reads the tokens up to its own position.

        Groups are dequantized `block` tokens at a time. The loop ends after the last
        group of the longest slot. Softmax and sums are float32. This function is for
        inference: the loop has no reverse-mode derivative.

        If a value is NaN or infinite, all queries of this call become NaN in the same
        slot and head. This includes queries of earlier positions: they give the value
        the weight 0, and 0 * NaN is NaN.

        Args:
          q: queries `[b, t, n, h]` in the cache's dtype. n is a multiple of m. Each key
            head serves n / m consecutive query heads.
          k: keys `[b, t, m, h]` of the queries' tokens, if these tokens are not in the
            cache yet. They are read in full precision. None means that the queries
            belong to the last t tokens of every slot. If a slot has appended fewer than
            t tokens, pass `count`.
          v: values `[b, t, m, h]` of the same tokens as `k`.
          count: int32 `[b]`, the `count` that `append` got for the queries' tokens. It
            is only allowed if `k` is None. The first `count[i]` queries of slot i
            belong to tokens. The results of the other queries have no meaning. With
            None all t queries of every slot belong to tokens.
          scale: scores are multiplied by this number. None uses `1 / sqrt(h)`.
          block: the number of tokens to dequantize at a time. It is rounded down to
            whole groups, with at least one group.

        Returns:
          float32 `[b, t, n, h]`. The result is 0 for a query that reads no token, for
          example in an empty slot.

        Raises:
          TypeError: the dtype of an array is not the cache's, only one of `k` and `v`
            is given, or `block` is not a whole number.
          ValueError: `q` is not `[b, t, n, h]`; `k` or `v` is not `[b, t, m, h]`;
            `count` is not int32 `[b]` in `[0, t]` or is given together with `k`;
            `block` is less than 1; or the queries read appended tokens that a cache
            with `window` has overwritten.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> cache = jaxq.ops.KVCache.empty(
          ...     "int8", batch=2, num_heads=1, length=64, head_dim=8, dtype=jnp.float32
          ... )
          >>> q, k = jnp.ones((2, 4, 2, 8)), jnp.ones((2, 4, 1, 8))
          >>> float(cache.attend(q, k, k).max())
          1.0
          >>> float(cache.append(k, k).attend(q).max())
          1.0
        """
        if (k is None) != (v is None):
            raise TypeError(
                "KVCache.attend: pass both k and v, or neither; got only "
                f"{'v' if k is None else 'k'}."
            )
        if k is None:
            self._check_arrays("attend", q=q)
            self._check_window(q.shape[1])
        else:
            self._check_arrays("attend", q=q, k=k, v=v)
            if k.shape[1] != q.shape[1]:
                raise ValueError(
                    f"KVCache.attend: q has {q.shape[1]} tokens and k has "
                    f"{k.shape[1]}. Pass one key for each query."
                )
        if count is not None and k is not None:
            raise ValueError(
                "KVCache.attend: count= is for tokens that are already in the cache. "
                "Pass either count, or k and v."
            )
        block = whole_number("KVCache.attend: block", block)
        t, h = q.shape[1], q.shape[3]
        scale = 1 / math.sqrt(h) if scale is None else float(scale)
        num_real: Any = t
        if count is not None:
            num_real = jnp.asarray(self._checked_count(count, t, "attend"), jnp.int32)
        return attend(self, q, k, v, num_real, scale=scale, block=block)

    def explain(self, q: Any, *, platform: str | None = None, mesh: Any = None) -> Plan:
        """Which kernel `attend(q)` runs, or why none runs. Nothing is computed.

        On a mesh whose axes are all Explicit, each device reads its own slots and heads
        with its own kernel.

        Args:
          q: queries `[b, t, n, h]` in the cache's dtype, or their
            `jax.ShapeDtypeStruct`.
          platform: as in `jaxq.explain`. None uses the default backend of jax.
          mesh: as in `jaxq.explain`.

        Returns:
          A `Plan` with the path "attention". Print it to read it.

        Raises:
          TypeError: the dtype of `q` is not the cache's.
          ValueError: `q` is not `[b, t, n, h]`, or `platform` is unknown.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> cache = jaxq.ops.KVCache.empty(
          ...     "int4", batch=1, num_heads=2, length=512, head_dim=128
          ... )
          >>> q = jnp.ones((1, 1, 8, 128), jnp.bfloat16)
          >>> cache.explain(q, platform="tpu").kernel
          'attention_tpu'
        """
        self._check_arrays("explain", q=q)
        platform = known_platform(platform, "KVCache.explain")
        mesh = mesh_of(mesh, self, q)
        if mesh is None or mesh.size == 1:
            return plan_attention(self, q, platform, num_devices_of(self, q))
        return plan_attention_on_mesh(self, q, platform, mesh)

    def reset(self, slots: jax.typing.ArrayLike | Sequence[int]) -> KVCache:
        """Empties some slots, so that they can hold other texts.

        The old tokens of these slots are never read again.

        Args:
          slots: integer indices, or a mask bool `[b]` that is True for slots to empty.

        Returns:
          The new cache.

        Raises:
          TypeError: `slots` are neither integers nor booleans.
          ValueError: the shape of a mask is not `[b]`, or an index is not in
            `[-b, b)`. Indices are not checked under jit.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> cache = jaxq.ops.KVCache.empty(
          ...     "int8", batch=2, num_heads=1, length=64, head_dim=8, dtype=jnp.float32
          ... )
          >>> k = jnp.ones((2, 4, 1, 8))
          >>> cache.append(k, k).reset([1]).lengths.tolist()
          [4, 0]
        """
        num_slots = self.lengths.shape[-1]
        mask = slot_mask(slots, num_slots, "KVCache.reset")
        mask = jnp.broadcast_to(mask, self.lengths.shape)
        return dataclasses.replace(self, lengths=jnp.where(mask, 0, self.lengths))

    def __repr__(self) -> str:
        names = [qt.spec.fmt.name for qt in (self.keys, self.values)]
        formats = " and ".join(dict.fromkeys(names))
        window = "" if self.window is None else f", window={self.window}"
        try:
            b, m, _, h = self.recent_keys.shape[-4:]
            size = f"{b} slots x {self.length} tokens x {m} heads of {h}"
            size = f"{size}, {self.nbytes:,} bytes"
        except (AttributeError, TypeError, ValueError):
            # jax transforms replace leaves by objects without shapes.
            size = f"leaves={type(self.lengths).__name__}"
        sizes = f"group={self.spec.group}, residual={self.spec.residual}"
        return f"KVCache({formats}, {size}, {sizes}{window})"

    def _check_arrays(self, caller: str, **arrays: Any) -> None:
        """Raises unless every array is `[b, t, heads, h]` in the cache's dtype."""
        if self.recent_keys.ndim != 4:
            raise ValueError(
                f"KVCache.{caller}: {self!r} is a stack of caches. Map over it with "
                "jax.vmap or lax.scan."
            )
        for name, x in arrays.items():
            self._check_array(caller, name, x)
        check_one_mesh((self, *arrays.values()), f"KVCache.{caller}")
        if "v" in arrays and arrays["v"].shape != arrays["k"].shape:
            k, v = (describe(arrays[n].dtype.name, arrays[n].shape) for n in "kv")
            raise ValueError(
                f"KVCache.{caller}: k and v must have one shape, got k: {k}, v: {v}."
            )

    def _check_array(self, caller: str, name: str, x: Any) -> None:
        """Raises unless `x` fits the slots, the heads and the dtype of the cache."""
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise TypeError(
                f"KVCache.{caller}: {name} must be an array, got {type(x).__name__}."
            )
        got = f"{name}: {describe(jnp.dtype(x.dtype).name, x.shape)}"
        dtype = self.dtype.name
        if x.dtype != self.dtype:
            raise TypeError(
                f"KVCache.{caller}: expected {dtype}, got {got}. Pass "
                f"{name}.astype('{dtype}'), or make the cache with another dtype."
            )
        b, m, _, h = self.recent_keys.shape
        is_query = name == "q"
        fits = len(x.shape) == 4 and x.shape[0] == b and x.shape[3] == h
        if fits:
            t, heads = x.shape[1:3]
            heads_fit = heads % m == 0 if is_query else heads == m
            fits = t > 0 and heads > 0 and heads_fit
        if not fits:
            wanted = f"[{b}, t, {'n' if is_query else m}, {h}]"
            if is_query:
                wanted = f"{wanted}, n a multiple of {m}"
            raise ValueError(f"KVCache.{caller}: expected {wanted}, got {got}.")

    def _check_length(self, count: np.ndarray) -> None:
        """Raises ValueError if a slot would contain more than `length` tokens."""
        after = to_numpy(self.lengths) + count
        if (after <= self.length).all():
            return
        slot = int(np.argmax(after))
        raise ValueError(
            f"KVCache.append: slot {slot} holds {int(self.lengths[slot])} tokens, "
            f"and {int(count[slot])} more exceed its length {self.length}. Make the "
            f"cache with length={int(after[slot])}, or empty the slot with reset."
        )

    def _check_window(self, num_queries: int) -> None:
        """Raises ValueError if queries would read tokens that were overwritten."""
        if self.window is None:
            return
        group, residual = self.spec.group, self.spec.residual
        stored = max(residual, (self.num_groups - 1) * group + residual + 1)
        needed = num_queries + self.window - 1
        if self.length > stored and needed > stored:
            raise ValueError(
                f"KVCache.attend: {num_queries} queries read the last {needed} tokens, "
                f"but a cache with window={self.window} stores only {stored} tokens. "
                "Pass k and v to attend, and append them to the cache afterwards."
            )

    def _checked_count(
        self, count: jax.typing.ArrayLike, t: int, caller: str
    ) -> jax.Array | np.ndarray:
        """`count` as int32 `[b]` within `[0, t]`; clipped under jit."""
        b = self.lengths.shape[0]
        array = count if isinstance(count, jax.Array) else np.asarray(count)
        if array.shape != (b,) or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"KVCache.{caller}: count must be int32[{b}], got "
                f"{describe(array.dtype.name, array.shape)}."
            )
        if isinstance(array, Tracer):
            return jnp.clip(array.astype(jnp.int32), 0, t)
        counts = to_numpy(array)
        if ((counts < 0) | (counts > t)).any():
            raise ValueError(
                f"KVCache.{caller}: count must be in [0, {t}], the number of tokens "
                f"given; got {counts.tolist()}."
            )
        return counts.astype(np.int32)


def _num_group_places(spec: KVCacheSpec, length: int, window: int | None) -> int:
    """The number of places for quantized groups that a slot needs."""
    num_groups = -(-max(0, length - spec.residual) // spec.group)
    if window is None:
        return num_groups
    if window <= spec.residual:
        return 0
    # The window may begin inside a group. Then up to group - 1 older tokens are stored
    # as well.
    num_tokens = window - spec.residual + spec.group - 1
    return min(num_groups, -(-num_tokens // spec.group))


def _zero_bits(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """An array whose bits are all 0. float8_e8m0fnu has no zero: `zeros` gives NaN."""
    bits = jnp.zeros(leaf.shape, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(bits, leaf.dtype)


def slot_mask(slots: Any, num_slots: int, caller: str) -> jax.Array:
    """bool `[num_slots]` from indices of slots or from a mask."""
    array = slots if isinstance(slots, jax.Array) else np.asarray(slots)
    got = describe(array.dtype.name, array.shape)
    if array.dtype == np.bool_:
        if array.shape != (num_slots,):
            raise ValueError(
                f"{caller}: a mask of slots must be bool[{num_slots}], got {got}."
            )
        return jnp.asarray(array)
    if array.size and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{caller}: slots must be integer indices or bool[{num_slots}], got {got}."
        )
    indices = array.reshape(-1).astype(np.int32)
    if not isinstance(indices, Tracer):
        known = to_numpy(indices)
        if ((known >= num_slots) | (known < -num_slots)).any():
            raise ValueError(
                f"{caller}: slots must be in [-{num_slots}, {num_slots}), got "
                f"{known.tolist()}."
            )
    return jnp.zeros((num_slots,), bool).at[indices].set(True)
