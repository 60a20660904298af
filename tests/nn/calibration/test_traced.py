"""Statistics of a tree's arrays: which products a trace shows, and their inputs.

The reference for the rows is numpy. Batches have at most seven rows, or seven sequences
of fewer than eight rows, so no row of the first batch is held out.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.nn.calibration import (
    ParameterFunction,
    StatsRequest,
    Watched,
    collect_traced_stats,
    find_uses,
)
from tests.arrays import normal


def function_of(forward, params):
    leaves, structure = jax.tree.flatten(params)
    return ParameterFunction(
        lambda leaves, batch: forward(jax.tree.unflatten(structure, leaves), batch),
        leaves,
    )


def uses_of(forward, params, batch):
    """The use of each leaf, in the order of the tree."""
    function = function_of(forward, params)
    groups = [(position,) for position in range(len(function.leaves))]
    return list(find_uses(function, batch, groups).values())


def stats_of(forward, params, batches, position=0, **kwargs):
    """The use of one leaf, and the statistics of its inputs."""
    function = function_of(forward, params)
    use = find_uses(function, batches[0], [(position,)])[position,]
    assert not use.problem
    watched = {"w": Watched((position,), use, StatsRequest())}
    stats = collect_traced_stats(function, batches, watched, caller="test", **kwargs)
    return use, stats["w"]


def assert_rows(stats, rows):
    """The statistics are those of some rows, `[*batch, rows, K]`."""
    rows = np.asarray(rows, np.float64)
    hessian = 2 * np.swapaxes(rows, -1, -2) @ rows / rows.shape[-2]
    np.testing.assert_array_equal(stats.count, np.full(rows.shape[:-2], rows.shape[-2]))
    np.testing.assert_allclose(stats.mean, rows.mean(-2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.hessian, hessian, rtol=1e-4, atol=1e-4)


@jax.custom_vjp
def doubled_product(x, w):
    return 2 * (x @ w)


doubled_product.defvjp(lambda x, w: (doubled_product(x, w), None), lambda r, g: (g, g))

bf16 = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
X = normal(2, 3, 4)
ROWS = np.asarray(X).reshape(-1, 4)
BY_EXPERT = normal(3, 5, 4)

# The shape of w, the input, the function, (contracting, batch), and the rows.
ARRANGEMENTS = {
    "plain": ((4, 6), X, lambda w, x: x @ w, ((0,), ()), ROWS),
    "transposed": ((6, 4), X, lambda w, x: x @ w.T, ((1,), ()), ROWS),
    "left": ((6, 4), X, lambda w, x: jnp.einsum("fd,btd->fbt", w, x), ((1,), ()), ROWS),
    "heads": (
        (4, 2, 3),
        X,
        lambda w, x: jnp.einsum("btd,dhk->bhtk", x, w),
        ((0,), ()),
        ROWS,
    ),
    "of heads": (
        (2, 2, 6),
        X.reshape(2, 3, 2, 2),
        lambda w, x: jnp.einsum("bthk,hkd->btd", x, w),
        ((0, 1), ()),
        ROWS,
    ),
    "contracted in another order": (
        (2, 6, 2),
        X.reshape(2, 3, 2, 2),
        lambda w, x: jnp.einsum("btkh,hdk->btd", x, w),
        ((0, 2), ()),
        np.asarray(X).reshape(6, 2, 2).swapaxes(1, 2).reshape(6, 4),
    ),
    "merged": ((2, 2, 6), X, lambda w, x: x @ w.reshape(4, 6), ((0, 1), ()), ROWS),
    "split": (
        (4, 6),
        X.reshape(2, 3, 2, 2),
        lambda w, x: jnp.einsum("bthk,hkd->btd", x, w.reshape(2, 2, 6)),
        ((0,), ()),
        ROWS,
    ),
    "kept axes split": (
        (4, 6),
        X,
        lambda w, x: jnp.einsum("btd,dhk->bthk", x, w.reshape(4, 2, 3)),
        ((0,), ()),
        ROWS,
    ),
    "experts": (
        (3, 4, 6),
        BY_EXPERT,
        lambda w, x: jnp.einsum("ecd,edf->ecf", x, w),
        ((1,), (0,)),
        BY_EXPERT,
    ),
    "experts under vmap": (
        (3, 4, 6),
        BY_EXPERT,
        lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x),
        ((1,), (0,)),
        BY_EXPERT,
    ),
    "one expert": (
        (1, 4, 6),
        X[:1],
        lambda w, x: jnp.einsum("ecd,edf->ecf", x, w),
        ((1,), (0,)),
        X[:1],
    ),
    "repeated": (
        (4, 6),
        X,
        lambda w, x: jnp.matmul(x, jnp.broadcast_to(w, (2, 4, 6))),
        ((0,), ()),
        ROWS,
    ),
    "vmap of data": (
        (4, 6),
        X,
        lambda w, x: jax.vmap(lambda x: jaxq.matmul(x, w))(x),
        ((0,), ()),
        ROWS,
    ),
    "cast": (
        (4, 6),
        X,
        lambda w, x: (bf16(x) @ bf16(w)).astype(jnp.float32),
        ((0,), ()),
        np.asarray(bf16(X).astype(jnp.float32)).reshape(-1, 4),
    ),
    "jit": ((4, 6), X, jax.jit(lambda w, x: x @ w), ((0,), ()), ROWS),
    "remat": ((4, 6), X, jax.checkpoint(lambda w, x: x @ w), ((0,), ()), ROWS),
    "own derivative": (
        (4, 6),
        X,
        lambda w, x: doubled_product(x, jax.lax.stop_gradient(w)),
        ((0,), ()),
        ROWS,
    ),
    "one vector": ((4, 6), X[0, 0], lambda w, x: x @ w, ((0,), ()), ROWS[:1]),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_rows_of_a_product_in_any_arrangement(name):
    shape, x, product, axes, rows = ARRANGEMENTS[name]
    use, stats = stats_of(lambda p, x: product(p["w"], x), {"w": normal(*shape)}, [x])
    assert (use.contracting, use.batch) == axes
    assert use.num_products == 1
    assert_rows(stats, rows)


def by_scan(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def by_index(w, x):
    for i in range(4):
        x = jnp.tanh(x @ w[i])
    return x


def by_fori_loop(w, x):
    return jax.lax.fori_loop(0, 4, lambda i, x: jnp.tanh(x @ w[i]), x)


def by_dynamic_index(w, x):
    def body(x, i):
        layer = jax.lax.dynamic_index_in_dim(w, i, keepdims=False)
        return jnp.tanh(x @ layer), None

    return jax.lax.scan(body, x, jnp.arange(4))[0]


def by_nested_scan(w, x):
    def group(x, w):
        return by_scan(w, x), None

    return jax.lax.scan(group, x, w.reshape(2, 2, 4, 4))[0]


def by_cond(w, x):
    def body(x, layer):
        w, i = layer
        double, single = (lambda w, x: jnp.tanh(x @ w)), (lambda w, x: jnp.tanh(x @ w))
        return jax.lax.cond(i > 1, double, single, w, x), None

    return jax.lax.scan(body, x, (w, jnp.arange(4)))[0]


def by_while(w, x):
    def body(state):
        i, x = state
        return i + 1, jnp.tanh(x @ w[i])

    return jax.lax.while_loop(lambda state: state[0] < 4, body, (0, x))[1]


STACKS = [
    by_scan,
    by_index,
    by_fori_loop,
    by_dynamic_index,
    by_nested_scan,
    by_cond,
    by_while,
]


@pytest.mark.parametrize("run", STACKS, ids=lambda run: run.__name__)
def test_each_layer_of_a_stack_has_its_own_statistics(run):
    w, x = normal(4, 4, 4), normal(6, 4)
    use, stats = stats_of(lambda p, x: run(p["w"], x), {"w": w}, [x])
    assert (use.contracting, use.batch) == ((1,), (0,))
    # The two branches of a cond read the same layer.
    assert use.is_shared == (run is by_cond)
    rows, x = [], np.asarray(x)
    for layer in np.asarray(w):
        rows.append(x)
        x = np.tanh(x @ layer)
    assert_rows(stats, np.stack(rows))


def test_a_reversed_scan_reads_the_last_layer_first():
    def run(p, x):
        body = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(body, x, p["w"], reverse=True)[0]

    w, x = normal(2, 4, 4), normal(6, 4)
    _, stats = stats_of(run, {"w": w}, [x])
    assert_rows(stats, np.stack([np.tanh(np.asarray(x @ w[1])), np.asarray(x)]))


def test_products_of_one_weight_merge_their_inputs():
    w, x = normal(4, 4), normal(6, 4)
    use, stats = stats_of(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": w}, [x])
    assert use.num_products == 2
    assert use.is_shared
    second = np.tanh(np.asarray(x) @ np.asarray(w))
    # The second product is call 1, which holds out part 6. There are six rows.
    assert_rows(stats, np.concatenate([np.asarray(x), second]))


def test_a_weight_of_a_recurrent_cell_sees_all_steps():
    def cell(p, x):
        def step(h, x):
            h = jnp.tanh(x @ p["in"] + h @ p["own"])
            return h, h

        return jax.lax.scan(step, jnp.zeros(4), x)[1]

    params, x = {"in": normal(4, 4), "own": normal(4, 4, seed=1) / 4}, normal(6, 4)
    _, stats = stats_of(cell, params, [x], position=1)
    rows, h = [], np.zeros(4)
    for row in np.asarray(x):
        rows.append(h)
        h = np.tanh(row @ np.asarray(params["in"]) + h @ np.asarray(params["own"]))
    assert_rows(stats, rows)


def test_masked_rows_do_not_count():
    x = normal(2, 3, 4)
    mask = np.array([[True, True, False], [True, False, False]])
    _, stats = stats_of(
        lambda p, x: x @ p["w"], {"w": normal(4, 6)}, [x], mask=lambda batch: mask
    )
    assert_rows(stats, np.asarray(x)[mask])
    _, stats = stats_of(
        lambda p, x: x @ p["w"], {"w": normal(4, 6)}, [x[:1]], mask=lambda x: mask[:1]
    )
    assert_rows(stats, np.asarray(x)[0, :2])


def test_batches_of_any_form_and_shape():
    def forward(p, batch):
        x, scale, train = batch["x"], batch["scale"], batch["train"]
        return (x * scale if train else x) @ p["w"]

    batches = [
        {"x": normal(n, 4, seed=n), "scale": 2.0, "train": n == 2} for n in (2, 3)
    ]
    _, stats = stats_of(forward, {"w": normal(4, 6)}, batches)
    assert_rows(
        stats, np.concatenate([2 * np.asarray(batches[0]["x"]), batches[1]["x"]])
    )


def sliced(p, x):
    return x[:, :2] @ p["w"][:2]


def while_condition(p, x):
    def cond(x):
        return jnp.sum(x @ p["w"]) < 0

    return jax.lax.while_loop(cond, lambda x: x + 1, x)


REFUSALS = {
    "times two": (lambda p, x: x @ (2 * p["w"]), "changes it by mul before a product"),
    "normalized": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])),
        "changes it by (div|mul|square|integer_pow|abs) before a product",
    ),
    "masked": (lambda p, x: x @ jnp.tril(p["w"]), "changes it by .* before a product"),
    "times a matrix": (
        lambda p, x: x @ (p["w"] @ p["w"]),
        "multiplies it by a parameter before it reads data",
    ),
    "experts by groups of rows": (
        lambda p, x: jax.lax.ragged_dot(x, p["w"][None], jnp.array([6])),
        "multiplies it with ragged_dot_general, where calibration cannot see its input",
    ),
    "cut": (sliced, "changes it by slice before a product"),
    "partly contracted": (
        lambda p, x: jnp.einsum("bk,hkd->bhd", x[:, :2], p["w"].reshape(2, 2, 4)),
        "contracts only a part of one of its axes",
    ),
    "two contractions": (
        lambda p, x: (x @ p["w"]) @ p["w"].T,
        "two products of forward contract different axes",
    ),
    "in a loop's condition": (while_condition, "in the condition of a while_loop"),
    "read elsewhere": (
        lambda p, x: x + p["w"][jnp.zeros(6, int)],
        r"no product of forward reads it \(only gather\)",
    ),
    "not read": (lambda p, x: x, r"no product of forward reads it \(nothing reads it"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_other_uses_have_a_problem(name):
    forward, message = REFUSALS[name]
    (use,) = uses_of(forward, {"w": normal(4, 4)}, normal(6, 4))
    assert re.search(message, use.problem), use


def plus(x, bias):
    return x + jnp.broadcast_to(bias, x.shape)


def stack_with_biases(p, x):
    def layer(x, p):
        return jnp.tanh(plus(x @ p["w"], p["b"])), None

    return jax.lax.scan(layer, x, p)[0]


def heads(p, x):
    return jnp.einsum("td,dhk->thk", x, p["w"])


# The shapes of the bias and of the weight, and the function.
WITH_BIAS = [
    ((6,), (4, 6), lambda p, x: jax.nn.relu(plus(x @ p["w"], p["b"]))),
    ((6,), (4, 6), lambda p, x: bf16(p["b"])[None] + bf16(x @ p["w"])),
    ((2, 3), (4, 2, 3), lambda p, x: plus(heads(p, x), p["b"])),
    ((2, 3), (4, 2, 3), lambda p, x: heads(p, x).swapaxes(0, 1) + p["b"][:, None]),
    ((6,), (4, 2, 3), lambda p, x: plus(heads(p, x).reshape(6, 6), p["b"])),
    ((3, 4), (3, 4, 4), stack_with_biases),
]
WITHOUT_BIAS = [
    # A number for each row.
    ((6, 6), (4, 6), lambda p, x: x @ p["w"] + p["b"]),
    ((6,), (4, 6), lambda p, x: plus((x @ p["w"]).T, p["b"])),
    # Something else reads it, or it changes first.
    ((6,), (4, 6), lambda p, x: plus(x @ p["w"], p["b"]) + jnp.sum(p["b"])),
    ((6,), (4, 6), lambda p, x: plus(x @ p["w"], 2 * p["b"])),
    # Only one of two products.
    ((4,), (4, 4), lambda p, x: plus(x @ p["w"], p["b"]) @ p["w"]),
    # The axes are in another order.
    ((3, 2), (4, 2, 3), lambda p, x: plus(heads(p, x), p["b"].T)),
]


@pytest.mark.parametrize(("bias", "weight", "forward"), WITH_BIAS)
def test_a_bias_is_added_to_every_output(bias, weight, forward):
    params = {"b": normal(*bias), "w": normal(*weight)}
    assert uses_of(forward, params, normal(6, 4))[1].bias == 0


@pytest.mark.parametrize(("bias", "weight", "forward"), WITHOUT_BIAS)
def test_other_parameters_are_no_bias(bias, weight, forward):
    params = {"b": normal(*bias), "w": normal(*weight)}
    assert uses_of(forward, params, normal(6, 4))[1].bias is None


def test_later_batches_must_have_the_same_products():
    def forward(p, x):
        return x @ p["w"] if x.shape[0] == 2 else x @ p["w"].T

    batches = [normal(2, 4), normal(3, 4)]
    with pytest.raises(ValueError, match="the first batch contracts its axes"):
        stats_of(forward, {"w": normal(4, 4)}, batches)
