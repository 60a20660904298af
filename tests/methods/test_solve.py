"""solve: how often a weight is rounded, and which statistics a method gets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerChannel, QuantSpec, methods
from jaxq.methods import _gptq, _rtn
from jaxq.methods._registry import temporarily
from tests.arrays import assert_same, normal

IN, OUT, TOKENS = 40, 8, 64
# Scales per channel: groups would be rounded once more each, as part of the method.
SPEC = QuantSpec("int4", PerChannel())


def stats(k: int = IN):
    """Statistics of random inputs, as calibration collects them."""
    update = jax.jit(
        lambda *batch: jaxq.observers.update_stats(
            jaxq.observers.empty_stats(k), *batch
        )
    )
    rows = np.arange(TOKENS, dtype=np.int32)
    return update(normal(TOKENS, k), np.ones(TOKENS, bool), rows)


@pytest.fixture
def num_roundings(monkeypatch):
    """The shapes of all weights that are rounded to nearest within a test."""
    shapes = []
    for module in (_gptq, _rtn):

        def counted(w, *args, quantize=module.quantize, **kwargs):
            shapes.append(w.shape)
            return quantize(w, *args, **kwargs)

        monkeypatch.setattr(module, "quantize", counted)
    return shapes


def test_one_gptq_solve_rounds_the_weight_once(num_roundings):
    w = normal(IN, OUT)
    solved = methods.solve("gptq", w, stats(), SPEC, fallback="none")
    assert solved.loss is not None  # so it was compared with rounding to nearest
    assert num_roundings == [(IN, OUT)]


def test_a_rounded_weight_is_not_rounded_again(num_roundings):
    w = normal(IN, OUT)
    nearest = jaxq.quantize(w, SPEC, contracting=0)
    solved = methods.solve("gptq", w, stats(), SPEC, nearest=nearest)
    assert num_roundings == []
    expected = methods.solve("gptq", w, stats(), SPEC)
    assert_same(solved.qt, expected.qt)
    assert solved[1:] == expected[1:]


@pytest.mark.parametrize("method", ["rtn", "equalize", "smoothquant"])
def test_a_method_without_solve_gives_the_rounded_weight(method):
    w = normal(IN, OUT)
    nearest = jaxq.quantize(w, SPEC, contracting=-2)
    solved = methods.solve(method, w, stats(), SPEC, nearest=nearest)
    assert solved.qt is nearest
    assert (solved.method, solved.note, solved.loss) == (method, "", None)


def test_a_rounded_weight_of_another_shape_is_refused():
    w = normal(IN, OUT)
    for nearest in (
        jaxq.quantize(w.T, SPEC, contracting=-2),
        jaxq.quantize(w, SPEC, contracting=-1),
    ):
        with pytest.raises(ValueError, match=r"w: nearest must have .*float32\[40,8\]"):
            methods.solve("gptq", w, stats(), SPEC, nearest=nearest)


def test_missing_and_infinite_second_moments_are_named():
    w, complete = normal(IN, OUT), stats()
    without = complete._replace(hessian=None)
    with pytest.raises(ValueError, match="'gptq' needs second moments; calibrate"):
        methods.solve("gptq", w, without, SPEC)
    infinite = complete._replace(hessian=complete.hessian * np.float32(np.inf))
    with pytest.raises(ValueError, match="second moments of its inputs are not finite"):
        methods.solve("gptq", w, infinite, SPEC)


def test_clip_with_inputs_needs_them():
    w = normal(IN, OUT)
    with pytest.raises(ValueError, match="'clip' needs the layer's inputs"):
        methods.solve("clip", w, None, SPEC, options={"inputs": True})
    options = {"inputs": True, "num": 4}
    solved = methods.solve("clip", w, stats(), SPEC, options=options, fallback="none")
    expected, _ = methods.clip(w, SPEC, x=stats().samples, num=4)
    assert_same(solved.qt, expected)


def test_each_matrix_of_a_stack_falls_back_on_its_own():
    def solve(w, stats, spec, *, key):
        # The second matrix gets half of its weights: worse than rounding.
        half = w * jnp.array([1.0, 0.5])[:, None, None]
        return methods.Solution(methods.rtn(half, spec)[0], note="halved")

    w, one = normal(2, IN, OUT), stats()
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    record = dataclasses.replace(methods.get("hqq"), solve=solve)
    with temporarily(record):
        solved = methods.solve("hqq", w, both, SPEC)
        kept = methods.solve("hqq", w, both, SPEC, fallback="none")
        with pytest.raises(ValueError, match="in 1 of 2 matrices. Pass fallback="):
            methods.solve("hqq", w, both, SPEC, fallback="raise")
    assert_same(solved.qt, methods.rtn(w, SPEC)[0])
    assert solved.loss == 1.0
    assert "in 1 of 2 matrices, so rtn there; halved" in solved.note
    assert kept.loss > 1
