"""Errors of a method that name the layer whose weight the method quantizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def names_layer(layer: str, method: str) -> Iterator[None]:
    """Puts the layer and the method before the message of an error inside the block.

    A method sees a matrix. It does not know to which layer of a model the matrix
    belongs.

    Args:
      layer: the path of the layer, or the paths of layers that read one input.
      method: the name of the method.

    Example:
      >>> from jaxq.methods import names_layer
      >>> with names_layer("mlp/up", "gptq"):
      ...   raise ValueError("damp is out of range")
      Traceback (most recent call last):
      ValueError: mlp/up: method 'gptq': damp is out of range
    """
    try:
        yield
    except Exception as error:
        if layer in str(error):
            raise
        where = f"{layer}: method {method!r}"
        if type(error) in (TypeError, ValueError):
            raise type(error)(f"{where}: {error}") from error
        # Other classes of errors may take other arguments than a message.
        error.add_note(where)
        raise
