"""`jaxq.training.linen`: trained weights in the variables of linen modules.

The witnesses are Flax's own layers on fake-quantized kernels, and `quantize_model`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict

import jaxq
from jaxq.qtensor import TrainedWeight
from jaxq.training.linen import convert, prepare
from tests import tables
from tests.arrays import assert_close, assert_same, normal

W8A8 = jaxq.Recipe([jaxq.Rule(weight="int8", activation="int8")])
INT4 = jaxq.Recipe([jaxq.Rule(weight="int4")])
IMAGE = (2, 6, 6, 8)

# Name: (layer, shape of its input or tokens, the weight, its contracted axes).
LAYERS = {
    "Dense": (nn.Dense(8), normal(3, 32), "kernel", (-2,)),
    "DenseGeneral": (
        nn.DenseGeneral((4, 8), axis=(-2, -1)),
        normal(3, 2, 16),
        "kernel",
        (-4, -3),
    ),
    "Einsum": (nn.Einsum((16, 4, 8), "bd,dhk->bhk"), normal(3, 16), "kernel", (-3,)),
    "Conv": (nn.Conv(16, (3, 3)), normal(*IMAGE), "kernel", (-4, -3, -2)),
    "ConvTranspose": (
        nn.ConvTranspose(16, (2, 2), strides=(2, 2)),
        normal(*IMAGE),
        "kernel",
        (-4, -3, -2),
    ),
    "Embed": (nn.Embed(16, 32), jnp.array([[1, 2], [2, 5]]), "embedding", (-1,)),
}
over_layers = pytest.mark.parametrize(
    "name", tables.thinned(LAYERS, ("Dense", "Conv", "Embed"))
)


class Mlp(nn.Module):
    """Two layers. They are not named like an output head, which recipes skip."""

    dtype: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, dtype=self.dtype, param_dtype=self.dtype or "float32")(x)
        x = nn.relu(x)
        return nn.Dense(8, dtype=self.dtype, param_dtype=self.dtype or "float32")(x)


def initialized(module, *args, seed=0):
    return module.init(jax.random.key(seed), *args)


def trained_a_little(variables):
    """Variables whose parameters have moved, as after some steps."""
    params = jax.tree.map(lambda x: x * x.dtype.type(1.1), variables["params"])
    return {**variables, "params": params}


def mean_square(y):
    return jnp.mean(jnp.square(y))


@over_layers
def test_layers(name):
    layer, x, _, _ = LAYERS[name]
    variables = initialized(layer, x)
    recipe = INT4 if name == "Embed" else W8A8
    module, prepared = prepare(layer, variables, recipe, example=x)
    quantized, qvariables, _ = jaxq.nn.linen.quantize_model(
        layer, variables, recipe, example=x
    )
    y = module.apply(prepared, x)
    assert_same(y, quantized.apply(qvariables, x))
    prepared = trained_a_little(prepared)
    converted, cvariables, report = convert(module, prepared)
    assert converted == quantized
    assert jax.tree.structure(cvariables) == jax.tree.structure(qvariables)
    assert report.quantized[0].kind == name
    y = module.apply(prepared, x)
    assert_same(converted.apply(cvariables, x), y)
    assert not np.array_equal(y, quantized.apply(qvariables, x))


@over_layers
def test_gradients_are_those_of_the_float_layer_at_the_quantized_kernel(name):
    layer, x, weight, contracting = LAYERS[name]
    variables = initialized(layer, x)
    module, prepared = prepare(layer, variables, INT4, example=x)

    def loss(module):
        return lambda params: mean_square(module.apply({"params": params}, x))

    def quantized_loss(floats):
        values = jaxq.fake_quant(floats[weight], "int4", contracting=contracting)
        return loss(layer)({**floats, weight: values})

    slopes = jax.grad(loss(module))(prepared["params"])
    floats = variables["params"]
    expected = jax.grad(quantized_loss)(floats)
    assert_close(slopes[weight].floats, expected[weight])
    if "bias" in floats:
        assert_close(slopes["bias"], expected["bias"])


def test_report_has_the_rows_of_quantize_model():
    module, x = Mlp(), normal(3, 32)
    variables = initialized(module, x)
    _, _, expected = jaxq.nn.linen.quantize_model(module, variables, "int4")
    _, _, report = convert(*prepare(module, variables, "int4"))
    for row, other in zip(report.rows, expected.rows, strict=True):
        changed = dataclasses.replace(other, method=other.method and "trained")
        assert row == changed


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.remat(nn.Dense)(16)(x)), None


class Stack(nn.Module):
    """Three layers in an nn.scan, each in an nn.remat."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0}
        scan = nn.scan(Body, axes, split_rngs={"params": True}, length=3)
        return scan(name="stack")(x, None)[0]


def test_scan_and_remat():
    module, x = Stack(), normal(3, 16)
    variables = initialized(module, x)
    module, prepared = prepare(module, variables, W8A8, ranges=jaxq.training.lsq())
    paths = ["/".join(path) for path in flatten_dict(prepared["params"])]
    path = next(path for path in paths if path.endswith("kernel"))

    def scanned(params):
        return mean_square(module.apply({"params": params}, x))

    def unrolled(params):
        layer = flatten_dict(params)
        kernel = layer[tuple(path.split("/"))]
        bias = layer[(*path.split("/")[:-1], "bias")]
        y = x
        for i in range(3):
            y = nn.relu(y @ kernel[i] + bias[i][None])
        return mean_square(y)

    value, slopes = jax.value_and_grad(scanned)(prepared["params"])
    expected, expected_slopes = jax.value_and_grad(unrolled)(prepared["params"])
    assert_close(value, expected)
    assert_close(slopes, expected_slopes, 1e-4)
    scale_slopes = flatten_dict(slopes)[tuple(path.split("/"))].scale
    assert np.all(np.any(np.asarray(scale_slopes) != 0, axis=(1, 2)))
    converted, cvariables, _ = convert(module, prepared)
    assert_same(converted.apply(cvariables, x), module.apply(prepared, x))


class Tied(nn.Module):
    """A table that is looked up and attended, and a layer that is called twice."""

    def setup(self):
        self.embed = nn.Embed(16, 32)
        self.shared = nn.Dense(32, use_bias=False)

    def __call__(self, tokens):
        x = self.shared(self.shared(self.embed(tokens)))
        return self.embed.attend(x)


def test_tied_and_shared_weights_sum_their_gradients():
    module, tokens = Tied(), jnp.array([1, 2, 5])
    variables = initialized(module, tokens)
    module, prepared = prepare(module, variables, INT4)

    def loss(params):
        return mean_square(module.apply({"params": params}, tokens))

    def expected(table, kernel):
        table = jaxq.fake_quant(table, "int4", contracting=(-1,))
        kernel = jaxq.fake_quant(kernel, "int4")
        return mean_square(table[tokens] @ kernel @ kernel @ table.T)

    slopes = jax.grad(loss)(prepared["params"])
    params = variables["params"]
    table_slope, kernel_slope = jax.grad(expected, (0, 1))(
        params["embed"]["embedding"], params["shared"]["kernel"]
    )
    assert_close(slopes["embed"]["embedding"].floats, table_slope)
    assert_close(slopes["shared"]["kernel"].floats, kernel_slope)
    converted, cvariables, _ = convert(module, prepared)
    assert_same(
        converted.apply(cvariables, tokens),
        module.apply(prepared, tokens),
    )


def test_bfloat16():
    module, x = Mlp("bfloat16"), normal(3, 32, dtype="bfloat16")
    variables = initialized(module, x)
    module, prepared = prepare(module, variables, W8A8, ranges=jaxq.training.lsq())
    kernel = prepared["params"]["Dense_0"]["kernel"]
    assert kernel.floats.dtype == jnp.bfloat16
    assert kernel.scale.dtype == jnp.float32
    y = module.apply(prepared, x)
    assert y.dtype == jnp.bfloat16
    converted, cvariables, _ = convert(module, prepared)
    assert_same(converted.apply(cvariables, x), y)


def test_training_with_optax_and_labels(standard_promotion):
    module, x, target = Mlp(), normal(32, 32), normal(32, 8, seed=1)
    variables = initialized(module, x)
    module, prepared = prepare(module, variables, "int2", ranges=jaxq.training.lsq())
    groups = {"weight": optax.adamw(1e-2), "step": optax.set_to_zero()}
    tx = optax.multi_transform(groups, jaxq.training.labels)
    params = prepared["params"]
    state = tx.init(params)
    num_traces = 0

    @jax.jit
    def step(params, state):
        nonlocal num_traces
        num_traces += 1

        def loss(params):
            return mean_square(module.apply({"params": params}, x) - target)

        value, slopes = jax.value_and_grad(loss)(params)
        updates, state = tx.update(slopes, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(20):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert num_traces == 1
    assert losses[-1] < 0.8 * losses[0]
    before = prepared["params"]["Dense_0"]["kernel"]
    after = params["Dense_0"]["kernel"]
    assert_same(after.scale, before.scale)
    assert not np.array_equal(after.floats, before.floats)
    jaxq.training.check({"params": params})


def test_a_layer_that_starts_at_zero():
    module = nn.Dense(8, kernel_init=nn.initializers.zeros)
    variables = initialized(module, normal(3, 32))
    module, prepared = prepare(module, variables, "int4", ranges=jaxq.training.lsq())
    jaxq.training.check(prepared)

    def loss(params):
        return jnp.sum(module.apply({"params": params}, normal(3, 32)))

    slopes = jax.grad(loss)(prepared["params"])["kernel"].floats
    assert_close(slopes, jnp.tile(normal(3, 32).sum(0)[:, None], 8), 1e-5)


def test_sharded_data():
    module, x = Mlp(), normal(4, 32)
    variables = initialized(module, x)
    module, prepared = prepare(module, variables, W8A8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = jax.NamedSharding(mesh, jax.P("data"))

    @jax.jit
    def slopes(params, x):
        return jax.grad(lambda p: mean_square(module.apply({"params": p}, x)))(params)

    expected = slopes(prepared["params"], x)
    assert_close(slopes(prepared["params"], jax.device_put(x, rows)), expected)


def test_start_is_the_result_of_the_method():
    module, x = Mlp(), normal(64, 32)
    variables = initialized(module, x)
    arguments = {"recipe": "int4_gptq", "calibration": [x]}
    module_of, prepared = prepare(module, variables, **arguments)
    quantized, qvariables, _ = jaxq.nn.linen.quantize_model(
        module, variables, **arguments
    )
    assert_same(module_of.apply(prepared, x), quantized.apply(qvariables, x))


def test_prepared_again_from_the_floats():
    module, x = Mlp(), normal(3, 32)
    variables = initialized(module, x)
    twice = prepare(*prepare(module, variables, "int8"), "int4")
    once = prepare(module, variables, "int4")
    assert twice[0]._jaxq_module == module
    assert_same(twice[1], once[1])


def test_schedule():
    module, x = Mlp(), normal(3, 32)
    variables = initialized(module, x)
    schedule = jaxq.training.Schedule(start=2)
    prepared, pvariables = prepare(module, variables, INT4, schedule=schedule)
    before, after = (schedule.apply(pvariables, step) for step in (1, 2))
    assert_close(prepared.apply(before, x), module.apply(variables, x), 1e-6)
    converted, cvariables, _ = convert(prepared, after)
    assert_same(prepared.apply(after, x), converted.apply(cvariables, x))


def test_frozen_dicts_and_bytes():
    module, x = Mlp(), normal(3, 32)
    variables = FrozenDict(initialized(module, x))
    module, prepared = prepare(module, variables, "int4", ranges=jaxq.training.lsq())
    assert isinstance(prepared, FrozenDict)
    assert isinstance(convert(module, prepared)[1], FrozenDict)
    moved = FrozenDict(trained_a_little(prepared))
    restored = serialization.from_bytes(prepared, serialization.to_bytes(moved))
    assert_same(restored, moved)
    other = prepare(module, prepared, "int8")[1]
    with pytest.raises(ValueError, match="saved TrainedWeight was quantized"):
        serialization.from_bytes(other, serialization.to_bytes(moved))


def test_labels_can_be_shown():
    variables = initialized(nn.Dense(8), normal(3, 32))
    _, prepared = prepare(nn.Dense(8), variables, "int4", ranges=jaxq.training.lsq())
    labels = jaxq.training.labels(prepared["params"])
    assert isinstance(labels["kernel"], TrainedWeight)
    assert "'scale': 'step'" in repr(labels)


def test_errors():
    module, x = Mlp(), normal(3, 32)
    variables = initialized(module, x)
    with pytest.raises(TypeError, match="linen.prepare: module must be a flax linen"):
        prepare(lambda x: x, variables, "int8")
    with pytest.raises(TypeError, match="linen.prepare: variables must be a dict"):
        prepare(module, variables["params"], "int8")
    quantized, qvariables, _ = jaxq.nn.linen.quantize_model(module, variables, "int8")
    with pytest.raises(TypeError, match="the module is quantized already"):
        prepare(quantized, qvariables, "int4")
    skip = jaxq.Recipe([jaxq.Rule(skip=True)])
    with pytest.raises(ValueError, match="linen.prepare: the recipe quantizes no"):
        prepare(module, variables, skip)
    with pytest.raises(TypeError, match="linen.prepare: ranges must be 'dynamic'"):
        prepare(module, variables, "int8", ranges="lsq")
    with pytest.raises(TypeError, match=r"prepare returned, got Mlp.*quantize_model"):
        convert(module, variables)
    prepared, _ = prepare(module, variables, "int8")
    with pytest.raises(ValueError, match="linen.convert: the model has no trained"):
        convert(prepared, variables)
    with pytest.raises(ValueError, match="floats where QTensors are expected"):
        prepared.apply(variables, x)
    averaged, avariables = prepare(
        module, variables, "w8a8", ranges=jaxq.training.ema()
    )
    with pytest.raises(ValueError, match="^training.linen.convert: .* no quant_stats/"):
        convert(averaged, {"params": avariables["params"]})
