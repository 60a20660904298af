"""Changes of a model's state in a call, such as those of a random stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flax import errors


@contextlib.contextmanager
def explained_state_change(caller: str, layer: str, state: str) -> Iterator[None]:
    """Explains Flax's error about a Variable that cannot change inside a transform.

    Args:
      caller: the name of the public function. The error begins with this name.
      layer: what is called, for example "a layer with dropout".
      state: what cannot change, for example "random stream".

    Raises:
      ValueError: the block changes a Variable inside a transform of jax.
    """
    try:
        yield
    except errors.TraceContextError as error:
        raise ValueError(
            f"{caller}: {layer} is called in train mode inside jax.jit, jax.grad, "
            f"jax.checkpoint, jax.vmap or a jax.lax loop. A model cannot change its "
            f"{state} inside these transforms. Use nnx.jit, nnx.grad, nnx.remat or "
            "nnx.scan. To evaluate, call model.eval()."
        ) from error
