"""emulate: every kind of function, in arithmetic checked against numpy's bfloat16 and against unrolled code."""

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
from jaxq.emulation import Policy, Precision, _emulate
from tests import tables

half = ml_dtypes.bfloat16
BF16 = Policy(operands="bfloat16", accumulate="float32", result="bfloat16")
random = np.random.default_rng(0)
X = random.standard_normal(16).astype(np.float32)
A, B = (
    random.standard_normal((8, 64)).astype(np.float32),
    random.standard_normal((64, 5)).astype(np.float32),
)


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


def test_elementwise_is_numpy_in_bfloat16():
    def fn(x, y):
        return (x * y + x) / y

    x, y = random.standard_normal((2, 4096)).astype(np.float32)
    got = jax.jit(jaxq.emulate(fn, BF16))(x, y)
    expected = fn(x.astype(half), y.astype(half)).astype(
        np.float32
    )  # numpy rounds every operation
    np.testing.assert_array_equal(got, expected)


def test_bfloat16_functions_are_rounded_where_xla_keeps_more():
    def fn(a, b):
        return ((a + b) + a).astype(
            jnp.float32
        )  # widened at once, XLA drops the last rounding

    a, b = random.standard_normal((2, 4096)).astype(half)
    np.testing.assert_array_equal(
        jax.jit(jaxq.emulate(fn, BF16))(a, b), ((a + b) + a).astype(np.float32)
    )


def test_wide_accumulation_is_exact_where_the_sum_is():
    a, b = random.integers(-8, 9, (2, 32, 256)).astype(np.float32)
    dims = (((1,), (1,)), ((), ()))
    got = jax.jit(
        jaxq.emulate(
            lambda a, b: lax.dot_general(a, b, dims), Policy("bfloat16", "float32")
        )
    )(a, b)
    native = lax.dot_general(
        a.astype(half), b.astype(half), dims, preferred_element_type=jnp.float32
    )
    np.testing.assert_array_equal(got, native)
    np.testing.assert_array_equal(got, a.astype(np.float64) @ b.T.astype(np.float64))


def test_wide_accumulation_stays_within_its_bound():
    got = np.asarray(
        jax.jit(jaxq.emulate(jnp.dot, Policy("bfloat16", "float32")))(A, B), np.float64
    )
    a, b = A.astype(half).astype(np.float64), B.astype(half).astype(np.float64)
    unit = 64 * 2.0**-24
    assert (np.abs(got - a @ b) <= unit / (1 - unit) * (np.abs(a) @ np.abs(b))).all()
    rounded = jax.jit(jaxq.emulate(jnp.dot, BF16))(A, B)
    np.testing.assert_array_equal(
        rounded, got.astype(np.float32).astype(half).astype(np.float32)
    )


def doubled(x):
    return x * 1.7 + x


def doubled_and_one(x):
    return doubled(x) + 1


def thrice(x):
    return doubled(doubled(doubled(x)))


STRUCTURED = {
    "jit": (lambda x: jax.jit(doubled)(x) + 1, doubled_and_one),
    "nested_jit": (
        lambda x: jax.jit(lambda y: jax.jit(doubled)(y) * 3)(x),
        lambda x: doubled(x) * 3,
    ),
    "remat": (lambda x: jax.checkpoint(doubled)(x) + 1, doubled_and_one),
    "scan": (
        lambda x: lax.scan(
            lambda c, y: (doubled(c) + y, c * y), x[0], x, reverse=True, unroll=2
        ),
        lambda x: _unrolled_scan(x),
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
    got = jax.jit(jaxq.emulate(structured, BF16))(X)
    expected, unrounded = rounded_and_not(plain)
    for a, b, c in zip(*map(jax.tree.leaves, (got, expected, unrounded)), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
        assert (bits(a) != bits(c)).any(), "nothing was rounded"


def test_eager_is_jitted():
    def fn(x):
        return lax.scan(lambda c, y: (doubled(c) + y, c), x[0], x)[0] + jnp.sum(
            jax.nn.gelu(x)
        )

    np.testing.assert_array_equal(
        jaxq.emulate(fn, BF16)(X), jax.jit(jaxq.emulate(fn, BF16))(X)
    )


def test_a_policy_that_changes_nothing_is_no_change():
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
        same = jaxq.emulate(fn, policy)
        assert str(jax.make_jaxpr(same)(X)) == str(jax.make_jaxpr(fn)(X))
        for found, plain in zip(value_and_slope(same), expected, strict=True):
            np.testing.assert_array_equal(bits(found), bits(plain))


def test_pytrees_go_in_and_come_out():
    def fn(tree, *, scale):
        return {"y": tree["a"] * scale, "n": tree["n"] + 1, "same": tree["a"]}

    out = jaxq.emulate(fn, BF16)({"a": X, "n": jnp.int32(3)}, scale=1.5)
    assert sorted(out) == ["n", "same", "y"]
    assert out["n"] == 4
    np.testing.assert_array_equal(out["same"], X)  # handed through, not computed
    np.testing.assert_array_equal(
        out["y"], (X.astype(half) * half(1.5)).astype(np.float32)
    )


def test_primitives_may_have_policies_of_their_own():
    policy = Policy(primitives={"exp": Policy(result="bfloat16")})
    got = jax.jit(jaxq.emulate(lambda x: jnp.exp(x) * 1.7, policy))(X)
    np.testing.assert_array_equal(
        got, np.asarray(jnp.exp(X)).astype(half).astype(np.float32) * np.float32(1.7)
    )
    with pytest.raises(
        ValueError,
        match="names 'dot', which is no primitive of jax. The function has dot_general",
    ):
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
def test_rules_of_custom_derivatives_are_kept(fn, slope, wrap):
    wrap = WRAPS[wrap]
    x = np.abs(X)

    def total(x):
        return jnp.sum(wrap(fn)(x))

    emulated = jaxq.emulate(total, BF16)
    # Operands and results are rounded on the way; the rule sees its inputs as they come.
    np.testing.assert_allclose(jax.jit(jax.grad(emulated))(x), slope * x, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(x), slope * x, rtol=1e-6)
    inside = jax.jit(jaxq.emulate(jax.grad(total), BF16))(x)
    np.testing.assert_allclose(inside, slope * x, rtol=2**-6)
    assert (np.asarray(inside).astype(half).astype(np.float32) == inside).all(), (
        "the backward pass is rounded too"
    )
    swept = jax.vmap(
        lambda m: jax.grad(jaxq.emulate(total, Policy(result=Precision(8, m))))(x)
    )
    np.testing.assert_allclose(
        jax.jit(swept)(np.array([3, 20])), [slope * x] * 2, rtol=1e-6
    )


def test_forward_mode_through_a_custom_jvp():
    forward = jax.jit(lambda x, t: jax.jvp(jaxq.emulate(_sevenfold, BF16), (x,), (t,)))
    y, t = forward(np.float32(0.3), np.float32(1))
    np.testing.assert_allclose(t, 2.1, rtol=1e-6)
    assert y == np.asarray(jnp.log1p(jnp.float32(half(0.3)))).astype(half).astype(
        np.float32
    )


def test_the_value_of_a_custom_function_is_the_same_with_and_without_its_gradient():
    for fn in (_hundredfold, _sevenfold):
        emulated = jaxq.emulate(lambda x, fn=fn: jnp.sum(fn(x)), BF16)
        x = np.abs(X)
        assert jax.jit(emulated)(x) == jax.jit(jax.value_and_grad(emulated))(x)[0]


def test_rounding_is_straight_through():
    def fn(x):
        return jnp.sum(jnp.sin(x * 3.0))

    got = jax.jit(jax.grad(jaxq.emulate(fn, BF16)))(X)
    inner = (X.astype(half) * half(3.0)).astype(np.float32)
    np.testing.assert_allclose(got, 3 * np.cos(inner), rtol=1e-5)
    swept = jax.jit(
        jax.grad(lambda x, m: jaxq.emulate(fn, Policy(result=Precision(8, m)))(x))
    )(X, 7)
    assert np.isfinite(swept).all()


def test_gradient_through_loops():
    def fn(x):
        return lax.scan(lambda c, y: (jnp.sin(c) * y, None), x[0], x)[0] + lax.cond(
            x[0] > 9, jnp.sum, jnp.max, x
        )

    wide = jax.jit(jax.grad(fn))(X)
    got = jax.jit(jax.grad(jaxq.emulate(fn, Policy(result="tfloat32"))))(X)
    np.testing.assert_allclose(got, wide, rtol=0.02, atol=1e-3)


# Sweeps, batches, meshes.


@pytest.mark.parametrize(
    "widths", tables.thinned([((2, 8, 14),), ((4, 6, 10, 12),)], [((2, 8, 14),)])
)
def test_vmap_over_mantissa_bits(widths):
    def fn(x):
        return jax.nn.softmax(lax.scan(lambda c, y: (c * 0.9 + y, c), x[0], x)[1]) @ x

    widths = np.array(widths)
    swept = jax.jit(
        jax.vmap(
            lambda m: jaxq.emulate(fn, Policy("float32", None, Precision(8, m)))(X)
        )
    )(widths)
    single = [
        jax.jit(jaxq.emulate(fn, Policy("float32", None, Precision(8, int(m)))))(X)
        for m in widths
    ]
    np.testing.assert_array_equal(swept, np.stack(single))
    error = np.abs(np.asarray(swept) - jax.jit(fn)(X))
    assert error[0] > 2 ** int(widths[-1] - widths[0] - 3) * error[-1] > 0


def test_vmap_over_mantissa_bits_of_a_narrow_accumulator():
    sums = jax.jit(
        jax.vmap(
            lambda m: jaxq.emulate(jnp.sum, Policy(accumulate=Precision(8, m)))(
                np.ones(600, np.float32)
            )
        )
    )
    assert sums(np.array([4, 7, 8, 10])).tolist() == [32, 256, 512, 600]


def test_what_is_rounded_already_is_not_rounded_again():
    def count(fn, policy):
        return str(jax.make_jaxpr(jaxq.emulate(fn, policy))(X)).count(
            "bitcast_convert_type[new_dtype=float32]"
        )

    def moved(x):
        y = (x * x).reshape(4, 4)
        return jnp.concatenate([y.T, y]) + jnp.concatenate([y[::-1], y])

    both = Policy("bfloat16", None, "bfloat16")
    assert count(lambda x: x * x, both) == 3  # two operands and a result
    assert count(lambda x: (x * x) * (x * x), both) == 3 + 3 + 1
    assert count(moved, both) == 3 + 1
    # Rounded to something else, or compared with a number nobody rounded.
    assert (
        count(lambda x: (x * x) * (x * x), Policy("float16", None, "bfloat16"))
        == 3 + 3 + 3
    )
    assert count(lambda x: jnp.exp(jnp.maximum(x * x, x)), both) == 3 + 2

    def swept(m):
        return jaxq.emulate(
            lambda x: (x * x) * x, Policy(Precision(8, m), None, Precision(8, m))
        )(X)

    twice = str(jax.make_jaxpr(swept)(7)).count(
        "bitcast_convert_type[new_dtype=float32]"
    )  # and once for the limit
    assert twice == 2 * (3 + 2)  # the same tracer in both

    y = (X.astype(half) * X.astype(half)).reshape(4, 4)  # numpy rounds every operation
    expected = np.concatenate([y.T, y]) + np.concatenate([y[::-1], y])
    np.testing.assert_array_equal(
        jax.jit(jaxq.emulate(moved, both))(X), expected.astype(np.float32)
    )


def test_vmap_over_inputs():
    fn = jaxq.emulate(
        lambda x: jax.nn.gelu(x) @ B, Policy("bfloat16", "bfloat16", "bfloat16")
    )
    np.testing.assert_array_equal(jax.jit(jax.vmap(fn))(A), jax.jit(fn)(A))


@pytest.mark.parametrize("accumulate", ["float32", "bfloat16"])
def test_sharded_inputs(accumulate):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(4), ("d",))
    fn = jax.jit(
        jaxq.emulate(
            lambda a, b: jnp.tanh(a @ b), Policy("bfloat16", accumulate, "bfloat16")
        )
    )
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
    with pytest.raises(
        NotImplementedError,
        match="'psum_invariant' has no form with a narrow accumulator",
    ):
        jax.eval_shape(jaxq.emulate(mapped, policy), A, B)
    wide_psum = Policy("bfloat16", "bfloat16", primitives={"psum_invariant": Policy()})
    got = jax.jit(jaxq.emulate(mapped, wide_psum))(A, B)
    single = jax.jit(jaxq.emulate(jnp.matmul, policy))
    parts = [single(A[:, i : i + 16], B[i : i + 16]) for i in range(0, 64, 16)]
    np.testing.assert_allclose(got, sum(parts), rtol=1e-6)


# What is not known is not passed over.


def test_an_unknown_call_raises():
    with pytest.raises(
        NotImplementedError,
        match="'custom_linear_solve' calls a function, and how is not known",
    ):
        jax.eval_shape(
            jaxq.emulate(lambda a: jnp.linalg.solve(a, a[0]), BF16),
            np.eye(3, dtype=np.float32),
        )


def test_complex_numbers_raise():
    with pytest.raises(NotImplementedError, match="computes complex numbers"):
        jax.eval_shape(jaxq.emulate(lambda x: jnp.abs(jnp.fft.fft(x)), BF16), X)


def test_integers_are_left_alone():
    x = np.arange(300, dtype=np.int32)
    assert jax.jit(jaxq.emulate(lambda x: jnp.sum(x) * 2 + 1, BF16))(x) == 299 * 300 + 1
    got = jax.jit(jaxq.emulate(lambda x: x.astype(jnp.float32), BF16))(x)
    np.testing.assert_array_equal(got, np.arange(300).astype(half).astype(np.float32))


def test_the_tables_name_primitives_that_exist():
    # What jax does not list in public, or has in one supported version only.
    unlisted = {
        *[
            "all_gather_invariant",
            "checkpoint",
            "closed_call",
            "core_call",
            "debug_callback",
            "debug_print",
            "mesh_cast",
        ],
        *[
            "optimization_barrier",
            "pbroadcast",
            "pcast",
            "pjit",
            "pvary",
            "ragged_dot",
            "ragged_dot_general",
            "reshard",
        ],
        *["scaled_matmul", "scatter-sub", "shard_map", "split", "tile"],
        *[
            "addupdate",
            "cholesky_update",
            "geqp3",
            "geqrf",
            "ormqr",
            "psum",
            "psum_invariant",
            "psum_invariant_start",
        ],
        *[
            "psum_start",
            "reduce_scatter",
            "reduce_scatter_start",
            "scaled_dot",
            "scaled_matmul_wrapper",
        ],
        *[
            "symmetric_product",
            "unreduced_psum",
            "unreduced_psum_start",
            "unreduced_reduce_scatter",
        ],
        *["unreduced_reduce_scatter_start"],
    }
    known = {
        p.name
        for p in vars(jex.core.primitives).values()
        if isinstance(p, jex.core.Primitive)
    } | unlisted
    known |= set(kernels.FORMS)
    calls, exact, sums = set(_emulate._CALLS), _emulate._EXACT, _emulate._WIDE_SUMS
    assert not exact & sums
    assert not (exact | sums) & calls
    assert calls | exact | sums | _emulate._NO_CALLS <= known


def test_primitives_that_only_move_numbers_do_not_round():
    def moves(x):
        y = jnp.concatenate([x, x[::-1]]).reshape(4, 8).T[1:, :2]
        y = jnp.where(y > 0, y, -jnp.abs(y))
        y = jnp.sort(jnp.pad(y, 1), axis=0)[:, jnp.array([0, 2])]
        return lax.stop_gradient(jnp.clip(y, -2, 2)).at[0, 0].set(x[3])

    np.testing.assert_array_equal(
        bits(jax.jit(jaxq.emulate(moves, BF16))(X)), bits(jax.jit(moves)(X))
    )


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
    assert str(jax.make_jaxpr(wide)(tokens)) == str(
        jax.make_jaxpr(lambda tokens: model(tokens))(tokens)
    )
    same = jax.jit(wide)(tokens)
    plain = jax.jit(lambda tokens: model(tokens))(tokens)
    np.testing.assert_array_equal(bits(same), bits(plain))
    narrow = jax.jit(jaxq.emulate(model, BF16))(tokens)
    assert narrow.dtype == plain.dtype
    error = np.abs(np.asarray(narrow) - plain)
    assert 0 < error.max() < 1
    assert (np.asarray(narrow).astype(half).astype(np.float32) == narrow).all()


# What a function may hold besides float32 arithmetic.


@pytest.mark.parametrize(
    ("key", "policy"),
    tables.thinned(
        itertools.product(("key", "PRNGKey"), ("both", "result")),
        [("key", "both"), ("PRNGKey", "result")],
    ),
)
def test_random_keys_pass_through(key, policy):
    def draw(k):
        return jax.random.normal(jax.random.split(k)[0], (64,)), jax.random.bernoulli(
            k, 0.5, (64,)
        )

    exact, _ = jax.jit(draw)(jax.random.key(0))  # of either kind of key
    policy = BF16 if policy == "both" else Policy(result="bfloat16")
    got, kept = jax.jit(jaxq.emulate(draw, policy))(getattr(jax.random, key)(0))
    np.testing.assert_array_equal(np.asarray(got).astype(half).astype(np.float32), got)
    np.testing.assert_allclose(got, exact, rtol=0.05, atol=0.05)
    assert kept.dtype == bool


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_narrow_sums_of_narrow_operands(dtype):
    ones = np.ones(1024, dtype)
    dims = (((0,), (0,)), ((), ()))

    def dot(a, b):
        return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

    assert jax.jit(dot)(ones, ones) == 1024
    assert jax.jit(jaxq.emulate(dot, Policy(accumulate="bfloat16")))(ones, ones) == 256
    assert (
        jax.jit(jaxq.emulate(dot, Policy(accumulate="bfloat16", chunk=128)))(ones, ones)
        == 1024
    )


NARROW = {
    "operands": Policy("bfloat16"),
    "operands of wide sums": Policy("bfloat16", "float32"),
    "results of 8 bits": Policy(result="float8_e4m3fn"),
    "results of float16": Policy(result="float16"),
    "operands of 8 bits": Policy("float8_e5m2"),
}


@pytest.mark.parametrize("name", tables.thinned(NARROW, ["results of 8 bits"]))
def test_narrow_arrays_are_narrow_inside_one_program(name):
    # XLA widens bfloat16 arithmetic and drops the roundings in between; emulated programs have them all.
    a = random.standard_normal(1024).astype(half)

    def fn(a):
        square = a.reshape(32, 32)
        return ((a + a[::-1]) + a).astype(jnp.float32), (
            square @ square + square
        ).astype(jnp.float32)

    emulated = jaxq.emulate(fn, NARROW[name])
    for eager, jitted in zip(emulated(a), jax.jit(emulated)(a), strict=True):
        np.testing.assert_array_equal(eager, jitted)
        np.testing.assert_array_equal(
            np.asarray(jitted).astype(half).astype(np.float32), jitted
        )


def test_whole_numbers_may_lie_beyond_a_grid():
    narrow = Policy("float6_e2m3fn", None, "float6_e2m3fn")
    assert jax.jit(jaxq.emulate(jnp.ceil, narrow))(7.5) == 7.5
    assert jax.jit(jaxq.emulate(jnp.floor, BF16))(257.3) == 258  # 257 has 9 bits
    assert jax.jit(jaxq.emulate(lambda x: jnp.nextafter(x, 2.0), BF16))(1.0) == 1


def test_second_derivatives():
    assert jax.jit(jax.hessian(jaxq.emulate(lambda x: x**3, BF16)))(1.5) == 9
    curvature = jax.jit(
        jax.grad(jax.grad(jaxq.emulate(lambda x: jnp.sin(x) * x, BF16)))
    )
    np.testing.assert_allclose(
        curvature(1.25), 2 * np.cos(1.25) - 1.25 * np.sin(1.25), atol=0.02
    )


def test_what_would_do_nothing_is_said():
    def fn(x):
        return lax.scan(lambda c, y: (jnp.maximum(c, y), c), x[0], x)[0]

    for name, message in (("max", "makes no numbers"), ("scan", "calls a function")):
        with pytest.raises(
            ValueError,
            match=f"policy.primitives names '{name}', which {message}.*never rounds",
        ):
            jaxq.emulate(fn, Policy(primitives={name: BF16}))(X)
    for policy in (Policy(chunk=4), Policy("bfloat16", "float32", chunk=4)):
        with pytest.raises(
            ValueError,
            match="policy: chunk=4 cuts narrow sums; accumulate= is not narrow",
        ):
            jaxq.emulate(fn, policy)
    with pytest.raises(
        TypeError, match="policy: mantissa_bits must be a whole number, got 3.5"
    ):
        jaxq.emulate(fn, Policy(Precision(8, 3.5)))
    with pytest.raises(TypeError, match="policy.primitives must be a dict"):
        jaxq.emulate(fn, Policy(primitives=BF16))
    with pytest.raises(TypeError, match="fn must be a function, got 3"):
        jaxq.emulate(3, BF16)
