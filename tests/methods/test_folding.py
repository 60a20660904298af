"""Scales moved between a layer and the one before it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import methods
from jaxq.methods._folding import fold_scale_into_next, fold_scale_into_previous
from tests.arrays import normal

N = 32
SCALE = np.abs(np.asarray(normal(N))) + np.float32(0.1)
W = np.asarray(normal(N, 12))


def test_a_norm_takes_scales():
    gain, bias = np.asarray(normal(2, N))
    new_gain, new_bias = map(np.asarray, fold_scale_into_previous(SCALE, gain, bias))
    normed = np.asarray(normal(64, N))
    np.testing.assert_allclose(
        normed * new_gain + new_bias,
        (normed * gain + bias) / SCALE,
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_linear_layer_takes_scales():
    kernel = np.asarray(normal(8, N))
    folded, bias = fold_scale_into_previous(SCALE, jnp.asarray(kernel, jnp.bfloat16))
    assert (folded.dtype, folded.shape, bias) == (jnp.bfloat16, (8, N), None)
    x = np.asarray(normal(5, 8))
    folded, _ = fold_scale_into_previous(SCALE, kernel)
    np.testing.assert_allclose(
        x @ folded @ fold_scale_into_next(SCALE, W),
        x @ kernel @ W,
        rtol=1e-3,
        atol=1e-3,
    )


def test_errors():
    with pytest.raises(ValueError, match="must have the size of s"):
        fold_scale_into_previous(SCALE, W)
    with pytest.raises(ValueError, match=r"\[..., 32, out\]"):
        fold_scale_into_next(SCALE, W.T)
    with pytest.raises(ValueError, match="s must be a vector of floats"):
        fold_scale_into_next(W, W)


# (method, weight of the layer before, a part of the reason; empty if scales can move)
PLACES = [
    ("awq", None, ""),
    ("awq", (8, N), ""),
    ("awq", (8, N // 2), "feeds several inputs"),
    ("smoothquant", None, ""),
    ("smoothquant", (8, N), "no previous norm can take"),
    ("equalize", None, "not a linear layer"),
    ("equalize", (8, N), ""),
    ("equalize", (8, N // 2), "feeds several inputs"),
]


@pytest.mark.parametrize(("method", "source", "reason"), PLACES)
def test_where_each_method_moves_scales(method, source, reason):
    folding = methods.get(method).folding
    source = None if source is None else normal(*source)
    answer = folding.why_not(source, [jnp.asarray(W)])
    assert bool(answer) == bool(reason)
    assert reason in answer


def test_only_these_methods_move_scales():
    moving = [name for name in methods.names() if methods.get(name).folding is not None]
    assert moving == sorted({method for method, _, _ in PLACES})


def test_which_methods_can_keep_their_scales_with_a_layer():
    foldings = {name: methods.get(name).folding for name in {m for m, _, _ in PLACES}}
    keeping = {name for name, folding in foldings.items() if folding.at_run_time}
    assert keeping == {"awq", "smoothquant"}
