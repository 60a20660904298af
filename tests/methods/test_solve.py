"""solve: how often a weight is rounded, and which statistics a method gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerChannel, QuantSpec, methods
from jaxq.methods import _gptq, _rtn
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
    with pytest.raises(
        ValueError, match="moments of the layer's inputs are not finite"
    ):
        methods.solve("gptq", w, infinite, SPEC)


def test_clip_with_inputs_needs_them():
    w = normal(IN, OUT)
    with pytest.raises(ValueError, match="'clip' needs the layer's inputs"):
        methods.solve("clip", w, None, SPEC, options={"inputs": True})
    options = {"inputs": True, "num": 4}
    solved = methods.solve("clip", w, stats(), SPEC, options=options, fallback="none")
    expected, _ = methods.clip(w, SPEC, x=stats().samples, num=4)
    assert_same(solved.qt, expected)


def halve_second_matrix(w, stats, spec, *, key):
    """Half of the second matrix: worse than rounding to nearest."""
    half = w * jnp.array([1.0, 0.5])[:, None, None]
    return methods.Solution(methods.rtn(half, spec)[0], note="halved")


@pytest.fixture
def registered():
    """Registers methods within a test."""
    names = []

    def register(solve):
        methods.register(methods.Method("own", solve))
        names.append("own")

    yield register
    for name in names:
        methods.unregister(name)


def test_each_matrix_of_a_stack_falls_back_on_its_own(registered):
    registered(halve_second_matrix)
    w, statistics = normal(2, IN, OUT), stats()
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), statistics)
    solved = methods.solve("own", w, stack, SPEC)
    without_fallback = methods.solve("own", w, stack, SPEC, fallback="none")
    with pytest.raises(ValueError, match="in 1 of 2 matrices. Pass fallback="):
        methods.solve("own", w, stack, SPEC, fallback="raise")
    assert_same(solved.qt, methods.rtn(w, SPEC)[0])
    assert solved.loss == 1.0
    assert "in 1 of 2 matrices, so these matrices use rtn; halved" in solved.note
    assert without_fallback.loss > 1


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "w: method 'own' returned a NoneType. Its solve must return"),
        ((1, ""), "w: method 'own' returned a tuple"),
        (methods.Solution(np.ones(2)), "a Solution whose qt is a ndarray"),
    ],
)
def test_a_method_must_return_a_solution(registered, returned, message):
    registered(lambda w, stats, spec, *, key: returned)
    with pytest.raises(TypeError, match=message):
        methods.solve("own", normal(IN, OUT), None, SPEC)


def test_spec_may_be_the_name_of_a_preset():
    w = normal(IN, OUT)
    assert_same(methods.solve("rtn", w, None, "int8").qt, methods.rtn(w, "int8")[0])
    with pytest.raises(ValueError, match="solve: unknown preset 'int88'"):
        methods.solve("rtn", w, None, "int88")


def test_a_weight_may_be_a_list():
    w = [[1.0, 2.0], [3.0, -4.0]]
    expected, _ = methods.clip(np.float32(w), "int8")
    assert_same(methods.solve("clip", w, None, "int8").qt, expected)
    assert_same(methods.clip(w, "int8")[0], expected)
    with pytest.raises(TypeError, match=r"clip: w must be float32.*int64\[1, 2\]"):
        methods.solve("clip", [[1, 2]], None, "int8")
