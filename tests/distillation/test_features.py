"""Feature and attention losses against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.distillation import attention_loss, feature_loss, kd_loss, projection
from tests.arrays import assert_close, normal

STUDENT, TEACHER = normal(2, 3, 4, seed=1), normal(2, 3, 6, seed=2)
MAPS = normal(2, 2, 3, 3, seed=3)
WEIGHTS = jnp.array([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0]])
MASK = jnp.array([[True, True, False], [True, False, False]])


def test_projected_features_and_their_gradients():
    matrix = projection(jax.random.key(0), 4, 6)
    value, gradients = jax.value_and_grad(feature_loss, argnums=(0, 1, 2))(
        STUDENT, TEACHER, matrix, mask=MASK
    )
    x, y, w = np.float64(STUDENT), np.float64(TEACHER), np.float64(matrix)
    counts = np.asarray(MASK, np.float64)[..., None]
    error = (x @ w - y) * counts  # [b, t, d_t]
    size = counts.sum() * 6
    assert float(value) == pytest.approx((error**2).sum() / size, rel=1e-5)
    expected = (
        2 * error @ w.T / size,
        np.zeros(y.shape),
        2 * np.einsum("bti,bto->io", x, error) / size,
    )
    assert_close(gradients, expected)


def test_cosine_distance():
    y = TEACHER[..., :4]
    value = feature_loss(3 * STUDENT, y, mask=MASK, distance="cosine")
    x64, y64 = np.float64(STUDENT), np.float64(y)
    cosine = (x64 * y64).sum(-1) / (
        np.linalg.norm(x64, axis=-1) * np.linalg.norm(y64, axis=-1)
    )
    assert float(value) == pytest.approx((1 - cosine)[np.asarray(MASK)].mean(), 1e-5)
    zeros = jnp.zeros((2, 4))
    value, gradient = jax.value_and_grad(feature_loss)(
        zeros, zeros + 1, distance="cosine"
    )
    assert float(value) == 1
    assert np.isfinite(np.asarray(gradient)).all()


def test_projection_keeps_the_size_of_features():
    matrix = projection(jax.random.key(0), 400, 300)
    assert matrix.dtype == jnp.float32
    outputs = normal(50, 400) @ matrix
    assert float(outputs.std()) == pytest.approx(1, abs=0.05)


def test_rows_that_do_not_count_may_hold_nan():
    nan_rows = jnp.where(MASK[..., None], 0.0, jnp.nan)
    matrix = projection(jax.random.key(0), 4, 6)
    loss = jax.value_and_grad(lambda *x: feature_loss(*x, mask=MASK), argnums=(0, 2))
    actual = loss(STUDENT + nan_rows, TEACHER + nan_rows, matrix)
    assert_close(actual, loss(STUDENT, TEACHER, matrix), 0)
    value, gradients = jax.value_and_grad(
        lambda x, w: feature_loss(x, TEACHER, w, mask=MASK & False), argnums=(0, 1)
    )(STUDENT, matrix)
    assert float(value) == 0
    assert not any(np.any(np.asarray(gradient)) for gradient in gradients)


def test_attention_maps_of_the_real_tokens():
    student, teacher = normal(2, 2, 3, 3, seed=3), normal(2, 4, 3, 3, seed=4)
    mix = normal(2, 4, seed=5)
    value = attention_loss(student, teacher, mix, mask=MASK)
    mixed = np.einsum("bhqk,hg->bgqk", np.float64(student), np.float64(mix))
    error = (mixed - np.float64(teacher)) ** 2
    pairs = np.asarray(MASK)[:, :, None] & np.asarray(MASK)[:, None, :]
    errors = [error[b, :, q, k] for b, q, k in np.argwhere(pairs)]
    assert len(errors) == 4 + 1
    assert float(value) == pytest.approx(np.mean(errors), rel=1e-5)
    gradient = jax.grad(attention_loss, argnums=1)(student, teacher, mix)
    assert not np.any(np.asarray(gradient))


def test_numbers_of_a_mask_are_weights():
    x, y, weights = np.float64(STUDENT), np.float64(TEACHER[..., :4]), WEIGHTS
    value = feature_loss(STUDENT, TEACHER[..., :4], mask=weights)
    expected = np.average(((x - y) ** 2).mean(-1), weights=np.asarray(weights))
    assert float(value) == pytest.approx(expected, rel=1e-5)
    # A pair of query and key has the product of their weights.
    other = normal(2, 2, 3, 3, seed=4)
    pairs = np.einsum("bq,bk->bqk", *[np.asarray(weights, np.float64)] * 2)
    errors = ((np.float64(MAPS) - np.float64(other)) ** 2).mean(1)
    expected = np.average(errors, weights=pairs)
    maps = jnp.where(pairs[:, None] > 0, MAPS, jnp.nan)
    value, gradient = jax.value_and_grad(attention_loss)(maps, other, mask=weights)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("loss", [feature_loss, attention_loss])
def test_nan_and_bad_masks_under_jit(loss):
    arrays = (STUDENT, STUDENT + 1) if loss is feature_loss else (MAPS, MAPS + 1)
    compiled = jax.jit(loss)
    assert float(compiled(*arrays, mask=WEIGHTS)) == pytest.approx(1, rel=1e-6)
    assert np.isnan(compiled(*arrays, mask=WEIGHTS.at[1, 1].set(-1)))
    assert np.isnan(compiled(arrays[0].at[0].set(jnp.nan), arrays[1], mask=WEIGHTS))
    assert float(loss(arrays[0][:0], arrays[1][:0])) == 0


def test_with_x64():
    expected = attention_loss(MAPS, MAPS + 1, normal(2, 2), mask=MASK)
    with jax.enable_x64(True):
        matrix = projection(jax.random.key(0), 4, 6)
        value = feature_loss(STUDENT, TEACHER, matrix, mask=MASK, distance="cosine")
        assert matrix.dtype == value.dtype == jnp.float32
        value = attention_loss(MAPS, MAPS + 1, normal(2, 2), mask=MASK)
        assert float(value) == pytest.approx(float(expected), rel=1e-6)


def test_attention_scores_of_keys_that_are_not_read():
    causal = jnp.tril(jnp.ones((3, 3), bool))[None, None]
    scores = [jnp.where(causal, normal(1, 2, 3, 3, seed=i), -jnp.inf) for i in (1, 2)]
    value, gradient = jax.value_and_grad(attention_loss)(*scores)
    finite = [np.where(np.isinf(x), 0, np.float64(x)) for x in scores]
    expected = ((finite[0] - finite[1]) ** 2).mean()
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(np.asarray(gradient)).all()
    # MiniLM's loss of such scores.
    assert np.isfinite(float(kd_loss(*scores, temperature=1.0, alpha=1.0)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: feature_loss(STUDENT, TEACHER), "pass projection="),
        (lambda: feature_loss(STUDENT, TEACHER, jnp.ones((6, 4))), "expected [4, 6]"),
        (lambda: feature_loss(STUDENT, STUDENT, distance="l1"), "'mse' or 'cosine'"),
        (lambda: feature_loss(STUDENT, STUDENT, mask=MASK[0]), "mask is bool[3]"),
        (
            lambda: feature_loss(STUDENT, STUDENT, mask=WEIGHTS.at[1, 1].set(-1)),
            "feature_loss: mask[1, 1] is -1.0; the weight of a row must be",
        ),
        (lambda: feature_loss(jnp.float32(1), TEACHER), "no feature"),
        (lambda: feature_loss(STUDENT[..., :0], STUDENT[..., :0]), "no feature"),
        (
            lambda: attention_loss(MAPS, MAPS, mask=WEIGHTS.at[0, 2].set(jnp.nan)),
            "attention_loss: mask[0, 2] is nan",
        ),
        (
            lambda: attention_loss(MAPS, MAPS, jnp.ones((3, 2)), mask=MASK),
            "attention_loss: projection is float32[3,2]",
        ),
        (lambda: projection(jax.random.key(0), 0, 4), "projection: d_s is 0"),
        (lambda: attention_loss(STUDENT, STUDENT), "expected [b, heads, q, k]"),
        (
            lambda: attention_loss(normal(1, 2, 3, 3), normal(1, 4, 3, 3)),
            "projection(key, 2, 4)",
        ),
        (
            lambda: attention_loss(*[normal(2, 2, 3, 5)] * 2, mask=MASK),
            "slice the maps",
        ),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
