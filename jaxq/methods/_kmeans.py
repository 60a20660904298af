"""k-means weight sharing: each block of a weight gets its own table of numbers.

Codes are positions in that table. In one dimension a cluster is an interval. So if the
numbers are in ascending order and their running sums are known, a step of Lloyd's
algorithm needs only the positions of the k - 1 boundaries:

    positions = search(numbers, midpoints of neighbouring centres)  # [blocks, k - 1]
    centres = differences of sums / differences of counts           # [blocks, k]

Lloyd's algorithm alone wastes centres. If there is one outlier, most of the evenly
spaced first centres have no weight near them. So the centre of an empty cluster moves
into another cluster and splits it. This is the cluster where a second centre lowers the
error most. When no boundary moves any more, two neighbouring clusters may be merged,
and the free centre splits another cluster. This is done if the merge adds less error
than the split removes. Both errors have the same formula, for clusters of n and of m
numbers:

    cost of a merge or gain of a split = n m / (n + m) (centre - other centre)^2

The numbers are either those of the block, sorted ("exact"), or the bins of a fine
histogram, each with the count and the mean of its numbers ("histogram"). The histogram
needs one pass over a large weight. It is exact, except for the bins on a boundary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxq import formats
from jaxq.methods import _matrix
from jaxq.methods._explicit_axes import on_explicit_axes
from jaxq.methods._method import Method, Option, Solution
from jaxq.methods._method_options import NOT_NEGATIVE, check_values, choice
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
_OPTIONS = {
    "granularity": Option(
        lambda value: isinstance(value, Granularity),
        "a granularity, jaxq.PerChannel() for example",
    ),
    "init": choice(*INITS),
    "num_steps": NOT_NEGATIVE,
    "algorithm": choice(*ALGORITHMS),
}
_NUM_BINS = 1 << 16
# A centre moves if the gain of its split is more than this factor times the cost of its
# merge. Smaller differences may be rounding errors.
_LEAST_GAIN = np.float32(1.01)
# Up to this width, codes are found by a comparison with every entry, in one pass.
# Beyond it a binary search is faster.
_MOST_COMPARED_BITS = 4


class KMeansInfo(NamedTuple):
    """Diagnostics of `kmeans`.

    Attributes:
      inertia: float32, `sum (w - centre of w)^2`.
      num_steps: int32, number of steps that ran. Steps end when no boundary moves.
      num_empty: int32, number of centres without a weight, over all blocks. After
        enough steps, a block has such centres only if it has fewer distinct numbers
        than centres. Its numbers are then stored exactly.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> _, info = jaxq.methods.kmeans(jnp.array([[0.0, 1.0], [0.0, 1.0]]), 1)
      >>> float(info.inertia), int(info.num_empty)
      (0.0, 0)
    """

    inertia: jax.Array
    num_steps: jax.Array
    num_empty: jax.Array


@on_explicit_axes
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
    """Clusters the weights of every block around 2^bits centres, the block's table.

    `argmin over tables c of sum min_k (w - c_k)^2`, by Lloyd's algorithm. The scale of
    the QTensor is 1. Its `codebook` holds the centres in ascending order. It is a
    float32 leaf that can be trained: by `jax.grad` through `dequantize` or products, or
    with `centroid_gradient`. A centre without weights moves to where it lowers the
    error most. A block of at most 2^bits distinct numbers is stored exactly.

    Args:
      w: float `[in, out]`, or a stack `[..., in, out]` (by `jax.vmap`).
      bits: 1 to 8.
      granularity: where tables vary. A table has `32 * 2^bits` bits and the scale 32
        more, so blocks should be large.
      init: first centres. "linear" spaces them evenly from the least to the greatest
        weight of the block. The paper found this best, since it keeps large weights.
        "density" gives each centre an equal share of the weights.
      num_steps: maximum number of steps, not negative. A step moves the centres to the
        means of their clusters, or moves a centre to another cluster.
      algorithm: "exact" sorts the weights of each block. "histogram" puts them into
        65536 bins of equal width from the least to the greatest, and cannot tell the
        weights of a bin apart. "auto" takes the histogram for blocks of more weights
        than bins.
      name: the name of the weight in errors.

    Returns:
      `(qt, info)`: a QTensor with the shape and dtype of `w`, axis -2 contracted, with
      a format named "kmeans4" for 4 bits; and a `KMeansInfo`, whose arrays have the
      leading axes of `w`. Under jit, a block with a NaN gets a table of NaN.

    Raises:
      TypeError: `w` is not float32, bfloat16 or float16.
      ValueError: `bits` is not a whole number from 1 to 8, a choice is unknown,
        `num_steps` is negative, `w` is not a matrix, or (outside jit) `w` has a number
        that is not finite.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt, info = jaxq.methods.kmeans(jnp.array([[0.0, 0.2], [1.0, 1.4]]), 1)
      >>> [round(c, 2) for c in qt.codebook.ravel().tolist()], qt.codes().tolist()
      ([0.1, 1.2], [[0, 0], [1, 1]])

    References:
      Han et al., "Deep Compression: Compressing Deep Neural Networks with Pruning,
      Trained Quantization and Huffman Coding", 2016, section 3.
      Lloyd, "Least squares quantization in PCM", 1982.
    """
    w = _matrix.as_weight(w, "kmeans", name)
    if not (isinstance(bits, int) and 1 <= bits <= 8):
        raise ValueError(
            f"kmeans: bits must be a whole number from 1 to 8, got {bits!r}."
        )
    formats.check_choice("kmeans: init", init, INITS)
    formats.check_choice("kmeans: algorithm", algorithm, ALGORITHMS)
    check_values("kmeans", _OPTIONS, num_steps=num_steps)
    spec = QuantSpec(_table_format(bits), granularity)
    return _kmeans(w, np.int32(num_steps), spec, init, algorithm)


@on_explicit_axes
def centroid_gradient(grad_w: ArrayLike, qt: QTensor) -> jax.Array:
    """Returns the gradient of a codebook, given the gradient of the weight.

    The gradient of a centre is the sum over the members of its cluster:
    `dL/dc_k = sum over w_i in cluster k of dL/dw_i * scale`, as `jax.grad` through
    `dequantize` gives it. To fine-tune the centres with fixed codes, use
    `dataclasses.replace(qt, codebook=qt.codebook - rate * gradient)`.

    Args:
      grad_w: float, shape of `qt`.
      qt: a QTensor with a `codebook`, from `kmeans` or from `quantize` with the preset
        "ttq". The zeros of "ttq" stay zero, so their gradient is 0.

    Returns:
      float32, shape of `qt.codebook`.

    Raises:
      TypeError: `qt` is not a QTensor with a codebook.
      ValueError: `grad_w` is not a float array of the shape of `qt`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt, _ = jaxq.methods.kmeans(jnp.array([[0.0, 0.2], [1.0, 1.4]]), 1)
      >>> grad_w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> jaxq.methods.centroid_gradient(grad_w, qt).ravel().tolist()
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
            f"centroid_gradient: grad_w must be floats of shape {list(qt.shape)}, got "
            f"{_matrix.dtype_and_shape(gradient)}."
        )
    return _centroid_gradient(gradient.astype(jnp.float32), qt)


@jax.jit
def _centroid_gradient(gradient: jax.Array, qt: QTensor) -> jax.Array:
    geometry, fmt = qt.meta.geometry, qt.spec.fmt

    def sum_clusters(gradient: jax.Array, qt: QTensor) -> jax.Array:
        assert qt.codebook is not None
        size = qt.codebook.shape[-1]
        blocks = geometry.to_blocks(geometry.pad(geometry.to_view(gradient)))
        blocks = blocks * geometry.scale_to_blocks(scale_values(qt))
        codes = geometry.to_blocks(geometry.to_view_order(qt.stored_codes()))
        first = int(fmt.min) if fmt.kind == "integer" else 0
        position = codes.astype(jnp.int32) - first  # in the block's table
        cluster = geometry.scale_to_blocks(_block_numbers(geometry)) * size + position
        if first < 0:  # signed codes of a ternary format: 0 is not trained
            blocks = jnp.where(codes == 0, 0.0, blocks)
        num_clusters = math.prod(geometry.num_blocks) * size
        sums = jax.ops.segment_sum(blocks.ravel(), cluster.ravel(), num_clusters)
        return sums.reshape(qt.codebook.shape)

    for _ in qt.batch_shape:
        sum_clusters = jax.vmap(sum_clusters)
    return sum_clusters(gradient, qt)


def _block_numbers(geometry: Geometry) -> jax.Array:
    """The number of each block, int32 `[*num_blocks]`."""
    numbers = jnp.arange(math.prod(geometry.num_blocks), dtype=jnp.int32)
    return numbers.reshape(geometry.num_blocks)


def _table_format(bits: int) -> formats.CodebookFormat:
    """A format whose codes are positions in a table.

    Its own numbers are never used, since every array has its own table.
    """
    count = 1 << bits
    numbers = tuple(float(v) for v in range(1 - count, count, 2))
    return formats.CodebookFormat(f"kmeans{bits}", numbers)


@functools.partial(jax.jit, static_argnames=("spec", "init", "algorithm"))
def _kmeans(
    w: jax.Array, num_steps: ArrayLike, spec: QuantSpec, init: str, algorithm: str
) -> tuple[QTensor, KMeansInfo]:
    cluster_matrix = functools.partial(
        _cluster_matrix,
        num_steps=num_steps,
        spec=spec,
        init=init,
        algorithm=algorithm,
    )
    return _matrix.over_stack(cluster_matrix, w)


def _cluster_matrix(
    w: jax.Array, num_steps: ArrayLike, spec: QuantSpec, init: str, algorithm: str
) -> tuple[QTensor, KMeansInfo]:
    """`kmeans` for one matrix `[in, out]`."""
    like = quantize(w, spec, contracting=-2, on_nonfinite="propagate")
    geometry, size = like.meta.geometry, 1 << spec.fmt.bits
    x, counts = _rows_of_blocks(w, geometry)  # [blocks, n], [blocks]
    inside = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < counts[:, None]
    finite = jnp.where(inside, jnp.isfinite(x), True).all(axis=1)  # [blocks]
    low = jnp.min(x, axis=1, where=inside, initial=np.inf)
    high = jnp.max(x, axis=1, where=inside, initial=-np.inf)
    # Numbers are mapped to -1 .. 1, so that nothing overflows and weights of any size
    # are clustered alike.
    middle, half = (0.5 * high + 0.5 * low), (0.5 * high - 0.5 * low)
    unit = jnp.where(half > 0, half, 1.0)[:, None]
    if algorithm == "auto":
        algorithm = "histogram" if x.shape[1] > _NUM_BINS else "exact"
    if algorithm == "histogram":
        bins = _histogram(x, inside, low, unit)
    else:
        bins = _sorted(x, inside)
    exact_table, is_exact = _table_of_few(bins, size)
    numbers = jnp.clip((bins.numbers - middle[:, None]) / unit, -1.0, 1.0)
    bins = bins._replace(numbers=numbers)
    centres = _first_centres(bins, size, init)
    centres, steps, num_empty = _lloyd(bins, centres, num_steps)
    table = middle[:, None] + unit * centres  # [blocks, k]
    table = jnp.where(is_exact[:, None], exact_table, table)
    table = jnp.where(finite[:, None], table, np.float32(np.nan))
    qt = dataclasses.replace(
        like,
        scale=jnp.ones(geometry.num_blocks, jnp.float32),
        codebook=_as_codebook(table, geometry),
    )
    qt = _with_nearest_codes(w, qt)
    error = w.astype(jnp.float32) - dequantize(qt, dtype=jnp.float32)  # [in, out]
    # Two sums, because one float32 sum over the whole weight would lose more digits.
    inertia = jnp.sum(jnp.sum(error * error, axis=0))
    return qt, KMeansInfo(inertia, steps, num_empty)


def _as_codebook(table: jax.Array, geometry: Geometry) -> jax.Array:
    """The tables of all blocks `[blocks, k]` as a QTensor keeps them."""
    view = geometry.scale_to_blocks(jnp.zeros(geometry.num_blocks)).shape
    tables = table.T.reshape(table.shape[1], *view)  # [k, n_out, 1, n_in, 1]
    return jnp.moveaxis(geometry.scale_from_blocks(tables), 0, -1)  # [*num_blocks, k]


def _with_nearest_codes(w: jax.Array, qt: QTensor) -> QTensor:
    """`qt` with the codes of the entries of its codebook nearest to each weight.

    The codebook is in ascending order. Of two entries equally near, the lower is taken.
    """
    geometry, bits, codebook = qt.meta.geometry, qt.spec.fmt.bits, qt.codebook
    assert codebook is not None
    if bits <= _MOST_COMPARED_BITS:
        return requantize(w, qt)
    middles = (0.5 * (codebook[..., 1:] + codebook[..., :-1])).ravel()
    num_middles = (1 << bits) - 1
    # Position of each block's first midpoint in `middles`.
    first = geometry.scale_to_blocks(_block_numbers(geometry) * num_middles)
    blocks = geometry.to_blocks(geometry.pad(geometry.to_view(w).astype(jnp.float32)))
    codes = jnp.zeros(blocks.shape, jnp.int32)
    # A binary search: bit by bit from the highest.
    for bit in reversed(range(bits)):
        position = first + codes + ((1 << bit) - 1)
        above = blocks > jnp.take(middles, position, mode="clip")
        codes = codes + (above.astype(jnp.int32) << bit)
    codes = codes.astype(qt.spec.fmt.code_dtype)
    return qt.with_stored_codes(geometry.to_storage(geometry.from_blocks(codes)))


def _rows_of_blocks(w: jax.Array, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """The numbers of each block as a row `[blocks, n]`, and their count `[blocks]`.

    The numbers of the weight come first in each row, padding last.
    """
    view = geometry.to_view(w).astype(jnp.float32)

    def as_rows(view: jax.Array) -> jax.Array:
        blocks = geometry.to_blocks(geometry.pad(view))
        outer = [a for a in range(-blocks.ndim, 0) if a not in geometry.block_axes]
        ordered = jnp.transpose(blocks, (*outer, *geometry.block_axes))
        return ordered.reshape(math.prod(geometry.num_blocks), -1)

    x, true_counts = as_rows(view), geometry.counts()
    shape = geometry.scale_to_blocks(jnp.zeros(geometry.num_blocks)).shape
    counts = jnp.asarray(np.broadcast_to(true_counts, shape).reshape(-1), jnp.int32)
    if true_counts.min() == x.shape[1]:
        return x, counts
    is_padding = as_rows(jnp.ones_like(view)) == 0
    order = jnp.argsort(is_padding, axis=1, stable=True)
    return jnp.take_along_axis(x, order, axis=1), counts


class _Bins(NamedTuple):
    """Numbers that stand for several weights each, ascending in every row.

    Attributes:
      numbers: float32 `[blocks, m]`.
      counts: int32 `[blocks, m]`, how many weights each number stands for.
      low: float32 `[blocks, m]`, the least of these weights.
      high: float32 `[blocks, m]`, the greatest of these weights.
    """

    numbers: jax.Array
    counts: jax.Array
    low: jax.Array
    high: jax.Array


def _sorted(x: jax.Array, inside: jax.Array) -> _Bins:
    """The weights themselves as bins. Padding gets count 0 and the greatest number."""
    ordered = jnp.sort(jnp.where(inside, x, np.float32(np.inf)), axis=1)
    greatest = jnp.max(x, axis=1, keepdims=True, where=inside, initial=-np.inf)
    numbers = jnp.where(inside, ordered, greatest)
    return _Bins(numbers, inside.astype(jnp.int32), numbers, numbers)


def _histogram(
    x: jax.Array, inside: jax.Array, low: jax.Array, unit: jax.Array
) -> _Bins:
    """Bins of equal width from `low` to `low + 2 unit`, with the mean of each bin."""
    num_blocks = x.shape[0]
    share = (x - low[:, None]) / unit * np.float32(_NUM_BINS / 2)  # 0 to _NUM_BINS
    place = jnp.clip(share.astype(jnp.int32), 0, _NUM_BINS - 1)
    index = jnp.arange(num_blocks, dtype=jnp.int32)[:, None] * _NUM_BINS + place
    # Padding gets an index beyond the last, which segment_sum drops.
    index = jnp.where(inside, index, num_blocks * _NUM_BINS).ravel()

    def over_bins(reduce: Callable[..., jax.Array], values: jax.Array) -> jax.Array:
        reduced = reduce(values.ravel(), index, num_blocks * _NUM_BINS)
        return reduced.reshape(num_blocks, _NUM_BINS)

    counts = over_bins(jax.ops.segment_sum, jnp.ones(index.shape, jnp.int32))
    position = jnp.arange(_NUM_BINS, dtype=jnp.float32)[None] + 0.5
    centre = low[:, None] + position * (unit * np.float32(2 / _NUM_BINS))
    # Float32 sums of distances from the centre lose fewer digits than sums of numbers.
    distance = x - jnp.take(centre.ravel(), index, mode="clip").reshape(x.shape)
    total = over_bins(jax.ops.segment_sum, distance)
    mean = total / jnp.maximum(counts, 1).astype(jnp.float32)
    low = over_bins(jax.ops.segment_min, x)
    high = over_bins(jax.ops.segment_max, x)
    return _Bins(centre + mean, counts, low, high)


def _table_of_few(bins: _Bins, size: int) -> tuple[jax.Array, jax.Array]:
    """The distinct numbers of each block as its table, if the table has room for them.

    Returns:
      (table `[blocks, k]` ascending, bool `[blocks]`: whether the table has all numbers
      of the block). Entries beyond the last number repeat it.
    """
    has_weights = bins.counts > 0
    low = jnp.where(has_weights, bins.low, np.float32(-np.inf))
    greatest = lax.cummax(low, axis=1)
    before = jnp.pad(greatest[:, :-1], ((0, 0), (1, 0)), constant_values=-np.inf)
    num_distinct = jnp.cumsum(low > before, axis=1, dtype=jnp.int32)  # [blocks, m]
    search = jax.vmap(functools.partial(jnp.searchsorted, side="left"), (0, None))
    places = search(num_distinct, jnp.arange(1, size + 1, dtype=jnp.int32))
    table = jnp.take_along_axis(greatest, places, axis=1, mode="clip")
    is_single = jnp.where(has_weights, bins.low == bins.high, True).all(axis=1)
    return table, is_single & (num_distinct[:, -1] <= size)


def _first_centres(bins: _Bins, size: int, init: str) -> jax.Array:
    """The centres to start from, `[blocks, k]`, ascending."""
    num_blocks = bins.numbers.shape[0]
    if init == "linear":
        line = jnp.linspace(-1.0, 1.0, size, dtype=jnp.float32)
        return jnp.broadcast_to(line, (num_blocks, size))
    # Centre i is the number with a share (i + 1/2) / k of the weights below it.
    below = jnp.cumsum(bins.counts, axis=1)  # [blocks, m]
    share = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
    target = share[None] * below[:, -1:].astype(jnp.float32)
    search = jax.vmap(functools.partial(jnp.searchsorted, side="left"))
    places = search(below.astype(jnp.float32), target)
    return jnp.take_along_axis(bins.numbers, places, axis=1, mode="clip")


class _LloydState(NamedTuple):
    """What changes from step to step of Lloyd's algorithm.

    Attributes:
      centres: `[blocks, k]`, ascending.
      places: int32 `[blocks, k - 1]`, position of each boundary among the numbers.
      moved: True if the last step moved a boundary.
      num_steps: steps so far.
    """

    centres: jax.Array
    places: jax.Array
    moved: jax.Array
    num_steps: jax.Array


def _lloyd(
    bins: _Bins, centres: jax.Array, num_steps: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs Lloyd's algorithm until no boundary moves, or for at most `num_steps` steps.

    After each step, `_move_centres` moves centres that are not useful where they are.

    Returns:
      (centres `[blocks, k]` ascending, number of steps, number of empty clusters).
    """
    first_column = ((0, 0), (1, 0))
    # Running sums start with 0: [blocks, m + 1].
    counts = jnp.pad(jnp.cumsum(bins.counts, axis=1), first_column)
    weighted = bins.numbers * bins.counts.astype(jnp.float32)
    sums = [jnp.pad(part, first_column) for part in _running_sums(weighted)]
    search = jax.vmap(functools.partial(jnp.searchsorted, side="right"))

    def boundaries(centres: jax.Array) -> jax.Array:
        # A number half-way between two centres belongs to the lower one.
        middles = 0.5 * (centres[:, 1:] + centres[:, :-1])
        return search(bins.numbers, middles).astype(jnp.int32)

    def up_to(running: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(running, places, axis=1, mode="clip")

    def lower_part(
        values: jax.Array, starts: jax.Array, ends: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Count and sum of the numbers up to a value in each cluster, `[blocks, k]`."""
        cuts = jnp.clip(search(bins.numbers, values).astype(jnp.int32), starts, ends)
        parts = [up_to(s, cuts) - up_to(s, starts) for s in sums]
        return up_to(counts, cuts) - up_to(counts, starts), parts[0] + parts[1]

    def within(running: jax.Array, places: jax.Array) -> jax.Array:
        """The part of a running sum in each cluster, `[blocks, k]`."""
        at_boundaries = up_to(running, places)
        return jnp.diff(at_boundaries, axis=1, prepend=0, append=running[:, -1:])

    def step(state: _LloydState) -> _LloydState:
        centres, places = state.centres, state.places
        sizes = within(counts, places)
        totals = within(sums[0], places) + within(sums[1], places)
        means = totals / jnp.maximum(sizes, 1).astype(jnp.float32)
        # Rounded sums may put a mean of few numbers outside its interval.
        middle = 0.5 * (centres[:, 1:] + centres[:, :-1])
        low = jnp.pad(middle, ((0, 0), (1, 0)), constant_values=-1.0)
        high = jnp.pad(middle, ((0, 0), (0, 1)), constant_values=1.0)
        centres = jnp.where(sizes > 0, jnp.clip(means, low, high), centres)
        new_places = boundaries(centres)
        is_settled = (new_places == places).all(axis=1)
        # A cut at the mean halves a cluster. A cut in the middle isolates an outlier.
        ends = jnp.pad(places, ((0, 0), (0, 1)), constant_values=counts.shape[1] - 1)
        starts = jnp.pad(places, first_column)
        middle = 0.5 * up_to(bins.numbers, starts)
        middle = middle + 0.5 * up_to(bins.numbers, jnp.maximum(ends - 1, 0))
        at_mean, at_middle = (
            _halves(*lower_part(cut, starts, ends), sizes, totals)
            for cut in (centres, middle)
        )
        halves = jax.tree.map(
            functools.partial(jnp.where, at_mean.gain >= at_middle.gain),
            at_mean,
            at_middle,
        )
        centres = _move_centres(centres, sizes, halves, is_settled)
        new_places = boundaries(centres)
        moved = (new_places != places).any()
        return _LloydState(centres, new_places, moved, state.num_steps + 1)

    def is_running(state: _LloydState) -> jax.Array:
        return state.moved & (state.num_steps < num_steps)

    state = _LloydState(centres, boundaries(centres), jnp.bool_(True), jnp.int32(0))
    state = lax.while_loop(is_running, step, state)
    num_empty = jnp.sum(within(counts, state.places) == 0, dtype=jnp.int32)
    return state.centres, state.num_steps, num_empty


class _Halves(NamedTuple):
    """The two parts into which each cluster can be cut, float32 `[blocks, k]`.

    Attributes:
      lower: the mean of the lower part.
      upper: the mean of the upper part.
      gain: the squared error that the cut removes.
    """

    lower: jax.Array
    upper: jax.Array
    gain: jax.Array


def _halves(
    lower_sizes: jax.Array, lower_totals: jax.Array, sizes: jax.Array, totals: jax.Array
) -> _Halves:
    """The halves of each cluster, from the counts and the sums of the lower parts."""
    upper_sizes = sizes - lower_sizes
    lower = lower_totals / jnp.maximum(lower_sizes, 1).astype(jnp.float32)
    upper_totals = totals - lower_totals
    upper = upper_totals / jnp.maximum(upper_sizes, 1).astype(jnp.float32)
    gain = _error_between(lower, lower_sizes, upper, upper_sizes)
    return _Halves(lower, upper, gain)


def _move_centres(
    centres: jax.Array, sizes: jax.Array, halves: _Halves, is_settled: jax.Array
) -> jax.Array:
    """Moves some centres to where they lower the error.

    If a block has empty clusters, their centres split the clusters with the greatest
    gains. Otherwise a centre can move when no boundary of the block moves any more
    (`is_settled`). Then the two neighbours whose merge costs least are merged, and the
    cluster with the greatest gain is split. This is done only if it lowers the error.
    """
    size = centres.shape[1]

    def in_block(centres, sizes, halves, is_settled):
        """The new centres of one block, `[k]`."""
        lower, upper, gains = halves
        rank = jnp.arange(size, dtype=jnp.int32)
        is_empty = sizes == 0
        by_gain = jnp.argsort(-gains)  # the clusters to split
        empty_first = jnp.argsort(~is_empty, stable=True)
        splits = (rank < jnp.sum(is_empty)) & (gains[by_gain] > 0)
        # An index beyond the last drops the write.
        at = jnp.where(splits, empty_first, size)
        filled = centres.at[at].set(upper[by_gain], mode="drop")
        at = jnp.where(splits, by_gain, size)
        filled = filled.at[at].set(lower[by_gain], mode="drop")

        best = by_gain[0]
        costs = _error_between(centres[:-1], sizes[:-1], centres[1:], sizes[1:])
        shares_best = (rank[:-1] == best) | (rank[1:] == best)
        costs = jnp.where(shares_best, np.float32(np.inf), costs)
        first = jnp.argmin(costs)  # the left cluster of the pair to merge
        pair = jnp.stack([first, first + 1])
        weights = sizes[pair].astype(jnp.float32)
        merged = jnp.sum(weights * centres[pair]) / jnp.maximum(jnp.sum(weights), 1)
        swapped = centres.at[pair].set(jnp.stack([merged, upper[best]]))
        swapped = swapped.at[best].set(lower[best])
        is_better = is_settled & (gains[best] > _LEAST_GAIN * costs[first])
        centres = jnp.where(is_better, swapped, centres)
        return jnp.sort(jnp.where(splits.any(), filled, centres))

    return jax.vmap(in_block)(centres, sizes, halves, is_settled)


def _error_between(
    a: jax.Array, a_size: jax.Array, b: jax.Array, b_size: jax.Array
) -> jax.Array:
    """The squared error that a merge of two clusters with centres `a` and `b` adds."""
    a_count, b_count = a_size.astype(jnp.float32), b_size.astype(jnp.float32)
    distance = b - a
    share = a_count / jnp.maximum(a_count + b_count, 1)
    return share * b_count * distance * distance


# A float32 sum, and the part of the exact sum that it lacks.
_Pair = tuple[jax.Array, jax.Array]


def _running_sums(x: jax.Array) -> _Pair:
    """Running sums along axis 1, `[blocks, n]`, as pairs of float32 numbers.

    The sum of a cluster is the difference of two running sums. If the cluster has few
    numbers, this difference is too small for the precision of one float32 sum.
    """
    num_blocks, n = x.shape
    # Sums within rows of a square, then over the rows: two scans of sqrt(n) steps.
    size = math.isqrt(max(n - 1, 0)) + 1
    x = jnp.pad(x, ((0, 0), (0, size * size - n))).reshape(num_blocks, size, size)
    inner = _running_pairs((x, jnp.zeros_like(x)))
    row_sums = _running_pairs((inner[0][..., -1], inner[1][..., -1]))
    # What the rows before add to each row: [blocks, size, 1].
    before = [jnp.pad(part[:, :-1], ((0, 0), (1, 0)))[..., None] for part in row_sums]
    high, low = _add_pairs((before[0], before[1]), inner)
    return high.reshape(num_blocks, -1)[:, :n], low.reshape(num_blocks, -1)[:, :n]


def _running_pairs(pair: _Pair) -> _Pair:
    """Running sums of pairs along the last axis."""

    def step(total: _Pair, term: _Pair) -> tuple[_Pair, _Pair]:
        total = _add_pairs(total, term)
        return total, total

    zeros = jnp.zeros_like(pair[0][..., 0])
    terms = (jnp.moveaxis(pair[0], -1, 0), jnp.moveaxis(pair[1], -1, 0))
    _, sums = lax.scan(step, (zeros, zeros), terms)
    return jnp.moveaxis(sums[0], 0, -1), jnp.moveaxis(sums[1], 0, -1)


def _add_pairs(a: _Pair, b: _Pair) -> _Pair:
    """The sum of two pairs. The error of a float32 sum is known exactly.

    Knuth, The Art of Computer Programming, volume 2, section 4.2.2.
    """
    total = a[0] + b[0]
    b_part = total - a[0]
    lost = (a[0] - (total - b_part)) + (b[0] - b_part) + (a[1] + b[1])
    high = total + lost
    return high, lost - (high - total)


def _table_granularity(spec: QuantSpec, options: Mapping[str, Any]) -> Granularity:
    """The blocks of a rule's k-means: by default one table for each channel.

    The granularity of the spec is for scales. A table is larger than a scale, so the
    tables of small groups would need more bits than the codes.
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
    qt, info = kmeans(w, spec.fmt.bits, **options)
    assert qt.codebook is not None
    if isinstance(info.num_empty, Tracer):  # a plan needs shapes only
        return Solution(qt)
    num_empty = int(np.sum(info.num_empty))
    note = ""
    if num_empty:
        note = f"{num_empty} of {qt.codebook.size} table entries unused"
    return Solution(qt, note=note)


# k-means takes only the number of bits from a spec, so it refuses no spec.
METHOD = Method(
    "kmeans", _solve_kmeans, options=_OPTIONS, granularity=_table_granularity
)
