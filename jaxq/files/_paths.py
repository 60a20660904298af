"""Checks of paths, and errors of the system that name the function and the path."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming_errors(path: Path, caller: str, problem: str) -> Iterator[None]:
    """Errors of the system in this block name the caller and the path.

    An error that names the caller already stays as it is.

    Args:
      path: the path that errors name.
      caller: the name that errors begin with.
      problem: what cannot be done, such as "the file cannot be read".
    """
    start = f"{caller}: "
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if reason.startswith(start):
            raise
        reason = f"{start}{problem}: {reason}"
        raise OSError(error.errno or 0, reason, str(path)) from error
    except ValueError as error:
        # The name has a NUL character, or a character that the system does not have.
        raise ValueError(f"{start}{problem}: {error}: {str(path)!r}.") from error


def is_file(path: Path, caller: str) -> bool:
    """True for a file; False if nothing has this path.

    Raises:
      OSError: a folder, a pipe, a socket or a device has this path, or the system
        refuses to look. The error names the caller and the path.
      ValueError: no file can have this name.
    """
    with naming_errors(path, caller, "the file cannot be read"):
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return False
        refuse_other_kinds(mode)
    return True


def check_folder(path: Path, caller: str) -> None:
    """Raises FileNotFoundError if the folder of `path` does not exist.

    Raises:
      OSError: the system refuses to look. The error names the caller and the path.
      ValueError: no file can have this name.
    """
    with naming_errors(path, caller, "the file cannot be written"):
        try:
            is_folder = stat.S_ISDIR(os.stat(path.parent).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            is_folder = False
    if not is_folder:
        raise FileNotFoundError(
            f"{caller}: the folder {path.parent} does not exist. Create it first."
        )


def refuse_other_kinds(mode: int) -> None:
    """Raises OSError unless the mode is that of a regular file."""
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EEXIST, "it is a pipe, a socket or a device")
