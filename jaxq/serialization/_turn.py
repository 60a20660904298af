"""Which process writes a file, if several processes hold parts of its arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.processes import Agreement, HostCopies, spans_processes


class Turn:
    """Whose turn it is to write a file: one process for all, or each for itself.

    If an array is sharded over several processes, all of them make the same calls, and
    the first of them writes. If one of them has an error, all of them raise. Otherwise
    this process writes on its own, and the others need not make the calls.

    Args:
      tree: what is written.
      path: the file, for errors.
      caller: the name that error messages begin with.

    Attributes:
      is_mine: True in the process that writes.
      agreement: the block in which the file is written.
    """

    def __init__(self, tree: Any, path: Path, caller: str):
        # jax cannot list the leaves of a tree that is nested too deeply. The writer
        # names such a tree in an error, so one process does not list them here.
        leaves = jax.tree.leaves(tree) if jax.process_count() > 1 else []
        spanning = [leaf for leaf in leaves if spans_processes(leaf)]
        self._devices: set[Any] = set()
        if not all(leaf.is_fully_replicated for leaf in spanning):
            self._devices.update(*(leaf.sharding.device_set for leaf in spanning))
        self.agreement = Agreement(self._devices, f"{caller}: {path} cannot be written")
        owner = min(
            (device.process_index for device in self._devices),
            default=jax.process_index(),
        )
        self.is_mine = owner == jax.process_index()
        self._host = HostCopies(self._devices, owner)

    def fetch(self, value: Any) -> np.ndarray | None:
        """The numbers of an array. None in the processes that do not write."""
        if not self._devices:
            return np.asarray(value)
        if spans_processes(value):
            self.agreement.check()
        return self._host.copy(value)
