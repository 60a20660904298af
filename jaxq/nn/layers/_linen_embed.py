"""Flax linen Embed: its kind, and the quantized layer.

The table is `[num_embeddings, features]`. Flax reads the table in `setup`. `attend`
contracts the features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from jaxq import ops
from jaxq.nn.layers._linen_kind import LinenKind, register_linen_layer
from jaxq.nn.layers._linen_own_weight import own_weight
from jaxq.nn.layers._linen_stand_in import promote
from jaxq.nn.layers._roles import Roles
from jaxq.qtensor import QUANTIZED, QTensor


class QEmbed(linen.Embed):
    """`nn.Embed` whose table is a QTensor.

    A lookup dequantizes only the rows that it reads. `attend` multiplies by the codes.
    `weight` and errors are those of `QDense`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer = jaxq.nn.linen.QEmbed(16, 64, weight="nf4")
      >>> tokens = jnp.array([1, 2])
      >>> layer.apply(layer.init(jax.random.key(0), tokens), tokens).shape
      (2, 64)
    """

    weight: Any = "int8"

    def setup(self):
        roles = _roles(self, (self.num_embeddings, self.features))
        init = self.embedding_init
        self.embedding = own_weight(self, "embedding", roles, init, self.param_dtype)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        table = self.embedding
        if isinstance(table, QUANTIZED):
            return _dequantized_lookup(self, table, inputs)
        return super().__call__(inputs)

    def attend(self, query: jax.Array) -> jax.Array:
        """The product of queries `[..., features]` with the rows of the table."""
        table = self.embedding
        if isinstance(table, QUANTIZED):
            return _attend(self, table, query)
        return super().attend(query)


def _set_table(layer: Any, table: QTensor) -> None:
    """`Embed.setup`: the stored QTensor becomes the table."""
    layer.embedding = table


def _dequantized_lookup(layer: Any, table: QTensor, inputs: jax.Array) -> jax.Array:
    """`Embed.__call__`: only the rows that are read are dequantized."""
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ValueError(
            f"{type(layer).__name__}: inputs must have an integer dtype, got "
            f"{inputs.dtype.name}{list(inputs.shape)}. Pass token ids."
        )
    (table,) = promote(layer, table, dtype=layer.dtype, inexact=False)
    # Like nn.Embed: a table of one row gives that row for every index.
    indices = jnp.zeros_like(inputs) if layer.num_embeddings == 1 else inputs
    return ops.take(table, indices)


def _attend(layer: Any, table: QTensor, query: jax.Array) -> jax.Array:
    """`Embed.attend`: the product with the codes of the table."""
    query, table = promote(layer, query, table, dtype=layer.dtype)
    return ops.dot_general(query, table, (((query.ndim - 1,), (1,)), ((), ())))


def _roles(layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Roles:
    return Roles((-1,), shape, product="lookup")


EMBED = register_linen_layer(
    LinenKind(
        name="Embed",
        weight="embedding",
        roles=_roles,
        methods={
            linen.Embed.__call__: _dequantized_lookup,
            linen.Embed.attend: _attend,
        },
        setups={linen.Embed.setup: _set_table},
    )
)
