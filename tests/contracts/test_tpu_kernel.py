"""Weights as `quantize` stores them run the TPU kernel: alone, in layers, in models.

The programs are lowered for a TPU on a machine that may have none.
"""

import itertools
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import jaxq
from jaxq import kernels
from tests.arrays import normal_with_outliers
from tests.kernels.products import lowered_for
from tests.tables import thinned

K, N, M = 512, 384, 8
EXAMPLES = Path(__file__).parents[2] / "examples"


def activations() -> jax.Array:
    return normal_with_outliers(M, K, dtype="bfloat16")


def array(preset: str):
    """A product with a quantized array."""
    qt = jaxq.quantize(normal_with_outliers(K, N, dtype="bfloat16"), preset)
    return lambda x, qt: x @ qt, (activations(), qt), [(K, N)]


def nnx_linear(preset: str):
    """An nnx Linear."""
    layer = nnx.Linear(K, N, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer, _ = jaxq.quantize_model(layer, preset)
    graph, state = nnx.split(layer)

    def call(x, state):
        return nnx.merge(graph, state)(x)

    return call, (activations(), state), [(K, N)]


def linen_dense(preset: str):
    """A linen Dense."""
    module = linen.Dense(N, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), activations())
    module, variables, _ = jaxq.nn.linen.quantize_model(module, variables, preset)
    return lambda x, v: module.apply(v, x), (activations(), variables), [(K, N)]


def loaded_model(preset: str):
    """The bundled language model, read from its checkpoint."""
    model, _ = jaxq.models.load(EXAMPLES / "tiny_llama")
    model, report = jaxq.quantize_model(model, preset)
    graph, state = nnx.split(model)
    shapes = [row.shape for row in report.rows if row.format is not None]

    def call(tokens, state):
        return nnx.merge(graph, state)(tokens)

    return call, (jnp.zeros((1, M), jnp.int32), state), shapes


@pytest.mark.parametrize(
    ("make", "preset"),
    thinned(
        itertools.product(
            [array, nnx_linear, linen_dense, loaded_model], ["int4", "nf4", "int8"]
        ),
        [
            (array, "nf4"),
            (nnx_linear, "int4"),
            (linen_dense, "int8"),
            (loaded_model, "int4"),
        ],
    ),
)
def test_it_runs_the_tpu_kernel_on_codes_as_they_are_stored(make, preset):
    call, args, shapes = make(preset)
    with warnings.catch_warnings():
        warnings.simplefilter("error", kernels.FallbackWarning)
        text = lowered_for("tpu", call, *args)
    assert shapes
    assert text.count("@tpu_custom_call") == len(shapes)
    # No codes are moved.
    moved = [
        line
        for line in text.splitlines()
        if re.search(r"stablehlo\.(transpose|gather|convert)", line)
        and re.search(r"tensor<[\dx]+xu?i8>", line)
    ]
    assert not moved
    # No array of floats has the shape of a weight, in either order of its axes.
    for k, n in set(shapes):
        assert not re.search(rf"\b(1x)?({k}x{n}|{n}x{k})x(f32|bf16)\b", text)
