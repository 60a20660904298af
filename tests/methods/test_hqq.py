"""HQQ: against the published steps in numpy, and never worse for any kind of spec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerFlat, PerGroup, PerTensor, QuantSpec
from jaxq.methods._hqq import hqq
from tests import tables
from tests.arrays import heavy_tailed

SHAPE = (100, 12)
MINIMUM = QuantSpec("uint4", PerGroup(25), offset="min")
SPECS: dict[str, QuantSpec] = {
    name: jaxq.presets()[name]
    for name in (
        "int4",
        "int3",
        "uint4",
        "int8",
        "nf4",
        "mxfp4",
        "fp4_e2m1",
        "ternary",
        "ttq",
    )
} | {
    "minimum": MINIMUM,
    "minimum, quantized scales": MINIMUM.replace(
        scale=QuantSpec("float8_e4m3fn", PerTensor())
    ),
    "padded": MINIMUM.replace(granularity=PerGroup(32, pad=True), scale="float16"),
    "flat": QuantSpec("nf4", PerFlat(64)),
    "mean": QuantSpec("nf4", PerGroup(50), offset="mean"),
    "signed extreme": QuantSpec(
        "int4", PerGroup(50), scale="float16", scale_rule="signed_extreme"
    ),
}


def block_errors(w, qt) -> np.ndarray:
    geometry = qt.meta.geometry
    error = jnp.abs(jaxq.dequantize(qt, dtype=jnp.float32) - w)
    return np.asarray(
        geometry.to_blocks(geometry.pad(geometry.to_view(error))).sum(
            geometry.block_axes
        )
    )


def reference(w: np.ndarray, size: int, top: int, steps: int = 20) -> np.ndarray:
    """The published loop in float64, with errors in steps.

    Each group keeps its best offset.
    """
    out = np.empty_like(w, np.float64)
    for start in range(0, len(w), size):
        for column in range(w.shape[1]):
            x = w[start : start + size, column].astype(np.float64)
            scale, zero, beta = (
                (x.max() - x.min()) / top,
                -x.min() * top / (x.max() - x.min()),
                10.0,
            )
            best = None
            for _ in range(steps + 1):
                q = np.clip(np.rint(x / scale + zero), 0, top)
                d = x / scale - (q - zero)
                if best is None or np.abs(d).sum() < best[0] - 1e-6:
                    best = np.abs(d).sum(), (q - zero) * scale
                far = np.maximum(np.abs(d), 1e-9)
                e = np.sign(d) * np.maximum(far - far**-0.3 / beta, 0)
                zero, beta = np.mean(q - (x / scale - e)), beta * 1.01
            out[start : start + size, column] = best[1]
    return out


def test_equals_the_published_steps():
    w = heavy_tailed(*SHAPE)
    got, expected = (
        np.asarray(jaxq.dequantize(hqq(w, MINIMUM)[0])),
        reference(w, 25, 15),
    )
    step = np.repeat(
        (w.reshape(4, 25, -1).max(1) - w.reshape(4, 25, -1).min(1)) / 15, 25, axis=0
    )
    # Two offsets may be equally good to float32; everything else agrees.
    assert np.mean(np.abs(got - expected) < 1e-2 * step) > 0.95
    np.testing.assert_allclose(
        np.abs(got - w).mean(), np.abs(expected - w).mean(), rtol=1e-3
    )


@pytest.mark.parametrize(
    "name", tables.thinned(SPECS, ["minimum, quantized scales", "padded"])
)
def test_no_block_gets_worse(name):
    w, spec = heavy_tailed(*SHAPE, seed=1), SPECS[name]
    qt, info = hqq(w, spec)
    nearest = jaxq.quantize(w, spec, contracting=-2)
    assert jax.tree.structure(qt) == jax.tree.structure(nearest)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(qt)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(nearest)
    ]
    before, after = block_errors(w, nearest), block_errors(w, qt)
    assert np.all(after <= before * (1 + 1e-5) + 1e-7)
    np.testing.assert_allclose(info.error, after.sum() / w.size, rtol=1e-4)
    if name == "ttq":
        # At first it is rounded by a threshold, and its numbers are means already.
        return
    np.testing.assert_allclose(info.initial_error, before.sum() / w.size, rtol=1e-4)
    if spec.fmt.bits <= 4 and spec.scale != "float8_e8m0fnu":
        assert float(info.error) < 0.99 * float(info.initial_error)
        assert 0.2 < float(info.improved) <= 1


def test_powers_of_two_scale_the_result():
    w = heavy_tailed(*SHAPE, seed=2)
    values = np.asarray(jaxq.dequantize(hqq(w, "int4")[0]))
    np.testing.assert_array_equal(
        jaxq.dequantize(hqq(w * np.float32(2.0**20), "int4")[0]), values * 2.0**20
    )


def test_no_steps_round_to_nearest_and_zeros_stay():
    w = heavy_tailed(*SHAPE, seed=3)
    qt, info = hqq(w, "int4", num_steps=0)
    np.testing.assert_array_equal(qt.codes(), jaxq.quantize(w, "int4").codes())
    assert float(info.improved) == 0
    w[:, 2] = 0
    for spec in ("int4", MINIMUM):
        values = np.asarray(jaxq.dequantize(hqq(w, spec)[0]))
        assert np.isfinite(values).all()
        assert not values[:, 2].any()


def test_a_stack_and_a_nan():
    w = np.stack([heavy_tailed(*SHAPE), heavy_tailed(*SHAPE, seed=1)])
    qt, info = jax.jit(lambda w: hqq(w, "int4"))(w)
    assert (qt.batch_shape, info.error.shape) == ((2,), (2,))
    for i in range(2):
        np.testing.assert_allclose(
            jaxq.dequantize(qt[i]), jaxq.dequantize(hqq(w[i], "int4")[0]), atol=1e-6
        )
    w[0, 5, 7] = np.nan
    qt, _ = jax.jit(lambda w: hqq(w, "int4"))(w)
    lost = np.isnan(np.asarray(jaxq.dequantize(qt)))
    assert lost[0, :, 7].all()
    assert lost.sum() == SHAPE[0]
    with pytest.raises(ValueError, match=r"hqq: w\[0, 5, 7\] is nan"):
        hqq(w, "int4")


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        ("nf4_dq", {}, "scales of this spec are quantized themselves"),
        ("int4", {"norm": 1.0}, "norm must be above 0 and below 1"),
        ("int4", {"beta": 0.0}, "beta must be a positive number"),
        (QuantSpec("int4", rounding="stochastic"), {}, "methods round to nearest"),
    ],
)
def test_errors(spec, change, message):
    with pytest.raises(ValueError, match=f"hqq: {message}"):
        hqq(heavy_tailed(*SHAPE), spec, **change)
