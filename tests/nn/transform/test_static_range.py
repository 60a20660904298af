"""Static ranges in reports, and the fallback from a range that suits the data badly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from tests.arrays import normal


def rule(observer, **fields):
    return jaxq.Rule(weight="int8", activation="int8", observer=observer, **fields)


def decibels(exact, error):
    exact, error = np.asarray(exact, np.float64), np.asarray(error, np.float64)
    return 10 * np.log10(np.sum(exact**2) / np.sum(error**2))


BATCHES = [normal(64, 32, seed=seed) for seed in range(2)]
# Half of all magnitudes lie beyond this range.
CLIPPING = jaxq.observers.percentile(50)


@pytest.fixture(scope="module")
def layer():
    return nnx.Linear(32, 16, rngs=nnx.Rngs(0))


def quantize(layer, observer, **arguments):
    recipe = jaxq.Recipe([rule(observer)])
    qlayer, report = jaxq.quantize_model(
        layer, recipe, calibration=BATCHES, **arguments
    )
    return qlayer, report, report.quantized[0]


@pytest.mark.parametrize("observer", ["absmax", CLIPPING])
def test_a_row_shows_the_range_and_the_error_of_the_output(layer, observer):
    qlayer, report, row = quantize(layer, observer, fallback="none")
    low, high = np.asarray(qlayer.kernel[...].input_range)
    assert row.input_range == (low, high)
    numbers = np.concatenate(BATCHES)
    clipped = np.mean((numbers < low) | (numbers > high))
    assert row.input_clipped == pytest.approx(clipped, abs=1e-6)
    # All 16 held-out rows of two batches: rows 7, 15, ... and 6, 14, ...
    rows = np.concatenate([BATCHES[0][7::8], BATCHES[1][6::8]])
    exact = np.asarray(rows, np.float64) @ np.asarray(layer.kernel[...], np.float64)
    error = np.asarray(qlayer(rows)) - np.asarray(layer.bias[...]) - exact
    assert row.output_sqnr == pytest.approx(decibels(exact, error), abs=0.01)
    assert f"input {low:.3g}..{high:.3g} clips {clipped:.2%}" in str(report)
    assert "output dB" in str(report)
    assert "output dB" in report.to_markdown()


def test_a_range_that_clips_half_is_replaced(layer):
    _, _, kept = quantize(layer, CLIPPING, fallback="none")
    qlayer, report, row = quantize(layer, CLIPPING)
    _, _, best = quantize(layer, jaxq.observers.mse(), fallback="none")
    assert kept.output_sqnr < 8
    assert row.output_sqnr > best.output_sqnr - 1.8
    assert "the range of percentile has" in row.note
    assert "so that range is used" in row.note
    assert float(qlayer.kernel[...].input_range[1]) > 2.5
    assert report.output_sqnr > 35
    with pytest.raises(
        ValueError, match=r"kernel: the range of percentile has .* dB more output error"
    ):
        quantize(layer, CLIPPING, fallback="raise")


def test_few_rows_show_the_loss_too(layer):
    """24 held-out rows would have no number beyond the range."""
    batches = [normal(64, 32, seed=seed) for seed in range(3)]
    x = normal(512, 32, seed=9)
    results = {}
    for observer in ("absmax", "percentile"):
        recipe = jaxq.Recipe([rule(observer)])
        qlayer, report = jaxq.quantize_model(layer, recipe, calibration=batches)
        results[observer] = float(jaxq.metrics.sqnr(layer(x), qlayer(x)))
    assert "so that range is used" in report.quantized[0].note
    assert results["percentile"] > results["absmax"] - 1.5


def test_a_good_range_is_kept(layer):
    for observer in (jaxq.observers.mse(), jaxq.observers.percentile(99.99)):
        kept, _, _ = quantize(layer, observer, fallback="none")
        qlayer, _, row = quantize(layer, observer)
        np.testing.assert_array_equal(
            qlayer.kernel[...].input_range, kept.kernel[...].input_range
        )
        assert "used" not in row.note


class Experts(nnx.Module):
    """Two experts that read inputs of their own: [2, b, 16] -> [2, b, 8]."""

    def __init__(self):
        self.up = nnx.Einsum("ebd,edf->ebf", (2, 16, 8), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.up(x)


def test_each_element_of_a_stack_is_judged_on_its_own():
    # Half of the numbers suffice for signs of one size, and not for normal numbers.
    x = normal(2, 64, 16)
    x = x.at[0].set(jnp.sign(x[0]))
    recipe = jaxq.Recipe([rule(jaxq.observers.percentile(50))])
    kept, _ = jaxq.quantize_model(Experts(), recipe, calibration=[x], fallback="none")
    qmodel, report = jaxq.quantize_model(Experts(), recipe, calibration=[x])
    ranges = [np.asarray(m.up.kernel[...].input_range) for m in (kept, qmodel)]
    np.testing.assert_array_equal(ranges[1][0], ranges[0][0])
    assert ranges[1][1, 1] > 2 * ranges[0][1, 1]
    assert "the range of percentile at element 1 has" in report.quantized[0].note


@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3)])
def test_each_tap_of_a_convolution_is_a_product(kernel_size):
    layer = nnx.Conv(8, 6, kernel_size, feature_group_count=2, rngs=nnx.Rngs(0))
    x = normal(8, 4, 4, 8)
    qlayer, report = jaxq.quantize_model(
        layer, jaxq.Recipe([rule("absmax")]), calibration=[x]
    )
    stats = jaxq.nn.calibrate(layer, [x])[""]
    rows = np.asarray(stats.held_out)[: int(stats.num_held_out)]
    high = float(qlayer.kernel[...].input_range[1])
    rounded = np.clip(np.rint(rows / (high / 127)), -127, 127) * (high / 127)
    kernels = [layer.kernel[...], jaxq.dequantize(qlayer.kernel[...])]
    taps = [np.asarray(w, np.float64).reshape(-1, 4, 6) for w in kernels]
    exact, actual = (
        np.stack(
            [
                inputs[:, 4 * group : 4 * group + 4]
                @ w[:, :, 3 * group : 3 * group + 3]
                for group in range(2)
            ]
        )
        for inputs, w in zip((rows, rounded), taps, strict=True)
    )
    row = report.quantized[0]
    assert row.output_sqnr == pytest.approx(decibels(exact, actual - exact), abs=0.01)


def test_a_convolution_with_dynamic_ranges_has_no_output_error():
    layer = nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0))
    recipe = jaxq.Recipe([jaxq.Rule(weight="int8", activation="int8")])
    report = jaxq.quantize_model(layer, recipe, calibration=[normal(4, 8, 4)])[1]
    assert report.quantized[0].output_sqnr is None
    assert report.output_sqnr > 35


def test_weight_only_layers_with_statistics_show_the_error_too(layer):
    recipe = jaxq.Recipe([jaxq.Rule(weight="int4", method="gptq")])
    qlayer, report = jaxq.quantize_model(layer, recipe, calibration=BATCHES)
    rows = np.concatenate([BATCHES[0][7::8], BATCHES[1][6::8]])
    exact = np.asarray(rows, np.float64) @ np.asarray(layer.kernel[...], np.float64)
    back = rows @ np.asarray(jaxq.dequantize(qlayer.kernel[...]), np.float64)
    row = report.quantized[0]
    assert row.output_sqnr == pytest.approx(decibels(exact, back - exact), abs=0.01)
    assert row.input_range is None
    assert "input " not in str(report)


def test_no_data_no_error(layer):
    for report in (
        jaxq.quantize_model(layer, "int8")[1],
        jaxq.nn.plan(layer, jaxq.Recipe([rule("absmax")])),
    ):
        assert report.quantized[0].output_sqnr is None
        assert report.output_sqnr is None
        assert "output" not in str(report)


def test_linen_shows_and_replaces_ranges_too():
    module = linen.Dense(16)
    variables = module.init(jax.random.key(0), BATCHES[0])
    recipe = jaxq.Recipe([rule(CLIPPING)])
    _, qvariables, report = jaxq.nn.linen.quantize_model(
        module, variables, recipe, calibration=BATCHES
    )
    row = report.quantized[0]
    assert "so that range is used" in row.note
    low, high = np.asarray(qvariables["params"]["kernel"].input_range)
    assert row.input_range == (low, high)
    assert row.output_sqnr > 35
    assert report.output_sqnr > 35


def test_without_held_out_rows_a_range_is_not_judged(layer):
    _, report = jaxq.quantize_model(
        layer, jaxq.Recipe([rule(CLIPPING)]), calibration=[BATCHES[0][:4]]
    )
    assert "its static range is not judged: no sampled rows" in str(report)


def test_statistics_of_another_layer_are_refused(layer):
    other = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    observer = jaxq.observers.absmax()
    stats = jaxq.nn.calibrate(other, [normal(64, 16)], observer=observer)
    message = r"statistics are for inputs of shape \[16\], expected"
    with pytest.raises(ValueError, match=message):
        jaxq.quantize_model(layer, jaxq.Recipe([rule("absmax")]), calibration=stats)
