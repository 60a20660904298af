"""Reads the parameters for `quantize_checkpoint`, each while the last one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import Any, NamedTuple

from jaxq.io.checkpoint._checkpoint import Checkpoint
from jaxq.io.checkpoint._stream_plan import Step
from jaxq.io.checkpoint._stream_statistics import Statistics
from jaxq.observers import LayerStats


class Piece(NamedTuple):
    """What is read at once: a parameter, or one matrix of a stack.

    Attributes:
      step: what happens to the parameter.
      slice: the number of the matrix.
    """

    step: Step
    slice: int = 0

    def read(self, checkpoint: Checkpoint) -> Any:
        """Its numbers, in floats."""
        if self.step.num_slices:
            return checkpoint.read_slice(self.step.name, self.slice)
        return checkpoint[self.step.name]

    def statistics(self, statistics: Statistics | None) -> LayerStats | None:
        """The statistics of its inputs; None if its method uses none."""
        if statistics is None or self.step.place is None:
            return None
        number = self.slice if self.step.num_slices else None
        return statistics.of(self.step.place, number)

    @property
    def num_bytes(self) -> int:
        """Its part of the bytes of the parameter."""
        count = max(1, self.step.num_slices)
        ends = [self.step.num_bytes * n // count for n in (self.slice, self.slice + 1)]
        return ends[1] - ends[0]


def read_pieces(
    checkpoint: Checkpoint, steps: list[Step]
) -> Generator[tuple[Piece, Any], None, None]:
    """Each piece with its numbers. The next one is read while this one is used."""
    ready: queue.Queue[Any] = queue.Queue()
    slots = threading.Semaphore(1)
    stopped = threading.Event()
    pieces = [
        Piece(step, number)
        for step in steps
        for number in range(max(1, step.num_slices))
    ]

    def read() -> None:
        for piece in pieces:
            slots.acquire()
            if stopped.is_set():
                return
            try:
                ready.put((piece, piece.read(checkpoint)))
            except BaseException as error:
                ready.put(error)
                return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        for _ in pieces:
            # Without a name here, so that the caller can free the parameter.
            yield _next(ready, slots)
    finally:
        stopped.set()
        slots.release()
        thread.join()


def _next(ready: queue.Queue[Any], slots: threading.Semaphore) -> tuple[Piece, Any]:
    """The next piece with its numbers. Lets the reader read another one."""
    item = ready.get()
    if isinstance(item, BaseException):
        raise item
    slots.release()
    return item
