"""Clipped ranges, against the definitions computed block by block in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerBlock, PerChannel, PerFlat, PerGroup, PerTensor, QuantSpec
from jaxq.methods import clip
from jaxq.methods._clipping import block_output_error
from tests import tables
from tests.arrays import assert_same, heavy_tailed
from tests.observers import oracle

INT4 = QuantSpec("int4", PerGroup(16))
UINT4 = QuantSpec("uint4", PerGroup(16), symmetric=False)
OFFSET = QuantSpec("uint4", PerGroup(16), offset="min")


# Heavier tails than those of most weights.
TAILS = {"degrees": 3, "scale": 1.0}
W = heavy_tailed(48, 6, **TAILS)


def blocks_of(w, size):
    """[groups, size, out]"""
    return np.asarray(w, np.float64).reshape(-1, size, w.shape[1])


@pytest.mark.parametrize("power", [2.0, 2.4])
def test_mse_finds_the_best_of_its_ranges(power):
    _, info = clip(W, INT4, power=power, num=20, max_shrink=0.8)
    blocks = blocks_of(W, 16)
    top = abs(blocks).max(1, keepdims=True)
    errors = []
    for k in range(20):
        scale = top * (1 - 0.8 * k / 20) / 7
        errors.append(
            (abs(np.clip(np.rint(blocks / scale), -7, 7) * scale - blocks) ** power)
            .sum(1)
            .T
        )
    np.testing.assert_allclose(info.error, np.min(errors, axis=0), rtol=1e-4)
    np.testing.assert_allclose(info.error_unclipped, errors[0], rtol=1e-4)
    best = np.argmin(errors, axis=0)
    np.testing.assert_allclose(
        info.high, top[:, 0].T * (1 - 0.8 * best / 20), rtol=1e-6
    )
    np.testing.assert_array_equal(info.low, -info.high)
    assert (best > 0).mean() > 0.25  # so that the search matters


@pytest.mark.parametrize(
    "preset", tables.thinned(jaxq.presets(), ["uint4", "nf4_dq", "nvfp4"])
)
def test_the_error_is_never_worse_and_reported_exactly(preset):
    w = heavy_tailed(160, 6, seed=1, **TAILS)
    qt, info = clip(w, preset, num=8)
    plain = jaxq.quantize(w, preset)
    assert jax.tree.structure(qt) == jax.tree.structure(plain)
    if isinstance(qt.scale, jaxq.QTensor):
        assert info.error.sum() <= info.error_unclipped.sum()
    else:
        assert np.all(info.error <= info.error_unclipped)
    for result, error in ((qt, info.error), (plain, info.error_unclipped)):
        exact = ((np.asarray(jaxq.dequantize(result), np.float64) - w) ** 2).sum()
        np.testing.assert_allclose(np.sum(error), exact, rtol=1e-4)


@pytest.mark.parametrize(
    "preset",
    tables.thinned(["int8", "uint4", "int4", "nf4", "nvfp4", "mxfp4"], ["uint4"]),
)
def test_one_range_is_plain_quantization(preset):
    assert_same(clip(W, preset, num=1)[0], jaxq.quantize(W, preset))
    assert_same(
        clip(W, preset, rule="percentile", percentile=100)[0], jaxq.quantize(W, preset)
    )


@pytest.mark.parametrize("spec", [UINT4, OFFSET], ids=["zero_point", "offset"])
def test_both_ends_shrink(spec):
    w = heavy_tailed(48, 6, seed=2, **TAILS) + np.float32(0.5)
    _, info = clip(w, spec, num=10, max_shrink=0.5)
    blocks = blocks_of(w, 16)
    low, high = blocks.min(1).T, blocks.max(1).T
    if spec is UINT4:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        np.testing.assert_allclose(info.low / info.high, low / high, rtol=1e-5)
    else:
        np.testing.assert_allclose(
            (info.low + info.high) / 2, (low + high) / 2, atol=1e-6
        )
    assert np.all(info.error <= info.error_unclipped)
    assert np.any(info.high < high)


def test_weights_of_channels():
    weight = np.ones(48, np.float32)
    assert_same(clip(W, INT4, channel_weight=4 * weight)[0], clip(W, INT4)[0])
    # A channel of weight 0 may saturate.
    w = W.copy()
    w[5] = 50
    weight[5] = 0
    qt, info = clip(w, INT4, channel_weight=weight)
    assert np.all(info.high[:, 0] < 25)
    assert np.all(np.asarray(qt.codes())[5] == 7)


def test_inputs_weigh_the_error_of_products():
    x = np.random.default_rng(3).standard_normal((40, 48)).astype(
        np.float32
    ) * np.linspace(0.1, 3, 48, dtype="f")
    qt, info = clip(W, INT4, x=x, num=20)
    delta = blocks_of(jaxq.dequantize(qt) - W, 16)  # [3, 16, 6]
    exact = np.mean(
        np.einsum("tgk,gko->tgo", x.reshape(40, 3, 16).astype(np.float64), delta) ** 2,
        axis=0,
    )
    np.testing.assert_allclose(info.error, exact.T, rtol=1e-4)
    assert np.all(info.error <= info.error_unclipped)
    # With orthogonal inputs, the error is the squared error of the weights.
    orthogonal = clip(
        W, INT4, x=np.eye(48, dtype=np.float32) * np.sqrt(np.float32(48))
    )[0]
    assert (
        np.mean(np.asarray(orthogonal.codes()) == np.asarray(clip(W, INT4)[0].codes()))
        > 0.99
    )


GRANULARITIES = {
    "tensor": (PerTensor(), 40, [((0, 40), (0, 6))]),
    "channel": (PerChannel(), 40, [((0, 40), (o, o + 1)) for o in range(6)]),
    "tiles": (
        PerBlock((16, 4), pad=True),
        40,
        [((k, k + 16), (o, o + 4)) for o in (0, 4) for k in (0, 16, 32)],
    ),
}


@pytest.mark.parametrize("tokens", [9, 100], ids=["few_tokens", "many_tokens"])
@pytest.mark.parametrize("kind", GRANULARITIES)
def test_error_of_products_in_every_shape_of_block(kind, tokens):
    granularity, k, parts = GRANULARITIES[kind]
    random = np.random.default_rng(4)
    x, delta = (
        random.standard_normal(shape).astype(np.float32)
        for shape in ((tokens, k), (k, 6))
    )
    geometry = jaxq.quantize(delta, QuantSpec("int8", granularity)).meta.geometry
    got = jax.jit(
        lambda delta, x: geometry.scale_from_blocks(
            block_output_error(delta, x, geometry)
        )
    )(delta, x)
    exact = []
    for (k0, k1), (o0, o1) in parts:
        exact.append(
            np.mean(
                (x[:, k0:k1].astype(np.float64) @ delta[k0:k1, o0:o1]) ** 2, axis=0
            ).sum()
        )
    np.testing.assert_allclose(np.ravel(got), exact, rtol=1e-4)


def test_flat_blocks_ignore_products_of_different_channels():
    x = np.abs(heavy_tailed(30, 48, seed=5, **TAILS))
    _, info = clip(W, QuantSpec("int4", PerFlat(20)), x=x, num=10)
    by_weight = clip(
        W, QuantSpec("int4", PerFlat(20)), channel_weight=np.mean(x**2, axis=0), num=10
    )[1]
    np.testing.assert_allclose(info.error, by_weight.error, rtol=1e-5)


@pytest.mark.parametrize("percentile", tables.thinned([60.0, 97.5], [97.5]))
def test_percentile(percentile):
    w = heavy_tailed(40, 6, seed=6, **TAILS)  # the last group of 16 has 8
    parts = [w[0:16], w[16:32], w[32:40]]
    info = clip(
        w,
        INT4.replace(granularity=PerGroup(16, pad=True)),
        rule="percentile",
        percentile=percentile,
    )[1]
    exact = np.stack(
        [np.percentile(abs(p), percentile, axis=0) for p in parts], axis=-1
    )
    np.testing.assert_allclose(info.high, exact, rtol=1e-5)
    info = clip(
        w,
        UINT4.replace(granularity=PerGroup(16, pad=True)),
        rule="percentile",
        percentile=percentile,
    )[1]
    for got, share in (
        (info.low, (100 - percentile) / 2),
        (info.high, 50 + percentile / 2),
    ):
        exact = np.stack([np.percentile(p, share, axis=0) for p in parts], axis=-1)
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-6)


def test_percentile_of_mostly_zeros_keeps_the_block():
    w = np.zeros((100, 2), np.float32)
    w[7] = 3
    # The percentile of the second channel is between 0 and its only number.
    w[7:17, 0] = np.arange(1, 11)
    assert_same(
        clip(w, "int8", rule="percentile", percentile=90)[0], jaxq.quantize(w, "int8")
    )


@pytest.mark.parametrize("name", tables.thinned(["int4", "uint4"], ["uint4"]))
def test_entropy_is_the_observers(name):
    w, symmetric = heavy_tailed(2048, 3, seed=7, **TAILS), name == "int4"
    spec = QuantSpec(name, PerChannel(), symmetric=symmetric)
    qt, info = clip(w, spec, rule="entropy", bins=64)
    exact = [
        oracle.entropy_threshold(w[:, o], 64, spec.fmt, symmetric) for o in range(3)
    ]
    np.testing.assert_array_equal(
        np.maximum(-info.low, info.high)[:, 0], np.float32(exact)
    )
    assert np.any(info.high[:, 0] < abs(w).max(0))
    larger, larger_info = clip(w * 16, spec, rule="entropy", bins=64)
    np.testing.assert_array_equal(larger_info.high, 16 * info.high)
    np.testing.assert_array_equal(larger.codes(), qt.codes())


def test_stacks_dtypes_and_jit():
    stack = heavy_tailed(2, 48, 6, seed=8, **TAILS)
    together, info = clip(stack, INT4, num=6)
    for i in range(2):
        alone, alone_info = clip(stack[i], INT4, num=6)
        np.testing.assert_array_equal(together[i].codes(), alone.codes())
        np.testing.assert_allclose(info.error[i], alone_info.error, rtol=1e-5)
    assert_same(
        jax.jit(lambda w: clip(w, INT4, num=6)[0])(stack[0]),
        clip(stack[0], INT4, num=6)[0],
    )
    narrow = jnp.asarray(W, jnp.bfloat16)
    qt = clip(narrow, INT4, num=6)[0]
    assert qt.dtype == jnp.bfloat16
    assert_same(clip(narrow, INT4, num=1)[0], jaxq.quantize(narrow, INT4))


def test_nan_stays_in_its_block():
    w = jnp.asarray(W).at[20, 2].set(jnp.nan)
    back = np.asarray(jax.jit(lambda w: jaxq.dequantize(clip(w, INT4, num=4)[0]))(w))
    assert np.isnan(back[16:32, 2]).all()
    assert np.isnan(back).sum() == 16
    with pytest.raises(ValueError, match="20, 2"):
        clip(w, INT4)


def test_zeros_and_dead_channels():
    w = W.copy()
    w[:, 1], w[3] = 0, 0
    qt, info = clip(w, INT4, x=np.zeros((5, 48), np.float32))
    # All inputs are 0, so no error counts and nothing is clipped.
    assert_same(qt, jaxq.quantize(w, INT4))
    assert np.all(np.isfinite(info.error))
    assert np.all(np.asarray(jaxq.dequantize(clip(w, INT4)[0]))[:, 1] == 0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rule": "best"}, "rule"),
        ({"x": np.ones((3, 47), np.float32)}, r"float32\[3,47\]"),
        ({"channel_weight": np.ones(6, np.float32)}, r"float32\[6\]"),
        (
            {
                "x": np.ones((3, 48), np.float32),
                "channel_weight": np.ones(48, np.float32),
            },
            "got both",
        ),
        (
            {"rule": "percentile", "x": np.ones((3, 48), np.float32)},
            "rule='percentile' has no such error",
        ),
        ({"x": np.ones((0, 48), np.float32)}, r"float32\[0,48\]"),
        ({"x": np.ones((3, 48), np.float32), "power": 2.4}, "squared"),
        ({"rule": "percentile", "percentile": 101}, "percentile must be 0 to 100"),
        ({"num": 0}, "num must be a whole number of at least 1"),
        (
            {"rule": "entropy", "bins": 4},
            "int4 has more levels than the histogram has bins, 4",
        ),
    ],
)
def test_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        clip(W, INT4, **arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"percentile": 50.0},
        {"rule": "percentile", "num": 3},
        {"rule": "entropy", "power": 3.0},
        {"bins": 64},
    ],
)
def test_options_of_another_rule_are_refused(options):
    with pytest.raises(ValueError, match="does not read it"):
        clip(np.ones((8, 4), np.float32), "int4", **options)
    with pytest.raises(ValueError, match="does not read it"):
        jaxq.Rule(weight="int4", method="clip", options=options)
