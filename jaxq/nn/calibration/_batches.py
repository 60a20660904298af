"""Calibration batches: checks, a form that jit accepts, and the loop over batches."""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.progress import with_progress

# An iterator that gives more batches than this may be endless.
_MANY_BATCHES = 1_000


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["others", "structure"],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch as an argument of a jitted function.

    Arrays are traced. Everything else (`train=False`, `method="encode"`) stays a static
    value.

    Attributes:
      arrays: the arrays, by their position among the leaves.
      others: all leaves in order, with None in place of each array.
      structure: the tree structure of the batch.
    """

    arrays: dict[int, jax.Array]
    others: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, batch: Any) -> Batch:
        """Splits a batch into its arrays and the rest."""
        leaves, structure = jax.tree.flatten(batch)
        arrays = {
            position: _as_array(leaf)
            for position, leaf in enumerate(leaves)
            if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        }
        others = tuple(
            None if position in arrays else leaf for position, leaf in enumerate(leaves)
        )
        return cls(arrays, others, structure)

    def whole(self) -> Any:
        """The batch as the user passed it."""
        leaves = [
            self.arrays.get(position, leaf) for position, leaf in enumerate(self.others)
        ]
        return jax.tree.unflatten(self.structure, leaves)


def as_batches(batches: Iterable[Any], caller: str) -> Iterable[Any]:
    """Returns `batches`, after a check that it is neither a single batch nor endless.

    An array or a dict is a single batch, although Python can iterate over it.

    Raises:
      TypeError: `batches` is an array, a dict or a string.
      ValueError: `batches` says that it has no end, as `grain.MapDataset.repeat()`.
    """
    if isinstance(batches, jax.Array | np.ndarray | str | dict):
        raise TypeError(
            f"{caller}: batches must be an iterable of batches, got a single "
            f"{type(batches).__name__}. Pass a list: [x]."
        )
    if operator.length_hint(batches) >= sys.maxsize:
        raise ValueError(
            f"{caller}: batches is a {type(batches).__name__} that repeats without "
            "end. Pass the first batches: itertools.islice(batches, 64)."
        )
    return batches


def copied_batches(batches: Iterable[Any], caller: str) -> list[Any]:
    """All batches in a list, for steps that read them several times.

    Warns once if an iterator of unknown length gives very many batches: an endless one
    would fill the memory.

    Raises:
      TypeError: as `as_batches`.
      ValueError: as `as_batches`.
    """
    has_length = operator.length_hint(batches, -1) >= 0
    copies = []
    for batch in as_batches(batches, caller):
        copies.append(batch)
        if len(copies) == _MANY_BATCHES and not has_length:
            warnings.warn(
                f"{caller}: the calibration data have {_MANY_BATCHES} batches and more "
                "to come. All of them are kept in memory. If the iterator is endless, "
                "pass the first batches: itertools.islice(batches, 64).",
                stacklevel=2,
            )
    return copies


def _as_array(leaf: Any) -> jax.Array:
    """An array of numpy, jax, torch or another library as a jax array."""
    try:
        return jnp.asarray(leaf)
    except (TypeError, RuntimeError) as error:
        if isinstance(leaf, jax.Array | np.ndarray):
            raise
        kind = type(leaf)
        raise TypeError(
            f"a calibration batch holds a {kind.__module__}.{kind.__name__} of dtype "
            f"{leaf.dtype}, which jax cannot read: {error}. Convert it to a numpy "
            "array."
        ) from error


def run_batches(
    step: Callable[[Batch, jax.Array | None], None],
    batches: Iterable[Any],
    *,
    caller: str,
    mask: Callable[[Any], Any] | None,
    progress: bool | None,
) -> None:
    """Runs `step(batch, counts)` for each batch.

    Args:
      step: `counts` says which rows of the batch count. None means all rows.
      batches: as the user passed them.
      caller: the name of the public function. Errors begin with this name.
      mask: `mask(batch)` returns `counts`.
      progress: show a progress line. None shows the line if stderr is a terminal.

    Raises:
      TypeError: `batches` is a single batch.
      ValueError: there is no batch.
    """
    num_batches = 0
    for batch in with_progress(as_batches(batches, caller), "calibrating", progress):
        counts = None if mask is None else jnp.asarray(mask(batch))
        step(Batch.of(batch), counts)
        num_batches += 1
    if num_batches == 0:
        raise ValueError(
            f"{caller}: there is no batch. At least one is needed. An iterator that "
            "was read before is empty. Pass a list."
        )
