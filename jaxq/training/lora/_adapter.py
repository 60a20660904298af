"""Where the two matrices of an adapter lie on the axes of a layer's weight.

An adapter adds `scale * A B` to a weight. With the contracted axes flattened to K and
the other axes to N, A is [K, r] and B is [r, N]. They are stored with the axes of the
weight, so the mesh axes of the weight are those of the adapter:

    weight  [*stack, *own axes of the layer]
    A       [*stack, *batch, *contracted, r]
    B       [*stack, *batch, r, *kept]
"""

from __future__ import annotations

import dataclasses
import math
import string
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.nn.layers import Roles

# The letter of the rank in einsum subscripts. Weight axes have small letters.
_RANK = "R"


@dataclasses.dataclass(frozen=True)
class AdapterAxes:
    """The axes of one layer's weight, without the axes of a stack of layers.

    Attributes:
      shape: of the weight of one layer.
      contracting: the axes that the product contracts, from 0.
      num_batch: the number of leading batch axes.
    """

    shape: tuple[int, ...]
    contracting: tuple[int, ...]
    num_batch: int

    @staticmethod
    def of(roles: Roles) -> AdapterAxes:
        """The axes of a weight with these roles."""
        ndim = len(roles.shape)
        contracting = tuple(sorted(axis % ndim for axis in roles.contracting))
        return AdapterAxes(tuple(roles.shape), contracting, roles.num_batch)

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch axes."""
        return tuple(range(self.num_batch))

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that are neither contracted nor batch axes."""
        bound = (*self.batch, *self.contracting)
        return tuple(axis for axis in range(len(self.shape)) if axis not in bound)

    @property
    def size_in(self) -> int:
        """K, the number of inputs."""
        return math.prod(self.sizes(self.contracting))

    @property
    def size_out(self) -> int:
        """N, the number of outputs."""
        return math.prod(self.sizes(self.kept))

    def stack_of(self, weight: Any) -> tuple[int, ...]:
        """The sizes of the axes of a stack of layers; empty for one layer."""
        return tuple(weight.shape[: len(weight.shape) - len(self.shape)])

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of some axes."""
        return tuple(self.shape[axis] for axis in axes)

    @property
    def subscripts(self) -> tuple[str, str, str]:
        """The einsum indices of A, of B and of the weight."""
        names = string.ascii_lowercase
        batch, inside, outside = (
            "".join(names[axis] for axis in axes)
            for axes in (self.batch, self.contracting, self.kept)
        )
        weight = names[: len(self.shape)]
        return f"{batch}{inside}{_RANK}", f"{batch}{_RANK}{outside}", weight

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """A B with the axes of the weight, float32."""
        left, right, weight = self.subscripts
        return jnp.einsum(
            f"...{left},...{right}->...{weight}",
            a.astype(jnp.float32),
            b.astype(jnp.float32),
            precision="highest",
        )

    def new_matrices(
        self, weight: Any, rank: int, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """A new A, `[*stack, *batch, K, r]`, and B = 0, `[*stack, *batch, r, N]`.

        A is uniform between -1 / sqrt(K) and 1 / sqrt(K), as in PEFT.

        Args:
          weight: the frozen weight, of which only the shape is used.
          rank: r.
          key: PRNG key of A.
        """
        bound = self.size_in**-0.5
        lead = (*self.stack_of(weight), *self.sizes(self.batch))
        shape = (*lead, self.size_in, rank)
        a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        return a, jnp.zeros((*lead, rank, self.size_out), jnp.float32)

    def as_matrix(self, weight: jax.Array) -> jax.Array:
        """A weight as `[*stack, *batch, K, N]`."""
        num_stacked = weight.ndim - len(self.shape)
        order = (*self.batch, *self.contracting, *self.kept)
        axes = (*range(num_stacked), *(num_stacked + axis for axis in order))
        lead = (*weight.shape[:num_stacked], *self.sizes(self.batch))
        matrix = jnp.transpose(weight, axes)
        return matrix.reshape(*lead, self.size_in, self.size_out)

    def a_from_matrix(self, matrix: jax.Array) -> jax.Array:
        """A from `[*stack, *batch, K, r]`."""
        inside = self.sizes(self.contracting)
        return matrix.reshape(*matrix.shape[:-2], *inside, matrix.shape[-1])

    def b_from_matrix(self, matrix: jax.Array) -> jax.Array:
        """B from `[*stack, *batch, r, N]`."""
        return matrix.reshape(*matrix.shape[:-1], *self.sizes(self.kept))

    def matrices(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A as `[*stack, *batch, K, r]` and B as `[*stack, *batch, r, N]`."""
        num_kept = len(self.kept)
        lead = b.shape[: b.ndim - num_kept]
        a = a.reshape(*lead[:-1], self.size_in, lead[-1])
        return a, b.reshape(*lead, self.size_out)

    def entries(self, spec: Any, ndim: int) -> tuple[tuple, tuple]:
        """The entries of the PartitionSpecs of A and of B.

        Args:
          spec: the entries of the weight's PartitionSpec, one for each axis. Missing
            entries at the end are None.
          ndim: the number of axes of the weight, including the axes of a stack.
        """
        spec = (*spec, *(None,) * (ndim - len(spec)))
        num_stacked = ndim - len(self.shape)
        stack, own = spec[:num_stacked], spec[num_stacked:]
        batch, inside, outside = (
            tuple(own[axis] for axis in axes)
            for axes in (self.batch, self.contracting, self.kept)
        )
        return (*stack, *batch, *inside, None), (*stack, *batch, None, *outside)
