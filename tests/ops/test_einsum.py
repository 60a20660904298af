"""`matmul` and `einsum` agree with numpy for every rank, or raise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from tests.arrays import normal_with_outliers
from tests.ops.reference import assert_product

A = (3, 2)  # leading axes
# Eager results are the same: see test_dot_general.py.
multiplied = jax.jit(lambda a, b: a @ b)


def quantized(*shape: int, contracting: int, batch: int = 0) -> jaxq.QTensor:
    return jaxq.quantize(
        normal_with_outliers(*shape, seed=5),
        "int8",
        contracting=contracting,
        batch=tuple(range(batch)),
    )


@pytest.mark.parametrize(
    ("x", "w", "batch"),
    [
        ((32,), (32,), 0),
        ((5, 32), (32,), 0),
        ((2, 5, 32), (32,), 0),
        ((32,), (32, 8), 0),
        ((5, 32), (32, 8), 0),
        ((2, 5, 32), (32, 8), 0),
        ((3, 2, 5, 32), (32, 8), 0),
        ((5, 32), (3, 32, 8), 1),
        ((3, 5, 32), (3, 32, 8), 1),
        ((2, 3, 5, 32), (3, 32, 8), 1),
        ((3, 2, 5, 32), (3, 2, 32, 8), 2),
        ((2, 5, 32), (3, 2, 32, 8), 2),
        ((5, 32), (3, 2, 32, 8), 2),
        ((4, 3, 2, 5, 32), (3, 2, 32, 8), 2),
    ],
)
def test_matmul_of_all_ranks(x, w, batch):
    x = normal_with_outliers(*x)
    contracting = -min(len(w), 2)
    qt = quantized(*w, contracting=contracting, batch=batch)
    assert_product(multiplied(x, qt), np.matmul, x, qt, 32)
    # The QTensor on the left: [..., n, k] @ [..., k, m].
    if len(w) > 1:
        left, right = qt.swapaxes(-1, -2), jnp.swapaxes(x, -1, -2) if x.ndim > 1 else x
    else:
        left, right = qt, jnp.swapaxes(x, -1, -2) if x.ndim > 1 else x
    try:
        expected = np.matmul(np.asarray(jaxq.dequantize(left)), np.asarray(right))
    except ValueError:
        return
    np.testing.assert_allclose(multiplied(left, right), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "w", "batch", "error", "message"),
    [
        ((31,), (32, 8), 0, TypeError, "differ in size"),
        ((2, 5, 32), (3, 32, 8), 1, TypeError, "batch axes"),
        ((32,), (3, 32, 8), 1, ValueError, r"x\[None\]"),
        ((), (32, 8), 0, ValueError, "at least one axis"),
    ],
)
def test_errors_of_matmul(x, w, batch, error, message):
    with pytest.raises(error, match=message):
        jnp.ones(x) @ quantized(*w, contracting=-2, batch=batch)


@pytest.mark.parametrize(
    ("subscripts", "x", "w", "contracting"),
    [
        ("bk,kn->bn", (5, 32), (32, 8), -2),
        ("bk,kn->nb", (5, 32), (32, 8), -2),
        (" b k , k n -> b n ", (5, 32), (32, 8), -2),
        ("bk,kn", (5, 32), (32, 8), -2),
        ("zk,ka", (5, 32), (32, 8), -2),  # implicit: alphabetical
        ("kn,bk->bn", (32, 8), (5, 32), -1),
        ("...k,kn->...n", (2, 5, 32), (32, 8), -2),
        ("...k,kn", (2, 5, 32), (32, 8), -2),
        ("...k,kn->n...", (2, 5, 32), (32, 8), -2),
        ("...k,kn->...n", (32,), (32, 8), -2),
        ("b...k,kn->...bn", (4, 2, 3, 32), (32, 8), -2),
        ("btd,dhk->bthk", (2, 3, 32), (32, 4, 8), -3),
        ("btd,dhk->bhkt", (2, 3, 32), (32, 4, 8), -3),
        ("k,kn->n", (32,), (32, 8), -2),
        ("bn,kn->bk", (5, 8), (32, 8), -2),
        ("k,k->", (32,), (32,), -1),
    ],
)
def test_einsum(subscripts, x, w, contracting):
    x, qt = normal_with_outliers(*x), quantized(*w, contracting=contracting)
    product = functools.partial(np.einsum, subscripts.replace(" ", ""))
    assert_product(jaxq.einsum(subscripts, x, qt), product, x, qt, 32)
    left, right = subscripts.replace(" ", "").split("->")[0].split(",")
    if "->" in subscripts:
        turned = f"{right},{left}->{subscripts.replace(' ', '').split('->')[1]}"
        assert_product(
            jaxq.einsum(turned, qt, x), functools.partial(np.einsum, turned), qt, x, 32
        )


def test_einsum_with_batch_axes():
    qt = quantized(3, 32, 8, contracting=-2, batch=1)
    for subscripts, shape in [
        ("lbk,lkn->lbn", (3, 5, 32)),
        ("blk,lkn->bln", (5, 3, 32)),
        ("blk,lkn->nlb", (5, 3, 32)),
    ]:
        x = normal_with_outliers(*shape)
        assert_product(
            jaxq.einsum(subscripts, x, qt),
            functools.partial(np.einsum, subscripts),
            x,
            qt,
            32,
        )


def test_einsum_of_arrays_is_that_of_jax_with_wide_sums():
    x, w = (
        normal_with_outliers(5, 32, dtype="bfloat16"),
        normal_with_outliers(32, 8, dtype="bfloat16"),
    )
    y = jaxq.einsum("bk,kn->bn", x, w)
    assert_product(
        y, functools.partial(np.einsum, "bk,kn->bn"), x, w, 32, dtype="bfloat16"
    )
    np.testing.assert_allclose(jaxq.einsum("ii->i", jnp.eye(3)), np.ones(3))
    program = (
        jax.jit(functools.partial(jaxq.einsum, "bk,kn->bn", precision="highest"))
        .lower(x, w)
        .as_text()
    )
    assert "precision = [HIGHEST, HIGHEST]" in program


@pytest.mark.parametrize(
    ("subscripts", "message"),
    [
        ("bk->b", "must name two operands"),
        ("bk,kn,n->b", "must name two operands"),
        ("bkx,kn->bn", "names 3 axes of an operand that has 2"),
        ("b,kn->bn", "names 1 axes of an operand that has 2"),
        ("kk,kn->n", "repeats an index within an operand"),
        ("bk,kn->bx", "must name indices of the operands"),
        ("bk,kn->bb", "must name indices of the operands"),
        ("bk,kn->b", r"sums over \['n'\], which only one operand has"),
        ("bk,kn->n", r"sums over \['b'\], which only one operand has"),
        ("...bkx,kn->...bn", "names"),
    ],
)
def test_errors_of_einsum(subscripts, message):
    with pytest.raises(ValueError, match=message):
        jaxq.einsum(
            subscripts, normal_with_outliers(5, 32), quantized(32, 8, contracting=-2)
        )


def test_einsum_takes_two_operands():
    with pytest.raises(ValueError, match="has two operands, got 3"):
        jaxq.einsum(
            "ab,bc,cd->ad",
            normal_with_outliers(2, 32),
            quantized(32, 8, contracting=-2),
            normal_with_outliers(8, 3),
        )
