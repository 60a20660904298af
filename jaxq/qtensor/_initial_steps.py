"""Steps with which a block of zeros starts to train.

The scale of a block of zeros is 0. With this scale, every number is clipped, and no
gradient reaches the block. So trained scales never start at 0: a block of zeros gets
the mean scale of the other blocks. In a weight of zeros, the largest number of the
format becomes `1 / sqrt(k)`, where k is the number of inputs. This is the standard
deviation of a weight as Flax initializes it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._spec import QuantSpec

# A division by a smaller number gives 0.
_SMALLEST_NORMAL = np.float32(2.0**-126)


def is_unusable(scale: jax.Array) -> jax.Array:
    """Where a scale is 0, or so small that a division by it gives 0."""
    return jnp.abs(scale) < _SMALLEST_NORMAL


def usable_scale(
    scale: jax.Array, floats: jax.Array, largest: float, geometry: Geometry
) -> jax.Array:
    """Scales without zeros.

    Args:
      scale: float32 `[*batch, *num_blocks]`.
      floats: the weight, `[*batch, *shape]`.
      largest: the largest number of the format.
      geometry: the geometry of the weight.

    Returns:
      `scale`, where zeros are replaced by the mean magnitude of the other scales of the
      same batch element. If all scales of an element are 0, the new scale times
      `largest` is the mean magnitude of its floats. If these are 0 too, it is
      `1 / sqrt(k)`.
    """
    num_axes = len(geometry.num_blocks)
    axes = tuple(range(-num_axes, 0))
    magnitude = jnp.where(is_unusable(scale), 0, jnp.abs(scale))
    count = jnp.sum(magnitude > 0, axis=axes, keepdims=True).astype(jnp.float32)
    of_blocks = jnp.sum(magnitude / jnp.maximum(count, 1), axis=axes, keepdims=True)
    inner_axes = tuple(range(-len(geometry.shape), 0))
    of_floats = jnp.mean(jnp.abs(floats.astype(jnp.float32)), axis=inner_axes)
    of_floats = of_floats[(..., *(None,) * num_axes)] * np.float32(1 / largest)
    of_inputs = 1 / (math.sqrt(max(geometry.contracted_size, 1)) * largest)
    fallback = jnp.where(is_unusable(of_floats), np.float32(of_inputs), of_floats)
    new_scale = jnp.where(is_unusable(of_blocks), fallback, of_blocks)
    return jnp.where(is_unusable(scale), new_scale, scale)


def usable_codebook(
    codebook: jax.Array, floats: jax.Array, spec: QuantSpec, geometry: Geometry
) -> jax.Array:
    """Codebooks whose entries differ.

    Args:
      codebook: float32 `[*batch, *num_blocks, num_codes]`.
      floats: the weight, `[*batch, *shape]`.
      spec: the spec of the weight.
      geometry: the geometry of the weight.

    Returns:
      `codebook`. The values of the ternary codes -1 and 1 are not 0: a value of 0
      becomes minus the other value, or -1 and 1 if both are 0. The equal entries of
      another codebook are spread evenly to both sides, and one entry keeps its value.
    """
    num_codes = codebook.shape[-1]
    entry_axis = (*(1,) * (codebook.ndim - 1), num_codes)
    if spec.rule.has_threshold:
        signs = np.asarray(spec.fmt.values(), np.float32)  # -1, 0, 1
        other = jnp.max(jnp.abs(codebook), axis=-1, keepdims=True)
        value = jnp.where(is_unusable(other), 1, other) * signs.reshape(entry_axis)
        return jnp.where(is_unusable(codebook), value, codebook)
    low, high = jnp.min(codebook, axis=-1), jnp.max(codebook, axis=-1)
    half_width = 0.5 * high - 0.5 * low
    spread = usable_scale(half_width, floats, 1.0, geometry)[..., None]
    places = np.arange(num_codes, dtype=np.float32) / (num_codes // 2) - 1  # [-1, 1)
    is_flat = is_unusable(half_width)[..., None]
    entries = low[..., None] + spread * places.reshape(entry_axis)
    return jnp.where(is_flat, entries, codebook)


def middle_code(fmt: formats.Format) -> np.float32:
    """The code in the middle of an integer format, where 0 and a range can begin."""
    return np.float32(np.round((fmt.min + fmt.max) / 2))
