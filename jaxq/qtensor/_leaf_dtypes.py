"""The dtypes of the leaves of a QTensor, and a check that the leaves have them.

`jax.tree.map` computes with leaves. A mean of codes is not a code, and codes that were
cast to floats are not stored as codes. Both change the dtype of a leaf. An error is
raised where such a QTensor is used.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.qtensor._meta import Meta


def leaf_dtypes(meta: Meta) -> dict[str, np.dtype]:
    """The dtype of every leaf by name. A scale that is a QTensor is left out.

    Args:
      meta: the static facts of the QTensor.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.ones((64, 8)), "int4")
      >>> dtypes = jaxq.qtensor.leaf_dtypes(qt.meta)
      >>> dtypes["data"].name, dtypes["scale"].name
      ('uint8', 'bfloat16')
    """
    spec = meta.spec
    is_packed = meta.packing is not formats.Packing.NONE
    float32 = np.dtype(np.float32)
    dtypes = {
        "data": np.dtype(np.uint8) if is_packed else spec.fmt.code_dtype,
        "zero_point": spec.fmt.code_dtype,
        "offset": float32,
        "codebook": float32,
        "input_range": float32,
        "input_scale": float32,
    }
    if isinstance(spec.scale, str):
        dtypes["scale"] = jnp.dtype(spec.scale)
        if spec.offset == "min" and dtypes["scale"].itemsize > 1:
            dtypes["offset"] = dtypes["scale"]
    return dtypes


def check_leaves(qt: Any, caller: str, name: str = "") -> None:
    """Raises TypeError if a leaf of a QTensor has another dtype than its meta says.

    Leaves that are not arrays are ignored: jax transforms build such QTensors.

    Args:
      qt: a QTensor, traced or not.
      caller: the public function, for error messages.
      name: the name of the QTensor in error messages; "" takes the name in its meta.
    """
    label = name or qt.meta.name or f"{qt.spec.fmt.name} QTensor"
    _check_level(qt, f"{caller}: the leaf ", label)


def _check_level(qt: Any, start: str, label: str) -> None:
    for name, expected in leaf_dtypes(qt.meta).items():
        leaf = getattr(qt, name)
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or dtype == expected:
            continue
        shape = list(getattr(leaf, "shape", ()))
        raise TypeError(
            f"{start}{name} of {label} is {dtype}{shape}, expected {expected}. Leaves "
            "must not be cast or computed with, because codes are not numbers. Compute "
            "with jaxq.dequantize(qt), and quantize the result with jaxq.quantize."
        )
    if hasattr(qt.scale, "meta"):
        _check_level(qt.scale, f"{start}scale.", label)
