"""The plan of a product is what its jaxpr shows, and no plan is made twice."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import jaxq
from jaxq import PerBlock, PerFlat, QuantSpec, kernels
from jaxq.ops import _decision
from jaxq.ops._plan import Plan
from tests.arrays import normal_with_outliers
from tests.ops.reference import dots, equations

MATRIX = (((1,), (0,)), ((), ()))
TRANSPOSED = (((1,), (1,)), ((), ()))
# Several blocks of rows, so that decoding in blocks is a loop with small operands: [n,
# k] = [4096, 1024].
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
    "dynamic": (shape(4, K), weight("int8").with_activation("int8"), MATRIX),
    "dynamic_mixed": (shape(4, K), weight("nf4").with_activation("int8"), MATRIX),
    "one_of_two_kept_axes": (
        shape(4, 64),
        weight("int8", K, 64, 64, contracting=-3),
        (((1,), (2,)), ((), ())),
    ),
    "batch_of_the_product_alone": (
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


def path_of_jaxpr(lhs, rhs, dims) -> str:
    """The path by the shapes and dtypes of the dots in the jaxpr."""
    traced = jax.make_jaxpr(lambda a, b: jaxq.dot_general(a, b, dims))(lhs, rhs).jaxpr
    if not isinstance(lhs, jaxq.QTensor) and not isinstance(rhs, jaxq.QTensor):
        return "dense"
    products = [e for e in equations(traced) if e.primitive.name == "dot_general"]
    operands = [v.aval for e in products for v in e.invars]
    loops = [e for e in equations(traced) if e.primitive.name in ("scan", "while")]
    if all(v.dtype.name.startswith(("int", "float8")) for v in operands):
        return "codes"
    qt = rhs if isinstance(rhs, jaxq.QTensor) else lhs
    if max(v.size for v in operands) >= qt.size // max(
        1, len(qt.batch_shape) and qt.batch_shape[0]
    ):
        return "dequantize"
    assert len(loops) == 1 + bool(
        qt.batch_shape
    )  # the loop over blocks of rows is inside the loop over a stack
    k = qt.meta.geometry.contracted_size
    return (
        "weight_only_transposed"
        if any(v.aval.shape[-1:] == (k,) for e in products for v in e.outvars)
        else "weight_only"
    )


@pytest.mark.parametrize("case", CASES)
def test_the_jaxpr_follows_the_plan(case):
    lhs, rhs, dims = CASES[case]
    plan = jaxq.explain(lhs, rhs, dims)
    # XLA:CPU multiplies floats faster than packed codes. So such codes are decoded, as
    # with float activations.
    path = "weight_only" if case == "codes_packed" else plan.path
    assert path == path_of_jaxpr(lhs, rhs, dims)
    accumulated = {
        result
        for _, _, result in dots(lambda a, b: jaxq.dot_general(a, b, dims), lhs, rhs)
    }
    # Sums of packed codes are exact in float32 too, and XLA:CPU multiplies faster.
    assert accumulated == {"float32" if case == "codes_packed" else plan.accumulate}
    assert plan.swapped == (case in ("left", "transposed_left"))


REASONS = {
    "dense": "dense (accumulates in float32): no operand is quantized",
    "int8": "weight_only (accumulates in float32): int8 codes are decoded in blocks of "
    "rows",
    "left": "weight_only (accumulates in float32, weight on the left): int8 codes are "
    "decoded in blocks of rows",
    "codes": "codes (accumulates in int32): int8 x int8 products of codes",
    "codes_float8": "codes (accumulates in float32): float8_e4m3fn x float8_e4m3fn "
    "products of codes",
    "transposed": "kept axes [-1] are contracted: the products of blocks of decoded "
    "rows are added up",
    "one_of_two_kept_axes": "the whole weight is dequantized, because axes [-1] are "
    "contracted and its blocks run along [-3]",
    "batch_of_the_product_alone": "the whole weight is dequantized, because the "
    "product has batch axes [1] of the weight, which has 0 leading batch axes",
    "across_rows": "the whole weight is dequantized, because blocks of 48 codes cross "
    "rows of 1000 codes",
    "dynamic": "dynamic activation quantization to int8; int8 x int8",
    "dynamic_mixed": "the left operand is dequantized, because codes of int8 and nf4 "
    "do not multiply natively",
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons_in_words(case):
    assert REASONS[case] in str(jaxq.explain(*CASES[case]))


def test_without_dimension_numbers_it_is_matmul():
    qt = jaxq.quantize(normal_with_outliers(32, 8), "int8")
    for x in (jnp.ones(32), jnp.ones((5, 32)), [[1.0] * 32], shape(2, 5, 32)):
        assert jaxq.explain(x, qt).path == "weight_only"
    assert jaxq.explain(qt, jnp.ones((8, 3))).path == "weight_only_transposed"
    stack = jaxq.quantize(
        normal_with_outliers(3, 32, 8), "int8", contracting=-2, batch=0
    )
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
            normal_with_outliers(4, 64, seed=seed),
            jaxq.quantize(normal_with_outliers(64, 8, seed=seed), "nf4_dq"),
        )
    assert len(traces) == 1


@pytest.fixture
def quantize_calls(monkeypatch):
    """A list that grows with each quantization by a file of `jaxq.ops`."""
    calls = []

    def counted(x, *args, **options):
        calls.append(x.shape)
        return jaxq.quantize(x, *args, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("jaxq.ops") and hasattr(module, "quantize"):
            monkeypatch.setattr(module, "quantize", counted)

    def counted(x, *args):
        calls.append(x.shape)
        return quantize_activation(x, *args)

    quantize_activation = kernels.quantize_activation
    monkeypatch.setattr(kernels, "quantize_activation", counted)
    return calls


def w8a8(*sizes: int, contracting, batch=(), **options):
    qt = jaxq.quantize(
        normal_with_outliers(*sizes), "int8", contracting=contracting, batch=batch
    )
    return qt.with_activation("int8", **options)


def conv(x, kernel):
    return jaxq.ops.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


# name: (product, shape of x, weight)
W8A8 = {
    "matmul": (jaxq.matmul, (4, 64), w8a8(64, 8, contracting=0)),
    "static": (jaxq.matmul, (4, 64), w8a8(64, 8, contracting=0, bounds=(-3.0, 3.0))),
    "outliers": (jaxq.matmul, (4, 64), w8a8(64, 8, contracting=0, outliers=6.0)),
    "stack": (jaxq.matmul, (3, 4, 64), w8a8(3, 64, 8, contracting=1, batch=(0,))),
    "weight_on_the_left": (
        lambda x, qt: jaxq.matmul(qt.T, x),
        (64, 4),
        w8a8(64, 8, contracting=0),
    ),
    "einsum": (
        lambda x, qt: jaxq.einsum("btd,dhk->bhtk", x, qt),
        (2, 3, 64),
        w8a8(64, 2, 8, contracting=0),
    ),
    "groups_that_differ": (
        jaxq.matmul,
        (4, 64),
        jaxq.quantize(normal_with_outliers(64, 8), "int4").with_activation(
            QuantSpec("int8", jaxq.PerGroup(16))
        ),
    ),
    "conv": (conv, (2, 10, 6), w8a8(3, 6, 8, contracting=(0, 1))),
    "conv_static": (
        conv,
        (2, 10, 6),
        w8a8(3, 6, 8, contracting=(0, 1), bounds=(-3.0, 3.0)),
    ),
}


@pytest.fixture
def plans(monkeypatch):
    """A list that grows with each `Plan` that is constructed, copies included."""
    plans = []
    construct = Plan.__init__

    def counted(plan, *args, **fields):
        plans.append(plan)
        construct(plan, *args, **fields)

    monkeypatch.setattr(Plan, "__init__", counted)
    return plans


@pytest.fixture
def kernel_problems(monkeypatch):
    """A list that grows with each product that a plan describes to the kernels."""
    problems = []

    def counted(*args):
        problems.append(kernels.problem_of(*args))
        return problems[-1]

    counting = SimpleNamespace(**(vars(kernels) | {"problem_of": counted}))
    monkeypatch.setattr(_decision, "kernels", counting)
    return problems


# The outlier columns are a second product. All other products have one plan.
@pytest.mark.parametrize(
    ("case", "num_plans"), [(case, 1 + (case == "outliers")) for case in W8A8]
)
def test_a_w8a8_product_makes_one_plan(case, num_plans, plans, kernel_problems):
    product, sizes, qt = W8A8[case]
    # A new function each time: jax traces a known function only once.
    jax.make_jaxpr(lambda x, qt: product(x, qt))(shape(*sizes), qt)
    assert len(plans) == num_plans
    assert not kernel_problems


@pytest.mark.parametrize("spec", ["int8", "nf4_dq"])
def test_a_weight_only_product_makes_one_plan(spec, plans, kernel_problems):
    product = jax.make_jaxpr(lambda x, qt: x @ qt)
    product(shape(4, 64), weight(spec, 64, 8))
    assert len(plans) == 1
    assert not kernel_problems


def test_a_gradient_makes_one_more_plan(plans, kernel_problems):
    product, sizes, qt = W8A8["matmul"]
    jax.make_jaxpr(jax.grad(lambda x: jnp.sum(product(x, qt))))(shape(*sizes))
    # The gradient is that of the product in floats.
    assert [plan.path for plan in plans] == ["codes", "weight_only"]
    assert not kernel_problems


def test_explain_describes_a_product_to_the_kernels(kernel_problems):
    _, sizes, qt = W8A8["matmul"]
    jaxq.explain(shape(*sizes), qt)
    assert len(kernel_problems) == 1
    assert kernel_problems[0].x_dtype == "int8"


@pytest.mark.parametrize("case", W8A8)
def test_a_product_quantizes_its_activation_once(case, quantize_calls):
    product, sizes, qt = W8A8[case]
    x = normal_with_outliers(*sizes)
    jax.make_jaxpr(product)(x, qt)
    assert len(quantize_calls) == 1
    product(x, qt)  # eager
    assert len(quantize_calls) == 2


def test_a_gradient_quantizes_its_activation_once(quantize_calls):
    product, sizes, qt = W8A8["matmul"]
    jax.make_jaxpr(jax.grad(lambda x: jnp.sum(product(x, qt))))(shape(*sizes))
    assert len(quantize_calls) == 1


def test_explain_quantizes_nothing(quantize_calls):
    for case in ("matmul", "static", "outliers", "stack"):
        _, sizes, qt = W8A8[case]
        for platform in ("cpu", "tpu", "cuda"):
            jaxq.explain(shape(*sizes), qt, platform=platform)
    assert not quantize_calls


def test_how_activations_are_quantized_is_part_of_the_plan():
    def plan(case):
        return jaxq.explain(shape(*W8A8[case][1]), W8A8[case][2])

    assert plan("matmul").activation == "dynamic"
    assert plan("static").activation == "static"
    assert "static activation quantization to int8" in plan("static").reason
    assert plan("outliers").outliers == 6.0
    assert "a magnitude of at least 6" in plan("outliers").reason
    assert jaxq.explain(shape(4, 64), weight("int8", 64, 8)).activation is None


def test_plan_of_a_convolution():
    qt = w8a8(3, 6, 8, contracting=(0, 1))
    plan = jaxq.ops.plan_conv(shape(2, 10, 6), qt, channel=2)
    assert (plan.path, plan.accumulate) == ("codes", "int32")
    assert plan.reason.startswith("dynamic activation quantization to int8; ")
    weight_only = jaxq.ops.plan_conv(
        shape(2, 10, 6), qt.with_activation(None), channel=2
    )
    assert weight_only.path == "dequantize"


def test_plan_of_a_convolution_raises_what_the_convolution_raises():
    x, qt = shape(2, 10, 6), w8a8(3, 6, 8, contracting=(0, 1))
    scaled = qt.with_input_scale(jnp.ones(18))
    outliers = qt.with_activation("int8", outliers=6.0)
    for kernel, message in (
        (scaled, "has an input_scale and quantizes its input"),
        (outliers, "has an outlier threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxq.ops.plan_conv(x, jax.eval_shape(lambda qt=kernel: qt), channel=2)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(conv, x, kernel)


def test_outlier_columns_have_a_plan_of_their_own(plans):
    product, sizes, qt = W8A8["outliers"]
    x, bare = shape(*sizes), qt.with_activation(None)
    plan = jaxq.explain(x, qt)
    assert plan.outlier_product.path == jaxq.explain(x, bare).path == "weight_only"
    plans.clear()
    jax.make_jaxpr(jax.grad(lambda x: jnp.sum(product(x, qt))))(x)
    # The gradient is that of the product in floats, which has a plan already.
    assert len(plans) == 2


def test_explain_raises_what_the_product_raises():
    unsigned = jaxq.quantize(normal_with_outliers(64, 8), "int8").with_activation(
        QuantSpec("uint8")
    )
    signed = unsigned.with_activation("int8")
    for qt, x, error, message in (
        (unsigned, shape(4, 64), ValueError, "has no negative numbers"),
        (signed, shape(4, 64, dtype="int32"), TypeError, "Pass floats"),
    ):
        with pytest.raises(error, match=message):
            jaxq.explain(x, qt)
        with pytest.raises(error):
            jax.eval_shape(jaxq.matmul, x, qt)
