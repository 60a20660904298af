"""How a quantized weight enters an `ExpertLinear`: its layer kind for `jaxq.nn`.

The layer multiplies with the hook `ragged_dot(rows, kernel, group_sizes)`. The experts
are a batch axis of the kernel, so every expert has its own scales and statistics.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.models._experts import ExpertLinear
from jaxq.nn import LayerKind, Roles
from jaxq.nn.layers import InputRows, accept_qtensors, foreign_hook
from jaxq.ops import ragged_dot


def _roles(layer: Any) -> Roles:
    return Roles(contracting=(-2,), shape=layer.shape, num_batch=1)


def _attach(layer: Any) -> None:
    accept_qtensors(layer, "kernel")
    layer.ragged_dot = ragged_dot


def _problem(layer: Any) -> str | None:
    return foreign_hook(layer, "ragged_dot", (jax.lax.ragged_dot, ragged_dot))


def _rows(x: jax.Array, kernel: Any, group_sizes: jax.Array, **_: Any) -> InputRows:
    """The rows of each expert, `[e, rows, in]`. The rows of other experts are zeros."""
    ends = jnp.cumsum(group_sizes)
    place = jnp.arange(x.shape[0])[None]  # [1, rows]
    is_own = (place >= (ends - group_sizes)[:, None]) & (place < ends[:, None])
    return jnp.where(is_own[:, :, None], x[None], 0), 1


EXPERT_LINEAR = LayerKind(
    name="ExpertLinear",
    cls=ExpertLinear,
    weight="kernel",
    roles=_roles,
    attach=_attach,
    problem=_problem,
    hook="ragged_dot",
    read_rows=_rows,
)
