"""k-means weight sharing: each block of a weight gets a table of its own numbers, and codes are places in it.

In one dimension a cluster is an interval. So of numbers in ascending order, with sums of all that came before each, a
step of Lloyd's algorithm needs only the places of the k - 1 boundaries:

    places = search(numbers, midpoints of neighbouring centres)              # [blocks, k - 1]
    centres = differences of sums at places / differences of counts          # [blocks, k]; an empty cluster stays

The numbers are those of the block, sorted ("exact"); or bins of a fine histogram, each with the count and the mean of
what fell into it ("histogram"), which is one pass over a large weight and exact but for the bins on a boundary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxq import formats
from jaxq.methods import _matrix
from jaxq.methods._method import Method, Option, Solution
from jaxq.methods._options import NOT_NEGATIVE, check_values, choice
from jaxq.observers import LayerStats
from jaxq.qtensor import (
    Geometry,
    Granularity,
    PerChannel,
    PerTensor,
    QTensor,
    QuantSpec,
    dequantize,
    quantize,
    requantize,
    scale_values,
)

INITS = ("density", "linear")
ALGORITHMS = ("auto", "exact", "histogram")
_BINS = 1 << 16
# Up to this width codes are found by comparing with every entry, in one pass; beyond it by a binary search.
_MOST_COMPARED = 4


_OPTIONS = {
    "granularity": Option(
        lambda value: isinstance(value, Granularity),
        "a granularity, jaxq.PerChannel() for example",
    ),
    "init": choice(*INITS),
    "num_steps": NOT_NEGATIVE,
    "algorithm": choice(*ALGORITHMS),
}


class KMeansInfo(NamedTuple):
    """How clustering went.

    Attributes:
      inertia: float32, `sum (w - centre of w)^2`.
      num_steps: int32, steps until no boundary moved, or as many as were allowed.
      num_empty: int32, centres without a weight, of all blocks.
    """

    inertia: jax.Array
    num_steps: jax.Array
    num_empty: jax.Array


def kmeans(
    w: ArrayLike,
    bits: int,
    *,
    granularity: Granularity = PerTensor(),  # noqa: B008 (frozen)
    init: str = "linear",
    num_steps: int = 300,
    algorithm: str = "auto",
    name: str = "w",
) -> tuple[QTensor, KMeansInfo]:
    """Clusters the weights of every block about 2^bits centres, which become its table of numbers.

    `argmin over tables c of sum min_k (w - c_k)^2`, by Lloyd's algorithm. The QTensor's scale is 1 and its `codebook`
    holds the centres, ascending: a float32 leaf that can be trained, by `jax.grad` through `dequantize` or products, or
    by `centroid_gradient`. An empty cluster keeps its centre.

    Args:
      w: float `[in, out]`, or `[..., in, out]`: a stack (by `jax.vmap`).
      bits: 1 to 8.
      granularity: where tables vary. A table is `32 * 2^bits` bits and the scale 32 more, so blocks should be large.
      init: first centres: "linear", evenly from the least to the greatest weight of the block, which the paper found
        best since it keeps large weights; or "density", an equal share of the weights each.
      num_steps: steps of Lloyd's algorithm at most.
      algorithm: "exact" sorts the weights of each block; "histogram" puts them into 65536 bins from the least to the
        greatest; "auto" takes the histogram for blocks of more weights than bins.
      name: what errors call the weight.

    Returns:
      QTensor with the shape and dtype of `w`, axis -2 contracted, its format named "kmeans4" for 4 bits; `KMeansInfo`,
      arrays with the leading axes of `w`. Under jit, a block with a NaN gets a table of NaN.

    Raises:
      TypeError: `w` is not a float array.
      ValueError: bits out of range, an unknown choice, a number that is not finite (outside jit).

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt, info = jaxq.methods.kmeans(jnp.array([[0.0, 0.2], [1.0, 1.4]]), 1)
      >>> [round(c, 2) for c in qt.codebook.ravel().tolist()], qt.codes().tolist()
      ([0.1, 1.2], [[0, 0], [1, 1]])

    References:
      Han et al., "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman
      Coding", 2016, section 3. Lloyd, "Least squares quantization in PCM", 1982.
    """
    w = _matrix.as_weight(w, "kmeans", name)
    if not (isinstance(bits, int) and 1 <= bits <= 8):
        raise ValueError(
            f"kmeans: bits must be a whole number from 1 to 8, got {bits!r}."
        )
    formats.check_choice("kmeans: init", init, INITS)
    formats.check_choice("kmeans: algorithm", algorithm, ALGORITHMS)
    check_values("kmeans", _OPTIONS, num_steps=num_steps)
    return _kmeans(
        w,
        np.int32(num_steps),
        QuantSpec(_table_format(bits), granularity),
        init,
        algorithm,
    )


def centroid_gradient(grad_w: ArrayLike, qt: QTensor) -> jax.Array:
    """The gradient of a codebook from that of the weight: what fell on the members of each cluster, summed.

    `dL/dc_k = sum over w_i in cluster k of dL/dw_i * scale`, as `jax.grad` through `dequantize` gives it. To fine-tune
    centres with the codes held: `dataclasses.replace(qt, codebook=qt.codebook - rate * gradient)`.

    Args:
      grad_w: float, shape of `qt`.
      qt: a QTensor with a `codebook`: of `kmeans`, or of `quantize` with the preset "ttq" (whose zeros stay zero: no
        gradient).

    Returns:
      float32, shape of `qt.codebook`.

    Raises:
      TypeError: `qt` is no QTensor with a codebook.
      ValueError: another shape.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt, _ = jaxq.methods.kmeans(jnp.array([[0.0, 0.2], [1.0, 1.4]]), 1)
      >>> jaxq.methods.centroid_gradient(jnp.array([[1.0, 2.0], [3.0, 4.0]]), qt).ravel().tolist()
      [3.0, 7.0]

    References:
      Han et al., "Deep Compression", 2016, section 3.3.
    """
    if not isinstance(qt, QTensor) or qt.codebook is None:
        raise TypeError(
            f"centroid_gradient: qt must be a QTensor with a codebook, got {qt!r}."
        )
    gradient = jnp.asarray(grad_w)
    if gradient.shape != qt.shape or not jnp.issubdtype(gradient.dtype, jnp.floating):
        raise ValueError(
            f"centroid_gradient: grad_w must be floats of shape {list(qt.shape)}, got {_matrix.describe(gradient)}."
        )
    return _centroid_gradient(gradient.astype(jnp.float32), qt)


@jax.jit
def _centroid_gradient(gradient: jax.Array, qt: QTensor) -> jax.Array:
    geometry, fmt = qt.meta.geometry, qt.spec.fmt

    def one(gradient: jax.Array, qt: QTensor) -> jax.Array:
        assert qt.codebook is not None
        blocks = geometry.to_blocks(geometry.pad(geometry.to_view(gradient)))
        blocks = blocks * geometry.scale_to_blocks(scale_values(qt))
        codes = geometry.to_blocks(geometry.to_view_order(qt.stored_codes())).astype(
            jnp.int32
        )
        first, size = (
            (int(fmt.min) if fmt.kind == "integer" else 0),
            qt.codebook.shape[-1],
        )
        number = jnp.arange(np.prod(geometry.num_blocks), dtype=jnp.int32).reshape(
            geometry.num_blocks
        )
        cluster = geometry.scale_to_blocks(number) * size + (codes - first)
        if first < 0:
            blocks = jnp.where(codes == 0, 0.0, blocks)
        sums = jax.ops.segment_sum(blocks.ravel(), cluster.ravel(), number.size * size)
        return sums.reshape(qt.codebook.shape)

    for _ in qt.batch_shape:
        one = jax.vmap(one)
    return one(gradient, qt)


def _table_format(bits: int) -> formats.CodebookFormat:
    """Codes that are places in a table; the numbers here are never used, for every array has its own."""
    count = 1 << bits
    return formats.CodebookFormat(
        f"kmeans{bits}", tuple(float(v) for v in range(1 - count, count, 2))
    )


@functools.partial(jax.jit, static_argnames=("spec", "init", "algorithm"))
def _kmeans(
    w: jax.Array, num_steps: ArrayLike, spec: QuantSpec, init: str, algorithm: str
):
    one = functools.partial(
        _one, num_steps=num_steps, spec=spec, init=init, algorithm=algorithm
    )
    return _matrix.over_stack(one, w)


def _one(
    w: jax.Array, num_steps: ArrayLike, spec: QuantSpec, init: str, algorithm: str
) -> tuple[QTensor, KMeansInfo]:
    qt = quantize(w, spec, contracting=-2, on_nonfinite="propagate")
    geometry, size = qt.meta.geometry, 1 << spec.fmt.bits
    x, counts = _rows_of_blocks(w, geometry)  # [blocks, n]
    inside = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < counts[:, None]
    finite = jnp.where(inside, jnp.isfinite(x), True).all(axis=1)
    low = jnp.min(x, axis=1, where=inside, initial=np.inf)
    high = jnp.max(x, axis=1, where=inside, initial=-np.inf)
    # From -1 to 1, so that nothing overflows and weights of any size are clustered alike.
    middle, half = (0.5 * high + 0.5 * low), (0.5 * high - 0.5 * low)
    unit = jnp.where(half > 0, half, 1.0)[:, None]
    if algorithm == "auto":
        algorithm = "histogram" if x.shape[1] > _BINS else "exact"
    bins = (
        _histogram(x, inside, low, unit)
        if algorithm == "histogram"
        else _sorted(x, inside)
    )
    bins = bins._replace(
        numbers=jnp.clip((bins.numbers - middle[:, None]) / unit, -1.0, 1.0)
    )
    centres, steps, empty = _lloyd(bins, _first_centres(bins, size, init), num_steps)
    table = jnp.where(
        finite[:, None], middle[:, None] + unit * centres, np.float32(np.nan)
    )

    # [blocks, k] -> [k, n1, 1, n2, 1] -> [*num_blocks, k]
    view = geometry.scale_to_blocks(jnp.zeros(geometry.num_blocks)).shape
    codebook = jnp.moveaxis(
        geometry.scale_from_blocks(table.T.reshape(size, *view)), 0, -1
    )
    qt = dataclasses.replace(
        qt, scale=jnp.ones(geometry.num_blocks, jnp.float32), codebook=codebook
    )
    qt = _with_nearest(w, qt)
    error = w.astype(jnp.float32) - dequantize(qt, dtype=jnp.float32)
    return qt, KMeansInfo(jnp.sum(jnp.sum(error * error, axis=0)), steps, empty)


def _with_nearest(w: jax.Array, qt: QTensor) -> QTensor:
    """The codes of the entries of `qt.codebook`, which ascends, next to each weight; of equally near ones the lower."""
    geometry, bits, codebook = qt.meta.geometry, qt.spec.fmt.bits, qt.codebook
    assert codebook is not None
    if bits <= _MOST_COMPARED:
        return requantize(w, qt)
    middles = (0.5 * (codebook[..., 1:] + codebook[..., :-1])).ravel()
    count = (1 << bits) - 1
    first = (
        jnp.arange(np.prod(geometry.num_blocks), dtype=jnp.int32).reshape(
            geometry.num_blocks
        )
        * count
    )
    first = geometry.scale_to_blocks(first)
    blocks = geometry.to_blocks(geometry.pad(geometry.to_view(w).astype(jnp.float32)))
    codes = jnp.zeros(blocks.shape, jnp.int32)
    for bit in reversed(range(bits)):  # a binary search
        above = blocks > jnp.take(
            middles, first + codes + ((1 << bit) - 1), mode="clip"
        )
        codes = codes + (above.astype(jnp.int32) << bit)
    codes = codes.astype(qt.spec.fmt.code_dtype)
    return qt.with_stored_codes(geometry.to_storage(geometry.from_blocks(codes)))


def _rows_of_blocks(w: jax.Array, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """The weights of each block in a row, `[blocks, n]`, true ones first, and how many those are."""
    view = geometry.to_view(w).astype(jnp.float32)

    def rows(view: jax.Array) -> jax.Array:
        blocks = geometry.to_blocks(geometry.pad(view))
        outer = [a for a in range(-blocks.ndim, 0) if a not in geometry.block_axes]
        return jnp.transpose(blocks, (*outer, *geometry.block_axes)).reshape(
            np.prod(geometry.num_blocks), -1
        )

    x, true = rows(view), geometry.counts()
    counts = np.broadcast_to(
        true, (*geometry.scale_to_blocks(jnp.zeros(geometry.num_blocks)).shape,)
    )
    counts = jnp.asarray(counts.reshape(-1), jnp.int32)
    if true.min() == x.shape[1]:
        return x, counts
    order = jnp.argsort(rows(jnp.ones_like(view)) == 0, axis=1, stable=True)
    return jnp.take_along_axis(x, order, axis=1), counts


class _Bins(NamedTuple):
    """Numbers that stand for several weights each, ascending in every row."""

    numbers: jax.Array  # float32 [blocks, m]
    counts: jax.Array  # int32 [blocks, m]


def _sorted(x: jax.Array, inside: jax.Array) -> _Bins:
    ordered = jnp.sort(jnp.where(inside, x, np.float32(np.inf)), axis=1)
    greatest = jnp.max(x, axis=1, keepdims=True, where=inside, initial=-np.inf)
    return _Bins(jnp.where(inside, ordered, greatest), inside.astype(jnp.int32))


def _histogram(
    x: jax.Array, inside: jax.Array, low: jax.Array, unit: jax.Array
) -> _Bins:
    blocks = x.shape[0]
    share = (x - low[:, None]) / unit * np.float32(_BINS / 2)  # 0 to _BINS
    place = jnp.clip(share.astype(jnp.int32), 0, _BINS - 1)
    left = low[:, None] + (jnp.arange(_BINS, dtype=jnp.float32)[None] + 0.5) * (
        unit * np.float32(2 / _BINS)
    )
    index = jnp.arange(blocks, dtype=jnp.int32)[:, None] * _BINS + place
    index = jnp.where(inside, index, blocks * _BINS).ravel()  # beyond the last: dropped
    counts = jax.ops.segment_sum(
        jnp.ones(index.shape, jnp.int32), index, blocks * _BINS
    ).reshape(blocks, _BINS)
    beside = x - jnp.take(left.ravel(), index, mode="clip").reshape(x.shape)
    sums = jax.ops.segment_sum(beside.ravel(), index, blocks * _BINS).reshape(
        blocks, _BINS
    )
    return _Bins(left + sums / jnp.maximum(counts, 1).astype(jnp.float32), counts)


def _first_centres(bins: _Bins, size: int, init: str) -> jax.Array:
    blocks = bins.numbers.shape[0]
    if init == "linear":
        return jnp.broadcast_to(
            jnp.linspace(-1.0, 1.0, size, dtype=jnp.float32), (blocks, size)
        )
    below = jnp.cumsum(bins.counts, axis=1)
    share = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
    wanted = share[None] * below[:, -1:].astype(jnp.float32)
    places = jax.vmap(functools.partial(jnp.searchsorted, side="left"))(
        below.astype(jnp.float32), wanted
    )
    return jnp.take_along_axis(bins.numbers, places, axis=1, mode="clip")


def _lloyd(
    bins: _Bins, centres: jax.Array, num_steps: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(centres `[blocks, k]` ascending, steps taken, empty clusters)."""
    ends = ((0, 0), (1, 0))
    counts = jnp.pad(
        jnp.cumsum(bins.counts, axis=1), ends
    )  # of all before, [blocks, m + 1]
    sums = [
        jnp.pad(part, ends)
        for part in _running_sums(bins.numbers * bins.counts.astype(jnp.float32))
    ]
    search = jax.vmap(functools.partial(jnp.searchsorted, side="right"))

    def boundaries(centres: jax.Array) -> jax.Array:
        # A number half-way between two centres belongs to the lower one.
        return search(bins.numbers, 0.5 * (centres[:, 1:] + centres[:, :-1])).astype(
            jnp.int32
        )

    def within(of_all_before: jax.Array, places: jax.Array) -> jax.Array:
        taken = jnp.take_along_axis(of_all_before, places, axis=1, mode="clip")
        return jnp.diff(taken, axis=1, prepend=0, append=of_all_before[:, -1:])

    def step(state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]):
        centres, places, _, count = state
        held = within(counts, places)
        means = (within(sums[0], places) + within(sums[1], places)) / jnp.maximum(
            held, 1
        ).astype(jnp.float32)
        # Rounded sums may put a mean of few numbers outside its interval.
        middle = 0.5 * (centres[:, 1:] + centres[:, :-1])
        low, high = (
            jnp.pad(middle, ends, constant_values=-1.0),
            jnp.pad(middle, ((0, 0), (0, 1)), constant_values=1.0),
        )
        centres = jnp.where(held > 0, jnp.clip(means, low, high), centres)
        moved = boundaries(centres)
        return centres, moved, (moved != places).any(), count + 1

    def more(state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return state[2] & (state[3] < num_steps)

    state = (centres, boundaries(centres), jnp.bool_(True), jnp.int32(0))
    centres, places, _, count = lax.while_loop(more, step, state)
    return centres, count, jnp.sum(within(counts, places) == 0, dtype=jnp.int32)


_Pair = tuple[jax.Array, jax.Array]  # a float32 sum and what it lacks


def _running_sums(x: jax.Array) -> _Pair:
    """Sums of all up to each place along axis 1, with what float32 lacks: few numbers differ from many before them."""
    blocks, n = x.shape
    size = (
        math.isqrt(max(n - 1, 0)) + 1
    )  # steps are few, and few things of a kind are compiled
    x = jnp.pad(x, ((0, 0), (0, size * size - n))).reshape(blocks, size, size)
    inner = _along_last((x, jnp.zeros_like(x)))
    ends = _along_last((inner[0][..., -1], inner[1][..., -1]))
    before = [jnp.pad(part[:, :-1], ((0, 0), (1, 0)))[..., None] for part in ends]
    high, low = _added((before[0], before[1]), inner)
    return high.reshape(blocks, -1)[:, :n], low.reshape(blocks, -1)[:, :n]


def _along_last(pair: _Pair) -> _Pair:
    def step(total: _Pair, new: _Pair) -> tuple[_Pair, _Pair]:
        total = _added(total, new)
        return total, total

    zeros = jnp.zeros_like(pair[0][..., 0])
    _, sums = lax.scan(
        step,
        (zeros, zeros),
        (jnp.moveaxis(pair[0], -1, 0), jnp.moveaxis(pair[1], -1, 0)),
    )
    return jnp.moveaxis(sums[0], 0, -1), jnp.moveaxis(sums[1], 0, -1)


def _added(a: _Pair, b: _Pair) -> _Pair:
    """Of two sums, with the error of adding them, which is known exactly.

    Knuth, The Art of Computer Programming, volume 2, section 4.2.2.
    """
    total = a[0] + b[0]
    back = total - a[0]
    lost = (a[0] - (total - back)) + (b[0] - back) + (a[1] + b[1])
    whole = total + lost
    return whole, lost - (whole - total)


def _table_granularity(spec: QuantSpec, options: Mapping[str, Any]) -> Granularity:
    """The blocks of a rule's k-means: one table for each channel by default.

    The spec's granularity is for scales. Tables are larger, so groups of a spec would
    cost more bits than the codes.
    """
    return options.get("granularity", PerChannel())


def _solve_kmeans(
    w: jax.Array,
    stats: LayerStats | None,
    spec: QuantSpec,
    *,
    key: jax.Array,
    **options: Any,
) -> Solution:
    options["granularity"] = _table_granularity(spec, options)
    qt, _ = kmeans(w, spec.fmt.bits, **options)
    return Solution(qt)


# k-means takes only the number of bits from a spec, so it refuses none.
METHOD = Method(
    "kmeans", _solve_kmeans, options=_OPTIONS, granularity=_table_granularity
)
