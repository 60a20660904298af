"""Calibration of linen modules: the numbers are those of the same layers in nnx."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from tests.arrays import normal
from tests.nn.layers.test_linen import built


class Model(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.DenseGeneral((2, 4), name="heads")(x)
        x = linen.DenseGeneral(8, axis=(-2, -1), name="out")(x)
        return linen.Einsum((8, 8), "bth,hd->btd", name="last")(jnp.tanh(x))


class Twin(nnx.Module):
    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.heads = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.last = nnx.Einsum("bth,hd->btd", (8, 8), (8,), rngs=rngs)
        for name, values in params.items():
            for leaf, value in values.items():
                getattr(getattr(self, name), leaf).set_value(value)

    def __call__(self, x):
        return self.last(jnp.tanh(self.out(self.heads(x))))


BATCHES = [normal(8, 3, 8, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def variables():
    return built(Model(), BATCHES[0])


@pytest.fixture(scope="module")
def stats(variables):
    return jaxq.nn.linen.calibrate(Model(), variables, BATCHES)


@pytest.mark.parametrize("masked", [False, True])
def test_numbers_are_those_of_nnx(variables, stats, masked):
    mask = (lambda batch: np.arange(24).reshape(8, 3) % 5 != 0) if masked else None
    found = (
        jaxq.nn.linen.calibrate(Model(), variables, BATCHES, mask=mask)
        if masked
        else stats
    )
    expected = jaxq.nn.calibrate(Twin(variables["params"]), BATCHES, mask=mask)
    assert list(found) == list(expected) == ["heads", "out", "last"]
    for path in found:
        for a, b in zip(
            jax.tree.leaves(found[path]), jax.tree.leaves(expected[path]), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_matrix_method_takes_the_statistics(variables, stats):
    kernel = variables["params"]["out"]["kernel"].reshape(8, 8)
    qt, info = jaxq.methods.gptq(kernel, stats["out"].hessian, "int4")
    assert qt.shape == (8, 8)
    assert not bool(info.fell_back)


def test_calibration_continues_from_earlier_statistics(variables, stats):
    first = jaxq.nn.linen.calibrate(Model(), variables, BATCHES[:1])
    found = jaxq.nn.linen.calibrate(Model(), variables, BATCHES[1:], start=first)
    jax.tree.map(np.testing.assert_array_equal, found, stats)
    with pytest.raises(ValueError, match="start has no statistics of out"):
        jaxq.nn.linen.calibrate(
            Model(), variables, BATCHES, start={"heads": first["heads"]}
        )


class Branch(linen.Module):
    """An input `[8, 8]` reaches one layer, `[4, 8]` another."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(2, name="eight" if len(x) == 8 else "four")(x)


class Twins(nnx.Module):
    def __init__(self):
        self.eight, self.four = (nnx.Linear(8, 2, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x):
        return self.eight(x) if len(x) == 8 else self.four(x)


def as_dicts(stats):
    """Named tuples as dicts of their fields, as files hold them."""
    if hasattr(stats, "_fields"):
        return {name: as_dicts(getattr(stats, name)) for name in stats._fields}
    return None if stats is None else np.asarray(stats)


def test_statistics_with_an_old_field_name_are_continued():
    x, observer = normal(8, 8), jaxq.observers.percentile(99.0)
    calibrate = functools.partial(jaxq.nn.calibrate, Twins(), observer=observer)
    first = calibrate([x, x[:4]])
    first = {path: as_dicts(stats) for path, stats in first.items()}
    for stats in first.values():
        stats["observed"]["seen"] = stats["observed"].pop("totals")
    expected = calibrate([x, x[:4], x[4:]])
    jax.tree.map(
        np.testing.assert_array_equal, calibrate([x[4:]], start=first), expected
    )


def test_a_layer_that_no_new_batch_reaches_keeps_its_statistics():
    x, observer = normal(8, 8), jaxq.observers.percentile(99.0)
    kernels = {name: built(linen.Dense(2), x)["params"] for name in ("eight", "four")}
    for calibrate in (
        lambda *args, **how: jaxq.nn.linen.calibrate(
            Branch(), {"params": kernels}, *args, observer=observer, **how
        ),
        lambda *args, **how: jaxq.nn.calibrate(
            Twins(), *args, observer=observer, **how
        ),
    ):
        both, expected = calibrate([x, x[:4]]), calibrate([x, x[:4], x[4:]])
        found = calibrate(
            [x[4:]], start={path: as_dicts(v) for path, v in both.items()}
        )
        assert set(found) == {"eight", "four"}
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        with pytest.raises(
            ValueError, match=r"LayerStats has the fields .* got \['typo'\]"
        ):
            calibrate([x], start={"eight": {"typo": 1}, "four": both["four"]})


@pytest.mark.heavy
def test_sequential_and_bias_correction_are_those_of_nnx(variables, stats, tmp_path):
    recipe = jaxq.Recipe(
        [
            jaxq.Rule("heads", weight="int2", method="gptq", correct_bias=True),
            jaxq.Rule(weight="int2", method="gptq"),
        ]
    )
    how = {"calibration": BATCHES, "sequential": "layers", "fallback": "none"}
    qmodule, qvariables, report = jaxq.nn.linen.quantize_model(
        Model(), variables, recipe, **how
    )
    qtwin, expected = jaxq.quantize_model(Twin(variables["params"]), recipe, **how)
    np.testing.assert_allclose(
        qmodule.apply(qvariables, BATCHES[0]), qtwin(BATCHES[0]), rtol=1e-4, atol=1e-4
    )
    assert {row.path: row.note for row in report.quantized} == {
        row.path: row.note for row in expected.quantized
    }
    _, apart, _ = jaxq.nn.linen.quantize_model(
        Model(), variables, recipe, calibration=stats, fallback="none"
    )
    first = jaxq.nn.linen.quantize_model(
        Model(), variables, recipe, resume=tmp_path, **how
    )
    (tmp_path / "block-0001.safetensors").unlink()
    again = jaxq.nn.linen.quantize_model(
        Model(), variables, recipe, resume=tmp_path, **how
    )
    assert again[2] == first[2] == report
    jax.tree.map(np.testing.assert_array_equal, again[1], qvariables)
    codes = [v["params"]["last"]["kernel"].codes() for v in (qvariables, apart)]
    assert np.any(codes[0] != codes[1])
    with pytest.raises(ValueError, match="sequential='blocks' needs calibration"):
        jaxq.nn.linen.quantize_model(
            Model(), variables, "int4", example=BATCHES[0], sequential=True
        )


def test_layers_in_a_scan_are_refused():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return jnp.tanh(linen.Dense(8)(x)), None

    class Stack(linen.Module):
        @linen.compact
        def __call__(self, x):
            scanned = linen.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return scanned(name="layers")(x, None)[0]

    x = normal(4, 8)
    with pytest.raises(ValueError, match=r"layers/Dense_0 is inside nn\.scan"):
        jaxq.nn.linen.calibrate(Stack(), built(Stack(), x), [x])


def test_missing_statistics_are_errors(variables):
    calibrate = jaxq.nn.linen.calibrate
    with pytest.raises(ValueError, match="there is no batch"):
        calibrate(Model(), variables, [])
    with pytest.raises(ValueError, match=r"no batch reached \['typo'\]"):
        calibrate(Model(), variables, BATCHES, layers=["typo", "out"])
    with pytest.raises(TypeError, match="must be a flax linen Module"):
        calibrate(Twin(variables["params"]), variables, BATCHES)
    with pytest.raises(ValueError, match="heads: channel 1 of its input is not finite"):
        calibrate(
            Model(),
            variables,
            [np.where(np.arange(8) == 1, np.float32(np.inf), BATCHES[0])],
        )
    assert flax.traverse_util.flatten_dict(variables)  # unchanged


def test_arguments_that_are_not_arrays_do_not_change():
    class Switched(linen.Module):
        def setup(self):
            self.up = linen.Dense(8)

        def encode(self, x, *, deterministic):
            assert deterministic is True
            return self.up(x)

    module, x = Switched(), jnp.ones((8, 8))
    batch = {"x": x, "deterministic": True, "method": "encode"}
    variables = module.init(jax.random.key(0), **batch)
    assert list(jaxq.nn.linen.calibrate(module, variables, [batch])) == ["up"]
    _, _, report = jaxq.nn.linen.quantize_model(
        module, variables, "w8a8_static", calibration=[batch]
    )
    assert [row.path for row in report.quantized] == ["up/kernel"]
