"""The command line: `jaxq COMMAND`, or `python -m jaxq COMMAND`.

Each command is in a file of its own, and is imported when it is called. A command only
reads arguments, calls functions of other rooms and prints their results.
"""

from jaxq.cli._main import main

__all__ = ["main"]
