"""`explain` tells the truth: the path it names is the one a jaxpr shows."""

import jax
import jax.numpy as jnp
import pytest

import jaxq
from jaxq import PerBlock, PerFlat, QuantSpec
from tests.ops.reference import dots, equations, normal

MATRIX = (((1,), (0,)), ((), ()))
TRANSPOSED = (((1,), (1,)), ((), ()))
# Several blocks of rows, so that decoding in blocks is a loop with small operands: [n, k] = [4096, 1024].
K, N = 1024, 4096


def shape(*sizes: int, dtype: str = "float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def weight(spec, *sizes: int, **roles):
    return jax.eval_shape(
        lambda w: jaxq.quantize(w, spec, **roles), shape(*(sizes or (K, N)))
    )


CASES = {
    "dense": (shape(4, K), shape(K, N), MATRIX),
    "int8": (shape(4, K), weight("int8"), MATRIX),
    "nf4_dq": (shape(4, K), weight("nf4_dq"), MATRIX),
    "left": (weight("int8", N, K, contracting=-1), shape(K, 4), MATRIX),
    "transposed": (shape(4, N), weight("int8"), TRANSPOSED),
    "transposed_left": (weight("int8"), shape(N, 4), MATRIX),
    "stack": (
        shape(2, 4, K),
        weight("int8", 2, K, N, contracting=-2, batch=0),
        (((2,), (1,)), ((0,), (0,))),
    ),
    "codes": (weight("int8", 4, K, contracting=-1), weight("int8"), MATRIX),
    "codes_packed": (weight("int8", 4, K, contracting=-1), weight("int4"), MATRIX),
    "codes_float8": (weight("fp8", 4, K, contracting=-1), weight("fp8"), MATRIX),
    "mixed": (weight("int8", 4, K, contracting=-1), weight("nf4"), MATRIX),
    "on_the_fly": (shape(4, K), weight("int8").with_activation("int8"), MATRIX),
    "on_the_fly_mixed": (shape(4, K), weight("nf4").with_activation("int8"), MATRIX),
    "half_of_the_axes": (
        shape(4, 64),
        weight("int8", K, 64, 64, contracting=-3),
        (((1,), (2,)), ((), ())),
    ),
    "foreign_batch": (
        shape(64, 4, K),
        weight("int8", K, 64, 64, contracting=-3),
        (((2,), (0,)), ((0,), (1,))),
    ),
    "across_rows": (
        shape(4, 1000),
        weight(QuantSpec("int8", PerFlat(48)), 1000, N),
        MATRIX,
    ),
    "tiles": (shape(4, K), weight(QuantSpec("int8", PerBlock((128, 128)))), MATRIX),
}


def expected_path(lhs, rhs, dims) -> str:
    """The path by what the jaxpr multiplies: codes, blocks of rows (by which side is summed), or all of a weight."""
    traced = jax.make_jaxpr(lambda a, b: jaxq.dot_general(a, b, dims))(lhs, rhs).jaxpr
    if not isinstance(lhs, jaxq.QTensor) and not isinstance(rhs, jaxq.QTensor):
        return "dense"
    products = [e for e in equations(traced) if e.primitive.name == "dot_general"]
    operands = [v.aval for e in products for v in e.invars]
    if all(v.dtype.name.startswith(("int", "float8")) for v in operands):
        return "codes"
    qt = rhs if isinstance(rhs, jaxq.QTensor) else lhs
    if max(v.size for v in operands) >= qt.size // max(
        1, len(qt.batch_shape) and qt.batch_shape[0]
    ):
        return "dequantize"
    loops = [e for e in equations(traced) if e.primitive.name in ("scan", "while")]
    assert len(loops) == 1 + bool(
        qt.batch_shape
    )  # over blocks of rows, in one over the matrices of a stack
    k = qt.meta.geometry.contracted_size
    return (
        "weight_only_transposed"
        if any(v.aval.shape[-1:] == (k,) for e in products for v in e.outvars)
        else "weight_only"
    )


@pytest.mark.parametrize("case", CASES)
def test_the_path_is_what_happens(case):
    lhs, rhs, dims = CASES[case]
    plan = jaxq.explain(lhs, rhs, dims)
    assert plan.path == expected_path(lhs, rhs, dims)
    accumulated = {
        result
        for _, _, result in dots(lambda a, b: jaxq.dot_general(a, b, dims), lhs, rhs)
    }
    assert accumulated == {plan.accumulate}
    assert plan.swapped == (case in ("left", "transposed_left"))


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("dense", "dense (accumulates in float32): no operand is quantized"),
        (
            "int8",
            "weight_only (accumulates in float32): int8 codes are decoded in blocks of rows",
        ),
        (
            "left",
            "weight_only (accumulates in float32, weight on the left): int8 codes are decoded in blocks of rows",
        ),
        ("codes", "codes (accumulates in int32): int8 x int8 products of codes"),
        (
            "codes_float8",
            "codes (accumulates in float32): float8_e4m3fn x float8_e4m3fn products of codes",
        ),
        ("transposed", "kept axes [-1] are contracted"),
        (
            "half_of_the_axes",
            "the whole weight, because axes [-1] are contracted and its blocks run along [-3]",
        ),
        (
            "foreign_batch",
            "the whole weight, because the product's batch axes [1] are not its own leading 0",
        ),
        (
            "across_rows",
            "the whole weight, because blocks of 48 run across rows of 1000",
        ),
        ("on_the_fly", "activations are quantized to int8 on the fly; int8 x int8"),
    ],
)
def test_reasons_in_words(case, text):
    assert text in str(jaxq.explain(*CASES[case]))


def test_without_dimension_numbers_it_is_matmul():
    qt = jaxq.quantize(normal(32, 8), "int8")
    for x in (jnp.ones(32), jnp.ones((5, 32)), [[1.0] * 32], shape(2, 5, 32)):
        assert jaxq.explain(x, qt).path == "weight_only"
    assert jaxq.explain(qt, jnp.ones((8, 3))).path == "weight_only_transposed"
    stack = jaxq.quantize(normal(3, 32, 8), "int8", contracting=-2, batch=0)
    assert jaxq.explain(shape(5, 32), stack).path == "weight_only"
    with pytest.raises(TypeError, match="differ in size"):
        jaxq.explain(jnp.ones((5, 31)), qt)


def test_equal_products_are_traced_once():
    traces = []

    @jax.jit
    def product(x, qt):
        traces.append(1)
        return x @ qt

    for seed in range(3):
        product(
            normal(4, 64, seed=seed), jaxq.quantize(normal(64, 8, seed=seed), "nf4_dq")
        )
    assert len(traces) == 1
