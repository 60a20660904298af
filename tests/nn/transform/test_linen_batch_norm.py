"""Folded batch norms of linen modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import jaxq
from tests.arrays import assert_close, normal


class ConvNet(linen.Module):
    """Batch norms after a layer of each class: [b, 5, 5, 3] -> [b, 4].

    Attributes:
      train: batch norms use the statistics of the batch.
    """

    train: bool = False

    @linen.compact
    def __call__(self, x):
        running = not self.train
        x = linen.Conv(6, (3, 3), name="conv")(x)
        x = linen.BatchNorm(running, name="conv_norm")(x)
        x = linen.ConvTranspose(5, (2, 2), use_bias=False, name="up")(linen.relu(x))
        x = linen.BatchNorm(running, name="up_norm")(x)
        x = linen.Dense(4, name="dense")(linen.relu(x).mean((1, 2)))
        norm = linen.BatchNorm(
            running, use_bias=False, use_scale=False, name="dense_norm"
        )
        return norm(x)


def trained(variables):
    """Variables with random numbers, and positive variances."""
    rng = np.random.default_rng(0)

    def random(path, leaf):
        numbers = rng.normal(size=leaf.shape)
        is_variance = path[-1].key == "var"
        return jnp.asarray(0.1 + numbers**2 if is_variance else numbers, leaf.dtype)

    return jax.tree_util.tree_map_with_path(random, variables)


def test_the_module_computes_the_same():
    module, x = ConvNet(), normal(2, 5, 5, 3)
    variables = trained(module.init(jax.random.key(0), x))
    folded = jaxq.nn.linen.fold_batch_norm(module, variables, x)
    assert_close(module.apply(folded, x), module.apply(variables, x), 1e-5)
    assert jax.tree.structure(folded) == jax.tree.structure(variables)
    # The first kernel against numpy.
    norm = variables["params"]["conv_norm"]
    var = np.asarray(variables["batch_stats"]["conv_norm"]["var"], np.float64)
    kernel = np.asarray(variables["params"]["conv"]["kernel"], np.float64)
    kernel = kernel * np.asarray(norm["scale"]) / np.sqrt(var + 1e-5)
    assert_close(folded["params"]["conv"]["kernel"], kernel)
    # The batch norms are the identity, plus a bias after a layer without one.
    after = folded["params"]
    assert not np.any(after["conv_norm"]["bias"])
    assert np.all(after["up_norm"]["bias"] != 0)
    for stats in folded["batch_stats"].values():
        np.testing.assert_allclose(stats["var"] + 1e-5, 1, rtol=1e-6)
        assert not np.any(stats["mean"])


class Parts(linen.Module):
    """A Dense and a batch norm, put together in several ways."""

    residual: bool = False
    bias: bool = True
    train: bool = False

    @linen.compact
    def __call__(self, x):
        y = linen.Dense(4, use_bias=False, name="dense")(x)
        norm = linen.BatchNorm(not self.train, use_bias=self.bias, name="norm")
        return norm(y) + y if self.residual else norm(y)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Parts(residual=True), "other computations read the output of dense"),
        (Parts(bias=False), "neither dense nor the batch norm has a bias"),
        (linen.BatchNorm(True), "its input is not the output of a linear layer"),
        (linen.Dense(4), "has no BatchNorm"),
    ],
)
def test_what_cannot_be_folded_is_an_error(module, words):
    x = normal(8, 4)
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=words):
        jaxq.nn.linen.fold_batch_norm(module, variables, x)


def test_train_mode_is_an_error():
    x = normal(8, 4)
    variables = trained(Parts().init(jax.random.key(0), x))

    def forward(module, variables, batch):
        return module.apply(variables, batch, mutable=["batch_stats"])[0]

    with pytest.raises(ValueError, match="must use its running averages"):
        jaxq.nn.linen.fold_batch_norm(Parts(train=True), variables, x, forward=forward)
