"""One table: all methods that recipes can name, times all promises of methods."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import (
    PerChannel,
    PerGroup,
    QTensor,
    QuantSpec,
    dequantize,
    methods,
    observers,
)
from tests.arrays import assert_same
from tests.tables import thinned

IN, OUT, STACK, TOKENS = 32, 16, 2, 24
SPEC = QuantSpec("int4", PerGroup(16))
KEY = jax.random.key(7)


# Read when tests are collected, before a test registers a method of its own.
BUILT_IN = methods.names()


class Row(NamedTuple):
    """A method, with as few steps as possible.

    Attributes:
      run: `(w, *stats, **more) -> (qt, info)`.
      stats: functions that compute its statistics from inputs `[..., tokens, in]`.
    """

    run: Callable[..., tuple[QTensor, Any]]
    stats: tuple[Callable[[jax.Array], jax.Array], ...] = ()


def second_moments(x):
    return 2 / TOKENS * jnp.swapaxes(x, -1, -2) @ x


def inputs(x):
    return x


def largest(x):
    return jnp.max(jnp.abs(x), axis=-2)


def rounded(w, **more):
    return methods.rtn(w, SPEC, **more)


def adarounded(w, x, key=KEY, **more):
    return methods.adaround(w, x, SPEC, key=key, num_steps=3, **more)


TABLE = {
    "adaround": Row(adarounded, (inputs,)),
    "awq": Row(lambda w, x, **more: methods.awq(w, x, SPEC, num=2, **more), (inputs,)),
    "clip": Row(lambda w, **more: methods.clip(w, SPEC, num=3, **more)),
    "equalize": Row(rounded),  # rounds a weight whose scales were moved before
    "gptq": Row(
        lambda w, h, **more: methods.gptq(w, h, SPEC, **more), (second_moments,)
    ),
    "hqq": Row(lambda w, **more: methods.hqq(w, SPEC, num_steps=2, **more)),
    "kmeans": Row(
        lambda w, **more: methods.kmeans(
            w, 2, granularity=PerChannel(), num_steps=3, **more
        )
    ),
    "llm_int8": Row(
        lambda w, a, **more: methods.llm_int8(w, SPEC, absmax_x=a, threshold=2, **more),
        (largest,),
    ),
    "rtn": Row(rounded),
    "smoothquant": Row(rounded),  # likewise
}
CHEAP = ("hqq", "kmeans", "rtn")
over_methods = pytest.mark.parametrize("name", TABLE)
# For tests that compile a method several times.
thinly_over_methods = pytest.mark.parametrize("name", thinned(TABLE, CHEAP))


@functools.cache
def data(stack: bool = False) -> tuple[jax.Array, jax.Array]:
    """A weight and its inputs, or a stack of them."""
    lead, random = (STACK,) if stack else (), np.random.default_rng(0)
    return tuple(
        jnp.asarray(random.standard_normal((*lead, *s)), jnp.float32)
        for s in ((IN, OUT), (TOKENS, IN))
    )


@functools.cache
def solved(name: str, stack: bool = False) -> tuple[QTensor, Any]:
    w, x = data(stack)
    return TABLE[name].run(w, *(stat(x) for stat in TABLE[name].stats))


def test_the_table_has_every_method():
    assert sorted(TABLE) == BUILT_IN


def check_result(qt, w):
    assert isinstance(qt, QTensor)
    assert (qt.shape, qt.dtype) == (w.shape, w.dtype)
    assert qt.meta.geometry.contracted == (-2,)
    assert qt.batch_shape == w.shape[:-2]
    back = np.asarray(dequantize(qt), np.float32)
    assert np.isfinite(back).all()
    assert np.corrcoef(back.ravel(), np.asarray(w, np.float32).ravel())[0, 1] > 0.8


@thinly_over_methods
def test_gives_a_qtensor_and_the_same_one_again(name):
    w, x = data()
    qt, info = solved(name)
    check_result(qt, w)
    assert type(info).__name__.endswith("Info")
    assert_same(TABLE[name].run(w, *(stat(x) for stat in TABLE[name].stats))[0], qt)


@thinly_over_methods
def test_takes_bfloat16(name):
    w, x = (v.astype(jnp.bfloat16) for v in data())
    check_result(TABLE[name].run(w, *(stat(x) for stat in TABLE[name].stats))[0], w)


@thinly_over_methods
def test_jit_gives_the_same_codes(name):
    w, x = data()
    stats = tuple(stat(x) for stat in TABLE[name].stats)
    qt, _ = jax.jit(TABLE[name].run)(w, *stats)
    np.testing.assert_array_equal(qt.codes(), solved(name)[0].codes())


@thinly_over_methods
def test_each_matrix_of_a_stack_gives_its_own_result(name):
    w, x = data(stack=True)
    qt, info = solved(name, stack=True)
    check_result(qt, w)
    for leaf in jax.tree.leaves(info):
        assert leaf.shape[:1] == (STACK,)
    for i in range(STACK):
        more = {"key": jax.random.split(KEY, STACK)[i]} if name == "adaround" else {}
        alone, _ = TABLE[name].run(
            w[i], *(stat(x[i]) for stat in TABLE[name].stats), **more
        )
        np.testing.assert_array_equal(qt[i].codes(), alone.codes())
        np.testing.assert_allclose(
            dequantize(qt[i]), dequantize(alone), rtol=1e-5, atol=1e-6
        )


@over_methods
def test_nan_is_named(name):
    w, x = data()
    stats = [stat(x) for stat in TABLE[name].stats]
    with pytest.raises(ValueError, match=r"some/kernel.*3, 5"):
        TABLE[name].run(w.at[3, 5].set(jnp.nan), *stats, name="some/kernel")


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.stats])
def test_statistics_of_another_layer_are_refused(name):
    w, x = data()
    with pytest.raises(ValueError, match=r"float32\[.*31\]"):
        TABLE[name].run(w, *(stat(x[:, :31]) for stat in TABLE[name].stats))


@over_methods
def test_solve_refuses_unknown_options_and_wrong_statistics(name):
    w, _ = data()
    stats, available = observers.empty_stats(IN), methods.get(name).options
    with pytest.raises(
        ValueError,
        match="options: .*speed" if available else "options: .*has no options",
    ) as raised:
        methods.solve(name, w, stats, SPEC, options={"speed": 2})
    assert all(option in str(raised.value) for option in available)
    with pytest.raises(ValueError, match=r"some/kernel.*\[31\], expected \[32\]"):
        methods.solve(name, w, observers.empty_stats(31), SPEC, name="some/kernel")
    if methods.get(name).needs_data({}):
        with pytest.raises(ValueError, match=r"some/kernel.*needs the layer's inputs"):
            methods.solve(name, w, None, SPEC, name="some/kernel")
