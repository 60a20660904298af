"""Runs a computation as one step of a program, so that XLA frees its arrays early.

XLA:CPU computes each value as early as possible. The codes of all weights exist when a
program starts. So XLA:CPU decodes all small weights first, and all decoded weights are
in memory together. Optimization barriers do not prevent this, because XLA:CPU removes
them before it chooses the order of the program.

The branch of a conditional is one step of the program. The branch starts when all its
operands exist. Its temporary arrays are freed when it ends. XLA must not know which
branch runs. Otherwise XLA removes the conditional. So the condition depends on the
codes of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxq.kernels._devices import lowering_devices

# `always_true_p(codes)` is True. In a program for one CPU device, XLA does not know
# this. In all other programs it is a constant, and XLA removes the conditional.
always_true_p = Primitive("always_true")


def as_one_step(
    codes: jax.Array, compute: Callable[..., Any], skip: Callable[..., Any], *args: Any
) -> Any:
    """Computes `compute(*args)` as one step of the program.

    Outside of jit, and in a program over a mesh, this is a plain call.

    Args:
      codes: integers of any shape, the codes of the weight that `compute` decodes.
      compute: returns a pytree of arrays.
      skip: returns arrays of the same shapes and dtypes. It never runs.
      *args: pytrees of arrays.

    Returns:
      `compute(*args)`.
    """
    is_on_mesh = not jax.typeof(codes).sharding.mesh.empty
    if codes.size == 0 or is_on_mesh or not jax.sharding.get_abstract_mesh().empty:
        return compute(*args)
    condition = always_true_p.bind(codes)
    if not isinstance(condition, Tracer):
        return compute(*args)
    return lax.cond(condition, compute, skip, *args)


def _abstract_condition(codes):
    return codes.update(shape=(), dtype=jnp.dtype(bool), weak_type=False)


def _constant_true(codes: jax.Array) -> jax.Array:
    return jnp.bool(True)


def _jvp_of_condition(primals, tangents):
    condition = always_true_p.bind(*primals)
    return condition, ad.Zero.from_primal_value(condition)  # pyright: ignore


def _batch_condition(args, dims):
    # The result has no batch axis. So vmap does not turn the conditional into a select.
    return always_true_p.bind(*args), None


def _lower_on_cpu(ctx, codes):
    _, num_devices = lowering_devices(ctx, None)
    form = _compare_bits if num_devices == 1 else _constant_true
    return mlir.lower_fun(form, multiple_results=False)(ctx, codes)


def _compare_bits(codes: jax.Array) -> jax.Array:
    """True, because a byte has at most 8 bits that are set. XLA does not know this."""
    first = lax.slice(codes, (0,) * codes.ndim, (1,) * codes.ndim).reshape(())
    return lax.population_count(first.astype(jnp.uint8)) <= 8


always_true_p.def_abstract_eval(_abstract_condition)
always_true_p.def_impl(_constant_true)
batching.primitive_batchers[always_true_p] = _batch_condition
ad.primitive_jvps[always_true_p] = _jvp_of_condition
mlir.register_lowering(
    always_true_p, mlir.lower_fun(_constant_true, multiple_results=False)
)
mlir.register_lowering(always_true_p, _lower_on_cpu, platform="cpu")
