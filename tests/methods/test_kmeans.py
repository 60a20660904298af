"""k-means: against Lloyd's algorithm in numpy, and its tables in products and files."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq import PerBlock, PerChannel, PerFlat, PerGroup, PerTensor
from jaxq.methods._kmeans import centroid_gradient, kmeans
from tests import tables
from tests.arrays import heavy_tailed

SHAPE = (60, 12)


def lloyd(x: np.ndarray, centres: np.ndarray, steps: int) -> np.ndarray:
    """Plain Lloyd of a row of numbers, float64."""
    x, centres = x.astype(np.float64), centres.astype(np.float64)
    for _ in range(steps):
        member = np.abs(x[:, None] - centres).argmin(1)
        centres = np.array(
            [
                x[member == k].mean() if (member == k).any() else c
                for k, c in enumerate(centres)
            ]
        )
    return centres


def inertia(w, qt) -> float:
    return float(np.sum((np.asarray(jaxq.dequantize(qt), np.float64) - w) ** 2))


@jax.jit
def by_autodiff(grad, qt):
    """The gradient of the codebook by `jax.grad`."""
    return jax.grad(
        lambda c: jnp.sum(jaxq.dequantize(dataclasses.replace(qt, codebook=c)) * grad)
    )(qt.codebook)


def test_the_papers_example():
    # Han et al., 2016, figure 3: 16 weights, 2 bits.
    w = np.float32(
        [
            [2.09, -0.98, 1.48, 0.09],
            [0.05, -0.14, -1.08, 2.12],
            [-0.91, 1.92, 0, -1.03],
            [1.87, 0, 1.53, 1.49],
        ]
    )
    grad = (
        np.float32([[-3, -3, 3, -2], [-1, 1, -2, 12], [-1, 2, 4, 4], [1, 7, -2, 2]])
        / 100
    )
    qt, info = kmeans(w, 2)
    np.testing.assert_allclose(qt.codebook.ravel(), [-1, 0, 1.5, 2], atol=5e-7)
    assert qt.codes().tolist() == [
        [3, 0, 2, 1],
        [1, 1, 0, 3],
        [0, 3, 1, 0],
        [3, 1, 2, 2],
    ]
    assert qt.data.nbytes == 4
    sums = centroid_gradient(grad, qt).ravel()
    members = [grad[np.asarray(qt.codes()) == k].sum() for k in range(4)]
    np.testing.assert_allclose(sums, members, atol=1e-7)
    tuned = dataclasses.replace(qt, codebook=qt.codebook - centroid_gradient(grad, qt))
    np.testing.assert_allclose(jaxq.dequantize(tuned)[0, 0], 2 - members[3], rtol=1e-6)
    assert int(info.num_empty) == 0


@pytest.mark.parametrize("steps", tables.thinned([0, 1, 3], [0, 3]))
def test_the_first_steps_equal_lloyd(steps):
    # Evenly spread numbers leave no centre empty, so no centre moves before the end.
    w = np.random.default_rng(0).uniform(-1, 1, (400, 4)).astype(np.float32)
    qt, info = kmeans(w, 3, granularity=PerChannel(), num_steps=steps)
    for j in range(w.shape[1]):
        column = w[:, j]
        expected = lloyd(column, np.linspace(column.min(), column.max(), 8), steps)
        np.testing.assert_allclose(qt.codebook[j, 0], expected, rtol=1e-4, atol=1e-6)
        codes = np.abs(column[:, None] - np.asarray(qt.codebook[j, 0])).argmin(1)
        np.testing.assert_array_equal(qt.codes()[:, j], codes)
    assert int(info.num_steps) <= steps
    np.testing.assert_allclose(info.inertia, inertia(w, qt), rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["exact", "histogram"])
def test_inertia_never_rises(algorithm):
    w = heavy_tailed(*SHAPE, seed=1)
    inertias = [
        float(kmeans(w, 4, num_steps=n, algorithm=algorithm)[1].inertia)
        for n in (0, 2, 20)
    ]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(inertias))
    assert inertias[-1] < 0.7 * inertias[0]


@pytest.mark.parametrize("init", tables.thinned(["linear", "density"], ["density"]))
def test_a_histogram_is_as_good_as_all_numbers(init):
    w = heavy_tailed(*SHAPE, seed=2)
    exact, histogram = (
        kmeans(w, 4, init=init, algorithm=a, num_steps=300)[1]
        for a in ("exact", "histogram")
    )
    np.testing.assert_allclose(histogram.inertia, exact.inertia, rtol=2e-3)


def least_error(x: np.ndarray, size: int) -> float:
    """The least squared error of `size` centres, by dynamic programming in float64."""
    numbers, counts = np.unique(x.astype(np.float64), return_counts=True)
    count, total, square = (
        np.concatenate([[0], np.cumsum(counts * numbers**power)]) for power in range(3)
    )
    m, n = numbers.size, np.subtract.outer(count, count).T
    sums = np.subtract.outer(total, total).T
    squares = np.subtract.outer(square, square).T
    # error[i, j]: the error of one centre for the numbers i to j - 1.
    error = np.maximum(squares - sums**2 / np.maximum(n, 1), 0)
    error[np.tril_indices(m + 1, -1)] = np.inf
    least = error[0]
    for _ in range(size - 1):
        least = np.min(least[:, None] + error, axis=0)
    return float(least[-1])


def hard_columns() -> dict[str, np.ndarray]:
    rng, n = np.random.default_rng(0), 400
    normal = rng.standard_normal(n)
    return {
        "normal": normal,
        "one outlier": np.where(np.arange(n) == 7, 1000, normal),
        "two outliers": np.concatenate([[30, -1000], normal[2:]]),
        "heavy tails": rng.standard_t(2, n),
        "Cauchy": rng.standard_cauchy(n),
        "log-normal": np.exp(2 * normal),
        "far from zero": 100 + rng.uniform(size=n),
        "mostly zeros": np.where(rng.uniform(size=n) < 0.9, 0, normal),
        "two widths": normal * np.where(np.arange(n) < n // 2, 1e-3, 10),
    }


ERRORS = [(2, "linear"), (4, "density"), (2, "density"), (4, "linear")]


@pytest.mark.parametrize(("bits", "init"), tables.thinned(ERRORS, ERRORS[:2]))
def test_the_error_is_near_the_least_possible(bits, init):
    columns = hard_columns()
    w = np.stack(list(columns.values()), axis=1).astype(np.float32)
    qt, info = kmeans(w, bits, granularity=PerChannel(), init=init)
    errors = np.sum((np.asarray(jaxq.dequantize(qt), np.float64) - w) ** 2, axis=0)
    for name, column, error in zip(columns, w.T, errors, strict=True):
        assert error <= 1.25 * least_error(column, 2**bits), name
    assert int(info.num_empty) == 0


FEW = [(4, "exact"), (4, "histogram"), (8, "exact"), (8, "histogram")]


@pytest.mark.parametrize(("bits", "algorithm"), tables.thinned(FEW, [FEW[0], FEW[3]]))
def test_few_different_numbers_come_back_exactly(bits, algorithm):
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.standard_normal(2**bits - 2), [60, 0]])
    w = np.stack([rng.choice(numbers[: n + 2], 2000) for n in (0, 5, 2**bits)], 1)
    w = w.astype(np.float32)
    qt, info = kmeans(w, bits, granularity=PerChannel(), algorithm=algorithm)
    num_numbers = [np.unique(column).size for column in w.T]
    is_exact = np.asarray(jaxq.dequantize(qt)) == w
    if algorithm == "histogram":  # a bin may have two numbers
        is_exact = is_exact[:, :2]
    assert is_exact.all()
    if algorithm == "exact":
        assert int(info.num_empty) == 3 * 2**bits - sum(num_numbers)
    if (algorithm, bits) == ("exact", 4):
        stacked, _ = kmeans(w[None, :, :2], bits, granularity=PerChannel())
        np.testing.assert_array_equal(jaxq.dequantize(stacked)[0], w[:, :2])


def test_the_report_counts_unused_entries():
    model = nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel.set_value(jnp.sign(model.kernel.get_value()))
    recipe = jaxq.Recipe([jaxq.Rule("*", weight="int4", method="kmeans")])
    _, report = jaxq.quantize_model(model, recipe)
    assert "224 of 256 table entries unused" in report.rows[0].note
    assert report.rows[0].sqnr == np.inf


GRANULARITIES = {
    "tensor": (4, PerTensor()),
    "channel": (3, PerChannel()),
    "group": (2, PerGroup(16, pad=True)),
    "flat": (1, PerFlat(100)),
    "tiles": (2, PerBlock((20, 6))),
    "tensor, 8 bits": (8, PerTensor()),
    "tensor, 5 bits": (5, PerTensor()),
}


@pytest.mark.parametrize(
    "name", tables.thinned(GRANULARITIES, list(GRANULARITIES)[:3:2])
)
def test_every_granularity_works_in_products_files_and_gradients(name, tmp_path):
    bits, granularity = GRANULARITIES[name]
    w = heavy_tailed(*SHAPE, seed=3)
    qt, _ = kmeans(w, bits, granularity=granularity)
    geometry = qt.meta.geometry
    assert qt.codebook.shape == (*geometry.num_blocks, 2**bits)
    assert np.all(np.diff(np.asarray(qt.codebook), axis=-1) >= 0)
    values = np.asarray(jaxq.dequantize(qt))
    assert np.isin(values, np.asarray(qt.codebook)).all()
    # Every weight has the nearest number of its own block.

    @jax.jit
    def in_blocks(w, distance, codebook):
        w, distance = (
            geometry.to_blocks(geometry.pad(geometry.to_view(v))) for v in (w, distance)
        )
        return w, distance, geometry.scale_to_blocks(jnp.moveaxis(codebook, -1, 0))

    blocks, distance, tables_ = map(
        np.asarray, in_blocks(w, np.abs(values - w), qt.codebook)
    )
    least = np.abs(blocks[None] - tables_).min(0)
    np.testing.assert_allclose(distance, np.where(distance == 0, 0, least), atol=1e-7)
    # Products, files, gradients.
    x = np.random.default_rng(0).standard_normal((3, SHAPE[0])).astype(np.float32)
    np.testing.assert_allclose(jax.jit(jaxq.matmul)(x, qt), x @ values, atol=1e-5)
    jaxq.save(tmp_path / "w.safetensors", {"w": qt})
    back = jaxq.load(tmp_path / "w.safetensors")["w"]
    assert jax.tree.structure(back) == jax.tree.structure(qt)
    jax.tree.map(np.testing.assert_array_equal, back, qt)
    grad = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    np.testing.assert_allclose(
        centroid_gradient(grad, qt), by_autodiff(grad, qt), atol=1e-4
    )


def test_tables_go_with_a_model(tmp_path):
    def make(seed):
        return nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(seed))

    recipe = jaxq.Recipe(
        [jaxq.Rule("*", weight="int4", method="kmeans", options={"num_steps": 2})]
    )
    model, report = jaxq.quantize_model(make(0), recipe)
    qt = model.kernel.get_value()
    assert "kmeans4[32x16]" in repr(qt)
    (row,) = report.rows
    assert (row.format, row.method, row.bytes_after) == ("kmeans4", "kmeans", qt.nbytes)
    assert qt.bits_per_element == 4 + (16 * 16 + 16) * 32 / (
        32 * 16
    )  # tables and scales included
    jaxq.save(tmp_path / "model.safetensors", model)
    back = jaxq.load(tmp_path / "model.safetensors", into=make(1)).kernel.get_value()
    assert jax.tree.structure(back) == jax.tree.structure(qt)
    jax.tree.map(np.testing.assert_array_equal, back, qt)
    # The format is not registered. It is restored from its description.
    assert "kmeans4" not in jaxq.formats.names()
    assert (
        jaxq.QuantSpec.from_dict(json.loads(json.dumps(qt.spec.to_dict()))) == qt.spec
    )


def test_the_gradient_of_a_trained_ternary():
    w = heavy_tailed(*SHAPE, seed=4)
    qt = jaxq.quantize(w, "ttq")
    np.testing.assert_allclose(
        centroid_gradient(w, qt), by_autodiff(w, qt), rtol=1e-4, atol=1e-6
    )


def test_a_stack_is_its_matrices():
    w = np.stack([heavy_tailed(*SHAPE), heavy_tailed(*SHAPE, seed=1)])
    w[1, :, 0] = 0
    qt, info = kmeans(w, 3, granularity=PerChannel())
    assert (qt.batch_shape, info.inertia.shape) == ((2,), (2,))
    for i in range(2):
        single, _ = kmeans(w[i], 3, granularity=PerChannel())
        np.testing.assert_allclose(qt.codebook[i], single.codebook, atol=1e-6)
    grad = heavy_tailed(*w.shape, seed=2)
    np.testing.assert_allclose(
        centroid_gradient(grad, qt)[1], centroid_gradient(grad[1], qt[1]), atol=1e-6
    )


def test_scale_of_the_weights_does_not_matter():
    w = heavy_tailed(*SHAPE)
    qt, _ = kmeans(w, 4, algorithm="exact")
    for exponent in (-100, 100):
        scaled, _ = kmeans(w * np.float32(2.0**exponent), 4, algorithm="exact")
        np.testing.assert_array_equal(scaled.codes(), qt.codes())
        np.testing.assert_array_equal(
            scaled.codebook, qt.codebook * np.float32(2.0**exponent)
        )


def test_hard_weights():
    zeros, info = kmeans(np.zeros(SHAPE, np.float32), 4, algorithm="exact")
    assert not np.any(jaxq.dequantize(zeros))
    assert float(info.inertia) == 0
    few = np.float32([[1, 1, 5], [5, 1, 1]])  # fewer numbers than centres: exact
    qt, info = kmeans(few, 4)
    np.testing.assert_array_equal(jaxq.dequantize(qt), few)
    assert int(info.num_empty) == 14
    half, _ = kmeans(jnp.asarray(heavy_tailed(*SHAPE), jnp.bfloat16), 4)
    assert half.dtype == jnp.bfloat16
    w = heavy_tailed(*SHAPE)
    w[7, 3] = np.nan
    with pytest.raises(ValueError, match=r"kmeans: w\[7, 3\] is nan"):
        kmeans(w, 4)
    qt, _ = jax.jit(lambda w: kmeans(w, 3, granularity=PerChannel()))(w)
    lost = np.isnan(np.asarray(jaxq.dequantize(qt)))
    assert lost[:, 3].all()
    assert lost.sum() == SHAPE[0]


def test_errors():
    w = heavy_tailed(*SHAPE)
    for change, message in (
        ({"bits": 9}, "bits must be"),
        ({"init": "random"}, "init"),
        ({"num_steps": -1}, "num_st"),
    ):
        with pytest.raises(ValueError, match=f"kmeans: {message}"):
            kmeans(w, **({"bits": 4} | change))
    with pytest.raises(ValueError, match="algorithm"):
        kmeans(w, 4, algorithm="fast")
    with pytest.raises(TypeError, match="qt must be a QTensor with a codebook"):
        centroid_gradient(w, jaxq.quantize(w, "int4"))
    with pytest.raises(ValueError, match=r"grad_w must be floats of shape \[60, 12\]"):
        centroid_gradient(w[1:], kmeans(w, 4)[0])


@pytest.mark.parametrize("algorithm", ["exact", "histogram"])
def test_means_of_few_numbers_after_many(algorithm):
    """A mean of four numbers is exact, although 65536 zeros come before them."""
    rare = np.float32([1.0, 0.49, 0.51, 0.51])
    w = np.concatenate([rare, np.zeros(2**16, np.float32)])[:, None]
    qt, _ = jaxq.methods.kmeans(w, 2, algorithm=algorithm)
    centres = np.linspace(0.0, 1.0, 4)
    for _ in range(8):  # Lloyd's in float64
        nearest = np.abs(w[:, 0].astype(np.float64)[:, None] - centres).argmin(1)
        centres = np.array(
            [
                w[nearest == k, 0].astype(np.float64).mean()
                if (nearest == k).any()
                else c
                for k, c in enumerate(centres)
            ]
        )
    np.testing.assert_allclose(
        np.asarray(qt.codebook).ravel(), centres, rtol=1e-6, atol=1e-6
    )
    # A float32 sum of many numbers of one sign loses the last digits.
    numbers = np.random.default_rng(0).standard_normal(w.shape)
    w = np.abs(numbers).astype(np.float32) + 1
    qt, _ = jaxq.methods.kmeans(w, 2, algorithm=algorithm)
    codes, table = np.asarray(qt.codes())[:, 0], np.asarray(qt.codebook).ravel()
    means = [w[codes == k, 0].astype(np.float64).mean() for k in range(4)]
    np.testing.assert_allclose(table, means, rtol=2e-6)
