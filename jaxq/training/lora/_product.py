"""The product of a layer with an adapter.

A layer calls its product through an attribute, for example `dot_general`. `add_lora`
puts a `LoRAProduct` there. It calls the layer's own product with the frozen weight, and
adds the product with the adapter:

    y = x W + scale * (dropout(x) A) B                             # LoRA
    y = m / norm(W + scale * A B) * (x W + scale * (x A) B)        # DoRA

The norm is that of each output, over the contracted axes. Nothing here makes a float
copy of W: the gradient of x passes through the layer's own product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxq import ops
from jaxq.nn.layers import QuantStats
from jaxq.training._state_changes import explained_state_change
from jaxq.training.lora._adapter import AdapterAxes

# Hook attribute of a layer -> position of the input among the arguments. The weight
# follows the input.
HOOKS = {"dot_general": 0, "einsum_op": 1}


class LoRAProduct(nnx.Module):
    """The product of one layer, with its adapter.

    Args:
      hook: the name of the layer's attribute that holds this module.
      base: the value that the attribute had before.
      axes: the axes of the layer's weight.
      a: the matrix A, see `_adapter.py`.
      b: the matrix B.
      alpha: the scale of the adapter is `alpha / rank`.
      rslora: True uses the scale `alpha / sqrt(rank)` instead.
      dropout: the share of the adapter's inputs that train mode sets to 0.
      key: PRNG keys of dropout, `[*stack]`. None without dropout.
      metadata: the metadata of the Variables of A and of B.

    Attributes:
      lora_a, lora_b: the matrices A and B, `nnx.LoRAParam`s.
      magnitude: the norms that DoRA trains, an `nnx.LoRAParam`
        `[*stack, *batch, *kept]`. None without DoRA. `start_dora` sets it.
      norm: the norms of the frozen weight, a `QuantStats` like `magnitude`.
      deterministic: True without dropout. `model.eval()` and `model.train()` set it.
    """

    stream: nnx.RngStream | None
    magnitude: nnx.LoRAParam | None
    norm: QuantStats | None

    def __init__(
        self,
        hook: str,
        base: Any,
        axes: AdapterAxes,
        a: jax.Array,
        b: jax.Array,
        *,
        alpha: float,
        rslora: bool,
        dropout: float,
        key: jax.Array | None,
        metadata: tuple[Mapping[str, Any], Mapping[str, Any]],
    ):
        self.hook = hook
        self.base = base
        self.axes = axes
        self.alpha = alpha
        self.rslora = rslora
        self.dropout = dropout
        self.deterministic = False
        self.lora_a = nnx.LoRAParam(a, **metadata[0])
        self.lora_b = nnx.LoRAParam(b, **metadata[1])
        self.stream = None if key is None else nnx.RngStream(key, tag="lora_dropout")
        self.magnitude = nnx.data(None)
        self.norm = nnx.data(None)

    @property
    def rank(self) -> int:
        """The number of columns of A."""
        return self.lora_a.get_value().shape[-1]

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return lora_scale(self.alpha, self.rank, rslora=self.rslora)

    def delta(self) -> jax.Array:
        """`scale * A B`, float32, with the axes of the weight."""
        a, b = self.lora_a.get_value(), self.lora_b.get_value()
        return self.scale * self.axes.product(a, b)

    def merged(self, weight: jax.Array) -> jax.Array:
        """The weight of the layer together with its adapter, float32.

        Args:
          weight: the frozen weight as floats.
        """
        total = weight.astype(jnp.float32) + self.delta()
        if self.magnitude is None:
            return total
        factor = self.magnitude.get_value() / self._norm_of(total)
        return total * self._over_contracted(factor)

    def start_dora(self, weight: jax.Array, metadata: Mapping[str, Any]) -> None:
        """Adds the magnitudes of DoRA. The layer computes the same as before.

        Args:
          weight: the frozen weight as floats.
          metadata: of the Variable.
        """
        weight = weight.astype(jnp.float32)
        self.norm = nnx.data(QuantStats(self._norm_of(weight)))
        start = self._norm_of(weight + self.delta())
        self.magnitude = nnx.data(nnx.LoRAParam(start, **metadata))

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The product. The arguments are those of the hook."""
        base = lax.dot_general if self.base is None else self.base
        y = base(*args, **kwargs)
        position = HOOKS[self.hook]
        x, weight = args[position : position + 2]
        a = self.lora_a.get_value().astype(x.dtype)
        b = self.lora_b.get_value().astype(x.dtype)
        if self.hook == "dot_general":
            multiply, numbering = dot_change, args[2:]  # dimension numbers
        else:
            multiply, numbering = _einsum, args[:1]  # subscripts
        change = multiply(
            self.axes,
            self._with_dropout(x),
            a,
            b,
            *numbering,
            precision=kwargs.get("precision"),
            out_sharding=kwargs.get("out_sharding"),
        )
        total = y.astype(jnp.float32) + self.scale * change
        if self.magnitude is not None:
            factor = self.magnitude.get_value() / self._current_norm(weight)
            total = total * self._over_result(factor, total.ndim)
        return total.astype(y.dtype)

    def _with_dropout(self, x: jax.Array) -> jax.Array:
        """The adapter's input. Train mode sets a share of its numbers to 0."""
        if self.stream is None or self.deterministic:
            return x
        with explained_state_change(
            "training.add_lora", "a layer with dropout", "random stream"
        ):
            key = self.stream()
        keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        factor = jnp.asarray(1 / (1 - self.dropout), x.dtype)
        return jnp.where(keep, x * factor, jnp.zeros_like(x))

    # DoRA. Shapes: n = the kept axes of the weight.

    def _norm_of(self, weight: jax.Array) -> jax.Array:
        """The norm of each output, `[*stack, *batch, *n]`. Norms of 0 become 1."""
        num_stacked = weight.ndim - len(self.axes.shape)
        inside = tuple(num_stacked + axis for axis in self.axes.contracting)
        norm = jnp.sqrt(jnp.sum(weight * weight, axis=inside))
        return jnp.where(norm > 0, norm, jnp.ones_like(norm))

    def _current_norm(self, weight: Any) -> jax.Array:
        """The norm of each output of `W + scale * A B`, without making this sum.

        The square is |w|^2 + 2 s (A^T w) b + s^2 b^T A^T A b for an output with the
        weight column w and the column b of B. The gradient does not pass through it
        (section 4.3 of the paper).
        """
        assert self.norm is not None
        left, right, names = self.axes.subscripts
        a = lax.stop_gradient(self.lora_a.get_value().astype(jnp.float32))
        b = lax.stop_gradient(self.lora_b.get_value().astype(jnp.float32))
        out = right.replace("R", "")
        gram_out = left[: self.axes.num_batch] + "RS"
        gram = jnp.einsum(f"{left},{left.replace('R', 'S')}->{gram_out}", a, a)
        squares = jnp.einsum(
            f"{right},{gram_out},{right.replace('R', 'S')}->{out}", b, gram, b
        )
        projected = ops.einsum(
            f"{left},{names}->{right}",
            a.astype(weight.dtype),
            lax.stop_gradient(weight),
            preferred_element_type=jnp.float32,
        )
        cross = jnp.einsum(f"{right},{right}->{out}", projected, b)
        norm = self.norm.get_value()
        square = norm * norm + 2 * self.scale * cross + self.scale**2 * squares
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))

    def _over_contracted(self, factor: jax.Array) -> jax.Array:
        """A factor `[*stack, *batch, *n]` with contracted axes of size 1."""
        num_stacked = factor.ndim - len(self.axes.shape) + len(self.axes.contracting)
        places = tuple(num_stacked + axis for axis in self.axes.contracting)
        return jnp.expand_dims(factor, places)

    def _over_result(self, factor: jax.Array, ndim: int) -> jax.Array:
        """A factor `[*batch, *n]` with the axes `[*batch, *free, *n]` of a product."""
        batch, kept = self.axes.num_batch, len(self.axes.kept)
        num_free = ndim - batch - kept
        shape = (*factor.shape[:batch], *(1,) * num_free, *factor.shape[batch:])
        return factor.reshape(shape)


def lora_scale(alpha: float, rank: int, *, rslora: bool) -> float:
    """The factor of A B: `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA."""
    return alpha / rank**0.5 if rslora else alpha / rank


def dot_change(
    axes: AdapterAxes,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    dims: Any,
    *,
    precision: Any,
    out_sharding: Any,
) -> jax.Array:
    """`(x A) B`, float32, with the axes of the product with the weight.

    Args:
      axes: of the weight.
      x: the input of the layer.
      a: the matrix A, of the dtype of `x`.
      b: the matrix B, of the dtype of `x`.
      dims: the dimension numbers of the product with the weight.
      precision: as in `lax.dot_general`.
      out_sharding: as in `lax.dot_general`.

    Returns:
      float32 `[*batch, *free, *kept]`, where free are the other axes of `x`.
    """
    # A has the batch axes and the contracted axes of the weight at the same places.
    inner = lax.dot_general(
        x, a, dims, precision=precision, preferred_element_type=jnp.float32
    ).astype(x.dtype)  # [*batch, *free, r]
    batch = axes.batch
    return lax.dot_general(
        inner,
        b,
        (((inner.ndim - 1,), (len(batch),)), (batch, batch)),
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )  # [*batch, *free, *kept]


def _einsum(
    axes: AdapterAxes,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    subscripts: str,
    *,
    precision: Any,
    out_sharding: Any,
) -> jax.Array:
    """`dot_change` for a layer whose product with the weight is an einsum."""
    inputs, out = subscripts.replace(" ", "").split("->")
    left, right = inputs.split(",")
    rank = next(letter for letter in "RSTUVW" if letter not in inputs)
    batch, inside, outside = (
        "".join(right[axis] for axis in group)
        for group in (axes.batch, axes.contracting, axes.kept)
    )
    inner_indices = "".join(index for index in left if index not in inside) + rank
    inner = jnp.einsum(
        f"{left},{batch}{inside}{rank}->{inner_indices}",
        x,
        a,
        precision=precision,
        preferred_element_type=jnp.float32,
    ).astype(x.dtype)
    return jnp.einsum(
        f"{inner_indices},{batch}{rank}{outside}->{out}",
        inner,
        b,
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
