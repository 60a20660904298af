"""Mixed precision: sensitivities and assignments.

Sensitivities are compared with quantized models, assignments with all combinations.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from jaxq.nn import Sensitivity, assign, mixed_recipe, sensitivity
from tests.arrays import normal

CHOICES, BATCHES = (
    ("int8", "int2"),
    [4 * np.asarray(normal(8, 32, seed=seed)) for seed in range(2)],
)


class Model(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(16, 32, rngs=nnx.Rngs(0))
        self.first = nnx.Linear(32, 32, rngs=nnx.Rngs(1))
        self.second = nnx.Linear(32, 16, rngs=nnx.Rngs(2))
        self.lm_head = nnx.Linear(16, 8, rngs=nnx.Rngs(3))

    def __call__(self, x):
        return self.lm_head(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def measured(model):
    return sensitivity(model, CHOICES, BATCHES)


@nnx.jit
def cost(model, qmodel, batch):
    return jaxq.metrics.kl_divergence(model(batch), qmodel(batch))


def test_sensitivity_is_the_divergence_of_one_quantized_layer(model, measured):
    assert list(measured.kl) == ["first", "second"]
    assert measured.size == {"first": 1024, "second": 512}
    for path, choice in itertools.product(measured.kl, CHOICES):
        rest = "second" if path == "first" else "first"
        recipe = jaxq.Recipe(
            [jaxq.Rule(rest, skip=True), jaxq.Rule(path, weight=choice)]
        )
        qmodel, report = jaxq.quantize_model(model, recipe)
        kl = np.mean([float(cost(model, qmodel, batch)) for batch in BATCHES])
        np.testing.assert_allclose(measured.kl[path][choice], kl, rtol=0.02, atol=1e-7)
        assert measured.bits[path][choice] == 8 * report.quantized[0].bytes_after
    np.testing.assert_array_equal(model.first.kernel[...], Model().first.kernel[...])


@pytest.mark.parametrize("seed", range(5))
def test_assignments_are_the_best_combination(seed):
    rng = np.random.default_rng(seed)
    names, size = (
        ("a", "b", "c"),
        {f"l{i}": int(rng.integers(50, 500)) for i in range(5)},
    )
    kl = {
        path: dict(zip(names, np.sort(rng.exponential(size=3)), strict=True))
        for path in size
    }
    bits = {
        path: {"a": 8 * n, "b": 4 * n + 16, "c": 3 * n + 16} for path, n in size.items()
    }
    budget = float(rng.uniform(3.5, 7))
    chosen = assign(Sensitivity(kl, bits, size), budget)
    allowed = budget * sum(size.values())
    cost = {
        combination: sum(kl[p][c] for p, c in zip(size, combination, strict=True))
        for combination in itertools.product(names, repeat=5)
        if sum(bits[p][c] for p, c in zip(size, combination, strict=True)) <= allowed
    }
    assert tuple(chosen.values()) in cost
    assert cost[tuple(chosen.values())] == min(cost.values())


def layers_of_a_large_model(num_layers):
    """Bits of int8 and int4 weights with scales. Their greatest common divisor is 1."""
    rng = np.random.default_rng(num_layers)
    size = {f"l{i}": int(rng.integers(10**5, 10**8)) for i in range(num_layers)}
    bits = {path: {"int8": 8 * n + 33, "int4": 4 * n + 17} for path, n in size.items()}
    kl = {
        path: {"int8": 1e-4, "int4": float(0.01 + rng.exponential())} for path in size
    }
    return Sensitivity(kl, bits, size)


def total_bits(layers, choices):
    return sum(layers.bits[path][choice] for path, choice in choices.items())


@pytest.mark.parametrize("num_layers", [1, 7, 200])
def test_a_budget_that_fits_exactly_is_used(num_layers):
    layers = layers_of_a_large_model(num_layers)
    size = sum(layers.size.values())
    for choice in ("int8", "int4"):
        everywhere = dict.fromkeys(layers.kl, choice)
        budget = total_bits(layers, everywhere) / size
        assert assign(layers, budget) == everywhere
    # One bit less than int8 everywhere: the layer that needs its bits least is int4.
    largest = dict.fromkeys(layers.kl, "int8")
    chosen = assign(layers, (total_bits(layers, largest) - 1) / size)
    (cheapest,) = [path for path, choice in chosen.items() if choice == "int4"]
    assert layers.kl[cheapest] == min(layers.kl.values(), key=lambda kl: kl["int4"])
    # One bit less than int4 everywhere does not fit, and the error names what fits.
    least = total_bits(layers, dict.fromkeys(layers.kl, "int4"))
    with pytest.raises(ValueError, match="more than the budget") as error:
        assign(layers, (least - 1) / size)
    named = float(str(error.value).split("take ")[1].split(" bits")[0])
    assert total_bits(layers, assign(layers, named)) <= named * size


def test_a_budget_holds_and_no_single_layer_could_have_more():
    layers = layers_of_a_large_model(100)
    size = sum(layers.size.values())
    for budget in (4.001, 5.0, 6.3, 7.999):
        chosen = assign(layers, budget)
        left = budget * size - total_bits(layers, chosen)
        growth = [
            layers.bits[path]["int8"] - layers.bits[path]["int4"]
            for path, choice in chosen.items()
            if choice == "int4"
        ]
        assert 0 <= left < min(growth)


def test_impossible_requests_are_errors():
    with pytest.raises(
        ValueError, match=r"take 4\.000 bits per weight, more than the budget of 3"
    ):
        assign(Sensitivity({"a": {"int4": 0.1}}, {"a": {"int4": 400}}, {"a": 100}), 3)
    with pytest.raises(ValueError, match="one choice and one batch are needed"):
        sensitivity(Model(), ["int8"], [])
    with pytest.raises(ValueError, match="unknown preset"):
        sensitivity(Model(), ["int9"], [normal(2, 32)])
    with pytest.raises(ValueError, match="no layer that"):
        sensitivity(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), ["int8"], [normal(2, 4)])


def test_from_sensitivity_to_a_model(model, measured):
    recipe = mixed_recipe(assign(measured, 6.0), method="hqq")
    _, report = jaxq.quantize_model(model, recipe)
    assert report.bits_per_weight <= 6.0
    assert {row.method for row in report.quantized} == {"hqq"}
    assert len({row.format for row in report.quantized}) == 2


def test_padding_does_not_count(model, measured):
    padded = [np.concatenate([batch, 100 + 0 * batch]) for batch in BATCHES]
    masked = sensitivity(model, CHOICES, padded, mask=lambda batch: np.arange(16) < 8)
    for path in measured.kl:
        np.testing.assert_allclose(
            masked.kl[path]["int2"], measured.kl[path]["int2"], rtol=1e-4
        )
    with pytest.raises(ValueError, match="must be True somewhere"):
        sensitivity(model, CHOICES, BATCHES, mask=lambda batch: np.arange(8) > 8)
    with pytest.raises(TypeError, match=r"Pass a list: \[x\]"):
        sensitivity(model, CHOICES, BATCHES[0])


@pytest.mark.parametrize(
    ("choices", "got"),
    [(BATCHES, "list of ndarray"), (BATCHES[0], "ndarray"), (3, "int")],
)
def test_arguments_in_another_order_are_named(model, choices, got):
    message = rf"choices must be a list of preset names.* got a {got}"
    with pytest.raises(TypeError, match=rf"^sensitivity: {message}"):
        sensitivity(model, choices, CHOICES)
    module, variables = LinenModel(), linen_variables(model)
    with pytest.raises(TypeError, match=rf"^linen\.sensitivity: {message}"):
        jaxq.nn.linen.sensitivity(module, variables, choices, CHOICES)


class LinenModel(linen.Module):
    """The linen module that computes what `Model` computes."""

    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(32, name="first")(x))
        return linen.Dense(8, name="lm_head")(
            jnp.tanh(linen.Dense(16, name="second")(x))
        )


def linen_variables(model):
    layers = {"first": model.first, "second": model.second, "lm_head": model.lm_head}
    return {
        "params": {
            name: {"kernel": layer.kernel[...], "bias": layer.bias[...]}
            for name, layer in layers.items()
        }
    }


def test_a_linen_module_has_the_sensitivity_of_the_nnx_model(model, measured):
    module, variables = LinenModel(), linen_variables(model)
    result = jaxq.nn.linen.sensitivity(module, variables, CHOICES, BATCHES)
    assert result.bits == measured.bits
    assert result.size == measured.size
    for path in measured.kl:
        for choice in CHOICES:
            np.testing.assert_allclose(
                result.kl[path][choice], measured.kl[path][choice], rtol=1e-3, atol=1e-7
            )
    # The variables are as before, and the recipe fits the module.
    jax.tree.map(np.testing.assert_array_equal, variables, linen_variables(model))
    recipe = mixed_recipe(assign(result, 6.0))
    _, _, report = jaxq.nn.linen.quantize_model(
        module, variables, recipe, example=BATCHES[0]
    )
    assert report.bits_per_weight <= 6.0
    with pytest.raises(TypeError, match=r"jaxq\.nn\.linen\.sensitivity\(module, var"):
        sensitivity(module, CHOICES, BATCHES)
    with pytest.raises(TypeError, match="must be a flax linen Module"):
        jaxq.nn.linen.sensitivity(model, variables, CHOICES, BATCHES)


def test_stacked_linen_layers_are_one_layer():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return x + jnp.tanh(linen.Dense(32, name="up")(x)), None

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            scan = linen.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return scan(name="blocks")(x, None)[0]

    module = Net()
    variables = module.init(jax.random.key(0), BATCHES[0])
    result = jaxq.nn.linen.sensitivity(module, variables, CHOICES, BATCHES)
    assert result.size == {"blocks/up": 3 * 32 * 32}
    # One scale for each column of each layer.
    assert result.bits["blocks/up"]["int8"] == 3 * 32 * 32 * 8 + 3 * 32 * 32
    assert result.kl["blocks/up"]["int8"] < result.kl["blocks/up"]["int2"]


def test_sensitivities_print_as_a_table():
    measured = Sensitivity(
        {"up": {"int8": 0.001, "int2": 0.25}, "": {"int8": 0.002, "int2": 0.5}},
        {"up": {"int8": 16_800, "int2": 4_400}, "": {"int8": 850, "int2": 210}},
        {"up": 2_000, "": 100},
    )
    header, up, model = str(measured).splitlines()
    assert header.split() == [
        *("layer", "weights", "KL", "int8", "(bits)", "KL", "int2", "(bits)"),
    ]
    assert up.split() == ["up", "2,000", "0.00100", "(8.40)", "0.25000", "(2.20)"]
    assert model.startswith("the model itself")
    assert len(header) == len(up) == len(model)
