"""Every nnx layer with every kind of recipe.

The reference is the float layer with the dequantized weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxq
from jaxq import QTensor
from jaxq.nn import (
    QConv,
    QConvTranspose,
    QEinsum,
    QEmbed,
    QLinear,
    QLinearGeneral,
    QuantizedParam,
    find_layers,
)
from jaxq.nn.layers import quantize_own_weight
from tests import tables
from tests.arrays import assert_close
from tests.ops.reference import equations

RECIPES = {
    "int8": ("int8", None),
    "int4": ("int4", None),
    "nf4": ("nf4", None),
    "fp8": ("fp8", None),
    "w8a8": ("int8", "int8"),
}


class Attend(nnx.Module):
    """An embedding used as an output head."""

    def __init__(self, rngs, **dtypes):
        self.table = nnx.Embed(6, 40, rngs=rngs, **dtypes)

    def __call__(self, x):
        return self.table.attend(x)


def attention(rngs, **dtypes):
    return nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs, **dtypes)


# name: (layer from rngs, shape of its input; of tokens where the name says so)
COMMON = {
    "linear": (lambda rngs, **d: nnx.Linear(40, 6, rngs=rngs, **d), (3, 40)),
    "qkv": (
        lambda rngs, **d: nnx.LinearGeneral(40, (2, 3), rngs=rngs, **d),
        (2, 3, 40),
    ),
    "einsum": (
        lambda rngs, **d: nnx.Einsum("btd,dhk->bthk", (40, 2, 3), rngs=rngs, **d),
        (2, 3, 40),
    ),
    "conv2d": (
        lambda rngs, **d: nnx.Conv(5, 6, (3, 2), strides=2, rngs=rngs, **d),
        (2, 5, 4, 5),
    ),
    "embed tokens": (lambda rngs, **d: nnx.Embed(6, 40, rngs=rngs, **d), (2, 3)),
    "attention": (attention, (2, 3, 8)),
}
MORE = {
    "attend": (Attend, (2, 40)),
    "output": (
        lambda rngs, **d: nnx.LinearGeneral((2, 20), 6, axis=(-2, -1), rngs=rngs, **d),
        (3, 2, 20),
    ),
    "batched general": (
        lambda rngs, **d: nnx.LinearGeneral(
            40, (2, 3), axis=-1, batch_axis={0: 2}, rngs=rngs, **d
        ),
        (2, 3, 40),
    ),
    "experts": (
        lambda rngs, **d: nnx.Einsum("ebk,ekn->ebn", (2, 40, 6), rngs=rngs, **d),
        (2, 3, 40),
    ),
    "inner experts": (
        lambda rngs, **d: nnx.Einsum("bek,ekn->ben", (2, 40, 6), rngs=rngs, **d),
        (3, 2, 40),
    ),
    "kernel's inner experts": (
        lambda rngs, **d: nnx.Einsum("bek,ken->ben", (40, 2, 6), rngs=rngs, **d),
        (3, 2, 40),
    ),
    "einsum bias": (
        lambda rngs, **d: nnx.Einsum("...d, dn -> ...n", (40, 6), (6,), rngs=rngs, **d),
        (2, 3, 40),
    ),
    "conv1d": (
        lambda rngs, **d: nnx.Conv(5, 6, 3, padding="CAUSAL", rngs=rngs, **d),
        (2, 7, 5),
    ),
    "conv3d": (
        lambda rngs, **d: nnx.Conv(3, 4, (2, 2, 2), use_bias=False, rngs=rngs, **d),
        (1, 3, 3, 3, 3),
    ),
    "conv groups": (
        lambda rngs, **d: nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=rngs, **d),
        (2, 4, 4, 4),
    ),
}
LAYERS = COMMON | MORE
# The other layers take longer to compile, and decode in the same way.
EVERY = ("linear", "qkv", "embed tokens")
CASES = [
    (layer, recipe)
    for layer in LAYERS
    for recipe in (RECIPES if layer in EVERY else ("int4", "w8a8"))
]
# Attention is in the stacks below.
DEFAULT = [
    ("linear", "int4"),
    ("qkv", "nf4"),
    ("embed tokens", "fp8"),
    ("conv groups", "int4"),
]
DEFAULT += [(name, "w8a8") for name in ("conv2d", "attend", "kernel's inner experts")]


def data(name, shape, seed=1):
    rng = np.random.default_rng(seed)
    if "tokens" in name:
        return jnp.asarray(rng.integers(0, 6, shape), jnp.int32)
    return jnp.asarray(np.float32(rng.normal(size=shape)))


def built(make):
    """A layer of normal numbers, biases too. It compiles nothing."""
    model, rng = nnx.eval_shape(lambda: make(nnx.Rngs(0))), np.random.default_rng(0)
    for _, v in nnx.iter_graph(model):
        if isinstance(v, nnx.Variable):
            assert isinstance(v, nnx.Param), "a layer with parameters only"
            value = rng.normal(scale=1 if v.ndim == 1 else 0.2, size=v.shape)
            v.set_value(jnp.asarray(value.astype(v.dtype)))
    return model


def quantize(model, recipe):
    weight, activation = RECIPES[recipe]
    return jaxq.quantize_model(
        model, jaxq.Recipe([jaxq.Rule(weight=weight, activation=activation)])
    )[0]


def rounded(x, contracting, batch=()):
    """x rounded as int8 activations are. The gradient passes straight through."""
    back = jaxq.dequantize(
        jaxq.quantize(
            lax.stop_gradient(x), "int8", contracting=contracting, batch=batch
        )
    )
    return x + lax.stop_gradient(back - x)


def dot_of_rounded(x, w, dims, **kwargs):
    return lax.dot_general(rounded(x, dims[0][0], dims[1][0]), w, dims)


def einsum_of_rounded(text, x, w, **kwargs):
    left, right = text.split("->")[0].split(",")
    out = text.split("->")[1]
    contracting = [
        i - len(left) for i, a in enumerate(left) if a in right and a not in out
    ]
    # Each index of the other axes, batch or not, has its own scale.
    return jnp.einsum(text, rounded(x, tuple(contracting)), w)


def conv_of_rounded(x, w, *args, out_sharding=None, **kwargs):
    return lax.conv_general_dilated(
        rounded(x, tuple(range(1, x.ndim))), w, *args, **kwargs
    )


class RoundedAttend(Attend):
    def __call__(self, x):
        return rounded(x, (1,)) @ self.table.embedding[...].T


def reference(model, q, recipe):
    """The float model with the dequantized weights.

    If the recipe quantizes activations, its products round their input.
    """
    model = nnx.clone(model)
    for (_, layer, kind), (_, qlayer, _) in zip(
        find_layers(model), find_layers(q), strict=True
    ):
        weight = getattr(qlayer, kind.weight).get_value()
        assert isinstance(weight, QTensor)
        getattr(layer, kind.weight).set_value(
            jaxq.dequantize(weight.with_activation(None))
        )
        if RECIPES[recipe][1]:
            hooks = {
                "Conv": ("conv_general_dilated", conv_of_rounded),
                "Einsum": ("einsum_op", einsum_of_rounded),
            }
            if kind.name != "Embed":
                setattr(layer, *hooks.get(kind.name, ("dot_general", dot_of_rounded)))
    if RECIPES[recipe][1] and isinstance(model, Attend):
        model.__class__ = RoundedAttend
    return model


def assert_close_and_nonzero(actual, expected, bound=1e-5):
    """As `assert_close`, and the expected numbers are not all near zero."""
    assert np.abs(np.asarray(expected, np.float64)).max() > 0.01
    assert_close(np.asarray(actual), np.asarray(expected), bound)


@nnx.jit
def value_and_grad(model, x):
    def loss(x):
        y = model(x)
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(y.astype(jnp.float32) * weights), y

    if jnp.issubdtype(x.dtype, jnp.integer):
        return loss(x)[1], None
    grad, y = jax.grad(loss, has_aux=True)(x)
    return y, grad


@pytest.mark.parametrize(("name", "recipe"), tables.thinned(CASES, DEFAULT))
def test_output_and_gradient(name, recipe):
    make, shape = LAYERS[name]
    model, x = built(make), data(name, shape)
    q = quantize(model, recipe)
    y, grad = value_and_grad(q, x)
    wanted, wanted_grad = value_and_grad(reference(model, q, recipe), x)
    # Inside attention, activations differ in the last bit and may get another code.
    bound = 0.02 if (name, recipe) == ("attention", "w8a8") else 1e-5
    assert_close_and_nonzero(y, wanted, bound)
    if grad is not None:
        assert_close_and_nonzero(grad, wanted_grad, bound)


@pytest.mark.parametrize(
    "name",
    tables.thinned(["linear", "einsum", "conv2d", "embed tokens"], ["linear"]),
)
def test_plain_call_is_the_jitted_one(name):
    make, shape = LAYERS[name]
    q, x = quantize(built(make), "int8"), data(name, shape)
    assert_close_and_nonzero(q(x), value_and_grad(q, x)[0], 1e-6)


# Stacked layers.


def stacked(make, num=3):
    return built(nnx.split_rngs(splits=num)(nnx.vmap(make, in_axes=0, out_axes=0)))


@nnx.jit
def by_nnx_scan(layers, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(x, layer):
        return x, layer(x)

    return run(x, layers)[1]


@nnx.jit
def by_lax_scan(layers, x):
    graph, state = nnx.split(layers)
    return lax.scan(lambda x, s: (x, nnx.merge(graph, s)(x)), x, state)[1]


@nnx.jit
def by_vmap(layers, x):
    return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)


STACKED = [(name, "int4", by_nnx_scan) for name in COMMON if name != "attention"]
STACKED += [(name, "w8a8", by_lax_scan) for name in COMMON if name != "conv2d"]
STACKED += [
    ("linear", "nf4", by_nnx_scan),
    ("linear", "fp8", by_lax_scan),
    ("linear", "int8", by_vmap),
]


FEW = [
    ("embed tokens", "int4", by_nnx_scan),
    ("attention", "w8a8", by_lax_scan),
    ("linear", "int8", by_vmap),
]


@pytest.mark.parametrize(("name", "recipe", "run"), tables.thinned(STACKED, FEW))
def test_stacked_layers_scan(name, recipe, run):
    make, shape = LAYERS[name]
    layers, x = stacked(make), data(name, shape)
    q = quantize(layers, recipe)
    wanted = run(reference(layers, q, recipe), x)
    assert_close_and_nonzero(
        run(q, x), wanted, 0.02 if (name, recipe) == ("attention", "w8a8") else 1e-5
    )


def test_stacked_statistics_are_each_layers_own():
    layers = stacked(COMMON["linear"][0])
    layers.kernel.set_value(
        layers.kernel[...] * np.float32([1, 100, 0.01]).reshape(3, 1, 1)
    )
    q = quantize(layers, "int4")
    for i in range(3):
        alone = jaxq.quantize(layers.kernel[...][i], "int4")
        jax.tree.map(np.testing.assert_array_equal, q.kernel[...][i], alone)


def test_stacked_twice():
    def row(rngs):
        return nnx.vmap(COMMON["linear"][0], in_axes=0, out_axes=0)(rngs)

    build = nnx.split_rngs(splits=2)(
        nnx.vmap(nnx.split_rngs(splits=3)(row), in_axes=0, out_axes=0)
    )
    layers = built(build)
    q = quantize(layers, "int8")
    assert q.kernel[...].batch_shape == layers.kernel[...].shape[:2] == (2, 3)
    inner = jax.tree.map(lambda leaf: leaf[1], nnx.state(q))
    one = nnx.merge(nnx.graphdef(q), inner)
    x = data("", (2, 40))
    wanted = np.einsum("bk,lkn->lbn", x, np.asarray(jaxq.dequantize(q.kernel[...]))[1])
    assert_close_and_nonzero(
        by_lax_scan(one, x), wanted + np.asarray(one.bias[...])[:, None]
    )


# Dtypes.

DTYPES = [
    {"param_dtype": jnp.bfloat16},
    {"dtype": jnp.bfloat16},
    {"dtype": jnp.float32, "param_dtype": jnp.bfloat16},
    {"dtype": jnp.float16, "param_dtype": jnp.float32},
]


@pytest.mark.parametrize(
    "dtypes",
    tables.thinned(DTYPES, DTYPES[:1]),
    ids=lambda d: "-".join(f"{k}={v.dtype.name}" for k, v in d.items()),
)
def test_results_have_the_float_layers_dtype(dtypes):
    for name, (make, shape) in LAYERS.items():
        if name == "attention":
            continue  # flax's own product of queries and keys needs promotion
        x = data(name, shape)
        if "dtype" not in dtypes and "tokens" not in name:
            x = x.astype(jnp.bfloat16)
        for recipe in ("int8", "w8a8"):

            def outputs(make=make, recipe=recipe, x=x):
                model = make(nnx.Rngs(0), **dtypes)
                y = model(x)
                for _, layer, _ in find_layers(model):
                    quantize_own_weight(layer, *RECIPES[recipe])
                return y, model(x)

            plain, got = nnx.eval_shape(outputs)
            assert (got.shape, got.dtype) == (plain.shape, plain.dtype), name


NARROW = [
    (name, recipe) for name in ("linear", "embed tokens") for recipe in ("int4", "w8a8")
]


@pytest.mark.parametrize(
    ("name", "recipe"),
    tables.thinned(NARROW, [("linear", "w8a8")]),
)
def test_bfloat16_layers_are_near_the_float32_ones(name, recipe):
    make, shape = LAYERS[name]
    q = quantize(built(lambda rngs: make(rngs, param_dtype=jnp.bfloat16)), recipe)
    wide = reference(built(make), q, "int4")
    for _, layer, kind in find_layers(wide):
        # The weight was dequantized in bfloat16.
        weight = getattr(layer, kind.weight)
        weight.set_value(weight[...].astype(jnp.float32))
    x = data(name, shape)
    low = x if x.dtype == jnp.int32 else x.astype(jnp.bfloat16)
    y = value_and_grad(q, low)[0]
    assert y.dtype == jnp.bfloat16
    assert_close_and_nonzero(
        y,
        value_and_grad(wide, low if x.dtype == jnp.int32 else low.astype(jnp.float32))[
            0
        ],
        0.03,
    )


# What the compiler sees.


def dots(fn, *args):
    """(lhs, rhs, result, preferred) dtypes of every product in fn's jaxpr."""
    dtypes = []
    for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            preferred = eqn.params["preferred_element_type"]
            names = [v.aval.dtype.name for v in (*eqn.invars, *eqn.outvars)]
            dtypes.append(
                (*names, None if preferred is None else jnp.dtype(preferred).name)
            )
    return dtypes


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "qkv",
        "output",
        "batched general",
        "einsum",
        "experts",
        "inner experts",
        "conv2d",
    ],
)
def test_w8a8_multiplies_codes(name):
    make, shape = LAYERS[name]
    q = quantize(built(make), "w8a8")
    assert set(dots(q, data(name, shape))) == {("int8", "int8", "int32", "int32")}


def test_bfloat16_products_accumulate_in_float32():
    bf16 = {"param_dtype": jnp.bfloat16, "weight": None}
    layers = [
        (lambda rngs: QLinear(40, 6, rngs=rngs, **bf16), (2, 40)),
        (lambda rngs: QLinearGeneral(40, (2, 3), rngs=rngs, **bf16), (2, 40)),
        (lambda rngs: QEinsum("bd,dn->bn", (40, 6), rngs=rngs, **bf16), (2, 40)),
        (lambda rngs: QConv(5, 6, (3,), rngs=rngs, **bf16), (2, 6, 5)),
        (lambda rngs: QConvTranspose(5, 6, (3,), rngs=rngs, **bf16), (2, 6, 5)),
    ]
    for make, shape in layers:
        layer = built(make)
        x = jnp.ones(shape, jnp.bfloat16)
        assert dots(layer, x) == [("bfloat16", "bfloat16", "float32", "float32")], type(
            layer
        )
        assert jax.eval_shape(layer, x).dtype == jnp.bfloat16
    table = built(lambda rngs: QEmbed(6, 40, rngs=rngs, **bf16))
    assert dots(table.attend, jnp.ones((2, 40), jnp.bfloat16)) == [
        ("bfloat16", "bfloat16", "float32", "float32")
    ]


@pytest.mark.parametrize("layer", [QConv, QConvTranspose])
def test_masked_convolutions_stay_in_floats(layer):
    mask = jnp.ones((3, 5, 6)).at[0].set(0)
    with pytest.raises(ValueError, match="mask= needs weight=None"):
        layer(5, 6, (3,), mask=mask, rngs=nnx.Rngs(0))
    x, plain = (
        jnp.ones((2, 6, 5)),
        {QConv: nnx.Conv, QConvTranspose: nnx.ConvTranspose}[layer],
    )
    y = layer(5, 6, (3,), mask=mask, weight=None, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(
        y, plain(5, 6, (3,), mask=mask, rngs=nnx.Rngs(0))(x), rtol=1e-5, atol=1e-6
    )


def test_a_table_of_one_row_returns_it_for_every_index():
    layer = quantize(built(lambda rngs: nnx.Embed(1, 40, rngs=rngs)), "int8")
    rows = layer(jnp.asarray([0, 3]))
    assert (rows[0] == rows[1]).all()
    assert np.isfinite(rows).all()


def test_weight_only_products_accumulate_in_float32():
    layer = QLinear(40, 6, weight="int4", param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    products = dots(layer, jnp.ones((2, 40), jnp.bfloat16))
    assert products
    assert {result for _, _, result, _ in products} == {"float32"}


# Layers that are quantized from the start.


@pytest.mark.parametrize(
    ("explicit", "plain"),
    [
        (lambda **k: QLinear(40, 6, **k), lambda **k: nnx.Linear(40, 6, **k)),
        (
            lambda **k: QLinearGeneral(40, (2, 3), **k),
            lambda **k: nnx.LinearGeneral(40, (2, 3), **k),
        ),
        (
            lambda **k: QEinsum("bd,dn->bn", (40, 6), **k),
            lambda **k: nnx.Einsum("bd,dn->bn", (40, 6), **k),
        ),
        (lambda **k: QConv(5, 6, (3,), **k), lambda **k: nnx.Conv(5, 6, (3,), **k)),
        (lambda **k: QEmbed(6, 40, **k), lambda **k: nnx.Embed(6, 40, **k)),
    ],
    ids=["QLinear", "QLinearGeneral", "QEinsum", "QConv", "QEmbed"],
)
def test_explicit_layers_have_the_weights_of_quantize_model(explicit, plain):
    layer, q = (
        explicit(weight="int8", rngs=nnx.Rngs(3)),
        quantize(plain(rngs=nnx.Rngs(3)), "int8"),
    )
    leaves, qleaves = jax.tree.leaves(nnx.state(layer)), jax.tree.leaves(nnx.state(q))
    assert len(leaves) == len(qleaves)
    assert all((a == b).all() for a, b in zip(leaves, qleaves, strict=True))
    assert [
        type(v) for _, v in nnx.iter_graph(layer) if isinstance(v, QuantizedParam)
    ] == [QuantizedParam]


def test_explicit_layer_with_activation_needs_weight():
    with pytest.raises(
        ValueError, match="QLinear: activation='int8' needs a quantized weight="
    ):
        QLinear(4, 4, weight=None, activation="int8", rngs=nnx.Rngs(0))


def test_explicit_embed_of_floats():
    layer = QEmbed(6, 40, weight=None, rngs=nnx.Rngs(0))
    assert layer(jnp.asarray([1, 2])).shape == (2, 40)
    assert layer.attend(jnp.ones((2, 40))).shape == (2, 6)


def test_out_of_range_tokens_are_nan_as_in_flax():
    model = built(lambda rngs: nnx.Embed(6, 40, rngs=rngs))
    tokens = jnp.asarray([0, 7])
    for layer in (model, quantize(model, "int8")):
        assert np.isnan(np.asarray(layer(tokens))).all(axis=1).tolist() == [False, True]


def test_equal_hooks_compare_equal():
    a, b = (quantize(nnx.Linear(40, 6, rngs=nnx.Rngs(seed)), "int8") for seed in (0, 1))
    assert a.promote_dtype == b.promote_dtype
    assert hash(a.promote_dtype) == hash(b.promote_dtype)
    assert a.dot_general is b.dot_general
    assert nnx.graphdef(a) == nnx.graphdef(b)
