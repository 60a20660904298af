"""Products of weights with an input scale, against the float64 product `x @ diag(s) W`.

The weight keeps the factors s. A product multiplies its float operand by them.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from tests.arrays import assert_close, normal
from tests.ops.reference import double

K, N = 64, 8
S = jnp.exp(normal(K, seed=3))
X = normal(5, K, seed=4)
W = normal(K, N)


def scaled(preset, w=W, s=S, **roles):
    """(the weight with factors, its float64 value computed without `input_scale`)."""
    qt = jaxq.quantize(w, preset, **roles)
    value = double(jaxq.dequantize(qt)) * double(s)[..., None]
    return qt.with_input_scale(s), value


@pytest.mark.parametrize("preset", ["int8", "uint4", "nf4_dq", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_weight_only(preset, layout):
    qt, value = scaled(preset)
    qt = jaxq.relayout(qt, layout)
    assert_close(X @ qt, double(X) @ value)
    assert_close(qt.T @ X.T, (double(X) @ value).T)
    assert_close(jax.jit(lambda x, qt: x @ qt)(X, qt), X @ qt, 1e-6)


@pytest.mark.parametrize(
    "activation",
    [{}, {"bounds": (-3.0, 3.0)}, {"outliers": 2.0}],
    ids=["dynamic", "static", "outliers"],
)
def test_the_operand_is_multiplied_before_it_is_quantized(activation):
    qt = jaxq.quantize(W, "int8").with_activation("int8", **activation)
    product = X @ qt.with_input_scale(S)
    np.testing.assert_array_equal(product, (X * S[None]) @ qt)
    # The order matters: quantizing X first gives other numbers.
    assert np.any(np.asarray(product) != np.asarray(X @ qt))
    plan = jaxq.explain(X, qt.with_input_scale(S))
    assert plan.before == ("scale_left", "quantize_left")
    assert plan.path == "codes"
    assert plan.reason.startswith("the input is multiplied by input_scale; ")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_operand_keeps_its_dtype(dtype):
    qt, x = scaled("int8", W.astype(dtype))[0], X.astype(dtype)
    product = x @ qt
    multiplied = (x.astype(jnp.float32) * S[None]).astype(dtype)
    assert product.dtype == dtype
    expected = multiplied @ qt.with_input_scale(None)
    np.testing.assert_array_equal(product, expected)


def test_stacks():
    w, s, x = normal(3, K, N), jnp.exp(normal(3, K, seed=1)), normal(3, 5, K, seed=2)
    qt, value = scaled("int4", w, s, contracting=-2, batch=0)
    assert_close(x @ qt, double(x) @ value)
    assert_close(jax.vmap(lambda x, qt: x @ qt)(x, qt), double(x) @ value)
    scanned = jax.lax.scan(lambda c, qt: (c, X @ qt), None, qt)[1]
    assert_close(scanned, double(X) @ value)
    np.testing.assert_array_equal(qt[1].input_scale, s[1])
    # A batch axis of the weight that is no batch axis of the product.
    assert_close(
        jaxq.einsum("mk,bkn->mbn", X, qt), np.einsum("mk,bkn->mbn", double(X), value)
    )
    order = jnp.swapaxes(x, 0, 1)
    assert_close(
        jaxq.einsum("mbk,bkn->mbn", order, qt),
        np.einsum("bmk,bkn->mbn", double(x), value),
    )


SIZES = {"a": 4, "b": 6, "c": 8, "d": 10, "z": 3}


@pytest.mark.parametrize("contracting", [(0, 2), (2, 0), (-1, 0)])
def test_several_contracted_axes(contracting):
    """The factors follow the contracted axes in storage, in any order of `x`."""
    w = normal(4, 6, 8, 10)
    qt = jaxq.quantize(w, "int8", contracting=contracting)
    s = jnp.exp(normal(qt.meta.geometry.contracted_size, seed=1))
    along = ["abcd"[axis] for axis in qt.meta.geometry.contracted]
    factors = np.asarray(s).reshape([SIZES[index] for index in along])
    equation = f"abcd,{''.join(along)}->abcd"
    value = np.einsum(equation, double(jaxq.dequantize(qt)), double(factors))
    qt = qt.with_input_scale(s)
    assert_close(jaxq.dequantize(qt), value)
    assert_close(jaxq.dequantize(qt.swapaxes(0, 3)), np.swapaxes(value, 0, 3))
    kept = "".join(index for index in "abcd" if index not in along)
    for indices in itertools.permutations(["z", *along]):
        x = normal(*(SIZES[index] for index in indices), seed=2)
        equation = f"{''.join(indices)},abcd->z{kept}"
        assert_close(
            jaxq.einsum(equation, x, qt), np.einsum(equation, double(x), value)
        )


def test_products_that_cannot_multiply_their_input_dequantize():
    qt, value = scaled("int8")
    y = normal(5, N)
    assert_close(y @ qt.T, double(y) @ value.T)
    plan = jaxq.explain(y, qt.T)
    assert (plan.path, plan.before) == ("dequantize", ())
    assert "its input_scale belongs to axes [-1]" in plan.reason
    # Codes cannot be multiplied by factors, so the left operand becomes floats.
    codes = jaxq.quantize(X, "int8", contracting=-1)
    assert_close(codes @ qt, double(jaxq.dequantize(codes)) @ value)
    plan = jaxq.explain(codes, qt)
    assert plan.before == ("dequantize_left", "scale_left")


def test_rows_sorted_by_expert():
    w, s = normal(3, K, N), jnp.exp(normal(3, K, seed=1))
    qt, value = scaled("int4", w, s, contracting=-2, batch=0)
    experts = np.repeat([0, 2], [2, 2])
    expected = np.einsum("mk,mkn->mn", double(X[:4]), value[experts])
    expected = np.concatenate([expected, np.zeros((1, N))])
    assert_close(jaxq.ops.ragged_dot(X, qt, jnp.array([2, 0, 2])), expected)


def test_take():
    table = jaxq.quantize(normal(10, K), "int4", contracting=-1).with_input_scale(S)
    rows = jnp.array([[1, 9], [0, 0]])
    expected = jaxq.dequantize(table)[rows]
    np.testing.assert_array_equal(jaxq.ops.take(table, rows), expected)


def test_convolution():
    kernel = jaxq.quantize(normal(3, 4, N), "int8", contracting=(0, 1))
    kernel = kernel.with_input_scale(jnp.exp(normal(12, seed=1)))
    x, numbers = normal(2, 7, 4), ("NWC", "WIO", "NWC")

    def convolved(kernel):
        return jaxq.ops.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=numbers
        )

    expected = jax.lax.conv_general_dilated(
        x, jaxq.dequantize(kernel), (1,), "SAME", dimension_numbers=numbers
    )
    assert_close(convolved(kernel), expected)
    with pytest.raises(ValueError, match=r"Use kernel.with_activation\(None\), or"):
        convolved(kernel.with_activation("int8"))


def test_gradients():
    qt, value = scaled("int8")
    qt = qt.with_activation("int8")
    dx = jax.grad(lambda x: jnp.sum(x @ qt))(X)
    assert_close(dx, np.broadcast_to(value.sum(1), X.shape))
    weight_only = qt.with_activation(None)
    trainable, rest = jaxq.partition(weight_only)
    gradient = jax.grad(lambda t: jnp.sum(X @ jaxq.combine(t, rest)))(trainable)
    expected = double(X).sum(0) * (value / double(S)[:, None]).sum(1)
    assert_close(gradient.input_scale, expected)


def test_a_product_without_elements():
    qt = jaxq.quantize(jnp.ones((0, 3)), "int8").with_input_scale(jnp.ones(0))
    np.testing.assert_array_equal(jnp.ones((2, 0)) @ qt, np.zeros((2, 3)))
    qt, _ = scaled("int8")
    assert (jnp.ones((0, K)) @ qt).shape == (0, N)


def test_without_factors_the_program_is_unchanged():
    """None adds nothing to the program of a product."""
    qt = jaxq.quantize(W, "int8")

    def program(qt):
        return jax.jit(lambda x: x @ qt).lower(X).as_text()

    assert program(qt.with_input_scale(S).with_input_scale(None)) == program(qt)
    assert program(dataclasses.replace(qt, input_scale=S)) != program(qt)
