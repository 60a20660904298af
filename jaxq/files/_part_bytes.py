"""Where the bytes of a part of a tensor lie in the bytes of the whole tensor.

A tensor is stored row by row. Seen from the last axis that the part does not cover, the
tensor is a table of rows, and the part has the same columns of some rows:

    [rows, row_bytes]  ->  part[i] = tensor[rows[i], start:stop]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class PartBytes:
    """The bytes of a part of a tensor.

    Args:
      shape: of the tensor.
      index: of the part, a slice with step 1 for each axis.
      item_bytes: the number of bytes of an entry.

    Attributes:
      shape: of the part.
      num_bytes: of the part.
    """

    def __init__(self, shape: Sequence[int], index: Sequence[slice], item_bytes: int):
        bounds = [
            axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)
        ]
        self.shape = tuple(stop - start for start, stop in bounds)
        self.num_bytes = item_bytes * math.prod(self.shape)
        whole = [bound == (0, size) for bound, size in zip(bounds, shape, strict=True)]
        # The last axis that the part does not cover. All axes after it are contiguous.
        cut = max((i for i, covers in enumerate(whole) if not covers), default=-1)
        entry_bytes = item_bytes * math.prod(shape[cut + 1 :])
        start, stop = bounds[cut] if cut >= 0 else (0, 1)
        self._start, self._width = start * entry_bytes, (stop - start) * entry_bytes
        self._row_bytes = entry_bytes * (shape[cut] if cut >= 0 else 1)
        rows = np.zeros(1, np.int64)
        for (low, high), size in zip(
            bounds[: max(cut, 0)], shape[: max(cut, 0)], strict=True
        ):
            rows = (rows[:, None] * size + np.arange(low, high)).reshape(-1)
        self._rows = rows

    def chunks(self, chunk_bytes: int) -> list[int]:
        """The numbers of the chunks of the tensor that hold bytes of the part."""
        if self.num_bytes == 0:
            return []
        starts = self._rows * self._row_bytes + self._start
        first = starts // chunk_bytes
        last = (starts + self._width - 1) // chunk_bytes
        if len(self._rows) == 1 or (last - first).max() > 1:
            ranges = zip(first.tolist(), last.tolist(), strict=True)
            return sorted({n for low, high in ranges for n in range(low, high + 1)})
        return np.union1d(first, last).tolist()

    def copy(self, chunk: np.ndarray, position: int, part: np.ndarray) -> None:
        """Copies the bytes of the part that are in a chunk.

        Args:
          chunk: bytes of the tensor.
          position: of the first of these bytes in the tensor.
          part: all bytes of the part. Those of the chunk are written.
        """
        table = part.reshape(len(self._rows), self._width)
        starts = self._rows * self._row_bytes + self._start - position
        stops = starts + self._width
        low = int(np.searchsorted(stops, 0, side="right"))
        high = int(np.searchsorted(starts, chunk.size, side="left"))
        # The chunk can begin or end inside a row.
        for row in {low, high - 1}:
            begin, end = max(0, starts[row]), min(chunk.size, stops[row])
            columns = slice(begin - starts[row], end - starts[row])
            table[row, columns] = chunk[begin:end]
        if high - low < 3:
            return
        inner = starts[low + 1 : high - 1]
        every_row = np.lib.stride_tricks.as_strided(
            chunk[inner[0] :],
            (int(inner[-1] - inner[0]) // self._row_bytes + 1, self._width),
            (self._row_bytes, 1),
            writeable=False,
        )
        table[low + 1 : high - 1] = every_row[(inner - inner[0]) // self._row_bytes]
