"""Precisions and policies: numbers, names, pytrees, and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import formats
from jaxq.emulation import Policy, Precision
from tests.arrays import assert_same
from tests.formats import oracle

IEEE = [
    name
    for name in formats.names()
    if getattr(formats.get(name), "flavour", "") == "ieee"
]
X = np.concatenate(
    [
        oracle.random_patterns(1 << 14, seed=2),
        np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45]),
    ]
)


@pytest.mark.parametrize("name", IEEE)
def test_precision_of_a_name_rounds_as_the_format(name):
    rounded = jax.jit(Precision.of(name).round)(X)
    assert np.isnan(rounded[np.isnan(X)]).all()
    assert_same(rounded, jaxq.cast(X, name, saturate=False))


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e5m2fnuz", "float6_e2m3fn", "float4_e2m1fn"]
)
def test_formats_without_infinity_saturate_and_keep_nan(name):
    rounded = np.asarray(jax.jit(Precision.of(name).round)(X))
    expected = np.asarray(jaxq.cast(X, name))
    np.testing.assert_array_equal(rounded[~np.isnan(X)], expected[~np.isnan(X)])
    assert np.isnan(rounded[np.isnan(X)]).all()
    strict = dataclasses.replace(Precision.of(name), overflow="nan")
    assert np.isnan(jax.jit(strict.round)(np.float32([1e30, np.inf]))).all()


def test_traced_numbers_round_as_python_numbers():
    widths = [(8, 7), (8, 10), (5, 10), (5, 2), (4, 3), (3, 4), (8, 23), (2, 1), (8, 1)]
    e, m = (jnp.asarray(column) for column in zip(*widths, strict=True))
    swept = jax.jit(jax.vmap(lambda e, m: Precision(e, m).round(jnp.asarray(X))))(e, m)
    for width, rounded in zip(widths, np.asarray(swept), strict=True):
        expected = Precision(*width).round(jnp.asarray(X))
        assert_same({str(width): rounded}, {str(width): expected})


def test_policies_are_pytrees_of_numbers():
    policy = Policy(
        "bfloat16",
        "float32",
        "float8_e4m3fn",
        primitives={"exp": Policy(result="float16")},
    )
    assert jax.tree.map(lambda leaf: leaf, policy) == policy
    assert set(jax.tree.leaves(policy)) >= {7, 23, 3, 10}

    def fn(x):
        return jnp.exp(x) * 3

    @jax.jit
    def with_traced_policy(policy, x):
        return jaxq.emulate(fn, policy)(x)

    x = np.linspace(-1, 1, 64, dtype=np.float32)
    expected = jax.jit(jaxq.emulate(fn, policy))(x)
    assert_same(with_traced_policy(policy, x), expected)


def changes(name: str) -> tuple[bool, bool]:
    """Whether the precision of this name changes float32 and bfloat16 numbers."""
    precision = Precision.of(name)
    return precision.changes(jnp.float32), precision.changes(jnp.bfloat16)


def test_changes_is_false_if_rounding_has_no_effect():
    assert changes("float32") == (False, False)
    assert changes("bfloat16") == (True, False)
    assert changes("float16") == (True, True)
    assert Precision(8, 23, overflow="saturate").changes(jnp.float32)
    assert Precision(8, 22).changes(jnp.float32)
    assert Precision(8, jnp.asarray(23)).changes(jnp.float32)
    assert not Policy().changes(jnp.float32)
    assert not Policy("float32", "float32", "float32").changes(jnp.float32)
    assert Policy(primitives={"exp": Policy("bfloat16")}).changes(jnp.float32)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Policy(operands="bfloat61"),
            ValueError,
            "Policy: operands: unknown format.*'bfloat16'",
        ),
        (
            lambda: Policy(result="int8"),
            ValueError,
            "Policy: result: .*int8 is not a floating point format.*fake_quant",
        ),
        (
            lambda: Policy(result="float8_e8m0fnu"),
            ValueError,
            "not a floating point format with a sign and a zero",
        ),
        (
            lambda: Policy(accumulate="bfloat16", chunk=0),
            ValueError,
            "chunk must be a positive int or None, got 0",
        ),
        (
            lambda: jaxq.emulate(jnp.exp, Policy(result=8)),
            TypeError,
            "policy.result must be a format's name.* got 8",
        ),
        (
            lambda: jaxq.emulate(jnp.exp, Policy(primitives={"exp": "bfloat16"})),
            TypeError,
            r"policy.primitives\['exp'\] must be a jaxq.emulation.Policy, got 'bfl",
        ),
        (
            lambda: Precision(8, 7, overflow="wrap"),
            ValueError,
            "overflow must be one of infinity, nan, saturate",
        ),
        (
            lambda: Precision(8, 7, rounding="stochastic"),
            ValueError,
            "rounding must be one of nearest_even",
        ),
        (lambda: Precision(0, 7), ValueError, "exponent_bits must be 1 to 11"),
        (lambda: Precision(8, 99), ValueError, "mantissa_bits 0 to 52"),
        (
            lambda: jaxq.emulate(jnp.exp, "bfloat16"),
            TypeError,
            "policy must be a jaxq.emulation.Policy, got 'bfloat16'",
        ),
    ],
)
def test_invalid_arguments_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()
