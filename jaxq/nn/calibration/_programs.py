"""Compiled programs that later calls with an equal model use again.

`jax.jit` keeps compiled programs by the identity of the function. A function that each
call of `calibrate` defines anew would be compiled anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# The most functions whose programs stay in memory.
_MOST_FUNCTIONS = 16


def cached_program(make: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `make`, which gives the same result for equal arguments.

    Args:
      make: returns a jitted function. Without hashable arguments (a module that holds a
        dict), every call makes a new function.
    """
    cached = functools.lru_cache(maxsize=_MOST_FUNCTIONS)(make)

    @functools.wraps(make)
    def program(*args: Any) -> Any:
        try:
            hash(args)
        except TypeError:
            return make(*args)
        return cached(*args)

    return program


@jax.tree_util.register_static
class Reached(NamedTuple):
    """What the trace of a batch has shown, as a static result of a jitted function.

    Attributes:
      paths: the layers that the batch reaches, in the order of their first calls.
      train_mode: what layers do in train mode, in the order of their calls.
    """

    paths: tuple[str, ...]
    train_mode: tuple[str, ...] = ()
