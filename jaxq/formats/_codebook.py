"""Formats given by a table: NormalFloat, AbnormalFloat, dynamic maps, powers of two, any user's own numbers."""

from __future__ import annotations

import dataclasses
import statistics
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats._format import Format
from jaxq.formats._rounding import check_rounding, random_uniform

# Up to this many entries a sum of comparisons beats a search on every platform: it is one fused elementwise pass.
_MOST_COMPARISONS = 32
# Up to this many entries a chain of selects beats a gather, and so does its gradient, sums that need no scatter.
_MOST_SELECTS = 16


@dataclasses.dataclass(frozen=True)
class CodebookFormat(Format):
    """The numbers of a table; the code of a number is its place in the table.

    A number goes to the nearest entry; one exactly half-way goes to the lower entry, as bitsandbytes does. NaN goes to
    the lowest entry. A table may hold both zeros, as bitsandbytes' fp4 does: encode gives the code of +0 alone.

    Args:
      name: registry name.
      table: distinct finite numbers, rounded to float32; any order; 2 to 256 of them.
      boundaries: where one entry's range ends and the next begins, ascending, one fewer than `table`; None takes
        the midpoints of neighbours, computed in float32. A number on a boundary goes below it.

    Raises:
      ValueError: too few or too many entries, a repeated or non-finite one, boundaries that do not separate.

    Example:
      >>> import jaxq
      >>> thirds = jaxq.formats.CodebookFormat("thirds", (-1.0, -1 / 3, 1 / 3, 1.0))
      >>> thirds.bits, thirds.encode([-0.9, 0.1]).tolist()
      (2, [0, 2])
    """

    kind: ClassVar[str] = "codebook"

    table: tuple[float, ...]
    boundaries: tuple[float, ...] | None = None

    def __post_init__(self):
        table = np.asarray(self.table, np.float32)
        if table.ndim != 1 or not 2 <= table.size <= 256:
            raise ValueError(
                f"CodebookFormat {self.name!r}: a table is one row of 2 to 256 numbers, got shape {table.shape}."
            )
        if not np.isfinite(table).all():
            raise ValueError(
                f"CodebookFormat {self.name!r}: entry {int(np.argmin(np.isfinite(table)))} is not finite."
            )
        if (
            np.unique(table.view(np.uint32)).size != table.size
        ):  # by bits: -0 beside +0 is no repetition
            raise ValueError(
                f"CodebookFormat {self.name!r}: the table repeats an entry (in float32)."
            )
        object.__setattr__(self, "table", tuple(table.tolist()))
        if self.boundaries is not None:
            edges, ordered = np.asarray(self.boundaries, np.float32), self._ordered()[0]
            low, high = ordered[:-1], ordered[1:]
            if edges.shape != low.shape or not ((low <= edges) & (edges <= high)).all():
                raise ValueError(
                    f"CodebookFormat {self.name!r}: boundaries must be {ordered.size - 1} numbers, each between two "
                    "neighbouring entries, ascending."
                )
            object.__setattr__(self, "boundaries", tuple(edges.tolist()))

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
        ordered, codes = self._ordered()
        return int(codes[ordered == 0][0]) if 0 in ordered else 0

    def codes(self) -> np.ndarray:
        return np.arange(len(self.table), dtype=np.uint8)

    def _ordered(self) -> tuple[np.ndarray, np.ndarray]:
        """The entries ascending and the code of each, without -0 where +0 is there too."""
        table = np.asarray(self.table, np.float32)
        codes = np.argsort(table, kind="stable").astype(np.uint8)
        if (table == 0).sum() == 2:
            codes = codes[~((table == 0) & np.signbit(table))[codes]]
        return table[codes], codes

    def encode(self, x, *, rounding="nearest_even", saturate=True, key=None):
        check_rounding(rounding, key)
        del saturate  # a table has no other overflow value
        x = jnp.asarray(x, jnp.float32)
        ordered, codes = self._ordered()
        if rounding == "toward_zero":
            # The entry below a positive number, above a negative one; the outermost entries where there is none.
            edges = np.where(
                ordered[1:] > 0,
                np.nextafter(ordered[1:], np.float32(-np.inf)),
                ordered[:-1],
            )
            rank = _rank(x, edges)
        elif rounding == "stochastic":
            # Between neighbours a <= x < b the upper one wins with probability (x - a) / (b - a).
            rank = _rank(x, np.nextafter(ordered[1:], np.float32(-np.inf))).astype(
                jnp.int32
            )
            lower = jnp.asarray(ordered)[rank]
            upper = jnp.asarray(ordered)[jnp.minimum(rank + 1, ordered.size - 1)]
            share = jnp.where(
                upper > lower,
                (x - lower) / jnp.where(upper > lower, upper - lower, 1.0),
                0.0,
            )
            rank = rank + (random_uniform(key, x.shape) < share).astype(jnp.int32)
        elif self.boundaries is not None:
            rank = _rank(x, np.asarray(self.boundaries, np.float32))
        else:
            rank = _rank(x, (ordered[:-1] + ordered[1:]) / np.float32(2))
        if (codes == np.arange(codes.size)).all():
            return rank.astype(jnp.uint8)
        return jnp.asarray(codes)[rank]

    def decode(self, codes: jax.Array) -> jax.Array:
        return jnp.take(
            jnp.asarray(self.table, jnp.float32), codes.astype(jnp.int32), mode="clip"
        )


def decode_by_table(fmt: Format, codebook: jax.Array, codes: jax.Array) -> jax.Array:
    """The numbers of `codes` by a table found for one array, which stands in for the format's own numbers.

    Args:
      fmt: format of the codes. Of a signed integer format, code 0 stays the number 0 whatever the table says, so that
        the zeros of ternary weights are no parameter.
      codebook: float32 `[..., num_codes]`, by ascending code; leading axes broadcast against `codes`.
      codes: any shape.

    Returns:
      float32, the shape of `codes`; differentiable with respect to `codebook`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> ternary, codes = jaxq.formats.get("ternary"), jnp.array([-1, 0, 1], jnp.int8)
      >>> jaxq.formats.decode_by_table(ternary, jnp.array([-0.5, 0.0, 2.0]), codes).tolist()
      [-0.5, 0.0, 2.0]
    """
    first = int(fmt.min) if fmt.kind == "integer" else 0
    index = codes.astype(jnp.int32) - first
    size = codebook.shape[-1]
    if size <= _MOST_SELECTS:
        numbers = jnp.broadcast_to(
            codebook[..., 0], jnp.broadcast_shapes(codebook.shape[:-1], codes.shape)
        )
        for i in range(1, size):
            numbers = jnp.where(index == i, codebook[..., i], numbers)
    else:
        numbers = jnp.take_along_axis(codebook, index[..., None], axis=-1, mode="clip")[
            ..., 0
        ]
    return jnp.where(codes == 0, 0.0, numbers) if first < 0 else numbers


def _rank(x: jax.Array, edges: np.ndarray) -> jax.Array:
    """How many edges lie below each x, uint8 (int32 for a long table); NaN has none below it."""
    if edges.size <= _MOST_COMPARISONS:
        rank = jnp.zeros(x.shape, jnp.uint8)
        for edge in edges:
            rank = rank + (x > edge).astype(jnp.uint8)
        return rank
    return jnp.where(
        jnp.isnan(x), 0, jnp.searchsorted(jnp.asarray(edges), x, side="left")
    )


def normal_float(bits: int) -> tuple[float, ...]:
    """The NormalFloat table of `bits` bits: 2^(bits-1) - 1 negative numbers, zero, 2^(bits-1) positive ones.

    Quantiles of the standard normal distribution at evenly spaced probabilities, scaled to a maximum of 1 (Dettmers
    et al., "QLoRA", 2023; as its code builds them). For 4 bits the published table is used instead, digit for digit.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"normal_float: bits must be 2 to 8, got {bits}.")
    half = 1 << (bits - 1)
    offset = 0.5 * ((1 - 1 / (2 * (2 * half - 1))) + (1 - 1 / (2 * 2 * half)))
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, half + 1)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, half)[:-1]]
    table = np.sort(np.asarray([*negative, 0.0, *positive]))
    return tuple((table / table.max()).astype(np.float32).tolist())


def dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 8-bit dynamic map: a decimal exponent in unary, the rest a linear fraction (Dettmers, 2016 and 2022).

    Signed: 256 numbers from -0.993 to 1; unsigned: from 0 to 1. Zero is exact, the smallest other number about
    5.5e-7 (signed) or 3.3e-7 (unsigned).
    """
    steps = 7
    table: list[np.float32] = [np.float32(0), np.float32(1)]
    for i in range(steps):
        boundaries = _float32_steps(2**i + 1 if signed else 2 ** (i + 1) + 1)
        middles = np.float32(10.0 ** (i - steps + 1)) * (
            (boundaries[:-1] + boundaries[1:]) / np.float32(2)
        )
        table += [*middles, *-middles] if signed else [*middles]
    return tuple(np.sort(np.asarray(table)).tolist())


def _float32_steps(count: int) -> np.ndarray:
    """`count` numbers from 0.1 to 1 as torch.linspace rounds them, from both ends: bitsandbytes' table to the bit."""
    step, i = (
        (np.float32(1) - np.float32(0.1)) / np.float32(count - 1),
        np.arange(count),
    )
    up, down = (
        float(np.float32(0.1)) + float(step) * i,
        1 - float(step) * (count - 1 - i),
    )
    return np.where(i < count // 2, up, down).astype(np.float32)


def powers_of_two(bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Zero and +-2^0 down to +-2^-(2^(bits-1) - 2), with the boundaries of rounding in the logarithm.

    The boundary of two powers is their geometric mean (Miyashita et al., "Convolutional Neural Networks using
    Logarithmic Data Representation", 2016); the boundary of zero and the smallest power is half that power.

    Returns:
      (table, boundaries), both ascending.
    """
    count = (1 << (bits - 1)) - 1
    positive = 2.0 ** -np.arange(count)[::-1]
    edges = np.concatenate([[positive[0] / 2], positive[:-1] * np.sqrt(2)])
    table = np.concatenate([-positive[::-1], [0.0], positive])
    return tuple(table.tolist()), tuple(
        np.concatenate([-edges[::-1], edges]).astype(np.float32).tolist()
    )
