"""A folded or rotated float model must compute the same function as before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from tests.arrays import normal

BATCHES = [normal(64, 16, seed=seed) for seed in range(2)]


class Network(nnx.Module):
    """Two norms, each before a linear layer: [b, 16] -> [b, 16].

    Args:
      residual: the second residual sum adds this multiple of the norm's outputs, so no
        scale may be folded into it.
      dtype: of the parameters and of the computation.
      unused: the dtype of a variable that the network does not use, or None.
    """

    def __init__(self, residual=0.0, dtype=jnp.float32, unused=None):
        rngs = nnx.Rngs(0)
        self.residual = residual
        if unused is not None:
            self.unused = nnx.Variable(jnp.zeros(2, unused))
        self.norms = nnx.List(
            [nnx.RMSNorm(16, dtype=dtype, param_dtype=dtype, rngs=rngs) for _ in "ab"]
        )
        self.linears = nnx.List(
            [
                nnx.Linear(16, 16, dtype=dtype, param_dtype=dtype, rngs=rngs)
                for _ in "ab"
            ]
        )

    def __call__(self, x):
        x = x + self.linears[0](self.norms[0](x))
        y = self.norms[1](x)
        return (self.residual * y if self.residual else x) + self.linears[1](y)

    def scale_groups(self):
        return [
            jaxq.models.NormGroup(f"norms/{i}", (f"linears/{i}",), "norm")
            for i in range(2)
        ]

    def fold_scales(self, scales):
        out = nnx.clone(self)
        for source, scale in scales.items():
            i = int(source[-1])
            norm, linear = out.norms[i].scale, out.linears[i].kernel
            norm.set_value((norm[...] / scale).astype(norm[...].dtype))
            kernel = linear[...] * scale[:, None]
            linear.set_value(kernel.astype(linear[...].dtype))
        return out


SMOOTH = jaxq.Recipe(
    [jaxq.Rule(weight="int8", activation="int8", method="smoothquant")]
)


def test_a_group_with_another_reader_is_refused_by_name():
    model = Network(residual=1.0)
    expected = (
        r"folding the scales of norms/1 into linears/1 changes what the model computes:"
        r".* differ by .* of their norm.*Correct the groups of Network"
    )
    with pytest.raises(ValueError, match=expected):
        jaxq.quantize_model(model, SMOOTH, calibration=BATCHES, fallback="none")


@pytest.mark.parametrize(
    ("residual", "dtype", "unused", "rounding"),
    [
        (0.1, jnp.float32, jnp.bfloat16, "0.00035"),
        (0.1, jnp.float32, jnp.float8_e4m3fn, "0.00035"),
        (1.0, jnp.bfloat16, None, "0.088"),
    ],
)
def test_only_dtypes_that_numbers_are_rounded_to_allow_differences(
    residual, dtype, unused, rounding
):
    batches = [x.astype(dtype) * jnp.arange(1, 17, dtype=dtype)[None] for x in BATCHES]
    expected = f"norms/1 into linears/1 .*rounding explains at most {rounding}"
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match=expected),
    ):
        jaxq.quantize_model(
            Network(residual, dtype, unused),
            SMOOTH,
            calibration=batches,
            fallback="none",
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_right_groups_pass(dtype):
    batches = [x.astype(dtype) for x in BATCHES]
    # Flax's norms mix bfloat16 and float32.
    with jax.numpy_dtype_promotion("standard"):
        _, report = jaxq.quantize_model(
            Network(dtype=dtype), SMOOTH, calibration=batches, fallback="none"
        )
    assert report.output_sqnr > 30
    assert not any("compared" in note for note in report.notes)


def test_a_small_error_of_one_scale_is_found():
    class Careless(Network):
        """Multiplies the rows of a kernel by a scale that is 2 % too large."""

        def fold_scales(self, scales):
            out = super().fold_scales(scales)
            kernel = out.linears[0].kernel
            kernel.set_value(kernel[...] * 1.02)
            return out

    with pytest.raises(ValueError, match="changes what the model computes"):
        jaxq.quantize_model(Careless(), SMOOTH, calibration=BATCHES)


def test_without_batches_the_report_says_that_nothing_was_compared():
    class Chain(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(16, 16, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

        def scale_groups(self):
            return [jaxq.models.NormGroup("first", ("second",), "linear")]

        def fold_scales(self, scales):
            out, s = nnx.clone(self), scales["first"]
            out.first.kernel.set_value(out.first.kernel[...] / s[None])
            out.first.bias.set_value(out.first.bias[...] / s)
            out.second.kernel.set_value(out.second.kernel[...] * s[:, None])
            return out

    recipe = jaxq.Recipe([jaxq.Rule(weight="int8", method="equalize")])
    _, report = jaxq.quantize_model(Chain(), recipe)
    assert any("were not compared" in note for note in report.notes)
    _, report = jaxq.quantize_model(Chain(), recipe, calibration=BATCHES)
    assert not any("were not compared" in note for note in report.notes)


class Turned(nnx.Module):
    """A linear map between two rotations. `rotated` may forget the second one."""

    def __init__(self, forgets):
        self.forgets = forgets
        self.first = nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(self.first(x))

    def rotated(self, orthogonal, online):
        out, q = nnx.clone(self), orthogonal(16)
        out.first.kernel.set_value(out.first.kernel[...] @ q)
        if not self.forgets:
            out.second.kernel.set_value(q.T @ out.second.kernel[...])
        return out


def test_a_wrong_rotation_is_refused():
    recipe = jaxq.Recipe([jaxq.Rule(weight="int8")], rotate=True)
    _, report = jaxq.quantize_model(Turned(False), recipe, calibration=BATCHES)
    assert report.output_sqnr > 35
    with pytest.raises(ValueError, match="the rotation of Turned changes what"):
        jaxq.quantize_model(Turned(True), recipe, calibration=BATCHES)
    _, report = jaxq.quantize_model(Turned(True), recipe)
    assert "were not compared" in report.notes[0]


def test_the_models_error_is_that_of_the_users_model():
    """It includes what rotation and folding do, and rows of padding do not count."""
    model, mask = Turned(False), np.arange(64) < 40
    recipe = jaxq.Recipe([jaxq.Rule(weight="int4")], rotate=True)
    qmodel, report = jaxq.quantize_model(
        model, recipe, calibration=BATCHES, mask=lambda batch: mask
    )
    x = BATCHES[0]
    exact, actual = (np.asarray(m(x), np.float64)[mask] for m in (model, qmodel))
    expected = 10 * np.log10(np.sum(exact**2) / np.sum((actual - exact) ** 2))
    assert report.output_sqnr == pytest.approx(expected, abs=0.01)
    assert f"outputs of a calibration batch: {expected:.1f} dB" in str(report)
    assert report.to_dict()["totals"]["output_sqnr"] == report.output_sqnr


def test_a_note_says_why_the_models_error_is_missing():
    model = Turned(False)
    _, report = jaxq.quantize_model(
        model, "int8", calibration=BATCHES, forward=lambda model, x: None
    )
    assert report.output_sqnr is None
    assert any("returns no floats" in note for note in report.notes)

    class Refusing(nnx.Module):
        """Its own code cannot use a QTensor."""

        def __init__(self):
            self.w = nnx.Param(normal(16, 16))

        def __call__(self, x):
            return jnp.sin(x @ jnp.asarray(self.w[...]))

    rule = jaxq.Rule(weight="int8", kinds=("Param",))
    _, report = jaxq.quantize_model(
        Refusing(), jaxq.Recipe([rule]), calibration=BATCHES
    )
    assert report.output_sqnr is None
    assert any("a run of the first batch raised" in n for n in report.notes)
