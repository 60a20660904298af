"""A file that is written beside its target and then takes the target's place.

The temporary file has a random name and is opened with O_EXCL, so a link that somebody
put in its way is never followed. The writer holds a lock on it. If a process is killed,
the system frees its lock, and the next save of the same target removes the leftover.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxq.files._paths import naming_errors, refuse_other_kinds

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None

# A name has at most 255 bytes. The rest is for the random part and the dots.
_MOST_NAME_BYTES = 200
_RANDOM = "[0-9a-f]{16}"
_SUFFIX = ".partial"


class NewFile:
    """A file that takes the place of `path` when the block ends without an error.

    If the block raises, the old file stays as it was. If `path` is a symbolic link, the
    link is replaced, and the file that it points to is unchanged. A new file has the
    permissions of the umask. A file that replaces another one has its permissions.

    Args:
      path: the target.
      caller: the name that error messages begin with.

    Raises:
      OSError: the target is not a regular file, its name is too long, or the disk is
        full. The error names the target.
    """

    def __init__(self, path: Path, caller: str):
        self.path = path
        self._caller = caller
        self._temporary: Path | None = None
        self._file: Any = None

    def __enter__(self) -> NewFile:
        try:
            with self._naming_errors():
                self._open(self._mode_of_target())
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None and self._temporary is not None:
                self.sync()
                self.replace()
                with self._naming_errors():
                    sync_folder(self.path.parent)
        finally:
            self._discard()

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes."""
        with self._naming_errors():
            self._file.write(data)

    def write_start(self, data: bytes) -> None:
        """Overwrites the first bytes. Bytes that are written next are appended."""
        with self._naming_errors():
            self._file.seek(0)
            self._file.write(data)
            self._file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        """Waits until the bytes of the file are on the disk."""
        with self._naming_errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def replace(self) -> None:
        """Puts the file in the place of its target."""
        assert self._temporary is not None
        with self._naming_errors():
            os.replace(self._temporary, self.path)
        self._temporary = None

    def _mode_of_target(self) -> int | None:
        """The permissions of the file that is replaced; None if there is none."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return None
        if stat.S_ISLNK(status.st_mode):
            return None
        refuse_other_kinds(status.st_mode)
        return stat.S_IMODE(status.st_mode) & 0o777

    def _open(self, mode: int | None) -> None:
        """Opens and locks a new temporary file."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        start = _start_of_name(self.path.name)
        while True:
            name = f"{start}{secrets.token_hex(8)}{_SUFFIX}"
            temporary = self.path.with_name(name)
            # The system applies the umask. A process can read its umask only by setting
            # it, and then the files of other threads get wrong permissions.
            handle = os.open(temporary, flags, 0o666 if mode is None else mode)
            self._temporary, self._file = temporary, os.fdopen(handle, "r+b")
            if mode is not None:
                os.chmod(temporary, mode)
            _lock(handle, wait=True)
            # Another save can have removed the file before it had its lock.
            if os.fstat(handle).st_nlink:
                return
            self._file.close()

    def _discard(self) -> None:
        """Removes the temporary file, unless it has its target's place."""
        # Closing frees the lock, so the file is removed first.
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has raised before
                self._file.close()

    def _naming_errors(self) -> contextlib.AbstractContextManager[None]:
        """Errors of the system name the target instead of the temporary file."""
        return naming_errors(self.path, self._caller, "the file cannot be written")


def leftovers(folder: Path, name: str | None = None) -> list[str]:
    """The names of temporary files in a folder, of killed saves and of running ones.

    Args:
      folder: the folder.
      name: the name of a target. None means all targets.
    """
    start = r"\..*\." if name is None else re.escape(_start_of_name(name))
    leftover = re.compile(start + _RANDOM + re.escape(_SUFFIX), re.DOTALL)
    return [entry for entry in os.listdir(folder) if leftover.fullmatch(entry)]


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files of killed saves.

    A temporary file that another process is writing has a lock, and stays.

    Args:
      folder: the folder to clean.
      name: the name of a target. None removes the leftovers of all targets.
    """
    if fcntl is None:
        return
    for entry in leftovers(folder, name):
        # The file can vanish at any moment, or belong to another user.
        with contextlib.suppress(OSError):
            _remove_if_free(folder / entry)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, so that two processes do not change it at once.

    At the end the names of its files are on the disk.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, wait=True)
        yield
        _sync_handle(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    if fcntl is None:
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync_handle(handle)
    finally:
        os.close(handle)


def _sync_handle(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot sync a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _start_of_name(name: str) -> str:
    """The start of the names of temporary files for a target."""
    start = os.fsencode(name)[:_MOST_NAME_BYTES]
    return f".{start.decode(errors='ignore')}."


def _lock(handle: int, *, wait: bool) -> bool:
    """Locks an open file. False if it is not free, or if there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _remove_if_free(path: Path) -> None:
    # Neither a link nor a pipe may be opened: a pipe would wait for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        is_file = stat.S_ISREG(os.fstat(handle).st_mode)
        if is_file and _lock(handle, wait=False):
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)
