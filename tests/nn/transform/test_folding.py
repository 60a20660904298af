"""Scales that move into the previous layer of layers with heads, and their errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from jaxq import methods
from jaxq.methods._registry import _METHODS
from tests import tables
from tests.arrays import assert_same, normal

WIDTH, HEADS = 32, 4
CHANNELS = jnp.exp(1.5 * normal(WIDTH, seed=3))
BATCHES = [normal(8, 16, WIDTH, seed=seed) * CHANNELS[None, None] for seed in range(3)]
PROJECTIONS = ("query", "key", "value")


@dataclasses.dataclass
class Group:
    """Layers that read the outputs of a source."""

    source: str
    targets: tuple[str, ...]
    kind: str


class Attention(nnx.Module):
    """A norm and attention. Kernels are `[d, heads, h]`, and `[heads, h, d]` last."""

    def __init__(self):
        self.norm = nnx.RMSNorm(WIDTH, rngs=nnx.Rngs(0))
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, decode=False, use_bias=False, rngs=nnx.Rngs(0)
        )
        # Outputs of the values with very different ranges, for equalization.
        value, ranges = self.attention.value.kernel, jnp.exp(normal(WIDTH, seed=5))
        value[...] = value[...] * ranges.reshape(1, HEADS, -1)
        self.norm.scale[...] = CHANNELS

    def __call__(self, x):
        return self.attention(self.norm(x))

    def scale_groups(self):
        targets = tuple(f"attention/{name}" for name in PROJECTIONS)
        return [
            Group("norm", targets, "norm"),
            Group("attention/value", ("attention/out",), "linear"),
        ]

    def fold_scales(self, scales):
        model = nnx.clone(self)
        attention = model.attention
        if "norm" in scales:
            scale = scales["norm"]
            model.norm.scale[...] = model.norm.scale[...] / scale
            for name in PROJECTIONS:
                kernel = getattr(attention, name).kernel
                kernel[...] = kernel[...] * scale[:, None, None]
        if "attention/value" in scales:
            scale = scales["attention/value"].reshape(HEADS, -1)
            value = attention.value.kernel
            value[...] = value[...] / scale[None]
            attention.out.kernel[...] = attention.out.kernel[...] * scale[..., None]
        return model


class Matrices(Attention):
    """The same function. Every projection is a Linear."""

    def __init__(self):
        heads = Attention()
        self.norm, self.attention = heads.norm, nnx.Module()
        for name in (*PROJECTIONS, "out"):
            kernel = getattr(heads.attention, name).kernel[...]
            layer = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0))
            layer.kernel[...] = kernel.reshape(WIDTH, WIDTH)
            setattr(self.attention, name, layer)

    def __call__(self, x):
        x, attention = self.norm(x), self.attention
        query, key, value = (
            getattr(attention, name)(x).reshape(*x.shape[:-1], HEADS, -1)
            for name in PROJECTIONS
        )
        y = nnx.dot_product_attention(query, key, value)
        return attention.out(y.reshape(x.shape))

    def fold_scales(self, scales):
        model = nnx.clone(self)
        attention = model.attention
        if "norm" in scales:
            model.norm.scale[...] = model.norm.scale[...] / scales["norm"]
            for name in PROJECTIONS:
                kernel = getattr(attention, name).kernel
                kernel[...] = kernel[...] * scales["norm"][:, None]
        if "attention/value" in scales:
            scale = scales["attention/value"]
            value = attention.value.kernel
            value[...] = value[...] / scale[None]
            attention.out.kernel[...] = attention.out.kernel[...] * scale[:, None]
        return model


def quantize(model, method, spec="int4", activation=None, **arguments):
    rule = jaxq.Rule(weight=spec, activation=activation, method=method)
    return jaxq.quantize_model(
        model, jaxq.Recipe([rule]), calibration=BATCHES, **arguments
    )


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("smoothquant", PROJECTIONS),
        ("awq", (*PROJECTIONS, "out")),
        ("equalize", ("out",)),
    ],
)
def test_layers_with_heads_get_the_scales_of_their_matrices(method, names):
    arguments = {"spec": "int8", "activation": "int8", "fallback": "none"}
    model, report = quantize(Attention(), method, **arguments)
    expected, expected_report = quantize(Matrices(), method, **arguments)
    for name in names:
        path = f"attention/{name}/kernel"
        row, expected_row = (
            next(row for row in rows.quantized if row.path == path)
            for rows in (report, expected_report)
        )
        assert row.note == expected_row.note
        assert "folded into" in row.note
        qt = getattr(model.attention, name).kernel.get_value()
        expected_qt = getattr(expected.attention, name).kernel.get_value()
        w, expected_w = (np.asarray(jaxq.dequantize(q)) for q in (qt, expected_qt))
        np.testing.assert_allclose(w.reshape(expected_w.shape), expected_w, rtol=1e-4)
    x = normal(2, 16, WIDTH, seed=9)
    np.testing.assert_allclose(model(x), expected(x), rtol=1e-3, atol=1e-3)


def test_smoothed_heads_have_the_ranges_of_the_paper():
    folded = []

    class Watched(Attention):
        def fold_scales(self, scales):
            folded.append(scales)
            return super().fold_scales(scales)

    quantize(Watched(), "smoothquant", "int8", "int8", fallback="none")
    model = Attention()
    stats = jaxq.nn.calibrate(model, BATCHES)["attention/query"]
    kernels = [getattr(model.attention, name).kernel[...] for name in PROJECTIONS]
    largest = np.max([np.abs(np.asarray(w)).max((1, 2)) for w in kernels], axis=0)
    expected = np.sqrt(np.asarray(stats.absmax) / largest)
    np.testing.assert_allclose(folded[0]["norm"], expected, rtol=1e-5)


METHODS = sorted(set(methods.names()) - {"equalize"})


@pytest.mark.parametrize("method", tables.thinned(METHODS, ["awq", "smoothquant"]))
def test_every_method_takes_the_layers_of_attention(method):
    activation = "int8" if method in ("smoothquant", "llm_int8") else None
    options = {"num_steps": 10} if method == "adaround" else {}
    rule = jaxq.Rule(
        weight="int8", activation=activation, method=method, options=options
    )
    recipe = jaxq.Recipe([rule])
    module = linen.MultiHeadDotProductAttention(HEADS)
    variables = module.init(jax.random.key(0), BATCHES[0])
    layers = {"query", "key", "value", "out"}
    _, report = jaxq.quantize_model(Attention(), recipe, calibration=BATCHES)
    assert {row.path.split("/")[-2] for row in report.quantized} == layers
    qmodule, qvars, report = jaxq.nn.linen.quantize_model(
        module, variables, recipe, calibration=BATCHES
    )
    assert {row.path.split("/")[-2] for row in report.quantized} == layers
    y, expected = qmodule.apply(qvars, BATCHES[0]), module.apply(variables, BATCHES[0])
    error = np.linalg.norm(np.asarray(y - expected)) / np.linalg.norm(expected)
    assert error < 0.1


class Convolutions(nnx.Module):
    """Two convolutions in a row."""

    def __init__(self):
        self.first = nnx.Conv(4, 8, (3,), rngs=nnx.Rngs(0))
        self.second = nnx.Conv(8, 4, (3,), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))

    def scale_groups(self):
        return [Group("first", ("second",), "linear")]

    def fold_scales(self, scales):
        assert not scales
        return nnx.clone(self)


@pytest.mark.parametrize("method", ["awq", "equalize", "smoothquant"])
def test_scales_do_not_move_between_convolutions(method):
    """The rule of a user is an error, and `or_nearest` rounds and says so."""
    rule = jaxq.Rule(weight="int8", method=method)
    batches = [normal(8, 16, 4, seed=seed) for seed in range(2)]
    reason = f"method '{method}' scales rows of a matrix, not the windows of a conv"
    with pytest.raises(ValueError, match=rf"first \(Conv\): {reason}") as error:
        jaxq.quantize_model(Convolutions(), jaxq.Recipe([rule]), calibration=batches)
    assert "second (Conv): method" in str(error.value)
    assert "or_nearest=True" in str(error.value)
    rule = dataclasses.replace(rule, or_nearest=True)
    model, report = jaxq.quantize_model(
        Convolutions(), jaxq.Recipe([rule]), calibration=batches
    )
    expected, _ = jaxq.quantize_model(Convolutions(), "int8")
    assert_same(model(batches[0]), expected(batches[0]))
    assert {row.method for row in report.quantized} == {"rtn"}
    notes = [row.note for row in report.quantized]
    assert all(f"rounded to nearest: {reason}" in note for note in notes)


def failing(record):
    """A method's record. Its functions raise the errors of a matrix."""

    def fail(*args, **kwargs):
        raise ValueError("w must be a matrix")

    folding = record.folding
    if folding is not None:
        return dataclasses.replace(
            record, folding=dataclasses.replace(folding, find=fail)
        )
    return dataclasses.replace(record, solve=fail)


@pytest.mark.parametrize(
    ("method", "model", "layer"),
    [
        ("smoothquant", Attention, "attention/query, attention/key, attention/value"),
        ("awq", lambda: Attention().attention, "key/kernel"),
        ("gptq", Attention, "attention/key/kernel"),
    ],
)
def test_errors_of_methods_name_the_layer(method, model, layer, monkeypatch):
    monkeypatch.setitem(_METHODS, method, failing(methods.get(method)))
    message = f"{layer}: method '{method}': w must be a matrix"
    with pytest.raises(ValueError, match=message):
        quantize(model(), method)
