"""Reading and changing the float parameters of a model by path."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_SEPARATOR = "/"


class Parameters:
    """The float parameters of a model. A key is (path of the module, name).

    Reading gives float32. Writing casts back to the dtype of the parameter. `merged`
    returns the model with the changed parameters.

    Args:
      model: an nnx module. It is not changed.
      caller: the name that error messages begin with.

    Raises:
      ValueError: a parameter is not a float array.
    """

    def __init__(self, model: Any, caller: str):
        self._graphdef, state = nnx.split(model)
        self._flat = dict(nnx.to_flat_state(state))
        self._paths = {}
        for path, variable in self._flat.items():
            value = variable[...]
            is_array = isinstance(value, jax.Array | np.ndarray)
            name = _SEPARATOR.join(map(str, path))
            if not is_array or not jnp.issubdtype(value.dtype, jnp.floating):
                raise ValueError(
                    f"{caller}: {name} is not a float array. Transform the float model "
                    "first, then quantize it."
                )
            module = _SEPARATOR.join(map(str, path[:-1]))
            self._paths[module, path[-1]] = path

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._paths

    def __getitem__(self, key: tuple[str, str]) -> jax.Array:
        """A parameter as float32."""
        return jnp.asarray(self._flat[self._paths[key]][...]).astype(jnp.float32)

    def __setitem__(self, key: tuple[str, str], value: jax.Array) -> None:
        path = self._paths[key]
        self._flat[path] = self._flat[path].replace(
            value.astype(self._flat[path].dtype)
        )

    def merged(self) -> Any:
        """The model with the changed parameters."""
        return nnx.merge(self._graphdef, nnx.from_flat_state(self._flat))
