"""The most probable classes of a teacher, and one class for all others."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.distillation._arguments import is_positive, number, whole_number
from jaxq.distillation._rows import described
from jaxq.qtensor import is_traced


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "log_probs", "log_tail"],
    meta_fields=["vocab_size", "temperature"],
)
@dataclasses.dataclass(frozen=True)
class TopK:
    """A teacher's k most probable classes of each row, for `kd_loss`.

    The other classes together are one class, the tail. So a row has k + 1
    probabilities, and their sum is 1.

    Attributes:
      indices: int32 [*rows, k], the classes, the most probable first.
      log_probs: float [*rows, k], their log-probabilities in
        `softmax(logits / temperature)`.
      log_tail: float [*rows], the log-probability of the tail. It is -inf if k is
        `vocab_size`.
      vocab_size: how many classes the teacher has.
      temperature: the temperature of the softmax. The probability of the tail at
        another temperature is not known.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.1, 0.2]]))
      >>> top = jaxq.distillation.TopK.from_logits(logits, 2, temperature=1.0)
      >>> top.indices.tolist(), round(float(jnp.exp(top.log_tail[0])), 3)
      ([[1, 3]], 0.2)
    """

    indices: jax.Array
    log_probs: jax.Array
    log_tail: jax.Array
    vocab_size: int
    temperature: float

    @classmethod
    def from_logits(cls, logits: Any, k: int, *, temperature: float = 2.0) -> TopK:
        """Keeps the k most probable classes of each row.

        Args:
          logits: float [*rows, vocab_size].
          k: from 1 to vocab_size.
          temperature: positive and finite. It must be the temperature of the loss. It
            cannot be traced.

        Returns:
          The k classes of each row, float32. The log-probabilities of a row with a NaN
          are NaN.

        Raises:
          TypeError: the logits are not floats, k is not an integer, or the temperature
            is not one number.
          ValueError: k or the temperature is out of range.

        Example:
          >>> import jax.numpy as jnp, jaxq
          >>> student, logits = jnp.zeros((2, 3, 8)), jnp.ones((2, 3, 8))
          >>> top = jaxq.distillation.TopK.from_logits(logits, 4, temperature=1.0)
          >>> top.indices.shape, top.log_tail.shape
          ((2, 3, 4), (2, 3))
          >>> float(jaxq.distillation.kd_loss(student, top, temperature=1.0))
          0.0
        """
        logits = jnp.asarray(logits)
        if not jnp.issubdtype(logits.dtype, jnp.floating) or logits.ndim == 0:
            raise TypeError(
                f"TopK.from_logits: logits is {described(logits)}; expected float "
                "logits [..., vocab_size]."
            )
        k, temperature = checked_top_k(k, temperature, "TopK.from_logits")
        vocab_size = logits.shape[-1]
        if k > vocab_size:
            raise ValueError(
                f"TopK.from_logits: k is {k}, but logits is {described(logits)} and "
                f"has {vocab_size} classes. Pass k={vocab_size} or less."
            )
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
        top_log_probs, indices = jax.lax.top_k(log_probs, k)
        return cls(
            indices,
            top_log_probs,
            _log_tail(log_probs, indices),
            vocab_size,
            temperature,
        )

    @property
    def k(self) -> int:
        """How many classes of a row are kept."""
        return self.indices.shape[-1]

    def log_classes(self) -> jax.Array:
        """Log-probabilities of the kept classes and of the tail, float32 [*rows, k+1].

        They are normalized again, because a cache may store rounded numbers.
        """
        return jax.nn.log_softmax(_with_tail(self.log_probs, self.log_tail))

    def student_log_classes(self, logits: jax.Array) -> jax.Array:
        """A student's log-probabilities of the same classes, float32 [*rows, k+1].

        Args:
          logits: float32 [*rows, vocab_size].
        """
        log_probs = jax.nn.log_softmax(logits / self.temperature)
        kept = jnp.take_along_axis(log_probs, self.indices, axis=-1)
        return _with_tail(kept, _log_tail(log_probs, self.indices))


def checked_top_k(k: Any, temperature: Any, caller: str) -> tuple[int, float]:
    """k and the temperature of a `TopK` as Python numbers.

    Raises:
      TypeError: one of them is traced, or k is not an integer, or the temperature is
        not one number.
      ValueError: one of them is out of range.
    """
    if is_traced(temperature):
        raise TypeError(
            f"{caller}: temperature is traced. It must be known before jit, because "
            "the tail at another temperature is not known. Pass a Python number."
        )
    k = whole_number(k, "k", caller)
    temperature = number(
        temperature,
        "temperature",
        caller,
        is_positive,
        "it must be positive and finite. Use 1.0 for the teacher's own probabilities.",
    )
    return k, float(temperature)


def _log_tail(log_probs: jax.Array, indices: jax.Array) -> jax.Array:
    """The log of the sum of all other probabilities, [*rows].

    It adds the probabilities of the tail. The result of 1 minus the kept probabilities
    would lose its digits by cancellation.
    """
    if indices.shape[-1] == log_probs.shape[-1]:
        return jnp.full(log_probs.shape[:-1], -jnp.inf, log_probs.dtype)
    rest = jnp.put_along_axis(
        log_probs, indices, jnp.float32(-jnp.inf), axis=-1, inplace=False
    )
    return jax.nn.logsumexp(rest, axis=-1)


def _with_tail(log_probs: jax.Array, log_tail: jax.Array) -> jax.Array:
    classes = jnp.concatenate([log_probs, log_tail[..., None]], axis=-1)
    return classes.astype(jnp.float32)
