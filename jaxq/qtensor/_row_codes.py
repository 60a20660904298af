"""The arithmetic of `quantize` for rows with one scale each, as kernels need it.

A kernel finds the largest magnitude of a row itself. These functions compute the scale
and the codes from it, with the operations of `quantize`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.qtensor import _scales
from jaxq.qtensor._extremes import Extremes
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._quantize import encode
from jaxq.qtensor._quotient import divide, one_over
from jaxq.qtensor._spec import QuantSpec


def row_scale(magnitude: jax.Array, spec: QuantSpec, geometry: Geometry) -> jax.Array:
    """The stored scale of a row, from its largest magnitude.

    Args:
      magnitude: float32 of any shape; not finite if the row is not finite.
      spec: a symmetric spec whose scale rule reads only the magnitude, and whose scale
        is stored in float32, bfloat16 or float16.
      geometry: the geometry of the array.

    Returns:
      The scale in the dtype `spec.scale`. It is NaN if the row is not finite.
    """
    assert isinstance(spec.scale, str)
    extremes = Extremes(-magnitude, magnitude, magnitude)
    ideal = _scales.ideal_scale(magnitude, extremes, spec, geometry)
    stored = _scales.store_in_dtype(ideal, spec.scale)
    # The maximum of a GPU kernel drops NaN. So `store_in_dtype` may have lost it.
    return jnp.where(extremes.finite, stored, jnp.asarray(np.nan, stored.dtype))


def row_quotients(
    x: jax.Array,
    scale: jax.Array,
    reciprocal: Callable[[jax.Array], jax.Array] = one_over,
) -> jax.Array:
    """The numbers of rows divided by their stored scale; float32.

    Args:
      x: float `[r, k]`.
      scale: `[r, 1]`, as `row_scale` returns it, or broadcastable to `x`.
      reciprocal: as in `divide`.
    """
    return divide(x, _scales.load_from_dtype(scale), reciprocal)


def row_codes(quotients: jax.Array, spec: QuantSpec) -> jax.Array:
    """The codes of numbers that `row_quotients` divided, in the format's code dtype."""
    return encode(quotients, None, spec, None)
