"""Statistics of the inputs of layers, for `quantize_checkpoint`.

They are the result of `jaxq.nn.calibrate`, in memory or in a file. The layers of a file
are read one at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxq.observers import LayerStats, as_stats, empty_stats
from jaxq.serialization import open_dict

# The name of the statistics in a file of `jaxq statistics`.
_LAYERS = "layers"
# Files may list the three projections of expert 0, then those of expert 1, and so on.
# So the statistics of three layers are used in turns.
_MOST_KEPT = 3


class Place(NamedTuple):
    """Where the statistics of a weight are.

    Attributes:
      layer: the path of the layer.
      expert: the number of the expert, if the statistics of all experts of the layer
        are stacked; None otherwise.
    """

    layer: str
    expert: int | None = None


class Statistics:
    """The statistics of the layers of a model. A few of a file are in memory.

    Args:
      source: a file of `jaxq statistics`, a file of `jaxq.save`, or a mapping from
        paths of layers to statistics.
      stack: closes the file at its end.
      caller: the name that error messages begin with.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file holds something else.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        stack: contextlib.ExitStack,
        caller: str,
    ):
        self._layers: Mapping[str, Any]
        self._file: Path | None = None
        if isinstance(source, Mapping):
            self._layers = source
        else:
            self._file = Path(source)
            contents = stack.enter_context(open_dict(source, caller))
            self._layers = contents.inner(_LAYERS) or contents
        self._kept: dict[str, LayerStats] = {}

    def __contains__(self, path: str) -> bool:
        return path in self._layers

    def of(self, place: Place, slice: int | None = None) -> LayerStats:
        """The statistics of a weight, or of one matrix of a stack.

        Args:
          place: of the statistics.
          slice: the number of the matrix; None for a whole weight.

        Raises:
          ValueError: the entry has no statistics, or the file is damaged.
        """
        if place.layer not in self._kept:
            while len(self._kept) >= _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[place.layer] = self._read(place.layer)
        stats = self._kept[place.layer]
        number = place.expert if slice is None else slice
        if number is None:
            return stats
        return jax.tree.map(lambda array: array[number], stats)

    def fingerprint(self) -> Any:
        """A value for JSON that other statistics do not have.

        It is the size and the time of the file, or a digest of the numbers in memory.
        """
        if self._file is not None:
            status = os.stat(self._file)
            return [status.st_size, status.st_mtime_ns]
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(self._layers):
            digest.update(path.encode())
            for leaf in jax.tree.leaves(self._layers[path]):
                digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()

    def _read(self, path: str) -> LayerStats:
        value = self._layers[path]
        if isinstance(value, Mapping):
            # Weight methods do not use these fields. An observer's state can have any
            # structure, so it cannot be checked here.
            value = {**value, "observed": None, "patches": None}
        return as_stats(value, empty_stats(1))
