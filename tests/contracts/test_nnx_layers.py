"""Every kind of nnx layer with every kind of recipe under every transform.

The reference is the float layer. A bound is the norm of the error, divided by the norm
of the float result: the error of the format on normal numbers, with some room for one
seed. Combinations that are not supported raise, and a table has the words of their
errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq import PerGroup, QuantSpec, Recipe, Rule
from tests import tables
from tests.ops.reference import equations

# name: (rule, bound)
RECIPES = {
    "int8": ({"weight": "int8"}, 0.015),
    "int4 g32": ({"weight": QuantSpec("int4", PerGroup(32, pad=True))}, 0.17),
    "nf4": ({"weight": "nf4"}, 0.15),
    "fp8": ({"weight": "fp8"}, 0.05),
    "w8a8": ({"weight": "int8", "activation": "int8"}, 0.025),
    "w8a8 per tensor": (
        {"weight": "int8", "activation": QuantSpec("int8", jaxq.PerTensor())},
        0.025,
    ),
    "w8a8 static": (
        {"weight": "int8", "activation": "int8", "observer": "absmax"},
        0.03,
    ),
    "w8a8 static asymmetric": (
        {
            "weight": "int8",
            "activation": QuantSpec("uint8", symmetric=False),
            "observer": "minmax",
        },
        0.03,
    ),
    "w4a8": ({"weight": "int4", "activation": "int8"}, 0.17),
    "w4a4": ({"weight": "int4", "activation": "int4"}, 0.25),
    "fp8 dynamic": ({"weight": "fp8", "activation": "fp8"}, 0.06),
    "fp8 static": ({"weight": "fp8", "activation": "fp8", "observer": "absmax"}, 0.06),
    "mxfp8": ({"weight": "mxfp8", "activation": "mxfp8"}, 0.07),
    "nvfp4": ({"weight": "nvfp4", "activation": "nvfp4"}, 0.25),
}


class Attend(nnx.Module):
    """An embedding as an output head."""

    def __init__(self, rngs):
        self.table = nnx.Embed(16, 32, rngs=rngs)

    def __call__(self, x):
        return self.table.attend(x)


class Lora(nnx.Module):
    """An adapter around a linear layer."""

    def __init__(self, rngs):
        self.adapter = nnx.LoRA(
            32, 2, 16, base_module=nnx.Linear(32, 16, rngs=rngs), rngs=rngs
        )

    def __call__(self, x):
        return self.adapter(x)


class Bare(nnx.Module):
    """A module that holds a matrix itself."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (32, 16)))

    def __call__(self, x):
        return x @ self.w.astype(x.dtype)


# name: (layer from rngs, shape of its input)
LAYERS = {
    "Linear": (lambda rngs: nnx.Linear(32, 16, rngs=rngs), (3, 32)),
    "LinearGeneral": (
        lambda rngs: nnx.LinearGeneral((4, 8), (2, 8), axis=(-2, -1), rngs=rngs),
        (3, 4, 8),
    ),
    "Einsum": (
        lambda rngs: nnx.Einsum("btd,dhk->bthk", (32, 2, 8), rngs=rngs),
        (2, 3, 32),
    ),
    "Einsum, axes in turn": (
        lambda rngs: nnx.Einsum("bhd,dhk->bk", (8, 4, 16), rngs=rngs),
        (3, 4, 8),
    ),
    "Einsum, experts in turn": (
        lambda rngs: nnx.Einsum("febk,efkn->febn", (2, 3, 32, 4), rngs=rngs),
        (3, 2, 2, 32),
    ),
    "Einsum, heads behind": (
        lambda rngs: nnx.Einsum("bhd,dhf->bhf", (32, 2, 8), rngs=rngs),
        (3, 2, 32),
    ),
    "Conv1d": (lambda rngs: nnx.Conv(8, 16, 3, rngs=rngs), (2, 6, 8)),
    "Conv2d": (lambda rngs: nnx.Conv(8, 16, (3, 3), rngs=rngs), (2, 5, 5, 8)),
    "Conv2d grouped": (
        lambda rngs: nnx.Conv(8, 16, (3, 3), feature_group_count=2, rngs=rngs),
        (2, 5, 5, 8),
    ),
    "Conv3d": (lambda rngs: nnx.Conv(4, 8, (2, 2, 2), rngs=rngs), (1, 3, 3, 3, 4)),
    # An example has more than 128 numbers, so that an mx activation has several blocks.
    "ConvTranspose": (
        lambda rngs: nnx.ConvTranspose(8, 16, (3, 3), strides=(2, 2), rngs=rngs),
        (2, 5, 4, 8),
    ),
    "Embed": (lambda rngs: nnx.Embed(16, 32, rngs=rngs), None),
    "Embed.attend": (Attend, (3, 32)),
    "MultiHeadAttention": (
        lambda rngs: nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs),
        (2, 4, 32),
    ),
    "LoRA": (Lora, (3, 32)),
    "LoRALinear": (
        lambda rngs: nnx.LoRALinear(32, 16, lora_rank=2, rngs=rngs),
        (3, 32),
    ),
    "Param": (Bare, (3, 32)),
}
# What raises an error, and its words.
REFUSED = {
    **{
        ("Embed.attend", name): "cannot be observed"
        for name in RECIPES
        if "static" in name
    },
    **{("Embed", name): "cannot be observed" for name in RECIPES if "static" in name},
}
CASES = [(layer, recipe) for layer in LAYERS for recipe in RECIPES]
# tests/nn/layers runs the other kinds of layers and recipes every day.
DEFAULT = [
    ("Linear", "w8a8 static asymmetric"),
    ("Embed", "w8a8 static"),
    ("Param", "w8a8 static"),
]
# Recipes whose products multiply codes by codes.
MULTIPLIES_CODES = {
    "w8a8",
    "w8a8 per tensor",
    "w8a8 static",
    "w8a8 static asymmetric",
    "w4a8",
    "w4a4",
    "fp8 dynamic",
    "fp8 static",
}


class Both(nnx.Module):
    """A layer, and a stack of two more that `nnx.scan` runs."""

    def __init__(self, make):
        self.one = make(nnx.Rngs(0))
        self.stack = nnx.split_rngs(splits=2)(nnx.vmap(make, in_axes=0, out_axes=0))(
            nnx.Rngs(1)
        )

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def run(x, layer):
            return x, layer(x)

        return {"one": self.one(x), "scan": run(x, self.stack)[1]}


@nnx.jit
def transformed(model, x):
    """The layer's results under every transform."""
    graph, state = nnx.split(model.one)

    def call(state, x):
        return nnx.merge(graph, state)(x)

    out = {"jit": call(state, x), "remat": jax.checkpoint(call)(state, x), **model(x)}
    out["vmap"] = jax.vmap(call, in_axes=(None, 0))(state, jnp.stack([x, x[::-1]]))
    if jnp.issubdtype(x.dtype, jnp.floating):
        weights = jnp.cos(jnp.arange(out["jit"].size, dtype=jnp.float32)).reshape(
            out["jit"].shape
        )
        out["grad"] = jax.grad(lambda x: jnp.sum(call(state, x) * weights))(x)
    return out


def error(actual, expected):
    """The norm of the error, divided by the norm of the expected numbers."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def model_and_recipe(layer, recipe):
    make, shape = LAYERS[layer]
    model, rng = Both(make), np.random.default_rng(0)
    for _, node in nnx.iter_graph(model):  # normal numbers, adapters too
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
            node.set_value(
                jnp.asarray(0.3 * rng.standard_normal(node.shape), jnp.float32)
            )
    x = (
        jnp.arange(6).reshape(2, 3)
        if shape is None
        else jnp.asarray(rng.standard_normal(shape), jnp.float32)
    )
    rule, bound = RECIPES[recipe]
    rules = [Rule(**rule)]
    if layer == "Param":
        rules = [
            Rule("one/w", **rule, kinds="Param"),
            Rule("stack/w", **rule, kinds="Param", batch=0, contracting=-2),
        ]
    return model, x, Recipe(rules), bound


@pytest.mark.parametrize(("layer", "recipe"), tables.thinned(CASES, DEFAULT))
def test_layer(layer, recipe):
    model, x, rules, bound = model_and_recipe(layer, recipe)
    batches = [x] if "static" in recipe else None
    if (layer, recipe) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[layer, recipe]):
            jaxq.quantize_model(model, rules, calibration=batches)
        return
    q, report = jaxq.quantize_model(model, rules, calibration=batches)
    assert len(report.quantized) >= 1
    expected, actual = transformed(model, x), transformed(q, x)
    errors = {name: error(actual[name], expected[name]) for name in expected}
    if layer == "MultiHeadAttention":  # four products in a row, and a softmax
        bound = 4 * bound
    if layer == "Einsum, experts in turn" and "static" in recipe:
        bound = 1.5 * bound  # under vmap, an expert gets rows of other experts
    assert max(errors.values()) <= bound, errors
    assert min(errors.values()) > 1e-6, "nothing was quantized"
    assert error(q.one(x), actual["jit"]) <= 0.005
    assert error(actual["remat"], actual["jit"]) == 0
    assert error(actual["vmap"][0], actual["jit"]) <= 1e-6 or "per tensor" in recipe
    if recipe in MULTIPLIES_CODES and layer.split(",")[0] in (
        "Linear",
        "LinearGeneral",
        "Einsum",
        "Conv2d",
        "ConvTranspose",
    ):
        noted = any("computes in floats" in row.note for row in report.quantized)
        assert codes_only(q.one, x) != noted  # or the report has a note


def codes_only(layer, x):
    """True if all products of a layer multiply codes by codes."""
    kinds = set()
    for eqn in equations(jax.make_jaxpr(lambda x: layer(x))(x).jaxpr):
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            kinds |= {v.aval.dtype.name for v in eqn.invars}
            assert eqn.outvars[0].aval.dtype.name in ("int32", "float32")
    return bool(kinds) and kinds <= {"int8", "uint8", "float8_e4m3fn"}
