"""Trees of arrays: what is quantized, along which axes, and the report."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
        ValueError, match=r"(?s)c \(Array\): method 'gptq' needs calibration data"
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
