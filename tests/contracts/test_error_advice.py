"""Errors that name a remedy, and the remedy itself.

Each test follows the advice of the error that it provokes.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors, linen, nnx
from jax.sharding import AxisType, PartitionSpec

import jaxq
from jaxq import PerGroup, QuantSpec, Recipe, Rule
from jaxq.formats._registry import _SHORT_NAMES
from tests.arrays import normal


def test_a_stack_of_matrices_names_contracting_and_batch():
    stack, x = normal(3, 32, 32), normal(2, 32)
    with pytest.raises(ValueError, match=r"contracting=\(-2,\), batch=\(0,\)"):
        jaxq.quantize(stack, "int8")
    with pytest.raises(ValueError, match=r"contracting=\(-2,\) and batch=\(0,\)"):
        jaxq.quantize_params({"w": stack}, "int8")
    qt = jaxq.quantize(stack, "int8", contracting=(-2,), batch=(0,))
    y, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, qt)
    assert y.shape == (2, 32)
    shared = jaxq.quantize(stack, "int8", contracting=(-2,))
    with pytest.raises(ValueError, match=r"quantize a stack with batch=\(0,\)"):
        jax.lax.scan(lambda x, w: (x @ w, None), x, shared)


def test_a_group_that_does_not_divide_names_the_granularity():
    w = normal(100, 8)
    with pytest.raises(ValueError, match=r"Pass jaxq\.PerGroup\(size, pad=True\) or "):
        jaxq.quantize(w, QuantSpec("int4", PerGroup(32)))
    qt = jaxq.quantize(w, QuantSpec("int4", PerGroup(32, pad=True)))
    assert qt.shape == (100, 8)


def test_a_linen_module_names_the_linen_function():
    with pytest.raises(TypeError, match=r"jaxq\.nn\.linen\.quantize_model\(module, "):
        jaxq.quantize_model(linen.Dense(8), "int8")


@pytest.mark.parametrize("name", ["fp8", "FP8", "e4m3"])
def test_a_short_name_of_a_float8_format_suggests_float8(name):
    with pytest.raises(ValueError, match="Did you mean 'float8_e4m3fn'"):
        jaxq.emulation.Policy(operands=name)
    with pytest.raises(ValueError, match="Did you mean 'float8_e4m3fn'"):
        QuantSpec(format=name)


@pytest.mark.parametrize("short", sorted(_SHORT_NAMES))
def test_short_names_mean_formats_that_exist(short):
    with pytest.raises(ValueError, match="Did you mean") as error:
        jaxq.formats.get(short)
    suggested = str(error.value).split("Did you mean ")[1].split("?")[0]
    for name in suggested.split(" or "):
        assert jaxq.formats.get(name.strip("'")).name == name.strip("'")


def test_float8_is_not_taken_for_float64():
    message = "Did you mean 'float8_e4m3fn' or 'float8_e5m2'"
    with pytest.raises(ValueError, match=message):
        jaxq.formats.get("float8")
    with pytest.raises(ValueError, match=message):
        jaxq.cast(jnp.ones(3), "float8")


@pytest.mark.parametrize(
    "name", sorted(set(jaxq.presets()) - set(jaxq.formats.names()) - set(_SHORT_NAMES))
)
def test_the_name_of_a_preset_is_no_format_and_the_error_names_the_format(name):
    fmt = jaxq.presets()[name].fmt.name
    message = f"'{name}' is a preset, .*Its format is '{fmt}'"
    for takes_a_format in (
        jaxq.formats.get,
        lambda name: QuantSpec(format=name),
        lambda name: jaxq.emulation.Policy(operands=name),
    ):
        with pytest.raises(ValueError, match=message) as error:
            takes_a_format(name)
        assert "Did you mean" not in str(error.value)


RECIPES = sorted(set(jaxq.recipes.names()) - set(jaxq.presets()))


@pytest.mark.parametrize("name", RECIPES)
def test_the_name_of_a_recipe_is_no_format_and_the_error_names_the_formats(name):
    rule = jaxq.recipes.get(name).rules[-1]
    message = f"'{name}' is a recipe for models. .*weights is '{rule.weight.fmt.name}'"
    if rule.activation is not None:
        message += f", that of its inputs '{rule.activation.fmt.name}'"
    with pytest.raises(ValueError, match=message):
        QuantSpec(format=name)


TAKE_A_PRESET = {
    "quantize": lambda name: jaxq.quantize(jnp.ones((32, 8)), name),
    "fake_quant": lambda name: jaxq.fake_quant(jnp.ones((32, 8)), name),
    "KVCache.empty": lambda name: jaxq.ops.KVCache.empty(
        name, batch=1, num_heads=1, length=64, head_dim=64
    ),
    "quantize_state": lambda name: jaxq.optim.quantize_state(optax.adam(1e-3), name),
}


@pytest.mark.parametrize("caller", TAKE_A_PRESET)
@pytest.mark.parametrize("name", RECIPES)
def test_the_name_of_a_recipe_is_no_preset_and_the_error_names_one(caller, name):
    message = rf"{caller}: .*'{name}' is a recipe for models.* weights, '(\w+)'"
    with pytest.raises(ValueError, match=message) as error:
        TAKE_A_PRESET[caller](name)
    preset = re.search(message, str(error.value))[1]
    rule = jaxq.recipes.get(name).rules[-1]
    assert jaxq.presets()[preset] == rule.weight


@pytest.mark.parametrize("name", RECIPES)
def test_a_rule_with_the_name_of_a_recipe_says_what_to_write(name):
    """What the error says makes the rule of the recipe."""
    message = rf"'{name}' is a recipe for models, .*Write (.*) in the rule, or add"
    with pytest.raises(ValueError, match=message) as error:
        Rule(weight=name)
    fields = re.search(message, str(error.value))[1]
    recipe = jaxq.recipes.get(name)
    written = eval(f"dict({fields})")
    assert Rule(**written, or_nearest=True) == recipe.rules[-1]
    assert ("with rotate=True" in str(error.value)) == bool(recipe.rotate)


def test_a_format_in_the_place_of_a_recipe_names_the_spec():
    with pytest.raises(ValueError, match=r"QuantSpec\(format='float8_e4m3fn'"):
        jaxq.recipes.get("float8-e4m3fn")


def test_an_embedding_that_is_indexed_names_take():
    recipe = Recipe([Rule("", weight="int8")])
    qmodel, _ = jaxq.quantize_model(nnx.Embed(16, 32, rngs=nnx.Rngs(0)), recipe)
    tokens = jnp.asarray([1, 2])
    with pytest.raises(IndexError, match=r"jaxq\.ops\.take\(table, indices\)"):
        qmodel.embedding[tokens]
    rows = jaxq.ops.take(qmodel.embedding[...], tokens)
    np.testing.assert_array_equal(rows, qmodel(tokens))


def test_a_qtensor_that_shard_map_would_split_names_the_specs():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("d",))
    qt, x = jaxq.quantize(normal(32, 8), "int8"), normal(2, 32)

    def product(x, qt):
        return x @ qt

    whole = jax.shard_map(
        product, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()
    )
    np.testing.assert_allclose(whole(x, qt), x @ qt, rtol=1e-5)
    half = jax.tree.map(lambda leaf: leaf[: leaf.shape[0] // 2], qt)
    with pytest.raises(ValueError, match=r"in_specs=jaxq\.sharding\.specs"):
        product(x, half)


def test_loaded_linen_variables_run_in_the_module_that_the_error_names(tmp_path):
    module, x = linen.Dense(8), normal(2, 32)
    variables = module.init(jax.random.key(0), x)
    qmodule, qvariables, _ = jaxq.nn.linen.quantize_model(module, variables, "int8")
    jaxq.save(tmp_path / "dense", qvariables)
    with pytest.raises(TypeError, match=r"Quantized\(module\)\.apply\(variables, x\)"):
        jaxq.load(tmp_path / "dense", into=module)
    loaded = jaxq.load(tmp_path / "dense")
    y = jaxq.nn.linen.Quantized(module).apply(loaded, x)
    np.testing.assert_array_equal(y, qmodule.apply(qvariables, x))


FLOAT_MODULES = {
    "a kernel of another shape": (linen.Dense(8), normal(2, 32)),
    "a square kernel": (linen.Dense(32), normal(2, 32)),
    "a table": (linen.Embed(8, 16), jnp.asarray([1, 2])),
    "a convolution": (linen.Conv(8, (3,)), normal(1, 16, 4)),
}


def guide(name):
    """The words of a guide with one space between them."""
    path = Path(__file__).parents[2] / "docs" / f"{name}.md"
    return " ".join(path.read_text().split())


@pytest.mark.parametrize("case", FLOAT_MODULES)
def test_the_error_of_a_float_module_with_quantized_variables_is_found(case):
    """Either the error names the wrapper, or the guide quotes the error of Flax."""
    module, x = FLOAT_MODULES[case]
    variables = module.init(jax.random.key(0), x)
    recipe = Recipe([Rule(weight="int8")])
    _, qvariables, _ = jaxq.nn.linen.quantize_model(module, variables, recipe)
    with pytest.raises((TypeError, errors.ScopeParamShapeError)) as error:
        module.apply(qvariables, x)
    if error.type is TypeError:
        assert "jaxq.nn.linen.Quantized(module)" in str(error.value)
    else:
        text = str(error.value)
        assert "flax.errors.ScopeParamShapeError" in guide("models")
        for phrase in (
            "the given initializer is expected to generate shape",
            "but the existing parameter it received has shape",
        ):
            assert phrase in text
            assert phrase in guide("models")
            assert phrase in " ".join(jaxq.nn.linen.Quantized.__doc__.split())
    y = jaxq.nn.linen.Quantized(module).apply(qvariables, x)
    assert y.shape == module.apply(variables, x).shape


@pytest.mark.parametrize(
    ("kind", "spec", "phrases"),
    [
        (
            AxisType.Auto,
            PartitionSpec(None, "t"),
            ("axis sizes that are not evenly divisible by", "evenly divide 1"),
        ),
        (
            AxisType.Explicit,
            PartitionSpec("t", None),
            ("in_specs passed to shard_map", "does not match the specs of the input"),
        ),
    ],
)
def test_the_guide_quotes_what_jax_says_of_one_spec_for_a_qtensor(kind, spec, phrases):
    """JAX compares the specs with codes and scales before our code runs."""
    mesh = jax.make_mesh((2,), ("t",), axis_types=(kind,))
    qt, x = jaxq.quantize(normal(64, 256), "int4"), normal(8, 64)

    def product(in_specs):
        return jax.jit(
            jax.shard_map(
                lambda x, qt: x @ qt,
                mesh=mesh,
                in_specs=(PartitionSpec(), in_specs),
                out_specs=PartitionSpec(None, "t"),
            )
        )

    with pytest.raises(ValueError, match=phrases[0]) as error:
        product(spec)(x, qt)
    for phrase in phrases:
        assert phrase in str(error.value)
        assert phrase in guide("sharding")
    # What the guide says to do.
    columns = PartitionSpec(None, "t")
    placed = jaxq.sharding.place(qt, mesh, columns)
    x = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec()))
    y = product(jaxq.sharding.specs(placed, columns, mesh=mesh))(x, placed)
    np.testing.assert_allclose(np.asarray(y), normal(8, 64) @ qt, rtol=1e-4, atol=1e-4)


def test_the_path_of_a_parameter_in_a_rule_names_the_layer():
    model = nnx.Sequential(nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="Write the path of its layer, 'layers/0'"):
        jaxq.quantize_model(model, Recipe([Rule("layers/0/kernel", weight="int8")]))
    module, x = linen.Sequential([linen.Dense(8)]), normal(2, 32)
    variables = module.init(jax.random.key(0), x)
    recipe = Recipe([Rule("layers_0/kernel", weight="int8")])
    with pytest.raises(ValueError, match="Write the path of its layer, 'layers_0'"):
        jaxq.nn.linen.quantize_model(module, variables, recipe, example=x)


def test_quantize_params_shows_its_progress(capsys):
    params = {"a": normal(32, 8), "b": normal(32, 8)}
    jaxq.quantize_params(params, "int8", progress=True)
    assert "quantizing: 2/2" in capsys.readouterr().err


def test_the_printout_of_a_quantized_model_has_bits_and_shapes():
    qmodel, _ = jaxq.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), "int4")
    text = str(qmodel)
    assert "int4[64x8]" in text
    assert f"{qmodel.kernel[...].bits_per_element:.4g} bits" in text
    assert "ArrayRepr" not in text


def test_a_linen_module_in_a_function_of_nnx_or_trees_names_the_right_one(tmp_path):
    module, x = linen.Dense(8), normal(2, 32)
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(TypeError, match=r"jaxq\.nn\.linen\.fold_batch_norm"):
        jaxq.nn.fold_batch_norm(module, x)
    with pytest.raises(TypeError, match=r"jaxq\.nn\.linen\.quantize_model\(module, "):
        jaxq.quantize_params(module, "int8")
    with pytest.raises(TypeError, match="Save its variables"):
        jaxq.save(tmp_path / "module", module)
    with pytest.raises(TypeError, match="that is not in a linen package"):
        jaxq.nn.linen.quantize_model(
            nnx.Linear(32, 8, rngs=nnx.Rngs(0)), variables, "int8"
        )


@pytest.mark.parametrize("preset", ["int4", "nf4_dq", "w8a8"])
def test_the_table_of_a_quantized_linen_module_has_true_sizes(preset):
    module, x = linen.Sequential([linen.Dense(64), linen.Dense(8)]), normal(2, 32)
    variables = module.init(jax.random.key(0), x)
    qmodule, qvariables, report = jaxq.nn.linen.quantize_model(
        module, variables, preset, example=x
    )
    text = qmodule.tabulate(
        qvariables, x, console_kwargs={"force_terminal": False, "width": 200}
    )
    total = text.split("Total Parameters:")[1].split("(")[1].split(")")[0]
    assert total == f"{report.bytes_after / 1e3:.1f} KB"
    assert {"layers_0", "layers_1"} <= set(text.split())
    with pytest.raises(TypeError, match=r"Write qmodule\.tabulate\(qvariables, x\)"):
        qmodule.tabulate(jax.random.key(0), x)
    with pytest.raises(ValueError, match="are floats where QTensors are expected"):
        qmodule.tabulate(variables, x)


def test_biases_beside_a_stack_of_weights_stay_in_floats():
    """A scan over the tree works, whatever the names of its biases are."""
    layers = {"w": normal(3, 64, 64), "b": normal(3, 64), "gains": normal(3, 64)}
    params = {"layers": layers, "down": {"w": normal(64, 8), "b": normal(64, 64)}}
    rule = Rule("layers/w", weight="int4", contracting=(-2,), batch=(0,))
    recipe = Recipe([rule, *jaxq.recipes.get("int4").rules])
    qparams, report = jaxq.quantize_params(params, recipe)
    assert [row.path for row in report.quantized] == ["down/b", "down/w", "layers/w"]
    notes = {row.path: row.note for row in report.rows}
    assert notes["layers/b"] == "a stack of vectors beside layers/w, left in floats"

    def layer(x, p):
        return jnp.tanh(x @ p["w"] + p["b"][None]) * p["gains"][None], None

    y, _ = jax.lax.scan(layer, normal(2, 64), qparams["layers"])
    assert y.shape == (2, 64)
    # A rule for the array itself decides.
    own = Recipe([Rule("layers/b", weight="int8"), *recipe.rules])
    _, report = jaxq.quantize_params(params, own)
    assert "layers/b" in [row.path for row in report.quantized]


def test_a_codebook_in_the_place_of_a_spec_names_the_spec():
    codebook = jaxq.formats.CodebookFormat("own", [-1.0, -0.25, 0.25, 1.0])
    with pytest.raises(TypeError, match=r"Pass jaxq\.QuantSpec\(format=\.\.\., gran"):
        Rule("**", weight=codebook)
    spec = QuantSpec(format=codebook, granularity=PerGroup(64))
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    _, report = jaxq.quantize_model(model, Recipe([Rule("**", weight=spec)]))
    assert report.quantized[0].format == "own"
