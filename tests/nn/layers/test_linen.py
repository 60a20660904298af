"""Every linen layer, under every transform, with every kind of recipe.

The reference is the float layer with the dequantized weight.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import lax

import jaxq
from jaxq import QTensor
from jaxq.nn.linen import (
    QConv,
    QConvTranspose,
    QDense,
    QDenseGeneral,
    QEinsum,
    QEmbed,
    Quantized,
    quantize_model,
)
from tests import tables
from tests.nn.layers.test_nnx import assert_close_and_nonzero, dots, rounded

RECIPES = {
    "int8": {"weight": "int8"},
    "int4 g32": {
        "weight": jaxq.QuantSpec(format="int4", granularity=jaxq.PerGroup(size=32))
    },
    "nf4": {"weight": "nf4"},
    "fp8": {"weight": "fp8"},
    "w8a8": {"weight": "int8", "activation": "int8"},
    "w8a8 static": {"weight": "int8", "activation": "int8", "observer": "absmax"},
}


class Attend(nn.Module):
    """An embedding used as an output head."""

    table_cls: type = nn.Embed

    def setup(self):
        self.table = self.table_cls(6, 64)

    def __call__(self, x):
        return self.table.attend(x)


class Lookup(nn.Module):
    """A lookup. It makes tokens of its input, so that all layers here take floats."""

    @nn.compact
    def __call__(self, x):
        return nn.Embed(6, 64)(jnp.abs(x).astype(jnp.int32))


# The same layers with rounded activations.


class _Limit:
    """The limits of a static range, one for each element of the batch.

    It is a field of modules, which must be hashable, so it is not an array.
    """

    def __init__(self, values):
        self.values = np.asarray(values)


def rounded_by(limit, x, *axes):
    """x rounded as int8 activations are: a scale for each row, or one limit."""
    if limit is None:
        return rounded(x, *axes)
    # A layer with batch axes has a limit for each leading element. A stack that reads
    # one input has the same limit for all of its elements.
    limit = limit.values[0] if limit.values.ndim == 2 else limit.values
    limit = (
        limit.max()
        if limit.shape != x.shape[:1]
        else limit.reshape(-1, *(1 for _ in x.shape[1:]))
    )
    clipped = lax.stop_gradient(jnp.clip(x, -limit, limit))  # no gradient outside
    inside = jnp.where(jnp.abs(x) <= limit, x, clipped)
    return inside + lax.stop_gradient(
        jnp.round(inside * (127 / limit)) * (limit / 127) - inside
    )


def dot_of_rounded(x, w, dims, limit=None, **kwargs):
    return lax.dot_general(rounded_by(limit, x, dims[0][0], dims[1][0]), w, dims)


def conv_of_rounded(x, w, *args, limit=None, **kwargs):
    return lax.conv_general_dilated(
        rounded_by(limit, x, tuple(range(1, x.ndim))), w, *args, **kwargs
    )


class RoundedEinsum(nn.Einsum):
    limit: object = None

    def __call__(self, x):
        left, right = self.einsum_str.split("->")[0].split(",")
        summed = [
            i - len(left)
            for i, c in enumerate(left)
            if c in right and c not in self.einsum_str.split("->")[1]
        ]
        return super().__call__(rounded_by(self.limit, x, tuple(summed)))


class RoundedTranspose(nn.ConvTranspose):
    limit: object = None

    def __call__(self, x):
        return super().__call__(rounded_by(self.limit, x, tuple(range(1, x.ndim))))


class RoundedEmbed(nn.Embed):
    def attend(self, query):
        return super().attend(rounded(query, (query.ndim - 1,)))


DOT, CONV = {"dot_general": dot_of_rounded}, {"conv_general_dilated": conv_of_rounded}
ATTENTION = {"qkv_dot_general": dot_of_rounded, "out_dot_general": dot_of_rounded}
# name: (class, fields, shape of the input, class and fields with rounded activations)
COMMON = {
    "dense": (nn.Dense, {"features": 6}, (3, 64), None, DOT),
    "qkv": (nn.DenseGeneral, {"features": (2, 3)}, (2, 3, 64), None, DOT),
    "einsum": (
        nn.Einsum,
        {"shape": (64, 2, 3), "einsum_str": "btd,dhk->bthk"},
        (2, 3, 64),
        RoundedEinsum,
        {},
    ),
    "conv": (
        nn.Conv,
        {"features": 6, "kernel_size": (3, 2), "strides": 2},
        (2, 5, 4, 16),
        None,
        CONV,
    ),
    "lookup": (Lookup, {}, (2, 3), None, {}),
    "attention": (
        nn.MultiHeadDotProductAttention,
        {"num_heads": 2},
        (2, 3, 64),
        None,
        ATTENTION,
    ),
}
MORE = {
    "attend": (Attend, {}, (2, 64), None, {"table_cls": RoundedEmbed}),
    "output": (
        nn.DenseGeneral,
        {"features": 6, "axis": (-2, -1)},
        (3, 2, 32),
        None,
        DOT,
    ),
    "batched": (
        nn.DenseGeneral,
        {"features": (2, 3), "batch_dims": (0,)},
        (2, 3, 64),
        None,
        DOT,
    ),
    "experts": (
        nn.Einsum,
        {"shape": (2, 64, 6), "einsum_str": "ebk,ekn->ebn"},
        (2, 3, 64),
        RoundedEinsum,
        {},
    ),
    "wide conv": (
        nn.Conv,
        {
            "features": 6,
            "kernel_size": (3,),
            "padding": "CIRCULAR",
            "feature_group_count": 2,
        },
        (2, 7, 64),
        None,
        CONV,
    ),
    "transpose": (
        nn.ConvTranspose,
        {
            "features": 6,
            "kernel_size": (3, 2),
            "strides": (2, 1),
            "transpose_kernel": True,
        },
        (2, 4, 3, 16),
        RoundedTranspose,
        {},
    ),
}
LAYERS = COMMON | MORE
USES = ("plain", "jit", "scan", "vmap", "remat", "grad")


class Scan(nn.Module):
    """Three layers under `nn.scan`, each on the same input."""

    cls: type
    fields: tuple

    @nn.compact
    def __call__(self, x):
        def body(layer, carry, _):
            return carry, layer(x)

        run = nn.scan(
            body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return run(self.cls(**dict(self.fields), name="layer"), (), None)[1]


def module_of(use, cls, fields):
    if use == "scan":
        return Scan(cls, tuple(fields.items()))
    if use == "vmap":
        cls = nn.vmap(
            cls,
            in_axes=None,
            out_axes=0,
            axis_size=3,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
    if use in ("jit", "remat"):
        cls = {"jit": nn.jit, "remat": nn.remat}[use](cls)
    return cls(**fields)


def built(module, x, dtype=None):
    """Variables of normal numbers, biases too. It compiles nothing."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(
        lambda v: jnp.asarray(
            rng.normal(scale=0.2, size=v.shape).astype(dtype or v.dtype)
        ),
        shapes,
    )


def everything(recipe):
    return jaxq.Recipe([jaxq.Rule(**RECIPES[recipe])])


def is_qt(v):
    return isinstance(v, QTensor)


@jax.jit
def in_floats(variables):
    """Variables with dequantized QTensors."""
    return jax.tree.map(
        lambda v: jaxq.dequantize(v.with_activation(None)) if is_qt(v) else v,
        variables,
        is_leaf=is_qt,
    )


def in_range(cls, fields, variables):
    """Fields of a layer with rounded activations, in the static range of its QTensor.

    Without a static range the fields stay as they are.
    """
    ranges = {
        key[-2] if key[1:] else "": v.input_range
        for key, v in flatten_dict(variables["params"]).items()
        if is_qt(v)
    }
    if any(v is None for v in ranges.values()):
        return fields
    limits = {name: _Limit(jnp.abs(v).max(-1)) for name, v in ranges.items()}
    if cls is not None:
        return {"limit": next(iter(limits.values()))}
    # The projections of attention read one input, except the last projection.
    return {
        name: functools.partial(
            fn, limit=limits.get(name.split("_")[0], next(iter(limits.values())))
        )
        for name, fn in fields.items()
    }


def value(module, variables, x):
    return module.apply(variables, x), None


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(module, variables, x):
    def loss(x):
        y = module.apply(variables, x)
        return jnp.sum(
            y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        ), y

    grad, y = jax.grad(loss, has_aux=True)(x)
    return y, grad


CASES = [(layer, recipe, use) for layer in LAYERS for recipe in RECIPES for use in USES]
# Each recipe and each transform. Attention is in tests/nn/transform/test_linen.py.
DEFAULT = [("dense", "w8a8", use) for use in USES]
DEFAULT += [
    ("conv", "int8", "scan"),
    ("output", "int4 g32", "grad"),
    ("attend", "w8a8", "grad"),
]
DEFAULT += [("qkv", recipe, "grad") for recipe in ("nf4", "fp8")]
DEFAULT += [(layer, "w8a8 static", "grad") for layer in ("einsum", "transpose")]
DEFAULT += [("dense", "w8a8 static", "scan"), ("lookup", "w8a8 static", "plain")]
DEFAULT += [("lookup", "int4 g32", "scan"), ("experts", "w8a8", "vmap")]


# The largest allowed error of the outputs, relative to the largest float output.
FLOAT_BOUNDS = {
    "int8": 0.03,
    "int4 g32": 0.3,
    "nf4": 0.3,
    "fp8": 0.1,
    "w8a8": 0.05,
    "w8a8 static": 0.08,
}


@pytest.mark.parametrize(
    ("name", "recipe", "use"), tables.thinned(CASES, dict.fromkeys(DEFAULT))
)
def test_output_and_gradient(name, recipe, use):
    cls, fields, shape, rounded_cls, rounded_fields = LAYERS[name]
    module, x = (
        module_of(use, cls, fields),
        jnp.asarray(np.float32(np.random.default_rng(1).normal(size=shape))),
    )
    variables = built(module, x)
    data = {"calibration": [x]} if recipe == "w8a8 static" else {"example": x}
    # Under vmap, the last input of attention is mapped over.
    hidden = use in ("jit", "scan", "remat") or (name, use) == ("attention", "vmap")
    if data.get("calibration") and (name in ("lookup", "attend") or hidden):
        refused = (
            "its input cannot be observed"
            if name in ("lookup", "attend")
            else r"is inside nn\.scan, nn\.remat"
        )
        with pytest.raises(ValueError, match=refused):
            quantize_model(module, variables, everything(recipe), **data)
        return
    qmodule, qvariables, report = quantize_model(
        module, variables, everything(recipe), **data
    )
    assert len(report.quantized) == (4 if name == "attention" else 1)
    compiled = functools.partial(jax.jit, static_argnums=0)(value)
    run = {"plain": value, "jit": value, "scan": compiled, "vmap": compiled}.get(
        use, value_and_grad
    )
    y, grad = run(qmodule, qvariables, x)
    assert_close_and_nonzero(y, run(module, variables, x)[0], FLOAT_BOUNDS[recipe])
    if "activation" in RECIPES[recipe]:
        module = module_of(
            use,
            rounded_cls or cls,
            fields | in_range(rounded_cls, rounded_fields, qvariables),
        )
    wanted, wanted_grad = run(module, in_floats(qvariables), x)
    if use == "jit":
        assert_close_and_nonzero(jax.jit(qmodule.apply)(qvariables, x), y, 1e-6)
    # Inside attention, activations differ in the last bit and may get another code.
    bound = 0.02 if name == "attention" and "activation" in RECIPES[recipe] else 1e-5
    assert_close_and_nonzero(y, wanted, bound)
    if grad is not None and name != "lookup":
        assert_close_and_nonzero(grad, wanted_grad, bound)


@pytest.mark.parametrize(
    "name", [name for name in LAYERS if name not in ("lookup", "attention")]
)
def test_w8a8_multiplies_codes(name):
    cls, fields, shape, *_ = LAYERS[name]
    module, x = cls(**fields), jnp.ones(shape)
    qmodule, qvariables, _ = quantize_model(
        module, built(module, x), everything("w8a8"), example=x
    )
    assert set(dots(qmodule.apply, qvariables, x)) == {
        ("int8", "int8", "int32", "int32")
    }


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
    explicit = {
        nn.Dense: QDense,
        nn.DenseGeneral: QDenseGeneral,
        nn.Einsum: QEinsum,
        nn.Conv: QConv,
        nn.ConvTranspose: QConvTranspose,
    }
    for cls, fields, shape, *_ in LAYERS.values():
        if cls not in explicit:
            continue
        x = jnp.ones(shape, jnp.float32 if "dtype" in dtypes else jnp.bfloat16)
        plain = jax.eval_shape(
            lambda cls=cls, x=x, f=fields: cls(**f, **dtypes).init_with_output(
                jax.random.key(0), x
            )
        )
        for activation in (None, "int8"):
            layer = explicit[cls](**fields, **dtypes, activation=activation)
            got = jax.eval_shape(
                lambda x=x, layer=layer: layer.init_with_output(jax.random.key(0), x)
            )
            assert (got[0].shape, got[0].dtype) == (plain[0].shape, plain[0].dtype), cls
            assert (
                got[1]["params"]["kernel"].dtype == plain[1]["params"]["kernel"].dtype
            )


def test_precision_and_promote_dtype_fields_are_kept():
    def promote(*arrays, dtype=None, inexact=True):
        assert dtype == jnp.float32
        return [None if a is None else a.astype(jnp.float32) for a in arrays]

    module = nn.Dense(6, precision="highest", dtype=jnp.float32, promote_dtype=promote)
    x = jnp.ones((2, 64), jnp.bfloat16)
    variables = built(module, x, jnp.bfloat16)
    qmodule, qvariables, _ = quantize_model(module, variables, "int8", example=x)
    y = qmodule.apply(qvariables, x)
    assert y.dtype == jnp.float32
    kernel = jaxq.dequantize(qvariables["params"]["kernel"], dtype=jnp.float32)
    assert_close_and_nonzero(
        y,
        x.astype(jnp.float32) @ kernel
        + variables["params"]["bias"].astype(jnp.float32)[None],
    )


# Layers that are quantized from the start.

EXPLICIT = {
    "dense": (QDense, nn.Dense, {"features": 6}, (2, 64)),
    "general": (
        QDenseGeneral,
        nn.DenseGeneral,
        {"features": (2, 3), "batch_dims": (0,)},
        (2, 3, 64),
    ),
    "einsum": (
        QEinsum,
        nn.Einsum,
        {"shape": (64, 6), "einsum_str": "...d, dn->...n"},
        (2, 64),
    ),
    "conv": (
        QConv,
        nn.Conv,
        {"features": 6, "kernel_size": (3,), "use_bias": False},
        (2, 6, 16),
    ),
    "transpose": (
        QConvTranspose,
        nn.ConvTranspose,
        {"features": 6, "kernel_size": (3,)},
        (2, 6, 16),
    ),
    "embed": (QEmbed, nn.Embed, {"num_embeddings": 6, "features": 64}, (2,)),
}


@pytest.mark.parametrize("name", tables.thinned(EXPLICIT, list(EXPLICIT)[::2]))
def test_explicit_layers_have_the_weights_of_quantize_model(name):
    explicit, plain, fields, shape = EXPLICIT[name]
    x = jnp.ones(shape, jnp.int32 if name == "embed" else jnp.float32)
    layer, module = explicit(**fields, weight="int4"), plain(**fields)
    variables = layer.init(jax.random.key(0), x)
    recipe = jaxq.Recipe([jaxq.Rule(weight="int4")])
    original = module.init(jax.random.key(0), x)
    qmodule, qvariables, _ = quantize_model(module, original, recipe, example=x)
    assert jax.tree.structure(variables) == jax.tree.structure(qvariables)
    jax.tree.map(np.testing.assert_array_equal, variables, qvariables)
    np.testing.assert_array_equal(
        layer.apply(variables, x), qmodule.apply(qvariables, x)
    )
    np.testing.assert_array_equal(
        layer.apply(qvariables, x), qmodule.apply(variables, x)
    )
    floats = explicit(**fields, weight=None)
    np.testing.assert_array_equal(floats.apply(original, x), module.apply(original, x))


def test_explicit_layers_stack():
    layers = nn.vmap(
        QDense,
        in_axes=None,
        out_axes=0,
        axis_size=3,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )(6, activation="int8")
    x = jnp.ones((2, 64))
    variables = layers.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    assert kernel.shape == (3, 64, 6)
    wanted = jnp.stack([x @ kernel[i] for i in range(3)])
    assert_close_and_nonzero(layers.apply(variables, x), wanted, 1e-6)


def test_explicit_layers_refuse_floats_and_other_shapes():
    x, dense = jnp.ones((2, 8)), nn.Dense(8)
    floats = dense.init(jax.random.key(0), x)
    with pytest.raises(
        TypeError,
        match=r"QDense: kernel is float32\[8, 8\], not a QTensor\. Pass jaxq\.quantize",
    ):
        QDense(8).apply(floats, x)
    stack = {"params": {"kernel": jnp.ones((2, 8, 8)), "bias": jnp.ones((2, 8))}}
    with pytest.raises(TypeError, match=r"batch=\(0,\)"):
        QDenseGeneral(8, batch_dims=(0,)).apply(stack, x)
    other = QDense(4).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"expected the shape \[8, 8\]"):
        QDense(8).apply(other, x)
    with pytest.raises(ValueError, match="activation='int8' needs a quantized weight="):
        QDense(8, weight=None, activation="int8").init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="its dot_general is a custom function"):
        QDense(8, dot_general=lambda *a, **k: None).init(jax.random.key(0), x)


def test_explicit_layers_accept_boxed_initializers():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer, x = QDense(8, kernel_init=init), jnp.ones((2, 64))
    variables = layer.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    assert kernel.box.names == (None, "model")
    assert isinstance(kernel.value, QTensor)
    y = layer.apply(nn.unbox(variables), x)
    np.testing.assert_array_equal(layer.apply(variables, x), y)


def test_out_of_range_tokens_are_nan_as_in_flax():
    tokens = jnp.asarray([0, 7, -1, -8])
    for num in (6, 1):
        layer = nn.Embed(num, 64)
        embedding = jnp.asarray(np.ones((num, 64), np.float32))
        variables = {"params": {"embedding": embedding}}
        table = {
            "params": {"embedding": jaxq.quantize(embedding, "int8", contracting=-1)}
        }
        wanted = np.isnan(layer.apply(variables, tokens))
        np.testing.assert_array_equal(
            np.isnan(Quantized(layer).apply(table, tokens)), wanted
        )


def test_bfloat16_products_accumulate_in_float32():
    x = jnp.ones((2, 64), jnp.bfloat16)
    layer = QDense(8, weight=None, param_dtype=jnp.bfloat16)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert dots(layer.apply, variables, x) == [
        ("bfloat16", "bfloat16", "float32", "float32")
    ]
