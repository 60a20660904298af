"""TopK, and kd_loss with it, against float64 numpy and the whole distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxq.distillation import TopK, kd_loss
from tests.arrays import assert_close, normal
from tests.distillation.test_losses import divergence64

STUDENT = 2 * normal(4, 11, seed=1)
TEACHER = 2 * normal(4, 11, seed=2)


def coarse64(logits, indices, temperature):
    """Log-probabilities of the k classes, and of all others together."""
    p = scipy.special.softmax(np.float64(logits) / temperature, -1)
    kept = np.take_along_axis(p, np.asarray(indices), -1)
    return np.log(np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1))


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_against_float64(k, temperature):
    top = TopK.from_logits(TEACHER, k, temperature=temperature)
    order = np.argsort(-np.asarray(TEACHER), axis=-1)[:, :k]
    np.testing.assert_array_equal(top.indices, order)
    log_p = coarse64(TEACHER, order, temperature)
    assert_close(top.log_classes(), log_p)
    log_q = coarse64(STUDENT, order, temperature)
    assert_close(top.student_log_classes(STUDENT), log_q)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    loss = kd_loss(STUDENT, top, temperature=temperature, alpha=0.7)
    assert float(loss) == pytest.approx(0.7 * temperature**2 * kl, rel=1e-5)
    # Data processing: joining classes cannot increase the divergence.
    whole = kd_loss(STUDENT, TEACHER, temperature=temperature, alpha=0.7)
    assert float(loss) <= float(whole) * (1 + 1e-6)


@pytest.mark.parametrize("temperature", [0.5, 100.0, 1e4])
@pytest.mark.parametrize(
    ("name", "beta"), [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
)
def test_divergences_at_high_temperatures(name, beta, temperature):
    top = TopK.from_logits(TEACHER, 3, temperature=temperature)
    log_p, log_q = (coarse64(x, top.indices, temperature) for x in (TEACHER, STUDENT))
    expected = temperature**2 * divergence64(log_p, log_q, name, beta).mean()
    loss = kd_loss(
        STUDENT, top, temperature=temperature, alpha=1.0, divergence=name, beta=beta
    )
    # The log-probabilities are float32. At 1e4 their ratio has about four digits.
    assert float(loss) == pytest.approx(expected, rel=max(1e-5, 1e-7 * temperature))


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
def test_all_classes_give_the_whole_loss(name):
    top = TopK.from_logits(TEACHER, 11)
    labels, mask = jnp.array([1, 2, 3, 4]), jnp.array([1, 0, 1, 1])

    def loss(student, teacher):
        return kd_loss(student, teacher, labels, mask=mask, divergence=name)

    assert_close(
        jax.value_and_grad(loss)(STUDENT, top),
        jax.value_and_grad(loss)(STUDENT, TEACHER),
    )


def test_gradient():
    top = TopK.from_logits(TEACHER, 3, temperature=2.0)
    gradient = jax.grad(lambda x: kd_loss(x, top, alpha=1.0))(STUDENT)
    # T (q - p'), where p' spreads the tail as the student does.
    q = scipy.special.softmax(np.float64(STUDENT) / 2, -1)
    p = q * np.exp(
        coarse64(TEACHER, top.indices, 2)[:, -1:]
        - coarse64(STUDENT, top.indices, 2)[:, -1:]
    )
    kept = np.exp(coarse64(TEACHER, top.indices, 2)[:, :-1])
    np.put_along_axis(p, np.asarray(top.indices), kept, -1)
    assert_close(gradient, 2 * (q - p) / 4)


def test_a_tail_far_below_float32_rounding():
    # 1 minus the probability of the first class would round to 0.
    teacher = jnp.array([[50.0, 0.0, 0.0]])
    top = TopK.from_logits(teacher, 1, temperature=1.0)
    assert float(top.log_tail[0]) == pytest.approx(-50 + np.log(2), rel=1e-6)
    loss, gradient = jax.value_and_grad(kd_loss)(-teacher, top, temperature=1.0)
    assert np.isfinite(float(loss))
    assert np.isfinite(np.asarray(gradient)).all()


def test_bfloat16_logits_and_rows_that_do_not_count():
    large = jnp.array([[3e4, -3e4, 0, 1], [1, 2, 3, jnp.nan]], jnp.bfloat16)
    top = TopK.from_logits(large, 2)
    mask = jnp.array([True, False])
    loss, gradient = jax.value_and_grad(kd_loss)(-large, top, mask=mask)
    assert np.isfinite(float(loss))
    assert np.isfinite(np.float32(gradient)).all()


def test_under_jit():
    top = TopK.from_logits(TEACHER, 3)
    loss = jax.jit(kd_loss)(STUDENT, top)
    assert float(loss) == pytest.approx(float(kd_loss(STUDENT, top)), rel=1e-6)


@pytest.mark.parametrize(
    ("student", "temperature", "message"),
    [
        (STUDENT[:, :9], 2.0, "TopK has 11 classes.*slice it"),
        (STUDENT[:2], 2.0, "rows [4]"),
        (STUDENT, 1.0, "Pass temperature=2.0"),
    ],
)
def test_a_student_that_does_not_fit(student, temperature, message):
    top = TopK.from_logits(TEACHER, 3)
    with pytest.raises(ValueError) as error:
        kd_loss(student, top, temperature=temperature)
    for part in message.split(".*"):
        assert part in str(error.value)


def test_bad_arguments():
    with pytest.raises(ValueError, match="k is 12.*Pass k=11 or less"):
        TopK.from_logits(TEACHER, 12)
    with pytest.raises(ValueError, match="k is 0"):
        TopK.from_logits(TEACHER, 0)
    for temperature in (0, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"temperature is {temperature}; it must"):
            TopK.from_logits(TEACHER, 2, temperature=temperature)
    with pytest.raises(TypeError, match="temperature is 'a'"):
        TopK.from_logits(TEACHER, 2, temperature="a")
    with pytest.raises(TypeError, match="temperature is traced"):
        jax.jit(lambda t: TopK.from_logits(TEACHER, 2, temperature=t))(2.0)
    with pytest.raises(TypeError, match=r"k is 2.0; expected an integer"):
        TopK.from_logits(TEACHER, 2.0)
    with pytest.raises(TypeError, match=r"k is traced \(int32\[\]\)"):
        jax.jit(lambda k: TopK.from_logits(TEACHER, k))(2)
    with pytest.raises(TypeError, match="logits is int32"):
        TopK.from_logits(jnp.ones((2, 3), int), 2)
