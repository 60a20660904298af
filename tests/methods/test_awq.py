"""AWQ: against its definition in float64, and never worse on the given tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerGroup, QuantSpec
from jaxq.methods._awq import _awq, awq, awq_scale
from tests import tables
from tests.arrays import assert_same

SPEC = QuantSpec("int4", PerGroup(16))
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((60, 48)).astype(np.float32)
X[:, [3, 20, 41]] *= 30
W = RANDOM.standard_normal((48, 10)).astype(np.float32)


def rounded(w, size=16, top=7):
    """int4 in groups along the input, float64."""
    blocks = np.asarray(w, np.float64).reshape(-1, size, w.shape[1])
    scale = abs(blocks).max(1, keepdims=True) / top
    scale = np.where(scale > 0, scale, 1)
    return (np.clip(np.rint(blocks / scale), -top, top) * scale).reshape(w.shape)


def scales(ratio):
    s = np.maximum(abs(X).mean(0, dtype=np.float64) ** ratio, 1e-4)
    return s / np.sqrt(s.max() * s.min())


def losses(weights, of_ratio, tokens=X, num=20):
    out = []
    for i in range(num):
        s = of_ratio(i / num)
        errors = [
            tokens.astype(np.float64) @ (rounded(w * s[:, None]) / s[:, None] - w)
            for w in weights
        ]
        out.append(np.mean(np.concatenate(errors, axis=1) ** 2))
    return np.asarray(out)


def output_error(qt, scale):
    """The error of the layer's output, with inputs divided by the scale."""
    y = (X / np.asarray(scale, np.float64)) @ np.asarray(
        jaxq.dequantize(qt), np.float64
    )
    return np.mean((y - X.astype(np.float64) @ W) ** 2)


def test_the_search_tries_the_scales_of_the_paper():
    s, info = awq_scale(W, X, SPEC)
    exact = losses([W], scales)
    # A tie in rounding may go either way.
    np.testing.assert_allclose(info.losses, exact, rtol=1e-3)
    best = int(np.argmin(exact))
    np.testing.assert_allclose(info.ratio, best / 20, atol=1e-6)
    np.testing.assert_allclose(s, scales(best / 20), rtol=1e-5)
    assert best > 0
    assert info.loss == info.losses.min()
    assert info.loss_unscaled == info.losses[0]


def test_weights_that_share_an_input_share_scales():
    parts = [W[:, :3], W[:, 3:] * np.float32(4)]
    s, info = awq_scale(parts, X, SPEC)
    np.testing.assert_allclose(info.losses, losses(parts, scales), rtol=1e-3)

    # The same with the loss of a block: here its outputs, in one array.
    def loss(candidates):
        y = jnp.asarray(X) @ (
            jnp.concatenate(candidates, axis=1) - jnp.concatenate(parts, axis=1)
        )
        return jnp.mean(y**2)

    block_scale, block_info = awq_scale(parts, X, SPEC, loss=loss)
    np.testing.assert_allclose(block_info.losses, info.losses, rtol=1e-4)
    np.testing.assert_array_equal(s, block_scale)


def test_duo_scales_depend_on_the_weights_too():
    share = abs(W).reshape(3, 16, 10) / abs(W).reshape(3, 16, 10).max(1, keepdims=True)
    mean = share.reshape(48, 10).mean(1, dtype=np.float64)

    def of_ratio(ratio):
        s = np.maximum(
            abs(X).mean(0, dtype=np.float64) ** ratio / (mean ** (1 - ratio) + 1e-4),
            1e-4,
        )
        return s / np.sqrt(s.max() * s.min())

    s, info = awq_scale(W, X, SPEC, duo=True)
    exact = losses([W], of_ratio)
    np.testing.assert_allclose(info.losses, exact, rtol=1e-3)
    np.testing.assert_allclose(s, of_ratio(np.argmin(exact) / 20), rtol=1e-4)
    np.testing.assert_allclose(info.loss_unscaled, losses([W], scales)[0], rtol=1e-3)
    assert info.loss <= info.loss_unscaled


PRESETS = ("uint4", "nvfp4")


@pytest.mark.parametrize("preset", tables.thinned(jaxq.presets(), PRESETS))
def test_never_worse_than_rounding_to_nearest(preset):
    qt, info = awq(W, X, preset)
    plain = jaxq.quantize(W, preset)
    assert jax.tree.structure(qt) == jax.tree.structure(plain)
    assert qt.dtype == W.dtype
    np.testing.assert_allclose(info.loss, output_error(qt, info.scale), rtol=1e-3)
    np.testing.assert_allclose(
        info.loss_unscaled, output_error(plain, np.ones(48)), rtol=1e-3
    )
    assert info.loss <= info.loss_unclipped <= info.loss_unscaled


def test_protects_the_channels_that_matter():
    _, info = awq(W, X, SPEC)
    assert info.loss < info.loss_unscaled / 2
    assert set(np.argsort(info.scale)[-3:]) == {3, 20, 41}
    assert bool(info.clipped)
    # It also gains on tokens that it has not seen.
    fresh = np.random.default_rng(1).standard_normal((500, 48)) * abs(X).mean(0)
    qt, info = awq(W, X, SPEC)
    plain = np.asarray(jaxq.dequantize(jaxq.quantize(W, SPEC)), np.float64)
    w_hat = (
        np.asarray(jaxq.dequantize(qt), np.float64) / np.asarray(info.scale)[:, None]
    )
    assert np.mean((fresh @ (w_hat - W)) ** 2) < np.mean((fresh @ (plain - W)) ** 2) / 2


@pytest.mark.parametrize("dtype", tables.thinned(["float32", "bfloat16"], ["bfloat16"]))
def test_one_exponent_is_rounding_to_nearest(dtype):
    w = jnp.asarray(W, dtype)
    qt, info = awq(w, X, SPEC, num=1, clip=False)
    plain = jaxq.quantize(w, SPEC)
    assert_same(qt, plain)
    assert np.all(np.asarray(info.scale) == 1)
    assert not info.clipped


def test_dead_channels_and_rows():
    x, w = X.copy(), W.copy()
    x[:, 7], w[11], w[:, 2] = 0, 0, 0
    qt, info = awq(w, x, SPEC)
    assert info.scale[7] == 1
    assert np.all(np.isfinite(info.scale) & (np.asarray(info.scale) > 0))
    assert np.all(np.asarray(jaxq.dequantize(qt))[:, 2] == 0)
    # If all inputs are 0, the weight is rounded to nearest.
    qt, info = awq(W, 0 * X, SPEC)
    assert np.all(np.asarray(info.scale) == 1)
    np.testing.assert_array_equal(qt.data, jaxq.quantize(W, SPEC).data)
    # A constant input gives every channel the same scale.
    np.testing.assert_allclose(awq_scale(W, 0 * X + 3, SPEC)[0], 1, rtol=1e-6)


def test_tokens_are_thinned_evenly():
    _, info = awq_scale(W, X, SPEC, max_tokens=30)
    np.testing.assert_allclose(info.losses, losses([W], scales, X[::2]), rtol=1e-3)
    _, reshaped = awq_scale(W, X.reshape(3, 20, 48), SPEC, max_tokens=30)
    np.testing.assert_array_equal(reshaped.losses, info.losses)


def test_stacks():
    stack = np.stack([W, W[::-1]])
    qt, info = awq(stack, np.stack([X, X[:, ::-1]]), SPEC)
    for i, x in enumerate([X, X[:, ::-1]]):
        alone, alone_info = awq(stack[i], x, SPEC)
        np.testing.assert_allclose(info.scale[i], alone_info.scale, rtol=1e-5)
        assert np.mean(np.asarray(qt.codes()[i]) == np.asarray(alone.codes())) > 0.99
    assert jax.eval_shape(lambda x: awq(stack, x, SPEC)[0], X).shape == stack.shape


def test_compiles_once_for_a_shape():
    traced = []

    def listen(event, duration, *, fun_name=None, **details):
        if event.endswith("jaxpr_trace_duration"):
            traced.append(fun_name)

    _awq.clear_cache()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        awq(W, X, SPEC)
        assert traced.count("_awq") == 1
        awq(2 * W, X[::-1], SPEC.replace(scale="float32"))
        assert traced.count("_awq") == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_errors():
    with pytest.raises(
        ValueError,
        match=r"inputs \[tokens, in\].*float32\[60,47\].*w: float32\[48,10\]",
    ):
        awq(W, X[:, 1:], SPEC)
    with pytest.raises(ValueError, match=r"float32\[0,48\]"):
        awq(W, X[:0], SPEC)
    with pytest.raises(ValueError, match="non-finite"):
        awq(W, X * np.float32(np.nan), SPEC)
    with pytest.raises(ValueError, match="must be matrices.*same input"):
        awq_scale([W, W[1:]], X, SPEC)
    with pytest.raises(ValueError, match="num must be a whole number of at least 1"):
        awq(W, X, SPEC, num=0)
    with pytest.raises(
        ValueError, match="max_tokens must be a whole number of at least 1"
    ):
        awq(W, X, SPEC, max_tokens=0)
    with pytest.raises(ValueError, match="awq: unknown preset"):
        awq(W, X, "int5x")
