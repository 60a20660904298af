"""The largest number of each block of unsigned integers, as a primitive of jax.

Pairwise maxima of the two halves of an axis read the array once, in long runs. XLA's
reduction on CPU does not. But if the axis is sharded, the two halves are on different
devices, and a device would get whole shards of floats. So the primitive chooses when
jax lowers the program, and knows whether XLA partitions it.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

# Axes are halved until each number is the maximum of this many numbers. More halvings
# would make a large program.
_MAX_HALVED = 64
# The last two numbers are left to a reduction. XLA does not repeat a reduction in each
# fusion that reads its result, but it repeats the maxima, and then keeps a copy of x.
_LAST = 2

largest_p = Primitive("largest")


def largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The maximum over some axes, which keep the size 1; 0 if there are no numbers.

    Args:
      x: unsigned integers.
      axes: the axes of the blocks.
    """
    return largest_p.bind(x, axes=tuple(axis % x.ndim for axis in axes))


def _by_halves(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`largest` on one device."""
    halved = 1
    for axis in axes:
        size = x.shape[axis]
        while size % 2 == 0 and size > _LAST and halved < _MAX_HALVED:
            size, halved = size // 2, halved * 2
            first = lax.slice_in_dim(x, 0, size, axis=axis)
            second = lax.slice_in_dim(x, size, None, axis=axis)
            x = jnp.maximum(first, second)
    return _by_reduction(x, axes)


def _by_reduction(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`largest` on several devices: only maxima are exchanged."""
    return jnp.max(x, axis=axes, keepdims=True, initial=0)


def _num_devices(axis_context) -> int:
    """The number of devices over which XLA partitions the program."""
    if hasattr(axis_context, "num_devices"):  # ordinary jit
        return axis_context.num_devices
    mesh = getattr(axis_context, "mesh", None)
    if mesh is None:
        return 1
    manual = axis_context.manual_axes | set(getattr(mesh, "manual_axes", ()))
    return math.prod(size for name, size in mesh.shape.items() if name not in manual)


def _lower(ctx, x, *, axes):
    on_one_device = _num_devices(ctx.module_context.axis_context) == 1
    form = _by_halves if on_one_device else _by_reduction
    function = functools.partial(form, axes=axes)
    return mlir.lower_fun(function, multiple_results=False)(ctx, x)


def _abstract(x, *, axes):
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    sharding = x.sharding
    if not sharding.mesh.empty:
        spec = [None if i in axes else name for i, name in enumerate(sharding.spec)]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return x.update(shape=shape, weak_type=False, sharding=sharding)


@functools.partial(jax.jit, static_argnames="axes")
def _run(x, *, axes):
    return largest_p.bind(x, axes=axes)


def _evaluate(x, *, axes):
    # The primitive can only be lowered and compiled.
    with jax.disable_jit(False):
        return _run(x, axes=axes)


def _batch(args, dims, *, axes):
    x = jnp.moveaxis(args[0], dims[0], 0)
    return largest_p.bind(x, axes=tuple(axis + 1 for axis in axes)), 0


largest_p.def_abstract_eval(_abstract)
largest_p.def_impl(_evaluate)
batching.primitive_batchers[largest_p] = _batch
mlir.register_lowering(largest_p, _lower)
