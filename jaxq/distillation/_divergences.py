"""Divergences between two categorical distributions p and q, without cancellation.

If p and q are nearly equal, the divergence is of second order in `r = log p - log q`.
The textbook sum of `p r` has terms of first order, which cancel only after rounding.
Because p and q have the same sum, `p r` can be replaced by

    p r - p + q = p (exp(-r) - 1 + r)

All these terms are nonnegative and of second order. At temperature T, r is about 1 / T,
and the loss multiplies the divergence by T^2. So this matters at high temperatures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Pair(NamedTuple):
    """Two distributions over the same classes, float32 [*rows, classes].

    Attributes:
      p: the probabilities of the teacher.
      q: the probabilities of the student.
      log_ratio: `log(p / q)`. It may be any number where both are 0.
    """

    p: jax.Array
    q: jax.Array
    log_ratio: jax.Array

    @classmethod
    def of_logits(
        cls, teacher: jax.Array, student: jax.Array, temperature: Any
    ) -> Pair:
        """The distributions `softmax(logits / temperature)`."""
        # The difference of the logits is taken first. The difference of two
        # log-probabilities would have the rounding error of both.
        difference = (teacher - student) / temperature
        teacher, student = teacher / temperature, student / temperature
        log_sums = [
            jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (teacher, student)
        ]
        log_ratio = difference - (log_sums[0] - log_sums[1])
        return cls(jax.nn.softmax(teacher), jax.nn.softmax(student), log_ratio)

    @classmethod
    def of_log_probs(cls, log_p: jax.Array, log_q: jax.Array) -> Pair:
        """The distributions with these log-probabilities."""
        return cls(jnp.exp(log_p), jnp.exp(log_q), log_p - log_q)

    def reverse(self) -> Pair:
        """The pair with teacher and student exchanged."""
        return Pair(self.q, self.p, -self.log_ratio)


def forward_kl(pair: Pair, beta: Any) -> jax.Array:
    """KL(teacher || student), [*rows]."""
    return _kl(pair.p, pair.q, _finite_where_zero(pair))


def reverse_kl(pair: Pair, beta: Any) -> jax.Array:
    """KL(student || teacher), [*rows]."""
    return forward_kl(pair.reverse(), beta)


def jensen_shannon(pair: Pair, beta: Any) -> jax.Array:
    """The generalized Jensen-Shannon divergence with the weight beta, [*rows]."""
    log_ratio = _finite_where_zero(pair)
    mixture = beta * pair.p + (1 - beta) * pair.q
    p_over_mixture = _log_ratio_to_mixture(log_ratio, beta, 1 - beta)
    q_over_mixture = _log_ratio_to_mixture(-log_ratio, 1 - beta, beta)
    teacher_kl = _kl(pair.p, mixture, p_over_mixture)
    student_kl = _kl(pair.q, mixture, q_over_mixture)
    return beta * teacher_kl + (1 - beta) * student_kl


DIVERGENCES: dict[str, Callable[[Pair, Any], jax.Array]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd": jensen_shannon,
}


def _finite_where_zero(pair: Pair) -> jax.Array:
    """The log-ratio with 0 where both probabilities are 0, such as -inf minus -inf."""
    is_zero = (pair.p == 0) & (pair.q == 0)
    return jnp.where(is_zero, 0.0, pair.log_ratio)


def _kl(p: jax.Array, q: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """KL(p || q) for `log_ratio = log(p / q)`, [*rows]."""
    is_small = jnp.abs(log_ratio) < 0.5
    small = jnp.where(is_small, log_ratio, 0.0)
    # A class with p = 0 contributes q. Its log-ratio may be -inf.
    large = jnp.where(is_small | (p == 0), 0.0, log_ratio)
    terms = jnp.where(is_small, p * _excess(-small), p * (large - 1) + q)
    return jnp.sum(terms, axis=-1)


@jax.custom_jvp
def _excess(x: jax.Array) -> jax.Array:
    """`exp(x) - 1 - x` for |x| < 0.5, by its Taylor series."""
    series = jnp.ones_like(x)
    for n in range(9, 2, -1):  # x^2/2 (1 + x/3 (1 + x/4 (...)))
        series = 1 + series * x / n
    return x * x / 2 * series


@_excess.defjvp
def _excess_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return _excess(x), jnp.expm1(x) * tangent


def _log_ratio_to_mixture(
    log_ratio: jax.Array, p_share: Any, q_share: Any
) -> jax.Array:
    """`log(p / m)` for `log_ratio = log(p / q)` and `m = p_share p + q_share q`."""
    is_small = jnp.abs(log_ratio) < 0.5
    small = jnp.where(is_small, log_ratio, 0.0)
    large = jnp.where(is_small, 0.0, log_ratio)
    near = jnp.log1p(q_share * jnp.expm1(-small))
    far = jnp.logaddexp(jnp.log(p_share), jnp.log(q_share) - large)
    return -jnp.where(is_small, near, far)
