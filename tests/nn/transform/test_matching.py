"""Weights that code outside of layers uses are quantized, or an error names them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from jaxq import Recipe, Rule
from tests.arrays import normal


class Raw(nnx.Module):
    """A module with a matrix of its own beside an ordinary layer."""

    def __init__(self, use):
        self.up = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
        self.w = nnx.Param(normal(32, 8))
        self.gain = nnx.Param(jnp.ones((8,)))
        self.pos_embedding = nnx.Param(jnp.ones((4, 32)))
        self.use = use

    def __call__(self, x):
        return self.use(
            self.up(x) + self.pos_embedding[...].mean(0)[None], self.w, self.gain
        )


# Everyday uses of a matrix that an interception of jax functions would miss, and the
# error that a QTensor raises there, or None.
USES = {
    "jnp.matmul of the variable": (lambda x, w, g: jnp.matmul(x, w), TypeError),
    "split of the variable": (
        lambda x, w, g: x @ jnp.split(w, 2, axis=1)[0],
        TypeError,
    ),
    "concatenate": (lambda x, w, g: x @ jnp.concatenate([w, w], axis=1), TypeError),
    "asarray": (lambda x, w, g: x @ jnp.asarray(w), TypeError),
    "jnp.matmul": (lambda x, w, g: jnp.matmul(x, w[...]), TypeError),
    "split": (lambda x, w, g: x @ jnp.split(w[...], 2, axis=1)[0], TypeError),
    "swapaxes": (lambda x, w, g: x @ jnp.swapaxes(w[...], 0, 1).T, TypeError),
    "jnp.reshape": (lambda x, w, g: x @ jnp.reshape(w[...], (32, 8)), None),
    "nested jit": (lambda x, w, g: jax.jit(lambda a, b: a @ b)(x, w[...]), None),
    "astype": (
        lambda x, w, g: x.astype(jnp.bfloat16) @ w[...].astype(jnp.bfloat16),
        None,
    ),
    "times a gain": (lambda x, w, g: x @ (w[...] * g[...][None]), TypeError),
    "operator": (lambda x, w, g: x @ w, None),
    "function": (lambda x, w, g: jaxq.matmul(x, w), None),
    "transpose": (lambda x, w, g: x @ w[...].T.T, None),
}
RULE = Rule("w", weight="int8", kinds="Param")


@pytest.mark.parametrize("name", USES)
def test_everyday_uses_are_quantized_or_raise(name):
    use, error_type = USES[name]
    model, x = Raw(use), normal(3, 32)
    with pytest.raises(
        ValueError, match=r"modules that jaxq does not know: w float32\[32, 8\]"
    ):
        jaxq.quantize_model(model, "int8")
    q, report = jaxq.quantize_model(
        model, Recipe([RULE, *jaxq.recipes.get("int8").rules])
    )
    assert {row.path for row in report.quantized} == {"w", "up/kernel"}
    if error_type is not None:
        with pytest.raises(error_type, match=r"QTensor\(w: int8.*jaxq.dequantize"):
            q(x)
        return
    y, expected = q(x), model(x)
    y, expected = (np.asarray(v, np.float32) for v in (y, expected))
    assert 0 < np.linalg.norm(y - expected) < 0.03 * np.linalg.norm(expected)


def test_strict_false_leaves_matrices_in_floats():
    model = Raw(USES["operator"][0])
    q, report = jaxq.quantize_model(model, "int8", strict=False)
    rows = {row.path: row for row in report.rows}
    assert rows["w"].note == "in no layer jaxq knows, left as it is"
    assert q.w is not model.w
    skip_recipe = Recipe(
        [Rule("w", skip=True, kinds="Param"), *jaxq.recipes.get("int8").rules]
    )
    rows = {row.path: row for row in jaxq.quantize_model(model, skip_recipe)[1].rows}
    assert rows["w"].note == "skipped by the recipe"


class Gated(nnx.Linear):
    """A layer of a known kind with a second matrix."""

    def __init__(self):
        super().__init__(32, 8, rngs=nnx.Rngs(0))
        self.w2 = nnx.Param(jax.random.normal(jax.random.key(1), (32, 8)))

    def __call__(self, x):
        return super().__call__(x) * (x @ self.w2)


def test_a_second_matrix_of_a_known_layer_is_a_matrix():
    with pytest.raises(
        ValueError,
        match=r"modules that jaxq does not know: gate/w2 float32\[32, 8\]",
    ):
        jaxq.quantize_model(nnx.Dict(gate=Gated()), "int8")
    rules = jaxq.recipes.get("int8").rules
    recipe = Recipe([Rule("gate/w2", weight="uint8", kinds="Param"), *rules])
    q, report = jaxq.quantize_model(nnx.Dict(gate=Gated()), recipe)
    assert [(row.path, row.format) for row in report.quantized] == [
        ("gate/kernel", "int8"),
        ("gate/w2", "uint8"),
    ]
    x = jnp.ones((2, 32))
    np.testing.assert_allclose(q["gate"](x), Gated()(x), atol=0.5)
    rows = {
        row.path: row.note
        for row in jaxq.quantize_model(nnx.Dict(gate=Gated()), "int8", strict=False)[
            1
        ].rows
    }
    assert rows["gate/w2"] == "not the weight of its layer, left in floats"


@pytest.mark.parametrize("norm", [nnx.SpectralNorm, nnx.WeightNorm])
def test_weights_that_another_module_normalizes_are_refused(norm):
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        a=norm(nnx.Linear(32, 8, rngs=rngs), rngs=rngs), b=nnx.Linear(32, 8, rngs=rngs)
    )
    with pytest.raises(
        ValueError,
        match=rf"a/layer_instance \(Linear\): a, an nnx.{norm.__name__}, normalizes",
    ):
        jaxq.quantize_model(model, "int8")
    rules = jaxq.recipes.get("int8").rules
    q, _ = jaxq.quantize_model(
        model,
        Recipe([Rule("a/**", skip=True, kinds=("Linear",)), *rules]),
        strict=False,
    )
    np.testing.assert_array_equal(
        q["a"](jnp.ones((2, 32))), model["a"](jnp.ones((2, 32)))
    )


class Frozen(nnx.Variable):
    """A variable type of the user's."""


@pytest.mark.parametrize(
    ("name", "holder_type"),
    [
        ("token_mix", nnx.Param),
        ("embed_proj", nnx.Param),
        ("w", nnx.Variable),
        ("w", Frozen),
        ("w", np.asarray),
        ("w", lambda v: nnx.Param({"a": v})),
    ],
)
def test_matrices_are_found_in_any_holder_under_any_name(name, holder_type):
    class Model(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            setattr(self, name, holder_type(jnp.ones((8, 8))))

    with pytest.raises(
        ValueError,
        match=rf"modules that jaxq does not know: {name}(/a)? float32\[8, 8\]",
    ):
        jaxq.quantize_model(Model(), "int8")
    rows = {
        row.path: row
        for row in jaxq.quantize_model(Model(), "int8", strict=False)[1].rows
    }
    assert rows[name].note in (
        "in no layer jaxq knows, left as it is",
        "in no variable, left as it is",
        "not one array, left as it is",
    )


class ProblemsOfAllSorts(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
        self.parts = nnx.Param({"a": jnp.ones((32, 8))})
        self.own = nnx.Param(jnp.ones((32, 8)))


@pytest.mark.parametrize("function", [jaxq.quantize_model, jaxq.nn.plan])
def test_one_error_names_problems_of_all_sorts(function):
    rules = [
        Rule("up", weight=jaxq.QuantSpec("int8", jaxq.PerGroup(24))),
        Rule("parts/**", weight="int8", kinds="Param"),
        Rule("typo", weight="int8"),
    ]
    with pytest.raises(ValueError) as error:
        function(ProblemsOfAllSorts(), Recipe(rules))
    caller, text = function.__name__, str(error.value)
    for message in (
        "these layers cannot be quantized:\n  up (Linear): ",
        "a rule quantizes parts/a, which must be an nnx.Param that a module, an ",
        "rules ['typo'] match no layer ",
        "modules that jaxq does not know: own float32[32, 8]. ",
    ):
        assert message in text, text
    assert text.count(f"{caller}: ") == 4
    # `strict=False` permits the last two sorts only.
    with pytest.raises(ValueError) as error:
        function(ProblemsOfAllSorts(), Recipe(rules), strict=False)
    assert text.startswith(str(error.value))
    assert "typo" not in str(error.value)
    assert "parts/a" in str(error.value)


def test_plans_of_models_that_hold_no_arrays():
    model = nnx.eval_shape(lambda: nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    concrete_model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    assert jaxq.nn.plan(model, "int4").rows == jaxq.nn.plan(concrete_model, "int4").rows
    bare_model = nnx.eval_shape(lambda: Raw(USES["operator"][0]))
    with pytest.raises(ValueError, match="modules that jaxq does not know: w float32"):
        jaxq.nn.plan(bare_model, "int8")
    assert jaxq.nn.plan(bare_model, Recipe([RULE])).quantized[0].path == "w"


def test_a_bare_stack_needs_its_axes():
    model = Raw(lambda x, w, g: jaxq.einsum("bk,ekn->ebn", x, w[...]))
    model.w.set_value(jnp.ones((2, 32, 8)))
    with pytest.raises(
        ValueError, match="does not know which of its 3 axes a product contracts"
    ):
        jaxq.quantize_model(model, Recipe([RULE]))
    rule = Rule("w", weight="int8", kinds="Param", contracting=-2, batch=0)
    q, _ = jaxq.quantize_model(model, Recipe([rule]))
    assert q(jnp.ones((3, 32))).shape == (2, 3, 8)


def test_a_rule_that_contradicts_the_layer_is_refused():
    with pytest.raises(
        ValueError, match=r"its rule has contracting=\(-1,\), but its axes are"
    ):
        jaxq.quantize_model(
            nnx.Linear(8, 8, rngs=nnx.Rngs(0)),
            Recipe([Rule(weight="int8", contracting=-1)]),
        )


def test_optimizers_see_floats_only():
    q, _ = jaxq.quantize_model(
        Raw(USES["operator"][0]), Recipe([RULE, *jaxq.recipes.get("int8").rules])
    )
    trainable = nnx.state(q, nnx.Param)
    assert {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(trainable)} == {
        "up/bias", "gain", "pos_embedding"
    }  # fmt: skip


def test_predicates_choose_by_class_and_shape():
    model = nnx.Sequential(
        nnx.Linear(8, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    )
    wide_rule = Rule(
        weight="int8",
        where=lambda layer: layer.module is nnx.Linear and layer.shape[-1] == 64,
    )
    _, report = jaxq.quantize_model(model, Recipe([wide_rule]))
    assert [row.path for row in report.quantized] == ["layers/0/kernel"]


def test_static_needs_data():
    layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError,
        match=r"(?s)\(Linear\): observer Mean.* needs data.*calibration=batches",
    ):
        jaxq.quantize_model(layer, "w8a8_static")
    stats = jaxq.nn.calibrate(layer, [jnp.ones((4, 8))])
    with pytest.raises(ValueError, match="have no state of"):
        jaxq.quantize_model(layer, "w8a8_static", calibration=stats)
    stats = jaxq.nn.calibrate(
        layer,
        [jnp.ones((4, 8)), -3 * jnp.ones((4, 8))],
        observer=jaxq.observers.absmax(),
    )
    absmax = jaxq.Rule(weight="int8", activation="int8", observer="absmax")
    q, _ = jaxq.quantize_model(layer, jaxq.Recipe([absmax]), calibration=stats)
    np.testing.assert_array_equal(q.kernel[...].input_range, [-3, 3])


@pytest.mark.parametrize(
    ("layer", "activation", "message"),
    [
        (
            lambda r: nnx.Conv(8, 8, (3, 3), rngs=r),
            jaxq.PerBlock((16,)),
            "needs one contracted axis",
        ),
        (
            lambda r: nnx.Conv(8, 8, (3, 3), rngs=r),
            jaxq.PerGroup(24),
            "not a multiple of group size 24",
        ),
        (
            lambda r: nnx.Linear(32, 8, rngs=r),
            jaxq.PerBlock((16, 16)),
            "not a multiple of block size 16",
        ),
    ],
)
def test_impossible_activations_are_found_before_anything_is_called(
    layer, activation, message
):
    rule = Rule(weight="int8", activation=jaxq.QuantSpec("int8", activation))
    with pytest.raises(
        ValueError,
        match=rf"(?s)layers cannot be quantized:\n  a \(.*{message}.*activation: float",
    ):
        jaxq.quantize_model(nnx.Dict(a=layer(nnx.Rngs(0))), Recipe([rule]))


# Models of the other Flax flavour inside a model.


def test_linen_layers_inside_an_nnx_model_are_named():
    x = jnp.ones((2, 8))
    inner = nnx.bridge.ToNNX(linen.Dense(4, name="up"), rngs=nnx.Rngs(0)).lazy_init(x)
    model = nnx.Dict(a=nnx.Linear(8, 8, rngs=nnx.Rngs(0)), b=inner)
    message = r"b/kernel float32\[8, 4\] \(inside ToNNX\)"
    with pytest.raises(ValueError, match=message) as caught:
        jaxq.quantize_model(model, "int8")
    # A rule that quantizes the matrix is refused, so it is no remedy.
    assert "write them in nnx" in str(caught.value)
    assert "weight=" not in str(caught.value)
    rules = jaxq.recipes.get("int8").rules
    rule = Rule("b/**", weight="int8", kinds="Param")
    with pytest.raises(ValueError, match=r"quantizes b/kernel, .* nnx.bridge.ToNNX"):
        jaxq.quantize_model(model, Recipe([rule, *rules]))
    skip = Rule("b/**", skip=True, kinds="Param")
    for recipe, strict in ((Recipe([skip, *rules]), True), ("int8", False)):
        q, report = jaxq.quantize_model(model, recipe, strict=strict)
        (row,) = [row for row in report.rows if row.path == "b/kernel"]
        assert row.format is None
        assert [row.path for row in report.quantized] == ["a/kernel"]
        np.testing.assert_array_equal(q["b"](x), model["b"](x))


class Inner(nnx.Module):
    def __init__(self, rngs):
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(x)


class Bridged(linen.Module):
    @linen.compact
    def __call__(self, x):
        return nnx.bridge.ToLinen(Inner, name="inner")(linen.Dense(8, name="up")(x))


def test_nnx_layers_inside_a_linen_model_are_named():
    x = jnp.ones((2, 8))
    module = Bridged()
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(
        ValueError, match=r"inner/down/kernel float32\[8, 4\] \(ToLinen\)"
    ):
        jaxq.nn.linen.quantize_model(module, variables, "int8")
    rules = jaxq.recipes.get("int8").rules
    rule = Rule("inner/**", weight="int8", kinds="Param")
    with pytest.raises(ValueError, match=r"inside an nnx.bridge.ToLinen"):
        jaxq.nn.linen.quantize_model(module, variables, Recipe([rule, *rules]))
    qmodule, qvariables, report = jaxq.nn.linen.quantize_model(
        module, variables, "int8", strict=False
    )
    y, expected = qmodule.apply(qvariables, x), module.apply(variables, x)
    assert jaxq.metrics.sqnr(expected, y) > 35
    rows = {row.path: row for row in report.rows}
    assert [row.path for row in report.quantized] == ["up/kernel"]
    assert "which jaxq does not quantize" in rows["inner/down/kernel"].note


class ListedMatrices(nnx.Module):
    """Bare matrices in an `nnx.List` and an `nnx.Dict`; the last one is shared."""

    def __init__(self):
        matrices = [nnx.Param(normal(32, 32, seed=seed)) for seed in range(3)]
        self.listed = nnx.List(matrices[:2])
        self.named = nnx.Dict(last=matrices[2])
        self.again = matrices[2]

    def __call__(self, x):
        for w in self.listed:
            x = x @ w
        return x @ self.named["last"] @ self.again


@pytest.mark.parametrize("batches", [None, [normal(8, 32)]])
def test_matrices_in_a_list_and_a_dict_are_quantized(batches):
    rule = Rule("**", weight="int8", kinds="Param")
    model, x = ListedMatrices(), normal(4, 32)
    qmodel, report = jaxq.quantize_model(model, Recipe([rule]), calibration=batches)
    assert [row.path for row in report.rows] == ["again", "listed/0", "listed/1"]
    assert qmodel.named["last"] is qmodel.again
    weights = [*model.listed, model.again, model.again]
    expected = x
    for w in weights:
        expected = expected @ jaxq.quantize(w[...], "int8")
    np.testing.assert_array_equal(qmodel(x), expected)
    # The model that was passed keeps its floats.
    assert all(isinstance(w, nnx.Param) for w in weights)


class Experts(nnx.Module):
    """A mixture of experts whose weights are a bare array: [t, k] -> [t, n]."""

    def __init__(self):
        self.router = nnx.Linear(32, 4, rngs=nnx.Rngs(0))
        self.experts = nnx.Param(normal(4, 32, 8))
        self.pos_emb = nnx.Param(normal(16, 32))
        self.emb = nnx.Param(normal(16, 32))
        self.wpe = nnx.Param(normal(16, 32))
        self.relative_position_bias_table = nnx.Param(normal(9, 4))


def test_the_matrix_without_a_rule_comes_first_in_the_error():
    with pytest.raises(ValueError) as error:
        jaxq.quantize_model(Experts(), "int8")
    text = str(error.value)
    assert text.startswith(
        "quantize_model: no rule matches these matrices of modules that jaxq does not "
        "know: experts float32[4, 32, 8]. "
    )
    # The tables of embeddings are no matrices, and "**" is not to blame.
    assert "emb" not in text
    assert "match no layer" not in text


def test_the_last_rule_of_a_named_recipe_may_match_nothing_after_another_rule():
    rule = Rule("experts", weight="int8", kinds="Param", contracting=-2, batch=0)
    recipe = Recipe([rule, *jaxq.recipes.get("int4").rules])
    _, report = jaxq.quantize_model(Experts(), recipe)
    assert [row.path for row in report.rows if row.method] == ["experts"]
    # Nothing at all is still an error, and so is a typo.
    router = nnx.Dict(router=nnx.Linear(32, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"rules \['\*\*'\] match no layer"):
        jaxq.quantize_model(router, "int4")
    typo = Rule("expert", weight="int8", kinds="Param")
    with pytest.raises(ValueError, match=r"rules \['expert'\] match no layer"):
        jaxq.quantize_model(Experts(), Recipe([typo, *recipe.rules]))


@pytest.mark.parametrize(
    "name", ["pos_emb", "emb", "wpe", "relative_position_bias_table"]
)
def test_a_named_recipe_leaves_a_table_of_embeddings_in_floats(name):
    params = {name: normal(16, 32), "up": normal(32, 32)}
    qparams, report = jaxq.quantize_params(params, "int8")
    assert isinstance(qparams[name], jax.Array)
    (row,) = [row for row in report.rows if row.path == name]
    assert row.note.startswith("embedding, left in floats")
