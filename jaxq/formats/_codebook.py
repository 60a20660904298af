"""Formats given by a table of numbers, and functions that compute the known tables.

The known tables are NormalFloat, AbnormalFloat, the dynamic maps and powers of two.
Users can define further tables.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.debug_checks import allow_nonfinite
from jaxq.formats._format import Format
from jaxq.formats._rounding import check_rounding, random_uniform

# Up to this many boundaries, a sum of comparisons is faster than a search on every
# platform, because it is one fused elementwise pass.
_MOST_COMPARISONS = 32
# Up to this many entries, a chain of selects is faster than a gather. Its gradient is
# faster too: it is made of sums and needs no scatter.
_MOST_SELECTS = 16


@dataclasses.dataclass(frozen=True)
class CodebookFormat(Format):
    """The numbers of a table. The code of a number is its index in the table.

    Rounding goes to the nearest entry. A number half-way between two entries goes to
    the lower entry, as in bitsandbytes. NaN goes to the lowest entry. A table may hold
    both +0 and -0, as bitsandbytes' fp4 does. Encoding then gives the code of +0 only.

    Args:
      name: registry name.
      table: 2 to 256 finite numbers in any order. They are rounded to float32 and must
        be distinct in float32.
      boundaries: the numbers between the ranges of neighbouring entries, ascending.
        Their number is the number of distinct numbers in `table`, minus 1. A number on
        a boundary goes to the lower entry. None uses the midpoints of neighbouring
        entries, computed in float32.

    Raises:
      ValueError: `table` does not have 2 to 256 entries, an entry is not finite, two
        entries are equal in float32, or a boundary is not between its two entries.

    Example:
      >>> import jaxq
      >>> table = (-1.0, -1 / 3, 1 / 3, 1.0)
      >>> thirds = jaxq.formats.CodebookFormat("thirds", table)
      >>> thirds.bits, thirds.encode([-0.9, 0.1]).tolist()
      (2, [0, 2])
    """

    kind: ClassVar[str] = "codebook"

    table: tuple[float, ...]
    boundaries: tuple[float, ...] | None = None

    def __post_init__(self):
        with np.errstate(over="ignore"):  # an infinity is refused below
            table = np.asarray(self.table, np.float32)
        if table.ndim != 1 or not 2 <= table.size <= 256:
            raise ValueError(
                f"CodebookFormat {self.name!r}: table must be one row of 2 to 256 "
                f"numbers, got shape {table.shape}."
            )
        if not np.isfinite(table).all():
            raise ValueError(
                f"CodebookFormat {self.name!r}: entry "
                f"{int(np.argmin(np.isfinite(table)))} is not finite. Every entry of "
                "table must be a finite float32 number."
            )
        # The comparison is by bits, because a table may hold both -0 and +0.
        if np.unique(table.view(np.uint32)).size != table.size:
            raise ValueError(
                f"CodebookFormat {self.name!r}: the table repeats an entry (in "
                "float32). Remove the duplicates."
            )
        object.__setattr__(self, "table", tuple(table.tolist()))
        if self.boundaries is not None:
            object.__setattr__(self, "boundaries", self._checked_boundaries())

    def _checked_boundaries(self) -> tuple[float, ...]:
        with np.errstate(over="ignore"):
            edges = np.asarray(self.boundaries, np.float32)
        entries, _ = self._ascending_entries()
        low, high = entries[:-1], entries[1:]
        if edges.shape != low.shape or not ((low <= edges) & (edges <= high)).all():
            raise ValueError(
                f"CodebookFormat {self.name!r}: boundaries must be {low.size} numbers "
                "in ascending order, each between two neighbouring entries; got "
                f"{self.boundaries}."
            )
        return tuple(edges.tolist())

    @property
    def bits(self) -> int:
        return max(1, (len(self.table) - 1).bit_length())

    @property
    def max(self) -> float:
        return max(self.table)

    @property
    def min(self) -> float:
        return min(self.table)

    @property
    def smallest_positive(self) -> float:
        return min((v for v in self.table if v > 0), default=0.0)

    @property
    def zero_code(self) -> int:
        entries, codes = self._ascending_entries()
        return int(codes[entries == 0][0]) if 0 in entries else 0

    def codes(self) -> np.ndarray:
        return np.arange(len(self.table), dtype=np.uint8)

    def _ascending_entries(self) -> tuple[np.ndarray, np.ndarray]:
        """The entries in ascending order and their codes, without -0 if +0 exists."""
        table = np.asarray(self.table, np.float32)
        codes = np.argsort(table, kind="stable").astype(np.uint8)
        if (table == 0).sum() == 2:
            minus_zero = (table == 0) & np.signbit(table)
            codes = codes[~minus_zero[codes]]
        return table[codes], codes

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        check_rounding(rounding, key)
        del saturate  # a table has no infinity and no NaN
        x = jnp.asarray(x, jnp.float32)
        entries, codes = self._ascending_entries()
        if rounding == "toward_zero":
            # A positive number goes to the entry below it, a negative one to the entry
            # above it. A number outside the table goes to the outermost entry.
            below_next = np.nextafter(entries[1:], np.float32(-np.inf))
            edges = np.where(entries[1:] > 0, below_next, entries[:-1])
            rank = _num_edges_below(x, edges)
        elif rounding == "stochastic":
            rank = _stochastic_rank(x, entries, key)
        elif self.boundaries is not None:
            rank = _num_edges_below(x, np.asarray(self.boundaries, np.float32))
        else:
            midpoints = (entries[:-1] + entries[1:]) / np.float32(2)
            rank = _num_edges_below(x, midpoints)
        if (codes == np.arange(codes.size)).all():
            return rank.astype(jnp.uint8)
        return jnp.asarray(codes)[rank]

    def decode(self, codes: jax.Array) -> jax.Array:
        table = jnp.asarray(self.table, jnp.float32)
        return jnp.take(table, codes.astype(jnp.int32), mode="clip")


def decode_by_table(fmt: Format, codebook: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns the numbers of `codes` in a table that replaces the format's own numbers.

    Args:
      fmt: format of the codes. Code 0 of a signed integer format stays the number 0,
        whatever the table says. The zeros of ternary weights are therefore constant.
      codebook: float32 `[..., num_codes]`, in ascending order of the codes. The leading
        axes broadcast against `codes`.
      codes: codes of `fmt`, any shape.

    Returns:
      float32, the shape of `codes`. It is differentiable with respect to `codebook`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> ternary = jaxq.formats.get("ternary")
      >>> codes = jnp.array([-1, 0, 1], jnp.int8)
      >>> table = jnp.array([-0.5, 0.0, 2.0])
      >>> jaxq.formats.decode_by_table(ternary, table, codes).tolist()
      [-0.5, 0.0, 2.0]
    """
    first = int(fmt.min) if fmt.kind == "integer" else 0
    index = codes.astype(jnp.int32) - first
    size = codebook.shape[-1]
    if size <= _MOST_SELECTS:
        shape = jnp.broadcast_shapes(codebook.shape[:-1], codes.shape)
        numbers = jnp.broadcast_to(codebook[..., 0], shape)
        for i in range(1, size):
            numbers = jnp.where(index == i, codebook[..., i], numbers)
    else:
        numbers = jnp.take_along_axis(codebook, index[..., None], axis=-1, mode="clip")
        numbers = numbers[..., 0]
    if first < 0:
        return jnp.where(codes == 0, 0.0, numbers)
    return numbers


def _num_edges_below(x: jax.Array, edges: np.ndarray) -> jax.Array:
    """The number of edges below each x: uint8, or int32 for a long table. NaN gets 0.

    Args:
      x: float32, any shape.
      edges: float32 `[num_edges]`, ascending.
    """
    if edges.size <= _MOST_COMPARISONS:
        rank = jnp.zeros(x.shape, jnp.uint8)
        for edge in edges:
            rank = rank + (x > edge).astype(jnp.uint8)
        return rank
    first_rank, first_bucket, num_rounds = _ranks_of_buckets(tuple(edges.tolist()))
    num_buckets = first_rank.size // 2
    bucket = lax.bitcast_convert_type(jnp.abs(x), np.uint32) >> _BUCKET_SHIFT
    bucket = jnp.clip(bucket.astype(np.int32) - first_bucket, 0, num_buckets - 1)
    bucket = jnp.where(x < 0, bucket + num_buckets, bucket)
    rank = _entries_at(first_rank, bucket)
    next_edge = np.append(edges, np.float32(np.inf))
    with allow_nonfinite():
        for _ in range(num_rounds):
            rank = rank + (x > _entries_at(next_edge, rank)).astype(np.int32)
    return jnp.where(jnp.isnan(x), 0, rank)


# The numbers of one bucket have the same sign, exponent and first 7 mantissa bits.
_BUCKET_SHIFT = 16


@functools.lru_cache(maxsize=64)
def _ranks_of_buckets(edges: tuple[float, ...]) -> tuple[np.ndarray, int, int]:
    """A table from which the rank of a number follows almost without a search.

    A search by bisection takes one pass over the array for each bit of the rank. The
    table has the rank of the smallest number of each bucket. The difference to the rank
    of another number in the bucket follows from one or two comparisons. XLA fuses all
    steps into one elementwise pass.

    Args:
      edges: float32 numbers, ascending.

    Returns:
      first_rank: int32 `[2 * num_buckets]`, the number of edges below all numbers of a
        bucket. The first half is for positive numbers, ordered by magnitude, and the
        second half for negative ones.
      first_bucket: the number of the first bucket. It also holds all numbers of smaller
        magnitude, and the last bucket all numbers of larger magnitude.
      num_rounds: the largest number of edges between the numbers of one bucket.
    """
    array = np.asarray(edges, np.float32)
    magnitudes = np.abs(array[array != 0])
    buckets = magnitudes.view(np.uint32) >> _BUCKET_SHIFT
    first, last = max(int(buckets.min()) - 1, 0), int(buckets.max()) + 1
    starts = np.arange(first, last + 2, dtype=np.uint32) << _BUCKET_SHIFT
    bounds = starts.view(np.float32)  # of magnitudes, [num_buckets + 1]
    bounds[0], bounds[-1] = 0, np.inf
    lower = np.concatenate([bounds[:-1], -bounds[1:]])
    upper = np.concatenate([bounds[1:], -bounds[:-1]])
    first_rank = np.searchsorted(array, lower, side="left")
    last_rank = np.searchsorted(array, upper, side="left")
    num_rounds = int((last_rank - first_rank).max())
    return first_rank.astype(np.int32), first, num_rounds


def _entries_at(table: np.ndarray, index: jax.Array) -> jax.Array:
    """`table[index]` for indices that are in bounds."""
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")


def _stochastic_rank(
    x: jax.Array, entries: np.ndarray, key: jax.Array | None
) -> jax.Array:
    """The index of the lower or the upper neighbour of each x in ascending `entries`.

    For neighbours a <= x < b the upper one is chosen with probability
    (x - a) / (b - a), so that the mean over keys is x.
    """
    rank = _num_edges_below(x, np.nextafter(entries[1:], np.float32(-np.inf)))
    rank = rank.astype(jnp.int32)
    lower = jnp.asarray(entries)[rank]
    upper = jnp.asarray(entries)[jnp.minimum(rank + 1, entries.size - 1)]
    # At and beyond the largest entry both neighbours are that entry.
    gap = jnp.where(upper > lower, upper - lower, 1.0)
    probability = jnp.where(upper > lower, (x - lower) / gap, 0.0)
    return rank + (random_uniform(key, x.shape) < probability).astype(jnp.int32)


def normal_float(bits: int) -> tuple[float, ...]:
    """Returns the NormalFloat table of `bits` bits, ascending.

    The table has 2^(bits-1) - 1 negative numbers, zero, and 2^(bits-1) positive
    numbers. They are quantiles of the standard normal distribution at evenly spaced
    probabilities, divided by the largest one. The registered format `nf4` does not use
    this table but the published one, which differs in the last digits.

    Args:
      bits: 2 to 8.

    Raises:
      ValueError: `bits` is not 2 to 8.

    Example:
      >>> import jaxq
      >>> [round(v, 3) for v in jaxq.formats.normal_float(2)]
      [-1.0, 0.0, 0.436, 1.0]

    References:
      Dettmers et al., "QLoRA", 2023, section 3, and the authors' code.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"normal_float: bits must be 2 to 8, got {bits}.")
    half = 1 << (bits - 1)
    # The outermost probability: the mean of those of tables with 2^bits - 1 and 2^bits
    # entries, each half a step away from probability 1.
    offset = 0.5 * ((1 - 1 / (2 * (2 * half - 1))) + (1 - 1 / (2 * 2 * half)))
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, half + 1)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, half)[:-1]]
    table = np.sort(np.asarray([*negative, 0.0, *positive]))
    return tuple((table / table.max()).astype(np.float32).tolist())


def dynamic_map(signed: bool, bits: int = 8) -> tuple[float, ...]:
    """Returns the table of the dynamic data type: 2^bits numbers, ascending.

    A code holds a decimal exponent in unary and a linear fraction in the other bits.
    With 8 bits the signed table goes from -0.993 to 1, the unsigned one from 0 to 1.
    Zero is exact. The smallest positive number is about 5.5e-7 (signed) or 3.3e-7
    (unsigned).

    Args:
      signed: whether the table has negative numbers.
      bits: 2 to 8.

    Raises:
      ValueError: `bits` is not 2 to 8.

    Example:
      >>> import jaxq
      >>> table = jaxq.formats.dynamic_map(signed=True)
      >>> len(table), table[0], table[-1]
      (256, -0.992968738079071, 1.0)

    References:
      Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2016; Dettmers
      et al., "8-bit Optimizers via Block-wise Quantization", 2022.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"dynamic_map: bits must be 2 to 8, got {bits}.")
    num_decades = bits - 1
    table: list[np.float32] = [np.float32(0), np.float32(1)]
    for i in range(num_decades):
        edges = _linspace_like_torch(2**i + 1 if signed else 2 ** (i + 1) + 1)
        decade = np.float32(10.0 ** (i - num_decades + 1))
        middles = decade * ((edges[:-1] + edges[1:]) / np.float32(2))
        table += [*middles, *-middles] if signed else [*middles]
    return tuple(np.sort(np.asarray(table)).tolist())


def _linspace_like_torch(count: int) -> np.ndarray:
    """`count` numbers from 0.1 to 1, rounded as torch.linspace rounds them.

    torch computes the first half from the start and the second half from the end.
    The same order gives bitsandbytes' table bit for bit.
    """
    step = (np.float32(1) - np.float32(0.1)) / np.float32(count - 1)
    i = np.arange(count)
    from_start = float(np.float32(0.1)) + float(step) * i
    from_end = 1 - float(step) * (count - 1 - i)
    return np.where(i < count // 2, from_start, from_end).astype(np.float32)


def powers_of_two(bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns a table of powers of two, and boundaries that round in the logarithm.

    The table holds zero and +-2^0 down to +-2^-(2^(bits-1) - 2). The boundary between
    two powers is their geometric mean. The boundary between zero and the smallest power
    is half of that power.

    Args:
      bits: 2 or more.

    Returns:
      (table, boundaries), both ascending. They are arguments of `CodebookFormat`.

    Example:
      >>> import jaxq
      >>> table, boundaries = jaxq.formats.powers_of_two(3)
      >>> table
      (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
      >>> boundaries[3:]
      (0.125, 0.3535533845424652, 0.7071067690849304)

    References:
      Miyashita et al., "Convolutional Neural Networks using Logarithmic Data
      Representation", 2016.
    """
    count = (1 << (bits - 1)) - 1
    positive = 2.0 ** -np.arange(count)[::-1]
    edges = np.concatenate([[positive[0] / 2], positive[:-1] * np.sqrt(2)])
    table = np.concatenate([-positive[::-1], [0.0], positive])
    boundaries = np.concatenate([-edges[::-1], edges]).astype(np.float32)
    return tuple(table.tolist()), tuple(boundaries.tolist())
