"""Calibration of nnx models: statistics, padding, order, errors.

The reference for the statistics is numpy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq.nn import calibrate
from tests.arrays import normal


class Block(nnx.Module):
    """[b, t, 8] -> [b, t, 8]. The layers are called in another order than declared."""

    def __init__(self, rngs):
        self.last = nnx.Einsum("bth,hd->btd", (8, 8), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.heads = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.out(self.heads(x))))


@pytest.fixture(scope="module")
def block():
    return Block(nnx.Rngs(0))


@pytest.fixture(scope="module")
def batches():
    return [normal(8, 3, 8, seed=seed) * (seed + 1) for seed in range(3)]


def split(batches):
    """The rows that enter the statistics, and those that are held out.

    Of short sequences, one in eight is held out, another one in each call.
    """
    held = [np.arange(8) == 7 - i for i in range(len(batches))]
    train = [
        np.asarray(b)[~h].reshape(-1, 8) for b, h in zip(batches, held, strict=True)
    ]
    return np.concatenate(train), np.concatenate(
        [np.asarray(b)[h][0] for b, h in zip(batches, held, strict=True)]
    )


@pytest.fixture(scope="module")
def stats(block, batches):
    return calibrate(block, batches)


def test_statistics_equal_numpy(stats, batches):
    rows = split(batches)[0].astype(np.float64)
    found = stats["heads"]
    assert float(found.count) == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.absmean, abs(rows).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(found.low, rows.min(0).astype(np.float32))
    np.testing.assert_array_equal(found.absmax, abs(rows).max(0).astype(np.float32))
    np.testing.assert_allclose(
        found.hessian, 2 * rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4
    )


def test_samples_and_held_out_rows_are_rows_of_the_data(stats, batches):
    found = stats["heads"]
    train, held = ({row.tobytes() for row in rows} for rows in split(batches))
    for rows, count, source in (
        (found.samples, found.num_samples, train),
        (found.held_out, found.num_held_out, held),
    ):
        taken = [row.tobytes() for row in np.asarray(rows)[: int(count)]]
        assert len(taken) == len(set(taken)) == min(len(source), len(rows))
        assert set(taken) <= source
        assert not np.asarray(rows)[int(count) :].any()


def test_layers_are_in_the_order_of_the_forward_pass(stats):
    assert list(stats) == ["heads", "out", "last"]
    assert stats["out"].mean.shape == (8,)  # two heads of four


def test_the_model_does_not_change(block, batches):
    before = jax.tree.map(np.asarray, nnx.state(block))
    calibrate(block, batches[:1])
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(np.asarray, nnx.state(block)),
        before,
    )
    assert (
        block.heads.dot_general is None
        or block.heads.dot_general is jax.lax.dot_general
    )


def test_masked_rows_do_not_count(block, batches):
    x = batches[0]
    mask = np.arange(3) < np.array([3, 1, 2, 3, 0, 2, 1, 3])[:, None]
    padded = np.where(mask[..., None], x, np.float32(1e6))
    found = calibrate(block, [padded], mask=lambda batch: mask, layers=["heads"])[
        "heads"
    ]
    rows = np.asarray(x)[:7][mask[:7]]
    assert float(found.count) == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    assert float(found.absmax.max()) < 100


def test_statistics_do_not_depend_on_the_batch_size(block):
    """The last row of eight is held out, in one call or one by one."""
    rows, update = np.asarray(normal(16, 8)), jax.jit(jaxq.observers.update_stats)
    one = jaxq.observers.empty_stats(8)
    true, parts = np.ones(16, bool), np.arange(16, dtype=np.int32)
    whole = update(one, rows, true, parts)
    for row in rows:
        one = update(one, row[None], true[:1], parts[:1])
    for field in ("count", "mean", "absmean", "low", "high", "hessian"):
        np.testing.assert_allclose(
            getattr(one, field), getattr(whole, field), rtol=1e-4, atol=1e-5
        )
    assert int(one.num_samples) == int(whole.num_samples) == 14
    assert {r.tobytes() for r in np.asarray(one.held_out)[:2]} == {
        np.asarray(rows[i]).tobytes() for i in (7, 15)
    }


def test_samples_come_evenly_from_all_batches():
    stats, rows = jaxq.observers.empty_stats(4, hessian=False), np.array(normal(304, 4))
    true, parts, update = (
        np.ones(304, bool),
        np.arange(304, dtype=np.int32),
        jax.jit(jaxq.observers.update_stats),
    )
    for i in range(12):
        rows[:, 0] = i
        stats = update(stats, rows.copy(), true, parts)
    assert int(stats.num_samples) == jaxq.observers.NUM_SAMPLES
    assert int(stats.num_held_out) == jaxq.observers.NUM_HELD_OUT
    assert float(stats.count) == 12 * 304 * 7 / 8
    assert stats.hessian is None
    batch_numbers = np.asarray(stats.samples)[:, 0].astype(int)
    share = np.bincount(batch_numbers, minlength=12)  # 43 of each would be even
    assert share.min() > 20
    assert share.max() < 75


@pytest.mark.parametrize("shape", [(1, 64, 8), (3, 64, 8), (16, 8), (2, 3, 4, 8)])
def test_an_eighth_is_held_out_for_any_batch_shape(shape):
    """Over eight batches, every place of a sequence is held out equally often."""
    layer = nnx.Linear(8, 2, rngs=nnx.Rngs(0))
    number = np.arange(np.prod(shape[:-1]), dtype=np.float32).reshape(*shape[:-1], 1)
    found = calibrate(layer, [np.broadcast_to(number, shape)] * 8)[""]
    total = 8 * number.size
    assert float(found.count) == total * 7 / 8
    held = np.asarray(found.held_out)[: int(found.num_held_out), 0].astype(int)
    if total // 8 <= jaxq.observers.NUM_HELD_OUT:
        np.testing.assert_array_equal(np.bincount(held), 1)  # each place once


def test_stacked_layers_under_nnx_scan():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(8, 8, rngs=nnx.Rngs(key))

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = make(jax.random.split(jax.random.key(0), 3))

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(layer, x):
                return jnp.tanh(layer(x))

            return run(self.layers, x)

    model, x = Stack(), normal(6, 8)
    found = calibrate(model, [x])["layers"]
    assert found.hessian.shape == (3, 8, 8)
    kernel, bias = (
        np.asarray(model.layers.kernel[...]),
        np.asarray(model.layers.bias[...]),
    )
    mean, x = np.asarray(found.mean), np.asarray(x)
    for i in range(3):
        np.testing.assert_allclose(mean[i], x.mean(0), rtol=1e-4, atol=1e-5)
        x = np.tanh(x @ kernel[i] + bias[i])
    qmodel, report = jaxq.quantize_model(
        model,
        jaxq.Recipe([jaxq.Rule(weight="int4", method="gptq")]),
        calibration=[normal(6, 8)],
        fallback="none",
    )
    assert report.quantized[0].method == "gptq"
    assert qmodel(normal(6, 8)).shape == (6, 8)


@pytest.mark.parametrize("case", ["tuple", "dict", "forward"])
def test_batches_of_every_form(case):
    class Two(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

        def __call__(self, x, scale):
            return self.layer(x * scale)

    x, scale = normal(8, 4), jnp.float32(2.0)
    batch = {"tuple": (x, scale), "dict": {"x": x, "scale": scale}, "forward": x}[case]
    forward = (lambda model, x: model(x, scale)) if case == "forward" else None
    found = calibrate(Two(), [batch], forward=forward)["layer"]
    np.testing.assert_allclose(found.mean, 2 * np.asarray(x)[:7].mean(0), rtol=1e-5)


class Unused(Block):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.expert = nnx.Linear(8, 8, rngs=rngs)


def test_missing_statistics_are_errors(block, batches):
    with pytest.raises(ValueError, match="there is no batch"):
        calibrate(block, iter(()))
    with pytest.raises(ValueError, match="no batch reached expert"):
        calibrate(Unused(nnx.Rngs(0)), batches[:1])
    with pytest.raises(ValueError, match=r"input can be seen at \['typo'\]"):
        calibrate(block, batches[:1], layers=["typo"])
    with pytest.raises(ValueError, match="heads: channel 2 of its input is not finite"):
        calibrate(
            block,
            [np.where(np.arange(8) == 2, np.float32(np.nan), batches[0])],
            layers=["heads"],
        )
    with pytest.raises(
        ValueError, match=r"mask has the shape \[5\], but the rows of heads .* \[8, 3\]"
    ):
        calibrate(
            block, batches[:1], mask=lambda batch: np.ones(5, bool), layers=["heads"]
        )
    with pytest.raises(ValueError, match="no row counted"):
        calibrate(
            block,
            batches[:1],
            mask=lambda batch: np.zeros((8, 3), bool),
            layers=["heads"],
        )
    with pytest.raises(TypeError, match="must be a flax nnx Module"):
        calibrate(lambda x: x, batches)
    with pytest.raises(ValueError, match="no layer whose input can be seen: no Linear"):
        calibrate(nnx.LayerNorm(8, rngs=nnx.Rngs(0)), batches)


def test_a_nonfinite_number_in_any_held_out_row_is_an_error():
    x = np.array(normal(1, 4096, 8))
    x[0, 4000, 3] = np.nan  # 512 rows are held out, and 256 of them are kept
    with pytest.raises(ValueError, match="held out for judging is not finite"):
        calibrate(nnx.Linear(8, 2, rngs=nnx.Rngs(0)), [x, normal(1, 4096, 8)])


def test_shapes_of_batches_may_differ_and_each_is_compiled_once(block):
    traces = []

    def forward(model, x):
        traces.append(x.shape)
        return model(x)

    calibrate(
        block, [normal(4, 3, 8), normal(4, 3, 8), normal(2, 5, 8)], forward=forward
    )
    # The first batch is traced once more, to look for train mode.
    assert traces == [(4, 3, 8), (4, 3, 8), (2, 5, 8)]


def test_progress_is_shown_on_request(block, batches, capsys):
    calibrate(block, batches, progress=True)
    assert "calibrating: 2/3" in capsys.readouterr().err
    calibrate(block, batches[:1])
    assert capsys.readouterr().err == ""


def test_calibration_continues_from_saved_statistics(block, batches, stats, tmp_path):
    first = calibrate(block, batches[:2])
    jaxq.save(
        tmp_path / "stats", {path: found._asdict() for path, found in first.items()}
    )
    kept = {
        path: jaxq.observers.LayerStats(**found)
        for path, found in jaxq.load(tmp_path / "stats").items()
    }
    jax.tree.map(
        np.testing.assert_array_equal, calibrate(block, batches[2:], start=kept), stats
    )
    with pytest.raises(ValueError, match="start has no statistics of"):
        calibrate(block, batches, start={"heads": kept["heads"]})


@pytest.mark.parametrize(
    "observer", [jaxq.observers.percentile(99.0), jaxq.observers.entropy(bins=128)]
)
def test_an_observer_sees_the_rows_that_count(block, batches, observer):
    mask = np.arange(3) < np.array([3, 1, 2, 3, 0, 2, 1, 3])[:, None]
    found = calibrate(
        block,
        [batches[0]],
        mask=lambda batch: mask,
        layers=["heads"],
        observer=observer,
    )["heads"]
    rows = np.asarray(batches[0])[:7][mask[:7]]
    expected = observer.bounds_of(jnp.asarray(rows), "int8")
    np.testing.assert_allclose(
        observer.bounds(found.observed, "int8"), expected, rtol=0.1
    )


class Switched(nnx.Module):
    """Takes arguments that are not arrays."""

    def __init__(self, transform=lambda f: f):
        self.up = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.transform = transform

    def __call__(self, x, *, train=True, method=None, fn=None):
        if train or method != "up":
            raise RuntimeError("an argument has changed")
        return self.transform(lambda x: self.up(x))(fn(x))


def test_arguments_that_are_not_arrays_do_not_change():
    batch = {"x": normal(8, 8), "train": False, "method": "up", "fn": jnp.tanh}
    stats = calibrate(Switched(), [batch])["up"]
    np.testing.assert_allclose(
        stats.absmax, np.abs(np.tanh(batch["x"][:7])).max(0), rtol=1e-6
    )
    jaxq.quantize_model(Switched(), "w8a8_static", calibration=[batch])


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, jax.vmap])
def test_layers_inside_transforms_of_jax_cannot_be_watched(transform):
    batch = {"x": normal(8, 8), "train": False, "method": "up", "fn": jnp.tanh}
    with pytest.raises(
        ValueError, match="calibrate: up is called inside jax.jit, .* Use nnx.jit"
    ):
        jaxq.quantize_model(Switched(transform), "w8a8_static", calibration=[batch])
