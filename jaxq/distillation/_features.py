"""Losses of features and attention maps, and the projection between two sizes.

References:
  Romero et al., FitNets: Hints for Thin Deep Nets, 2015.
  Sanh et al., DistilBERT, 2019.
  Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2020.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.distillation._arguments import whole_number
from jaxq.distillation._rows import clear_rows, described, mean_over_rows, row_weights


def projection(key: jax.Array, d_s: int, d_t: int) -> jax.Array:
    """A matrix that maps a student's features to the size of the teacher's.

    The matrix is a parameter: train it together with the student, and drop it after the
    training.

    Args:
      key: a PRNG key.
      d_s: size of the student's features, or its number of attention heads.
      d_t: size of the teacher's features, or its number of attention heads.

    Returns:
      float32 [d_s, d_t], normal numbers with standard deviation 1 / sqrt(d_s).

    Raises:
      TypeError: a size is not an integer.
      ValueError: a size is below 1.

    Example:
      >>> import jax, jaxq
      >>> jaxq.distillation.projection(jax.random.key(0), 32, 64).shape
      (32, 64)

    References:
      Romero et al., FitNets, 2015.
    """
    d_s = whole_number(d_s, "d_s", "projection")
    d_t = whole_number(d_t, "d_t", "projection")
    return jax.random.normal(key, (d_s, d_t), jnp.float32) / math.sqrt(d_s)


def feature_loss(
    student: Any,
    teacher: Any,
    projection: Any = None,
    *,
    mask: Any = None,
    distance: str = "mse",
) -> jax.Array:
    """Distance of a student's features from the teacher's.

    This loss also distills a regression head: its predictions are features of size 1,
    `[b, 1]`. No gradient reaches the teacher. All arithmetic is float32.

    Args:
      student: float [*rows, d_s], for example hidden states [b, t, d_s].
      teacher: float [*rows, d_t].
      projection: float [d_s, d_t], see `projection`. Train it with the student. None is
        allowed only if d_s = d_t.
      mask: None or [*rows]. Rows with 0 or False do not count. They may contain any
        numbers, also NaN. Positive numbers are weights of the mean. If no row counts,
        or if there is no row, the loss is 0 and its gradient is zero.
      distance: "mse" is the mean squared difference (TinyBERT). "cosine" is one minus
        the cosine of the angle between the two vectors (DistilBERT); it is 1 for a
        vector of zeros.

    Returns:
      float32 scalar, the mean over the rows. It is NaN if a row that counts has a NaN.

    Raises:
      ValueError: the shapes do not fit; the distance is unknown; the mask has a number
        that is negative or not finite (under jit, the loss is then NaN).

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> student, teacher = jnp.ones((4, 2)), jnp.full((4, 3), 2.0)
      >>> w = jnp.ones((2, 3))
      >>> float(jaxq.distillation.feature_loss(student, teacher, w))
      0.0
      >>> float(jaxq.distillation.feature_loss(student, jnp.zeros((4, 2))))
      1.0

    References:
      Romero et al., FitNets, 2015; Sanh et al., DistilBERT, 2019; Jiao et al.,
      TinyBERT, 2020.
    """
    return _distance(student, teacher, projection, mask, distance, "feature_loss")


def attention_loss(
    student: Any, teacher: Any, projection: Any = None, *, mask: Any = None
) -> jax.Array:
    """Mean squared difference of attention maps.

    The maps are attention scores before the softmax (TinyBERT), or probabilities. A
    score of -inf marks a masked key. It counts as 0 in both maps. To compare the
    softmax of the scores by KL divergence (MiniLM), use
    `kd_loss(student, teacher, temperature=1.0, alpha=1.0)`.

    Args:
      student: float [b, n_s, q, k] with n_s heads, q queries and k keys.
      teacher: float [b, n_t, q, k].
      projection: float [n_s, n_t], mixes the student's heads, see `projection`. None is
        allowed only if n_s = n_t.
      mask: None or [b, q] for self-attention (q = k). The weight of a pair of query and
        key is the product of both numbers. So a pair does not count if the mask of one
        of the two is 0 or False. Such pairs may contain any scores, also NaN. If no
        pair counts, the loss is 0 and its gradient is zero.

    Returns:
      float32 scalar, the mean over heads and pairs. It is NaN if a pair that counts has
      a NaN.

    Raises:
      ValueError: the shapes do not fit, or the mask has a number that is negative or
        not finite (under jit, the loss is then NaN).

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> student, teacher = jnp.ones((1, 2, 3, 3)), jnp.zeros((1, 2, 3, 3))
      >>> float(jaxq.distillation.attention_loss(student, teacher))
      1.0

    References:
      Jiao et al., TinyBERT, 2020, eq. 2; Wang et al., MiniLM, 2020.
    """
    student, teacher = _without_masked(student), _without_masked(teacher)
    both_are_maps = student.ndim == 4 and teacher.ndim == 4
    same_pairs = both_are_maps and student.shape[-2:] == teacher.shape[-2:]
    if not same_pairs or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"attention_loss: the student has {described(student)}, the teacher "
            f"{described(teacher)}; expected [b, heads, q, k] with equal b, q and k. "
            "Pass maps of the same tokens."
        )
    pairs = None
    if mask is not None:
        pairs = _pairs(jnp.asarray(mask), student)
    # Heads last: a pair of query and key is a row with one feature for each head.
    student = jnp.moveaxis(student, 1, -1)  # [b, q, k, n_s]
    teacher = jnp.moveaxis(teacher, 1, -1)  # [b, q, k, n_t]
    if projection is None and student.shape != teacher.shape:
        raise ValueError(
            f"attention_loss: the student has {student.shape[-1]} heads, the teacher "
            f"{teacher.shape[-1]}. Pass projection=jaxq.distillation.projection(key, "
            f"{student.shape[-1]}, {teacher.shape[-1]})."
        )
    return _distance(student, teacher, projection, pairs, "mse", "attention_loss")


def _distance(
    student: Any, teacher: Any, projection: Any, mask: Any, distance: str, caller: str
) -> jax.Array:
    """The loss of `feature_loss`. Errors begin with `caller`."""
    student, teacher = _float32(student), _float32(teacher)
    weights = row_weights(mask, student.shape[:-1], caller)
    for name, features in (("student", student), ("teacher", teacher)):
        if features.ndim == 0 or features.shape[-1] == 0:
            raise ValueError(
                f"{caller}: the {name} has {described(features)} and no feature. The "
                "last axis is that of the features. Predictions of one number are "
                "[b, 1]."
            )
    student = clear_rows(student, weights)
    if projection is not None:
        matrix = _checked_projection(
            projection, student.shape[-1], teacher.shape[-1], caller
        )
        student = jnp.matmul(student, matrix, preferred_element_type=jnp.float32)
    if student.shape != teacher.shape:
        raise ValueError(
            f"{caller}: the student has {described(student)}, the teacher "
            f"{described(teacher)}. Pass features of the same rows. For other sizes, "
            "pass projection=jaxq.distillation.projection(key, d_s, d_t)."
        )
    teacher = lax.stop_gradient(clear_rows(teacher, weights))
    if distance == "mse":
        values = jnp.mean((student - teacher) ** 2, axis=-1)
    elif distance == "cosine":
        values = 1 - jnp.sum(_unit(student) * _unit(teacher), axis=-1)
    else:
        raise ValueError(
            f"{caller}: distance is {distance!r}; expected 'mse' or 'cosine'."
        )
    return mean_over_rows(values, weights)


def _pairs(mask: jax.Array, maps: jax.Array) -> jax.Array:
    """The weights of the pairs of query and key, float32 [b, q, k].

    Args:
      mask: [b, t].
      maps: [b, heads, t, t].
    """
    b, _, num_queries, num_keys = maps.shape
    if num_queries != num_keys or mask.shape != (b, num_queries):
        raise ValueError(
            f"attention_loss: mask is {described(mask)} and the maps are "
            f"{described(maps)}; expected [b, t] and [b, heads, t, t]. For "
            "cross-attention, slice the maps and pass no mask."
        )
    weights = row_weights(mask, (b, num_queries), "attention_loss")
    assert weights is not None
    return weights[:, :, None] * weights[:, None, :]


def _without_masked(maps: Any) -> jax.Array:
    """Attention maps with 0 in place of the -inf of masked keys."""
    maps = _float32(maps)
    return jnp.where(maps == -jnp.inf, 0.0, maps)


def _checked_projection(matrix: Any, d_s: int, d_t: int, caller: str) -> jax.Array:
    matrix = _float32(matrix)
    if matrix.shape != (d_s, d_t):
        raise ValueError(
            f"{caller}: projection is {described(matrix)}; expected [{d_s}, {d_t}], "
            "the student's size and the teacher's. "
            f"jaxq.distillation.projection(key, {d_s}, {d_t}) makes it."
        )
    return matrix


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis; zeros stay zeros."""
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    is_zero = squares == 0
    return x / jnp.sqrt(jnp.where(is_zero, 1.0, squares))


def _float32(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)
