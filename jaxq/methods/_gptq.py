"""GPTQ: rows of a weight are rounded one after another, and rows not yet rounded make up for the error.

With `H = R diag R^T` in the sense of a Cholesky decomposition from the last row to the first, `H = R @ R.T` and R upper
triangular, the weight w'_j that row j has when its turn comes is known without an inverse of H:

    d_i = w_i - q_i                                        # [out], the error of a row already rounded
    w'_j = w_j + sum over i < j of  R_ij / R_jj * d_i      # what earlier rows ask of row j
    sum_j ||(w'_j - q_j) R_jj||^2 = tr((W - Q)^T H (W - Q))

These are the weights of the paper, where `U = R^-1` and `e_j = (w'_j - q_j) / U_jj`, with one triangular inverse less.
Only while rows wait do the two differ: the paper's are what waiting rows would be if none of them were rounded. Where a
group's scales are found, a triangular system of the group's size gives these (`_Rows.expected`).

Rows are taken in regions within regions (16 rows, a block of 128, 8 blocks, a quarter of all): within the smallest,
each row asks for what the errors before it owe; a region that is done updates what is ahead of it in the one around it.
So the loop over rows touches 16 rows at a time, which stay in cache, and large products do the bulk of the work.
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
from jaxq.methods._method import Method, Solution
from jaxq.methods._notes import few_tokens, join_notes
from jaxq.methods._options import (
    COUNT,
    FLAG,
    check_values,
    number,
    refuse,
    why_not_stochastic,
)
from jaxq.methods._rtn import round_to_nearest
from jaxq.observers import LayerStats
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

# Where damping is not enough, it grows by this factor up to this share of the mean of the diagonal.
_DAMP_FACTOR, _LEAST_DAMP, _MOST_DAMP = 10.0, 1e-3, 1.0
# Rows that update each other one by one.
_TILE = 16
# Columns of the hessian that are decomposed at once, at least.
_STRETCH = 512
# Regions at the top that are compiled one by one, so that each updates exactly the rows behind it.
_SPANS = 4


_DAMP = 0.01
_OPTIONS = {
    "act_order": FLAG,
    "damp": number("a share of the diagonal's mean, 0 to 1", least=0, most=1),
    "block_size": COUNT,
}


class GPTQInfo(NamedTuple):
    """What happened to one matrix.

    Attributes:
      loss: float32, `tr((W - Q)^T H' (W - Q))` with H' the damped hessian, without dead inputs; NaN where it fell back.
      damp: float32, the damping that was used; more than was asked for where that left H not positive definite.
      num_dead: int32, inputs that were always zero.
      fell_back: bool, True where no damping helped (or H was not finite) and weights were rounded to nearest.
    """

    loss: jax.Array
    damp: jax.Array
    num_dead: jax.Array
    fell_back: jax.Array


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
    """Rounds a weight row by row, and lets the rows that follow make up for the error on the layer's inputs.

    `argmin over Q of tr((W - Q)^T H (W - Q))`, greedily in the order of the rows; H the second moments of the inputs.

    Groups along the contraction get their scales when their first row is reached, from the weights as they are by then.
    All other scales are those of `quantize(w, spec)`: per channel, per tensor, tiles, quantized scales (nf4_dq, nvfp4),
    and groups under `act_order`, where rows of a group are far apart ("static groups"), so that storage is that of
    `quantize` in every case. Ternary numbers are rounded to the nearest one, not by their threshold. An input that was
    always zero says nothing about its weights: they are rounded to nearest.

    Args:
      w: float `[in, out]`, or `[..., in, out]`: a stack, each with statistics of its own (by `jax.vmap`).
      hessian: float `[in, in]`, second moments `E[x x^T]` of the inputs, or any positive multiple; `[..., in, in]` or
        one for the whole stack. Of fewer tokens than inputs it is singular, and damping decides what it leaves open.
      spec: preset name or `QuantSpec`, any but `rounding="stochastic"`.
      act_order: take rows by falling diagonal of the hessian instead of as they come.
      damp: share of the diagonal's mean that is added to it. Where the sum is not positive definite, ten times as much
        and so on, up to 1; then weights are rounded to nearest and `info.fell_back` says so.
      block_size: rows between two large products. Groups are kept whole; the result does not depend on it but for the
        order of float32 sums.
      name: what errors call the weight.

    Returns:
      QTensor with the shape and dtype of `w`, axis -2 contracted; `GPTQInfo`, arrays with the leading axes of `w`.

    Raises:
      TypeError: `w` or `hessian` is not a float array.
      ValueError: shapes that do not fit, a number that is not finite (outside jit), damp or block_size out of range.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> hessian = jnp.array([[1.0, 0.9], [0.9, 1.0]])
      >>> spec = jaxq.QuantSpec("int4", scale="float32")
      >>> qt, info = jaxq.methods.gptq(jnp.array([[0.4, 7.0], [0.4, 7.0]]), hessian, spec)
      >>> qt.shape, bool(info.fell_back)
      ((2, 2), False)

    References:
      Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
      section 3.
    """
    spec = as_spec(spec, "gptq")
    w = _matrix.as_weight(w, "gptq", name)
    n = w.shape[-2]
    hessian = _matrix.as_statistic(
        hessian, "hessian", "gptq", shape=(n, n), said="second moments [in, in]", w=w
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
):
    one = functools.partial(_one, damp=damp, act_order=act_order, block_size=block_size)
    return _matrix.over_stack(one, w, (hessian, 2), stacked=(nearest,))


def _one(
    w: jax.Array,
    hessian: jax.Array,
    nearest: QTensor,
    damp: ArrayLike,
    act_order: bool,
    block_size: int,
):
    order = None
    if act_order:
        order = jnp.argsort(-jnp.diagonal(hessian), stable=True)
        hessian = hessian[order][:, order]
    found = _factor(hessian, damp)

    def round_rows() -> tuple[QTensor, jax.Array]:
        return _round_rows(w, found, nearest, order, block_size)

    qt, loss = lax.cond(
        found.failed, lambda: (nearest, jnp.float32(np.nan)), round_rows
    )
    return qt, GPTQInfo(
        loss, found.damp, jnp.sum(~found.live, dtype=jnp.int32), found.failed
    )


class _Factor(NamedTuple):
    """The damped hessian H' as `R @ R.T`, rows in the order they are taken."""

    updates: jax.Array  # [in, in], R_ij / R_jj at [j, i] for i < j, else 0
    diagonal: jax.Array  # [in], R_jj
    live: jax.Array  # [in], bool
    damp: jax.Array
    failed: jax.Array


def _factor(hessian: jax.Array, damp: ArrayLike) -> _Factor:
    diagonal = jnp.diagonal(hessian)
    live = diagonal != 0
    # Relative to the largest, so that no multiple of H overflows.
    unit = jnp.max(diagonal)
    unit = jnp.where(unit > 0, unit, 1.0)
    mean = jnp.sum(diagonal / unit) / jnp.maximum(jnp.sum(live, dtype=jnp.float32), 1.0)
    mean = jnp.where(mean > 0, mean, 1.0)
    finite = jnp.isfinite(jnp.sum(hessian / unit))

    def decompose(damp: jax.Array) -> tuple[jax.Array, jax.Array]:
        # A dead row is alone, whatever its diagonal.
        return _upper_factor(hessian, unit, jnp.where(live, damp, 1.0) * mean)

    def again(state: tuple[Any, ...]) -> jax.Array:
        return state[-1]

    def attempt(state: tuple[Any, ...]) -> tuple[Any, ...]:
        tried = state[0]
        more = jnp.clip(tried * np.float32(_DAMP_FACTOR), _LEAST_DAMP, _MOST_DAMP)
        damp = jnp.where(tried < 0, first, more)
        updates, roots = decompose(damp)
        return (
            damp,
            updates,
            roots,
            finite & ~jnp.isfinite(roots).all() & (damp < _MOST_DAMP),
        )

    first = jnp.asarray(damp, jnp.float32)
    state = (
        jnp.float32(-1),
        jnp.zeros_like(hessian),
        jnp.zeros_like(diagonal),
        jnp.bool_(True),
    )
    used, updates, roots, _ = lax.while_loop(again, attempt, state)
    failed = ~(finite & jnp.isfinite(roots).all())
    return _Factor(updates, roots * jnp.sqrt(unit), live, used, failed)


def _upper_factor(
    h: jax.Array, unit: jax.Array, added: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`updates` and `diagonal` of `h / unit + diag(added) = R @ R.T` as `_Factor` has them, NaN where there is no R.

    By stretches of columns from the last to the first, so that most of the work are matrix products.
    """
    n = h.shape[0]
    size = max(_STRETCH, -(-n // 8))
    panels: list[
        jax.Array
    ] = []  # columns of R, [rows up to the stretch's end, size], last first
    updates, roots = [], []
    for start in range((n - 1) // size * size, -1, -size):
        stop = min(start + size, n)
        panel = h[:stop, start:stop] / unit
        panel = panel.at[start:].add(jnp.diag(added[start:stop]))
        if panels:
            behind = jnp.concatenate([later[:stop] for later in panels], axis=1)
            panel = panel - _dot(behind, behind[start:].T)
        root = lax.linalg.cholesky(panel[start:][::-1, ::-1], symmetrize_input=False)[
            ::-1, ::-1
        ]
        inverse = lax.linalg.triangular_solve(
            root, jnp.eye(stop - start, dtype=h.dtype), left_side=True, lower=False
        )
        panel = jnp.concatenate([_dot(panel[:start], inverse.T), jnp.triu(root)])
        panels.append(panel)
        roots.append(jnp.diagonal(root))
        rows = jnp.tril(
            (panel / roots[-1][None]).T, start - 1
        )  # row j: R_ij / R_jj at i < j
        updates.append(jnp.pad(rows, ((0, 0), (0, n - stop))))
    return jnp.concatenate(updates[::-1]), jnp.concatenate(roots[::-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Grid:
    """The numbers each row may take: scales and their kin with the row's group first.

    Attributes:
      spec: of the QTensor, scales in the dtype `scale` has.
      scale: `[groups, out]`.
      zero_point, offset: like scale, or None; a mean is `[1, 1]`.
      codebook: `[groups, out, num_codes]`, or None.
    """

    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    scale: jax.Array
    zero_point: jax.Array | None
    offset: jax.Array | None
    codebook: jax.Array | None

    def leaves(self) -> dict[str, jax.Array]:
        found = {
            name: getattr(self, name)
            for name in ("scale", "zero_point", "offset", "codebook")
        }
        return {name: leaf for name, leaf in found.items() if leaf is not None}

    def round(self, row: jax.Array, group: jax.Array) -> jax.Array:
        """The numbers next to `row`, `[out]`; by `requantize`, so that the codes made at the end are the same."""
        fmt = self.spec.fmt
        geometry = Geometry((1, row.shape[0]), (-1, -2), 1, (1, None))
        meta = Meta(self.spec, geometry, formats.Packing.NONE, "float32")
        take = functools.partial(lax.dynamic_index_in_dim, index=group, keepdims=False)
        mine: dict[str, Any] = {
            name: take(leaf)[:, None] for name, leaf in self.leaves().items()
        }
        if self.spec.offset == "mean":
            mine["offset"] = self.offset
        data = jnp.zeros((row.shape[0], 1), fmt.code_dtype)
        others = {name: mine.get(name) for name in ("zero_point", "offset", "codebook")}
        like = QTensor(data=data, scale=mine["scale"], meta=meta, **others)
        return dequantize(requantize(row[None], like))[0]

    def measure(self, rows: jax.Array, group: jax.Array) -> _Grid:
        """The same with the scales of one group found anew, from its `rows` `[size, out]`."""
        found = quantize(rows, self.spec, contracting=-2, on_nonfinite="propagate")
        new = {
            name: leaf.at[group].set(getattr(found, name)[:, 0])
            for name, leaf in self.leaves().items()
        }
        return dataclasses.replace(self, **new)


def _grid_of(qt: QTensor) -> tuple[_Grid, np.ndarray]:
    """The grid of `qt` and the group of each of its rows."""
    geometry = qt.meta.geometry
    n, out = geometry.shape
    plain = not isinstance(qt.scale, QTensor)
    spec = qt.spec.replace(
        granularity=PerChannel(),
        packing="none",
        scale=qt.spec.scale if plain else "float32",
    )

    def along_rows(
        leaf: jax.Array,
    ) -> jax.Array:  # [*num_blocks, ...] -> [groups, out, ...]
        if geometry.flat:  # blocks of the transposed weight as it is stored
            one = leaf.shape[0] == 1
            spread = (
                leaf
                if one
                else jnp.repeat(leaf, geometry.block_shape[0] or 1, axis=0)[: n * out]
            )
            spread = (
                jnp.broadcast_to(spread, (n * out, *leaf.shape[1:])) if one else spread
            )
            return jnp.swapaxes(spread.reshape(out, n, *leaf.shape[1:]), 0, 1)
        block = geometry.block_shape[0]
        if block != 1:
            leaf = jnp.repeat(leaf, block or out, axis=0)[:out]
        return jnp.swapaxes(leaf, 0, 1)

    scale: Any = qt.scale if plain else scale_values(qt)
    offset = qt.offset
    if offset is not None:
        offset = offset.reshape(1, 1) if spec.offset == "mean" else along_rows(offset)
    others = [
        None if leaf is None else along_rows(leaf)
        for leaf in (qt.zero_point, qt.codebook)
    ]
    size = 1 if geometry.flat else geometry.block_shape[-1]
    return _Grid(spec, along_rows(scale), others[0], offset, others[1]), np.arange(
        n
    ) // (size or n)


def _moving_group(qt: QTensor) -> int | None:
    """Size of the groups whose scales are found on the way; None where all are known before."""
    spec, geometry = qt.spec, qt.meta.geometry
    if (
        not isinstance(spec.granularity, PerGroup)
        or isinstance(spec.scale, QuantSpec)
        or spec.offset == "mean"
    ):
        return None
    size = geometry.block_shape[-1]
    # Zeros that fill up a last group change a mean and a minimum.
    padded = size is not None and geometry.contracted_size % size != 0
    if padded and (spec.offset == "min" or spec.rule.reads_block):
        return None
    return size


def _round_rows(
    w: jax.Array,
    factor: _Factor,
    nearest: QTensor,
    order: jax.Array | None,
    block_size: int,
) -> tuple[QTensor, jax.Array]:
    """The QTensor and the loss of it."""
    n = w.shape[0]
    grid, groups = _grid_of(nearest)
    group = None if order is not None else _moving_group(nearest)
    sizes = _region_sizes(n, group, block_size)
    extra = -n % sizes[-1]
    original = w.astype(jnp.float32)
    groups = jnp.asarray(groups, jnp.int32)
    if order is not None:
        original, groups = original[order], groups[order]
    original = jnp.pad(original, ((0, extra), (0, 0)))
    groups = jnp.pad(groups, (0, extra), mode="edge")
    updates = jnp.pad(factor.updates, ((0, extra), (0, extra)))
    region = _Region(sizes, group)

    met, errors, current = [], [], original
    for start, stop in _spans(n + extra, sizes[-1]):
        inner = slice(start, stop)
        taken = _Rows(
            original[inner],
            current[: stop - start],
            updates[inner, inner],
            groups[inner],
        )
        done, error, grid = region.run(taken, grid, jnp.int32(start))
        met, errors = [*met, done], [*errors, error]
        if stop < n + extra:
            current = current[stop - start :] + _dot(updates[stop:, inner], error)
    reached = jnp.concatenate(met)[:n]  # what each row was when its turn came
    error = jnp.concatenate(errors)[:n]

    cost = (reached - original[:n] + error) * jnp.where(
        factor.live, factor.diagonal, 0.0
    )[:, None]
    loss = jnp.sum(cost * cost)
    if order is not None:
        reached = jnp.zeros_like(reached).at[order].set(reached, unique_indices=True)
    if group is not None:
        moved = {name: jnp.swapaxes(leaf, 0, 1) for name, leaf in grid.leaves().items()}
        nearest = dataclasses.replace(nearest, **moved)
    return requantize(reached, nearest), loss


class _Rows(NamedTuple):
    """Some rows in the order they are taken."""

    original: jax.Array  # [rows, out]
    current: jax.Array  # [rows, out], with the updates of the rows before them
    updates: jax.Array  # [rows, rows]
    groups: jax.Array  # [rows], int32

    def part(self, start: jax.Array, size: int) -> _Rows:
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
        """What the rows would be, given those before them, if none of them were rounded: `[rows, out]`.

        Then `d_j + sum over earlier rows i here of R_ij / R_jj d_i` is what the rows before ask of row j, negated.
        """
        unit = jnp.eye(self.updates.shape[0], dtype=jnp.float32)
        # Of the small matrix alone: for all columns of the weight a solve would cost more than the product does.
        inverse = lax.linalg.triangular_solve(
            self.updates, unit, left_side=True, lower=True, unit_diagonal=True
        )
        return self.original + _dot(inverse, self.current - self.original)


@dataclasses.dataclass(frozen=True)
class _Region:
    """Takes rows in regions of `sizes`, ascending, each a divisor of the next; `group`: the size that finds scales."""

    sizes: tuple[int, ...]
    group: int | None

    def run(
        self, rows: _Rows, grid: _Grid, start: jax.Array
    ) -> tuple[jax.Array, jax.Array, _Grid]:
        """(weights each row was rounded from, errors of its rounding, grid), for rows from `start` on."""
        if not self.sizes:
            return self._one_by_one(rows, grid)
        size, inner = self.sizes[-1], _Region(self.sizes[:-1], self.group)

        def step(
            i: jax.Array, state: tuple[jax.Array, jax.Array, _Grid]
        ) -> tuple[jax.Array, jax.Array, _Grid]:
            current, errors, grid = state
            begin = (i * size).astype(jnp.int32)
            part = rows._replace(current=current).part(begin, size)
            if size == self.group:
                grid = grid.measure(part.expected(), (start + begin) // size)
            done, error, grid = inner.run(part, grid, start + begin)
            updates = lax.dynamic_slice_in_dim(rows.updates, begin, size, axis=1)

            def update(
                j: jax.Array, current: jax.Array
            ) -> jax.Array:  # only what is ahead
                of_part = functools.partial(
                    lax.dynamic_slice_in_dim, start_index=j * size, slice_size=size
                )
                new = of_part(current) + _dot(of_part(updates), error)
                return lax.dynamic_update_slice_in_dim(current, new, j * size, axis=0)

            current = lax.dynamic_update_slice_in_dim(current, done, begin, axis=0)
            current = lax.fori_loop(i + 1, count, update, current)
            return (
                current,
                lax.dynamic_update_slice_in_dim(errors, error, begin, axis=0),
                grid,
            )

        state = (rows.current, jnp.zeros_like(rows.current), grid)
        count = rows.current.shape[0] // size
        if count == 1 and size == self.group:
            grid = grid.measure(rows.expected(), start // size)
        return (
            inner.run(rows, grid, start)
            if count == 1
            else lax.fori_loop(0, count, step, state)
        )

    def _one_by_one(
        self, rows: _Rows, grid: _Grid
    ) -> tuple[jax.Array, jax.Array, _Grid]:
        def step(
            i: jax.Array, state: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            # What reads `errors` is a product, and what writes it changes one row: so it is never copied.
            asked, errors = state
            row = functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False)
            ask = _dot(row(rows.updates)[None], errors)[0]  # 0 for errors not yet made
            error = row(rows.original) - grid.round(
                row(rows.current) + ask, row(rows.groups)
            )
            error = jnp.where(
                jnp.isfinite(error), error, 0.0
            )  # a NaN ruins its own block and no other
            put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
            return put(asked, ask), put(errors, error)

        zeros = jnp.zeros_like(rows.current)
        asked, errors = lax.fori_loop(0, rows.current.shape[0], step, (zeros, zeros))
        return rows.current + asked, errors, grid


def _region_sizes(n: int, group: int | None, block_size: int) -> tuple[int, ...]:
    """Sizes of the regions within regions, ascending; each divides the next, and a group is one of them."""
    if group is None:
        sizes = [min(_TILE, block_size)]
    else:
        sizes = [_divisor(group, 1, min(_TILE, block_size))]
        if group > 2 * block_size:
            sizes.append(_divisor(group, sizes[-1], block_size))
        sizes.append(group)
    if sizes[-1] < block_size:
        sizes.append(sizes[-1] * max(1, block_size // sizes[-1]))
    sizes.append(8 * sizes[-1])
    least = group or sizes[0]
    return tuple(s for s in sorted(set(sizes)) if s <= max(least, n // _SPANS))


def _divisor(number: int, factor: int, target: int) -> int:
    """The divisor of `number` that is a multiple of `factor` and nearest to `target`, by ratio."""
    found = [d for d in range(factor, number + 1, factor) if number % d == 0]
    return min(found, key=lambda d: abs(math.log(d / target)))


def _spans(n: int, size: int) -> list[tuple[int, int]]:
    """Up to `_SPANS` stretches of whole regions, about equal; one where there is little to do."""
    count = n // size
    spans = min(_SPANS, count) if n > 512 else 1
    edges = [size * (count * i // spans) for i in range(spans + 1)]
    return list(itertools.pairwise(edges))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of its own: fused with the sum it goes into, XLA on CPU computes it by loops, four times as slow."""
    return lax.optimization_barrier(
        jnp.matmul(
            a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
    )


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
    qt, info = _gptq(w, stats.hessian, nearest, np.float32(damp), act_order, block_size)
    num_inputs = w.shape[-2]
    num_dead = int(np.sum(info.num_dead))
    if num_dead and num_dead == info.num_dead.size * num_inputs:
        return Solution(qt, f"all of its {num_dead} inputs are dead, so rtn", True)
    fell_back = np.asarray(info.fell_back)
    notes = (
        _damping_note(info, damp),
        f"{num_dead} dead inputs" if num_dead else "",
        few_tokens(stats, num_inputs),
    )
    return Solution(qt, join_notes(*notes), bool(fell_back.all()))


def _damping_note(info: GPTQInfo, damp: float) -> str:
    """A remark if the hessian needed more damping than `damp`, or none was enough."""
    fell_back = np.asarray(info.fell_back)
    if fell_back.any():
        where = f" in {fell_back.sum()} of {fell_back.size} matrices"
        where = "" if fell_back.all() else where
        return f"its hessian is not positive definite{where}, so rtn"
    used = float(np.max(info.damp))
    return f"damping {used:.3g}" if used > 1.01 * damp else ""


METHOD = Method(
    "gptq",
    _solve_gptq,
    options=_OPTIONS,
    why_not=why_not_stochastic,
    needs=("hessian",),
    takes_nearest=True,
)
