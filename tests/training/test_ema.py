"""Input ranges that are moving averages: `jaxq.training.ema`.

The witness is the definition of the average in numpy, from the inputs of the layers.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxq
from jaxq.nn import QuantStats
from jaxq.qtensor import TrainedWeight
from jaxq.training import Schedule, check, convert, ema, lsq, prepare
from tests.arrays import assert_close, assert_same, normal

W8A8 = jaxq.Recipe([jaxq.Rule(weight="int8", activation="int8")])
DECAY = 0.75


def extremes(x):
    """(low, high) of an input, extended to 0."""
    x = np.asarray(x, np.float32)
    return np.array([min(x.min(), 0.0), max(x.max(), 0.0)])


def averaged(ranges):
    """The moving average after batches with these ranges."""
    average = ranges[0]
    for present in ranges[1:]:
        average = DECAY * average + (1 - DECAY) * present
    return average


def mean_square(y):
    return jnp.mean(jnp.square(y))


def assert_unchanged_by_conversion(qat, x):
    """The converted nnx model computes what the prepared one computes."""
    qat.eval()
    qmodel, _ = convert(qat)
    assert_same(qmodel(x), qat(x))


# nnx.


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def test_training_in_nnx(standard_promotion):
    """jit, grad, optax, freezing, eval mode, all in one compiled step."""
    batches = [normal(4, 16, seed=seed) for seed in range(5)]
    schedule = Schedule(start=1, freeze=3)
    qat = prepare(Mlp(nnx.Rngs(0)), W8A8, ranges=ema(DECAY), schedule=schedule)
    optimizer = nnx.Optimizer(qat, optax.sgd(1e-2), wrt=nnx.Param)
    num_traces = 0

    @nnx.jit
    def step(qat, optimizer, x, number):
        nonlocal num_traces
        num_traces += 1
        schedule.apply(qat, number)
        value, slopes = nnx.value_and_grad(lambda qat: mean_square(qat(x)))(qat)
        optimizer.update(qat, slopes)
        return value

    for number, x in enumerate(batches):
        step(qat, optimizer, x, number)
        # The average is collected before quantization starts, and not after the freeze.
        seen = [extremes(x) for x in batches[: min(number + 1, 3)]]
        assert_close(qat.up.kernel.input_range[...], averaged(seen), 1e-6)
    assert num_traces == 1
    assert isinstance(qat.up.kernel.input_range, QuantStats)
    before = np.asarray(qat.down.kernel.input_range[...])
    assert_unchanged_by_conversion(qat, 3 * batches[0])
    assert_same(qat.down.kernel.input_range[...], before)
    qmodel, report = convert(qat)
    assert report.quantized[0].format == "int8 + int8 static"
    assert_same(qmodel.down.kernel[...].input_range, before)


def test_a_product_in_train_mode_uses_the_new_average():
    qat = prepare(Mlp(nnx.Rngs(0)), W8A8, ranges=ema(DECAY))
    qat(normal(4, 16))
    x = normal(4, 16, seed=1)
    y = qat(x)
    qmodel, _ = convert(qat)
    assert_same(qmodel(x), y)


def test_inputs_that_do_not_count():
    qat = prepare(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), W8A8, ranges=ema(DECAY))
    x = normal(4, 16)
    for other in (jnp.zeros_like(x), x.at[0, 0].set(jnp.nan), x.at[0, 0].set(jnp.inf)):
        y = qat(other)
        assert np.isnan(y[0]).all() == (not np.isfinite(other).all())
        assert qat.kernel.input_range[...].tolist() == [0, 0]
    qat(x)
    for other in (jnp.zeros_like(x), x.at[0, 0].set(jnp.nan), x[:0]):
        qat(other)
        assert_close(qat.kernel.input_range[...], extremes(x), 1e-6)


def test_before_the_first_batch_a_product_uses_the_range_of_its_input():
    x = normal(4, 16)
    qat = prepare(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), W8A8, ranges=ema())
    qat.eval()
    y = qat(x)
    assert qat.kernel.input_range[...].tolist() == [0, 0]
    qat.train()
    assert_same(qat(x), y)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.linear(x))


class Stack(nnx.Module):
    """Three blocks in an nnx.scan, each in an nnx.remat."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Block(rngs)

        self.blocks = blocks(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return nnx.remat(lambda block, x: block(x))(block, x)

        return run(x, self.blocks)


def test_scan_and_remat_in_nnx():
    x = normal(4, 16)
    qat = prepare(Stack(nnx.Rngs(0)), W8A8, ranges=ema())
    nnx.grad(lambda qat: mean_square(qat(x)))(qat)
    # Each layer alone, one after the other.
    qmodel, _ = convert(qat)
    kernel, bias = qmodel.blocks.linear.kernel[...], qmodel.blocks.linear.bias[...]
    y, ranges = x, []
    for i in range(3):
        ranges.append(extremes(y))
        layer = jax.tree.map(operator.itemgetter(i), kernel)
        y = nnx.relu(y @ layer + bias[i][None])
    assert_close(qat.blocks.linear.kernel.input_range[...], np.stack(ranges), 1e-6)
    assert_unchanged_by_conversion(qat, x)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 16, rngs=rngs)
        self.again = self.first
        self.tied = nnx.Linear(16, 16, rngs=rngs)
        self.tied.kernel = self.first.kernel

    def __call__(self, x):
        return self.tied(self.again(self.first(x)))


def test_each_call_of_a_shared_weight_is_a_batch():
    model, x = Tied(nnx.Rngs(0)), normal(4, 16)
    qat = prepare(model, W8A8, ranges=ema(DECAY))
    y = nnx.jit(lambda qat, x: qat(x))(qat, x)
    assert y.shape == (4, 16)
    # The first two outputs, in floats: close to those of the quantized layers.
    first = model.first(x)
    ranges = [extremes(x), extremes(first), extremes(model.first(first))]
    average = qat.first.kernel.input_range[...]
    assert_close(average, averaged(ranges).astype(np.float32), 0.03)
    assert_unchanged_by_conversion(qat, x)


def test_each_expert_has_its_own_average():
    experts = nnx.Einsum("bek,ekn->ben", (2, 16, 8), rngs=nnx.Rngs(0))
    qat = prepare(experts, W8A8, ranges=ema())
    x = normal(4, 2, 16).at[:, 1].multiply(5)
    qat(x.at[:, 0].set(0))
    with pytest.raises(ValueError, match=r"range of kernel \(1 of 2 elements\)"):
        convert(qat)
    qat(x.at[:, 1].set(0))
    expected = np.stack([extremes(x[:, 0]), extremes(x[:, 1])])
    assert_close(qat.kernel.input_range[...], expected, 1e-6)
    assert_unchanged_by_conversion(qat, x)


def test_convolutions():
    convolution = nnx.Conv(8, 16, (3, 3), rngs=nnx.Rngs(0))
    qat, x = prepare(convolution, W8A8, ranges=ema()), normal(2, 6, 6, 8)
    qat(x)
    assert_close(qat.kernel.input_range[...], extremes(x), 1e-6)
    assert_unchanged_by_conversion(qat, x)


def test_the_range_is_that_of_the_scaled_input():
    w, x, factors = normal(16, 8), normal(4, 16, seed=1), jnp.linspace(1.0, 4.0, 16)
    qt = jaxq.quantize(w, "int8").with_input_scale(factors)
    qt = qt.with_activation("int8", bounds=(-1, 1))
    weight = TrainedWeight.start(w, qt, trained_scales=False)
    records = []
    weight = dataclasses.replace(
        weight,
        input_range=jnp.zeros(2),
        decay=DECAY,
        record=records.append,
    )
    y = x @ weight
    assert_close(records, [extremes(x * factors[None])], 1e-6)
    static = weight.quantize().with_activation("int8", bounds=records[0])
    assert_same(y, x @ static)


def test_trained_scales_with_averages():
    x = normal(4, 16)
    ranges = dataclasses.replace(lsq(), decay=DECAY)
    qat = prepare(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), W8A8, ranges=ranges)
    slopes = nnx.grad(lambda qat: mean_square(qat(x)))(qat)
    assert set(slopes["kernel"]) == {"floats", "scale"}
    assert np.any(np.asarray(slopes["kernel"]["scale"][...]) != 0)
    assert_close(qat.kernel.input_range[...], extremes(x), 1e-6)
    assert_unchanged_by_conversion(qat, x)


def test_an_observer_of_the_recipe_is_not_needed():
    model, x = Mlp(nnx.Rngs(0)), normal(4, 16)
    qat = prepare(model, "w8a8_static", ranges=ema())
    qat(x)
    assert_close(qat.up.kernel.input_range[...], extremes(x), 1e-6)


# linen.


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(16, name="dense")(x)), None


class LinenStack(nn.Module):
    axes: tuple = ("params", "quant_stats")

    @nn.compact
    def __call__(self, x):
        axes = dict.fromkeys(self.axes, 0)
        scan = nn.scan(LinenBlock, axes, split_rngs={"params": True}, length=3)
        x, _ = scan(name="stack")(x, None)
        return nn.remat(nn.Dense)(8, name="last")(x)


def prepared_linen(module, x, **arguments):
    variables = module.init(jax.random.key(0), x)
    arguments = {"ranges": ema(DECAY), "example": x} | arguments
    return jaxq.training.linen.prepare(module, variables, W8A8, **arguments)


def test_training_in_linen(standard_promotion):
    batches = [normal(4, 16, seed=seed) for seed in range(4)]
    schedule = Schedule(freeze=3)
    module, variables = prepared_linen(LinenStack(), batches[0], schedule=schedule)
    tx = optax.sgd(1e-2)
    params, stats = variables["params"], variables["quant_stats"]
    assert jax.tree.map(jnp.shape, stats) == {
        "stack": {"dense": {"kernel_range": (3, 2)}},
        "last": {"kernel_range": (2,)},
    }
    state = tx.init(params)
    num_traces = 0

    @jax.jit
    def step(params, stats, state, x, number):
        nonlocal num_traces
        num_traces += 1
        params = schedule.apply(params, number)

        def loss(params):
            variables = {"params": params, "quant_stats": stats}
            y, changed = module.apply(variables, x, mutable=["quant_stats"])
            return mean_square(y), changed["quant_stats"]

        slopes, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(slopes, state)
        return optax.apply_updates(params, updates), stats, state

    for number, x in enumerate(batches):
        params, stats, state = step(params, stats, state, x, number)
        seen = [extremes(x) for x in batches[: min(number + 1, 3)]]
        average = stats["stack"]["dense"]["kernel_range"][0]
        assert_close(average, averaged(seen), 1e-6)
    assert num_traces == 1
    assert np.all(np.asarray(stats["stack"]["dense"]["kernel_range"][:, 1]) > 0)
    variables = {"params": params, "quant_stats": stats}
    check(variables)
    qmodule, qvariables, report = jaxq.training.linen.convert(module, variables)
    assert set(qvariables) == {"params"}
    kernel = qvariables["params"]["stack"]["dense"]["kernel"]
    assert_same(kernel.input_range, stats["stack"]["dense"]["kernel_range"])
    assert report.quantized[0].format == "int8 + int8 static"
    x = 3 * batches[0]
    assert_same(qmodule.apply(qvariables, x), module.apply(variables, x))
    again, other = jaxq.training.linen.prepare(module, variables, W8A8, example=x)
    assert set(other) == {"params"}
    assert again.apply(other, x).shape == (4, 8)


def test_a_scan_that_leaves_the_averages_out():
    x = normal(4, 16)
    module, variables = prepared_linen(LinenStack(axes=("params",)), x)
    message = r"no 'stack/dense/kernel_range'.*variable_axes=\{.*'quant_stats': 0\}"
    with pytest.raises(ValueError, match=message):
        module.apply(variables, x, mutable=["quant_stats"])
    # The remedy works.
    module, variables = prepared_linen(LinenStack(), x)
    _, changed = module.apply(variables, x, mutable=["quant_stats"])
    assert_close(
        changed["quant_stats"]["stack"]["dense"]["kernel_range"][0], extremes(x)
    )


def test_missing_averages_in_linen():
    x = normal(4, 16)
    module, variables = prepared_linen(nn.Dense(8), x)
    params = {"params": variables["params"]}
    with pytest.raises(ValueError, match="no 'kernel_range'.*prepare returned"):
        module.apply(params, x)
    with pytest.raises(ValueError, match="no quant_stats/kernel_range"):
        jaxq.training.linen.convert(module, params)
    with pytest.raises(ValueError, match="linen.convert: no batch has set.* kernel"):
        jaxq.training.linen.convert(module, variables)
    ruined = {**variables, "quant_stats": {"kernel_range": jnp.array([0.0, jnp.nan])}}
    with pytest.raises(ValueError, match="kernel: input_range: 1 of 2 numbers"):
        check(ruined)


class WithOwnStats(nn.Module):
    """A module that has a collection of this name for itself."""

    @nn.compact
    def __call__(self, x):
        self.variable("quant_stats", "count", jnp.zeros, ())
        return nn.Dense(8)(x)


def test_other_variables_of_the_collection_stay():
    x = normal(4, 16)
    module, variables = prepared_linen(WithOwnStats(), x)
    assert set(variables["quant_stats"]) == {"count", "Dense_0"}
    _, changed = module.apply(variables, x, mutable=["quant_stats"])
    variables = {**variables, **changed}
    _, converted, _ = jaxq.training.linen.convert(module, variables)
    assert set(converted["quant_stats"]) == {"count"}


def test_sharded_data_have_one_range():
    x = normal(4, 16)
    module, variables = prepared_linen(nn.Dense(8), x)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    apply = jax.jit(functools.partial(module.apply, mutable=["quant_stats"]))
    _, changed = apply(variables, jax.device_put(x, rows))
    assert_close(changed["quant_stats"]["kernel_range"], extremes(x), 1e-6)


# Bad input.


def test_bad_recipes_and_arguments():
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"a tree of arrays is no model.*linen.prepare"
    ):
        prepare({"w": normal(64, 8)}, W8A8, ranges=ema())
    with pytest.raises(ValueError, match="no rule of the recipe has activation="):
        prepare(model, "int4", ranges=ema())
    grouped = jaxq.Rule(weight="int8", activation="mxfp8_e5m2")
    with pytest.raises(ValueError, match=r"Rule\('\*\*'\): ranges=ema\(\): PerGroup"):
        prepare(model, jaxq.Recipe([grouped]), ranges=ema())
    own = jaxq.Rule(weight="int8", method="llm_int8")
    with pytest.raises(ValueError, match="quantizes each input by its own range"):
        prepare(model, jaxq.Recipe([own]), ranges=ema())
    with pytest.raises(ValueError, match="freezes moving averages.*leave freeze="):
        prepare(model, W8A8, schedule=Schedule(freeze=3))
    qat = prepare(model, W8A8, ranges=ema(), schedule=Schedule())
    with pytest.raises(ValueError, match="kernel was prepared with a schedule without"):
        Schedule(freeze=3).apply(qat, 0)
    with pytest.raises(ValueError, match="freeze must be at least 0, got -1"):
        Schedule(freeze=-1)
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        ema(1.0)
    with pytest.raises(TypeError, match="decay must be a number"):
        ema("0.99")
    with pytest.raises(ValueError, match="cannot be moving averages"):
        dataclasses.replace(jaxq.training.pact(), decay=0.9)


def test_a_layer_without_batches_is_named():
    qat = prepare(Mlp(nnx.Rngs(0)), W8A8, ranges=ema())
    qat.up(normal(4, 16))
    with pytest.raises(ValueError, match=r"input range of down/kernel\. Run batches"):
        convert(qat)
    check(qat)  # nothing is ruined


def test_a_transform_that_loses_the_average():
    qat, x = prepare(Mlp(nnx.Rngs(0)), W8A8, ranges=ema()), normal(4, 16)
    with pytest.raises(
        ValueError, match=r"inside jax.jit.*Use nnx.jit.*model.eval\(\)"
    ):
        jax.jit(lambda x: qat(x))(x)
    nnx.jit(lambda qat, x: qat(x))(qat, x)
    qat.eval()
    assert_close(jax.jit(lambda x: qat(x))(x), qat(x), 1e-6)
