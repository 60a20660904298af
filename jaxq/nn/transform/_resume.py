"""Files of finished blocks, so that a sequential run can continue after it stopped.

Each finished block has a file with its codes, its biases and its rows of the report.
The file does not have the statistics of the block: statistics are larger than codes,
and no later block reads them. If the same call is made again, it reads these files and
begins with the first block that has no file. Every file holds a digest of the run. The
digest depends on the recipe, the data, the model, the key and the options.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import files, serialization
from jaxq.nn.report import Row
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._slot import Slot
from jaxq.processes import has_remote_parts
from jaxq.qtensor import QTensor
from jaxq.recipes import Recipe

_FIELDS = {"mark", "names", "weights", "biases", "rows"}


class Result(NamedTuple):
    """The result of the loop for one slot.

    Attributes:
      weight: the quantized weight.
      bias: the corrected bias, or None if the bias does not change.
      row: the row of the weight in the report.
    """

    weight: QTensor
    bias: jax.Array | None
    row: Row


class Resume:
    """The finished blocks of a run, in the folder `options.resume`.

    Args:
      recipe: the recipe of the run.
      slots: the slots of the model. `Slot.rule` is a rule of the recipe, or None.
      state: a tree of the model's arrays.
      options: the options of the run. If `resume` is None, no file is read or written.

    Raises:
      FileExistsError: `options.resume` is a file.
      NotImplementedError: other processes hold parts of the model.
    """

    def __init__(
        self, recipe: Recipe, slots: Sequence[Slot], state: Any, options: Options
    ):
        self._caller = options.caller
        self._folder = None if options.resume is None else Path(options.resume)
        self._digest = ""
        if self._folder is not None:
            if self._folder.is_file():
                raise FileExistsError(
                    f"{self._caller}: resume={str(self._folder)!r} is a file. Pass the "
                    "path of a folder. It may be a new one."
                )
            if any(map(has_remote_parts, jax.tree.leaves(state))):
                raise NotImplementedError(
                    f"{self._caller}: resume= is for one process, and other processes "
                    "hold parts of this model. Leave out resume=. To keep statistics "
                    "between runs, save what jaxq.nn.calibrate returns."
                )
            problem = "the folder of resume= cannot be made"
            with files.naming_errors(self._folder, self._caller, problem):
                self._folder.mkdir(parents=True, exist_ok=True)
            self._digest = _digest_of_run(recipe, slots, state, options)

    def read(self, block: int, names: Sequence[str]) -> dict[str, Result]:
        """The results of a block, by the names of its weights.

        Empty if the block is not finished, or if there is no folder.

        Raises:
          ValueError: the file of the block was written by another run.
        """
        path = self._path(block)
        if path is None or not path.exists():
            return {}
        contents = serialization.read_tree(path)
        if not isinstance(contents, dict) or set(contents) != _FIELDS:
            raise ValueError(
                f"{self._caller}: {path} is not a file of a finished block. Remove it."
            )
        is_same_run = contents["mark"] == self._digest
        if not is_same_run or set(contents["names"]) - set(names):
            raise ValueError(
                f"{self._caller}: resume={str(self._folder)!r}: {path.name} belongs to "
                "another run with another model, data, recipe, key, fallback, "
                "sequential or order of layers. "
                "Pass another folder, or remove this one."
            )
        results = {}
        for name, weight, bias, fields in zip(
            contents["names"],
            contents["weights"],
            contents["biases"],
            contents["rows"],
            strict=True,
        ):
            row = Row(**{name: _as_field(value) for name, value in fields.items()})
            results[name] = Result(weight, bias, row)
        return results

    def write(self, block: int, results: Mapping[str, Result]) -> None:
        """Writes the results of a block, by the names of its weights."""
        path = self._path(block)
        if path is None:
            return
        contents = {
            "mark": self._digest,
            "names": list(results),
            "weights": [result.weight for result in results.values()],
            "biases": [result.bias for result in results.values()],
            "rows": [dataclasses.asdict(result.row) for result in results.values()],
        }
        serialization.write_tree(path, contents)

    def _path(self, block: int) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"block-{block:04d}.safetensors"


def _as_field(value: Any) -> Any:
    """The value of a row's field. Files hold lists in place of tuples."""
    return tuple(value) if isinstance(value, list) else value


def _digest_of_run(
    recipe: Recipe, slots: Sequence[Slot], state: Any, options: Options
) -> str:
    """A digest of everything that the results of a run depend on, except functions.

    `mask` and `forward` are left out. The rule of every slot is in the digest, because
    it shows which layers a function `Rule.where` selects.
    """
    # The repr of a function has its address, which differs between processes.
    rules = [dataclasses.replace(rule, where=None) for rule in recipe.rules]
    positions = {id(rule): i for i, rule in enumerate(recipe.rules)}
    matches = [(slot.path, slot.name, positions.get(id(slot.rule))) for slot in slots]
    choices = (rules, matches, recipe.rotate, options.fallback, options.sequential)
    digest = hashlib.blake2b(repr(choices).encode(), digest_size=16)
    inputs = (options.batches or [], state, options.key)
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        array = _as_numpy(leaf)
        description = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        digest.update(description.encode())
        if array.size:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _as_numpy(leaf: Any) -> np.ndarray:
    """A leaf as an array: a PRNG key as its data, another object as its name."""
    is_array = isinstance(leaf, jax.Array)
    if is_array and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    if array.dtype == object:
        name = getattr(leaf, "__qualname__", type(leaf).__qualname__)
        return np.asarray(name)
    return array
