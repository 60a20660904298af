"""What happened to each parameter: one row each, skipped ones with the reason."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import metrics, ops
from jaxq.methods import Solved
from jaxq.nn.layers import Roles
from jaxq.qtensor import Geometry, QTensor, dequantize, inside_range, quantize
from jaxq.recipes import Rule

# Numbers of a convolution's input, whose size is not known here: more than any group has.
_EXAMPLE = 1 << 20
# Neighbours whose error is looked at together.
_WORST = 64

COLUMNS = (
    "path",
    "kind",
    "shape",
    "format",
    "granularity",
    "method",
    "bits",
    "kB before",
    "kB after",
    "SQNR dB",
    "worst block",
    "clipped",
    "note",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
      path: components joined by "/".
      kind: kind of the layer, or of the variable where it belongs to none.
      shape: of the parameter.
      format: of its codes, "+" the activations' where those are quantized; None where it stays in floats.
      granularity: with its block sizes, the axes that a product contracts and those that lead (stacks), or None.
      method: what made the codes ("rtn": rounding to nearest), or None.
      bits_per_element: scales of every level included.
      bytes_before: of the float parameter.
      bytes_after: of what replaced it.
      sqnr: dB, or None.
      worst_block: largest relative error of 64 neighbours along the last axis, or None.
      clipped: share of numbers that lie beyond what the format reaches at their scale, or None.
      note: why it was skipped, or what else happened.
      loss: error of the layer's output on held-out inputs, over that of rounding to nearest; None without calibration.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    format: str | None
    granularity: str | None
    bits_per_element: float
    bytes_before: int
    bytes_after: int
    sqnr: float | None
    worst_block: float | None
    note: str = ""
    clipped: float | None = None
    method: str | None = None
    loss: float | None = None

    def cells(self) -> list[str]:
        """The row as text, in the order of `COLUMNS`."""
        return [
            self.path,
            self.kind,
            "x".join(map(str, self.shape)),
            self.format or "-",
            self.granularity or "-",
            (self.method or "-") + ("" if self.loss is None else f" ({self.loss:.2f})"),
            f"{self.bits_per_element:.2f}",
            f"{self.bytes_before / 1e3:.1f}",
            f"{self.bytes_after / 1e3:.1f}",
            "-" if self.sqnr is None else f"{self.sqnr:.1f}",
            "-" if self.worst_block is None else f"{self.worst_block:.3f}",
            "-" if self.clipped is None else f"{self.clipped:.2%}",
            self.note,
        ]


@dataclasses.dataclass(frozen=True)
class Report:
    """What `quantize_model` did; print it, or take `rows`. `rich.print` and notebooks show a table.

    Attributes:
      rows: one for each parameter of the model.
      notes: what concerns no one parameter, such as rules that matched nothing where `strict=False` let them.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[Row, ...]:
        """The rows of parameters that were quantized."""
        return tuple(row for row in self.rows if row.format is not None)

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Mean over the quantized parameters, scales included; NaN if there are none."""
        rows = [
            row for row in self.quantized if 0 not in row.shape
        ]  # scales of nothing are none of its bits
        size = sum(math.prod(row.shape) for row in rows)
        return 8 * sum(row.bytes_after for row in rows) / size if rows else math.nan

    @property
    def worst(self) -> Row | None:
        """The quantized parameter with the lowest SQNR."""
        rows = [row for row in self.quantized if row.sqnr is not None]
        return min(rows, key=lambda row: row.sqnr or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: rows and totals."""
        bits = self.bits_per_weight
        totals = {
            "parameters": len(self.rows),
            "quantized": len(self.quantized),
            "bits_per_weight": None if np.isnan(bits) else bits,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }
        return {
            "rows": [_plain(dataclasses.asdict(row)) for row in self.rows],
            "totals": totals,
            "notes": [*self.notes],
        }

    def to_markdown(self) -> str:
        """A markdown table with a line of totals below."""
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells()) + " |"
            for row in self.rows
        ]
        return "\n".join([*lines, "", self._totals()])

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def __rich__(self) -> Any:
        from rich import box, table  # which Flax brings along

        shown = table.Table(
            box=box.SIMPLE,
            caption=self._totals(),
            caption_justify="left",
            padding=(0, 1, 0, 0),
        )
        cells = [row.cells() for row in self.rows]
        kept = [
            i
            for i, name in enumerate(COLUMNS)
            if name == "path" or any(row[i] not in ("", "-") for row in cells)
        ]
        for i in kept:
            numbers = COLUMNS[i] in (
                "bits",
                "kB before",
                "kB after",
                "SQNR dB",
                "worst block",
                "clipped",
            )
            shown.add_column(
                COLUMNS[i], justify="right" if numbers else "left", overflow="fold"
            )
        for row, texts in zip(self.rows, cells, strict=True):
            shown.add_row(
                *(texts[i].replace("[", "\\[") for i in kept),
                style=None if row.format else "dim",
            )
        return shown

    def __str__(self) -> str:
        cells = [list(COLUMNS), *(row.cells() for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(
                cell.ljust(w) for cell, w in zip(row, widths, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([*lines, self._totals()])

    def _totals(self) -> str:
        count = len(self.quantized)
        total = (
            f"{count} of {len(self.rows)} parameters quantized, {self.bits_per_weight:.3f} bits per weight; "
            f"{self.bytes_before / 1e6:.2f} MB before, {self.bytes_after / 1e6:.2f} MB after"
        )
        return "\n".join([total, *self.notes])


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON has: infinities and NaN as text."""
    return {
        k: str(v) if isinstance(v, float) and not np.isfinite(v) else v
        for k, v in row.items()
    }


def skip_reason(rule: Rule | None) -> str:
    """Why a layer with this rule stays in floats."""
    return (
        (rule.reason or "skipped by the recipe")
        if rule
        else "no rule of the recipe matches"
    )


def float_row(path: str, kind: str, value: Any, note: str) -> Row:
    """The row of what stays as it is."""
    leaves = [leaf for leaf in jax.tree.leaves(value) if hasattr(leaf, "dtype")]
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    size = (
        value.size if isinstance(value, QTensor) else sum(leaf.size for leaf in leaves)
    )
    bits = 8 * nbytes / size if size else 0.0
    shape = tuple(getattr(value, "shape", ()))
    return Row(path, kind, shape, None, None, bits, nbytes, nbytes, None, None, note)


def other_row(path: str, variable: Any, layers: set[str]) -> Row:
    """The row of what is no weight of a known layer.

    Args:
      path: of the variable.
      variable: an nnx Variable.
      layers: paths of the known layers.
    """
    value = variable.get_value()
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(value) if hasattr(leaf, "dtype")]
    if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        note = "no floats, left as it is"
    elif not hasattr(value, "dtype"):
        note = "not one array, left as it is"
    elif value.ndim < 2:
        note = "not a matrix, left in floats"
    elif path.rpartition("/")[0] in layers:
        note = "not the weight of its layer, left in floats"
    else:
        note = "in no layer jaxq knows, left as it is"
    return float_row(path, type(variable).__name__, value, note)


def planned_row(
    path: str, kind: str, floats: Any, qt: QTensor, method: str = "rtn", notes: Sequence[str] = (),
    roles: Roles | None = None,
) -> Row:  # fmt: skip
    """The row of a weight as it is stored, without what must be measured.

    Args:
      path: of the weight.
      kind: of its layer.
      floats: the weight, or a `jax.ShapeDtypeStruct` of it.
      qt: what replaces it; leaves may be `jax.ShapeDtypeStruct`s.
      method: that makes the codes.
      notes: what else there is to say.
      roles: of its axes in its layer; None where it is in none.
    """
    spec, geometry = qt.spec, qt.meta.geometry
    name = spec.fmt.name
    if qt.meta.activation is not None:
        name += f" + {qt.meta.activation.fmt.name}" + (
            "" if qt.input_range is None else " static"
        )
    sizes = ",".join(str(b) for b in geometry.block_shape if b not in (None, 1))
    along = ",".join(map(str, geometry.contracted))
    batch = ",".join(map(str, range(len(qt.batch_shape))))
    each = f", of each {batch}" if batch else ""
    granularity = f"{type(spec.granularity).__name__}({sizes}{' ' if sizes else ''}along {along}{each})"
    before = floats.size * floats.dtype.itemsize
    bits = qt.bits_per_element
    note = "; ".join(n for n in (*notes, why_floats(kind, qt, roles)) if n)
    return Row(
        path,
        kind,
        qt.shape,
        name,
        granularity,
        bits,
        before,
        qt.nbytes,
        None,
        None,
        note,
        method=method,
    )


def why_floats(kind: str, qt: QTensor, roles: Roles | None = None) -> str:
    """Why products are of floats though inputs are quantized, or a whole weight is dequantized; empty where neither is.

    Raises what quantizing an input would raise, but for sizes that only the input has.

    Args:
      kind: of the layer.
      qt: its weight; leaves may be `jax.ShapeDtypeStruct`s.
      roles: of the weight's axes in its layer.
    """
    spec, geometry = qt.meta.activation, qt.meta.geometry
    shaped = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), qt)
    if kind in ("Conv", "ConvTranspose"):
        if spec is None:
            return ""
        one = _without_leading(shaped, len(qt.batch_shape))
        along = tuple(
            range(1, 1 + len(geometry.contracted))
        )  # places and channels of an example
        example = jax.ShapeDtypeStruct(
            (1, *(1 for _ in along[1:]), _EXAMPLE), jnp.float32
        )
        qx = jax.eval_shape(
            lambda v: quantize(v, spec, contracting=along, name="activation"), example
        )
        reason = ops.why_not_codes(
            qx, one.with_activation(None), 0, geometry.kept[0] + len(geometry.shape)
        )
        return "" if reason is None else f"products of floats: {reason}"
    plan = _plan_of_product(shaped, roles)
    if spec is not None:
        return "" if plan.path == "codes" else f"products of floats: {plan.reason}"
    # An Embed only looks up rows; where it attends too, its blocks run along what is contracted.
    return (
        ""
        if plan.path != "dequantize" or kind == "Embed"
        else f"dequantized at each call: {plan.reason}"
    )


def _plan_of_product(qt: QTensor, roles: Roles | None) -> ops.Plan:
    """How one row of inputs meets a weight of `jax.ShapeDtypeStruct`s."""
    if roles is not None and roles.subscripts:
        one = _without_leading(qt, qt.ndim - len(roles.shape))
        left, right = roles.subscripts.replace("...", "").split("->")[0].split(",")
        size = dict(zip(right, one.shape, strict=True))
        x: Any = jax.ShapeDtypeStruct(
            tuple(size.get(index, 1) for index in left), jnp.float32
        )
        dims, _ = ops.einsum_numbers(roles.subscripts, x.ndim, one.ndim)
        return ops.explain(x, one, dims, platform="cpu")
    batch, along = (
        tuple(range(len(qt.batch_shape))),
        tuple(a + qt.ndim for a in qt.meta.geometry.contracted),
    )
    x = jax.ShapeDtypeStruct(
        (*qt.batch_shape, 1, *(qt.shape[a] for a in along)), jnp.float32
    )
    dims = (tuple(range(len(batch) + 1, x.ndim)), along), (batch, batch)
    return ops.explain(x, qt, dims, platform="cpu")


def _without_leading(qt: QTensor, num_axes: int) -> QTensor:
    """One element of a stack of `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[num_axes:], leaf.dtype), qt
    )


def quantized_row(
    path: str, kind: str, floats: jax.Array, qt: QTensor, solved: Solved | None, notes: Sequence[str] = (),
    roles: Roles | None = None,
) -> Row:  # fmt: skip
    """The row of a quantized weight, with its errors; arguments as in `planned_row`."""
    sqnr, worst, clipped = (float(value) for value in _errors(floats, qt))
    method, said, loss = (
        ("rtn", "", None)
        if solved is None
        else (solved.method, solved.note, solved.loss)
    )
    row = planned_row(path, kind, floats, qt, method, (said, *notes), roles)
    return dataclasses.replace(
        row, sqnr=sqnr, worst_block=worst, clipped=clipped, loss=loss
    )


def dropped_metadata(variable: Any) -> str:
    """What is said of an nnx Variable that names mesh axes for the axes of its array, which codes do not have."""
    names = variable.get_metadata().get("out_sharding") or ()
    return (
        "its sharding metadata is not kept"
        if any(name is not None for name in names)
        else ""
    )


def _errors(floats: jax.Array, qt: QTensor) -> tuple[jax.Array, jax.Array, jax.Array]:
    """SQNR in dB, the worst block, blocks running along the contraction, and the share that was clipped.

    One by one and in parts, so that little more than one dequantized weight is in memory.
    """
    clipped = _clipped(floats, qt)
    back = dequantize(qt.with_activation(None), dtype=jnp.float32)
    return (*_distances(floats, back, qt.meta.geometry), clipped)


@jax.jit
def _clipped(floats: jax.Array, qt: QTensor) -> jax.Array:
    if (
        qt.codebook is not None or not floats.size
    ):  # numbers of its own reach as far as they were made to
        return jnp.float32(0)
    return jnp.mean(~inside_range(floats, qt), dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames="geometry")
def _distances(
    floats: jax.Array, back: jax.Array, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    a, b = geometry.to_view(floats), geometry.to_view(back)
    along = geometry.k_position - len(geometry.storage_shape)
    whole = _WORST if along + a.ndim == 0 else 1
    parts = next(n for n in (16, 8, 4, 2, 1) if a.shape[0] % (n * whole) == 0 or n == 1)

    def measured(pair: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
        a, b = (v.astype(jnp.float32) for v in pair)
        return (
            metrics.squares(a),
            metrics.squares(a - b),
            metrics.worst_block(a, b, size=_WORST, axis=along),
        )

    cut = tuple(
        v.reshape(parts, -1, *v.shape[1:]) if v.size else v[None] for v in (a, b)
    )
    *sums, worst = jax.lax.map(measured, cut)
    totals = []
    for part, units in sums:
        unit = jnp.max(units)
        totals.append((jnp.sum(part * (units / unit) ** 2), unit))
    lost = jnp.isnan(worst).any()  # a maximum may drop NaN
    return metrics.decibels(*totals), jnp.where(
        lost, np.float32(np.nan), jnp.max(worst)
    )
