"""Calibration batches: checks, a form that jit accepts, and the loop over batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.progress import with_progress


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
            position: jnp.asarray(leaf)
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
    """Returns `batches`, after a check that it is not a single batch.

    An array or a dict is a single batch, although Python can iterate over it.

    Raises:
      TypeError: `batches` is an array, a dict or a string.
    """
    if isinstance(batches, jax.Array | np.ndarray | str | dict):
        raise TypeError(
            f"{caller}: batches must be an iterable of batches, got a single "
            f"{type(batches).__name__}. Pass a list: [x]."
        )
    return batches


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
