"""Flax nnx Embed: its kind, and the quantized layer.

The layer has no hook for its lookup. A quantized layer therefore becomes a `QEmbed`.
The table is `[num_embeddings, features]`. `attend` contracts the features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq import ops
from jaxq.meshes import apply_out_sharding
from jaxq.nn.layers._kind import LayerKind, register_layer
from jaxq.nn.layers._own_weight import quantize_own_weight
from jaxq.nn.layers._promotion import accept_qtensors, promotion_problem
from jaxq.nn.layers._roles import Roles
from jaxq.qtensor import QUANTIZED


class QEmbed(nnx.Embed):
    """`nnx.Embed` whose table is a QTensor.

    A lookup dequantizes only the rows that it reads.

    Args:
      num_embeddings: number of rows of the table.
      features: length of a row.
      weight: preset name or `QuantSpec`. None keeps floats.
      **kwargs: as in `nnx.Embed`, `rngs` included.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> layer = jaxq.nn.QEmbed(16, 64, weight="int8", rngs=nnx.Rngs(0))
      >>> layer(jnp.array([1, 2])).shape
      (2, 64)
    """

    def __init__(
        self, num_embeddings: int, features: int, *, weight: Any = "int8", **kwargs: Any
    ):
        super().__init__(num_embeddings, features, **kwargs)
        quantize_own_weight(self, weight, None)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        table = self.embedding[...]
        if not isinstance(table, QUANTIZED):
            return super().__call__(inputs, out_sharding=out_sharding)
        (table,) = self.promote_dtype((table,), dtype=self.dtype, inexact=False)
        # Like nnx.Embed: a table of one row gives that row for every index.
        indices = jnp.zeros_like(inputs) if self.num_embeddings == 1 else inputs
        return apply_out_sharding(ops.take(table, indices), out_sharding)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The product of queries `[..., features]` with the rows of the table."""
        arrays = (query, self.embedding[...])
        query, table = self.promote_dtype(arrays, dtype=self.dtype)
        dims = (((query.ndim - 1,), (1,)), ((), ()))
        return ops.dot_general(query, table, dims, out_sharding=out_sharding)


def _roles(layer: Any) -> Roles:
    shape = (layer.num_embeddings, layer.features)
    return Roles((-1,), shape, product="lookup")


def _attach(layer: Any) -> None:
    if not isinstance(layer, QEmbed):
        # `_problem` refuses subclasses, so this is a plain nnx.Embed.
        layer.__class__ = QEmbed
    accept_qtensors(layer, "embedding")


def _problem(layer: Any) -> str | None:
    if type(layer) not in (nnx.Embed, QEmbed):
        return (
            f"{type(layer).__name__} is a subclass of Embed, and may look up rows in "
            "another way than Embed"
        )
    return promotion_problem(layer, "embedding", _roles(layer).shape)


register_layer(
    LayerKind(
        name="Embed",
        cls=nnx.Embed,
        weight="embedding",
        roles=_roles,
        attach=_attach,
        problem=_problem,
    )
)
