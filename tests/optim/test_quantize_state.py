"""`quantize_state`: numbers, memory, wrappers, jit, nnx, sharding, files and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import PerGroup, QTensor, QuantSpec
from jaxq.optim import adamw4bit, adamw8bit, muon8bit, quantize_state
from tests import tables
from tests.arrays import assert_same, normal

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {
    "embedding": (512, 64),
    "kernel": (64, 300),
    "heads": (64, 4, 32),
    "classifier": (512, 10),
    "bias": (300,),
}


def is_qtensor(x):
    return isinstance(x, QTensor)


def make_params(seed=0, dtype="float32"):
    return {
        name: normal(*shape, seed=seed, dtype=dtype) for name, shape in PARAMS.items()
    }


def train(tx, num_steps, params=None, state=None, first=0):
    """Minimizes the distance to targets, with noise in the gradients."""
    params = make_params() if params is None else params
    state = tx.init(params) if state is None else state
    targets = make_params(seed=1)

    @jax.jit
    def step(params, state, noise):
        grads = jax.tree.map(lambda p, t, n: p - t + n, params, targets, noise)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(first, first + num_steps):
        params, state = step(params, state, make_params(seed=10 + i))
    return params, state


# Numbers.


@pytest.mark.parametrize(
    "spec",
    tables.thinned(
        ("dynamic8", "dynamic4", "fp8", "int8", "int4", "nf4"),
        ("dynamic8", "dynamic4", "fp8"),
    ),
)
def test_first_update_is_exact_and_later_ones_are_close(spec):
    expected, _ = train(optax.adam(0.01), 1)
    actual, _ = train(quantize_state(optax.adam(0.01), spec), 1)
    assert_same(actual, expected)
    expected, _ = train(optax.adam(0.01), 20)
    actual, _ = train(quantize_state(optax.adam(0.01), spec), 20)
    start = make_params()
    for name in PARAMS:
        error = np.linalg.norm(actual[name] - expected[name])
        distance = np.linalg.norm(start[name] - expected[name])
        assert error < 0.25 * distance, (name, error / distance)


def test_quantized_update_is_that_of_dequantized_moments():
    # The oracle: Adam of optax with the moments that the state stands for.
    tx, inner = adamw8bit(0.01), optax.adamw(0.01)
    params, state = train(tx, 3)
    grads = make_params(seed=5)
    actual, new_state = tx.update(grads, state, params)
    floats = jax.tree.map(
        lambda x: jaxq.dequantize(x) if is_qtensor(x) else x, state, is_leaf=is_qtensor
    )
    expected, new_floats = inner.update(grads, floats, params)
    assert_same(actual, expected)
    new = jax.tree.map(
        lambda x: jaxq.dequantize(x) if is_qtensor(x) else x,
        new_state,
        is_leaf=is_qtensor,
    )
    # Half a gap of the signed map is at most 1.8 % of the largest number of a block.
    for actual_mu, mu in zip(
        jax.tree.leaves(new[0].mu), jax.tree.leaves(new_floats[0].mu), strict=True
    ):
        assert np.abs(actual_mu - mu).max() <= 0.018 * np.abs(mu).max()


def naive_int8(tx):
    """Affine int8 for both moments, as `jaxq.quantize` rounds them."""
    spec = QuantSpec("uint8", PerGroup(256), symmetric=False)

    def quantized(state):
        adam, *rest = state
        mu = jax.tree.map(lambda x: jaxq.quantize(x, spec, contracting=-1), adam.mu)
        nu = jax.tree.map(lambda x: jaxq.quantize(x, spec, contracting=-1), adam.nu)
        return (adam._replace(mu=mu, nu=nu), *rest)

    def floats(state):
        return jax.tree.map(
            lambda x: jaxq.dequantize(x) if is_qtensor(x) else x,
            state,
            is_leaf=is_qtensor,
        )

    def update(grads, state, params=None):
        updates, state = tx.update(grads, floats(state), params)
        return updates, quantized(state)

    return optax.GradientTransformation(lambda p: quantized(tx.init(p)), update)


def losses(tx, num_steps=60):
    """Losses of a matrix whose columns have gradients of different sizes, 1 to 0.01.

    In each step half of the columns have no gradient, as rare tokens have none.
    """
    sizes = 10.0 ** (-jnp.arange(256, dtype=jnp.float32) / 256).reshape(1, 256)
    target = normal(64, 256, seed=1)

    def loss(w, is_present):
        return jnp.sum(((w - target) * sizes * is_present) ** 2)

    @jax.jit
    def step(w, state, is_present):
        updates, state = tx.update(jax.grad(loss)(w, is_present), state, w)
        return optax.apply_updates(w, updates), state, loss(w, 1.0)

    w = jnp.zeros((64, 256))
    state, values = tx.init(w), []
    for i in range(num_steps):
        is_present = (normal(1, 256, seed=i) > 0).astype(jnp.float32)
        w, state, value = step(w, state, is_present)
        values.append(float(value))
    return np.asarray(values)


def test_affine_int8_second_moments_diverge_and_ours_do_not():
    # A second moment that rounds to 0 makes the step m / eps.
    naive = losses(naive_int8(optax.adam(0.05)))
    assert not np.isfinite(naive).all() or naive.max() > 1e3 * naive[0], naive
    affine = QuantSpec("uint8", PerGroup(256), symmetric=False)
    for spec, second in (("dynamic8", None), ("dynamic4", None), ("int8", affine)):
        actual = losses(quantize_state(optax.adam(0.05), spec, second=second))
        assert actual.max() < 1.1 * actual[0], (spec, actual)
        assert actual[-1] < 0.3 * actual[0], (spec, actual)


UINT8 = QuantSpec("uint8", PerGroup(256), symmetric=False)
UINT8_WITH_OFFSET = QuantSpec("uint8", PerGroup(256), offset="min")


@pytest.mark.parametrize("spec", ["dynamic8", "int8", UINT8, UINT8_WITH_OFFSET])
def test_first_moments_of_both_signs(spec):
    # Equal gradients: the update of Adam is the learning rate in every step.
    tx = quantize_state(optax.adam(1e-3), spec)
    grads = jnp.ones((16, 256)).at[:, ::2].set(-1.0)
    state = tx.init(grads)
    for _ in range(3):
        updates, state = tx.update(grads, state)
        np.testing.assert_allclose(updates, -1e-3 * grads, rtol=0.02)


@pytest.mark.parametrize(
    "spec",
    tables.thinned(
        ("dynamic8", "dynamic4", "fp8", "int8", "mxfp8"), ("dynamic8", "dynamic4")
    ),
)
def test_second_moment_that_is_not_zero_never_becomes_zero(spec):
    tx = quantize_state(optax.adam(1e-3), spec)
    grads = jnp.zeros((16, 256)).at[:, 0].set(1.0).at[:, 1].set(1e-9)
    _, state = tx.update(grads, tx.init(grads))
    nu = jaxq.dequantize(state[0].nu)
    assert (np.asarray(nu)[:, :2] > 0).all()
    if spec != "dynamic4":  # its table has no 0
        assert (np.asarray(nu)[:, 2:] == 0).all()


def test_rows_without_gradients_stay_where_they_are():
    # The rows of an embedding whose tokens did not occur.
    tx = adamw4bit(0.1, weight_decay=0.0)
    params = normal(64, 128)
    state = tx.init(params)
    grads = normal(64, 128, seed=1).at[32:].set(0.0)
    updates, state = tx.update(grads, state, params)
    updates, state = tx.update(grads, state, params)
    assert (np.asarray(updates)[32:] == 0).all()
    assert (np.abs(np.asarray(updates)[:32]) > 0).all()


def test_not_finite_gradient_spoils_its_block_only():
    tx = adamw8bit(1e-3)
    params = normal(16, 512)
    _, state = tx.update(params.at[3, 5].set(jnp.nan), tx.init(params), params)
    updates, _ = tx.update(params, state, params)
    is_nan = np.isnan(np.asarray(updates))
    assert is_nan[3, :256].all()
    assert is_nan.sum() == 256


# Memory.


@pytest.mark.parametrize(("make", "most"), [(adamw8bit, 2.1), (adamw4bit, 1.1)])
def test_bytes_for_each_parameter(make, most):
    state = make(1e-3).init(make_params())
    size = nbytes = 0
    for leaf in jax.tree.leaves(state, is_leaf=is_qtensor):
        if is_qtensor(leaf):
            size += leaf.size
            nbytes += sum(x.nbytes for x in jax.tree.leaves(leaf))
    num_quantized = sum(np.prod(s) for s in PARAMS.values()) - 300  # without the bias
    assert size == 2 * num_quantized
    assert nbytes / num_quantized <= most


@pytest.mark.parametrize(
    ("spec", "state_bytes", "most_temporaries"),
    [("dynamic8", 2.1, 8.5), ("dynamic4", 1.1, 10.5), ("fp8", 2.1, 2.5)],
)
def test_donated_step_reuses_the_state(spec, state_bytes, most_temporaries):
    params = {f"w{i}": normal(64, 512, seed=i) for i in range(4)}
    size = 4 * 64 * 512

    def memory(tx):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        step = jax.jit(step, donate_argnums=(0, 1))
        return step.lower(params, state, params).compile().memory_analysis()

    wide = memory(optax.adamw(1e-3))
    narrow = memory(quantize_state(optax.adamw(1e-3), spec))
    saved = wide.argument_size_in_bytes - narrow.argument_size_in_bytes
    assert saved >= (8 - state_bytes) * size
    # New parameters take the place of the old ones, and the new state too.
    not_reused = narrow.output_size_in_bytes - narrow.alias_size_in_bytes
    assert not_reused < 0.01 * size
    # XLA decodes the moments of "dynamic8" and "dynamic4" from tables, and keeps their
    # floats until the new scales are known. It decodes "fp8" twice instead.
    assert narrow.temp_size_in_bytes < most_temporaries * size


@pytest.mark.parametrize("tx", [optax.adam(0.01), optax.sgd(0.01, momentum=0.9)])
def test_init_warns_if_all_moments_are_small(tx):
    params = {"bias": normal(300), "matrix": normal(8, 8)}
    with pytest.warns(UserWarning, match="all moments have fewer than min_size=4096"):
        state = quantize_state(tx).init(params)
    assert_same(state, tx.init(params))
    assert is_qtensor(quantize_state(tx, min_size=300).init(params)[0][-1]["bias"])


def test_label_groups_without_parameters_are_silent():
    groups = {
        "adam": adamw8bit(0.01),
        "where": quantize_state(optax.ema(0.9), where="**/ema/*"),
        "unknown": quantize_state(optax.adagrad(0.01)),
        "muon": muon8bit(0.01),
    }
    params = {"w": normal(64, 128)}
    for group in ("adam", "muon"):
        tx = optax.multi_transform(groups, lambda params, g=group: {"w": g})
        assert any(
            map(is_qtensor, jax.tree.leaves(tx.init(params), is_leaf=is_qtensor))
        )
    no_matrix = optax.masked(optax.adam(0.01), {"w": False})
    quantize_state(no_matrix).init(params)


# Wrappers of optax.


def adam_of(state):
    """The quantized Adam state inside any wrappers."""
    adams = [
        node
        for node in jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
        )
        if isinstance(node, optax.ScaleByAdamState)
    ]
    return adams[0]


def inner_wrapped(make):
    """`make` inside each wrapper of optax."""
    tx = make(learning_rate=0.01)
    return {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), tx),
        "multi_transform": optax.multi_transform(
            {"large": tx, "small": optax.sgd(0.01)},
            lambda params: {k: "small" if k == "bias" else "large" for k in params},
        ),
        "MultiSteps": optax.MultiSteps(tx, 2),
        "inject_hyperparams": optax.inject_hyperparams(make)(learning_rate=0.01),
        "masked": optax.masked(tx, {name: name != "bias" for name in PARAMS}),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
    }


@pytest.mark.parametrize(
    "name",
    [
        "chain",
        "multi_transform",
        "MultiSteps",
        "inject_hyperparams",
        "masked",
        "apply_if_finite",
    ],
)
def test_wrappers_of_optax(name):
    """Results are near those of floats, and mostly equal inside and around."""
    inside = inner_wrapped(adamw8bit)[name]
    around = quantize_state(inner_wrapped(optax.adamw)[name])
    params, state = train(inside, 4)
    expected, _ = train(inner_wrapped(optax.adamw)[name], 4)
    other, other_state = train(around, 4)
    # Around MultiSteps the moments are also quantized where only gradients accumulate.
    if name != "MultiSteps":
        assert_same(other, params)
    assert is_qtensor(adam_of(state).mu["kernel"])
    assert is_qtensor(adam_of(other_state).nu["embedding"])
    start = make_params()
    for key in PARAMS:
        distance = np.linalg.norm(start[key] - expected[key])
        assert np.linalg.norm(params[key] - expected[key]) < 0.1 * distance


def test_hyperparameters_can_be_changed():
    params = make_params()
    tx = optax.inject_hyperparams(adamw8bit)(learning_rate=0.01)
    state = tx.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, _ = tx.update(params, state, params)
    assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))


def test_scan_and_one_trace():
    tx = adamw8bit(0.01)
    params = make_params()
    traces = []

    @jax.jit
    def many(params, state):
        def step(carry, _):
            traces.append(1)
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, length=3)[0]

    carry = many(params, tx.init(params))
    many(*carry)
    assert len(traces) == 1


def test_where_names_other_leaves():
    tx = quantize_state(
        optax.MultiSteps(optax.adam(0.01), 2), where="acc_grads/**", min_size=10**9
    )
    _, state = train(tx, 3)
    assert all(map(is_qtensor, state.acc_grads.values()))
    assert not any(map(is_qtensor, adam_of(state).mu.values()))
    embedding = quantize_state(optax.adam(0.01), where=["**/mu/bias"]).init(
        make_params()
    )
    assert is_qtensor(embedding[0].mu["bias"])
    assert not is_qtensor(embedding[0].nu["bias"])


def test_dtype_of_bfloat16_moments_stays():
    params = make_params(dtype="bfloat16")
    tx = adamw8bit(0.01)
    state = tx.init(params)
    grads = make_params(seed=1)  # float32
    _, new_state = jax.jit(tx.update)(grads, state, params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert new_state[0].mu["kernel"].dtype == jnp.bfloat16


# Flax.


class Net(nnx.Module):
    def __init__(self, sharding=None):
        init = nnx.initializers.lecun_normal()
        if sharding is not None:
            init = nnx.with_partitioning(init, sharding)
        self.up = nnx.Linear(64, 512, kernel_init=init, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(512, 64, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@nnx.jit
def nnx_step(model, optimizer, x):
    def loss(model):
        return jnp.mean((model(x) - 1) ** 2)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


@pytest.mark.parametrize("make", [adamw8bit, adamw4bit])
def test_three_steps_of_nnx_optimizer(make):
    x = normal(8, 64)
    values = {}
    for name, tx in (("wide", optax.adamw(0.01)), ("narrow", make(0.01))):
        model = Net()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        values[name] = [float(nnx_step(model, optimizer, x)) for _ in range(3)]
    # The first update is exact, and shows in the second loss.
    np.testing.assert_allclose(values["narrow"][:2], values["wide"][:2], rtol=1e-6)
    np.testing.assert_allclose(values["narrow"][2], values["wide"][2], rtol=0.05)
    moment = nnx.as_pure(optimizer.opt_state)[0].nu["up"]["kernel"]
    assert is_qtensor(moment)


def test_optimizer_state_keeps_the_sharding_of_variables():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        model = Net(sharding=(None, "model"))
        optimizer = nnx.Optimizer(model, adamw8bit(0.01), wrt=nnx.Param)
        moment = optimizer.opt_state[0].mu["up"]["kernel"]
        for variable in (moment.data, moment.scale):
            assert variable.get_metadata("out_sharding") == (None, "model")
            assert variable.get_value().sharding.spec == P(None, "model")
        specs = nnx.get_partition_spec(nnx.state(optimizer))
        assert specs["opt_state"][0]["mu"]["up"]["kernel"]["scale"].get_value() == P(
            None, "model"
        )
        for _ in range(3):
            value = nnx_step(model, optimizer, normal(8, 64))
    assert np.isfinite(float(value))


def test_variables_without_nnx_optimizer():
    params = nnx.state(Net(), nnx.Param)
    tx = adamw8bit(0.01)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert is_qtensor(state[0].mu["up"]["kernel"])
    assert isinstance(state[0].mu["up"]["kernel"].data, nnx.Param)


def test_partitioned_parameters_of_linen():
    init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
    module = linen.Dense(512, kernel_init=init)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 64)))
    state = jax.eval_shape(adamw8bit(0.01).init, params)
    specs = linen.get_partition_spec(state)
    assert specs[0].mu["params"]["kernel"] == P(None, "model")


# Sharding.


SHARDED = [
    (make, spec, size)
    for make in (adamw8bit, adamw4bit)
    for spec, size in [
        (P("x", None), 768),
        (P(None, "x"), 768),
        (P("x", None), 257),
        (P(None, "x"), 4 * 257),
        (P(None, "x"), 4 * 35),
    ]
]


@pytest.mark.parametrize(
    ("make", "spec", "size"), tables.thinned(SHARDED, SHARDED[1:4] + SHARDED[6:10:3])
)
@pytest.mark.filterwarnings("ignore:.*a whole byte each")
def test_sharded_update_needs_no_communication(make, spec, size):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, spec)
    params = jax.device_put(normal(64, size), sharding)
    tx = make(0.01)
    state = tx.init(params)
    for leaf in jax.tree.leaves(state[0].mu):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    step = jax.jit(tx.update)
    grads = jax.device_put(normal(64, size, seed=1), sharding)
    text = step.lower(grads, state, params).compile().as_text()
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word not in text
    _, state = step(grads, state, params)
    updates, state = step(grads, state, params)
    for leaf in jax.tree.leaves(state[0].nu):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    # One device and the same blocks: the same numbers.
    alone = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), tx.init(params))
    step_alone = jax.jit(tx.update)
    grads, params = jax.device_put((grads, params), jax.devices()[0])
    _, alone = step_alone(grads, alone, params)
    expected, _ = step_alone(grads, alone, params)
    np.testing.assert_array_equal(updates, expected)


def test_codes_that_cross_a_shard_are_not_packed():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "x"))
    params = {
        "odd": jax.device_put(normal(64, 2 * 257), sharding),
        "even": jax.device_put(normal(64, 2 * 258), sharding),
    }
    with pytest.warns(UserWarning, match="'0/mu/odd', '0/nu/odd' take a whole byte"):
        state = adamw4bit(0.01).init(params)
    for moment in (state[0].mu, state[0].nu):
        assert moment["odd"].spec.fmt.bits == 4
        assert moment["odd"].data.shape == (64, 2 * 257)
        assert moment["even"].data.shape == (64, 258)
    # Codes that the user does not pack need no warning.
    spec = QuantSpec("dynamic4", PerGroup(128), packing="none")
    second = QuantSpec("ulinear4", PerGroup(128), packing="none")
    quantize_state(optax.adam(0.01), spec, second=second).init(params)


# Files.


def test_saved_state_continues_with_the_same_numbers(tmp_path):
    tx = optax.inject_hyperparams(adamw4bit)(learning_rate=0.01)
    params, state = train(tx, 3)
    jaxq.save(tmp_path / "state.safetensors", {"params": params, "state": state})
    template = {"params": make_params(), "state": tx.init(make_params())}
    loaded = jaxq.load(tmp_path / "state.safetensors", into=template)
    assert_same(loaded["state"], state)
    expected = train(tx, 2, params, state, first=3)
    actual = train(tx, 2, loaded["params"], loaded["state"], first=3)
    assert_same(actual, expected)


def test_saved_nnx_optimizer_continues(tmp_path):
    x, tx = normal(8, 64), adamw8bit(0.01)
    model = Net()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx_step(model, optimizer, x)
    jaxq.save(tmp_path / "optimizer.safetensors", nnx.state(optimizer))
    fresh = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loaded = jaxq.load(tmp_path / "optimizer.safetensors", into=nnx.state(fresh))
    nnx.update(fresh, loaded)
    assert_same(nnx.as_pure(nnx.state(fresh)), nnx.as_pure(nnx.state(optimizer)))


def labelled():
    """Weights with moments of 8 bits, trained scales with moments of 32 bits."""
    return optax.multi_transform(
        {
            "weight": adamw8bit(0.01),
            "step": optax.adam(0.01),
            "switch": optax.set_to_zero(),
        },
        jaxq.training.labels,
    )


def prepared_tree():
    ranges = jaxq.training.lsq()
    return jaxq.training.prepare({"w": normal(64, 128)}, "int4", ranges=ranges)


def prepared_linen():
    module = linen.Dense(128)
    variables = module.init(jax.random.key(0), jnp.ones((1, 64)))
    ranges = jaxq.training.lsq()
    return jaxq.training.linen.prepare(module, variables, "int4", ranges=ranges)


def nnx_state(tx, prepare):
    model = Net()
    if prepare:
        model = jaxq.training.prepare(model, "int4", ranges=jaxq.training.lsq())
    return nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param))


def train_state(tx):
    module, variables = prepared_linen()
    return TrainState.create(apply_fn=module.apply, params=variables["params"], tx=tx)


SAVED = {
    "nnx, labels": lambda: nnx_state(labelled(), prepare=True),
    "nnx, muon": lambda: nnx_state(muon8bit(0.01), prepare=False),
    "nnx, prepared, muon": lambda: nnx_state(muon8bit(0.01), prepare=True),
    "tree, adam": lambda: optax.adam(1e-3).init(prepared_tree()),
    "tree, labels": lambda: labelled().init(prepared_tree()),
    "linen variables": lambda: prepared_linen()[1],
    "TrainState, adamw8bit": lambda: train_state(adamw8bit(0.01)),
    "TrainState, labels": lambda: train_state(labelled()),
}


@pytest.mark.parametrize("name", SAVED)
def test_states_of_all_kinds_are_saved(name, tmp_path):
    template = SAVED[name]()
    # The step of a TrainState is an int before the first update, and then an array.
    arrays = jax.tree.map(jnp.asarray, template)
    state = jax.tree.map(
        lambda x: jnp.arange(x.size).reshape(x.shape).astype(x.dtype), arrays
    )
    jaxq.save(tmp_path / "state.safetensors", state)
    loaded = jaxq.load(tmp_path / "state.safetensors", into=template)
    assert jax.tree.structure(loaded) == jax.tree.structure(template)
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(state))


def test_orbax_restores_the_state(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    _, state = train(adamw8bit(0.01), 2)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    assert_same(restored, state)


# Errors.


def test_errors():
    adam = optax.adam(1e-3)
    params = {"w": jnp.ones((64, 256))}
    with pytest.raises(TypeError, match="tx must be an optax transformation, got floa"):
        quantize_state(1e-3)
    with pytest.raises(ValueError, match="min_size must be a whole number"):
        quantize_state(adam, min_size=-1)
    with pytest.raises(ValueError, match="spec= has the format udynamic8, .* second="):
        quantize_state(adam, "udynamic8")
    with pytest.raises(ValueError, match="spec= has the format uint8, .* second="):
        quantize_state(adam, QuantSpec("uint8", PerGroup(256)))
    with pytest.raises(ValueError, match="quantize_state: spec: unknown preset"):
        quantize_state(adam, "dynamic9")
    with pytest.raises(ValueError, match=r"Use spec.replace\(granularity=jaxq.PerGr"):
        quantize_state(adam, QuantSpec("int8"))
    with pytest.raises(ValueError, match="a block depends on other blocks"):
        quantize_state(adam, "nf4_dq")
    stochastic = QuantSpec("udynamic8", PerGroup(256), rounding="stochastic")
    with pytest.raises(ValueError, match="second= rounds stochastically"):
        quantize_state(adam, second=stochastic)
    with pytest.raises(ValueError, match=r"fits where=\['\*\*/nothing'\]. Correct"):
        quantize_state(adam, where="**/nothing").init(params)
    with pytest.raises(TypeError, match="0/mu/w must be float32, bfloat16 or float16"):
        quantize_state(adam).init({"w": jnp.ones((64, 256), jnp.complex64)})
