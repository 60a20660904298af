"""Weights that change between the variables and the product are refused."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.linen.dtypes import promote_dtype
from flax.nnx.nn import dtypes

import jaxq
from jaxq import Recipe, Rule
from jaxq.nn.layers._weight_marks import changed_weights, mark
from jaxq.nn.linen import quantize_model
from tests.arrays import normal

ALL = Recipe([Rule(weight="int8")])
X, TOKENS, IMAGE = normal(2, 8), jnp.arange(2), normal(1, 4, 4, 8)


def standardized(layer_cls):
    """A subclass that overrides `param`, as weight standardization does."""

    class Standardized(layer_cls):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            return 2 * value if name in ("kernel", "embedding") else value

    return Standardized


def changing(function):
    """A `promote_dtype` of linen that changes the weight."""

    def promote(*arrays, **kwargs):
        promoted = list(promote_dtype(*arrays, **kwargs))
        position = min(1, len(promoted) - 1)
        promoted[position] = function(promoted[position])
        return promoted

    return promote


doubling = changing(lambda w: 2 * w)
# Functions that change only some magnitudes.
PARTIAL = {
    "prune": lambda w: jnp.where(jnp.abs(w) < 0.1, 0, w),
    "prune tiny": lambda w: jnp.where(jnp.abs(w) < 1e-8, 0, w),
    "clip": lambda w: jnp.clip(w, -9, 9),
    "clip large": lambda w: jnp.clip(w, -1e5, 1e5),
    "band": lambda w: jnp.where((jnp.abs(w) > 0.02) & (jnp.abs(w) < 0.1), 0, w),
}


def casting(*arrays, **kwargs):
    return promote_dtype(*arrays, **kwargs)


LINEN = {
    "Dense": (nn.Dense, (4,), X),
    "DenseGeneral": (nn.DenseGeneral, (4,), X),
    "Einsum": (nn.Einsum, ((8, 4), "bi,io->bo"), X),
    "Conv": (nn.Conv, (4, (2, 2)), IMAGE),
    "ConvTranspose": (nn.ConvTranspose, (4, (2, 2)), IMAGE),
    "Embed": (nn.Embed, (4, 8), TOKENS),
}


def refusal(module, x):
    """The error of `quantize_model` for a module with one layer."""
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="cannot be quantized") as error:
        quantize_model(module, variables, ALL, example=x)
    return str(error.value)


@pytest.mark.parametrize("name", LINEN)
def test_a_subclass_that_overrides_param_is_refused(name):
    layer_cls, args, x = LINEN[name]
    text = refusal(standardized(layer_cls)(*args), x)
    assert f"({name})" in text
    assert "is changed before the layer multiplies by it" in text


@pytest.mark.parametrize("name", LINEN)
def test_a_promote_dtype_that_changes_the_weight_is_refused(name):
    layer_cls, args, x = LINEN[name]
    text = refusal(layer_cls(*args, promote_dtype=doubling), x)
    assert "is changed before the layer multiplies by it" in text
    module = layer_cls(*args, promote_dtype=casting)
    variables = module.init(jax.random.key(0), x)
    assert len(quantize_model(module, variables, ALL, example=x)[2].quantized) == 1


@pytest.mark.parametrize("name", PARTIAL)
def test_a_change_of_some_magnitudes_is_refused(name):
    function = PARTIAL[name]
    text = refusal(nn.Dense(4, promote_dtype=changing(function)), X)
    assert "is changed before the layer multiplies by it" in text

    class Overriding(nn.Dense):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            return function(value) if name == "kernel" else value

    assert "is changed before" in refusal(Overriding(4), X)

    def promote(arrays, **kwargs):
        return tuple(changing(function)(*arrays, **kwargs))

    for kind in ("Linear", "LinearGeneral", "Einsum"):
        with pytest.raises(ValueError, match="its promote_dtype changes its kernel"):
            jaxq.quantize_model(NNX[kind](promote_dtype=promote), ALL)


def mapped(function):
    return nn.map_variables(
        nn.Dense,
        "params",
        trans_in_fn=lambda params: jax.tree.map(function, params),
        mutable=True,
    )(8, use_bias=False)


@pytest.mark.parametrize(
    "function",
    [
        lambda w: 2 * w,
        jnp.negative,
        jnp.triu,
        jnp.sign,
        jnp.transpose,
        lambda w: w[::-1],
        lambda w: w.astype(jnp.float8_e4m3fn).astype(w.dtype),
    ],
)
def test_map_variables_that_changes_the_weight_is_refused(function):
    assert "is changed before" in refusal(mapped(function), X)


@pytest.mark.parametrize("wrapper", [lambda w: w, jax.jit(lambda w: w)])
def test_map_variables_that_changes_nothing_is_not_refused(wrapper):
    module = mapped(wrapper)
    variables = module.init(jax.random.key(0), X)
    qmodule, qvariables, _ = quantize_model(module, variables, ALL, example=X)
    y, expected = qmodule.apply(qvariables, X), module.apply(variables, X)
    assert jaxq.metrics.sqnr(expected, y) > 35


def test_a_stack_that_a_loop_indexes_is_not_refused():
    class Indexed(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(8, use_bias=False, name="layer")
            if self.is_initializing():
                return layer(x)

            def body(layer, carry, _):
                index, x = carry

                def element(params):
                    return jax.tree.map(lambda w: w[index], params)

                call = nn.map_variables(
                    lambda layer, x: layer(x), "params", trans_in_fn=element
                )
                return (index + 1, call(layer, x)), None

            scan = nn.scan(body, variable_broadcast="params", split_rngs={}, length=3)
            return scan(layer, (0, x), None)[0][1]

    module = Indexed()
    variables = {"params": {"layer": {"kernel": normal(3, 8, 8)}}}
    qmodule, qvariables, _ = quantize_model(module, variables, ALL, example=X)
    y, expected = qmodule.apply(qvariables, X), module.apply(variables, X)
    assert jaxq.metrics.sqnr(expected, y) > 35


# The check itself.


def changed(function, *arrays):
    names = [f"w{i}" for i in range(len(arrays))]
    return changed_weights(jax.make_jaxpr(function)(*arrays), names)


def scanned(factor):
    def function(stack):
        def body(x, w):
            return x @ mark(factor * w if factor else w, "w0"), None

        return jax.lax.scan(body, X, stack)[0]

    return function


@pytest.mark.parametrize(
    ("function", "is_changed"),
    [
        (scanned(0), False),
        (scanned(2.0), True),
        (lambda w: jax.vmap(lambda a: X @ mark(a, "w0"))(w), False),
        # Another axis than 0 of a stack with equal sizes.
        (lambda w: jax.vmap(lambda a: X @ mark(a, "w0"), 1)(w), True),
        (lambda w: jax.checkpoint(lambda a: X @ mark(a[0], "w0"))(w), False),
        (lambda w: X @ mark(w.astype(jnp.bfloat16)[1], "w0").astype(X.dtype), False),
        (lambda w: X @ mark(w.astype(jnp.int8)[1], "w0").astype(X.dtype), True),
        (lambda w: X @ mark((w * 1.0)[2], "w0"), False),
        (lambda w: X @ mark(w[0] + w[1], "w0"), True),
        (lambda w: jax.grad(lambda x: (x @ mark(2 * w[0], "w0")).sum())(X), True),
    ],
)
def test_values_are_followed_through_transforms(function, is_changed):
    assert changed(function, normal(8, 8, 8)) == ["w0"] * is_changed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("other", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_a_cast_is_not_a_change(dtype, other):
    """The indexing has the check compute the numbers, also those that overflow."""

    def function(w):
        return X @ mark(w.astype(other)[1], "w0").astype(X.dtype)

    assert changed(function, normal(3, 8, 8).astype(dtype)) == []


def test_a_weight_that_depends_on_data_is_changed():
    def function(x, w):
        return x @ mark(w * x.max(), "w")

    traced = jax.make_jaxpr(function)(X, normal(8, 8))
    assert changed_weights(traced, ["", "w"]) == ["w"]


# nnx layers.


def nnx_doubling(arrays, **kwargs):
    return tuple(doubling(*arrays, **kwargs))


def nnx_casting(arrays, **kwargs):
    return dtypes.promote_dtype(arrays, **kwargs)


NNX = {
    "Linear": lambda **k: nnx.Linear(8, 4, rngs=nnx.Rngs(0), **k),
    "LinearGeneral": lambda **k: nnx.LinearGeneral(8, (2, 2), rngs=nnx.Rngs(0), **k),
    "Einsum": lambda **k: nnx.Einsum("bi,io->bo", (8, 4), rngs=nnx.Rngs(0), **k),
    "Conv": lambda **k: nnx.Conv(8, 4, (2, 2), rngs=nnx.Rngs(0), **k),
    "ConvTranspose": lambda **k: nnx.ConvTranspose(8, 4, (2, 2), rngs=nnx.Rngs(0), **k),
    "Embed": lambda **k: nnx.Embed(4, 8, rngs=nnx.Rngs(0), **k),
}


@pytest.mark.parametrize("name", NNX)
def test_an_nnx_promote_dtype_that_changes_the_weight_is_refused(name):
    layer = NNX[name](promote_dtype=nnx_doubling)
    with pytest.raises(
        ValueError, match=rf"\({name}\): its promote_dtype changes its (kernel|embed)"
    ):
        jaxq.quantize_model(layer, ALL)
    layer = NNX[name](promote_dtype=nnx_casting)
    assert len(jaxq.quantize_model(layer, ALL)[1].quantized) == 1


def test_explicit_layers_refuse_a_hook_that_changes_the_weight():
    message = "its promote_dtype changes its kernel"
    with pytest.raises(ValueError, match=rf"^QLinear: {message}.*weight=None"):
        jaxq.nn.QLinear(8, 4, promote_dtype=nnx_doubling, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="^QLinear: its dot_general is a custom"):
        jaxq.nn.QLinear(8, 4, dot_general=lambda *a, **k: None, rngs=nnx.Rngs(0))
    layer = jaxq.nn.linen.QDense(4, promote_dtype=doubling)
    with pytest.raises(ValueError, match=rf"^QDense: {message}.*weight=None"):
        layer.init(jax.random.key(0), X)
    layer = standardized(jaxq.nn.linen.QDense)(4)
    with pytest.raises(ValueError, match="overrides `param`"):
        layer.init(jax.random.key(0), X)


# Float states on quantized nnx models.


@pytest.mark.parametrize("name", NNX)
def test_a_float_state_does_not_replace_codes(name):
    model = nnx.Dict(layer=NNX[name]())
    x = {"Embed": TOKENS, "Conv": IMAGE, "ConvTranspose": IMAGE}.get(name, X)
    qmodel, _ = jaxq.quantize_model(model, ALL)
    before = qmodel["layer"](x)
    floats = nnx.state(model)
    for state in (floats, nnx.to_pure_dict(floats)):
        with pytest.raises(ValueError, match=r"float32\[.*cannot replace QTensor\("):
            nnx.update(qmodel, state)
    with pytest.raises(ValueError, match="cannot replace QTensor"):
        nnx.update(qmodel["layer"], nnx.state(model["layer"]))
    assert (qmodel["layer"](x) == before).all()
    graphdef, state = nnx.split(qmodel)
    assert (nnx.merge(graphdef, state)["layer"](x) == before).all()
    merged = nnx.merge(graphdef, floats)
    with pytest.raises(ValueError, match=r"is float32\[.*\], not a QTensor"):
        merged["layer"](x)
    nnx.update(model, state)
    with pytest.raises(TypeError, match="jaxq.dequantize"):
        model["layer"](x)
