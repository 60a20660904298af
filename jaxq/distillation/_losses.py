"""Losses of a student's logits: distillation, and cross-entropy on responses.

With teacher probabilities `p = softmax(z_t / T)` and student probabilities
`q = softmax(z_s / T)`, the gradient of `T^2 KL(p || q)` with respect to `z_s` is
`T (q - p)`. Without the factor T^2 the gradient would shrink as 1/T^2, and the meaning
of alpha would change with T.

References:
  Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
  Kim and Rush, Sequence-Level Knowledge Distillation, 2016.
  Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2023.
  Agarwal et al., On-Policy Distillation of Language Models (GKD), 2023.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.distillation._arguments import is_positive, number
from jaxq.distillation._divergences import DIVERGENCES, Pair
from jaxq.distillation._rows import clear_rows, described, mean_over_rows, row_weights
from jaxq.distillation._top_k import TopK
from jaxq.qtensor import is_traced


def kd_loss(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any = None,
    *,
    temperature: Any = 2.0,
    alpha: Any = 0.5,
    mask: Any = None,
    divergence: str = "forward",
    beta: float = 0.5,
) -> jax.Array:
    """Knowledge distillation from logits.

    The loss is the mean over the rows of

        alpha * temperature^2 * divergence + (1 - alpha) * cross_entropy

    The divergence is between `softmax(logits / temperature)` of teacher and student.
    The cross-entropy is that of the labels at temperature 1. Without labels the second
    term is left out, and alpha still multiplies the first term. No gradient reaches the
    teacher. All arithmetic is float32.

    Classification heads are distilled in the same way: a row is an example, and its
    logits are those of the classes.

    Args:
      student_logits: float [*rows, vocab_size], for example [b, t, vocab_size].
      teacher_logits: the same shape, or a `TopK` of the same rows. With a `TopK`, the
        divergence is between k + 1 classes: the teacher's k most probable ones and all
        others as one.
      labels: None or integers [*rows]. Rows that do not count may have any label.
      temperature: positive and finite. It may be traced. With a `TopK` it must be that
        of the `TopK`. Above 1e5 (1e3 with a `TopK`), float32 gives fewer than four
        digits of the divergence.
      alpha: weight of the teacher, from 0 to 1. It may be traced.
      mask: None or [*rows]. Rows with 0 or False do not count. They may contain any
        numbers, also NaN. Positive numbers are weights of the mean. If no row counts,
        or if there is no row, the loss is 0 and its gradient is zero.
      divergence: "forward" is KL(teacher || student): the student learns to give
        probability to all classes that the teacher finds probable. "reverse" is
        KL(student || teacher): the student learns to give probability only to classes
        that the teacher finds probable. "jsd" is the generalized Jensen-Shannon
        divergence, `beta KL(teacher || m) + (1 - beta) KL(student || m)` with the
        mixture `m = beta teacher + (1 - beta) student`.
      beta: the weight of "jsd", between 0 and 1. Near 0, "jsd" behaves as "forward".
        Near 1, it behaves as "reverse". It may be traced.

    Returns:
      float32 scalar. It is NaN if a row that counts has a NaN. It is infinite if the
      student gives probability 0 (a logit of -inf) where the teacher does not. Under
      jit it is also NaN where the same call outside jit raises an error about values:
      a temperature, alpha or beta out of range, a label outside the vocabulary, or a
      mask with a number that is negative or not finite.

    Raises:
      TypeError: the logits are not floats, the labels are not integers, or the
        temperature, alpha or beta is not one number.
      ValueError: the teacher has another vocabulary or other rows; the labels or the
        mask have another shape; a label that counts is outside the vocabulary; the mask
        has a number that is negative or not finite; the temperature, alpha or beta is
        out of range; the divergence is unknown; there is no class.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> student, teacher = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 2.0]])
      >>> kd = jaxq.distillation.kd_loss
      >>> float(kd(teacher, teacher))
      0.0
      >>> labels, mask = jnp.array([1]), jnp.array([True])
      >>> loss = kd(student, teacher, labels, temperature=2.0, alpha=0.7, mask=mask)
      >>> round(float(loss), 3)
      1.932
      >>> jax.grad(kd, argnums=1)(student, teacher).tolist()
      [[0.0, 0.0]]

    References:
      Hinton et al., 2015; Gu et al., MiniLLM, 2023; Agarwal et al., GKD, 2023, eq. 1.
    """
    student = _logits(student_logits, "kd_loss", "student_logits")
    if divergence not in DIVERGENCES:
        names = ", ".join(map(repr, DIVERGENCES))
        raise ValueError(f"kd_loss: divergence is {divergence!r}; expected {names}.")
    temperature, alpha, beta = _checked_numbers(temperature, alpha, beta)
    rows = student.shape[:-1]
    weights = row_weights(mask, rows, "kd_loss")
    student = clear_rows(student, weights)

    if isinstance(teacher_logits, TopK):
        _check_top_k_teacher(teacher_logits, student, temperature)
        log_p = clear_rows(teacher_logits.log_classes(), weights)
        log_q = teacher_logits.student_log_classes(student)
        pair = Pair.of_log_probs(lax.stop_gradient(log_p), log_q)
    else:
        teacher = _logits(teacher_logits, "kd_loss", "teacher_logits")
        _check_teacher(teacher, student)
        teacher = lax.stop_gradient(clear_rows(teacher, weights))
        pair = Pair.of_logits(teacher, student, temperature)

    values = alpha * temperature**2 * DIVERGENCES[divergence](pair, beta)  # [*rows]
    if labels is not None:
        label_loss = _cross_entropy(student, labels, weights, "kd_loss")
        values = values + (1 - alpha) * label_loss
    return mean_over_rows(values, weights)


def response_loss(logits: Any, tokens: Any, mask: Any) -> jax.Array:
    """Cross-entropy of the next token, on response tokens only.

    This is the loss of sequence-level distillation: the teacher writes responses, and
    the student learns to write them. `logits[:, i]` predict `tokens[:, i + 1]`. The
    prediction counts if `mask[:, i + 1]` is True. The loss is the mean over these
    predictions.

    Args:
      logits: float [b, t, vocab_size] of the student for `tokens`.
      tokens: int [b, t], prompts and responses.
      mask: [b, t], True for response tokens. `generate`, `response_mask` and
        `read_responses` make it. Positive numbers are weights. The first token of a
        row is never predicted.

    Returns:
      float32 scalar, in nats for each token. It is 0, with zero gradient, if the mask
      has no response token.

    Raises:
      TypeError: the logits are not floats, or the tokens are not integers.
      ValueError: the shapes do not fit; a token that counts is outside the vocabulary;
        the mask has a number that is negative or not finite. Under jit, the loss is NaN
        in the last two cases.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> tokens = jnp.array([[5, 6, 7]])
      >>> mask = jnp.array([[False, False, True]])
      >>> logits = jnp.zeros((1, 3, 8))
      >>> round(float(jaxq.distillation.response_loss(logits, tokens, mask)), 4)
      2.0794

    References:
      Kim and Rush, Sequence-Level Knowledge Distillation, 2016, section 3.2.
    """
    student = _logits(logits, "response_loss", "logits")
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    expected = student.shape[:-1]
    if len(expected) != 2 or tokens.shape != expected or mask.shape != expected:
        raise ValueError(
            f"response_loss: logits is {described(student)}, tokens "
            f"{described(tokens)}, mask {described(mask)}; expected "
            "[b, t, vocab_size], [b, t] and [b, t]. Pass whole rows: response_loss "
            "itself shifts them by one token."
        )
    student, tokens = student[:, :-1], tokens[:, 1:]
    weights = row_weights(mask[:, 1:], tokens.shape, "response_loss")
    student = clear_rows(student, weights)
    values = _cross_entropy(student, tokens, weights, "response_loss")
    return mean_over_rows(values, weights)


def _cross_entropy(
    logits: jax.Array, labels: Any, weights: jax.Array | None, caller: str
) -> jax.Array:
    """`-log softmax(logits)[label]`, [*rows]. It is NaN for an impossible label.

    Args:
      logits: float32 [*rows, vocab_size].
      labels: integers [*rows].
      weights: [*rows] or None. Labels of rows with weight 0 are not read.
      caller: the public function, for errors.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{caller}: labels is {described(labels)}; expected integers. For soft "
            "labels, pass their logarithms as teacher_logits."
        )
    rows, vocab_size = logits.shape[:-1], logits.shape[-1]
    if labels.shape != rows:
        raise ValueError(
            f"{caller}: labels is {described(labels)}; expected one label for each row "
            f"of {described(logits)}, {list(rows)}."
        )
    counts = jnp.ones(rows, bool) if weights is None else weights > 0
    labels = jnp.where(counts, labels, jnp.zeros((), labels.dtype))
    is_class = (labels >= 0) & (labels < vocab_size)
    if not is_traced(is_class) and not bool(is_class.all()):
        wrong = int(labels[~is_class][0])
        raise ValueError(
            f"{caller}: a label is {wrong}, but the classes are 0 to {vocab_size - 1}. "
            "If it marks rows to leave out, pass mask=labels >= 0."
        )
    log_probs = jax.nn.log_softmax(logits)
    safe = jnp.where(is_class, labels, jnp.zeros((), labels.dtype))
    picked = jnp.take_along_axis(log_probs, safe[..., None], axis=-1).squeeze(-1)
    return jnp.where(is_class, -picked, jnp.nan)


# Checks.


def _checked_numbers(temperature: Any, alpha: Any, beta: Any) -> tuple[Any, Any, Any]:
    """The three numbers. A traced number outside its range becomes NaN."""
    temperature = number(
        temperature,
        "temperature",
        "kd_loss",
        is_positive,
        "it must be positive and finite. For hard labels of the teacher, pass "
        "labels=teacher_logits.argmax(-1) and alpha=0.",
    )
    alpha = number(
        alpha,
        "alpha",
        "kd_loss",
        lambda alpha: (alpha >= 0) & (alpha <= 1),
        "it is the weight of the teacher, from 0 to 1.",
    )
    beta = number(
        beta,
        "beta",
        "kd_loss",
        lambda beta: (beta > 0) & (beta < 1),
        "it must lie between 0 and 1. The limits are "
        'divergence="forward" (beta 0) and divergence="reverse" (beta 1).',
    )
    return temperature, alpha, beta


def _logits(logits: Any, caller: str, name: str) -> jax.Array:
    """The logits in float32."""
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating) or logits.ndim == 0:
        raise TypeError(
            f"{caller}: {name} is {described(logits)}; expected float logits "
            "[..., vocab_size]."
        )
    if logits.shape[-1] == 0:
        raise ValueError(
            f"{caller}: {name} is {described(logits)} and has no class. The last axis "
            "is that of the classes."
        )
    return logits.astype(jnp.float32)


def _check_teacher(teacher: jax.Array, student: jax.Array) -> None:
    if teacher.shape == student.shape:
        return
    given = (
        f"kd_loss: student_logits is {described(student)}, teacher_logits "
        f"{described(teacher)}."
    )
    num_student, num_teacher = student.shape[-1], teacher.shape[-1]
    if num_student == num_teacher:
        raise ValueError(f"{given} Pass logits of the same rows.")
    raise ValueError(f"{given} {_another_vocabulary(num_student, num_teacher)}")


def _check_top_k_teacher(top: TopK, student: jax.Array, temperature: Any) -> None:
    if is_traced(temperature) or temperature != top.temperature:
        shown = "traced" if is_traced(temperature) else temperature
        raise ValueError(
            f"kd_loss: temperature is {shown}, but the teacher's TopK was made at "
            f"temperature {top.temperature}. The tail at another temperature is not "
            f"known. Pass temperature={top.temperature} or make another TopK."
        )
    if top.vocab_size != student.shape[-1]:
        raise ValueError(
            f"kd_loss: student_logits is {described(student)}, but the teacher's TopK "
            f"has {top.vocab_size} classes. "
            f"{_another_vocabulary(student.shape[-1], top.vocab_size)}"
        )
    if top.log_tail.shape != student.shape[:-1]:
        raise ValueError(
            f"kd_loss: student_logits is {described(student)}, but the teacher's TopK "
            f"has rows {list(top.log_tail.shape)}. Pass logits of the same rows."
        )


def _another_vocabulary(num_student: int, num_teacher: int) -> str:
    smaller = min(num_student, num_teacher)
    return (
        f"The vocabularies have {num_student} and {num_teacher} entries. If the larger "
        f"one is padded, slice it: logits[..., :{smaller}]. If the tokenizers differ, "
        "train on text that the teacher writes, with responder and write_responses."
    )
