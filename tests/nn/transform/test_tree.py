"""Trees of arrays: what is quantized, along which axes, and the report."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from jaxq import QTensor, Recipe, Rule
from tests.arrays import assert_same, normal


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Mlp:
    up: jax.Array
    down: jax.Array


@pytest.fixture(scope="module")
def params():
    return {
        "embed_tokens": {"embedding": normal(16, 32)},
        "layers": [
            {"up": {"kernel": normal(32, 8), "bias": normal(8)}},
            {"up": {"kernel": normal(32, 8)}},
        ],
        "lm_head": {"kernel": normal(32, 16)},
        "steps": jnp.int32(3),
    }


def test_matrices_become_qtensors_and_nothing_else(params):
    q, report = jaxq.quantize_params(params, "int8")
    assert jax.tree.structure(params) == jax.tree.structure(
        q, is_leaf=lambda x: isinstance(x, QTensor)
    )
    assert [row.path for row in report.quantized] == [
        "layers/0/up/kernel",
        "layers/1/up/kernel",
    ]
    assert q["embed_tokens"]["embedding"] is params["embed_tokens"]["embedding"]
    notes = {row.path: row.note for row in report.rows}
    assert notes["embed_tokens/embedding"] == "embedding, left in floats by default"
    assert notes["lm_head/kernel"] == "output head, left in floats by default"
    assert notes["layers/0/up/bias"] == "not a matrix, left in floats"
    assert notes["steps"] == "no floats, left as it is"
    qt = jaxq.quantize(params["layers"][0]["up"]["kernel"], "int8")
    np.testing.assert_array_equal(q["layers"][0]["up"]["kernel"].codes(), qt.codes())


def test_code_of_the_user_multiplies_and_dequantizes(params):
    q, _ = jaxq.quantize_params(params, "w8a8")
    x = normal(3, 32)

    @jax.jit
    def run(p, x):
        w = p["layers"][0]["up"]["kernel"]
        return x @ w, jaxq.matmul(x, w), jaxq.einsum("bk,kn->bn", x, w)

    expected = x @ params["layers"][0]["up"]["kernel"]
    for y in run(q, x):
        assert np.linalg.norm(y - expected) < 0.02 * np.linalg.norm(expected)
    float_params = jax.jit(jaxq.dequantize_params)(q)
    assert jax.tree.map(jnp.shape, float_params) == jax.tree.map(jnp.shape, params)
    assert (
        jaxq.dequantize_params(q, dtype=jnp.bfloat16)["layers"][0]["up"]["kernel"].dtype
        == jnp.bfloat16
    )


def test_states_of_nnx_and_stacks_go_by_the_names_of_layers():
    model = nnx.Dict(
        up=nnx.Linear(32, 8, rngs=nnx.Rngs(0)),
        router=nnx.Linear(32, 4, rngs=nnx.Rngs(0)),
    )
    q, report = jaxq.quantize_params(nnx.state(model), "int8")
    notes = {row.path: row.note for row in report.rows}
    assert notes["router/kernel"] == "router, left in floats by default"
    assert [row.path for row in report.quantized] == ["up/kernel"]
    assert isinstance(q["up"]["kernel"].get_value(), QTensor)
    q, _ = jaxq.quantize_params(nnx.state(model), Recipe([Rule("up", weight="int8")]))
    stacked_params = {
        "norm": {"scale": normal(3, 32)},
        "up": {"bias": normal(3, 8), "kernel": normal(32, 8)},
    }
    assert [
        row.path for row in jaxq.quantize_params(stacked_params, "int8")[1].quantized
    ] == ["up/kernel"]


def test_rules_name_the_axes():
    params = {"experts": normal(4, 32, 8), "torch": {"weight": normal(8, 32)}}
    with pytest.raises(ValueError, match=r"experts \(Array\): .* which of its 3 axes"):
        jaxq.quantize_params(params, "int8")
    recipe = Recipe(
        [
            Rule("experts", weight="int4", contracting=(-2,), batch=(0,)),
            Rule("torch", weight="int8", contracting=(1,)),
        ]
    )
    q, report = jaxq.quantize_params(params, recipe)
    assert q["experts"].batch_shape == (4,)
    assert [row.granularity for row in report.rows] == [
        "PerGroup(along -2, batch axes 0)",
        "PerChannel(along -1)",
    ]
    assert q["torch"]["weight"].scale.shape == (8, 1)
    for i in range(4):
        np.testing.assert_array_equal(
            q["experts"][i].codes(), jaxq.quantize(params["experts"][i], "int4").codes()
        )
    plan = jaxq.nn.plan(params, recipe)
    assert [(r.path, r.bytes_after) for r in plan.rows] == [
        (r.path, r.bytes_after) for r in report.rows
    ]


def test_one_error_names_all_problems():
    params = {
        "a": normal(4, 4).at[1, 2].set(jnp.nan),
        "b": normal(2, 2, 2),
        "c": normal(4, 4),
    }
    with pytest.raises(
        ValueError,
        match=r"(?s)a \(Array\): quantize: a\[1, 2\] is nan.*b \(Array\): .* which of",
    ):
        jaxq.quantize_params(params, "int8")
    with pytest.raises(
        ValueError, match=r"(?s)c \(Array\): method 'gptq' needs data. Pass calib"
    ):
        jaxq.quantize_params({"c": params["c"]}, "int4_gptq")
    with pytest.raises(
        ValueError,
        match=r"rules \['d'\] match no parameter.*Parameters here: c \(Array\)",
    ):
        jaxq.quantize_params({"c": params["c"]}, Recipe([Rule("d", weight="int8")]))
    q, report = jaxq.quantize_params(
        {"c": params["c"]}, Recipe([Rule("d", weight="int8")]), strict=False
    )
    assert report.notes == ("rule 'd' matched nothing",)
    assert "rule 'd' matched nothing" in str(report)
    assert q["c"] is params["c"]


def test_one_error_names_problems_of_all_sorts():
    params = {"b": normal(2, 2, 2), "c": normal(4, 4)}
    recipe = Recipe([Rule("b", weight="int8"), Rule("typo", weight="int8")])
    with pytest.raises(ValueError) as error:
        jaxq.quantize_params(params, recipe)
    text = str(error.value)
    slots = "these parameters cannot be quantized:\n  b (Array): "
    assert text.startswith(f"quantize_params: {slots}")
    assert "\nquantize_params: rules ['typo'] match no parameter " in text
    with pytest.raises(ValueError) as error:
        jaxq.nn.plan(params, recipe)
    assert str(error.value) == text.replace("quantize_params: ", "plan: ")


def test_methods_without_data_work():
    params = {"w": normal(64, 8)}
    q, report = jaxq.quantize_params(
        params, Recipe([Rule(weight="int4", method="hqq")])
    )
    assert report.rows[0].method == "hqq"
    assert report.rows[0].sqnr > 15
    assert q["w"].shape == (64, 8)


def test_a_quantized_tree_stays_as_it_is(params):
    q, _ = jaxq.quantize_params(params, "int8")
    second_tree, report = jaxq.quantize_params(
        q, Recipe([Rule("lm_head", weight="int8")])
    )
    assert second_tree["layers"][0]["up"]["kernel"] is q["layers"][0]["up"]["kernel"]
    assert {r.path for r in report.rows if "already" in r.note} == {
        "layers/0/up/kernel",
        "layers/1/up/kernel",
    }


def test_donated_arrays_are_gone():
    params = {"w": normal(64, 8) + 0, "b": normal(8) + 0}
    q, _ = jaxq.quantize_params(params, "int8", donate=True)
    assert params["w"].is_deleted()
    assert not params["b"].is_deleted()
    assert q["w"].shape == (64, 8)


def test_a_donated_array_is_freed_after_its_last_use():
    w, head = normal(64, 8) + 0, normal(8, 64) + 0
    params = {"a": w, "b": w, "c": head, "lm_head": head}
    q, _ = jaxq.quantize_params(params, "int8", donate=True)
    assert w.is_deleted()
    np.testing.assert_array_equal(q["a"].codes(), q["b"].codes())
    np.testing.assert_array_equal(q["lm_head"], normal(8, 64))
    w = normal(64, 8) + 0
    layers = [
        nnx.eval_shape(lambda: nnx.Linear(64, 8, use_bias=False, rngs=nnx.Rngs(0)))
        for _ in range(2)
    ]
    for layer in layers:
        layer.kernel.set_value(w)
    q, _ = jaxq.quantize_model(nnx.List(layers), "int8", donate=True)
    assert w.is_deleted()
    np.testing.assert_array_equal(q[0].kernel[...].codes(), q[1].kernel[...].codes())


def test_any_registered_class_is_a_tree():
    q, report = jaxq.quantize_params(Mlp(normal(32, 8), normal(8, 32)), "int8")
    assert isinstance(q, Mlp)
    assert [row.path for row in report.rows] == ["up", "down"]
    assert (normal(2, 32) @ q.up @ q.down).shape == (2, 32)


def test_saved_and_loaded(tmp_path, params):
    q, _ = jaxq.quantize_params(params, "nf4")
    jaxq.save(tmp_path / "q.safetensors", q)
    loaded_tree = jaxq.load(tmp_path / "q.safetensors")
    assert_same(loaded_tree, q)


def test_empty_arrays_have_no_bits_per_weight():
    _, report = jaxq.quantize_params({"w": normal(64, 8), "none": normal(0, 8)}, "int8")
    assert (
        report.bits_per_weight == jaxq.quantize(normal(64, 8), "int8").bits_per_element
    )
    assert np.isnan(
        jaxq.quantize_params({"none": normal(0, 8)}, "int8")[1].bits_per_weight
    )


def test_outliers_stay_apart_whatever_the_inputs_are():
    rule = Rule(
        weight="int8", activation="fp8", method="llm_int8", options={"threshold": 4.0}
    )
    meta = jaxq.quantize_params({"w": normal(64, 8)}, Recipe([rule]))[0]["w"].meta
    assert (meta.activation.fmt.name, meta.outliers) == ("float8_e4m3fn", 4.0)


def test_stochastic_rounding_takes_a_key():
    spec = jaxq.QuantSpec("int4", jaxq.PerGroup(32), rounding="stochastic")
    w = normal(64, 8)
    codes = [
        jaxq.quantize_params({"w": w}, spec, key=jax.random.key(i))[0]["w"].codes()
        for i in (0, 0, 1)
    ]
    assert_same(codes[0], codes[1])
    assert (np.asarray(codes[0]) != np.asarray(codes[2])).any()
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    model_codes = [
        jaxq.quantize_model(layer, spec, key=jax.random.key(i))[0].kernel[...].codes()
        for i in (0, 1)
    ]
    assert (np.asarray(model_codes[0]) != np.asarray(model_codes[1])).any()
    with pytest.raises(
        ValueError,
        match=r"quantize_params: the weight= of Rule\('\*\*'\) .* needs a PRNG key",
    ):
        jaxq.quantize_params({"w": w}, spec)
    with pytest.raises(ValueError, match="needs a PRNG key"):
        jaxq.quantize_model(layer, spec)


def test_numpy_float64_is_refused_beside_all_other_problems():
    params = {"wide": np.full((8, 8), 1e300), "hollow": jnp.full((8, 8), jnp.nan)}
    with pytest.raises(
        ValueError,
        match=r"(?s)hollow.*non-finite.*wide must be float32.*float64\[8,8\]",
    ):
        jaxq.quantize_params(params, "int8")


def test_an_array_of_two_names_is_quantized_once():
    w = jnp.ones((32, 4))
    qparams, report = jaxq.quantize_params({"a": w, "b": w}, "int8")
    assert qparams["a"] is qparams["b"]
    first_row, second_row = report.rows
    assert (second_row.note, second_row.bytes_after) == ("the same array as a", 0)
    assert first_row.bytes_after == qparams["a"].nbytes


def test_adapters_and_states_stay_in_floats():
    model = nnx.Sequential(
        nnx.LoRALinear(32, 32, lora_rank=4, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(32, rngs=nnx.Rngs(0)),
    )
    _, report = jaxq.quantize_params(nnx.state(model), "int8")
    assert [row.path for row in report.quantized] == ["layers/0/kernel"]
    qparams, _ = jaxq.quantize_params(
        {"q": {"w": jnp.ones((32, 4)), "lora_a": jnp.ones((32, 4))}}, "int8"
    )
    assert isinstance(qparams["q"]["lora_a"], jax.Array)


class Net(nnx.Module):
    """The nnx model of the same parameters and the same products as `net`."""

    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(x)))


def net(params, x):
    x = jax.nn.gelu(plus(x @ params["up"]["kernel"], params["up"]["bias"]))
    return plus(jaxq.matmul(x, params["down"]["kernel"]), params["down"]["bias"])


def plus(x, bias):
    return x + jnp.broadcast_to(bias, x.shape)


@pytest.fixture(scope="module")
def model():
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="module")
def batches():
    # Correlated channels, so that methods differ from rounding to nearest.
    mix = normal(32, 32, seed=9)
    return [jnp.abs(normal(8, 16, 32, seed=seed) @ mix / 6) for seed in range(2)]


def tree_of(model):
    """The parameters of an nnx model as dicts of arrays."""
    return nnx.to_pure_dict(nnx.state(model, (nnx.Param, jaxq.nn.QuantizedParam)))


CORRECTED = Recipe([Rule(weight="int4", correct_bias=True)])
SMOOTH_STATIC = Recipe(
    [
        Rule(
            weight="int8",
            activation=jaxq.QuantSpec("int8", jaxq.PerTensor()),
            observer="minmax",
            method="smoothquant",
        )
    ]
)
SETTINGS = [
    ("int4_gptq", {}),
    ("int4_awq", {}),
    ("w8a8_smoothquant", {}),
    (SMOOTH_STATIC, {}),
    ("int4_adaround", {}),
    ("w8a8_static", {}),
    (CORRECTED, {}),
    ("int4_gptq", {"sequential": "layers"}),
    ("int4_gptq", {"mask": lambda x: np.arange(16) < np.arange(4, 12)[:, None]}),
]


@pytest.mark.parametrize(("recipe", "kwargs"), SETTINGS)
def test_a_tree_is_calibrated_as_the_nnx_model_is(model, batches, recipe, kwargs):
    qmodel, wanted = jaxq.quantize_model(model, recipe, calibration=batches, **kwargs)
    q, report = jaxq.quantize_params(
        tree_of(model), recipe, calibration=batches, forward=net, **kwargs
    )
    assert_same(q, tree_of(qmodel))
    rows = {row.path: row for row in report.rows}
    for row in wanted.quantized:
        assert (rows[row.path].method, rows[row.path].note) == (row.method, row.note)
    assert report.notes == ()


def test_the_trace_shows_the_axes():
    # [out, in], heads, and a stack: without data, each of them needs a rule.
    params = {"a": normal(16, 8), "b": normal(16, 2, 8), "c": normal(3, 16, 16)}

    def forward(p, x):
        x = jnp.einsum("td,dhk->thk", x @ p["a"].T, p["b"]).reshape(-1, 16)
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["c"])[0]

    x = normal(6, 8)
    q, _ = jaxq.quantize_params(params, "int4_gptq", calibration=[x], forward=forward)
    axes = {name: (q[name].meta.geometry.contracted, q[name].batch_shape) for name in q}
    assert axes == {"a": ((-1,), ()), "b": ((-3,), ()), "c": ((-2,), (3,))}
    rules = [Rule("a", weight="int4", contracting=-2), Rule("**", weight="int4")]
    with pytest.raises(ValueError, match=r"contracting=\(-2,\).*contracting=\(1,\)"):
        jaxq.quantize_params(params, Recipe(rules), calibration=[x], forward=forward)
    # A rule may give each head scales of its own. They share their inputs.
    rules = [Rule("b", weight="int4", method="gptq", batch=0, contracting=1)]
    heads = {"b": normal(2, 8, 4)}
    q, _ = jaxq.quantize_params(
        heads,
        Recipe(rules),
        calibration=[x],
        forward=lambda p, x: jnp.einsum("td,hdk->thk", x, p["b"]),
    )
    assert q["b"].batch_shape == (2,)


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_each_layer_of_a_stack_is_calibrated_by_itself(method):
    stack, x = {"w": normal(3, 16, 16) / 4, "b": normal(3, 16)}, normal(7, 16)
    x = x * jnp.array([9.0, *[1.0] * 15])[None]
    rule = dataclasses.replace(SMOOTH_STATIC.rules[0], pattern="w", method=method)
    recipe = Recipe([rule])

    def by_scan(p, x):
        def layer(x, p):
            return jnp.tanh(plus(x @ p["w"], p["b"])), None

        return jax.lax.scan(layer, x, p)[0]

    def by_list(layers, x):
        for layer in layers:
            x = jnp.tanh(plus(x @ layer["w"], layer["b"]))
        return x

    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(3)]
    settings = {"calibration": [x], "fallback": "none"}
    q, _ = jaxq.quantize_params(stack, recipe, forward=by_scan, **settings)
    wanted, _ = jaxq.quantize_params(
        layers,
        Recipe([dataclasses.replace(rule, pattern="*/w")]),
        forward=by_list,
        **settings,
    )
    for i, layer in enumerate(wanted):
        assert_same(q["w"][i].codes(), layer["w"].codes())
        np.testing.assert_allclose(
            q["w"].input_range[i], layer["w"].input_range, rtol=1e-6
        )
        if method == "smoothquant":
            np.testing.assert_allclose(
                q["w"].input_scale[i], layer["w"].input_scale, rtol=1e-5
            )
    out, wanted = by_scan(q, x), by_list(wanted, x)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)


def test_a_tied_weight_merges_its_inputs(batches):
    w = normal(32, 32) / 6
    recipe = Recipe([Rule(weight="int8", activation="int8", observer="minmax")])

    def twice(p, x):
        return jnp.tanh(x @ p["first"]) @ p["second"]

    params, x = {"first": w, "second": w}, batches[0]
    q, report = jaxq.quantize_params(params, recipe, calibration=[x], forward=twice)
    assert q["first"] is q["second"]
    seen = np.concatenate([x, np.tanh(np.asarray(x @ w))])
    largest = max(seen.max(), -seen.min())
    np.testing.assert_allclose(q["first"].input_range[1], largest, rtol=1e-5)
    assert "2 products read it: their inputs are merged" in report.rows[0].note
    assert report.rows[1].note == "the same array as first"
    # In "layers", the two places are different blocks.
    for recipe in ("int4_awq", "int4_gptq"):
        q, _ = jaxq.quantize_params(
            params, recipe, calibration=[x], forward=twice, sequential="layers"
        )
        assert q["first"] is q["second"]


def test_bfloat16_parameters_are_calibrated(batches):
    params = {"w": normal(32, 8, dtype="bfloat16")}

    def forward(p, x):
        return jnp.matmul(x.astype(jnp.bfloat16), p["w"])

    q, report = jaxq.quantize_params(
        params, "int4_gptq", calibration=batches, forward=forward
    )
    assert q["w"].dtype == jnp.bfloat16
    assert report.rows[0].method == "gptq"


def test_arrays_without_statistics_are_named(batches):
    def forward(p, x):
        x = plus(x, p["positions"])
        return (x @ (2 * p["doubled"])) @ p["w"]

    params = {
        "doubled": normal(32, 32),
        "positions": normal(16, 32),
        "w": normal(32, 8),
    }
    settings = {"calibration": batches, "forward": forward}
    with pytest.raises(ValueError) as error:
        jaxq.quantize_params(params, "int4_gptq", **settings)
    assert "doubled (Array): its rule needs data" in str(error.value)
    assert "changes it by mul before a product" in str(error.value)
    assert "positions" not in str(error.value)
    assert "w (Array)" not in str(error.value)
    named = jaxq.recipes.get("int4_gptq").rules
    recipe = Recipe([Rule("doubled", skip=True), *named])
    q, report = jaxq.quantize_params(params, recipe, **settings)
    notes = {row.path: row.note for row in report.rows}
    wanted = "no product of forward reads it (only broadcast_in_dim), left in floats"
    assert notes["positions"].replace("add", "broadcast_in_dim") == wanted
    assert isinstance(q["w"], QTensor)
    # A rule that states the axes means a weight.
    rule = Rule("positions", weight="int4", method="gptq", contracting=-2)
    with pytest.raises(ValueError, match="positions.*no product of forward reads it"):
        jaxq.quantize_params(params, Recipe([rule, *recipe.rules]), **settings)


def test_data_that_cannot_be_used_are_errors(params, batches):
    with pytest.raises(ValueError, match=r"calibration= needs forward="):
        jaxq.quantize_params(params, "int4_gptq", calibration=batches)
    with pytest.raises(ValueError, match=r"and forward=a function that computes"):
        jaxq.quantize_params(params, "int4_gptq")
    with pytest.raises(ValueError, match="there is no batch"):
        jaxq.quantize_params(params, "int4_gptq", calibration=[], forward=net)
    with pytest.raises(ValueError, match="forward reads no array of params"):
        jaxq.quantize_params(
            params, "int4_gptq", calibration=batches, forward=lambda p, x: x
        )


def test_sequential_calibration_sees_quantized_weights(model, batches):
    def floats_only(params, x):
        x = jax.nn.gelu(jnp.matmul(x, params["up"]["kernel"]))
        return jnp.matmul(x, params["down"]["kernel"])

    def any_weights(params, x):
        return jax.nn.gelu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]

    tree = tree_of(model)
    results = {}
    for forward in (floats_only, any_weights):
        results[forward] = jaxq.quantize_params(
            tree,
            "int4_gptq",
            calibration=batches,
            forward=forward,
            sequential=True,
            fallback="none",
        )
    sequential_note, error_note = results[floats_only][1].notes
    assert "forward does not run with QTensors (TypeError" in sequential_note
    assert "the error of the model's outputs was not measured" in error_note
    assert results[any_weights][1].notes == ()
    # Weight-only products decode the weight, so both forms have the same inputs.
    q, wanted = results[floats_only][0], results[any_weights][0]
    codes, wanted_codes = (t["down"]["kernel"].codes() for t in (q, wanted))
    assert np.mean(np.asarray(codes) == np.asarray(wanted_codes)) > 0.99
    together, _ = jaxq.quantize_params(
        tree, "int4_gptq", calibration=batches, forward=any_weights, fallback="none"
    )
    assert np.any(together["down"]["kernel"].codes() != wanted_codes)


def test_a_convolution_has_a_static_range(batches):
    params, x = {"kernel": normal(3, 3, 2, 4)}, normal(2, 6, 6, 2)

    def forward(p, x):
        kernel = p["kernel"]
        if isinstance(kernel, QTensor):
            return jaxq.ops.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    rule = Rule(weight="int8", activation=jaxq.QuantSpec("int8", jaxq.PerTensor()))
    static = dataclasses.replace(rule, observer="minmax")
    q, _ = jaxq.quantize_params(
        params, Recipe([static]), calibration=[x], forward=forward
    )
    assert q["kernel"].meta.geometry.contracted == (-4, -3, -2)
    largest = float(jnp.max(jnp.abs(x)))
    np.testing.assert_allclose(q["kernel"].input_range[1], largest, rtol=1e-6)
    assert jaxq.metrics.sqnr(forward(params, x), forward(q, x)) > 30
    gptq = Recipe([Rule(weight="int4", method="gptq")])
    with pytest.raises(ValueError, match="needs the windows that the layer reads"):
        jaxq.quantize_params(params, gptq, calibration=[x], forward=forward)
    awq = Recipe([Rule(weight="int4", method="awq")])
    with pytest.raises(ValueError, match="kernel .*method 'awq' scales rows of a mat"):
        jaxq.quantize_params(params, awq, calibration=[x], forward=forward)


def test_the_params_of_a_linen_module_are_a_tree(batches):
    class Own(linen.Module):
        @linen.compact
        def __call__(self, x):
            w = self.param("w", linen.initializers.lecun_normal(), (32, 8))
            return x @ w

    module = Own()
    variables = module.init(jax.random.key(0), batches[0])
    q, report = jaxq.quantize_params(
        variables["params"],
        "int4_gptq",
        calibration=batches,
        forward=lambda params, x: module.apply({"params": params}, x),
    )
    assert report.quantized[0].method == "gptq"
    out = module.apply({"params": jaxq.dequantize_params(q)}, batches[0])
    assert jaxq.metrics.sqnr(module.apply(variables, batches[0]), out) > 15


# Equinox layers. The stand-ins have the class names, so the package is not needed.


def equinox_class(name, *fields):
    """A class of a pytree that looks like the Equinox layer of this name."""

    def init(self, *values):
        for field, value in zip(fields, values, strict=True):
            setattr(self, field, value)

    def call(self, x):
        return self.weight @ x

    cls = type(
        name, (), {"__init__": init, "__call__": call, "__module__": "equinox.nn._x"}
    )
    key = jax.tree_util.GetAttrKey
    jax.tree_util.register_pytree_with_keys(
        cls,
        lambda layer: ([(key(f), getattr(layer, f)) for f in fields], None),
        lambda _, values: cls(*values),
    )
    return cls


EqxLinear = equinox_class("Linear", "weight", "activation")
EqxConv = equinox_class("Conv", "weight")
EqxEmbedding = equinox_class("Embedding", "weight")
EqxWeightNorm = equinox_class("WeightNorm", "layer")


@pytest.mark.parametrize("recipe", ["int8", "w8a8"])
def test_an_equinox_weight_contracts_its_last_axis(recipe):
    layer = EqxLinear(normal(32, 64), jax.nn.relu)
    q, report = jaxq.quantize_params({"up": layer}, recipe)
    (row,) = report.rows  # the function is no parameter
    assert (row.path, row.note) == ("up/weight", "")
    assert q["up"].weight.meta.geometry.contracted == (-1,)
    x = normal(64)
    plan = jaxq.explain(q["up"].weight, x)
    assert (plan.path == "codes") == (recipe == "w8a8")
    assert jaxq.metrics.sqnr(layer(x), q["up"](x)) > 35
    batch = normal(3, 64)
    y = jax.vmap(q["up"])(batch)
    assert jaxq.metrics.sqnr(jax.vmap(layer)(batch), y) > 35


def test_a_stack_of_equinox_layers_has_a_batch_axis():
    # A scan takes arrays only: `eqx.partition` would take a function away.
    layers = EqxLinear(normal(3, 64, 64), None)
    q, _ = jaxq.quantize_params(layers, "int8")
    assert q.weight.batch_shape == (3,)

    def run(layers):
        return jax.lax.scan(lambda x, layer: (layer(x), None), normal(64), layers)[0]

    assert jaxq.metrics.sqnr(run(layers), run(q)) > 30


@pytest.mark.parametrize(
    ("model", "path", "message"),
    [
        (EqxConv(normal(4, 3, 2, 2)), "weight", "eqx.nn.Conv passes it to lax.conv"),
        (EqxEmbedding(normal(8, 8)), "weight", "eqx.nn.Embedding indexes it"),
        (
            EqxWeightNorm(EqxLinear(normal(8, 8), None)),
            "layer/weight",
            "eqx.nn.WeightNorm normalizes it at each call",
        ),
    ],
)
def test_an_equinox_weight_that_cannot_be_codes_is_refused(model, path, message):
    with pytest.raises(ValueError, match=rf"{path} \(Array\): {message}.*Skip it"):
        jaxq.quantize_params(model, Recipe([Rule(weight="int8")]))


def test_named_recipes_leave_an_equinox_table_in_floats():
    params = {"tok": EqxEmbedding(normal(8, 8)), "up": EqxLinear(normal(8, 8), None)}
    report = jaxq.quantize_params(params, "int8")[1]
    notes = {row.path: row.note for row in report.rows}
    assert notes["tok/weight"] == "embedding, left in floats by default"
    assert [row.path for row in report.quantized] == ["up/weight"]


def test_a_table_of_equinox_alone_is_explained():
    message = (
        r"\['\*\*'\] match no parameter.*weight \(Array; embedding, left in floats"
    )
    with pytest.raises(ValueError, match=message):
        jaxq.quantize_params(EqxEmbedding(normal(8, 8)), "int8")


def test_equinox_itself():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 2)
    model = eqx.nn.MLP(32, 32, 32, 1, key=keys[0])
    q, report = jaxq.quantize_params(model, "w8a8")
    assert {row.path for row in report.quantized} == {
        "layers/0/weight",
        "layers/1/weight",
    }
    assert len(report.rows) == 4
    x = normal(32)
    assert jaxq.metrics.sqnr(model(x), q(x)) > 25
    with pytest.raises(ValueError, match="passes it to lax.conv_general_dilated"):
        jaxq.quantize_params(eqx.nn.Conv1d(3, 8, 3, key=keys[1]), "int8")
    model = [model, eqx.nn.Conv1d(3, 8, 3, key=keys[1])]
    rules = (Rule("1", skip=True), *jaxq.recipes.get("int8").rules)
    report = jaxq.quantize_params(model, Recipe(rules))[1]
    assert [row.path for row in report.quantized] == [
        "0/layers/0/weight",
        "0/layers/1/weight",
    ]


def test_gains_of_equinox_layers_stay_in_floats():
    eqx = pytest.importorskip("equinox")
    linear = eqx.nn.Linear(8, 8, key=jax.random.key(0))
    model = [eqx.nn.WeightNorm(linear), eqx.nn.LayerNorm((4, 16)), linear]
    rules = [Rule("0/layer/weight", skip=True), Rule(weight="int8")]
    report = jaxq.quantize_params(model, Recipe(rules))[1]
    notes = {row.path: row.note for row in report.rows if row.format is None}
    gains = ("0/g", "1/weight", "1/bias")
    assert {notes[path] for path in gains} == {
        "not the weight of its layer, left in floats"
    }
    assert [row.path for row in report.quantized] == ["2/weight"]


def test_the_axis_of_an_unknown_equinox_module_is_an_assumption():
    eqx = pytest.importorskip("equinox")

    class Dense(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            return self.weight @ x

    model, x = Dense(normal(8, 16)), normal(16)
    q, report = jaxq.quantize_params(model, "w8a8")
    (row,) = report.rows
    assert jaxq.explain(q.weight, x).path != "codes"
    assert row.format == "int8"
    assert "assumes that products contract axis -2" in row.note
    assert "contracting=(-1,), or pass calibration= and forward=" in row.note
    # Both remedies give products of codes.
    rule = Rule(weight="int8", activation="int8", contracting=(-1,))
    with_rule = jaxq.quantize_params(model, Recipe([rule]))
    with_batches = jaxq.quantize_params(
        model, "w8a8", calibration=[x], forward=lambda model, x: model(x)
    )
    for q, report in (with_rule, with_batches):
        (row,) = report.rows
        assert jaxq.explain(q.weight, x).path == "codes"
        assert (row.format, row.granularity) == ("int8 + int8", "PerChannel(along -1)")
        assert "assumes" not in row.note
