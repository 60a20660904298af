"""Moved scales, smoothing and outliers do not change what a model computes."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq.methods import smoothquant
from jaxq.models import fold_scales, norm_groups, smooth, with_outliers
from tests import tables
from tests.models.test_decoder import VARIANTS, make, tokens

run = nnx.jit(lambda model, tokens: model(tokens))
over_variants = pytest.mark.parametrize(
    "variant", tables.thinned(VARIANTS, ["scan", "biases"])
)


def state(model):
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


@nnx.jit
def inputs(model, batch):
    model, found = nnx.clone(model), {}

    def hook(name, original, arrays, **kwargs):
        found[name] = arrays[0].reshape(-1, arrays[0].shape[-1])
        return original(arrays, **kwargs)

    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            module.promote_dtype = functools.partial(
                hook, "/".join(map(str, path)), module.promote_dtype
            )
    model(batch)
    return found


def record(model, batch):
    """The inputs of every linear `[tokens, in]`, by path, from one run."""
    return jax.tree.map(np.asarray, inputs(model, batch))


def random_scales(model, seed=0):
    scales, random, shapes = {}, np.random.default_rng(seed), state(model)
    for group in norm_groups(model):
        path = tuple(int(p) if p.isdigit() else p for p in group.source.split("/"))
        outputs = shapes[(*path, "scale" if group.kind == "norm" else "kernel")]
        shape = (
            outputs.shape
            if group.kind == "norm"
            else (*outputs.shape[:-2], outputs.shape[-1])
        )
        scales[group.source] = (2.0 ** random.integers(-3, 4, shape)).astype(np.float32)
    return scales


SOURCES = (
    "input_layernorm",
    "self_attn/v_proj",
    "post_attention_layernorm",
    "mlp/up_proj",
)


def test_groups_are_in_the_order_of_computation():
    groups = norm_groups(make())
    first = [f"layers/0/{name}" for name in SOURCES]
    second = [f"layers/1/{name}" for name in SOURCES]
    assert [group.source for group in groups] == [*first, *second, "norm"]
    assert groups[1].targets == ("layers/0/self_attn/o_proj",)
    assert groups[2].targets == ("layers/0/mlp/gate_proj", "layers/0/mlp/up_proj")
    assert groups[-1].targets == ("lm_head",)
    stacked = norm_groups(make(scan_layers=True, tie_word_embeddings=True))
    assert [group.source for group in stacked] == [f"layers/{s}" for s in SOURCES]
    # Linears of a group read the same numbers.
    seen = record(make(), tokens())
    for group in groups:
        for target in group.targets[1:]:
            np.testing.assert_array_equal(seen[target], seen[group.targets[0]])


@over_variants
def test_folding_any_scales_changes_nothing(variant):
    model = make(**VARIANTS[variant])
    before, logits = state(model), run(model, tokens())
    folded = fold_scales(model, random_scales(model))
    # Powers of two: nothing is rounded anywhere.
    np.testing.assert_array_equal(run(folded, tokens()), logits)
    for path, value in state(model).items():
        np.testing.assert_array_equal(value, before[path])
    assert any(np.any(value != before[path]) for path, value in state(folded).items())


LAYER_NORM = {
    "norm": "layer",
    "gated_mlp": False,
    "learned_positions": True,
    "attention_bias": True,
    "mlp_bias": True,
}
OTHER_NORMS = {
    "layer_norm": (LAYER_NORM, ["input_layernorm", *SOURCES[1:3]]),
    "after": ({"norm_places": "after"}, [SOURCES[1], SOURCES[3]]),
    "both": ({"norm_places": "both", "unit_offset_norms": True}, list(SOURCES)),
}


@pytest.mark.parametrize("name", OTHER_NORMS)
def test_folding_in_models_with_other_norms(name):
    changes, sources = OTHER_NORMS[name]
    model = make(num_hidden_layers=1, **changes)
    found = [group.source for group in norm_groups(model)]
    assert found == [*(f"layers/0/{source}" for source in sources), "norm"]
    folded = fold_scales(model, random_scales(model))
    np.testing.assert_array_equal(run(folded, tokens()), run(model, tokens()))
    assert any(np.any(v != state(model)[p]) for p, v in state(folded).items())


def test_each_group_takes_its_scale():
    model = make()
    plain = record(model, tokens())
    for source, s in random_scales(model, 1).items():
        group = next(g for g in norm_groups(model) if g.source == source)
        seen = record(fold_scales(model, {source: s}), tokens())
        rows = (
            np.repeat(s.reshape(2, 1, 16), 2, 1).ravel()
            if source.endswith("v_proj")
            else s
        )
        for path, value in seen.items():
            np.testing.assert_allclose(
                value * rows if path in group.targets else value, plain[path], rtol=1e-5
            )


@pytest.mark.parametrize("variant", ["llama", "scan"])
def test_outliers_in_the_same_channels_everywhere(variant):
    model = make(**VARIANTS[variant])
    loud = with_outliers(model, channels=[3, 30], strength=32.0)
    np.testing.assert_array_equal(run(loud, tokens()), run(model, tokens()))
    gains = [
        (a, b)
        for a, b in zip(state(loud).items(), state(model).items(), strict=True)
        if a[0][-1] == "scale"
    ]
    changed = 0
    for (path, new), (_, old) in gains:
        expected = (
            np.ones(32)
            if path[0] == "norm"
            else np.where(np.isin(np.arange(32), [3, 30]), 32, 1)
        )
        np.testing.assert_array_equal(new, (old * expected).astype(np.float32))
        changed += path[0] != "norm"
    assert changed == (2 if variant == "scan" else 4)
    drawn = with_outliers(
        model, channels=3, key=jax.random.key(0), strength=5.0, kinds=("norm", "linear")
    )
    np.testing.assert_allclose(run(drawn, tokens()), run(model, tokens()), atol=2e-5)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "variant", tables.thinned(["llama", "one_kv_head", "biases"], ["one_kv_head"])
)
def test_smoothing_shares_out_magnitudes(variant):
    model = with_outliers(make(**VARIANTS[variant]), channels=[3, 30])
    absmax = {path: abs(x).max(0) for path, x in record(model, tokens()).items()}
    rule, logits = functools.partial(smoothquant, alpha=0.5), run(model, tokens())
    everywhere = smooth(model, absmax, rule, groups=norm_groups(model))
    np.testing.assert_allclose(run(everywhere, tokens()), logits, atol=2e-4)
    smoothed = smooth(model, absmax, rule)
    np.testing.assert_allclose(run(smoothed, tokens()), logits, atol=2e-4)
    after = {path: abs(x).max(0) for path, x in record(smoothed, tokens()).items()}
    weights = {
        "/".join(map(str, path[:-1])): v
        for path, v in state(smoothed).items()
        if path[-1] == "kernel"
    }
    for group in norm_groups(model):
        if group.kind == "norm" and group.source != "norm":
            rows = np.max([abs(weights[t]).max(1) for t in group.targets], axis=0)
            np.testing.assert_allclose(after[group.targets[0]], rows, rtol=1e-3)
    assert (
        after["layers/0/self_attn/q_proj"].max()
        < absmax["layers/0/self_attn/q_proj"].max() / 4
    )


def test_stacked_layers_smooth_like_separate_ones():
    model, stacked = make(), make(scan_layers=True)
    whole = state(model)
    graphdef, params = nnx.split(stacked)
    flat = dict(nnx.to_flat_state(params))
    for path, variable in flat.items():
        if path[0] == "layers":
            flat[path] = variable.replace(
                np.stack([whole["layers", i, *path[1:]] for i in (0, 1)])
            )
        else:
            flat[path] = variable.replace(whole[path])
    stacked = nnx.merge(graphdef, nnx.from_flat_state(flat))
    absmax = {path: abs(x).max(0) for path, x in record(model, tokens()).items()}
    rule = functools.partial(smoothquant, alpha=0.7)
    one = state(smooth(model, absmax, rule))
    together = {}
    for path in absmax:
        if path.startswith("layers/0"):
            together["layers" + path.removeprefix("layers/0")] = np.stack(
                [absmax[path], absmax["layers/1" + path[8:]]]
            )
    for path, value in state(smooth(stacked, together, rule)).items():
        expected = (
            np.stack([one["layers", i, *path[1:]] for i in (0, 1)])
            if path[0] == "layers"
            else one[path]
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_errors():
    model = make()
    with pytest.raises(
        ValueError, match=r"\['layers/7/input_layernorm'\] are not sources of groups"
    ):
        fold_scales(model, {"layers/7/input_layernorm": np.ones(32)})
    with pytest.raises(ValueError, match=r"scale of norm must be \[32\], got \[31\]"):
        fold_scales(model, {"norm": np.ones(31)})
    with pytest.raises(ValueError, match="holds a 0"):
        fold_scales(model, {"norm": np.zeros(32)})
    with pytest.raises(ValueError, match="has no entry for"):
        smooth(model, {}, smoothquant)
    with pytest.raises(ValueError, match="pass key="):
        with_outliers(model, channels=2)
    with pytest.raises(ValueError, match="0 to 31"):
        with_outliers(model, channels=[32])
    with pytest.raises(ValueError, match="strength must be positive"):
        with_outliers(model, channels=[1], strength=0.0)
    rules = [jaxq.Rule("lm_head", weight="int8"), jaxq.Rule("**", skip=True)]
    qmodel, _ = jaxq.quantize_model(model, jaxq.Recipe(rules))
    with pytest.raises(ValueError, match="Transform the float model"):
        with_outliers(qmodel, channels=[1])
