"""partition and combine: each leaf is in one of the two trees, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq

W = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)


def tree():
    return {
        "w": jaxq.quantize(W, "nf4_dq"),
        "narrow": jaxq.quantize(W, "mxfp4"),
        "norm": jnp.ones(8, jnp.bfloat16),
        "step": 3,
        "nothing": None,
    }


def test_every_leaf_is_in_one_of_the_two_trees():
    whole = tree()
    trainable, rest = jaxq.partition(whole)
    assert [leaf.dtype.name for leaf in jax.tree.leaves(trainable)] == [
        "bfloat16",
        "float32",
    ]
    assert trainable["narrow"].scale is None  # float8 has no gradient
    assert rest["w"].scale.data is whole["w"].scale.data
    assert trainable["w"].scale.scale is whole["w"].scale.scale
    back = jaxq.combine(trainable, rest)
    assert jax.tree.structure(back) == jax.tree.structure(whole)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(whole), strict=True)
    )


def test_gradients_reach_scales_under_jit():
    trainable, rest = jaxq.partition(
        {"w": jaxq.quantize(W, "int8"), "norm": jnp.ones(64)}
    )
    x = np.ones((2, 64), np.float32)

    @jax.jit
    def gradient(trainable):
        def loss(t):
            whole = jaxq.combine(t, rest)
            return ((x * whole["norm"][None]) @ whole["w"]).sum()

        return jax.grad(loss)(trainable)

    gradients = gradient(trainable)
    codes = np.asarray(rest["w"].data, np.float32)
    np.testing.assert_allclose(gradients["w"].scale[:, 0], 2 * codes.sum(-1), rtol=1e-5)
    assert gradients["norm"].shape == (64,)


def test_trees_that_do_not_fit_are_refused():
    trainable, rest = jaxq.partition(tree())
    with pytest.raises(ValueError, match=r"both trees have a leaf at \['step'\]"):
        jaxq.combine({**trainable, "step": 1}, rest)
    with pytest.raises(ValueError, match="norm"):
        jaxq.combine({k: v for k, v in trainable.items() if k != "norm"}, rest)


def test_the_error_about_one_tree_names_combine():
    trainable, rest = jaxq.partition(jaxq.quantize(W, "int8"))
    for half in (trainable, rest):
        assert repr(half).startswith("QTensor(int8[")  # leaves are missing
    for use in (jaxq.dequantize, lambda half: jnp.ones((2, 64)) @ half):
        with pytest.raises(AttributeError, match=r"int8\[64x8\].*jaxq.combine"):
            use(trainable)
