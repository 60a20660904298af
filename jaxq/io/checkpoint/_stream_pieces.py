"""Reads parameters for `quantize_checkpoint`, one ahead of the one that is used."""

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
      slice: the number of the matrix in the stack; 0 for a whole parameter.
    """

    step: Step
    slice: int = 0

    def read(self, checkpoint: Checkpoint) -> Any:
        """The parameter or the matrix, in floats."""
        if self.step.num_slices:
            return checkpoint.read_slice(self.step.name, self.slice)
        return checkpoint[self.step.name]

    def statistics(self, statistics: Statistics | None) -> LayerStats | None:
        """The statistics of the inputs; None if the method uses none."""
        if statistics is None or self.step.place is None:
            return None
        number = self.slice if self.step.num_slices else None
        return statistics.of(self.step.place, number)

    @property
    def num_bytes(self) -> int:
        """Its share of the bytes of the parameter. The shares add up to all bytes."""
        count = max(1, self.step.num_slices)
        start = self.step.num_bytes * self.slice // count
        stop = self.step.num_bytes * (self.slice + 1) // count
        return stop - start


def read_pieces(
    checkpoint: Checkpoint, steps: list[Step]
) -> Generator[tuple[Piece, Any], None, None]:
    """Yields each piece with its numbers. A thread reads the next one meanwhile."""
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
            # A name here would keep the parameter in memory after the caller's use.
            yield _next(ready, slots)
    finally:
        stopped.set()
        slots.release()
        thread.join()


def _next(ready: queue.Queue[Any], slots: threading.Semaphore) -> tuple[Piece, Any]:
    """The next piece with its numbers. The thread may then read one more.

    Raises:
      BaseException: the error of the thread.
    """
    item = ready.get()
    if isinstance(item, BaseException):
        raise item
    slots.release()
    return item
