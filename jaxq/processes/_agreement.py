"""Agreement: an error of one process becomes an error of all processes.

If one process raised alone, the others would wait for it in their next collective
operation.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# A message has the kind of an error, the fingerprint, and the text of the error.
_MESSAGE_BYTES = 2048
_TEXT_START = 5
_NO_ERROR, _OS_ERROR, _VALUE_ERROR = 0, 1, 2


class Agreement:
    """A block of work that succeeds in all processes, or raises in all of them.

    At the end of the block, each process waits for the others:

        with Agreement(devices, "save: model.safetensors cannot be written") as all_ok:
            ...
            all_ok.check()  # before each collective operation of the block
            ...

    If a process has an error, it raises this error, and the others raise an error with
    its text. Theirs is an OSError if it is an OSError, and a ValueError otherwise. In
    one process nothing changes.

    Args:
      devices: the devices of all processes that have this block.
      problem: the beginning of the errors of the others.

    Attributes:
      fingerprint: the checksum of what must be the same in all processes. The block can
        set it.
    """

    def __init__(self, devices: Iterable[Any], problem: str):
        self._devices = sorted(devices, key=lambda device: device.id)
        self._problem = problem
        self.fingerprint = 0
        processes = {device.process_index for device in self._devices}
        self._is_shared = len(processes) > 1
        self._error_of_others: Exception | None = None

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        is_stopped = error is not None and not isinstance(error, Exception)
        is_known = error is not None and error is self._error_of_others
        if self._is_shared and not is_stopped and not is_known:
            self._exchange(error)

    def check(self) -> None:
        """Waits for the others inside the block. Raises if one of them has an error."""
        if self._is_shared:
            self._exchange(None)

    def _exchange(self, error: BaseException | None) -> None:
        """Tells the others of an error of this process. Raises if they have one."""
        messages = self._gather(_message(error, self.fingerprint))
        if error is None:
            self._error_of_others = self._problem_in(messages)
            if self._error_of_others is not None:
                raise self._error_of_others

    def _problem_in(self, messages: dict[int, np.ndarray]) -> Exception | None:
        for process, message in sorted(messages.items()):
            if message[0] == _NO_ERROR:
                continue
            text = message[_TEXT_START:].tobytes().rstrip(b"\0")
            kind = OSError if message[0] == _OS_ERROR else ValueError
            text = text.decode(errors="ignore")
            return kind(f"{self._problem} in process {process}: {text}")
        fingerprints = {m[1:_TEXT_START].tobytes() for m in messages.values()}
        if len(fingerprints) == 1:
            return None
        return ValueError(
            f"{self._problem}: it is not the same file in all processes. Copy it to "
            "all hosts again."
        )

    def _gather(self, message: np.ndarray) -> dict[int, np.ndarray]:
        """The message of each process, by the number of the process."""
        mesh = Mesh(np.array(self._devices), ("devices",))
        sharding = NamedSharding(mesh, PartitionSpec("devices"))
        messages = jax.make_array_from_callback(
            (mesh.size, _MESSAGE_BYTES), sharding, lambda _: message[None]
        )
        with jax.set_mesh(mesh):  # instead of the mesh of the caller
            everywhere = jax.device_put(messages, NamedSharding(mesh, PartitionSpec()))
        processes = [device.process_index for device in self._devices]
        return dict(zip(processes, np.asarray(everywhere), strict=True))


def _message(error: BaseException | None, fingerprint: int) -> np.ndarray:
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    message[1:_TEXT_START] = np.array([fingerprint], np.uint32).view(np.uint8)
    if error is not None:
        message[0] = _OS_ERROR if isinstance(error, OSError) else _VALUE_ERROR
        text = f"{type(error).__name__}: {error}".encode(errors="replace")
        text = text[: _MESSAGE_BYTES - _TEXT_START]
        stop = _TEXT_START + len(text)
        message[_TEXT_START:stop] = np.frombuffer(text, np.uint8)
    return message
