"""quantize_model with methods that need data: gains on new data, and the report."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq import methods
from jaxq.methods._registry import _METHODS
from jaxq.models import Llama, LlamaConfig
from tests import tables
from tests.arrays import assert_same, normal

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)


def correlated(num: int, k: int, seed: int = 0) -> jax.Array:
    """Rows that lie mostly in a few directions."""
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(k, k)) * np.exp(-np.arange(k) / 6)[:, None]
    return jnp.asarray(
        np.float32(np.random.default_rng(seed).normal(size=(num, k)) @ mix)
    )


class Pair(nnx.Module):
    """Two layers whose weights have the same shape as matrices."""

    def __init__(self):
        self.first = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
        self.second = nnx.LinearGeneral(32, (2, 8), rngs=nnx.Rngs(1))

    def __call__(self, x):
        x = self.first(x)
        return self.second(jnp.concatenate([jnp.tanh(x), jnp.cos(x)], axis=-1))


def solution(qt: jaxq.QTensor, note: str = "", rounded: bool = False):
    """What a method in the registry returns."""
    return methods.Solution(qt, note, rounded)


BATCHES = [correlated(128, 32, seed) for seed in range(3)]


def quantize(method, model=None, spec="int3", **arguments):
    options = arguments.pop("options", {})
    recipe = jaxq.Recipe([jaxq.Rule(weight=spec, method=method, options=options)])
    return jaxq.quantize_model(Pair() if model is None else model, recipe, **arguments)


def distance(a, b, x) -> float:
    """Distance between the outputs of two models."""
    return float(np.linalg.norm(np.asarray(a(x)) - np.asarray(b(x))))


@pytest.fixture(scope="module")
def pair():
    return Pair()


@pytest.fixture(scope="module")
def pair_stats(pair):
    return jaxq.nn.calibrate(pair, BATCHES)


@pytest.fixture(scope="module")
def rounded_pair(pair):
    return quantize("rtn", pair)[0]


OPTIONS = {"adaround": {"num_steps": 200}, "kmeans": {"granularity": jaxq.PerChannel()}}


BY_OUTPUT = sorted(
    set(methods.names()) - {"awq", "equalize", "smoothquant", "rtn", "llm_int8"}
)


@pytest.mark.parametrize("method", tables.thinned(BY_OUTPUT, ["gptq", "hqq"]))
def test_every_method_runs_and_those_that_fit_outputs_gain_on_new_inputs(
    method, pair, pair_stats, rounded_pair
):
    new_inputs = correlated(128, 32, seed=99)
    qmodel, report = quantize(
        method,
        pair,
        calibration=pair_stats,
        fallback="none",
        options=OPTIONS.get(method, {}),
    )
    errors = [distance(q, pair, new_inputs) for q in (qmodel, rounded_pair)]
    if method in ("gptq", "adaround", "kmeans"):
        assert errors[0] < errors[1]
    assert {row.method for row in report.quantized} == {method}
    assert all(row.loss is not None for row in report.quantized)
    assert method in str(report)


def test_a_result_is_what_the_matrix_method_gives(pair, pair_stats):
    qmodel, _ = quantize("gptq", pair, calibration=BATCHES, fallback="none")
    for name, w in (
        ("first", pair.first.kernel[...]),
        ("second", pair.second.kernel[...]),
    ):
        qt, _ = methods.gptq(
            w.reshape(w.shape[0], -1), pair_stats[name].hessian, "int3"
        )
        kernel = getattr(qmodel, name).kernel[...]
        assert kernel.shape == w.shape
        assert_same(kernel.codes().reshape(qt.shape), qt.codes())
        assert_same(jaxq.dequantize(kernel).reshape(qt.shape), jaxq.dequantize(qt))


def test_statistics_made_before_give_the_same_model(pair, pair_stats):
    first, _ = quantize("gptq", pair, calibration=BATCHES)
    second, _ = quantize("gptq", pair, calibration=pair_stats)
    assert_same(nnx.state(first), nnx.state(second))


def test_results_save_and_load_on_the_float_model(pair, tmp_path):
    qmodel, _ = quantize("kmeans", pair, options=OPTIONS["kmeans"])
    jaxq.save(tmp_path / "q.safetensors", qmodel)
    loaded_model = jaxq.load(tmp_path / "q.safetensors", into=pair)
    np.testing.assert_array_equal(loaded_model(BATCHES[0]), qmodel(BATCHES[0]))


def test_a_method_worse_than_rounding_falls_back_with_a_note(
    pair, pair_stats, rounded_pair, monkeypatch
):
    def bad(w, stats, spec, *, key, nearest):
        return solution(methods.rtn(0.5 * w, spec)[0])

    gptq = methods.get("gptq")
    monkeypatch.setitem(_METHODS, "gptq", dataclasses.replace(gptq, solve=bad))
    qmodel, report = quantize("gptq", pair, calibration=pair_stats)
    assert [row.method for row in report.quantized] == ["rtn", "rtn"]
    assert all(
        "gptq is worse than rtn on held-out inputs" in row.note
        for row in report.quantized
    )
    assert_same(nnx.state(qmodel), nnx.state(rounded_pair))
    _, report = quantize("gptq", pair, calibration=pair_stats, fallback="none")
    assert all(row.loss > 1 for row in report.quantized)
    with pytest.raises(ValueError, match="worse than rtn"):
        quantize("gptq", pair, calibration=pair_stats, fallback="raise")


def test_sequential_quantizes_on_what_came_before(pair):
    """The second layer's Hessian is of what the quantized first layer gives."""
    qmodel, _ = quantize(
        "gptq", pair, calibration=BATCHES, sequential=True, fallback="none", spec="int2"
    )
    stats = jaxq.nn.calibrate(
        jaxq.quantize_model(
            pair,
            jaxq.Recipe(
                [
                    jaxq.Rule("first", weight="int2", method="gptq"),
                    jaxq.Rule("second", skip=True),
                ]
            ),
            calibration=BATCHES,
            fallback="none",
        )[0],
        BATCHES,
        layers=["second"],
    )
    qt, _ = methods.gptq(
        pair.second.kernel[...].reshape(32, -1), stats["second"].hessian, "int2"
    )
    np.testing.assert_array_equal(
        qmodel.second.kernel[...].codes().reshape(32, -1), qt.codes()
    )


class Numbered(nnx.Module):
    """One block of two layers."""

    def __init__(self):
        self.layers = nnx.List([Pair()])

    def __call__(self, x):
        return self.layers[0](x)


def test_layers_of_a_block_see_those_before_them(pair, monkeypatch, tmp_path):
    """Queries, keys and values read one array, so they are one block."""
    arguments: dict = {"calibration": BATCHES, "fallback": "none", "spec": "int2"}
    # Here each layer is a block.
    expected_model, _ = quantize("gptq", pair, sequential="blocks", **arguments)
    block_model, _ = quantize("gptq", Numbered(), sequential=True, **arguments)
    layer_model, report = quantize(
        "gptq", Numbered(), sequential="layers", resume=tmp_path, **arguments
    )
    codes = [
        model.second.kernel[...].codes()
        for model in (expected_model, layer_model.layers[0], block_model.layers[0])
    ]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()
    order = jaxq.nn.calibration.call_order(
        Llama(CONFIG, rngs=nnx.Rngs(0)), np.ones((1, 4), np.int32), None
    )
    slots = [types.SimpleNamespace(path=path) for path in order]
    groups = jaxq.nn.transform._order.split_into_blocks(slots, order, by_array=True)
    # Queries, keys and values; outputs; gate and up; down; head.
    assert [len(group) for group in groups] == [3, 1, 2, 1, 1]

    # A run that stopped after the first layer continues with the second.
    (tmp_path / "block-0001.safetensors").unlink()
    passes, collect_stats = [], jaxq.nn.transform._nnx.collect_stats

    def collect_and_record(model, batches, wanted, **options):
        passes.append(list(wanted))
        return collect_stats(model, batches, wanted, **options)

    monkeypatch.setattr(jaxq.nn.transform._nnx, "collect_stats", collect_and_record)
    resumed_model, resumed_report = quantize(
        "gptq", Numbered(), sequential="layers", resume=tmp_path, **arguments
    )
    assert passes == [["layers/0/second"]]
    assert resumed_report == report
    assert_same(nnx.state(resumed_model), nnx.state(layer_model))
    with pytest.raises(ValueError, match="belongs to another run"):
        quantize(
            "gptq",
            Numbered(),
            sequential="layers",
            resume=tmp_path,
            **{**arguments, "spec": "int3"},
        )


def test_finished_blocks_are_those_of_the_same_layers(pair, tmp_path):
    """Two functions of one name that select other layers do not share results."""

    def recipe(name):
        def selects(layer):
            return layer.path == name

        rule = jaxq.Rule(weight="int4", method="gptq", where=selects)
        return jaxq.Recipe([rule])

    arguments: dict = {"calibration": BATCHES, "sequential": True}
    folder = tmp_path / "blocks"
    _, report = jaxq.quantize_model(pair, recipe("first"), resume=folder, **arguments)
    _, again = jaxq.quantize_model(pair, recipe("first"), resume=folder, **arguments)
    assert again == report
    with pytest.raises(ValueError, match="belongs to another run"):
        jaxq.quantize_model(pair, recipe("second"), resume=folder, **arguments)

    file = tmp_path / "file"
    file.write_text("not a folder")
    path = folder / "block-0000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"block-0000\.safetensors .*checksum"):
        jaxq.quantize_model(pair, recipe("first"), resume=folder, **arguments)
    jaxq.save(path, {"another": 1})
    with pytest.raises(ValueError, match=r"block-0000\.safetensors is not a file of a"):
        jaxq.quantize_model(pair, recipe("first"), resume=folder, **arguments)
    with pytest.raises(FileExistsError, match="^quantize_model: resume=.* is a file"):
        jaxq.quantize_model(pair, recipe("first"), resume=file, **arguments)


def test_the_report_notes_fewer_rows_than_inputs():
    _, report = quantize("gptq", calibration=[correlated(16, 32)])
    assert all(
        "only 14 rows for" in row.note or row.method == "rtn"
        for row in report.quantized
    )
    assert any("only 14 rows for 32 inputs" in row.note for row in report.quantized)


def test_impossible_requests_are_refused_before_anything_runs():
    with pytest.raises(
        ValueError,
        match=r"(?s)first .*'gptq' needs data.*second .*'gptq' needs data",
    ):
        quantize("gptq")
    with pytest.raises(ValueError, match="does not know where scales can go in a Pair"):
        quantize("equalize", calibration=BATCHES)
    with pytest.raises(
        ValueError,
        match=r"gptq.*does not collect the windows of ConvTranspose",
    ):
        quantize(
            "gptq",
            nnx.ConvTranspose(4, 4, (3,), rngs=nnx.Rngs(0)),
            calibration=[normal(2, 8, 4)],
        )
    with pytest.raises(ValueError, match="method must be one of"):
        jaxq.Rule(weight="int4", method="gpqt")
    with pytest.raises(ValueError, match=r"unknown option 'num_step'.*num_steps"):
        jaxq.Rule(weight="int4", method="hqq", options={"num_step": 1})
    with pytest.raises(ValueError, match="method .* has no options"):
        jaxq.Rule(weight="int4", options={"typo": 1})
    with pytest.raises(ValueError, match="takes no observer"):
        jaxq.Rule(
            weight="int8", activation="int8", method="llm_int8", observer="absmax"
        )
    with pytest.raises(TypeError, match=r"Pass a list: \[x\]"):
        quantize("gptq", calibration=BATCHES[0])
    with pytest.raises(ValueError, match="no statistics of"):
        quantize("gptq", calibration={})
    with pytest.raises(ValueError, match="sequential='blocks' needs calibration"):
        quantize("hqq", sequential=True)
    with pytest.raises(ValueError, match="sequential must be one of"):
        quantize("hqq", sequential="layer")
    with pytest.raises(ValueError, match="resume= keeps finished blocks"):
        quantize("hqq", resume="somewhere")
    with pytest.raises(ValueError, match="fallback must be one of"):
        quantize("hqq", fallback="maybe")


# Methods that fold scales.


def drawn(seed):
    """Tokens."""
    return np.random.default_rng(seed).integers(0, 64, (8, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def llama():
    return jaxq.models.with_outliers(
        Llama(CONFIG, rngs=nnx.Rngs(0)), channels=[3, 40], strength=64.0
    )


@pytest.fixture(scope="module")
def tokens():
    return [drawn(seed) for seed in range(2)]


def test_each_matrix_of_a_stack_is_judged_by_itself(monkeypatch):
    def bad_in_one(w, stats, spec, *, key):
        return solution(
            methods.rtn(w * np.array([1, 0.5], np.float32)[:, None, None], spec)[0]
        )

    hqq = methods.get("hqq")
    monkeypatch.setitem(_METHODS, "hqq", dataclasses.replace(hqq, solve=bad_in_one))
    w, rows = normal(2, 32, 8), np.stack([correlated(64, 32, seed) for seed in (0, 1)])
    stats = jax.jit(jax.vmap(jaxq.observers.update_stats, (0, 0, None, None)))(
        jax.tree.map(lambda a: np.stack([a, a]), jaxq.observers.empty_stats(32)),
        rows,
        np.ones(64, bool),
        np.arange(64),
    )
    result = methods.solve("hqq", w, stats, jaxq.presets()["int4"])
    assert (result.method, result.loss) == ("hqq", 1.0)
    assert "in 1 of 2 matrices, so these matrices use rtn" in result.note
    jax.tree.map(np.testing.assert_array_equal, result.qt, methods.rtn(w, "int4")[0])


def test_a_method_that_could_only_round_is_not_named():
    """GPTQ cannot factor a negative Hessian, so it rounds to nearest."""
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    stats = jaxq.nn.calibrate(layer, [normal(64, 64)])
    stats = {"": stats[""]._replace(hessian=-stats[""].hessian)}
    recipe = jaxq.Recipe([jaxq.Rule(weight="int4", method="gptq")])
    _, report = jaxq.quantize_model(layer, recipe, calibration=stats)
    assert report.quantized[0].method == "rtn"
    assert "not positive definite, so rtn" in report.quantized[0].note
    with pytest.raises(ValueError, match="not positive definite"):
        jaxq.quantize_model(layer, recipe, calibration=stats, fallback="raise")


def test_scales_that_do_worse_than_none_are_left_out(llama, tokens, monkeypatch):
    """A large scale of one channel makes the steps of the others coarse."""

    def bad(weights, *_, **__):
        return jnp.asarray(
            np.where(np.arange(weights[0].shape[0]) == 0, 1000, 1), jnp.float32
        ), None

    monkeypatch.setattr("jaxq.methods._awq.awq_scale", bad)
    recipe = jaxq.Recipe(
        [jaxq.Rule("re:.*/(gate|up)_proj", weight="int4", method="awq")]
    )
    qmodel, report = jaxq.quantize_model(llama, recipe, calibration=tokens)
    rows = {row.path.removesuffix("/kernel"): row for row in report.quantized}
    row = rows["layers/0/mlp/gate_proj"]
    assert (
        "only clipped: awq's scales increase the error on held-out inputs" in row.note
    )
    np.testing.assert_array_equal(
        qmodel.layers[0].post_attention_layernorm.scale[...],
        llama.layers[0].post_attention_layernorm.scale[...],
    )
    with pytest.raises(ValueError, match="awq's scales increase the error"):
        jaxq.quantize_model(llama, recipe, calibration=tokens, fallback="raise")


@pytest.fixture(scope="module")
def seen_by_queries(llama, tokens):
    return jaxq.nn.calibrate(llama, tokens, layers=["layers/0/self_attn/q_proj"])


@pytest.mark.heavy
def test_scales_are_measured_against_rounding_without_them(
    llama, tokens, seen_by_queries
):
    """The loss in the report is the error ratio on the held-out rows."""
    rule = jaxq.Rule(
        "re:.*/[qkv]_proj", weight="int8", activation="int8", method="smoothquant"
    )
    recipe = jaxq.Recipe([rule])
    qmodel, report = jaxq.quantize_model(llama, recipe, calibration=tokens)
    row = next(
        row
        for row in report.quantized
        if row.path == "layers/0/self_attn/q_proj/kernel"
    )
    x, w = (
        seen_by_queries["layers/0/self_attn/q_proj"].held_out,
        llama.layers[0].self_attn.q_proj.kernel[...],
    )
    gains = [m.layers[0].input_layernorm.scale[...] for m in (qmodel, llama)]
    smoothed_output = (
        jnp.asarray(x * np.divide(*gains)[None])
        @ qmodel.layers[0].self_attn.q_proj.kernel[...]
    )
    plain_output = x @ jaxq.quantize(w, "int8").with_activation("int8")
    errors = [
        np.sum((np.asarray(x) @ np.asarray(w) - np.asarray(y)) ** 2)
        for y in (smoothed_output, plain_output)
    ]
    assert row.method == "smoothquant"
    assert row.loss == pytest.approx(errors[0] / errors[1], rel=0.05)
    assert row.loss < 0.5


class Chain(nnx.Module):
    """Two linear layers with a ReLU between them. Positive scales pass through it."""

    def __init__(self):
        self.first, self.second = (
            nnx.Linear(32, 24, rngs=nnx.Rngs(0)),
            nnx.Linear(24, 8, rngs=nnx.Rngs(1)),
        )
        self.first.kernel.set_value(
            self.first.kernel[...] * jnp.exp(normal(1, 24, seed=3))
        )

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))

    def scale_groups(self):
        return [jaxq.models.NormGroup("first", ("second",), "linear")]

    def fold_scales(self, scales):
        out, s = nnx.clone(self), scales.get("first", jnp.ones(24))
        out.first.kernel.set_value(out.first.kernel[...] / s[None])
        out.first.bias.set_value(out.first.bias[...] / s)
        out.second.kernel.set_value(out.second.kernel[...] * s[:, None])
        return out


@pytest.mark.parametrize("data", [None, BATCHES])
def test_equalization_by_recipe(data):
    model, new_inputs = Chain(), correlated(128, 32, seed=99)
    spec = jaxq.QuantSpec("int8", jaxq.PerTensor())
    qmodel, report = quantize("equalize", model, spec, calibration=data)
    rounded_model, _ = quantize("rtn", model, spec)
    errors = [distance(q, model, new_inputs) for q in (qmodel, rounded_model)]
    assert errors[0] < 0.7 * errors[1]
    rows = {row.path: row for row in report.quantized}
    assert (rows["first/kernel"].method, rows["second/kernel"].method) == (
        "rtn",
        "equalize",
    )
    assert "no previous layer" in rows["first/kernel"].note
    assert (rows["second/kernel"].loss is None) == (data is None)


class NormFirst(nnx.Module):
    """A norm before a linear layer: [b, 32] -> [b, 8]."""

    def __init__(self):
        self.norm = nnx.RMSNorm(32, rngs=nnx.Rngs(0))
        self.linear = nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(self.norm(x))

    def scale_groups(self):
        return [jaxq.models.NormGroup("norm", ("linear",), "norm")]

    def fold_scales(self, scales):
        out, s = nnx.clone(self), scales.get("norm", jnp.ones(32))
        out.norm.scale.set_value(out.norm.scale[...] / s)
        out.linear.kernel.set_value(out.linear.kernel[...] * s[:, None])
        return out


def test_folded_scales_are_judged_with_the_static_range_in_use():
    """Its observer reads all rows, and a held-out row has the largest number."""
    model, x = NormFirst(), normal(64, 32)
    x = x.at[7].set(0).at[7, 3].set(1)
    rule = jaxq.Rule(
        weight="int8", activation="int8", observer="minmax", method="smoothquant"
    )
    qmodel, report = jaxq.quantize_model(
        model, jaxq.Recipe([rule]), calibration=[x], fallback="none"
    )
    rows, w = model.norm(x), model.linear.kernel[...]
    s = np.asarray(1 / qmodel.norm.scale[...])
    assert s.max() > 1.1
    exact = np.asarray(rows, np.float64)[7::8] @ np.asarray(w, np.float64)
    errors = []
    for scale in (s, np.ones_like(s)):
        divided = rows / scale[None]
        bounds = (float(jnp.min(divided)), float(jnp.max(divided)))
        qt = jaxq.quantize(w * scale[:, None], "int8")
        qt = qt.with_activation("int8", bounds=bounds)
        y = np.asarray(divided[7::8] @ qt, np.float64)
        errors.append(np.sum((exact - y) ** 2))
    (row,) = report.quantized
    assert row.note == "scales folded into norm"
    assert row.loss == pytest.approx(errors[0] / errors[1], rel=0.01)
    largest = np.abs(rows / s[None]).max()
    np.testing.assert_allclose(
        qmodel.linear.kernel[...].input_range, [-largest, largest], rtol=1e-5
    )


def test_bias_correction_by_recipe(pair, rounded_pair):
    """The mean output equals the float layer's on the rows in the statistics."""
    x = jnp.asarray(np.asarray(BATCHES[0]) + 1)
    recipe = jaxq.Recipe([jaxq.Rule(weight="int3", correct_bias=True)])
    qmodel, report = jaxq.quantize_model(pair, recipe, calibration=[x])
    rows = np.arange(128) % 8 != 7
    shift = [
        np.abs(
            np.mean((np.asarray(q.first(x)) - np.asarray(pair.first(x)))[rows], 0)
        ).max()
        for q in (qmodel, rounded_pair)
    ]
    assert shift[0] < 1e-5 < shift[1]
    assert qmodel.second.bias.shape == (2, 8)
    assert all("bias corrected" in row.note for row in report.quantized)
    linear = nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))
    assert (
        "no bias to correct"
        in jaxq.quantize_model(linear, recipe, calibration=[x])[1].quantized[0].note
    )
    with pytest.raises(
        ValueError, match=r"(?s)first .*: correct_bias=True needs data.*second"
    ):
        jaxq.quantize_model(pair, recipe)
    with pytest.raises(
        ValueError, match="correct_bias=True is for dense layers, not for "
    ):
        jaxq.quantize_model(
            nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0)),
            recipe,
            calibration=[normal(2, 8, 4)],
        )


def test_rotation_by_recipe(llama, tokens):
    qmodel, report = jaxq.quantize_model(llama, "w8a8_rotated")
    rounded_model, _ = jaxq.quantize_model(llama, "w8a8")
    errors = [distance(q, llama, drawn(9)) for q in (qmodel, rounded_model)]
    assert errors[0] < 0.5 * errors[1]
    recipe = jaxq.recipes.get("w4a4_rotated")
    assert recipe.rotate
    assert jaxq.Recipe.from_dict(recipe.to_dict()) == recipe
    assert [row.path for row in jaxq.nn.plan(llama, recipe).rows] == [
        row.path for row in report.rows
    ]
    with pytest.raises(ValueError, match="does not know how to rotate a Pair"):
        jaxq.quantize_model(Pair(), "w8a8_rotated")
    with pytest.raises(ValueError, match="rotate=True is for nnx models"):
        jaxq.quantize_params({"w": jnp.eye(32)}, "w8a8_rotated")

    class Mine(Pair):
        pass

    jaxq.nn.register_rotation(Mine, lambda model, orthogonal, online: model)
    assert len(jaxq.quantize_model(Mine(), "w8a8_rotated")[1].quantized) == 2


class Mixed(nnx.Module):
    """Layers whose inputs have no rows, and one whose input has."""

    def __init__(self):
        self.table = nnx.Embed(32, 32, rngs=nnx.Rngs(0))
        self.layer = nnx.Linear(32, 32, rngs=nnx.Rngs(1))
        self.w = nnx.Param(normal(32, 32))

    def __call__(self, tokens):
        return self.layer(self.table(tokens)) @ self.w

    recipe = jaxq.Recipe(
        [jaxq.Rule(kinds=("Embed", "Linear", "Param"), weight="int4", method="clip")]
    )


@pytest.mark.heavy
def test_only_inputs_with_rows_are_judged():
    _, report = jaxq.quantize_model(Mixed(), Mixed.recipe, calibration=[drawn(0) % 32])
    assert {row.path: row.loss is None for row in report.quantized} == {
        "table/embedding": True,
        "layer/kernel": False,
        "w": True,
    }
    # The trap: 2 channels per group times 4 places equals the 8 input channels.
    conv = nnx.Conv(8, 8, (4,), feature_group_count=4, rngs=nnx.Rngs(0))
    rule = jaxq.Rule(weight="int4", method="clip", activation="int8", observer="absmax")
    _, report = jaxq.quantize_model(
        conv, jaxq.Recipe([rule]), calibration=[normal(2, 8, 8)]
    )
    assert report.quantized[0].loss is None


def test_clipping_by_inputs(pair, pair_stats):
    recipe = jaxq.Recipe(
        [jaxq.Rule(weight="int3", method="clip", options={"inputs": True})]
    )
    _, report = jaxq.quantize_model(
        pair, recipe, calibration=pair_stats, fallback="none"
    )
    assert all(row.loss is not None for row in report.quantized)


def test_statistics_of_another_model_are_refused(llama, pair, pair_stats):
    recipe = jaxq.Recipe([jaxq.Rule(weight="int4", method="gptq")])
    with pytest.raises(
        ValueError, match="sequential='blocks' needs calibration=batches"
    ):
        jaxq.quantize_model(pair, recipe, calibration=pair_stats, sequential=True)
    with pytest.raises(
        ValueError, match="rotate=True changes the inputs of the layers"
    ):
        jaxq.quantize_model(llama, "w4a4_rotated", calibration=pair_stats)


def test_a_bias_correction_that_does_worse_is_left_out():
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    recipe = jaxq.Recipe([jaxq.Rule(weight="int4", correct_bias=True)])
    rows = np.array(normal(64, 64))
    rows[7::8] *= -1  # the held-out rows have another mean
    qmodel, report = jaxq.quantize_model(layer, recipe, calibration=[rows[:16]])
    assert "correction increases the error on held-out" in report.quantized[0].note
    np.testing.assert_array_equal(qmodel.bias[...], layer.bias[...])
    qmodel, report = jaxq.quantize_model(
        layer, recipe, calibration=[rows[:16]], fallback="none"
    )
    assert report.quantized[0].note == "bias corrected; only 14 rows for 64 inputs"
    assert np.any(qmodel.bias[...] != layer.bias[...])
    with pytest.raises(ValueError, match="correction increases the error"):
        jaxq.quantize_model(layer, recipe, calibration=[rows[:16]], fallback="raise")


def test_layers_of_equal_rules_share_their_scales(llama, tokens):
    fields = {"weight": "int8", "activation": "int8", "method": "smoothquant"}
    recipe = jaxq.Recipe(
        [jaxq.Rule("**/gate_proj", **fields), jaxq.Rule("**/up_proj", **fields)]
    )
    _, report = jaxq.quantize_model(llama, recipe, calibration=tokens)
    assert {row.method for row in report.quantized} == {"smoothquant"}


@pytest.mark.parametrize("method", ["hqq", "clip"])
def test_a_convolution_by_a_method_that_needs_no_data(method):
    """The rows of its input do not meet the weight as a matrix: it is not judged."""
    conv, x = nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0)), normal(2, 8, 4)
    _, report = quantize(method, conv, calibration=[x])
    assert (report.quantized[0].method, report.quantized[0].loss) == (method, None)


@pytest.fixture(scope="module")
def smoothed(llama, tokens):
    return jaxq.quantize_model(llama, "w8a8_smoothquant", calibration=tokens)


OUTLIERS = [("w8a8_smoothquant", "w8a8"), ("int4_awq", "int4"), ("llm_int8", "w8a8")]


@pytest.mark.parametrize(("recipe", "plain"), tables.thinned(OUTLIERS, OUTLIERS[:1]))
def test_methods_for_outliers_beat_rounding(llama, tokens, smoothed, recipe, plain):
    cached_result = smoothed if recipe == "w8a8_smoothquant" else None
    qmodel, report = cached_result or jaxq.quantize_model(
        llama, recipe, calibration=tokens
    )
    rounded_model, _ = jaxq.quantize_model(llama, plain)
    errors = [distance(q, llama, drawn(9)) for q in (qmodel, rounded_model)]
    assert errors[0] < (0.5 if recipe != "int4_awq" else 1.0) * errors[1]
    assert {row.method for row in report.quantized} <= {
        recipe.rpartition("_")[2],
        "llm_int8",
        "rtn",
    }


def test_statistics_cannot_be_folded(llama, seen_by_queries):
    with pytest.raises(ValueError, match="needs the batches themselves"):
        jaxq.quantize_model(llama, "w8a8_smoothquant", calibration=seen_by_queries)


def test_a_foreign_class_can_say_where_scales_fold(llama, tokens, smoothed):
    class Mine(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, tokens):
            return self.inner(tokens)

    groups = []
    for group in jaxq.models.norm_groups(llama):
        targets = tuple(f"inner/{target}" for target in group.targets)
        groups.append(group._replace(source=f"inner/{group.source}", targets=targets))

    def fold(model, scales):
        return Mine(
            jaxq.models.fold_scales(
                model.inner, {k.removeprefix("inner/"): s for k, s in scales.items()}
            )
        )

    jaxq.nn.register_folding(Mine, lambda model: groups, fold)
    outer, _ = jaxq.quantize_model(Mine(llama), "w8a8_smoothquant", calibration=tokens)
    inner, _ = smoothed
    np.testing.assert_array_equal(outer(tokens[0]), inner(tokens[0]))


def test_a_held_out_row_that_is_not_finite_is_found():
    x = np.array(normal(16, 64))
    x[-1, 3] = np.nan
    with pytest.raises(ValueError, match="held out for judging is not finite"):
        jaxq.nn.calibrate(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), [x])


def test_kmeans_falls_back_to_rounding_in_its_own_blocks():
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    options = {"granularity": jaxq.PerTensor(), "num_steps": 0}
    rule = jaxq.Rule(
        weight=jaxq.QuantSpec("int4", jaxq.PerGroup(16)),
        method="kmeans",
        options=options,
    )
    _, report = jaxq.quantize_model(
        layer, jaxq.Recipe([rule]), calibration=[normal(64, 64)]
    )
    row = report.quantized[0]
    assert row.method in ("kmeans", "rtn")
    assert row.granularity.startswith("PerTensor")


def test_the_report_notes_few_sample_rows():
    rule = jaxq.Rule(weight="int4", method="adaround", options={"num_steps": 2})
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    _, report = jaxq.quantize_model(
        layer, jaxq.Recipe([rule]), calibration=[normal(16, 64)], fallback="none"
    )
    assert "fitted to" in report.quantized[0].note
    assert "rows of 64 inputs" in report.quantized[0].note


def test_llm_int8_takes_the_rules_activation():
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    spec = jaxq.QuantSpec("int8", symmetric=False)
    rule = jaxq.Rule(
        weight="int8", activation=spec, method="llm_int8", options={"threshold": 4.0}
    )
    q, _ = jaxq.quantize_model(layer, jaxq.Recipe([rule]))
    meta = q.kernel[...].meta
    assert (meta.activation, meta.outliers) == (spec, 4.0)


def test_llm_int8_is_judged_against_inputs_quantized_alike(pair):
    data = [x.at[:, 3].multiply(200.0) for x in BATCHES]
    _, report = quantize(
        "llm_int8", pair, spec="int8", calibration=data, fallback="none"
    )
    row = report.rows[[row.path for row in report.rows].index("first/kernel")]
    assert row.loss < 0.5
    qmodel, report = quantize(
        "llm_int8", pair, spec="int8", calibration=BATCHES, options={"threshold": 1e9}
    )
    assert all(row.loss == 1.0 for row in report.quantized)
    assert qmodel.first.kernel[...].meta.activation is not None


def test_inputs_too_large_to_square_are_named(pair):
    with pytest.raises(
        ValueError,
        match=r"first/kernel: the second moments of the layer's inputs are not finite",
    ):
        quantize("gptq", pair, calibration=[1e20 * BATCHES[0]])


def test_the_report_notes_few_sample_rows_of_clipping():
    _, report = quantize(
        "clip",
        calibration=[correlated(16, 32)],
        options={"inputs": True, "num": 2},
        fallback="none",
    )
    assert all("fitted to 14 rows of 32 inputs" in row.note for row in report.quantized)


def test_reports_say_that_a_model_was_rotated():
    rules = (jaxq.Rule("**/mlp/*", weight="int8"),)
    recipe = jaxq.Recipe(rules, rotate=True)
    plan = jaxq.nn.plan(Llama(CONFIG, rngs=nnx.Rngs(0)), recipe)
    assert "rotated by random Hadamard" in str(plan)


def test_equalize_scales_stacked_layers_each_by_itself():
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    model = Llama(config, rngs=nnx.Rngs(0))
    recipe = jaxq.Recipe([jaxq.Rule("**/mlp/*", weight="int8", method="equalize")])
    listed_model, _ = jaxq.quantize_model(model, recipe)
    stacked_model, report = jaxq.quantize_model(jaxq.models.stacked(model), recipe)
    note = {row.path: row.note for row in report.quantized}[
        "layers/mlp/down_proj/kernel"
    ]
    assert "several inputs" not in note
    for i in range(2):
        expected = listed_model.layers[i].mlp.down_proj.kernel[...].codes()
        np.testing.assert_array_equal(
            stacked_model.layers.mlp.down_proj.kernel[...][i].codes(), expected
        )


def test_the_report_notes_data_that_no_rule_needs(pair):
    _, report = quantize("rtn", pair, calibration=["nonsense"], mask=lambda batch: None)
    assert report.notes[0] == (
        "not used, because no rule needs data: calibration=, mask="
    )
    assert "a run of the first batch raised" in report.notes[1]
    _, report = quantize("rtn", pair, calibration=BATCHES)
    assert report.notes == (
        "no rule needs data: calibration= only measures the output error",
    )
    assert not quantize("clip", pair, calibration=BATCHES, options={"num": 2})[1].notes


def test_llm_int8_is_for_matrices():
    model = nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0))
    rule = jaxq.Rule(weight="int8", activation="int8", method="llm_int8")
    with pytest.raises(
        ValueError, match=r"\(Conv\): method 'llm_int8' is for matrices"
    ):
        jaxq.quantize_model(model, jaxq.Recipe([rule]))
    kernel = jaxq.quantize(
        model.kernel[...], "int8", contracting=(-3, -2)
    ).with_activation("int8", outliers=6.0)
    with pytest.raises(ValueError, match="has an outlier threshold"):
        jaxq.ops.conv_general_dilated(
            jnp.ones((1, 8, 4)),
            kernel,
            (1,),
            "SAME",
            dimension_numbers=("NHC", "HIO", "NHC"),
        )
