"""GPTQ: against the paper's algorithm in numpy, for all kinds of formats."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerBlock, PerChannel, PerFlat, PerGroup, PerTensor, QuantSpec
from jaxq.methods._gptq import _region_sizes, gptq
from jaxq.qtensor import scale_values
from tests import tables

N, OUT = 96, 24


@functools.cache
def problem(seed: int = 0, n: int = N, out: int = OUT):
    """(w, inputs, hessian): inputs are correlated and differ in size."""
    random = np.random.default_rng(seed)
    mix = np.eye(n) + 0.5 * random.standard_normal((n, n)) / np.sqrt(n)
    x = (
        random.standard_normal((4 * n, n))
        @ mix
        * np.exp(0.5 * random.standard_normal(n))
    )
    w = random.standard_normal((n, out))
    return (
        w.astype(np.float32),
        x.astype(np.float32),
        (2 * x.T @ x / len(x)).astype(np.float32),
    )


def damped(hessian, damp=0.01) -> np.ndarray:
    h = np.asarray(hessian, np.float64)
    return h + damp * np.diag(h).mean() * np.eye(len(h))


def proxy(w, qt, hessian) -> float:
    d = np.asarray(w, np.float64) - np.asarray(jaxq.dequantize(qt), np.float64)
    return float(np.sum(d * (np.asarray(hessian, np.float64) @ d)))


# The paper's algorithm, column by column of W^T, in float64: the inverse, its Cholesky
# factor, and scales of groups from the current weights.


def grid_of(rows: np.ndarray, spec: QuantSpec):
    """The function that rounds a row `[out]` on the grid of `rows [size, out]`."""
    fmt = spec.fmt
    low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
    if not spec.symmetric:
        scale = (high - low) / (fmt.max - fmt.min)
        zero = np.clip(fmt.min - np.rint(low / scale), fmt.min, fmt.max)
        return lambda row: (
            (np.clip(np.rint(row / scale) + zero, fmt.min, fmt.max) - zero) * scale
        )
    scale = np.abs(rows).max(0) / fmt.max
    if fmt.kind == "integer":
        return lambda row: np.clip(np.rint(row / scale), -fmt.max, fmt.max) * scale
    values = fmt.values().astype(np.float64)
    return lambda row: (
        values[np.abs(row[:, None] / scale[:, None] - values).argmin(1)] * scale
    )


def reference(w, hessian, spec: QuantSpec, group: int, act_order=False) -> np.ndarray:
    w, h = w.astype(np.float64), damped(hessian)
    n = len(w)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(n)
    static = [grid_of(w[i : i + group], spec) for i in range(0, n, group)]
    w, h = w[order].copy(), h[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    q = np.zeros_like(w)
    for i in range(n):
        if not act_order and i % group == 0:
            static[i // group] = grid_of(w[i : i + group], spec)
        q[i] = static[order[i] // group](w[i])
        error = (w[i] - q[i]) / upper[i, i]
        w[i + 1 :] -= upper[i, i + 1 :, None] * error
    out = np.zeros_like(q)
    out[order] = q
    return out


REFERENCES = {
    "int4 groups of 32": (QuantSpec("int4", PerGroup(32)), 32, False),
    "int4 groups of 24": (QuantSpec("int4", PerGroup(24)), 24, False),
    "int4 groups of 5, padded": (QuantSpec("int4", PerGroup(5, pad=True)), 5, False),
    "uint4 asymmetric": (QuantSpec("uint4", PerGroup(32), symmetric=False), 32, False),
    "int3 channels": (QuantSpec("int3", PerChannel()), N, False),
    "nf4 groups of 48": (QuantSpec("nf4", PerGroup(48)), 48, False),
    "act order, groups": (QuantSpec("int4", PerGroup(32)), 32, True),
    "act order, channels": (QuantSpec("uint4", PerChannel(), symmetric=False), N, True),
}


@pytest.mark.parametrize(
    "name",
    tables.thinned(
        REFERENCES,
        [
            "int4 groups of 5, padded",
            "uint4 asymmetric",
            "nf4 groups of 48",
            "act order, groups",
        ],
    ),
)
def test_equals_the_papers_algorithm(name):
    spec, group, act_order = REFERENCES[name]
    w, _, hessian = problem()
    expected = reference(w, hessian, spec, group, act_order)
    qt, info = gptq(w, hessian, spec, act_order=act_order)
    np.testing.assert_allclose(jaxq.dequantize(qt), expected, rtol=1e-4, atol=1e-4)
    assert not info.fell_back
    assert info.damp == np.float32(0.01)


def test_nearest_is_not_best():
    # Computed by hand: the nearest codes [0, 0] cost 0.608, and [0, 1] cost 0.088.
    hessian = np.float32([[1, 0.9], [0.9, 1]])
    w = np.float32([[0.4, 7], [0.4, 7]])
    qt, info = gptq(w, hessian, QuantSpec("int4", PerTensor()), damp=0.0)
    assert qt.codes()[:, 0].tolist() == [0, 1]
    assert float(info.loss) == pytest.approx(0.088, rel=1e-4)


# Invariants.

KINDS = (
    "int4",
    "uint4",
    "int8",
    "nf4",
    "nf4_dq",
    "fp8",
    "mxfp4",
    "nvfp4",
    "vsq4",
    "int3",
    "ternary",
    "log4",
    "binary",
)
SPECS: dict[str, QuantSpec] = {name: jaxq.presets()[name] for name in KINDS} | {
    "flat": QuantSpec("nf4", PerFlat(64)),
    "tiles": QuantSpec("int4", PerBlock((32, 8))),
    "tensor": QuantSpec("int8", PerTensor()),
    "minimum": QuantSpec("uint4", PerGroup(32), offset="min", scale="float16"),
    "mean": QuantSpec("nf4", PerGroup(32), offset="mean"),
    "signed extreme": QuantSpec(
        "int4", PerGroup(32), scale="float16", scale_rule="signed_extreme"
    ),
}
over_specs = pytest.mark.parametrize(
    "name", tables.thinned(SPECS, ["nf4_dq", "mxfp4", "ternary", "mean"])
)


@over_specs
def test_loss_geometry_and_gain_of_every_kind(name):
    spec = SPECS[name]
    w, _, hessian = problem(1)
    qt, info = gptq(w, hessian, spec)
    nearest = jaxq.quantize(w, spec, contracting=-2)
    assert jax.tree.structure(qt) == jax.tree.structure(nearest)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(qt)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(nearest)
    ]
    # sum e^2 = tr((W - Q)^T H (W - Q)), where Q is the dequantized result.
    np.testing.assert_allclose(info.loss, proxy(w, qt, damped(hessian)), rtol=2e-4)
    assert proxy(w, qt, hessian) < 0.95 * proxy(w, nearest, hessian)


@over_specs
def test_a_diagonal_hessian_rounds_to_nearest(name):
    w, _, _ = problem(2)
    diagonal = np.random.default_rng(0).uniform(0.1, 10, N).astype(np.float32)
    qt, _ = gptq(w, np.diag(diagonal), SPECS[name])
    nearest = jaxq.quantize(w, SPECS[name], contracting=-2)
    np.testing.assert_array_equal(qt.codes(), nearest.codes())
    np.testing.assert_array_equal(scale_values(qt), scale_values(nearest))


@pytest.mark.parametrize("act_order", tables.thinned([False, True], [False]))
def test_block_size_does_not_matter(act_order):
    w, _, hessian = problem(3)
    spec = QuantSpec("int4", PerGroup(32))
    first, first_info = gptq(w, hessian, spec, block_size=128, act_order=act_order)
    for block_size in (1, 32):
        qt, info = gptq(w, hessian, spec, block_size=block_size, act_order=act_order)
        np.testing.assert_allclose(info.loss, first_info.loss, rtol=1e-3)
        same_codes = np.asarray(qt.codes()) == np.asarray(first.codes())
        assert np.mean(same_codes) > 0.998


def test_many_rows_are_processed_in_spans():
    # More than 512 rows are processed in spans. Each updates exactly the rows after it.
    w, _, hessian = problem(4, 520, 4)
    spec = QuantSpec("int4", PerGroup(40))
    qt, info = gptq(w, hessian, spec, block_size=16)
    np.testing.assert_allclose(info.loss, proxy(w, qt, damped(hessian)), rtol=2e-4)
    expected = reference(w, hessian, spec, 40)
    assert np.mean(np.abs(np.asarray(jaxq.dequantize(qt)) - expected) < 1e-3) > 0.99


@pytest.mark.parametrize(
    "group", [None, 1, 3, 5, 16, 24, 31, 64, 100, 128, 251, 300, 1000, 1024, 4096]
)
def test_regions_divide_each_other(group):
    for block_size in (1, 7, 16, 100, 128):
        for n in (1, 40, 4096, 14336):
            if group and group >= n:
                continue
            sizes = _region_sizes(n, group, block_size)
            assert all(b % a == 0 and a < b for a, b in itertools.pairwise(sizes))
            assert group is None or group in sizes
            assert sizes[-1] <= max(n, group or 1, min(16, block_size))


def test_multiples_of_the_hessian_and_powers_of_two_of_the_weight():
    w, _, hessian = problem()
    spec = REFERENCES["int4 groups of 32"][0]
    qt, info = gptq(w, hessian, spec)
    for factor in (2.0**-40, 2.0**60):
        scaled, scaled_info = gptq(w, hessian * np.float32(factor), spec)
        np.testing.assert_array_equal(scaled.codes(), qt.codes())
        np.testing.assert_allclose(scaled_info.loss, info.loss * factor, rtol=1e-5)
    scaled, _ = gptq(w * np.float32(2.0**-20), hessian, spec)
    np.testing.assert_array_equal(scaled.codes(), qt.codes())


def test_held_out_inputs_gain_too():
    w, x, _ = problem(5)
    hessian = x[: 3 * N].T @ x[: 3 * N]
    held_out_hessian = x[3 * N :].T @ x[3 * N :]
    spec = REFERENCES["int4 groups of 32"][0]
    rounding_loss = proxy(w, jaxq.quantize(w, spec), held_out_hessian)
    for act_order in (False, True):
        qt, _ = gptq(w, hessian, spec, act_order=act_order)
        assert proxy(w, qt, held_out_hessian) < 0.95 * rounding_loss


# Hard hessians.


def test_dead_inputs_are_rounded_to_nearest_and_change_no_other_row():
    w, _, hessian = problem()
    spec = REFERENCES["int3 channels"][0]
    dead = np.array([3, 40, N - 1])
    hessian = hessian.copy()
    hessian[dead], hessian[:, dead] = 0, 0
    for act_order in (False, True):
        qt, info = gptq(w, hessian, spec, act_order=act_order)
        assert int(info.num_dead) == 3
        assert not info.fell_back
        codes, nearest = (
            np.asarray(qt.codes()),
            np.asarray(jaxq.quantize(w, spec).codes()),
        )
        np.testing.assert_array_equal(codes[dead], nearest[dead])
        live = np.setdiff1d(np.arange(N), dead)
        halved_qt, _ = gptq(
            np.where(np.isin(np.arange(N), dead)[:, None], w / 2, w),
            hessian,
            spec,
            act_order=act_order,
        )
        np.testing.assert_array_equal(np.asarray(halved_qt.codes())[live], codes[live])


def test_damping_rises_until_the_hessian_is_positive_definite():
    w, x, _ = problem()
    few = x[:8].T @ x[:8]  # rank 8 of 96
    qt, info = gptq(w, few, "int4")
    assert not info.fell_back
    assert proxy(w, qt, few) < 0.5 * proxy(w, jaxq.quantize(w, "int4"), few)
    slanted = few - 0.05 * np.trace(few) / N * np.eye(N, dtype=np.float32)
    qt, info = gptq(w, slanted, "int4")
    assert not info.fell_back
    assert float(info.damp) == pytest.approx(0.1)
    _, info = gptq(w, slanted, "int4", damp=0.0)
    assert float(info.damp) == pytest.approx(0.1)


inside_jit = jax.jit(functools.partial(gptq, spec="int4"))


@pytest.mark.parametrize("kind", ["negative", "nan", "infinite", "huge"])
def test_an_unusable_hessian_rounds_to_nearest_and_is_reported(kind):
    w, _, hessian = problem()
    with np.errstate(over="ignore"):
        bad = {"negative": -hessian, "huge": hessian * np.float32(1e38)}.get(
            kind, hessian.copy()
        )
    if kind in ("nan", "infinite"):
        bad[5, 7] = bad[7, 5] = {"nan": np.nan, "infinite": np.inf}[kind]
        with pytest.raises(
            ValueError, match=r"gptq: hessian\[5, 7\] is (nan|inf), one of 2 non-finite"
        ):
            gptq(w, bad, "int4")
    qt, info = inside_jit(w, bad)
    assert bool(info.fell_back)
    assert np.isnan(info.loss)
    np.testing.assert_array_equal(qt.codes(), jaxq.quantize(w, "int4").codes())


def test_zeros_everywhere():
    w, _, hessian = problem()
    qt, info = gptq(np.zeros_like(w), hessian, "int4")
    assert not np.any(np.asarray(jaxq.dequantize(qt)))
    assert float(info.loss) == 0
    qt, info = gptq(w, np.zeros_like(hessian), "int4")
    assert int(info.num_dead) == N
    np.testing.assert_array_equal(qt.codes(), jaxq.quantize(w, "int4").codes())


def test_a_nan_weight():
    w, _, hessian = problem()
    w = w.copy()
    w[40, 3] = np.nan
    with pytest.raises(ValueError, match=r"gptq: layers/0\[40, 3\] is nan"):
        gptq(w, hessian, "int4", name="layers/0")
    spec = REFERENCES["int4 groups of 32"][0]
    qt, _ = jax.jit(lambda w: gptq(w, hessian, spec))(w)
    lost = np.isnan(np.asarray(jaxq.dequantize(qt)))
    assert lost[32:64, 3].all()
    assert lost.sum() == 32


# Shapes, dtypes, stacks.


def test_a_stack_is_its_matrices():
    ws, hs = (np.stack([problem(seed)[i] for seed in (0, 1, 2)]) for i in (0, 2))
    ws[1, 0] = 0
    hs[2] = -hs[2]  # one that falls back
    spec = REFERENCES["int4 groups of 32"][0]
    qt, info = gptq(ws, hs, spec)
    assert qt.batch_shape == (3,)
    assert info.fell_back.tolist() == [False, False, True]
    for i in range(3):
        matrix_qt, _ = gptq(ws[i], hs[i], spec)
        assert (
            np.mean(np.asarray(qt[i].codes()) == np.asarray(matrix_qt.codes())) > 0.998
        )
    shared, info = gptq(ws[:, None], hs[0], spec)
    assert (shared.shape, info.loss.shape) == ((3, 1, N, OUT), (3, 1))
    assert (
        np.mean(np.asarray(shared[0, 0].codes()) == np.asarray(qt[0].codes())) > 0.998
    )


def test_narrow_dtypes_and_odd_shapes():
    for shape, dtype in (((50, 3), jnp.bfloat16), ((1, 1), jnp.float16)):
        w, _, hessian = problem(0, *shape)
        qt, info = gptq(
            jnp.asarray(w, dtype), jnp.asarray(hessian, jnp.bfloat16), "int4"
        )
        assert (qt.shape, qt.dtype) == (shape, dtype)
        assert np.isfinite(info.loss)


def test_one_trace_for_one_shape():
    w, _, hessian = problem()
    spec = REFERENCES["int4 groups of 32"][0]
    count = 0

    @jax.jit
    def run(w, h):
        nonlocal count
        count += 1
        return gptq(w, h, spec)

    eager, _ = gptq(w, hessian, spec)
    for _ in range(2):
        jitted, _ = run(w, hessian)
    np.testing.assert_array_equal(eager.codes(), jitted.codes())
    assert count == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hessian": np.ones((4, 5), np.float32)},
            ValueError,
            r"hessian must be second moments.*: \[96,96\]; got",
        ),
        (
            {"hessian": np.ones((2, N, N), np.float32)},
            ValueError,
            r"got float32\[2,96,96\] \(w: float32\[96,24\]\)",
        ),
        ({"hessian": np.ones((N, N), int)}, TypeError, r"hessian must be floats"),
        (
            {"w": np.ones(N, np.float32)},
            ValueError,
            r"w must be a matrix \[in, out\].*got float32\[96\]",
        ),
        (
            {"w": np.ones((N, OUT), int)},
            TypeError,
            r"w must be float32, bfloat16 or float16, got int64\[96, 24\]",
        ),
        (
            {"spec": QuantSpec("int4", rounding="stochastic")},
            ValueError,
            "gptq: methods round to nearest, so rounding='stochastic' is not possible",
        ),
        ({"spec": "int5"}, ValueError, "gptq: unknown preset 'int5'"),
        ({"damp": 2.0}, ValueError, "damp must be a share"),
        (
            {"block_size": 0},
            ValueError,
            "block_size must be a whole number of at least 1",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    w, _, hessian = problem()
    arguments = {"w": w, "hessian": hessian, "spec": "int4"} | change
    with pytest.raises(error, match=message):
        gptq(
            arguments.pop("w"),
            arguments.pop("hessian"),
            arguments.pop("spec"),
            **arguments,
        )


def test_a_hessian_outside_of_the_jitted_function():
    w, hessian = (
        np.eye(16, dtype=np.float32),
        jnp.asarray(np.eye(16, dtype=np.float32) * 2),
    )
    inside = jax.jit(lambda w: gptq(w, hessian, "int4")[0])(w)
    np.testing.assert_array_equal(inside.codes(), gptq(w, hessian, "int4")[0].codes())
    assert jax.jit(lambda: jaxq.quantize(hessian, "int8"))().shape == (16, 16)
