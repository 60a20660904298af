"""Facts of an activation are those of the quantized activation."""

import jax
import jax.numpy as jnp
import pytest

import jaxq
from jaxq import PerGroup, PerTensor, QuantSpec
from jaxq.ops._facts import ArrayFacts, activation_facts, facts_of

SPECS = dict(jaxq.presets()) | {
    "tensor": QuantSpec("int8", PerTensor()),
    "offset": QuantSpec("uint8", PerGroup(16, pad=True), offset="min"),
    "bfloat16 scales": QuantSpec("int8", scale="bfloat16"),
    "asymmetric": QuantSpec("int8", symmetric=False),
}


@pytest.mark.parametrize("name", SPECS)
def test_activation_facts_are_those_of_quantize(name):
    spec = SPECS[name]
    for sizes, contracting, batch in (
        ((5, 72), (1,), ()),
        ((2, 5, 72), (2,), (0,)),
        ((5, 8, 9), (1, 2), ()),
    ):
        quantized = jax.eval_shape(
            lambda x, c=contracting, b=batch: jaxq.quantize(
                x, spec, contracting=c, batch=b
            ),
            jax.ShapeDtypeStruct(sizes, jnp.float32),
        )
        facts = activation_facts(ArrayFacts(sizes, "float32"), spec, contracting, batch)
        assert facts == facts_of(quantized)
