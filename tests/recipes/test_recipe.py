"""Rules and recipes: which layers match, which rule decides, and the errors."""

import json

import jax
import pytest

import jaxq
from jaxq import Recipe, Rule, recipes

PATHS = (
    "",
    "head",
    "attn",
    "attn/query",
    "layers/0/attn/query",
    "layers/10/mlp/up",
    "layers/10/mlp/up/lora",
)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("**", PATHS),
        ("*", ("", "head", "attn")),
        ("", ("",)),
        ("head", ("head",)),
        ("hea", ()),
        ("h?ad", ("head",)),
        ("layers/*/attn/query", ("layers/0/attn/query",)),
        ("layers/?/*/*", ("layers/0/attn/query",)),
        ("**/attn/*", ("attn/query", "layers/0/attn/query")),
        ("**/attn", ("attn",)),
        ("attn/**", ("attn", "attn/query")),
        ("layers/**/up", ("layers/10/mlp/up",)),
        ("layers/10/**/mlp/**/up", ("layers/10/mlp/up",)),
        ("layers/**/**/up/**", ("layers/10/mlp/up", "layers/10/mlp/up/lora")),
        ("**/**", PATHS),
        ("layers.*", ()),
        (
            "re:layers/.*",
            ("layers/0/attn/query", "layers/10/mlp/up", "layers/10/mlp/up/lora"),
        ),
        (r"re:.*/\d\d/.*/up", ("layers/10/mlp/up",)),
        ("re:attn", ("attn",)),
    ],
)
def test_patterns(pattern, matched):
    rule = Rule(pattern, weight="int8")
    assert tuple(path for path in PATHS if rule.matches(path, "Linear")) == matched


def test_kinds():
    rule = Rule(weight="int8", kinds=("Conv", "Embed"))
    assert [rule.matches("a", kind) for kind in ("Conv", "Embed", "Linear")] == [
        True,
        True,
        False,
    ]
    assert Rule(weight="int8", kinds="Conv") == Rule(weight="int8", kinds=("Conv",))


@pytest.mark.parametrize(
    ("kind", "close"), [("Liner", "'Linear'"), ("conv", "'Conv'"), ("param", "'Param'")]
)
def test_unknown_kinds_name_close_ones(kind, close):
    with pytest.raises(
        ValueError,
        match=rf"Rule\('a/\*'\): kinds must be one of Linear, .*Did you mean .*{close}",
    ):
        Rule("a/*", weight="int8", kinds=("Einsum", kind))


def test_kinds_are_those_of_the_layers():
    from jaxq.nn.layers import layer_kinds, linen_kinds

    known = {kind.name for kind in (*layer_kinds(), *linen_kinds())}
    assert {*recipes.kinds()} == known | {"Array", "Param"}


TABLES = (
    *(
        "embed",
        "embedding",
        "embed_tokens/weight",
        "wte",
        "transformer/wpe/embedding",
        "tok_embeddings",
        "pos_emb",
    ),
    *(
        "embedder/input_embedding",
        "embeddings/word_embeddings/weight",
        "projector/embed",
        "transformer.wte.weight",
    ),
    *(
        "Embed_0/embedding",
        "model.embed_tokens.weight",
        "shared.weight",
        "a.relative_attention_bias.weight",
    ),
)
VECTORS = (
    *(
        "layers/norm/scale",
        "layers.input_layernorm.weight",
        "blocks/LayerNorm_0/scale",
        "h/ln_1/weight",
        "dense/bias",
    ),
    *(
        "bn1/weight",
        "transformer.ln_f.weight",
        "final_norm",
        "rms/gamma",
        "attn/q_bias",
        "batch_stats/bn/mean",
    ),
)
ROUTERS = (
    "router",
    "layers/0/router/Dense_0",
    "a.block_sparse_moe.gate.weight",
    "mlp/shared_expert_gate",
    "Router_1",
)
HEADS = (
    *(
        "lm_head",
        "a/head",
        "lm_head/layers/0",
        "model.lm_head.weight",
        "LMHead_0/Dense_0",
        "embed_out",
        "unembed",
    ),
    *(
        "output",
        "params/out",
        "model.score.weight",
        "classifier/dense",
        "cls/predictions/decoder",
        "logits",
    ),
)
MATRICES = (
    *(
        "embedding_proj",
        "layers/0/embed_proj/kernel",
        "embeddings/patch_embeddings/projection/kernel",
        "patch_embed/w",
    ),
    *(
        "time_embedding/linear_1/kernel",
        "embed/dense",
        "membed",
        "embeddingless",
        "wteam",
        "mlp/kernel",
    ),
    *(
        "layer/0/attention/output/dense",
        "layers/0/attn/out",
        "mlp/gate",
        "norm1/linear/kernel",
        "heads",
        "ahead/w",
    ),
    *(
        "mlp.gate_proj.weight",
        "attn/bias_proj",
        "overhead",
        "outer",
        "cls_mlp",
        "layers/scores",
        "h.0.c_fc",
    ),
)
LEFT = {
    "embedding": TABLES,
    "norm or bias": VECTORS,
    "router": ROUTERS,
    "output head": HEADS,
    None: MATRICES,
}
LEFT = {path: what for what, paths in LEFT.items() for path in paths}


@pytest.mark.parametrize("path", LEFT)
def test_named_recipes_recognise_whole_words(path):
    what, recipe = LEFT[path], recipes.get("int8")
    reason = None if what is None else f"{what}, left in floats by default"
    assert recipe.find(path, "Array", (16, 8)).reason == reason
    by_name = reason if what in ("router", "output head") else None
    assert (
        recipe.find(path, "Linear").reason
        == recipe.find(path, "Dense").reason
        == by_name
    )
    assert recipe.find(path, "Embed").reason == "embedding, left in floats by default"


def test_the_output_projection_of_a_single_attention_is_not_a_head():
    assert recipes.get("int8").find("out", "LinearGeneral").weight.fmt.name == "int8"


def test_first_match_decides():
    recipe = Recipe(
        [
            Rule("a/*", weight="int4"),
            Rule("**/b", skip=True),
            Rule(weight="nf4", kinds=("Linear",)),
        ]
    )
    assert recipe.find("a/b", "Linear").weight.fmt.name == "int4"
    assert recipe.find("c/b", "Linear").skip
    assert recipe.find("c", "Linear").weight.fmt.name == "nf4"
    assert recipe.find("c", "Conv") is None


def test_equal_rules_compare_and_hash_equal():
    assert Rule("a", weight="INT8") == Rule("a", weight=jaxq.presets()["int8"])
    assert hash(Recipe([Rule(weight="int8")])) == hash(Recipe((Rule(weight="int8"),)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either weight= or skip=True"),
        ({"weight": "int8", "skip": True}, "give either weight= or skip=True"),
        ({"skip": True, "activation": "int8"}, "a skipped layer stays in floats"),
        ({"weight": "int9"}, r"Rule\('a'\) weight: .*int9.*int8"),
        (
            {"weight": "int8", "activation": "itn8"},
            r"Rule\('a'\) activation: .*itn8.*int8",
        ),
    ],
)
def test_impossible_rules(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule("a", **arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"contracting": "0"}, "contracting must be one axis or several, such as -2"),
        ({"contracting": 1.5}, "contracting must be one axis"),
        ({"batch": (True,)}, "batch must be one axis"),
        ({"contracting": (0, 0)}, "contracting names an axis twice"),
        ({"kinds": 5}, "kinds must be names such as"),
    ],
)
def test_fields_of_other_types_name_the_rule(fields, message):
    with pytest.raises((TypeError, ValueError), match=rf"Rule\('a'\): {message}"):
        Rule("a", weight="int8", **fields)


@pytest.mark.parametrize(
    "data", [{"rules": 5}, {"rules": [5]}, {"rules": "int8"}, {"rules": [["a"]]}]
)
def test_from_dict_says_what_it_expects(data):
    with pytest.raises(ValueError, match=r"(Recipe|Rule)\.from_dict: expected"):
        Recipe.from_dict(data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": 3}, "pattern must be a string"),
        ({"weight": {"format": "int8"}}, "weight: QuantSpec.from_dict: the field gran"),
        ({"weight": {}}, "weight: QuantSpec.from_dict: the field format is missing"),
        ({"weight": 3}, "weight"),
        ({"kinds": [[]]}, "kinds"),
        ({"options": 5}, "int"),
        ({"options": {"act_order": {}}}, "act_order"),
        ({"method": []}, "method must be a string"),
        ({"observer": {"type": []}}, "observers.from_dict"),
        ({"contracting": ["x"]}, "contracting must be one axis"),
        ({"pattern": "re:(a"}, "the pattern is not a regular expression"),
        ({"pattern": "re:a{99999999999999999999}"}, "is not a regular expression"),
        ({"wieght": 1}, "'wieght'"),
    ],
    ids=repr,
)
def test_every_error_of_from_dict_names_the_rule(fields, message):
    rules = [{"weight": "int8"}, {"weight": "int8", "activation": "int8", **fields}]
    with pytest.raises(
        ValueError, match=rf"Recipe\.from_dict: rules\[1\]: .*{message}"
    ):
        Recipe.from_dict({"rules": rules})


def test_errors_suggest_close_names():
    with pytest.raises(
        ValueError,
        match=r"QuantSpec.from_dict: unknown field 'fromat'. Did you mean 'format'",
    ):
        jaxq.QuantSpec.from_dict({"fromat": "int8"})
    with pytest.raises(
        AttributeError, match=r"no attribute 'quantise'. Did you mean 'quantize'"
    ):
        _ = jaxq.quantise
    with pytest.raises(
        ValueError,
        match="explain: platform must be one of .*'tpuu'.* Did you mean 'tpu'",
    ):
        jaxq.explain(
            jax.numpy.ones((2, 8)),
            jaxq.quantize(jax.numpy.ones((8, 2)), "int8"),
            platform="tpuu",
        )


def test_bad_regular_expression_names_the_rule():
    with pytest.raises(ValueError, match="the pattern is not a regular expression"):
        Rule("re:(a", weight="int8")


def test_recipes_hold_rules():
    with pytest.raises(TypeError, match="rules must be jaxq.Rule objects, got str"):
        Recipe(["int8"])


WITH_ACTIVATIONS = (
    *("fp8_dynamic", "fp8_static", "w4a4", "w4a4_rotated", "w4a8", "w8a8"),
    *("w8a8_rotated", "w8a8_smoothquant", "w8a8_static"),
)


def test_every_preset_is_a_recipe():
    assert set(jaxq.presets()) < set(recipes.names())
    for name in recipes.names():
        last = recipes.as_recipe(name, "test").rules[-1]
        assert last.pattern == "**"
        assert (last.activation is not None) == (name in WITH_ACTIVATIONS)
        assert (last.observer is not None) == name.endswith("_static")
        method = next(
            (
                m
                for m in ("gptq", "awq", "hqq", "adaround", "smoothquant")
                if name.endswith(m)
            ),
            "rtn",
        )
        assert last.method == ("llm_int8" if name == "llm_int8" else method)


@pytest.mark.parametrize(
    ("name", "close"), [("int88", "int8"), ("w8a88", "w8a8"), ("nf-5", "nf4")]
)
def test_unknown_recipes_name_close_ones(name, close):
    with pytest.raises(ValueError, match=f"quantize_model: .*{name}.*{close}"):
        recipes.as_recipe(name, "quantize_model")


def test_names_may_have_hyphens_capitals_and_spaces():
    assert recipes.as_recipe("FP8-dynamic", "test") == recipes.as_recipe(
        "fp8_dynamic", "test"
    )


def test_other_types_are_not_recipes():
    with pytest.raises(
        TypeError, match="recipe must be a name, a QuantSpec or a jaxq.Recipe, got Rule"
    ):
        recipes.as_recipe(Rule(weight="int8"), "test")


def test_named_recipes_leave_embeddings_heads_and_routers_in_floats():
    recipe = recipes.as_recipe(jaxq.presets()["int4"], "test")
    for path, kind in [
        ("tokens", "Embed"),
        ("lm_head", "Linear"),
        ("moe/3/router", "Linear"),
        ("head", "Einsum"),
    ]:
        rule = recipe.find(path, kind)
        assert rule.skip
        assert "left in floats by default" in rule.reason
    assert recipe.find("layers/headless", "Linear").weight == jaxq.presets()["int4"]


def big(layer):
    """A rule's predicate, of a module so that it can be compared."""
    return layer.shape[-1] >= 64 and layer.kind == "Linear"


def test_predicates_see_path_kind_shape_and_class():
    seen = []
    rule = Rule("a/*", weight="int8", where=lambda layer: seen.append(layer) or True)
    assert rule.matches("a/b", "Linear", (4, 8), int)
    assert seen == [recipes.Layer("a/b", "Linear", (4, 8), int)]
    recipe = Recipe([Rule(weight="int4", where=big), Rule(weight="int8")])
    assert recipe.find("a", "Linear", (8, 64)).weight.fmt.name == "int4"
    assert recipe.find("a", "Linear", (8, 32)).weight.fmt.name == "int8"
    assert Rule(weight="int4", where=big) == Rule(weight="int4", where=big)
    with pytest.raises(TypeError, match="JSON"):
        recipe.to_dict()


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_survive_json(name):
    recipe = recipes.get(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_rules_survive_json():
    rules = [
        Rule(
            "head",
            skip=True,
            reason="it matters",
            optional=True,
            kinds=("Linear", "Conv"),
        ),
        Rule("e", weight="nf4", contracting=-2, batch=(0,), kinds="Array"),
        Rule(
            weight="int8", activation="int8", observer=jaxq.observers.percentile(99.9)
        ),
        Rule(
            weight=jaxq.QuantSpec("int4", jaxq.PerGroup(32)),
            method="gptq",
            options={"act_order": True},
        ),
    ]
    data = json.loads(json.dumps(Recipe(rules).to_dict()))
    assert Recipe.from_dict(data) == Recipe(rules)
    assert data["rules"][0] == {
        "pattern": "head",
        "skip": True,
        "kinds": ["Linear", "Conv"],
        "reason": "it matters",
        "optional": True,
    }
    with pytest.raises(ValueError, match="'weigth'.*weight"):
        Rule.from_dict({"pattern": "**", "weigth": "int8"})
    with pytest.raises(ValueError, match="rules"):
        Recipe.from_dict({"rule": []})


def test_observers_by_name():
    rule = Rule(weight="int8", activation="int8", observer="minmax")
    assert rule.observer == jaxq.observers.minmax()
    with pytest.raises(ValueError, match="minmax"):
        Rule(weight="int8", activation="int8", observer="min-maxx")
    with pytest.raises(ValueError, match="has no activation="):
        Rule(weight="int8", observer="minmax")
    with pytest.raises(ValueError, match="cannot be static"):
        Rule(weight="mxfp8", activation="mxfp8", observer="absmax")
    with pytest.raises(ValueError, match="axis"):
        Rule(weight="int8", activation="int8", observer=jaxq.observers.absmax(axis=-1))


def test_one_rule_is_not_a_list():
    with pytest.raises(TypeError, match=r"\[rule\]"):
        Recipe(Rule(weight="int8"))


@pytest.mark.parametrize("name", ["skip", "optional", "correct_bias"])
def test_switches_are_true_or_false(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'false'"):
        Rule("a", weight=None if name == "skip" else "int8", **{name: "false"})
    with pytest.raises(ValueError, match="rotate must be True or False"):
        Recipe.from_dict({"rules": [], "rotate": "false"})
