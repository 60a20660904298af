"""The report: a row for each variable, and numbers that equal those of the arrays."""

import dataclasses
import io
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq import QTensor, Recipe, Rule, methods
from tests import tables
from tests.arrays import normal
from tests.ops.reference import equations

SPEC = jaxq.QuantSpec("int4", jaxq.PerGroup(4, pad=True), scale="bfloat16")


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 40, rngs=rngs)
        self.norm = nnx.BatchNorm(40, rngs=rngs)
        self.up = nnx.Linear(40, 8, rngs=rngs)
        self.conv = nnx.Conv(2, 3, (3,), use_bias=False, rngs=rngs)
        self.free = nnx.Param(jnp.ones((3, 4), jnp.bfloat16))
        self.count = nnx.Variable(jnp.asarray(3))
        self.pair = nnx.Variable({"a": jnp.ones((2, 3)), "b": jnp.zeros((), jnp.int8)})
        self.step = nnx.Variable(7)
        self.router = nnx.Linear(40, 4, use_bias=False, rngs=rngs)
        self.lm_head = nnx.Linear(40, 5, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


@pytest.fixture(scope="module")
def made():
    model = Model(nnx.Rngs(0))
    return model, *jaxq.quantize_model(model, SPEC, strict=False)


def variables(model):
    return {
        "/".join(map(str, path)): v.get_value()
        for path, v in nnx.iter_graph(model)
        if isinstance(v, nnx.Variable) and not isinstance(v, nnx.RngState)
    }


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


def test_every_variable_has_one_row(made):
    model, q, report = made
    paths = [row.path for row in report.rows]
    assert len(paths) == len(set(paths))
    assert set(paths) == set(variables(model)) == set(variables(q))


def test_totals_are_the_arrays_bytes(made):
    model, q, report = made
    for row in report.rows:
        assert row.bytes_before == nbytes(variables(model)[row.path]), row.path
        assert row.bytes_after == nbytes(variables(q)[row.path]), row.path
    for total, of in ((report.bytes_before, model), (report.bytes_after, q)):
        assert total == nbytes(nnx.state(of, nnx.Not(nnx.RngState)))


def test_reasons(made):
    _, _, report = made
    notes = {row.path: row.note for row in report.rows}
    assert notes == {
        "embed/embedding": "embedding, left in floats by default",
        "lm_head/kernel": "output head, left in floats by default",
        "router/kernel": "router, left in floats by default",
        "up/kernel": "",
        "conv/kernel": "",
        "up/bias": "not a matrix, left in floats",
        "norm/mean": "not a matrix, left in floats",
        "norm/var": "not a matrix, left in floats",
        "norm/scale": "not a matrix, left in floats",
        "norm/bias": "not a matrix, left in floats",
        "free": "in no layer jaxq knows, left as it is",
        "count": "no floats, left as it is",
        "pair": "not one array, left as it is",
        "step": "no floats, left as it is",
    }
    assert {row.path for row in report.quantized} == {"up/kernel", "conv/kernel"}


def test_numbers_are_those_of_the_arrays(made):
    model, q, report = made
    for row in report.quantized:
        floats, qt = variables(model)[row.path], variables(q)[row.path]
        assert isinstance(qt, QTensor)
        w, back = (np.asarray(v, np.float64) for v in (floats, jaxq.dequantize(qt)))
        assert row.sqnr == pytest.approx(
            10 * np.log10((w**2).sum() / ((w - back) ** 2).sum()), rel=1e-4
        )
        assert row.sqnr == pytest.approx(
            float(jaxq.metrics.sqnr(floats, jaxq.dequantize(qt))), rel=1e-4
        )
        assert 0 < row.worst_block < 1
        assert (
            row.bits_per_element == qt.bits_per_element == 8 * row.bytes_after / w.size
        )
        assert row.shape == floats.shape
        assert (row.format, row.granularity.split(" along")[0]) == (
            "int4",
            "PerGroup(4",
        )
        assert row.clipped == 0
    total = (
        8
        * sum(r.bytes_after for r in report.quantized)
        / sum(np.prod(r.shape) for r in report.quantized)
    )
    assert report.bits_per_weight == pytest.approx(total)
    assert report.worst.sqnr == min(row.sqnr for row in report.quantized)


def test_text_markdown_and_json(made):
    _, _, report = made
    text, table = str(report), report.to_markdown()
    for row in report.rows:
        assert row.path in text
        assert f"| {row.path} |" in table
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {
        14
    }
    assert text.splitlines()[-1] == table.splitlines()[-1]
    assert text.splitlines()[-1].startswith("2 of 14 parameters quantized")
    again = json.loads(json.dumps(report.to_dict()))
    assert again["totals"] == {
        "parameters": 14,
        "quantized": 2,
        "bits_per_weight": report.bits_per_weight,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "output_sqnr": None,  # there are no calibration batches
    }
    assert [row["path"] for row in again["rows"]] == [row.path for row in report.rows]


def test_activations_and_reasons_of_rules():
    model = Model(nnx.Rngs(0))
    recipe = Recipe(
        [
            Rule("up", weight="int8", activation="fp8"),
            Rule("conv", skip=True, reason="small"),
        ]
    )
    report = jaxq.quantize_model(model, recipe, strict=False)[1]
    rows = {row.path: row for row in report.rows}
    assert rows["up/kernel"].format == "int8 + float8_e4m3fn"
    assert rows["conv/kernel"].note == "small"
    assert rows["router/kernel"].note == "no rule of the recipe matches"


def test_nothing_quantized():
    report = jaxq.quantize_model(
        Model(nnx.Rngs(0)), Recipe([Rule(skip=True)]), strict=False
    )[1]
    assert report.quantized == ()
    assert report.worst is None
    assert report.bytes_before == report.bytes_after
    assert "0 of 14 parameters quantized" in str(report)


def test_clipped_numbers_are_counted():
    layer = nnx.Linear(64, 2, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel.set_value(
        jnp.asarray(
            np.concatenate([[[1, 1], [-1, -1]], np.full((62, 2), 0.1)]), jnp.float32
        )
    )
    # A group's scale is its largest magnitude, so nothing clips. With the mean
    # magnitude as scale, the four large numbers clip.
    assert jaxq.quantize_model(layer, "int4_absmax")[1].rows[0].clipped == 0
    # A signed scale reaches 8 steps on one side and 7 on the other. In each column one
    # of the two numbers of magnitude 1 is beyond 7.5 steps.
    assert jaxq.quantize_model(layer, "int4")[1].rows[0].clipped == 2 / 128
    spec = jaxq.QuantSpec("ternary", scale_rule="absmean")
    assert jaxq.quantize_model(layer, spec)[1].rows[0].clipped == pytest.approx(4 / 128)


def test_a_terminal_shows_a_table(made):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=200, record=True, file=io.StringIO())
    console.print(made[2])
    text = console.export_text()
    assert "up/kernel" in text
    assert "2 of 14 parameters quantized" in text
    assert made[2]._repr_markdown_() == made[2].to_markdown()


# treescope reads this attribute of numpy.
@pytest.mark.filterwarnings(
    "ignore:The chararray class is deprecated:DeprecationWarning"
)
def test_models_and_reports_show_in_treescope(made):
    treescope = pytest.importorskip("treescope")
    _, q, report = made
    assert "QTensor" in treescope.render_to_text(nnx.state(q).raw_mapping)
    assert "up/kernel" in treescope.render_to_text(report)


def test_a_plan_is_the_report_without_errors(made):
    model, _, report = made
    plan = jaxq.nn.plan(model, SPEC, strict=False)
    blank = [
        dataclasses.replace(row, sqnr=None, worst_block=None, clipped=None)
        for row in report.rows
    ]
    assert list(plan.rows) == blank
    assert (plan.bytes_before, plan.bytes_after) == (
        report.bytes_before,
        report.bytes_after,
    )


class Scaled(nnx.Module):
    """Two layers. The norm before the first can take scales."""

    def __init__(self):
        self.norm = nnx.RMSNorm(32, rngs=nnx.Rngs(0))
        self.up = nnx.Linear(32, 32, rngs=nnx.Rngs(1))
        self.down = nnx.Linear(32, 32, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(self.norm(x))))

    def scale_groups(self):
        return [SimpleNamespace(source="norm", targets=["up"], kind="norm")]

    def fold_scales(self, scales):
        model = nnx.clone(self)
        model.norm.scale[...] /= scales["norm"]
        model.up.kernel[...] *= scales["norm"][:, None]
        return model

    def rotated(self, orthogonal, online):
        return nnx.clone(self)


def unmeasured(report):
    names = ("sqnr", "worst_block", "clipped", "loss")
    names += ("output_sqnr", "input_range", "input_clipped")
    nothing = dict.fromkeys(names)
    return [dataclasses.replace(row, **nothing) for row in report.rows]


# A recipe of each kind: a codebook with quantized scales, static and dynamic activation
# quantization, outlier columns, methods with and without data.
FEW = (
    "nf4_dq",
    "fp8_static",
    "w8a8_smoothquant",
    "int4_hqq",
    "llm_int8",
    "w4a4_rotated",
)


@pytest.mark.parametrize("name", tables.thinned(jaxq.recipes.names(), FEW))
def test_a_plan_equals_the_report_except_for_measured_errors(name):
    model, recipe = Scaled(), jaxq.recipes.get(name)
    data = any(
        rule.observer or methods.get(rule.method).needs_data(dict(rule.options))
        for rule in recipe.rules
    )
    _, report = jaxq.quantize_model(
        model, recipe, calibration=[normal(64, 32)] if data else None, fallback="none"
    )
    assert unmeasured(jaxq.nn.plan(model, recipe)) == unmeasured(report)


def test_the_note_on_experts_that_do_not_lead():
    model = nnx.Einsum("bek,ken->ben", (32, 2, 8), rngs=nnx.Rngs(0))
    _, report = jaxq.quantize_model(model, "w8a8")
    (row,) = report.quantized
    assert "computes in floats" in row.note
    assert (
        "the product has batch axes [1] of the weight, which has 0 leading batch axes"
        in row.note
    )
    assert unmeasured(jaxq.nn.plan(model, "w8a8")) == unmeasured(report)
    model = nnx.Einsum("bek,ekn->ben", (2, 32, 8), rngs=nnx.Rngs(0))
    assert jaxq.nn.plan(model, "w8a8").quantized[0].note == ""


@pytest.mark.parametrize(
    ("text", "shape", "codes", "decoded"),
    [
        ("bd,dn->bn", (32, 8), True, True),
        ("...hd,hdn->...n", (4, 8, 8), True, True),
        ("bhd,dhk->bk", (8, 4, 16), False, True),
        ("febk,efkn->febn", (2, 3, 32, 4), False, False),
        ("ebk,ekn->ebn", (2, 32, 8), True, True),
        ("bhd,dhf->bhf", (32, 2, 8), False, False),
    ],
)
def test_notes_on_einsums(text, shape, codes, decoded):
    model = nnx.Einsum(text, shape, rngs=nnx.Rngs(0))
    note = {
        name: jaxq.nn.plan(model, name).quantized[0].note for name in ("w8a8", "int8")
    }
    assert ("computes in floats" not in note["w8a8"]) == codes
    assert ("dequantized at each call: the whole weight" not in note["int8"]) == decoded
    left = text.split(",")[0].replace("...", "b")
    size = dict(zip(text.split("->")[0].split(",")[1], shape, strict=True))
    x = jnp.ones([size.get(index, 3) for index in left])
    q, _ = jaxq.quantize_model(model, "w8a8")
    kinds = {
        v.aval.dtype.name
        for e in equations(jax.make_jaxpr(q)(x).jaxpr)
        if e.primitive.name == "dot_general"
        for v in e.invars
    }
    assert (kinds == {"int8"}) == codes


def test_einsums_that_sum_an_index_of_one_operand_are_refused():
    with pytest.raises(ValueError, match="sums over .*'k'.*, which only one"):
        jaxq.quantize_model(
            nnx.Einsum("bd,dkn->bn", (32, 2, 8), rngs=nnx.Rngs(0)), "int8"
        )


@pytest.mark.parametrize("method", ["clip", "hqq", "kmeans"])
def test_plans_of_methods_without_data(method):
    model, recipe = Scaled(), Recipe([Rule(weight="int3", method=method)])
    assert unmeasured(jaxq.nn.plan(model, recipe)) == unmeasured(
        jaxq.quantize_model(model, recipe)[1]
    )
