"""How the devices of a mesh share the product of rows sorted by expert.

Weights never move to other experts' devices. Each device multiplies the rows of its own
experts and gives zeros for the other rows. The results of all devices are added, and
each row has one term that is not zero, so the sum is exact.

| axis | sharded over |
|---|---|
| experts | the mesh axes of the weights; a sum over devices follows |
| rows of x | the mesh axes of x |
| columns of the weights, n | the mesh axes of the weights |
| k | the mesh axes of the weights, unless rows of x are quantized; a sum follows |

A mesh axis serves the first of these axes that has it. Codes and scales, or rows of x,
are gathered along the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxq.meshes import explicit_spec, names_in
from jaxq.ops._on_parts import call_on_parts
from jaxq.ops._part_layout import fits_parts, gathers_codes
from jaxq.qtensor import QTensor, leaf_specs, mesh_axes

# `product(x, weights, sizes)` is the float32 product `[m, n]` on one device.
Product = Callable[[jax.Array, QTensor, jax.Array], jax.Array]


class RaggedLayout(NamedTuple):
    """The mesh axes of the operands of `ragged_dot` and of its result.

    Attributes:
      x: those of the rows `[m, k]`.
      weights: those of the weights `[e, k, n]`.
      out: those of the product `[m, n]`.
      summed: the mesh axes over which each device has a term of the sum.
    """

    x: PartitionSpec
    weights: PartitionSpec
    out: PartitionSpec
    summed: tuple[str, ...]


def ragged_layout(
    x: Any, weights: QTensor, names: tuple[tuple, tuple], mesh: Any
) -> RaggedLayout:
    """The layout of a product.

    Args:
      x: rows `[m, k]` or their shape.
      weights: `[e, k, n]`. The leaves may be shapes.
      names: the mesh axes of each axis of x, and of the weights.
      mesh: the mesh with the sizes of its axes.
    """
    (row_names, _), (expert_names, k_names, column_names) = names
    used: set[str] = set()

    def claim(entry: Any, *axes: tuple[Any, int]) -> Any:
        """The entry if no axis before has its mesh axes and it cuts no block."""
        entry_names = set(names_in(entry))
        fits = all(fits_parts(operand, axis, entry, mesh) for operand, axis in axes)
        if entry_names & used or not fits:
            return None
        used.update(entry_names)
        return entry

    experts = claim(expert_names, (weights, 0))
    rows = claim(row_names, (x, 0))
    columns = claim(column_names, (weights, 2))
    is_quantized = weights.meta.activation is not None
    k = None if is_quantized else claim(k_names, (weights, 1), (x, 1))
    return RaggedLayout(
        PartitionSpec(rows, k),
        PartitionSpec(experts, k, columns),
        PartitionSpec(rows, columns),
        (*names_in(experts), *names_in(k)),
    )


@functools.partial(jax.jit, static_argnames=("product", "mesh"))
def multiply_ragged_parts(
    x: jax.Array, weights: QTensor, sizes: jax.Array, product: Product, mesh: Any
) -> jax.Array:
    """The product `[m, n]` of operands on explicit mesh axes.

    Args:
      x: rows `[m, k]`.
      weights: `[e, k, n]`.
      sizes: int32 `[e]`, at least 0.
      product: the product on one device.
      mesh: a mesh whose axes are all explicit.
    """
    names = (explicit_spec(x), mesh_axes(weights))
    layout = ragged_layout(x, weights, names, mesh)

    def multiply_part(x: jax.Array, weights: QTensor, sizes: jax.Array) -> jax.Array:
        y = _product_of_part(x, weights, sizes, product, layout)
        return lax.psum(y, layout.summed) if layout.summed else y

    def multiply(x: jax.Array, weights: QTensor, sizes: jax.Array) -> jax.Array:
        specs = (layout.x, leaf_specs(weights, layout.weights), PartitionSpec(None))
        return call_on_parts(multiply_part, mesh, specs, layout.out, x, weights, sizes)

    if gathers_codes(weights, names[1], layout.weights):
        # The backward pass gathers the codes again. No device keeps all of them.
        multiply = jax.checkpoint(multiply)
    y = multiply(x, weights, sizes)
    # The rows of the result lie where those of x were.
    rows, columns = names[0][0], layout.out[1]
    if set(names_in(rows)) & set(names_in(columns)):
        return y
    return jax.sharding.reshard(y, NamedSharding(mesh, PartitionSpec(rows, columns)))


def _product_of_part(
    x: jax.Array,
    weights: QTensor,
    sizes: jax.Array,
    product: Product,
    layout: RaggedLayout,
) -> jax.Array:
    """The product of a device's rows with its experts; zeros for other rows.

    Args:
      x: the rows of this device.
      weights: the experts of this device.
      sizes: int32 `[e]`, the number of rows of each expert, on all devices.
      product: the product on one device.
      layout: how the operands lie on the mesh.
    """
    num_rows, rows, experts = x.shape[0], layout.x[0], layout.weights[0]
    start = 0 if rows is None else lax.axis_index(names_in(rows)) * num_rows
    # The group sizes can add up to more rows than there are.
    sizes = _sizes_in_part(sizes, start, num_rows)
    if experts is None:
        return product(x, weights, sizes)
    num_experts = weights.shape[0]
    first_expert = lax.axis_index(names_in(experts)) * num_experts
    own_sizes = lax.dynamic_slice_in_dim(sizes, first_expert, num_experts)
    is_before = jnp.arange(sizes.shape[0]) < first_expert
    first_row = jnp.sum(jnp.where(is_before, sizes, 0))
    # The product begins with the first row of the first expert.
    moved = jnp.roll(x, -first_row, axis=0)
    return jnp.roll(product(moved, weights, own_sizes), first_row, axis=0)


def _sizes_in_part(
    sizes: jax.Array, start: jax.Array | int, num_rows: int
) -> jax.Array:
    """The number of rows of each expert among `num_rows` rows from `start` on."""
    ends = jnp.cumsum(sizes)
    first = jnp.clip(ends - sizes - start, 0, num_rows)
    return jnp.clip(ends - start, 0, num_rows) - first
