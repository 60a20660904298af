"""The quantized KV cache against float64 attention.

Numpy quantizes the keys and values by the rule of the paper.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.methods import hadamard
from jaxq.ops import KVCache, KVCacheSpec
from tests import tables
from tests.arrays import assert_same

B, M, N, H, G, R = 3, 2, 4, 32, 8, 16
KIVI = jaxq.QuantSpec(
    "uint2", jaxq.PerChannel(), offset="min"
)  # scales and minimums in float32
SPECS = {
    "kivi2": KIVI,
    "kivi4": KIVI.replace(format="uint4"),
    "int8": jaxq.QuantSpec("int8"),
    "int4": jaxq.QuantSpec("int4"),
}
STORED = (
    "int8",
    "int4",
    "int2",
    "fp8",
    "nf4",
    "nf4_dq",
    "uint4",
    "nvfp4",
    "mxfp4",
    "int3",
    "uint8",
)
over_stored = pytest.mark.parametrize("spec", tables.thinned(STORED, ["int2"]))


def spec_of(spec, **changes):
    return KVCacheSpec(spec, **{"group": G, "residual": R, **changes})


def empty(spec="int4", length=96, batch=B, dtype=jnp.float32, window=None, **changes):
    how = spec if isinstance(spec, KVCacheSpec) else spec_of(spec, **changes)
    return KVCache.empty(
        how,
        batch=batch,
        num_heads=M,
        length=length,
        head_dim=H,
        window=window,
        dtype=dtype,
    )


def text(t, batch=B, seed=0, dtype=jnp.float32):
    """Keys with a few channels of large magnitude or mean, values without."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, batch, t, M, H))
    k[..., 3] = 8 * k[..., 3] + 5
    k[..., 7] -= 9
    return jnp.asarray(k, dtype), jnp.asarray(v, dtype)


def queries(t, batch=B, seed=9, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, t, N, H)), dtype)


def rounded(x, name, axis):
    """Quantized and dequantized by numpy, float64, scales shared along `axis`."""
    if name.startswith("kivi"):
        low, top = x.min(axis, keepdims=True), 2.0 ** int(name[4:]) - 1
        step = (x.max(axis, keepdims=True) - low) / top
        return np.rint(np.clip((x - low) / step, 0, top)) * step + low
    top = 2.0 ** (int(name[3:]) - 1) - 1
    step = np.abs(x).max(axis, keepdims=True) / top
    return np.rint(x / step) * step


def as_stored(k, v, name):
    """One text `[n, m, h]` as the cache reads it.

    All but the newest R tokens are quantized, in groups of G tokens.
    """
    k, v = np.asarray(k, np.float64), np.asarray(v, np.float64)
    n = len(k)
    out_k, out_v = k.copy(), v.copy()
    for start in range(0, max(0, n - R), G):
        out_k[start : start + G] = rounded(k[start : start + G], name, 0)
        out_v[start : start + G] = rounded(v[start : start + G], name, 2)
    out_k[max(0, n - R) :], out_v[max(0, n - R) :] = (
        k[max(0, n - R) :],
        v[max(0, n - R) :],
    )
    return out_k, out_v


def attention(q, k, v, window=None):
    """Queries `[t, n, h]` at the last t positions of keys `[s, m, h]`, head by head."""
    q = np.asarray(q, np.float64)
    t, n, h = q.shape
    out = np.zeros((t, n, h))
    for i in range(t):
        last = len(k) - t + i
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(n):
            keys, values = (
                k[first : last + 1, head // (n // M)],
                v[first : last + 1, head // (n // M)],
            )
            scores = keys @ q[i, head] / np.sqrt(h)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("name", tables.thinned(SPECS, ["kivi2"]))
def test_attention_equals_attention_in_numpy(name):
    """Slots of 0 tokens, of fewer than the residual window and of more."""
    lengths, (k, v), q = [0, 11, 83], text(86), queries(3)
    cache = empty(SPECS[name]).append(k[:, :83], v[:, :83], count=jnp.array(lengths))
    rows = [(k[i, n : n + 3], v[i, n : n + 3]) for i, n in enumerate(lengths)]
    new = [jnp.stack(x) for x in zip(*rows, strict=True)]
    before, after = cache.attend(q, *new), cache.append(*new).attend(q)
    for i, n in enumerate(lengths):
        past = as_stored(k[i, :n], v[i, :n], name)
        here = [
            np.concatenate([old, np.asarray(x)])
            for old, x in zip(past, rows[i], strict=True)
        ]
        np.testing.assert_allclose(before[i], attention(q[i], *here), atol=2e-5)
        np.testing.assert_allclose(
            after[i],
            attention(q[i], *as_stored(k[i, : n + 3], v[i, : n + 3], name)),
            atol=2e-5,
        )


def test_fewer_bits_give_more_error():
    """A cache that quantizes nothing fails here."""
    assert not any(
        np.isnan(np.asarray(leaf, np.float32)).any()
        for leaf in jax.tree.leaves(empty("mxfp4"))
    )
    (k, v), q = text(83), queries(1)
    exact = np.stack(
        [attention(q[i], np.asarray(k[i]), np.asarray(v[i])) for i in range(B)]
    )
    errors = [
        float(jnp.abs(empty(s).append(k, v).attend(q) - exact).max())
        for s in ("int8", "int4", KIVI)
    ]
    assert 1e-4 < errors[0] < errors[1] < errors[2] < 2


@over_stored
def test_one_by_one_or_together_gives_the_same_bits(spec):
    k, v = text(62)
    whole = empty(spec).append(k, v)

    def step(cache, token):
        return cache.append(*(x[:, None] for x in token)), None

    single, _ = jax.lax.scan(step, empty(spec), (k.swapaxes(0, 1), v.swapaxes(0, 1)))
    pieces = empty(spec)
    for a, b in (
        (0, 20),
        (20, 21),
        (21, 41),
        (41, 61),
        (61, 62),
    ):  # pieces of 20 tokens and of 1: two programs
        pieces = pieces.append(k[:, a:b], v[:, a:b])
    assert_same(single, whole)
    assert_same(pieces, whole)


@pytest.mark.heavy
def test_without_jit_the_bits_are_the_same():
    k, v = text(62)
    with jax.disable_jit():
        eager = empty("int2").append(k, v)
    assert_same(eager, empty("int2").append(k, v))


@pytest.mark.parametrize(
    "dtype", tables.thinned([jnp.bfloat16, jnp.float16], [jnp.bfloat16])
)
def test_narrow_dtypes_accumulate_in_float32(dtype):
    (k, v), q = text(83, dtype=dtype), queries(1, dtype=dtype)
    y = empty(SPECS["int8"], dtype=dtype).append(k, v).attend(q)
    assert y.dtype == jnp.float32
    for i in range(B):
        np.testing.assert_allclose(
            y[i], attention(q[i], *as_stored(k[i], v[i], "int8")), atol=0.03
        )


def test_slots_are_caches_of_their_own():
    """Texts that start and end at different times give what single caches give."""
    slots, k, v, q = empty(), *text(60), queries(2)
    alone = [empty(batch=1) for _ in range(B)]
    at = np.zeros(B, int)
    for step, counts in enumerate(
        [(20, 0, 7), (1, 20, 7), (7, 7, 0), (1, 0, 7), (7, 20, 1)]
    ):
        if step == 3:
            slots, alone[1], at[1] = slots.reset([1]), empty(batch=1), 0
        t = max(counts)
        new = [
            jnp.stack([jnp.roll(x[i], -at[i], axis=0)[:t] for i in range(B)])
            for x in (k, v)
        ]
        slots = slots.append(*new, count=jnp.array(counts))
        for i, count in enumerate(counts):
            if count:
                alone[i] = alone[i].append(
                    new[0][i : i + 1, :count], new[1][i : i + 1, :count]
                )
            at[i] += count
        y = slots.attend(q)
        for i in range(B):
            np.testing.assert_allclose(
                y[i], alone[i].attend(q[i : i + 1])[0], atol=1e-6
            )
    assert slots.lengths.tolist() == [36, 20, 22]


def test_an_emptied_slot_is_never_read_again():
    k, v = text(70)
    bad = empty().append(k.at[1].set(jnp.nan), v.at[1].set(jnp.inf))
    q, good = queries(1), empty().append(k, v)
    assert bool(jnp.isnan(bad.attend(q)[1]).all())
    np.testing.assert_array_equal(
        bad.attend(q)[::2], good.attend(q)[::2]
    )  # the other slots are not affected
    freed = bad.reset(jnp.array([False, True, False]))
    assert float(jnp.abs(freed.attend(q)[1]).max()) == 0
    again = freed.append(k[:, :20], v[:, :20], count=jnp.array([0, 20, 0]))
    np.testing.assert_allclose(
        again.attend(q)[1], empty().append(k[:, :20], v[:, :20]).attend(q)[1], atol=1e-6
    )


@pytest.mark.parametrize("window", tables.thinned([1, R, R + 1, 30, 41], [30]))
def test_a_window_stores_only_what_it_reads(window):
    length = 96
    small, (k, v), q = empty("int4", length, window=window), text(length), queries(1)
    full = dataclasses.replace(
        empty("int4", length), window=window
    )  # stores all tokens and reads those of the window
    for a, b in ((0, 1), (1, 40), (40, 41), (41, 80), (80, 81), (81, 82)):
        new = k[:, a:b], v[:, a:b]
        np.testing.assert_allclose(
            small.attend(queries(b - a), *new),
            full.attend(queries(b - a), *new),
            atol=5e-6,
            err_msg=f"{a}:{b}",
        )
        small, full = small.append(*new), full.append(*new)
        np.testing.assert_allclose(small.attend(q), full.attend(q), atol=5e-6)
    assert small.nbytes == empty("int4", 100_000, window=window).nbytes
    assert small.num_groups * G <= max(0, window - R) + 2 * G


@pytest.mark.heavy
def test_any_block_size_gives_the_same_attention():
    (k, v), q = text(90), queries(90)
    cache = empty().append(k[:, :80], v[:, :80], count=jnp.array([80, 0, 33]))
    for new in ((), (k, v)):
        one = cache.attend(q if new else q[:, :5], *new, block=1000)
        for block in (1, 56):
            np.testing.assert_allclose(
                cache.attend(q if new else q[:, :5], *new, block=block), one, atol=5e-6
            )


@pytest.mark.heavy
def test_rotation_leaves_scores_and_spreads_outliers():
    (k, v), q = text(80), queries(1)
    short = [
        empty("int4", rotation=f).append(k[:, :R], v[:, :R]).attend(q)
        for f in (None, hadamard)
    ]
    np.testing.assert_allclose(*short, atol=2e-5)  # no token is quantized yet
    # A large channel that shares its scale with others costs them precision. The
    # rotation spreads it over all channels.
    k = (
        jnp.asarray(np.random.default_rng(4).normal(size=k.shape), jnp.float32)
        .at[..., 3]
        .set(10)
    )
    exact = np.stack(
        [attention(q[i], np.asarray(k[i]), np.asarray(v[i])) for i in range(B)]
    )
    errors = []
    for rotation in (None, hadamard):
        how = spec_of(
            jaxq.QuantSpec("int4", jaxq.PerTensor()), values="int8", rotation=rotation
        )
        errors.append(float(jnp.abs(empty(how).append(k, v).attend(q) - exact).mean()))
    assert errors[1] < 0.8 * errors[0]


def test_under_jit_scan_and_vmap():
    (k, v), q = text(40), queries(1)
    cache = empty().append(k, v)
    step = jax.jit(lambda cache, q, k, v: (cache.attend(q, k, v), cache.append(k, v)))
    y, grown = step(cache, q, k[:, :1], v[:, :1])
    np.testing.assert_allclose(y, cache.attend(q, k[:, :1], v[:, :1]), atol=1e-6)
    assert_same(grown, cache.append(k[:, :1], v[:, :1]))
    layers = jax.tree.map(lambda *x: jnp.stack(x), cache, empty())
    stacked = jax.vmap(step)(
        layers, *(jnp.stack([x, x]) for x in (q, k[:, :1], v[:, :1]))
    )
    assert_same(jax.tree.map(lambda x: x[0], stacked[1]), grown)
    np.testing.assert_allclose(stacked[0][0], y, atol=1e-6)
    assert step._cache_size() == 1


@pytest.mark.parametrize("preset", tables.thinned(["int4", "nf4", "int2"], ["int4"]))
def test_a_decode_step_never_holds_the_cache_in_floats(preset):
    b, m, length, h = 2, 4, 4096, 64
    cache = jax.eval_shape(
        lambda: KVCache.empty(
            preset, batch=b, num_heads=m, length=length, head_dim=h, dtype=jnp.float32
        )
    )
    new = jax.ShapeDtypeStruct((b, 1, m, h), jnp.float32)
    step = jax.jit(
        lambda cache, q, k, v: (cache.attend(q, k, v), cache.append(k, v)),
        donate_argnums=0,
    )
    memory = step.lower(cache, new, new, new).compile().memory_analysis()
    in_floats = 2 * b * m * length * h * 4
    assert memory.temp_size_in_bytes < in_floats / 4
    assert (
        memory.alias_size_in_bytes >= cache.keys.data.size + cache.values.data.size
    )  # grown in place


def test_int4_takes_less_than_three_tenths_of_bfloat16():
    b, m, length, h = 1, 2, 2048, 64
    cache = KVCache.empty("int4", batch=b, num_heads=m, length=length, head_dim=h)
    num_bytes = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))
    assert num_bytes == cache.nbytes
    assert num_bytes <= 0.3 * (2 * b * m * length * h * 2)


def test_more_tokens_than_length():
    k, v = text(40)
    cache = empty(length=32).append(k[:, :30], v[:, :30])
    with pytest.raises(
        ValueError, match="slot 0 holds 30 tokens, and 3 more exceed its length 32"
    ):
        cache.append(k[:, :3], v[:, :3])
    assert cache.append(
        k[:, :3], v[:, :3], count=jnp.array([2, 1, 0])
    ).lengths.tolist() == [32, 31, 30]
    # Under jit the oldest group is overwritten.
    over = jax.jit(lambda c: c.append(k[:, 30:], v[:, 30:]))(cache)
    stored = over.num_groups * G + R
    assert bool(jnp.isfinite(over.attend(queries(1))).all())
    assert over.lengths.tolist() == [40] * B
    assert stored < 40


def test_leaves_are_saved_and_loaded(tmp_path):
    (k, v), q = text(50), queries(1)
    cache = empty("int2").append(k, v)
    names = ("keys", "values", "recent_keys", "recent_values", "lengths")
    jaxq.save(
        tmp_path / "cache.safetensors", {name: getattr(cache, name) for name in names}
    )
    again = dataclasses.replace(
        empty("int2"), **jaxq.load(tmp_path / "cache.safetensors")
    )
    np.testing.assert_array_equal(again.attend(q), cache.attend(q))
    assert again.append(k[:, :30], v[:, :30]).keys.meta.layout == "rows"
    # Files hold codes along rows.
    again = dataclasses.replace(again, keys=jaxq.relayout(again.keys, "columns"))
    assert_same(again, cache)


def test_equal_specs_are_one_program():
    traced = []

    @jax.jit
    def step(cache):
        traced.append(1)
        return cache.lengths

    for _ in range(2):
        step(empty(spec_of("int4", rotation=hadamard)))
    assert len(traced) == 1


ERRORS = {
    "dtype": (
        lambda c, k, v: c.append(k.astype(jnp.bfloat16), v),
        TypeError,
        "expected float32, got k: bfloat16",
    ),
    "heads": (
        lambda c, k, v: c.append(k[:, :, :1], v[:, :, :1]),
        ValueError,
        "expected [3, t, 2, 32], got k: float32",
    ),
    "ndim": (
        lambda c, k, v: c.append(k[0], v[0]),
        ValueError,
        "got k: float32[4,2,32]",
    ),
    "two shapes": (
        lambda c, k, v: c.append(k, v[:, :3]),
        ValueError,
        "k and v must have one shape",
    ),
    "list": (
        lambda c, k, v: c.append([1.0], v),
        TypeError,
        "k must be an array, got list",
    ),
    "count": (
        lambda c, k, v: c.append(k, v, count=jnp.array([1, 2])),
        ValueError,
        "count must be int32[3], got",
    ),
    "count beyond": (
        lambda c, k, v: c.append(k, v, count=jnp.array([1, 2, 5])),
        ValueError,
        "must be in [0, 4]",
    ),
    "one of two": (
        lambda c, k, v: c.attend(queries(4), k),
        TypeError,
        "got only k",
    ),
    "query heads": (
        lambda c, k, v: c.attend(queries(4)[:, :, :3]),
        ValueError,
        "n a multiple of 2",
    ),
    "key a query": (
        lambda c, k, v: c.attend(queries(2), k, v),
        ValueError,
        "q has 2 tokens and k has 4",
    ),
    "stack": (
        lambda c, k, v: jax.tree.map(lambda x: x[None], c).append(k, v),
        ValueError,
        "is a stack of caches",
    ),
    "slot": (
        lambda c, k, v: c.reset([3]),
        ValueError,
        "slots must be in [-3, 3), got [3]",
    ),
    "mask": (
        lambda c, k, v: c.reset(np.array([True])),
        ValueError,
        "must be bool[3], got bool[1]",
    ),
    "float slots": (
        lambda c, k, v: c.reset([0.5]),
        TypeError,
        "slots must be integer indices or bool[3]",
    ),
    "preset": (lambda c, k, v: empty("int5"), ValueError, "unknown preset"),
    "format": (
        lambda c, k, v: KVCache.empty(
            "uint2", batch=1, num_heads=1, length=8, head_dim=8
        ),
        ValueError,
        "uint2",
    ),
    "group": (
        lambda c, k, v: empty(jaxq.QuantSpec("int4", jaxq.PerGroup(3))),
        ValueError,
        "not a multiple of group",
    ),
    "residual": (
        lambda c, k, v: spec_of("int4", residual=4),
        ValueError,
        "less than group 8",
    ),
    "size": (
        lambda c, k, v: empty(length=0),
        ValueError,
        "length is 0; it must be at least 1",
    ),
    "no size": (
        lambda c, k, v: empty(length=2.5),
        TypeError,
        "length must be a whole number, got 2.5",
    ),
    "integer cache": (
        lambda c, k, v: empty(dtype=jnp.int8),
        TypeError,
        "dtype must be one of float32",
    ),
    "random": (
        lambda c, k, v: spec_of(jaxq.QuantSpec("int8", rounding="stochastic")),
        ValueError,
        "has rounding='stochastic'",
    ),
    "rotation": (
        lambda c, k, v: spec_of("int8", rotation=True),
        TypeError,
        "such as jaxq.methods.hadamard",
    ),
    "past window": (
        lambda c, k, v: empty(window=20).append(k, v).append(k, v).attend(queries(30)),
        ValueError,
        "Pass k and v to attend, and append them to the cache afterwards",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    k, v = text(4)
    with pytest.raises(error) as info:
        call(empty(), k, v)
    assert message in str(info.value)
