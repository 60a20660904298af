"""Rules: which layers they match, which of them decides, and what is said when one cannot be right."""

import pytest

import jaxq
from jaxq import Recipe, Rule, recipes

PATHS = ("", "head", "attn", "attn/query", "layers/0/attn/query", "layers/10/mlp/up", "layers/10/mlp/up/lora")


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
        ("re:layers/.*", ("layers/0/attn/query", "layers/10/mlp/up", "layers/10/mlp/up/lora")),
        (r"re:.*/\d\d/.*/up", ("layers/10/mlp/up",)),
        ("re:attn", ("attn",)),
    ],
)
def test_patterns(pattern, matched):
    rule = Rule(pattern, weight="int8")
    assert tuple(path for path in PATHS if rule.matches(path, "Linear")) == matched


def test_kinds():
    rule = Rule(weight="int8", kinds=("Conv", "Embed"))
    assert [rule.matches("a", kind) for kind in ("Conv", "Embed", "Linear")] == [True, True, False]
    assert Rule(weight="int8", kinds="Conv") == Rule(weight="int8", kinds=("Conv",))


def test_first_match_decides():
    recipe = Recipe([Rule("a/*", weight="int4"), Rule("**/b", skip=True), Rule(weight="nf4", kinds=("Linear",))])
    assert recipe.find("a/b", "Linear").weight.fmt.name == "int4"
    assert recipe.find("c/b", "Linear").skip
    assert recipe.find("c", "Linear").weight.fmt.name == "nf4"
    assert recipe.find("c", "Conv") is None


def test_rules_are_values():
    assert Rule("a", weight="INT8") == Rule("a", weight=jaxq.presets()["int8"])
    assert hash(Recipe([Rule(weight="int8")])) == hash(Recipe((Rule(weight="int8"),)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either weight= or skip=True"),
        ({"weight": "int8", "skip": True}, "give either weight= or skip=True"),
        ({"skip": True, "activation": "int8"}, "a skipped layer has no activation"),
        ({"weight": "int9"}, r"Rule\('a'\) weight: .*int9.*int8"),
        ({"weight": "int8", "activation": "itn8"}, r"Rule\('a'\) activation: .*itn8.*int8"),
    ],
)
def test_impossible_rules(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule("a", **arguments)


def test_bad_regular_expression_names_the_rule():
    with pytest.raises(ValueError, match=r"Rule\('re:\(a'\): not a regular expression"):
        Rule("re:(a", weight="int8")


def test_recipes_hold_rules():
    with pytest.raises(TypeError, match="rules must be jaxq.Rule objects, got str"):
        Recipe(["int8"])


def test_every_preset_is_a_recipe():
    assert set(jaxq.presets()) < set(recipes.names())
    for name in recipes.names():
        last = recipes.as_recipe(name, "test").rules[-1]
        assert last.pattern == "**"
        assert (last.activation is not None) == (name in ("fp8_dynamic", "w4a8", "w8a8", "w8a8_smoothquant"))
        method = next((m for m in ("gptq", "awq", "hqq", "adaround", "smoothquant") if name.endswith(m)), "rtn")
        assert last.method == ("llm_int8" if name == "llm_int8" else method)


@pytest.mark.parametrize(("name", "close"), [("int88", "int8"), ("w8a88", "w8a8"), ("nf-5", "nf4")])
def test_unknown_recipes_name_close_ones(name, close):
    with pytest.raises(ValueError, match=f"quantize_model: .*{name}.*{close}"):
        recipes.as_recipe(name, "quantize_model")


def test_spelling_of_names():
    assert recipes.as_recipe("FP8-dynamic", "test") == recipes.as_recipe("fp8_dynamic", "test")


def test_no_recipe():
    with pytest.raises(TypeError, match="recipe must be a name, a QuantSpec or a jaxq.Recipe, got Rule"):
        recipes.as_recipe(Rule(weight="int8"), "test")


def test_defaults_leave_tables_heads_and_routers():
    recipe = recipes.as_recipe(jaxq.presets()["int4"], "test")
    for path, kind in [("tokens", "Embed"), ("lm_head", "Linear"), ("moe/3/router", "Linear"), ("head", "Einsum")]:
        rule = recipe.find(path, kind)
        assert rule.skip
        assert "left in floats by default" in rule.reason
    assert recipe.find("layers/headless", "Linear").weight == jaxq.presets()["int4"]
