"""A model with folded batch norms computes what the model computes in eval mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from tests.arrays import assert_close, assert_same, normal


def with_statistics(norm: nnx.BatchNorm, seed: int = 0) -> nnx.BatchNorm:
    """A batch norm with the statistics and parameters of a trained one."""
    rng = np.random.default_rng(seed)
    n = norm.num_features
    norm.mean.set_value(jnp.asarray(rng.normal(size=n), jnp.float32))
    norm.var.set_value(jnp.asarray(rng.uniform(0.1, 4, n), jnp.float32))
    if norm.scale is not None:
        norm.scale.set_value(jnp.asarray(rng.normal(size=n), norm.param_dtype))
    if norm.bias is not None:
        norm.bias.set_value(jnp.asarray(rng.normal(size=n), norm.param_dtype))
    return norm


class ConvNet(nnx.Module):
    """A layer of each kind in front of a batch norm: [b, 5, 5, 3] -> [b, 4]."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.conv.bias.set_value(normal(6))
        self.conv_norm = with_statistics(nnx.BatchNorm(6, rngs=rngs), 1)
        self.up = nnx.ConvTranspose(
            6, 5, (2, 2), use_bias=False, transpose_kernel=True, rngs=rngs
        )
        self.up_norm = with_statistics(nnx.BatchNorm(5, rngs=rngs), 2)
        self.linear = nnx.Linear(5, 4, rngs=rngs)
        bare = nnx.BatchNorm(4, use_scale=False, use_bias=False, rngs=rngs)
        self.linear_norm = with_statistics(bare, 3)

    def __call__(self, x):
        x = nnx.relu(self.conv_norm(self.conv(x)))
        x = nnx.relu(self.up_norm(self.up(x)))
        return self.linear_norm(self.linear(x.mean((1, 2))))


class Pair(nnx.Module):
    """A linear layer and a batch norm, put together in several ways.

    Args:
      call: `call(self, x)` is the call of the model.
      norm: arguments of the batch norm.
      linear: arguments of the linear layer.
    """

    def __init__(self, call, norm=None, linear=None):
        rngs = nnx.Rngs(0)
        self.call = call
        self.linear = nnx.Linear(4, 4, rngs=rngs, **(linear or {}))
        self.norm = with_statistics(nnx.BatchNorm(4, rngs=rngs, **(norm or {})))

    def __call__(self, x):
        return self.call(self, x)


def in_order(model, x):
    return model.norm(model.linear(x))


def in_float64(variable):
    return np.asarray(variable[...], np.float64)


def test_kernels_and_biases_are_those_of_the_paper():
    model, x = ConvNet(), normal(2, 5, 5, 3)
    folded = jaxq.nn.fold_batch_norm(model, x)
    for name, axis in [("conv", -1), ("up", -2), ("linear", -1)]:
        layer, norm = getattr(model, name), getattr(model, f"{name}_norm")
        factor = 1 / np.sqrt(in_float64(norm.var) + norm.epsilon)
        bias = 0.0 if layer.bias is None else in_float64(layer.bias)
        norm_bias = 0.0
        if norm.scale is not None:
            factor, norm_bias = factor * in_float64(norm.scale), in_float64(norm.bias)
        kernel = np.moveaxis(in_float64(layer.kernel), axis, -1) * factor
        expected = {
            "kernel": np.moveaxis(kernel, -1, axis),
            "bias": (bias - in_float64(norm.mean)) * factor + norm_bias,
        }
        new = getattr(folded, name)
        assert_close({"kernel": new.kernel[...], "bias": new.bias[...]}, expected)
        assert isinstance(getattr(folded, f"{name}_norm"), jaxq.nn.FoldedBatchNorm)
    model.eval()
    assert_close(folded(x), model(x), 1e-5)


def test_the_model_does_not_change():
    model, x = Pair(in_order), normal(8, 4)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    jaxq.nn.fold_batch_norm(model, x)
    assert_same(nnx.state(model), before)
    assert model.norm.use_running_average is False


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_the_result_keeps_its_dtype(dtype, standard_promotion):
    model = Pair(in_order, {"dtype": dtype}, {"dtype": jnp.bfloat16})
    x = normal(8, 4)
    folded = jaxq.nn.fold_batch_norm(model, x)
    model.eval()
    assert folded(x).dtype == model(x).dtype == (dtype or jnp.float32)
    assert_close(folded(x), model(x), 0.02)


def test_a_scale_of_zero_gives_the_bias():
    model, x = Pair(in_order), normal(8, 4)
    model.norm.scale.set_value(jnp.zeros(4))
    folded = jaxq.nn.fold_batch_norm(model, x)
    expected = jnp.broadcast_to(model.norm.bias[...], (8, 4))
    assert_close(folded(x), expected, 1e-5)


def test_a_stack_of_layers_is_folded():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.linear(x)))

    class Stack(nnx.Module):
        def __init__(self):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def create(rngs):
                return Block(rngs)

            self.blocks = create(nnx.Rngs(0))
            self.blocks.norm.mean.set_value(normal(3, 4))
            self.blocks.norm.scale.set_value(normal(3, 4, seed=1))

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(block, x):
                return block(x)

            return run(self.blocks, x)

    model, x = Stack(), normal(8, 4)
    folded = jaxq.nn.fold_batch_norm(model, x)
    assert not jax.tree.leaves(nnx.state(folded.blocks.norm))
    model.eval()
    assert_close(folded(x), model(x), 1e-5)


def calls_twice(model, x):
    return model.norm(model.linear(model.linear(x)))


def reads_output_too(model, x):
    y = model.linear(x)
    return y + model.norm(y)


def changes_output(model, x):
    return model.norm(2 * model.linear(x))


def normalizes_twice(model, x):
    return model.norm(model.norm(model.linear(x)))


def does_not_normalize(model, x):
    return model.linear(x)


def normalizes_by_the_batch(model, x):
    return model.norm(model.linear(x), use_running_average=False)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Pair(calls_twice), "linear in front of it is called 2 times"),
        (lambda: Pair(reads_output_too), "other computations read the output"),
        (lambda: Pair(changes_output), "its input is not the output of a linear layer"),
        (lambda: Pair(normalizes_twice), "the batch reaches it 2 times"),
        (lambda: Pair(does_not_normalize), "the batch does not reach it"),
        (lambda: Pair(normalizes_by_the_batch), "must use its running averages"),
        (lambda: Pair(in_order, {"axis": 1}), "axis=-1"),
        (lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0)), "has no BatchNorm"),
        (
            lambda: jaxq.quantize_model(Pair(in_order), "int8")[0],
            "linear is quantized already",
        ),
    ],
)
def test_what_cannot_be_folded_is_an_error(model, words):
    with pytest.raises(ValueError, match=words):
        jaxq.nn.fold_batch_norm(model(), normal(8, 4))


def test_a_shared_kernel_is_an_error():
    model = nnx.Sequential(
        *[nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))],
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
    )
    model.layers[2].kernel = model.layers[0].kernel
    with pytest.raises(ValueError, match="layers/0 and layers/2 share their kernel"):
        jaxq.nn.fold_batch_norm(model, normal(8, 4))


def test_patterns_choose_batch_norms():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        with_statistics(nnx.BatchNorm(4, rngs=rngs)),
        nnx.Linear(4, 4, rngs=rngs),
        with_statistics(nnx.BatchNorm(4, rngs=rngs)),
    )
    x = normal(8, 4)
    # The first batch norm has no layer in front of it. The error names the other one.
    with pytest.raises(
        ValueError, match=r"layers/0: its input.*\n.*norms=\['layers/2'\]"
    ):
        jaxq.nn.fold_batch_norm(model, x)
    folded = jaxq.nn.fold_batch_norm(model, x, norms=["layers/2"])
    assert type(folded.layers[0]) is nnx.BatchNorm
    model.eval()
    folded.eval()
    assert_close(folded(x), model(x), 1e-5)
    with pytest.raises(ValueError, match="match no batch norm"):
        jaxq.nn.fold_batch_norm(model, x, norms=["layers/2", "norm"])


def test_a_tree_is_an_error():
    with pytest.raises(TypeError, match="must be a flax nnx Module, got dict"):
        jaxq.nn.fold_batch_norm({}, normal(8, 4))
