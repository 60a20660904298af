"""Leaves that were cast or computed with raise an error where the QTensor is used."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxq
from jaxq import PerGroup, PerTensor, QuantSpec
from jaxq.qtensor import requantize
from tests.arrays import assert_same, normal

X = normal(2, 64, seed=1)
TABLE = QuantSpec("int8", jaxq.PerToken())
USES = {
    "dequantize": jaxq.dequantize,
    "QTensor.codes": lambda qt: qt.codes(),
    "product": lambda qt: X @ qt,
    "requantize": lambda qt: requantize(normal(64, 8), qt),
}


def weight(preset: str = "int8", seed: int = 0) -> jaxq.QTensor:
    return jaxq.quantize(normal(64, 8, seed=seed), preset)


def mean_of_leaves(a, b):
    return jax.tree.map(lambda x, y: (x + y) / 2, a, b)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("use", USES)
def test_means_of_codes_are_refused(use, jitted):
    mixed = mean_of_leaves(weight(), weight(seed=2))
    function = jax.jit(USES[use]) if jitted else USES[use]
    message = (
        rf"{use}: the leaf data of int8 QTensor is float32\[8, 64\], expected int8"
    )
    with pytest.raises(TypeError, match=message):
        function(mixed)


@pytest.mark.parametrize("preset", ["fp8", "int4", "nf4_dq", "uint4", "nvfp4"])
def test_casts_are_refused_and_the_remedy_works(preset):
    a, b = weight(preset), weight(preset, seed=2)
    with pytest.raises(
        TypeError, match=r"the leaf data .*expected (u?int8).*jaxq\.deq"
    ):
        jaxq.dequantize(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), a))
    mean = (jaxq.dequantize(a) + jaxq.dequantize(b)) / 2
    assert jaxq.quantize(mean, preset).spec == a.spec


def test_the_leaf_is_named():
    qt = weight("uint4")
    cases = {
        "zero_point": qt.zero_point.astype(jnp.float32),
        "scale": qt.scale.astype(jnp.float32),
    }
    for name, leaf in cases.items():
        changed = dataclasses.replace(qt, **{name: leaf})
        with pytest.raises(TypeError, match=f"the leaf {name} of .* is float32"):
            X @ changed
    nested = weight("nvfp4")
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), nested.scale)
    with pytest.raises(TypeError, match=r"the leaf scale\.data of"):
        jaxq.dequantize(dataclasses.replace(nested, scale=cast))


def test_tables_convolutions_experts_and_files(tmp_path):
    table = jaxq.quantize(normal(16, 8), TABLE, contracting=-1)
    experts = jaxq.quantize(normal(2, 64, 8), "int8", contracting=-2, batch=0)
    kernel = jaxq.quantize(normal(3, 4, 8), "int8", contracting=(0, 1))

    def half(qt):
        return mean_of_leaves(qt, qt)

    with pytest.raises(TypeError, match="take: the leaf data"):
        jaxq.ops.take(half(table), jnp.array([1]))
    with pytest.raises(TypeError, match="ragged_dot: the leaf data"):
        jaxq.ops.ragged_dot(X, half(experts), jnp.array([1, 1]))
    with pytest.raises(TypeError, match="the leaf data"):
        jaxq.ops.conv_general_dilated(
            normal(1, 8, 4),
            half(kernel),
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
    with pytest.raises(TypeError, match="a/w is float32"):
        jaxq.save(tmp_path / "file.safetensors", {"a": {"w": half(weight())}})


def test_leaves_of_every_preset_have_their_dtypes():
    specs = [spec for spec in jaxq.presets().values() if not spec.needs_key]
    specs.append(QuantSpec("uint4", PerGroup(32), offset="min", scale="float16"))
    specs.append(QuantSpec("nf4", scale=QuantSpec("int8", PerTensor(), offset="mean")))
    for spec in specs:
        qt = jaxq.quantize(normal(64, 8), spec).with_input_scale(jnp.ones(64))
        jaxq.qtensor.check_leaves(qt, "test")
        jaxq.qtensor.check_leaves(jaxq.relayout(qt, "none"), "test")
        shapes = jax.eval_shape(lambda qt=qt: qt)
        jaxq.qtensor.check_leaves(shapes, "test")


def test_leaves_of_the_right_dtype_stay_usable_in_transforms():
    stack = jaxq.quantize(normal(3, 64, 8), "int4", contracting=-2, batch=0)
    by_scan = jax.lax.map(jaxq.dequantize, stack)
    assert_same(by_scan, jaxq.dequantize(stack))
    trainable, rest = jaxq.partition(weight("int8"))
    gradient = jax.grad(lambda t: jaxq.dequantize(jaxq.combine(t, rest)).sum())
    assert jnp.isfinite(gradient(trainable).scale).all()
