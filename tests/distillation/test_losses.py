"""kd_loss and response_loss against float64 numpy, torch, optax and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jaxq.distillation import kd_loss, response_loss
from tests.arrays import assert_close, normal

ROWS, CLASSES = (2, 3), 7
STUDENT = 3 * normal(*ROWS, CLASSES, seed=1)
TEACHER = 3 * normal(*ROWS, CLASSES, seed=2)
LABELS = jnp.array([[0, 6, 2], [3, 3, 1]])
MASK = jnp.array([[True, True, False], [True, False, True]])
BAD_MASK = jnp.array([[1.0, 1, -1], [1, 1, 1]])
DIVERGENCES = ["forward", "reverse", "jsd"]


def kl64(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def divergence64(log_p, log_q, name, beta):
    if name == "forward":
        return kl64(log_p, log_q)
    if name == "reverse":
        return kl64(log_q, log_p)
    log_m = np.log(beta * np.exp(log_p) + (1 - beta) * np.exp(log_q))
    return beta * kl64(log_p, log_m) + (1 - beta) * kl64(log_q, log_m)


def kd64(student, teacher, labels, temperature, alpha, weights, name, beta):
    """kd_loss, straight from its definition."""
    student, teacher = np.float64(student), np.float64(teacher)
    log_q = scipy.special.log_softmax(student / temperature, axis=-1)
    log_p = scipy.special.log_softmax(teacher / temperature, axis=-1)
    values = alpha * temperature**2 * divergence64(log_p, log_q, name, beta)
    if labels is not None:
        log_probs = scipy.special.log_softmax(student, axis=-1)
        index = np.asarray(labels)[..., None]
        picked = np.take_along_axis(log_probs, index, axis=-1)[..., 0]
        values = values - (1 - alpha) * picked
    return np.average(values, weights=weights)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    ("labels", "mask", "temperature", "alpha", "beta"),
    [
        (LABELS, MASK, 2.0, 0.7, 0.5),
        (None, None, 1.0, 0.5, 0.1),
        (LABELS, jnp.array([[0.5, 2, 0], [1, 0, 3]]), 4.0, 0.25, 0.9),
        (None, None, 0.5, 0.5, 0.5),
        (None, MASK, 100.0, 0.5, 0.01),
        (None, None, 1e4, 1.0, 0.5),
        (None, None, 1e4, 1.0, 0.9),
        (LABELS, MASK, 1e5, 1.0, 0.999),
    ],
)
def test_against_float64(name, labels, mask, temperature, alpha, beta):
    loss = kd_loss(
        STUDENT,
        TEACHER,
        labels,
        temperature=temperature,
        alpha=alpha,
        mask=mask,
        divergence=name,
        beta=beta,
    )
    weights = None if mask is None else np.asarray(mask, np.float64)
    expected = kd64(STUDENT, TEACHER, labels, temperature, alpha, weights, name, beta)
    assert loss.dtype == jnp.float32
    assert loss.shape == ()
    # At high temperatures all numbers are nearly equal, and the last bits of the
    # exponentials, which differ between machines, reach 1e-5.
    assert float(loss) == pytest.approx(expected, rel=2e-5)


def test_against_torch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    student, teacher = (torch.tensor(np.asarray(x)) for x in (STUDENT, TEACHER))
    student.requires_grad_()
    kl = functional.kl_div(
        functional.log_softmax(student.reshape(-1, CLASSES) / 2, dim=-1),
        functional.log_softmax(teacher.reshape(-1, CLASSES) / 2, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    labels = torch.tensor(np.asarray(LABELS)).reshape(-1).long()
    hard = functional.cross_entropy(student.reshape(-1, CLASSES), labels)
    expected = 0.7 * 4 * kl + 0.3 * hard
    expected.backward()
    loss, gradient = jax.value_and_grad(kd_loss)(STUDENT, TEACHER, LABELS, alpha=0.7)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_close(gradient, student.grad.numpy())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_gradient_is_temperature_times_the_difference_of_probabilities(temperature):
    def loss(student):
        return kd_loss(student, TEACHER, temperature=temperature, alpha=0.7, mask=MASK)

    p_s, p_t = (
        scipy.special.softmax(np.float64(logits) / temperature, axis=-1)
        for logits in (STUDENT, TEACHER)
    )
    counts = np.asarray(MASK, np.float64)[..., None]
    expected = 0.7 * temperature * (p_s - p_t) * counts / counts.sum()
    gradient = jax.grad(loss)(STUDENT)
    assert_close(gradient, expected)
    assert_close(gradient.sum(-1) + 1, np.ones(ROWS), 1e-6)


def test_gradient_of_the_labels():
    gradient = jax.grad(kd_loss)(STUDENT, TEACHER, LABELS, alpha=0.25, mask=MASK)
    p_t, p_s = (
        scipy.special.softmax(np.float64(x) / 2, -1) for x in (TEACHER, STUDENT)
    )
    hard = scipy.special.softmax(np.float64(STUDENT), -1) - np.eye(CLASSES)[LABELS]
    counts = np.asarray(MASK, np.float64)[..., None]
    expected = (0.25 * 2 * (p_s - p_t) + 0.75 * hard) * counts / counts.sum()
    assert_close(gradient, expected)


def gradient64(log_p, log_q, temperature, name, beta):
    """The gradient of `temperature^2 * divergence` with respect to the student."""
    p, q = np.exp(log_p), np.exp(log_q)
    if name == "forward":
        return temperature * (q - p)
    # The other two are weighted KL(q || m). A class of m moves it by its own KL only.
    weight, log_m = 1.0, log_p
    if name == "jsd":
        weight, log_m = 1 - beta, np.log(beta * p + (1 - beta) * q)
    kl = kl64(log_q, log_m)[..., None]
    return temperature * weight * q * (log_q - log_m - kl)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 100.0, 1e4])
@pytest.mark.parametrize(
    ("name", "beta"), [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
)
def test_gradients_against_float64(name, beta, temperature):
    def loss(student):
        return kd_loss(
            student,
            TEACHER,
            temperature=temperature,
            alpha=1.0,
            divergence=name,
            beta=beta,
        )

    log_q, log_p = (
        scipy.special.log_softmax(np.float64(x) / temperature, -1)
        for x in (STUDENT, TEACHER)
    )
    expected = gradient64(log_p, log_q, temperature, name, beta) / LABELS.size
    assert_close(jax.grad(loss)(STUDENT), expected)


def test_gradient_at_a_high_temperature_matches_logits():
    # Hinton et al., 2015, eq. 4: (z_s - z_t) / classes for centred logits.
    def loss(student):
        return kd_loss(student, TEACHER, temperature=1e5, alpha=1.0)

    centred = [x - x.mean(-1, keepdims=True) for x in (STUDENT, TEACHER)]
    expected = (centred[0] - centred[1]) / CLASSES / LABELS.size
    assert_close(jax.grad(loss)(STUDENT), expected, 1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_for_equal_distributions_only(name):
    def loss(student):
        return kd_loss(student, TEACHER, alpha=1.0, divergence=name)

    shift = jnp.array([[[100.0], [-3.0], [0.5]]])
    assert float(loss(TEACHER)) == 0
    value, gradient = jax.value_and_grad(loss)(TEACHER + shift)
    assert 0 <= float(value) < 1e-5
    assert float(jnp.abs(gradient).max()) < 1e-5
    assert float(loss(TEACHER.at[0, 0, 0].add(0.5))) > 1e-4
    assert float(loss(STUDENT + shift)) == pytest.approx(float(loss(STUDENT)), rel=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_never_negative(name):
    # Rounding of nearly equal distributions gives sums on both sides of 0.
    teacher = jnp.broadcast_to(TEACHER[:1, 0], (200, 1, CLASSES))
    student = teacher + 1e-4 * normal(200, 1, CLASSES, seed=3)
    loss = jax.vmap(lambda s, t: kd_loss(s, t, alpha=1.0, divergence=name))
    assert float(loss(student, teacher).min()) >= 0


def test_one_hot_teacher_is_cross_entropy():
    teacher = jnp.where(jax.nn.one_hot(LABELS, CLASSES) > 0, 0.0, -jnp.inf)
    expected = optax.softmax_cross_entropy_with_integer_labels(STUDENT, LABELS).mean()

    def loss(student):
        return kd_loss(student, teacher, temperature=1.0, alpha=1.0)

    value, gradient = jax.value_and_grad(loss)(STUDENT)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    probabilities = scipy.special.softmax(np.float64(STUDENT), -1)
    assert_close(gradient, (probabilities - np.eye(CLASSES)[LABELS]) / LABELS.size)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_gradient_reaches_the_teacher(name):
    gradient = jax.grad(
        lambda teacher: kd_loss(STUDENT, teacher, LABELS, divergence=name)
    )(TEACHER)
    assert not np.any(np.asarray(gradient))


def test_jensen_shannon_lies_between_the_two_divergences():
    def loss(name, beta=0.5):
        return float(kd_loss(STUDENT, TEACHER, alpha=1.0, divergence=name, beta=beta))

    near = 1e-4
    assert loss("jsd", near) / near == pytest.approx(loss("forward"), rel=1e-2)
    assert loss("jsd", 1 - near) / near == pytest.approx(loss("reverse"), rel=1e-2)
    swapped = kd_loss(TEACHER, STUDENT, alpha=1.0, divergence="jsd")
    assert loss("jsd") == pytest.approx(float(swapped), rel=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_large_bfloat16_logits(name):
    student = jnp.array([[3e4, -3e4, 0], [0, 3e4, -3e4]], jnp.bfloat16)
    teacher = jnp.array([[-3e4, 3e4, 0], [0, 3e4, -3e4]], jnp.bfloat16)
    value, gradient = jax.value_and_grad(kd_loss)(
        student, teacher, jnp.array([1, 1]), divergence=name
    )
    wide = [np.float64(x) for x in (student, teacher)]
    q, p = (scipy.special.softmax(x / 2, -1) for x in wide)
    assert np.isfinite(float(value))
    assert np.isfinite(np.float32(gradient)).all()
    if name == "forward":
        hard = scipy.special.softmax(wide[0], -1) - np.eye(3)[[1, 1]]
        assert_close(np.float32(gradient), (0.5 * 2 * (q - p) + 0.5 * hard) / 2, 1e-2)
        # log p and -log q are 0 and 3e4 in row 0, and both are 0 in row 1.
        assert float(value) == pytest.approx((0.5 * 4 * 3e4 + 0.5 * 6e4) / 2, rel=1e-2)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_classes_that_both_exclude(name):
    student, teacher = (x.at[..., 2].set(-jnp.inf) for x in (STUDENT, TEACHER))
    kept = [jnp.delete(x, 2, axis=-1) for x in (STUDENT, TEACHER)]

    def loss(student, teacher):
        return kd_loss(student, teacher, divergence=name)

    value, gradient = jax.value_and_grad(loss)(student, teacher)
    expected, kept_gradient = jax.value_and_grad(loss)(*kept)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert not np.any(np.asarray(gradient[..., 2]))
    assert_close(jnp.delete(gradient, 2, axis=-1), kept_gradient)


def test_a_class_that_only_the_student_excludes():
    student = STUDENT.at[0, 0, 2].set(-jnp.inf)
    assert float(kd_loss(student, TEACHER)) == np.inf
    q, p = (
        scipy.special.softmax(np.float64(x) / 2, axis=-1) for x in (student, TEACHER)
    )
    m = (p + q) / 2
    jsd = (scipy.special.rel_entr(p, m) + scipy.special.rel_entr(q, m)) / 2
    expected = {"reverse": scipy.special.rel_entr(q, p), "jsd": jsd}
    for name, terms in expected.items():
        value, gradient = jax.value_and_grad(kd_loss)(
            student, TEACHER, alpha=1.0, divergence=name
        )
        assert float(value) == pytest.approx(4 * terms.sum(-1).mean(), rel=1e-5)
        assert np.isfinite(np.asarray(gradient)).all()


# Masks and NaN.


@pytest.mark.parametrize("name", DIVERGENCES)
def test_rows_that_do_not_count_may_hold_anything(name):
    nan_rows = jnp.where(MASK[..., None], 0.0, jnp.nan)

    def loss(student, teacher, labels):
        return kd_loss(student, teacher, labels, mask=MASK, divergence=name)

    expected = jax.value_and_grad(loss)(STUDENT, TEACHER, LABELS)
    labels = jnp.where(MASK, LABELS, -100)
    value = jax.value_and_grad(loss)(STUDENT + nan_rows, TEACHER + nan_rows, labels)
    assert_close(value, expected, 0)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_mask_of_everything_gives_zero_loss_and_gradient(transform):
    @transform
    def loss_and_gradient(student, mask):
        return jax.value_and_grad(
            lambda student: kd_loss(student, TEACHER, LABELS, mask=mask)
        )(student)

    value, gradient = loss_and_gradient(STUDENT, jnp.zeros(ROWS, bool))
    assert float(value) == 0
    assert not np.any(np.asarray(gradient))


@pytest.mark.parametrize("mask", [None, jnp.zeros(0, bool)])
def test_no_rows(mask):
    student, teacher, labels = jnp.zeros((0, 5)), jnp.ones((0, 5)), jnp.zeros(0, int)
    value, gradient = jax.value_and_grad(kd_loss)(student, teacher, labels, mask=mask)
    assert float(value) == 0
    assert gradient.shape == (0, 5)
    tokens = jnp.zeros((2, 1), int)
    assert float(response_loss(jnp.zeros((2, 1, 5)), tokens, tokens)) == 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_nan_in_a_row_that_counts_gives_nan(name):
    for student, teacher in (
        (STUDENT.at[0, 0, 1].set(jnp.nan), TEACHER),
        (STUDENT, TEACHER.at[0, 0, 1].set(jnp.nan)),
    ):
        loss = kd_loss(student, teacher, mask=MASK, divergence=name)
        assert np.isnan(float(loss))


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_logits": TEACHER[..., :5]}, "slice it: logits[..., :5]"),
        ({"teacher_logits": TEACHER[:1]}, "Pass logits of the same rows"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf; it must be positive and"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"mask": MASK[:, 1:]}, "mask is bool[2,2]; expected one number"),
        (
            {"mask": BAD_MASK},
            "kd_loss: mask[0, 2] is -1.0; the weight of a row must be",
        ),
        ({"mask": BAD_MASK * jnp.nan}, "mask[0, 0] is nan"),
        ({"mask": jnp.full(ROWS, jnp.inf)}, "mask[0, 0] is inf"),
        ({"student_logits": STUDENT[..., :0]}, "student_logits is float32[2,3,0] and"),
        ({"divergence": "kl"}, "expected 'forward', 'reverse', 'jsd'"),
        ({"divergence": "jsd", "beta": 1.0}, "beta is 1.0"),
        ({"labels": LABELS[0]}, "labels is int32[3]; expected one label"),
        ({"labels": LABELS.at[0, 0].set(-100)}, "mask=labels >= 0"),
        ({"labels": LABELS + 1}, "a label is 7, but the classes are 0 to 6"),
    ],
)
def test_bad_values(change, message):
    arguments = {"student_logits": STUDENT, "teacher_logits": TEACHER} | change
    with pytest.raises(ValueError) as error:
        kd_loss(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["temperature", "alpha", "beta"])
def test_numbers_of_other_types(name):
    for value in ("a", None, jnp.ones(3)):
        with pytest.raises(TypeError, match=f"kd_loss: {name} is .*; expected one"):
            kd_loss(STUDENT, TEACHER, **{name: value})
    # A numpy or jax scalar is a number.
    value = kd_loss(STUDENT, TEACHER, **{name: jnp.asarray(0.25)})
    assert float(value) == float(kd_loss(STUDENT, TEACHER, **{name: np.float16(0.25)}))


def test_bad_types():
    with pytest.raises(TypeError, match="student_logits is int32"):
        kd_loss(LABELS, TEACHER)
    with pytest.raises(TypeError, match="labels is float32.*as teacher_logits"):
        kd_loss(STUDENT, TEACHER, STUDENT[..., 0])


def test_schedules_are_traced_once():
    traces = []

    @jax.jit
    def loss(labels, mask, **numbers):
        traces.append(1)
        return kd_loss(STUDENT, TEACHER, labels, mask=mask, divergence="jsd", **numbers)

    numbers = {"temperature": 2.0, "alpha": 0.7, "beta": 0.25}
    mask = jnp.ones(ROWS)
    for change in ({}, {"temperature": 4.0, "alpha": 0.1}, {"beta": 0.9}):
        expected = kd_loss(
            STUDENT, TEACHER, LABELS, divergence="jsd", **(numbers | change)
        )
        value = loss(LABELS, mask, **(numbers | change))
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
    # Values that raise outside jit give NaN here.
    for change in (
        {"temperature": 0.0},
        {"temperature": np.inf},
        {"alpha": 1.5},
        {"beta": 1.0},
    ):
        assert np.isnan(float(loss(LABELS, mask, **(numbers | change))))
    assert np.isnan(float(loss(LABELS.at[0, 0].set(-100), mask, **numbers)))
    assert np.isnan(float(loss(LABELS, BAD_MASK, **numbers)))
    assert len(traces) == 1


def test_a_mask_that_jit_closes_over():
    expected = kd_loss(STUDENT, TEACHER, LABELS, mask=MASK)
    for mask in (MASK, MASK.astype(jnp.float32), np.asarray(MASK)):
        loss = jax.jit(lambda x, mask=mask: kd_loss(x, TEACHER, LABELS, mask=mask))
        assert float(loss(STUDENT)) == pytest.approx(float(expected), rel=1e-6)


def test_with_x64():
    tokens, mask = LABELS, MASK
    losses = {
        "kd": lambda: kd_loss(STUDENT, TEACHER, LABELS, mask=MASK, divergence="jsd"),
        "response": lambda: response_loss(STUDENT, tokens, mask),
    }
    expected = {name: loss() for name, loss in losses.items()}
    with jax.enable_x64(True):
        for name, loss in losses.items():
            value = loss()
            assert value.dtype == jnp.float32
            assert float(value) == pytest.approx(float(expected[name]), rel=1e-6)
        wide = jnp.asarray(np.float64(STUDENT))
        gradient = jax.grad(lambda x: kd_loss(x, TEACHER, np.asarray(LABELS)))(wide)
        assert gradient.dtype == jnp.float64
        assert_close(gradient, jax.grad(kd_loss)(STUDENT, TEACHER, LABELS))


# response_loss.


def test_response_loss_counts_the_predictions_of_response_tokens():
    logits = 2 * normal(2, 4, CLASSES)
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 0, 1]])
    mask = jnp.array([[False, False, True, True], [False, True, False, False]])
    log_probs = scipy.special.log_softmax(np.float64(logits), -1)
    # Token 3 of row 0 is predicted at position 1, and so on.
    expected = -(log_probs[0, 1, 3] + log_probs[0, 2, 4] + log_probs[1, 0, 6]) / 3
    value, gradient = jax.value_and_grad(response_loss)(logits, tokens, mask)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    has_gradient = np.abs(np.asarray(gradient)).sum(-1) > 0
    assert has_gradient.tolist() == [[False, True, True, False], [True] + [False] * 3]


def test_response_loss_without_responses():
    logits, tokens = normal(1, 3, CLASSES), jnp.array([[1, 2, 3]])
    # The first token is never predicted.
    mask = jnp.array([[True, False, False]])
    value, gradient = jax.value_and_grad(response_loss)(logits, tokens, mask)
    assert float(value) == 0
    assert not np.any(np.asarray(gradient))


def test_response_loss_of_shifted_arrays():
    logits, tokens = normal(1, 3, CLASSES), jnp.array([[1, 2, 3]])
    with pytest.raises(ValueError, match="Pass whole rows"):
        response_loss(logits[:, :-1], tokens[:, 1:], jnp.ones((1, 3), bool))
    with pytest.raises(ValueError, match="a label is 9"):
        response_loss(logits, tokens * 3, jnp.ones((1, 3), bool))
