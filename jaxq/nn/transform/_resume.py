"""Sequential runs that go on where they were cut short.

Statistics are of one block at a time and cost little beside what makes them, so what is kept are results: a file for
each finished block with its codes, biases and rows of the report. The same call finds them, puts them into the model
and begins with the first block that has none. What a run is of stands in every file, as a digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.nn.report._report import Row
from jaxq.qtensor import QTensor
from jaxq.recipes import Recipe

SEQUENTIAL = ("blocks", "layers")


class Done(NamedTuple):
    """What became of a layer.

    Attributes:
      weight: its codes.
      bias: what its bias was corrected to, or None.
      row: of the report.
    """

    weight: QTensor
    bias: jax.Array | None
    row: Row


def as_order(sequential: bool | str, resume: Any) -> str:
    """ "", "blocks" or "layers".

    Raises:
      ValueError: something else; `resume` without an order.
    """
    if not isinstance(sequential, bool):
        formats.check_choice("quantize_model: sequential", sequential, SEQUENTIAL)
    if resume is not None and not sequential:
        raise ValueError(
            "quantize_model: resume= keeps finished blocks, and without sequential= there is but one. Pass "
            "sequential='blocks' or 'layers', or keep the statistics: calibration=jaxq.nn.calibrate(...)."
        )
    return "blocks" if sequential is True else (sequential or "")


class Resume:
    """The finished blocks of a run, in a folder.

    Args:
      folder: made if it is not there; None keeps nothing.
      recipe: of the run, as all that follows.
      batches: of data.
      arrays: the model's.
      key: PRNG key.
      how: the other choices.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        recipe: Recipe,
        batches: Iterable[Any],
        arrays: Any,
        key: jax.Array | None,
        how: Sequence[Any],
    ):
        self._folder = None if folder is None else Path(folder)
        self._mark = ""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # The name of a function, for its address is another in every process.
            rules = [
                (
                    dataclasses.replace(r, where=None),
                    getattr(r.where, "__qualname__", ""),
                )
                for r in recipe.rules
            ]
            self._mark = _digest(
                repr((rules, recipe.rotate, *how)), (list(batches), arrays, key)
            )

    def read(self, block: int, names: Sequence[str]) -> dict[str, Done]:
        """What became of the layers of a block, by the names of their weights; empty if it is not finished.

        Raises:
          ValueError: the file is of another run.
        """
        path = self._path(block)
        if path is None or not path.exists():
            return {}
        from jaxq import io

        found = io.load(path)
        if found["mark"] != self._mark or set(found["names"]) - set(names):
            raise ValueError(
                f"quantize_model: resume: {path} is of another run: its model, data, recipe, key, fallback, sequential "
                "or order of layers differ. Name another folder, or remove this one."
            )
        rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in found["rows"]]
        made = zip(found["weights"], found["biases"], rows, strict=True)
        return {
            name: Done(*one) for name, one in zip(found["names"], made, strict=True)
        }

    def write(self, block: int, done: dict[str, Done]) -> None:
        """Keeps what became of a block's layers."""
        path = self._path(block)
        if path is None:
            return
        from jaxq import io

        weights, biases, rows = (
            [getattr(one, name) for one in done.values()] for name in Done._fields
        )
        rows = [dataclasses.asdict(row) for row in rows]
        io.save(
            path,
            {
                "mark": self._mark,
                "names": list(done),
                "weights": weights,
                "biases": biases,
                "rows": rows,
            },
        )

    def _path(self, block: int) -> Path | None:
        return (
            None
            if self._folder is None
            else self._folder / f"block-{block:04d}.safetensors"
        )


def _digest(text: str, tree: Any) -> str:
    found = hashlib.blake2b(text.encode(), digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        if array.dtype == object:  # what is no array: a function, for example
            array = np.asarray(getattr(leaf, "__qualname__", type(leaf).__qualname__))
        found.update(
            f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode()
        )
        found.update(
            np.ascontiguousarray(array).view(np.uint8).data if array.size else b""
        )
    return found.hexdigest()
