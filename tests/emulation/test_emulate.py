"""emulate: all kinds of functions, against numpy's bfloat16 and unrolled code."""

import functools
import itertools

import jax
import jax.extend as jex
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import kernels
from jaxq.emulation import Policy, Precision, _primitives
from jaxq.emulation._calls import CALLS
from jaxq.kernels._one_step import always_true_p
from jaxq.kernels._remat import product_p
from tests import tables
from tests.arrays import assert_same

half = ml_dtypes.bfloat16
BF16 = Policy(operands="bfloat16", accumulate="float32", result="bfloat16")
random = np.random.default_rng(0)
X = random.standard_normal(16).astype(np.float32)
A = random.standard_normal((8, 64)).astype(np.float32)
B = random.standard_normal((64, 5)).astype(np.float32)


def in_bfloat16(x) -> np.ndarray:
    """`x` rounded to bfloat16, as float32."""
    return np.asarray(x).astype(half).astype(np.float32)


def test_elementwise_functions_equal_numpy_in_bfloat16():
    def fn(x, y):
        return (x * y + x) / y

    x, y = random.standard_normal((2, 4096)).astype(np.float32)
    emulated = jax.jit(jaxq.emulate(fn, BF16))
    expected = fn(x.astype(half), y.astype(half))  # numpy rounds every operation
    np.testing.assert_array_equal(emulated(x, y), expected.astype(np.float32))


def test_functions_of_bfloat16_arrays_are_rounded_after_every_operation():
    def fn(a, b):
        # XLA alone fuses the cast to float32 and does not round the last sum.
        return ((a + b) + a).astype(jnp.float32)

    a, b = random.standard_normal((2, 4096)).astype(half)
    expected = ((a + b) + a).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(jaxq.emulate(fn, BF16))(a, b), expected)


def test_wide_accumulation_of_small_integers_is_exact():
    a, b = random.integers(-8, 9, (2, 32, 256)).astype(np.float32)
    dims = (((1,), (1,)), ((), ()))

    def dot(a, b):
        return lax.dot_general(a, b, dims)

    product = jax.jit(jaxq.emulate(dot, Policy("bfloat16", "float32")))(a, b)
    native = lax.dot_general(
        a.astype(half), b.astype(half), dims, preferred_element_type=jnp.float32
    )
    np.testing.assert_array_equal(product, native)
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    np.testing.assert_array_equal(product, exact)


def test_wide_accumulation_stays_within_its_error_bound():
    product = jax.jit(jaxq.emulate(jnp.dot, Policy("bfloat16", "float32")))(A, B)
    a, b = in_bfloat16(A).astype(np.float64), in_bfloat16(B).astype(np.float64)
    unit = 64 * 2.0**-24
    bound = unit / (1 - unit) * (np.abs(a) @ np.abs(b))
    assert (np.abs(np.asarray(product, np.float64) - a @ b) <= bound).all()
    rounded = jax.jit(jaxq.emulate(jnp.dot, BF16))(A, B)
    np.testing.assert_array_equal(rounded, in_bfloat16(product))


def doubled(x):
    return x * 1.7 + x


def doubled_and_one(x):
    return doubled(x) + 1


def thrice(x):
    return doubled(doubled(doubled(x)))


# name: (function with structure, the same function without).
STRUCTURED = {
    "jit": (lambda x: jax.jit(doubled)(x) + 1, doubled_and_one),
    "nested_jit": (
        lambda x: jax.jit(lambda y: jax.jit(doubled)(y) * 3)(x),
        lambda x: doubled(x) * 3,
    ),
    "remat": (lambda x: jax.checkpoint(doubled)(x) + 1, doubled_and_one),
    "scan": (
        lambda x: lax.scan(
            lambda c, y: (doubled(c) + y, c * y), x[0], x[:6], reverse=True, unroll=2
        ),
        lambda x: _unrolled_scan(x[:6]),
    ),
    "while": (
        lambda x: lax.while_loop(
            lambda s: s[1] < 3, lambda s: (doubled(s[0]), s[1] + 1), (x, 0)
        )[0],
        thrice,
    ),
    "fori": (lambda x: lax.fori_loop(0, 3, lambda i, y: doubled(y), x), thrice),
    "cond": (lambda x: lax.cond(x[0] > -9, doubled, jnp.sin, x), doubled),
    "switch": (lambda x: lax.switch(2, [jnp.sin, jnp.cos, doubled], x), doubled),
    "custom_jvp": (lambda x: jax.nn.relu(x) * 1.7, lambda x: jnp.maximum(x, 0) * 1.7),
    "map": (lambda x: lax.map(doubled, x), doubled),
    "vmap": (lambda x: jax.vmap(doubled)(x), doubled),
    "associative_scan": (
        lambda x: lax.associative_scan(jnp.add, x[:3]),
        lambda x: jnp.stack([x[0], x[0] + x[1], (x[0] + x[1]) + x[2]]),
    ),
}


def _unrolled_scan(x):
    carry, out = x[0], []
    for y in x[::-1]:
        out.append(carry * y)
        carry = doubled(carry) + y
    return carry, jnp.stack(out[::-1])


@functools.cache
def rounded_and_not(plain):
    return jax.jit(lambda x: (jaxq.emulate(plain, BF16)(x), plain(x)))(X)


@pytest.mark.parametrize("name", STRUCTURED)
def test_structure_is_entered(name):
    structured, plain = STRUCTURED[name]
    emulated = jax.jit(jaxq.emulate(structured, BF16))(X)
    expected, unrounded = rounded_and_not(plain)
    assert_same(emulated, expected)
    for a, b in zip(*map(jax.tree.leaves, (emulated, unrounded)), strict=True):
        assert (np.asarray(a) != np.asarray(b)).any(), "nothing was rounded"


def test_eager_equals_jitted():
    def fn(x):
        carry, _ = lax.scan(lambda c, y: (doubled(c) + y, c), x[0], x)
        return carry + jnp.sum(jax.nn.gelu(x))

    emulated = jaxq.emulate(fn, BF16)
    assert_same(emulated(X), jax.jit(emulated)(X))


def test_a_policy_without_effect_keeps_the_program():
    def fn(x):
        y = lax.scan(lambda c, y: (jax.jit(doubled)(c) + y, c), x[0], x)[1]
        return jax.nn.gelu(y) @ jnp.outer(y, y)

    def value_and_slope(f):
        return jax.jit(lambda x: (f(x), jax.grad(lambda x: f(x).sum())(x)))(X)

    expected = value_and_slope(fn)
    for policy in (
        Policy(),
        Policy("float32", "float32", "float32"),
        Policy(primitives={"exp": Policy("float32")}),
    ):
        emulated = jaxq.emulate(fn, policy)
        assert str(jax.make_jaxpr(emulated)(X)) == str(jax.make_jaxpr(fn)(X))
        assert_same(value_and_slope(emulated), expected)


def test_arguments_and_results_may_be_pytrees():
    def fn(tree, *, scale):
        return {"y": tree["a"] * scale, "n": tree["n"] + 1, "a": tree["a"]}

    out = jaxq.emulate(fn, BF16)({"a": X, "n": jnp.int32(3)}, scale=1.5)
    assert sorted(out) == ["a", "n", "y"]
    assert out["n"] == 4
    np.testing.assert_array_equal(out["a"], X)  # no primitive computes it
    product = X.astype(half) * half(1.5)
    np.testing.assert_array_equal(out["y"], product.astype(np.float32))


def test_primitives_may_have_policies_of_their_own():
    policy = Policy(primitives={"exp": Policy(result="bfloat16")})
    y = jax.jit(jaxq.emulate(lambda x: jnp.exp(x) * 1.7, policy))(X)
    np.testing.assert_array_equal(y, in_bfloat16(jnp.exp(X)) * np.float32(1.7))
    message = "names 'dot', which is not a primitive of jax. The function has dot_gen"
    with pytest.raises(ValueError, match=message):
        jaxq.emulate(lambda x: x @ x, Policy(primitives={"dot": BF16}))(X)


# Gradients.


@jax.custom_vjp
def _hundredfold(x):
    return x * 2.0


_hundredfold.defvjp(lambda x: (x * 2.0, x), lambda x, ct: (ct * x * 100.0,))


@jax.custom_jvp
def _sevenfold(x):
    return jnp.log1p(x)


@_sevenfold.defjvp
def _sevenfold_rule(primals, tangents):
    return _sevenfold(*primals), tangents[0] * 7.0 * primals[0]


WRAPS = {"": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint, "vmap": jax.vmap}


@pytest.mark.parametrize(("fn", "slope"), [(_hundredfold, 100.0), (_sevenfold, 7.0)])
@pytest.mark.parametrize("wrap", tables.thinned(WRAPS, ("jit", "vmap")))
def test_custom_derivative_rules_are_kept(fn, slope, wrap):
    wrap = WRAPS[wrap]
    x = np.abs(X)

    def total(x):
        return jnp.sum(wrap(fn)(x))

    emulated = jaxq.emulate(total, BF16)
    # The forward pass is rounded. The rule gets its inputs without rounding.
    np.testing.assert_allclose(jax.jit(jax.grad(emulated))(x), slope * x, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(x), slope * x, rtol=1e-6)
    inside = jax.jit(jaxq.emulate(jax.grad(total), BF16))(x)
    np.testing.assert_allclose(inside, slope * x, rtol=2**-6)
    # The backward pass is rounded too.
    np.testing.assert_array_equal(inside, in_bfloat16(inside))

    @jax.jit
    @jax.vmap
    def with_mantissa_bits(m):
        return jax.grad(jaxq.emulate(total, Policy(result=Precision(8, m))))(x)

    gradients = with_mantissa_bits(np.array([3, 20]))
    np.testing.assert_allclose(gradients, [slope * x] * 2, rtol=1e-6)


def test_forward_mode_through_a_custom_jvp():
    forward = jax.jit(lambda x, t: jax.jvp(jaxq.emulate(_sevenfold, BF16), (x,), (t,)))
    y, t = forward(np.float32(0.3), np.float32(1))
    np.testing.assert_allclose(t, 2.1, rtol=1e-6)
    assert y == in_bfloat16(jnp.log1p(jnp.float32(half(0.3))))


def test_the_value_of_a_custom_function_is_the_same_with_and_without_its_gradient():
    for fn in (_hundredfold, _sevenfold):
        emulated = jaxq.emulate(lambda x, fn=fn: jnp.sum(fn(x)), BF16)
        x = np.abs(X)
        assert jax.jit(emulated)(x) == jax.jit(jax.value_and_grad(emulated))(x)[0]


def test_rounding_is_straight_through():
    def fn(x):
        return jnp.sum(jnp.sin(x * 3.0))

    gradient = jax.jit(jax.grad(jaxq.emulate(fn, BF16)))(X)
    inner = (X.astype(half) * half(3.0)).astype(np.float32)
    np.testing.assert_allclose(gradient, 3 * np.cos(inner), rtol=1e-5)

    def with_mantissa_bits(x, m):
        return jaxq.emulate(fn, Policy(result=Precision(8, m)))(x)

    assert np.isfinite(jax.jit(jax.grad(with_mantissa_bits))(X, 7)).all()


def test_gradient_through_loops():
    def fn(x):
        carry, _ = lax.scan(lambda c, y: (jnp.sin(c) * y, None), x[0], x)
        return carry + lax.cond(x[0] > 9, jnp.sum, jnp.max, x)

    wide = jax.jit(jax.grad(fn))(X)
    rounded = jax.jit(jax.grad(jaxq.emulate(fn, Policy(result="tfloat32"))))(X)
    np.testing.assert_allclose(rounded, wide, rtol=0.02, atol=1e-3)


# Sweeps, batches, meshes.


@pytest.mark.parametrize(
    "widths", tables.thinned([((2, 8, 14),), ((4, 6, 10, 12),)], [((2, 8, 14),)])
)
def test_vmap_over_mantissa_bits(widths):
    def fn(x):
        return jax.nn.softmax(lax.scan(lambda c, y: (c * 0.9 + y, c), x[0], x)[1]) @ x

    def rounded(m):
        return jaxq.emulate(fn, Policy("float32", None, Precision(8, m)))(X)

    widths = np.array(widths)
    swept = jax.jit(jax.vmap(rounded))(widths)
    single = [jax.jit(functools.partial(rounded, int(m)))() for m in widths]
    np.testing.assert_array_equal(swept, np.stack(single))
    error = np.abs(np.asarray(swept) - jax.jit(fn)(X))
    assert error[0] > 2 ** int(widths[-1] - widths[0] - 3) * error[-1] > 0


def test_vmap_over_mantissa_bits_of_a_narrow_accumulator():
    def sum_of_ones(m):
        policy = Policy(accumulate=Precision(8, m))
        return jaxq.emulate(jnp.sum, policy)(np.ones(600, np.float32))

    sums = jax.jit(jax.vmap(sum_of_ones))(np.array([4, 7, 8, 10]))
    assert sums.tolist() == [32, 256, 512, 600]


def test_rounded_numbers_are_not_rounded_again():
    rounding = "bitcast_convert_type[new_dtype=float32]"

    def count(fn, policy):
        return str(jax.make_jaxpr(jaxq.emulate(fn, policy))(X)).count(rounding)

    def moved(x):
        y = (x * x).reshape(4, 4)
        return jnp.concatenate([y.T, y]) + jnp.concatenate([y[::-1], y])

    both = Policy("bfloat16", None, "bfloat16")
    assert count(lambda x: x * x, both) == 3  # two operands and a result
    assert count(lambda x: (x * x) * (x * x), both) == 3 + 3 + 1
    assert count(moved, both) == 3 + 1
    # Numbers on another grid are rounded again. So is the maximum of a rounded and an
    # unrounded number.
    other_grid = Policy("float16", None, "bfloat16")
    assert count(lambda x: (x * x) * (x * x), other_grid) == 3 + 3 + 3
    assert count(lambda x: jnp.exp(jnp.maximum(x * x, x)), both) == 3 + 2

    def with_one_tracer(m):
        policy = Policy(Precision(8, m), None, Precision(8, m))
        return jaxq.emulate(lambda x: (x * x) * x, policy)(X)

    # With a tracer each rounding has a second one of these, for the largest number.
    num_roundings = str(jax.make_jaxpr(with_one_tracer)(7)).count(rounding) / 2
    assert num_roundings == 3 + 2

    y = (X.astype(half) * X.astype(half)).reshape(4, 4)  # numpy rounds every operation
    expected = np.concatenate([y.T, y]) + np.concatenate([y[::-1], y])
    emulated = jax.jit(jaxq.emulate(moved, both))
    np.testing.assert_array_equal(emulated(X), expected.astype(np.float32))


def test_vmap_over_inputs():
    policy = Policy("bfloat16", "bfloat16", "bfloat16")
    fn = jaxq.emulate(lambda x: jax.nn.gelu(x) @ B, policy)
    np.testing.assert_array_equal(jax.jit(jax.vmap(fn))(A), jax.jit(fn)(A))


@pytest.mark.parametrize("accumulate", ["float32", "bfloat16"])
def test_sharded_inputs(accumulate):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(4), ("d",))
    policy = Policy("bfloat16", accumulate, "bfloat16")
    fn = jax.jit(jaxq.emulate(lambda a, b: jnp.tanh(a @ b), policy))
    sharded = fn(jax.device_put(A, NamedSharding(mesh, P("d"))), B)
    np.testing.assert_array_equal(sharded, fn(A, B))


def test_shard_map():
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    policy = Policy("bfloat16", "bfloat16")
    mapped = jax.shard_map(
        lambda a, b: lax.psum(a @ b, "d"),
        mesh=mesh,
        in_specs=(P(None, "d"), P("d", None)),
        out_specs=P(),
    )
    message = "'psum_invariant' has no form with a narrow accumulator"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(jaxq.emulate(mapped, policy), A, B)
    wide_psum = Policy("bfloat16", "bfloat16", primitives={"psum_invariant": Policy()})
    product = jax.jit(jaxq.emulate(mapped, wide_psum))(A, B)
    single = jax.jit(jaxq.emulate(jnp.matmul, policy))
    parts = [single(A[:, i : i + 16], B[i : i + 16]) for i in range(0, 64, 16)]
    np.testing.assert_allclose(product, sum(parts), rtol=1e-6)


# Primitives that emulate does not know, does not support, or does not round.


def test_an_unknown_call_raises():
    solve = jaxq.emulate(lambda a: jnp.linalg.solve(a, a[0]), BF16)
    message = "'custom_linear_solve' calls a function, and emulate cannot round"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(solve, np.eye(3, dtype=np.float32))


def test_complex_numbers_raise():
    fft = jaxq.emulate(lambda x: jnp.abs(jnp.fft.fft(x)), BF16)
    with pytest.raises(NotImplementedError, match="computes complex numbers"):
        jax.eval_shape(fft, X)


def test_integers_are_not_rounded():
    x = np.arange(300, dtype=np.int32)
    assert jax.jit(jaxq.emulate(lambda x: jnp.sum(x) * 2 + 1, BF16))(x) == 299 * 300 + 1
    floats = jax.jit(jaxq.emulate(lambda x: x.astype(jnp.float32), BF16))(x)
    np.testing.assert_array_equal(floats, in_bfloat16(np.arange(300)))


def test_the_tables_name_primitives_that_exist():
    # jax does not list these in public, or only one of the supported versions has them.
    unlisted = {
        "addupdate", "all_gather_invariant", "checkpoint", "cholesky_update",
        "closed_call", "core_call", "debug_callback", "debug_print", "geqp3",
        "geqrf", "mesh_cast", "optimization_barrier", "ormqr", "pbroadcast",
        "pcast", "pjit", "psum", "psum_invariant", "psum_invariant_start",
        "psum_start", "pvary", "ragged_dot", "ragged_dot_general",
        "reduce_scatter", "reduce_scatter_start", "reshard", "scaled_dot",
        "scaled_matmul", "scaled_matmul_wrapper", "scatter-sub", "shard_map",
        "split", "symmetric_product", "tile", "unreduced_psum",
        "unreduced_psum_start", "unreduced_reduce_scatter",
        "unreduced_reduce_scatter_start",
    }  # fmt: skip
    existing = {
        p.name
        for p in vars(jex.core.primitives).values()
        if isinstance(p, jex.core.Primitive)
    } | unlisted
    existing |= {*kernels.FORMS, always_true_p.name, product_p.name}
    calls, exact, sums = set(CALLS), _primitives.EXACT, _primitives.WIDE_SUMS
    assert not exact & sums
    assert not (exact | sums) & calls
    assert calls | exact | sums | _primitives.NOT_CALLS <= existing


def test_primitives_that_only_move_numbers_do_not_round():
    def moves(x):
        y = jnp.concatenate([x, x[::-1]]).reshape(4, 8).T[1:, :2]
        y = jnp.where(y > 0, y, -jnp.abs(y))
        y = jnp.sort(jnp.pad(y, 1), axis=0)[:, jnp.array([0, 2])]
        return lax.stop_gradient(jnp.clip(y, -2, 2)).at[0, 0].set(x[3])

    assert_same(jax.jit(jaxq.emulate(moves, BF16))(X), jax.jit(moves)(X))


def _bundled():
    pytest.importorskip(
        "tokenizers", reason="the model comes with a tokenizer: pip install jaxq[hf]"
    )
    model, _ = jaxq.models.load("examples/tiny_llama")
    return model


def _one_layer():
    sizes = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "head_dim": 16,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = jaxq.models.LlamaConfig(**sizes, **heads, num_hidden_layers=1)
    return jaxq.models.Llama(config, rngs=nnx.Rngs(0))


@pytest.mark.heavy
@pytest.mark.parametrize("make", tables.thinned([_one_layer, _bundled], [_one_layer]))
def test_on_a_language_model(make):
    model, tokens = make(), random.integers(0, 32, (1, 32), dtype=np.int32)
    wide = jaxq.emulate(model, Policy("float32", "float32", "float32"))

    def run(tokens):
        return model(tokens)

    assert str(jax.make_jaxpr(wide)(tokens)) == str(jax.make_jaxpr(run)(tokens))
    plain = jax.jit(run)(tokens)
    assert_same(jax.jit(wide)(tokens), plain)
    narrow = jax.jit(jaxq.emulate(model, BF16))(tokens)
    assert narrow.dtype == plain.dtype
    error = np.abs(np.asarray(narrow) - plain)
    assert 0 < error.max() < 1
    np.testing.assert_array_equal(narrow, in_bfloat16(narrow))


# Random keys, narrow dtypes, and functions of whole numbers.


@pytest.mark.parametrize(
    ("key", "policy"),
    tables.thinned(
        itertools.product(("key", "PRNGKey"), ("both", "result")),
        [("key", "both"), ("PRNGKey", "result")],
    ),
)
def test_random_keys_are_not_rounded(key, policy):
    def draw(key):
        numbers = jax.random.normal(jax.random.split(key)[0], (64,))
        return numbers, jax.random.bernoulli(key, 0.5, (64,))

    exact, _ = jax.jit(draw)(jax.random.key(0))  # both kinds of key give the same
    policy = BF16 if policy == "both" else Policy(result="bfloat16")
    make_key = getattr(jax.random, key)
    numbers, coins = jax.jit(jaxq.emulate(draw, policy))(make_key(0))
    np.testing.assert_array_equal(numbers, in_bfloat16(numbers))
    np.testing.assert_allclose(numbers, exact, rtol=0.05, atol=0.05)
    assert coins.dtype == bool


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_narrow_sums_of_narrow_operands(dtype):
    ones = np.ones(1024, dtype)
    dims = (((0,), (0,)), ((), ()))

    def dot(a, b):
        return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

    narrow = jaxq.emulate(dot, Policy(accumulate="bfloat16"))
    chunked = jaxq.emulate(dot, Policy(accumulate="bfloat16", chunk=128))
    assert jax.jit(dot)(ones, ones) == 1024
    assert jax.jit(narrow)(ones, ones) == 256
    assert jax.jit(chunked)(ones, ones) == 1024


NARROW = {
    "operands": Policy("bfloat16"),
    "operands of wide sums": Policy("bfloat16", "float32"),
    "results of 8 bits": Policy(result="float8_e4m3fn"),
    "results of float16": Policy(result="float16"),
    "operands of 8 bits": Policy("float8_e5m2"),
}


@pytest.mark.parametrize("name", tables.thinned(NARROW, ["results of 8 bits"]))
def test_bfloat16_arrays_are_rounded_inside_one_program(name):
    # XLA widens bfloat16 arithmetic and does not round inside a program. Emulated
    # programs round after every operation.
    a = random.standard_normal(1024).astype(half)

    def fn(a):
        square = a.reshape(32, 32)
        total = (a + a[::-1]) + a
        product = square @ square + square
        return total.astype(jnp.float32), product.astype(jnp.float32)

    emulated = jaxq.emulate(fn, NARROW[name])
    for eager, jitted in zip(emulated(a), jax.jit(emulated)(a), strict=True):
        np.testing.assert_array_equal(eager, jitted)
        np.testing.assert_array_equal(in_bfloat16(jitted), jitted)


def test_whole_numbers_are_rounded_to_the_grid():
    narrow = Policy("float6_e2m3fn", None, "float6_e2m3fn")
    assert jax.jit(jaxq.emulate(jnp.ceil, narrow))(7.5) == 7.5
    assert jax.jit(jaxq.emulate(jnp.floor, BF16))(257.3) == 258  # 257 has 9 bits
    assert jax.jit(jaxq.emulate(lambda x: jnp.nextafter(x, 2.0), BF16))(1.0) == 1


def test_second_derivatives():
    assert jax.jit(jax.hessian(jaxq.emulate(lambda x: x**3, BF16)))(1.5) == 9
    fn = jaxq.emulate(lambda x: jnp.sin(x) * x, BF16)
    curvature = jax.jit(jax.grad(jax.grad(fn)))(1.25)
    expected = 2 * np.cos(1.25) - 1.25 * np.sin(1.25)
    np.testing.assert_allclose(curvature, expected, atol=0.02)


def test_policies_without_effect_or_of_wrong_types_raise():
    def fn(x):
        return lax.scan(lambda c, y: (jnp.maximum(c, y), c), x[0], x)[0]

    for name, reason in (
        ("max", "does not compute new num"),
        ("scan", "calls a function"),
    ):
        message = f"policy.primitives names '{name}', which {reason}.*never rounds"
        with pytest.raises(ValueError, match=message):
            jaxq.emulate(fn, Policy(primitives={name: BF16}))(X)
    for policy in (Policy(chunk=4), Policy("bfloat16", "float32", chunk=4)):
        message = "policy: chunk=4 is for narrow sums, but accumulate= is not narrow"
        with pytest.raises(ValueError, match=message):
            jaxq.emulate(fn, policy)
    message = "policy.operands: mantissa_bits must be a whole number, got 3.5"
    with pytest.raises(TypeError, match=message):
        jaxq.emulate(fn, Policy(Precision(8, 3.5)))
    with pytest.raises(TypeError, match="policy.primitives must be a dict"):
        jaxq.emulate(fn, Policy(primitives=BF16))
    with pytest.raises(TypeError, match="fn must be a function, got 3"):
        jaxq.emulate(3, BF16)
