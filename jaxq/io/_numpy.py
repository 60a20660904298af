"""`to_numpy` and `from_numpy`: trees and QTensors as dicts of plain numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.qtensor import is_linen_module, is_nnx_module
from jaxq.serialization import tree_from_numpy, tree_to_numpy


def to_numpy(tree: Any) -> dict[str, np.ndarray]:
    """A QTensor or a tree as a flat dict of numpy arrays.

    The arrays are those that `jaxq.save` writes to a file. They have dtypes of numpy:
    bfloat16 and float8 are stored as unsigned integers of the same bits. So `np.savez`,
    pickle, HDF5 and databases can hold them.

    Args:
      tree: a QTensor, or a tree as in `jaxq.save`. For an nnx model pass
        `nnx.state(model)`.

    Returns:
      Arrays by name. A QTensor at the path "a/w" has the arrays "a/w.data" (packed
      codes), "a/w.scale" and so on. A single QTensor or array has the path "value". The
      last entry, "__metadata__", is a text array `[]` with JSON: the structure of the
      tree, and the spec and geometry of each QTensor.

    Raises:
      TypeError: the tree is a module, or holds a value that `jaxq.save` cannot save.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> arrays = jaxq.io.to_numpy(jaxq.quantize(jnp.eye(64), "int8"))
      >>> {name: array.shape for name, array in arrays.items()}
      {'value.data': (64, 64), 'value.scale': (64, 1), '__metadata__': ()}
      >>> jaxq.io.from_numpy(arrays)
      QTensor(int8[64x64], PerChannel(along -2), scale=float32, 8.5 bits, float32)
    """
    if is_nnx_module(tree) or is_linen_module(tree):
        raise TypeError(
            f"jaxq.io.to_numpy: {type(tree).__name__} is a module. Pass "
            "nnx.state(model), or the variables of a linen module."
        )
    return tree_to_numpy(tree, caller="jaxq.io.to_numpy")


def from_numpy(arrays: Mapping[str, Any]) -> Any:
    """The QTensor or tree from which `to_numpy` made a dict.

    Args:
      arrays: all entries of the dict, such as `np.load("arrays.npz")` or
        `safetensors.numpy.load_file`. They are not changed.

    Returns:
      The tree, with the same bits. Arrays are jax arrays. Named tuples and other pytree
      nodes come back as dicts, as in `jaxq.load`.

    Raises:
      TypeError: `arrays` is not a dict.
      ValueError: `to_numpy` did not make the dict, or its arrays do not fit together.
        The error names the array.

    Example:
      >>> import io, jax.numpy as jnp, numpy as np, jaxq
      >>> file = io.BytesIO()
      >>> np.savez(file, **jaxq.io.to_numpy({"w": jaxq.quantize(jnp.eye(64), "nf4")}))
      >>> _ = file.seek(0)
      >>> jaxq.io.from_numpy(np.load(file))["w"]
      QTensor(nf4[64x64], PerGroup(along -2), scale=float32, 4.5 bits, float32)
    """
    return tree_from_numpy(arrays, caller="jaxq.io.from_numpy")
