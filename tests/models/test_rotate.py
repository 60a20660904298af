"""A rotated model computes the same logits, and quantizes as if it had no outliers."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq.methods import smoothquant
from jaxq.methods._rotation import hadamard, random_hadamard
from jaxq.models import fold_scales, norm_groups, smooth, with_outliers
from jaxq.models._rotate import rotate
from tests import tables
from tests.models.test_decoder import VARIANTS, make, tokens
from tests.models.test_scale_groups import record, run, state

EXAMPLES = Path(__file__).parents[2] / "examples"


def orthogonal(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0].astype(
        np.float32
    )


@pytest.mark.parametrize("variant", tables.thinned(VARIANTS, ["scan"]))
def test_logits_are_those_of_the_original(variant):
    model = make(**VARIANTS[variant])
    before, logits = state(model), np.asarray(run(model, tokens()))
    h = model.config.head_dim
    rotated = rotate(model, orthogonal(32), heads=orthogonal(h, 1), online=hadamard)
    np.testing.assert_allclose(
        run(rotated, tokens()), logits, atol=1e-4 * abs(logits).max()
    )
    assert not rotated.config.tie_word_embeddings
    for path, value in state(model).items():
        np.testing.assert_array_equal(value, before[path])
    assert model.config.tie_word_embeddings == (variant == "tied")
    after = state(rotated)
    assert all(
        np.all(value == 1) for path, value in after.items() if path[-1] == "scale"
    )
    assert all(
        np.any(value != before[path])
        for path, value in after.items()
        if path in before and path[-1] != "bias"
    )


def test_stream_is_rotated():
    model, q = make(), orthogonal(32)
    rotated = rotate(model, q, online=hadamard)
    plain, seen = record(model, tokens()), record(rotated, tokens())
    gain = state(model)["layers", 0, "input_layernorm", "scale"]
    stream = plain["layers/0/self_attn/q_proj"] / gain
    np.testing.assert_allclose(seen["layers/0/self_attn/q_proj"], stream @ q, atol=1e-4)
    wide = plain["layers/1/mlp/down_proj"]
    # What down_proj multiplies is transformed on its way in.
    down = rotated.layers[1].mlp.down_proj
    np.testing.assert_allclose(
        wide @ np.asarray(model.layers[1].mlp.down_proj.kernel[...]) @ q,
        down(wide),
        atol=2e-3,
    )
    moved, *_ = down.promote_dtype(
        (jnp.asarray(wide), down.kernel[...], None), dtype=jnp.float32
    )
    np.testing.assert_allclose(moved, hadamard(wide), rtol=1e-6)


def test_no_scale_moves_through_a_transform():
    """The transform mixes channels, so down_proj cannot undo a scale of up_proj."""
    rotated = rotate(make(), orthogonal(32), online=hadamard)
    assert {g.source for g in norm_groups(make())} - {
        g.source for g in norm_groups(rotated)
    } == {f"layers/{i}/mlp/up_proj" for i in range(2)}
    with pytest.raises(ValueError, match="mlp/up_proj'] are not sources of groups"):
        fold_scales(rotated, {"layers/0/mlp/up_proj": jnp.full((48,), 2.0)})
    rule = jaxq.Rule(weight="int8", method="equalize")
    model = make()
    q, report = jaxq.quantize_model(
        model, jaxq.Recipe([rule], rotate=True), calibration=[tokens()], strict=False
    )
    rows = {row.path: row for row in report.quantized}
    assert rows["layers/0/mlp/down_proj/kernel"].method == "rtn"
    wanted = np.asarray(run(model, tokens()))
    assert np.linalg.norm(run(q, tokens()) - wanted) < 0.03 * np.linalg.norm(wanted)


def twice(x):
    return hadamard(hadamard(x))


def test_files_say_what_inputs_go_through(tmp_path):
    path, model = tmp_path / "model.safetensors", make()
    rotated = rotate(model, orthogonal(32), online=hadamard)
    jaxq.save(path, rotated)
    shell = rotate(make(), np.eye(32, dtype=np.float32), online=hadamard)
    np.testing.assert_array_equal(
        run(jaxq.load(path, into=shell), tokens()), run(rotated, tokens())
    )
    said = (
        r"layers/1/mlp/down_proj: .*%s in the model and through %s in the file.*online="
    )
    with pytest.raises(ValueError, match=said % ("nothing", "hadamard")):
        jaxq.load(path, into=make())
    with pytest.raises(ValueError, match=said % ("twice", "hadamard")):
        jaxq.load(path, into=rotate(model, orthogonal(32), online=twice))
    jaxq.save(path, model)
    with pytest.raises(ValueError, match=said % ("hadamard", "nothing")):
        jaxq.load(path, into=shell)
    quantized, _ = jaxq.quantize_model(
        rotated, jaxq.Recipe([jaxq.Rule("**/down_proj", weight="int8")])
    )
    jaxq.save(path, quantized)
    with pytest.raises(ValueError, match=said % ("nothing", "hadamard")):
        jaxq.load(path, into=make())
    with pytest.raises(ValueError, match=r"layers/0/mlp/down_proj by hadamard"):
        jaxq.models.save(tmp_path / "directory", rotated)


def test_models_of_one_rotation_are_one_program():
    model, count = make(), 0

    @nnx.jit
    def traced(model, tokens):
        nonlocal count
        count += 1
        return model(tokens)

    traced(rotate(model, orthogonal(32), online=hadamard), tokens())
    traced(rotate(model, orthogonal(32, 5), online=hadamard), tokens())
    assert count == 1


def test_errors():
    model = make()
    with pytest.raises(
        ValueError, match=r"rotation must be float32\[32,32\], got float32\[16,16\]"
    ):
        rotate(model, orthogonal(16))
    with pytest.raises(ValueError, match="rotation is not orthogonal"):
        rotate(model, 1.1 * orthogonal(32))
    with pytest.raises(ValueError, match="rotation is not orthogonal"):
        rotate(model, np.full((32, 32), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"heads must be float32\[16,16\]"):
        rotate(model, orthogonal(32), heads=orthogonal(32))
    with pytest.raises(ValueError, match="online is not orthogonal"):
        rotate(model, orthogonal(32), online=jnp.tanh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layer"}, "norm='layer', and a LayerNorm subtracts the mean"),
        ({"norm_places": "both"}, "norm_places='both', and the gain of a norm"),
        ({"learned_positions": True}, "the learned positions are not rotated"),
    ],
)
def test_models_that_cannot_be_rotated(changes, message):
    with pytest.raises(ValueError, match=message):
        rotate(make(num_hidden_layers=1, **changes), orthogonal(32))


@pytest.mark.heavy
def test_outliers_of_the_bundled_model():
    pytest.importorskip("tokenizers", reason="reads a tokenizer: pip install jaxq[hf]")
    model, tokenizer = jaxq.models.load(EXAMPLES / "tiny_llama")
    ids = np.asarray(
        tokenizer.encode((EXAMPLES / "heldout.txt").read_text()[:4000]).ids, np.int32
    )
    held, calibration = (
        jnp.asarray(part).reshape(2, 64) for part in (ids[:128], ids[128:256])
    )
    reference = run(model, held)

    def damage(float_model):
        np.testing.assert_allclose(run(float_model, held), reference, atol=1e-3)
        quantized, _ = jaxq.quantize_model(float_model, "w8a8")
        return float(jaxq.metrics.kl_divergence(reference, run(quantized, held)))

    loud = with_outliers(model, key=jax.random.key(1))
    absmax = {path: abs(x).max(0) for path, x in record(loud, calibration).items()}
    groups = [
        g for g in norm_groups(loud) if g.kind == "norm" and g.targets != ("lm_head",)
    ]
    smoothed = smooth(
        loud, absmax, functools.partial(smoothquant, alpha=0.5), groups=groups
    )
    signs = random_hadamard(jax.random.key(2), model.config.hidden_size)
    rotated = rotate(loud, hadamard(jnp.diag(signs)), online=hadamard)
    plain, ruined = damage(model), damage(loud)
    assert ruined > 20 * plain
    assert damage(smoothed) < 2 * plain
    assert damage(rotated) < 2 * plain
