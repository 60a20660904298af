"""GPTQ: rounds the rows of a weight one by one; later rows compensate earlier errors.

Let `H = R @ R.T` with R upper triangular: a Cholesky decomposition from the last row to
the first. The errors of earlier rows change row j to w'_j before it is rounded. This
form of w'_j needs no inverse of H:

    d_i = w_i - q_i                                    # [out], error of an earlier row
    w'_j = w_j + sum over i < j of  R_ij / R_jj * d_i  # its share of their errors
    sum_j ||(w'_j - q_j) R_jj||^2 = tr((W - Q)^T H (W - Q))

These are the weights of the paper, where `U = R^-1` and `e_j = (w'_j - q_j) / U_jj`.
This form needs one triangular inverse less. The two forms differ only in the rows that
are not rounded yet. In the paper, these rows have the values of least error for the
case that they are never rounded. The scales of a group are computed from these values.
A triangular system of the group's size gives the values (`_Rows.expected`).

Rows are processed in nested regions: 16 rows, a block of 128, 8 blocks, a quarter of
all. In the smallest region, each row collects the errors of the rows before it. A
finished region updates the rows after it in the region around it. So the loop over rows
touches 16 rows at a time, which stay in cache, and large products do most of the work.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxq import formats
from jaxq.methods import _matrix
from jaxq.methods._explicit_axes import on_explicit_axes
from jaxq.methods._method import Method, Solution
from jaxq.methods._method_options import (
    COUNT,
    FLAG,
    check_values,
    number,
    refuse,
    why_not_stochastic,
)
from jaxq.methods._notes import few_tokens, join_notes
from jaxq.methods._rtn import round_to_nearest
from jaxq.observers import LayerStats
from jaxq.processes import to_numpy
from jaxq.qtensor import (
    Geometry,
    Meta,
    PerChannel,
    PerGroup,
    QTensor,
    QuantSpec,
    as_spec,
    dequantize,
    quantize,
    requantize,
    scale_values,
)

_DAMP = 0.01
_OPTIONS = {
    "act_order": FLAG,
    "damp": number("a share of the diagonal's mean, 0 to 1", least=0, most=1),
    "block_size": COUNT,
}
# If damping is too small, it grows by this factor, to at least _LEAST_DAMP and at most
# _MOST_DAMP of the mean of the diagonal.
_DAMP_FACTOR, _LEAST_DAMP, _MOST_DAMP = 10.0, 1e-3, 1.0
# Number of rows that update each other one by one.
_TILE = 16
# The least number of columns of the hessian that are decomposed together.
_LEAST_PANEL = 512
# Number of regions at the top. Each is compiled separately, so that it updates exactly
# the rows after it.
_NUM_SPANS = 4


class GPTQInfo(NamedTuple):
    """Diagnostics of `gptq` for one matrix.

    Attributes:
      loss: float32, `tr((W - Q)^T H' (W - Q))`, where H' is the damped hessian without
        dead inputs. NaN if the method fell back.
      damp: float32, the damping that was used. It is larger than the argument `damp` if
        H was not positive definite with that damping.
      num_dead: int32, number of inputs that were always zero.
      fell_back: bool, True if the weights were rounded to nearest, because no damping
        helped or H was not finite.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> hessian = jnp.diag(jnp.array([1.0, 0.0]))
      >>> _, info = jaxq.methods.gptq(jnp.ones((2, 2)), hessian, "int8")
      >>> int(info.num_dead), bool(info.fell_back)
      (1, False)
    """

    loss: jax.Array
    damp: jax.Array
    num_dead: jax.Array
    fell_back: jax.Array


@on_explicit_axes
def gptq(
    w: ArrayLike,
    hessian: ArrayLike,
    spec: str | QuantSpec,
    *,
    act_order: bool = False,
    damp: float = _DAMP,
    block_size: int = 128,
    name: str = "w",
) -> tuple[QTensor, GPTQInfo]:
    """Rounds a weight row by row. Later rows compensate the errors of earlier rows.

    `argmin over Q of tr((W - Q)^T H (W - Q))`, solved greedily in the order of the
    rows. H has the second moments of the layer's inputs, so the minimized number is the
    error of the layer's outputs.

    The scales of a group along the contracted axis are computed when the first row of
    the group is reached, from the weights with all updates so far. All other scales are
    those of `quantize(w, spec)`: per channel, per tensor, tiles, quantized scales
    (nf4_dq, nvfp4), and groups with `act_order`. With `act_order`, the rows of a group
    are reached at different times, so their scales are computed in advance ("static
    groups"). In every case the result is stored as `quantize` stores it. Ternary
    numbers are rounded to nearest, not by their threshold. The weights of an input that
    was always zero are rounded to nearest as well.

    Args:
      w: float `[in, out]`, or a stack `[..., in, out]` (by `jax.vmap`).
      hessian: float `[in, in]`, second moments `E[x x^T]` of the inputs, or a positive
        multiple of them. For a stack: one for all matrices, or `[..., in, in]`. With
        fewer tokens than inputs the hessian is singular, and the result depends on the
        damping.
      spec: preset name or `QuantSpec`. `rounding="stochastic"` raises a
        ValueError.
      act_order: process rows in the order of the hessian's diagonal, largest first.
      damp: 0 to 1, the share of the diagonal's mean that is added to the diagonal. If
        the sum is not positive definite, ten times as much is added, and so on, up to
        1. If that fails too, weights are rounded to nearest, and `info.fell_back` is
        True.
      block_size: at least 1, number of rows between two large products. A group is
        never split. `block_size` changes only the order of float32 sums.
      name: the name of the weight in errors.

    Returns:
      `(qt, info)`: a QTensor with the shape and dtype of `w`, axis -2 contracted; and a
      `GPTQInfo`, whose arrays have the leading axes of `w`.

    Raises:
      TypeError: `w` or `hessian` is not a float array.
      ValueError: shapes do not match, `damp` or `block_size` is out of range, the spec
        rounds stochastically, or (outside jit) a number is not finite.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> hessian = jnp.array([[1.0, 0.9], [0.9, 1.0]])
      >>> spec = jaxq.QuantSpec("int4", scale="float32")
      >>> w = jnp.array([[0.4, 7.0], [0.4, 7.0]])
      >>> qt, info = jaxq.methods.gptq(w, hessian, spec)
      >>> qt.shape, bool(info.fell_back)
      ((2, 2), False)

    References:
      Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
      Pre-trained Transformers", 2022, section 3.
    """
    spec = as_spec(spec, "gptq")
    w = _matrix.as_weight(w, "gptq", name)
    n = w.shape[-2]
    hessian = _matrix.as_statistic(
        hessian, "hessian", "gptq", shape=(n, n), meaning="second moments [in, in]", w=w
    )
    refuse("gptq", why_not_stochastic(spec, {}))
    check_values(
        "gptq", _OPTIONS, damp=damp, block_size=block_size, act_order=act_order
    )
    nearest = round_to_nearest(w, spec)
    return _gptq(w, hessian, nearest, np.float32(damp), act_order, block_size)


@functools.partial(jax.jit, static_argnames=("act_order", "block_size"))
def _gptq(
    w: jax.Array,
    hessian: jax.Array,
    nearest: QTensor,
    damp: ArrayLike,
    act_order: bool,
    block_size: int,
) -> tuple[QTensor, GPTQInfo]:
    round_matrix = functools.partial(
        _round_matrix, damp=damp, act_order=act_order, block_size=block_size
    )
    return _matrix.over_stack(round_matrix, w, (hessian, 2), stacked=(nearest,))


def _round_matrix(
    w: jax.Array,
    hessian: jax.Array,
    nearest: QTensor,
    damp: ArrayLike,
    act_order: bool,
    block_size: int,
) -> tuple[QTensor, GPTQInfo]:
    """`gptq` for one matrix `w [in, out]`; `nearest` is `w` rounded to nearest."""
    order = None
    if act_order:
        order = jnp.argsort(-jnp.diagonal(hessian), stable=True)  # [in]
        hessian = hessian[order][:, order]
    factor = _damped_factor(hessian, damp)

    def round_rows() -> tuple[QTensor, jax.Array]:
        return _round_rows(w, factor, nearest, order, block_size)

    def fall_back() -> tuple[QTensor, jax.Array]:
        return nearest, jnp.float32(np.nan)

    qt, loss = lax.cond(factor.failed, fall_back, round_rows)
    num_dead = jnp.sum(~factor.live, dtype=jnp.int32)
    return qt, GPTQInfo(loss, factor.damp, num_dead, factor.failed)


class _Factor(NamedTuple):
    """The damped hessian H' as `R @ R.T`, rows in the order of processing.

    Attributes:
      updates: `[in, in]`, R_ij / R_jj at [j, i] for i < j, else 0.
      diagonal: `[in]`, R_jj.
      live: bool `[in]`, False for inputs that were always zero.
      damp: the damping that was used.
      failed: True if there is no such R.
    """

    updates: jax.Array
    diagonal: jax.Array
    live: jax.Array
    damp: jax.Array
    failed: jax.Array


def _damped_factor(hessian: jax.Array, damp: ArrayLike) -> _Factor:
    """Decomposes the hessian with the least damping that makes it positive definite."""
    diagonal = jnp.diagonal(hessian)
    live = diagonal != 0
    # Relative to the largest number, so that no multiple of H overflows.
    unit = jnp.max(diagonal)
    unit = jnp.where(unit > 0, unit, 1.0)
    num_live = jnp.maximum(jnp.sum(live, dtype=jnp.float32), 1.0)
    mean = jnp.sum(diagonal / unit) / num_live
    mean = jnp.where(mean > 0, mean, 1.0)
    finite = jnp.isfinite(jnp.sum(hessian / unit))
    first_damp = jnp.asarray(damp, jnp.float32)

    # A state is (damping, updates, roots, whether to try more damping).
    def attempt(state: tuple[Any, ...]) -> tuple[Any, ...]:
        last = state[0]
        larger = jnp.clip(last * np.float32(_DAMP_FACTOR), _LEAST_DAMP, _MOST_DAMP)
        damp = jnp.where(last < 0, first_damp, larger)
        # A dead row is decomposed on its own, so its diagonal may be any number.
        damping = jnp.where(live, damp, 1.0) * mean
        updates, roots = _upper_factor(hessian, unit, damping)
        failed = ~jnp.isfinite(roots).all()
        return damp, updates, roots, finite & failed & (damp < _MOST_DAMP)

    def needs_more(state: tuple[Any, ...]) -> jax.Array:
        return state[-1]

    state = (
        jnp.float32(-1),  # no damping was tried yet
        jnp.zeros_like(hessian),
        jnp.zeros_like(diagonal),
        jnp.bool_(True),
    )
    last_damp, updates, roots, _ = lax.while_loop(needs_more, attempt, state)
    failed = ~(finite & jnp.isfinite(roots).all())
    return _Factor(updates, roots * jnp.sqrt(unit), live, last_damp, failed)


def _upper_factor(
    h: jax.Array, unit: jax.Array, damping: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Decomposes `h / unit + diag(damping) = R @ R.T`, R upper triangular.

    Panels of columns are decomposed from the last to the first, so that most of the
    work is matrix products.

    Returns:
      (updates `[in, in]`, diagonal `[in]`) as in `_Factor`; NaN if there is no R.
    """
    n = h.shape[0]
    size = max(_LEAST_PANEL, -(-n // 8))
    # Columns of R, last panel first: [end of the panel's columns, size].
    panels: list[jax.Array] = []
    updates, roots = [], []
    for start in range((n - 1) // size * size, -1, -size):
        stop = min(start + size, n)
        panel = h[:stop, start:stop] / unit
        panel = panel.at[start:].add(jnp.diag(damping[start:stop]))
        if panels:
            later = jnp.concatenate([columns[:stop] for columns in panels], axis=1)
            panel = panel - _barrier_dot(later, later[start:].T)
        # A lower factor of the reversed block is the upper factor of the block.
        square = panel[start:][::-1, ::-1]
        root = lax.linalg.cholesky(square, symmetrize_input=False)[::-1, ::-1]
        inverse = lax.linalg.triangular_solve(
            root, jnp.eye(stop - start, dtype=h.dtype), left_side=True, lower=False
        )
        above = _barrier_dot(panel[:start], inverse.T)
        panel = jnp.concatenate([above, jnp.triu(root)])  # [stop, stop - start]
        panels.append(panel)
        roots.append(jnp.diagonal(root))
        # Row j has R_ij / R_jj at columns i < j.
        rows = jnp.tril((panel / roots[-1][None]).T, start - 1)
        updates.append(jnp.pad(rows, ((0, 0), (0, n - stop))))
    return jnp.concatenate(updates[::-1]), jnp.concatenate(roots[::-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _RowGrid:
    """The scales, zero points, offsets and codebooks of the groups of rows.

    They determine to which numbers a row can be rounded.

    Attributes:
      spec: of the QTensor, with scales in the dtype of `scale`.
      scale: `[groups, out]`.
      zero_point: `[groups, out]`, or None.
      offset: `[groups, out]`, or None; `[1, 1]` for offset="mean".
      codebook: `[groups, out, num_codes]`, or None.
    """

    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    scale: jax.Array
    zero_point: jax.Array | None
    offset: jax.Array | None
    codebook: jax.Array | None

    def leaves(self) -> dict[str, jax.Array]:
        """The arrays that the spec has, by name."""
        names = ("scale", "zero_point", "offset", "codebook")
        arrays = {name: getattr(self, name) for name in names}
        return {name: array for name, array in arrays.items() if array is not None}

    def round(self, row: jax.Array, group: jax.Array) -> jax.Array:
        """Rounds a row `[out]` to nearest.

        It uses `requantize`, which also computes the final codes.
        """
        fmt = self.spec.fmt
        geometry = Geometry((1, row.shape[0]), (-1, -2), 1, (1, None))
        meta = Meta(self.spec, geometry, formats.Packing.NONE, "float32")
        take_group = functools.partial(
            lax.dynamic_index_in_dim, index=group, keepdims=False
        )
        leaves: dict[str, Any] = {
            name: take_group(leaf)[:, None] for name, leaf in self.leaves().items()
        }
        if self.spec.offset == "mean":
            leaves["offset"] = self.offset
        data = jnp.zeros((row.shape[0], 1), fmt.code_dtype)
        optional = ("zero_point", "offset", "codebook")
        like = QTensor(
            data=data,
            scale=leaves["scale"],
            meta=meta,
            **{name: leaves.get(name) for name in optional},
        )
        return dequantize(requantize(row[None], like))[0]

    def with_scales_of(self, rows: jax.Array, group: jax.Array) -> _RowGrid:
        """The grid with the scales of a group computed from its rows `[size, out]`."""
        qt = quantize(rows, self.spec, contracting=-2, on_nonfinite="propagate")
        leaves = {
            name: leaf.at[group].set(getattr(qt, name)[:, 0])
            for name, leaf in self.leaves().items()
        }
        return dataclasses.replace(self, **leaves)


def _grid_of(qt: QTensor) -> tuple[_RowGrid, np.ndarray]:
    """The grid of `qt`, and the group of each of its rows: int `[in]`."""
    n, _ = qt.meta.geometry.shape
    has_plain_scales = not isinstance(qt.scale, QTensor)
    spec = qt.spec.replace(
        granularity=PerChannel(),
        packing="none",
        scale=qt.spec.scale if has_plain_scales else "float32",
    )
    scale: Any = qt.scale if has_plain_scales else scale_values(qt)

    def by_group(leaf: jax.Array | None) -> jax.Array | None:
        return None if leaf is None else _by_group(leaf, qt.meta.geometry)

    if spec.offset == "mean":
        assert qt.offset is not None
        offset = qt.offset.reshape(1, 1)
    else:
        offset = by_group(qt.offset)
    grid = _RowGrid(
        spec,
        _by_group(scale, qt.meta.geometry),
        by_group(qt.zero_point),
        offset,
        by_group(qt.codebook),
    )
    geometry = qt.meta.geometry
    size = 1 if geometry.flat else geometry.block_shape[-1]
    return grid, np.arange(n) // (size or n)


def _by_group(leaf: jax.Array, geometry: Geometry) -> jax.Array:
    """A leaf `[*num_blocks, ...]` as `[groups, out, ...]`."""
    n, out = geometry.shape
    if not geometry.flat:
        block = geometry.block_shape[0]
        if block != 1:
            leaf = jnp.repeat(leaf, block or out, axis=0)[:out]
        return jnp.swapaxes(leaf, 0, 1)
    # Flat blocks are stretches of the transposed weight as it is stored, so they give a
    # number for each weight, and every row is a group.
    if leaf.shape[0] == 1:
        numbers = jnp.broadcast_to(leaf, (n * out, *leaf.shape[1:]))
    else:
        block = geometry.block_shape[0] or 1
        numbers = jnp.repeat(leaf, block, axis=0)[: n * out]
    return jnp.swapaxes(numbers.reshape(out, n, *leaf.shape[1:]), 0, 1)


def _moving_group_size(qt: QTensor) -> int | None:
    """Size of groups whose scales are computed at their first row; None if static."""
    spec, geometry = qt.spec, qt.meta.geometry
    has_groups = isinstance(spec.granularity, PerGroup)
    if not has_groups or isinstance(spec.scale, QuantSpec) or spec.offset == "mean":
        return None
    size = geometry.block_shape[-1]
    is_padded = size is not None and geometry.contracted_size % size != 0
    # The zeros that fill up a last group would change its minimum, or its mean.
    if is_padded and (spec.offset == "min" or spec.rule.reads_block):
        return None
    return size


def _round_rows(
    w: jax.Array,
    factor: _Factor,
    nearest: QTensor,
    order: jax.Array | None,
    block_size: int,
) -> tuple[QTensor, jax.Array]:
    """Rounds the rows of a weight in order. Returns the QTensor and its loss."""
    n = w.shape[0]
    grid, groups = _grid_of(nearest)
    group_size = None if order is not None else _moving_group_size(nearest)
    sizes = _region_sizes(n, group_size, block_size)
    padding = -n % sizes[-1]
    original = w.astype(jnp.float32)
    groups = jnp.asarray(groups, jnp.int32)
    if order is not None:
        original, groups = original[order], groups[order]
    original = jnp.pad(original, ((0, padding), (0, 0)))
    groups = jnp.pad(groups, (0, padding), mode="edge")
    updates = jnp.pad(factor.updates, ((0, padding), (0, padding)))
    region = _Region(sizes, group_size)

    reached_parts, error_parts, current = [], [], original
    for start, stop in _spans(n + padding, sizes[-1]):
        span = slice(start, stop)
        rows = _Rows(
            original[span],
            current[: stop - start],
            updates[span, span],
            groups[span],
        )
        reached, error, grid = region.run(rows, grid, jnp.int32(start))
        reached_parts.append(reached)
        error_parts.append(error)
        if stop < n + padding:
            later = current[stop - start :]
            current = later + _barrier_dot(updates[stop:, span], error)
    reached = jnp.concatenate(reached_parts)[:n]  # w', the weights that were rounded
    error = jnp.concatenate(error_parts)[:n]  # d = w - q

    diagonal = jnp.where(factor.live, factor.diagonal, 0.0)
    cost = (reached - original[:n] + error) * diagonal[:, None]  # (w' - q) R_jj
    loss = jnp.sum(cost * cost)
    if order is not None:
        reached = jnp.zeros_like(reached).at[order].set(reached, unique_indices=True)
    if group_size is not None:
        leaves = {
            name: jnp.swapaxes(leaf, 0, 1) for name, leaf in grid.leaves().items()
        }
        nearest = dataclasses.replace(nearest, **leaves)
    return requantize(reached, nearest), loss


class _Rows(NamedTuple):
    """Some rows in the order of processing.

    Attributes:
      original: `[rows, out]`, the weights.
      current: `[rows, out]`, the weights with the updates by all earlier rows.
      updates: `[rows, rows]`, as in `_Factor`.
      groups: int32 `[rows]`, the group of each row.
    """

    original: jax.Array
    current: jax.Array
    updates: jax.Array
    groups: jax.Array

    def part(self, start: jax.Array, size: int) -> _Rows:
        """The `size` rows from `start` on."""
        cut = functools.partial(
            lax.dynamic_slice_in_dim, start_index=start, slice_size=size
        )
        return _Rows(
            cut(self.original),
            cut(self.current),
            cut(cut(self.updates), axis=1),
            cut(self.groups),
        )

    def expected(self) -> jax.Array:
        """What the rows would be if none of them were rounded, `[rows, out]`.

        Then the error d_j of each row cancels its share of the errors before it:
        `d_j + sum over i < j of R_ij / R_jj d_i = -(current - original)`, where i runs
        over these rows.
        """
        unit = jnp.eye(self.updates.shape[0], dtype=jnp.float32)
        # The inverse of the small matrix and a product are cheaper than a triangular
        # solve for all columns of the weight.
        inverse = lax.linalg.triangular_solve(
            self.updates, unit, left_side=True, lower=True, unit_diagonal=True
        )
        return self.original + _barrier_dot(inverse, self.current - self.original)


# Weights that each row was rounded from, errors of its rounding, grid.
_RegionResult = tuple[jax.Array, jax.Array, _RowGrid]


@dataclasses.dataclass(frozen=True)
class _Region:
    """Processes rows in nested regions.

    Attributes:
      sizes: numbers of rows, ascending; each divides the next.
      group_size: the size at which scales are computed; None if all are static.
    """

    sizes: tuple[int, ...]
    group_size: int | None

    def run(self, rows: _Rows, grid: _RowGrid, start: jax.Array) -> _RegionResult:
        """Rounds rows; `start` is the position of the first among all rows."""
        if not self.sizes:
            return self._round_one_by_one(rows, grid)
        size, inner = self.sizes[-1], _Region(self.sizes[:-1], self.group_size)
        count = rows.current.shape[0] // size
        if count == 1:
            if size == self.group_size:
                grid = grid.with_scales_of(rows.expected(), start // size)
            return inner.run(rows, grid, start)

        def step(i: jax.Array, state: _RegionResult) -> _RegionResult:
            current, errors, grid = state
            # With jax_disable_jit, i is an int.
            begin = jnp.asarray(i * size, jnp.int32)
            part = rows._replace(current=current).part(begin, size)
            if size == self.group_size:
                group = (start + begin) // size
                grid = grid.with_scales_of(part.expected(), group)
            reached, error, grid = inner.run(part, grid, start + begin)
            updates = lax.dynamic_slice_in_dim(rows.updates, begin, size, axis=1)

            def update(j: jax.Array, current: jax.Array) -> jax.Array:
                """Adds the errors of this part to part j, which comes later."""
                cut = functools.partial(
                    lax.dynamic_slice_in_dim, start_index=j * size, slice_size=size
                )
                updated = cut(current) + _barrier_dot(cut(updates), error)
                return lax.dynamic_update_slice_in_dim(
                    current, updated, j * size, axis=0
                )

            current = lax.dynamic_update_slice_in_dim(current, reached, begin, axis=0)
            current = lax.fori_loop(i + 1, count, update, current)
            errors = lax.dynamic_update_slice_in_dim(errors, error, begin, axis=0)
            return current, errors, grid

        state = (rows.current, jnp.zeros_like(rows.current), grid)
        return lax.fori_loop(0, count, step, state)

    def _round_one_by_one(self, rows: _Rows, grid: _RowGrid) -> _RegionResult:
        def step(
            i: jax.Array, state: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            # `errors` is read by a product and written in one row. So XLA never copies
            # it.
            shares, errors = state
            row = functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False)
            # Errors of later rows are still 0, so the whole product can be taken.
            share = _barrier_dot(row(rows.updates)[None], errors)[0]  # [out]
            rounded = grid.round(row(rows.current) + share, row(rows.groups))
            error = row(rows.original) - rounded
            # A NaN must turn only its own block into NaN.
            error = jnp.where(jnp.isfinite(error), error, 0.0)
            put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
            return put(shares, share), put(errors, error)

        zeros = jnp.zeros_like(rows.current)
        num_rows = rows.current.shape[0]
        shares, errors = lax.fori_loop(0, num_rows, step, (zeros, zeros))
        return rows.current + shares, errors, grid


def _region_sizes(n: int, group_size: int | None, block_size: int) -> tuple[int, ...]:
    """Sizes of the nested regions, ascending.

    Each size divides the next, and the size of a group is one of them.
    """
    if group_size is None:
        sizes = [min(_TILE, block_size)]
    else:
        sizes = [_nearest_divisor(group_size, 1, min(_TILE, block_size))]
        if group_size > 2 * block_size:
            sizes.append(_nearest_divisor(group_size, sizes[-1], block_size))
        sizes.append(group_size)
    if sizes[-1] < block_size:
        sizes.append(sizes[-1] * max(1, block_size // sizes[-1]))
    sizes.append(8 * sizes[-1])
    least = group_size or sizes[0]
    most = max(least, n // _NUM_SPANS)
    return tuple(size for size in sorted(set(sizes)) if size <= most)


def _nearest_divisor(number: int, factor: int, target: int) -> int:
    """A multiple of `factor` that divides `number`.

    Of these numbers it is the one whose ratio to `target` is nearest to 1.
    """
    divisors = [d for d in range(factor, number + 1, factor) if number % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / target)))


def _spans(n: int, size: int) -> list[tuple[int, int]]:
    """Cuts n rows into up to `_NUM_SPANS` spans of whole regions; into one for small n.

    The spans have about the same length.
    """
    num_regions = n // size
    num_spans = min(_NUM_SPANS, num_regions) if n > 512 else 1
    edges = [size * (num_regions * i // num_spans) for i in range(num_spans + 1)]
    return list(itertools.pairwise(edges))


def _barrier_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in float32, which XLA does not fuse with the sum that reads it.

    On CPU, XLA computes the fused product by loops. That takes four times as long.
    """
    product = jnp.matmul(
        a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return lax.optimization_barrier(product)


def _solve_gptq(
    w: jax.Array,
    stats: LayerStats | None,
    spec: QuantSpec,
    *,
    key: jax.Array,
    nearest: QTensor,
    damp: float = _DAMP,
    act_order: bool = False,
    block_size: int = 128,
) -> Solution:
    assert stats is not None
    assert stats.hessian is not None
    damping = np.float32(damp)
    qt, info = _gptq(w, stats.hessian, nearest, damping, act_order, block_size)
    num_inputs = w.shape[-2]
    num_dead = int(np.sum(info.num_dead))
    if num_dead and num_dead == info.num_dead.size * num_inputs:
        note = f"all of its {num_dead} inputs are dead, so rtn is used"
        return Solution(qt, note, True)
    note = join_notes(
        _damping_note(info, damp),
        f"{num_dead} dead inputs" if num_dead else "",
        few_tokens(stats, num_inputs),
    )
    return Solution(qt, note, rounded=bool(np.all(info.fell_back)))


def _damping_note(info: GPTQInfo, damp: float) -> str:
    """A remark if `damp` was not enough for the hessian; empty if it was."""
    fell_back = to_numpy(info.fell_back)
    if fell_back.all():
        return "its hessian is not positive definite, so rtn is used"
    if fell_back.any():
        where = f"in {fell_back.sum()} of {fell_back.size} matrices"
        return f"its hessian is not positive definite {where}, so rtn is used"
    largest = float(np.max(info.damp))
    return f"damping {largest:.3g}" if largest > 1.01 * damp else ""


METHOD = Method(
    "gptq",
    _solve_gptq,
    options=_OPTIONS,
    why_not=why_not_stochastic,
    needs=("hessian",),
    takes_nearest=True,
)
