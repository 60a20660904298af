"""Which process writes a file, if several processes hold parts of its arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxq.processes import first_owner, has_remote_parts, is_true_everywhere


class Turn:
    """Whose turn it is to write a file: one process for all, or each for itself.

    If other processes hold parts of an array of the tree, all of them make the same
    call, and the first of them writes. Every process raises an error if the first one
    cannot write. Otherwise this process writes on its own, and the others need not make
    the call.

    Args:
      tree: what is written.
      path: the file, for errors.
      caller: the name that error messages begin with.
    """

    def __init__(self, tree: Any, path: Path, caller: str):
        self._path, self._caller = path, caller
        # jax cannot list the leaves of a tree that is nested too deeply. The writer
        # names such a tree in an error, so one process does not list them here.
        leaves = jax.tree.leaves(tree) if jax.process_count() > 1 else []
        self._shared: jax.Array | None = next(filter(has_remote_parts, leaves), None)
        self.is_mine = True
        if self._shared is not None:
            self._owner = first_owner(self._shared)
            self.is_mine = self._owner == jax.process_index()

    def call(self, step: Callable[[], object]) -> None:
        """Makes a step in the process that writes. The others wait for its end.

        Raises:
          OSError: the process that writes has an error.
        """
        if self._shared is None:
            step()
            return
        error = None
        if self.is_mine:
            try:
                step()
            except Exception as problem:  # the other processes wait for the outcome
                error = problem
        succeeded = is_true_everywhere(error is None, self._shared)
        if error is not None:
            raise error
        if not succeeded:
            raise OSError(
                f"{self._caller}: process {self._owner}, which writes for all "
                f"processes, could not write {self._path}. Its error says why."
            )
