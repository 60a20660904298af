"""A quantized key-value cache: keys per channel, values per token, the newest tokens in full precision.

Keys have channels that are large in every token, values have none: so among the keys a group of tokens shares the
scale of each channel, and among the values every token has scales of its own (KIVI). A group is quantized once, from
the numbers as they came, when its first token leaves the window of the newest `residual` tokens. So what is stored
follows from the text alone: appended token by token, in pieces or at once, it comes out the same bit for bit.

| leaf | shape | what |
|---|---|---|
| `keys`, `values` | QTensors `[b, m, num_groups, group, h]` | group j in place j mod num_groups |
| `recent_keys`, `recent_values` | `[b, m, residual, h]` | token i in place i mod residual |
| `lengths` | int32 `[b]` | tokens of each slot so far |

Nothing here knows a format: groups are QTensors with batch axes [b, m, num_groups], which lead in every leaf.

References:
  Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024.
  Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, section 4 (rotated keys and queries).
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

from jaxq.ops.kv_cache import _steps
from jaxq.ops.kv_cache._spec import KVCacheSpec, as_kv_cache_spec, whole_number
from jaxq.qtensor import QTensor, QuantSpec

_DTYPES = ("float32", "bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KVCache:
    """Keys and values of the tokens seen so far, a slot for each text of a batch.

    A pytree of static shapes, made by `KVCache.empty`; `append` gives the grown one, under `jax.jit` and `lax.scan` as
    well (donate it there, and the memory is reused). Slots have lengths of their own, and `reset` frees some of them.

    Attributes:
      keys: QTensor `[b, m, num_groups, group, h]`.
      values: QTensor `[b, m, num_groups, group, h]`.
      recent_keys: `[b, m, residual, h]`, in full precision.
      recent_values: `[b, m, residual, h]`.
      lengths: int32 `[b]`, tokens of each slot.
      spec: how it is quantized.
      length: most tokens of a slot.
      window: tokens a query reads at most, itself included; None reads all.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> cache = jaxq.ops.KVCache.empty("int4", batch=2, num_heads=1, length=256, head_dim=64, dtype=jnp.float32)
      >>> k, v = jax.random.normal(jax.random.key(0), (2, 2, 100, 1, 64))
      >>> cache = jax.jit(jaxq.ops.KVCache.append)(cache, k, v)
      >>> q = jnp.ones((2, 1, 4, 64))
      >>> jax.jit(jaxq.ops.KVCache.attend)(cache, q).shape, cache.lengths.tolist()
      ((2, 1, 4, 64), [100, 100])

    References:
      Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024.
    """

    keys: QTensor
    values: QTensor
    recent_keys: jax.Array
    recent_values: jax.Array
    lengths: jax.Array
    spec: KVCacheSpec = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})

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
        """A cache of no tokens.

        Args:
          spec: preset name or `QuantSpec` for keys and values, or a `KVCacheSpec`.
          batch: slots b.
          num_heads: key heads m; queries may have a multiple.
          length: most tokens of a slot.
          head_dim: h.
          window: a query reads itself and the `window - 1` tokens before it, and older ones are not stored.
          dtype: float32, bfloat16 or float16: of queries, keys and values, and of the tokens not quantized.

        Raises:
          ValueError: sizes below 1, an unknown preset, or groups of a spec that do not divide.
          TypeError: a size that is no whole number, another dtype.
        """
        spec = as_kv_cache_spec(spec, "KVCache.empty")
        sizes = {
            "batch": batch,
            "num_heads": num_heads,
            "length": length,
            "head_dim": head_dim,
        }
        b, m, length, h = (
            whole_number(f"KVCache.empty: {name}", size) for name, size in sizes.items()
        )
        window = (
            None if window is None else whole_number("KVCache.empty: window", window)
        )
        dtype = jnp.dtype(dtype)
        if dtype.name not in _DTYPES:
            raise TypeError(
                f"KVCache.empty: dtype must be one of {', '.join(_DTYPES)}, got {dtype.name}."
            )
        num_groups = -(-max(0, length - spec.residual) // spec.group)
        if window is not None:
            # Groups do not end where the window begins: in the worst case group - 1 tokens of the oldest are outside.
            needed = (
                -(-(window - spec.residual + spec.group - 1) // spec.group)
                if window > spec.residual
                else 0
            )
            num_groups = min(num_groups, needed)
        blocks = jax.ShapeDtypeStruct((b, m, num_groups, spec.group, h), dtype)
        shapes = jax.eval_shape(
            functools.partial(_steps.quantize_groups, spec=spec), blocks, blocks
        )
        keys, values = jax.tree.map(_zeros, shapes)
        recent = jnp.zeros((b, m, spec.residual, h), dtype)
        return cls(
            keys,
            values,
            recent,
            jnp.zeros_like(recent),
            jnp.zeros((b,), jnp.int32),
            spec,
            length,
            window,
        )

    @property
    def dtype(self) -> np.dtype:
        """Of queries, keys and values."""
        return self.recent_keys.dtype

    @property
    def num_groups(self) -> int:
        """Places for groups of quantized tokens."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves: codes, scales, the tokens in full precision, lengths."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def append(
        self, k: jax.Array, v: jax.Array, *, count: jax.typing.ArrayLike | None = None
    ) -> KVCache:
        """The cache with more tokens.

        Args:
          k: keys `[b, t, m, h]` in the cache's dtype, after any rotary embedding. A number that is not finite makes its
            channel of its group NaN once it is quantized, and so every query of its slot that reads the group.
          v: values `[b, t, m, h]`. A number that is not finite makes its token NaN.
          count: int32 `[b]`, how many of the t tokens each slot takes, the first ones; None takes all.

        Returns:
          The grown cache; the same bits whether tokens come one by one or together, eager or jitted. (Scales that are
          means, as of "ternary", are sums whose last bit depends on the program.)

        Raises:
          TypeError: another dtype.
          ValueError: shapes that do not fit, or more tokens than `length`. Inside jit, where lengths are not known,
            the oldest tokens are overwritten instead.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> cache = jaxq.ops.KVCache.empty("nf4", batch=2, num_heads=1, length=64, head_dim=8, dtype=jnp.float32)
          >>> cache.append(jnp.ones((2, 5, 1, 8)), jnp.ones((2, 5, 1, 8)), count=jnp.array([5, 2])).lengths.tolist()
          [5, 2]
        """
        self._check("append", k=k, v=v)
        b, t = k.shape[:2]
        if count is None:
            count = np.full((b,), t, np.int32)
        else:
            count = self._checked_count(count, t)
        if not isinstance(self.lengths, Tracer) and not isinstance(count, Tracer):
            after = np.asarray(self.lengths) + np.asarray(count)
            if (after > self.length).any():
                slot = int(np.argmax(after))
                raise ValueError(
                    f"KVCache.append: slot {slot} holds {int(self.lengths[slot])} tokens, and {int(count[slot])} more "
                    f"exceed its length {self.length}. Make the cache with length={int(after[slot])}, or free the slot "
                    "with reset."
                )
        return _steps.append(self, k, v, jnp.asarray(count, jnp.int32))

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
        """`softmax(scale q k^T) v` of every query over the tokens at and before its position.

        Groups are dequantized `block` tokens at a time, and only as many as the longest slot holds; softmax and sums
        are float32. For inference: the loop has no reverse derivative. A value that is NaN or
        infinite reaches every query of the call in its slot and head, earlier ones too: these weigh it with 0, and
        0 NaN = NaN.

        Args:
          q: queries `[b, t, n, h]` in the cache's dtype, n a multiple of the key heads; neighbours share a key head.
          k: keys `[b, t, m, h]` of the queries' own tokens, not appended yet, which are read as they come; None if q
            belongs to the last t tokens appended (of every slot: else say `count`).
          v: their values, `[b, t, m, h]`.
          count: int32 `[b]`, what was given to `append` of these queries' tokens, if k is None: slot i's first
            `count[i]` queries are real, and results of the others mean nothing. None: all t of every slot.
          scale: of scores; None takes `1 / sqrt(h)`.
          block: tokens dequantized at a time, rounded to whole groups.

        Returns:
          float32 `[b, t, n, h]`; 0 for a query that reads nothing, as in an empty slot.

        Raises:
          TypeError: another dtype, or one of k and v without the other.
          ValueError: shapes that do not fit; more queries of appended tokens than a window has kept tokens for.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> cache = jaxq.ops.KVCache.empty("int8", batch=1, num_heads=2, length=64, head_dim=8, dtype=jnp.float32)
          >>> q, k, v = jnp.ones((1, 3, 4, 8)), jnp.ones((1, 3, 2, 8)), jnp.ones((1, 3, 2, 8))
          >>> float(cache.attend(q, k, v).max()), float(cache.append(k, v).attend(q).max())
          (1.0, 1.0)
        """
        if (k is None) != (v is None):
            raise TypeError(
                "KVCache.attend: k and v are both tokens to read, or both None; got one of them."
            )
        self._check("attend", q=q, **({} if k is None else {"k": k, "v": v}))
        if k is not None and k.shape[1] != q.shape[1]:
            raise ValueError(
                f"KVCache.attend: q has {q.shape[1]} tokens and k {k.shape[1]}: one key for every query."
            )
        block = whole_number("KVCache.attend: block", block)
        t, h = q.shape[1], q.shape[3]
        kept = max(
            self.spec.residual,
            (self.num_groups - 1) * self.spec.group + self.spec.residual + 1,
        )
        if (
            k is None
            and self.window is not None
            and self.length > kept
            and t + self.window - 1 > kept
        ):
            raise ValueError(
                f"KVCache.attend: {t} queries of appended tokens read {t + self.window - 1} tokens, and a window of "
                f"{self.window} keeps {kept}. Pass k and v, and append them afterwards."
            )
        scale = 1 / math.sqrt(h) if scale is None else float(scale)
        if count is not None and k is not None:
            raise ValueError(
                "KVCache.attend: count= is of tokens appended already; with k and v there are none."
            )
        real = (
            t
            if count is None
            else jnp.asarray(self._checked_count(count, t), jnp.int32)
        )
        return _steps.attend(self, q, k, v, real, scale=scale, block=block)

    def reset(self, slots: jax.typing.ArrayLike | Sequence[int]) -> KVCache:
        """The cache with some slots empty, ready for other texts; nothing of what they held is read again.

        Args:
          slots: indices, or bool `[b]`, True for slots to empty.

        Raises:
          TypeError: neither integers nor booleans.
          ValueError: a mask of another size, or an index out of range (outside jit).

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> cache = jaxq.ops.KVCache.empty("int8", batch=3, num_heads=1, length=64, head_dim=8, dtype=jnp.float32)
          >>> cache = cache.append(jnp.ones((3, 4, 1, 8)), jnp.ones((3, 4, 1, 8)))
          >>> cache.reset([1]).lengths.tolist()
          [4, 0, 4]
        """
        b = self.lengths.shape[-1]
        mask = slot_mask(slots, b, "KVCache.reset")
        return dataclasses.replace(
            self,
            lengths=jnp.where(
                jnp.broadcast_to(mask, self.lengths.shape), 0, self.lengths
            ),
        )

    def __repr__(self) -> str:
        formats = " and ".join(
            dict.fromkeys(qt.spec.fmt.name for qt in (self.keys, self.values))
        )
        window = "" if self.window is None else f", window={self.window}"
        try:
            b, m, _, h = self.recent_keys.shape[-4:]
            size = f"{b} slots x {self.length} tokens x {m} heads of {h}, {self.nbytes:,} bytes"
        except (
            AttributeError,
            TypeError,
            ValueError,
        ):  # leaves that are not arrays, as transforms make
            size = f"leaves={type(self.lengths).__name__}"
        return f"KVCache({formats}, {size}, group={self.spec.group}, residual={self.spec.residual}{window})"

    def _check(self, caller: str, **arrays: Any) -> None:
        """Raises unless every array is `[b, t, heads, h]` in the cache's dtype."""
        if self.recent_keys.ndim != 4:
            raise ValueError(
                f"KVCache.{caller}: {self!r} is a stack of caches. Map over it with jax.vmap or lax.scan."
            )
        b, m, _, h = self.recent_keys.shape
        sizes = None
        for name, x in arrays.items():
            if not hasattr(x, "dtype") or not hasattr(x, "shape"):
                raise TypeError(
                    f"KVCache.{caller}: {name} must be an array, got {type(x).__name__}."
                )
            got = f"{name}: {jnp.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"
            if x.dtype != self.dtype:
                raise TypeError(
                    f"KVCache.{caller}: expected {self.dtype.name}, got {got}. Pass {name}.astype('{self.dtype.name}') "
                    "or make the cache with another dtype."
                )
            heads = "n" if name == "q" else str(m)
            fits = (
                len(x.shape) == 4
                and x.shape[0] == b
                and x.shape[3] == h
                and x.shape[1] > 0
            )
            if (
                not fits
                or (x.shape[2] % m if name == "q" else x.shape[2] != m)
                or not x.shape[2]
            ):
                more = f", n a multiple of {m}" if name == "q" else ""
                raise ValueError(
                    f"KVCache.{caller}: expected [{b}, t, {heads}, {h}]{more}, got {got}."
                )
            if name == "k":
                sizes = x.shape
            if name == "v" and x.shape != sizes:
                raise ValueError(
                    f"KVCache.{caller}: k and v must have one shape, got k: {list(sizes or ())}, {got}."
                )

    def _checked_count(
        self, count: jax.typing.ArrayLike, t: int
    ) -> jax.Array | np.ndarray:
        b = self.lengths.shape[0]
        array = count if isinstance(count, jax.Array) else np.asarray(count)
        if array.shape != (b,) or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"KVCache.append: count must be int32[{b}], got {array.dtype.name}{list(array.shape)}."
            )
        if isinstance(array, Tracer):
            return jnp.clip(array.astype(jnp.int32), 0, t)
        if ((np.asarray(array) < 0) | (np.asarray(array) > t)).any():
            raise ValueError(
                f"KVCache.append: count must lie in [0, {t}], the tokens given; got {array.tolist()}."
            )
        return np.asarray(array, np.int32)


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Zero in every bit: float8_e8m0fnu has no zero, and would be NaN."""
    bits = jnp.zeros(leaf.shape, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(bits, leaf.dtype)


def slot_mask(slots: Any, b: int, caller: str) -> jax.Array:
    """bool `[b]`, True for the slots meant by indices or a mask."""
    array = slots if isinstance(slots, jax.Array) else np.asarray(slots)
    if array.dtype == np.bool_:
        if array.shape != (b,):
            raise ValueError(
                f"{caller}: a mask of slots must be bool[{b}], got bool{list(array.shape)}."
            )
        return jnp.asarray(array)
    if array.size and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{caller}: slots are indices or bool[{b}], got {array.dtype.name}{list(array.shape)}."
        )
    indices = array.reshape(-1).astype(np.int32)
    if (
        not isinstance(indices, Tracer)
        and (np.asarray(indices >= b) | np.asarray(indices < -b)).any()
    ):
        raise ValueError(
            f"{caller}: slots {np.asarray(indices).tolist()} are not all in [0, {b})."
        )
    return jnp.zeros((b,), bool).at[indices].set(True)
