"""Compiled programs that are used again by later calls with an equal model.

`jax.jit` caches compiled programs by the identity of the function. If each call of
`calibrate` defined a new function, each call would compile it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# The most functions whose programs stay in memory.
_MOST_FUNCTIONS = 16


def cached_program(make: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `make` with a cache: equal arguments give the same jitted function.

    Args:
      make: returns a jitted function. If an argument is not hashable, such as a module
        that holds a dict, every call makes a new function.
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
    """What a trace of the model found, as a static result of a jitted function.

    Attributes:
      paths: the layers that the batch reaches, in the order of their first calls.
      train_mode: what layers do in train mode, in the order of their calls.
    """

    paths: tuple[str, ...]
    train_mode: tuple[str, ...] = ()
