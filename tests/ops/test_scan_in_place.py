"""Scans over stacked weights whose kernels read the codes in place.

The programs are lowered for TPU and GPU on a machine that may have neither.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import jaxq
from jaxq import kernels
from jaxq.ops import scan_in_place
from tests.arrays import assert_close, normal_with_outliers
from tests.kernels.products import CUSTOM_CALL, lowered_for
from tests.tables import thinned

L, E, D, M = 3, 2, 128, 4


def stack_of(preset, *lead: int, dtype="bfloat16") -> jaxq.QTensor:
    """A quantized stack of weights `[*lead, D, D]`."""
    w = normal_with_outliers(*lead, D, D, dtype=dtype) / D**0.5
    return jaxq.quantize(w, preset, contracting=-2, batch=tuple(range(len(lead))))


def rows(*lead: int, dtype="bfloat16") -> jax.Array:
    return normal_with_outliers(*lead, M, D, dtype=dtype)


def layers(x, stack):
    def layer(x, weight):
        return jnp.tanh(x @ weight), None

    return lax.scan(layer, x, stack)[0]


def experts(x, stack):
    """Each layer has a stack of experts, a batch axis of the product."""

    def layer(x, weight):
        return jnp.tanh(jaxq.einsum("emk,ekn->emn", x, weight)), None

    return lax.scan(layer, x, stack)[0]


def nested(x, stack):
    """A scan over groups of layers, with remat and jit inside."""

    @jax.checkpoint
    def group(x, weights):
        return lax.scan(jax.jit(lambda x, w: (jnp.tanh(x @ w), None)), x, weights)

    return lax.scan(group, x, stack, reverse=True)[0]


def with_activations(stack: jaxq.QTensor) -> jaxq.QTensor:
    return stack.with_activation(jaxq.QuantSpec("int8", jaxq.PerToken()))


CASES = {
    "int4": (layers, lambda: (rows(), stack_of("int4", L))),
    "nf4": (layers, lambda: (rows(), stack_of("nf4", L))),
    "int8": (layers, lambda: (rows(), stack_of("int8", L))),
    "zero points": (layers, lambda: (rows(), stack_of("uint4", L))),
    "trained codebook": (layers, lambda: (rows(), stack_of("ttq", L))),
    "columns": (
        layers,
        lambda: (rows(), jaxq.relayout(stack_of("int4", L), "columns")),
    ),
    "activations": (
        layers,
        lambda: (rows(), with_activations(stack_of("int4", L))),
    ),
    "experts": (experts, lambda: (rows(E), stack_of("int4", L, E))),
    "nested": (nested, lambda: (rows(), stack_of("nf4", L, E))),
}


@pytest.mark.parametrize(
    "case", thinned(CASES, ["zero points", "activations", "experts", "nested"])
)
def test_the_same_bits(case):
    f, make = CASES[case]
    args = make()
    actual = jax.jit(scan_in_place(f))(*args)
    np.testing.assert_array_equal(actual, jax.jit(f)(*args))


# Lowered programs.

# A slice of codes, packed or not. Slices of scales are floats. Slices of zero points
# are bytes too, but with few numbers in a row.
SLICED_CODES = re.compile(
    r"stablehlo\.(dynamic_slice|gather).*-> tensor<[\dx]*x(64|128)xu?i8>"
)


def decoding(x, stack):
    """A loop over tokens around the loop over layers."""
    return lax.fori_loop(0, 2, lambda _, x: layers(x, stack), x)


LOWERED = {name: f for name, (f, _) in CASES.items()} | {"decoding": decoding}


@pytest.mark.parametrize(
    ("platform", "case"),
    thinned(
        [
            (platform, case)
            for platform in CUSTOM_CALL
            for case in LOWERED
            # Kernels have no codebooks of 3 numbers, and GPU kernels no columns.
            if case != "trained codebook"
            and (platform == "tpu" or case not in ("columns", "activations"))
        ],
        [("tpu", "experts"), ("tpu", "activations"), ("cuda", "decoding")],
    ),
)
def test_kernels_read_the_stack(platform, case):
    f, args = LOWERED[case], CASES["int4" if case == "decoding" else case][1]()
    sliced = lowered_for(platform, f, *args)
    in_place = lowered_for(platform, scan_in_place(f), *args)
    assert SLICED_CODES.search(sliced)
    assert not SLICED_CODES.search(in_place)
    assert CUSTOM_CALL[platform] in in_place


@pytest.mark.parametrize("platform", CUSTOM_CALL)
def test_both_passes_of_a_gradient_read_the_stack(platform):
    x, stack = rows(), stack_of("int4", L)
    gradient = jax.grad(lambda x: total(scan_in_place(layers), x, stack))
    text = lowered_for(platform, gradient, x)
    assert not SLICED_CODES.search(text)
    assert text.count(CUSTOM_CALL[platform]) >= 1
    assert text.count("custom_call @") == 2


# Transformations.


def total(f, x, stack):
    return jnp.sum(jnp.sin(f(x, stack).astype(jnp.float32)))


def with_scale(stack: jaxq.QTensor, scale: jax.Array) -> jaxq.QTensor:
    leaves, tree = jax.tree.flatten(stack)
    replaced = [scale if leaf is stack.scale else leaf for leaf in leaves]
    return jax.tree.unflatten(tree, replaced)


@pytest.mark.parametrize("case", thinned(["int4", "activations", "nested"], ["nested"]))
def test_gradients(case):
    """Of x and of the scales: of the new function, and rewritten afterwards."""
    f, make = CASES[case]
    x, stack = make()

    def gradients(f):
        return jax.grad(
            lambda x, scale: total(f, x, with_scale(stack, scale)), argnums=(0, 1)
        )

    expected = jax.jit(gradients(f))(x, stack.scale)
    for function in (gradients(scan_in_place(f)), scan_in_place(gradients(f))):
        assert_close(jax.jit(function)(x, stack.scale), expected, 1e-2)


@pytest.mark.parametrize(
    ("x_axis", "stack_axis"),
    thinned([(0, None), (None, 0), (0, 0)], [(0, None), (None, 0)]),
)
def test_vmap(x_axis, stack_axis):
    in_axes = (x_axis, stack_axis)
    x = rows() if x_axis is None else rows(2)
    stack = stack_of("int4", *([] if stack_axis is None else [2]), L)
    mapped = jax.jit(jax.vmap(scan_in_place(layers), in_axes=in_axes))
    expected = jax.jit(jax.vmap(layers, in_axes=in_axes))(x, stack)
    np.testing.assert_array_equal(mapped(x, stack), expected)


# Flax.


def nnx_layers():
    """nnx.scan over stacked layers."""

    @nnx.split_rngs(splits=L)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Linear(D, D, dtype=jnp.bfloat16, rngs=rngs)

    model, _ = jaxq.quantize_model(make(nnx.Rngs(0)), "int4")
    graph, state = nnx.split(model)

    def call(x, state):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return jnp.tanh(layer(x))

        return run(x, nnx.merge(graph, state))

    return call, state


class LinenLayers(linen.Module):
    """linen's scan over layers, each with remat."""

    @linen.compact
    def __call__(self, x):
        def body(layer, x, _):
            return jnp.tanh(layer(x)), None

        run = linen.scan(
            linen.remat(body),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=L,
        )
        return run(linen.Dense(D, dtype=jnp.bfloat16, name="layer"), x, None)[0]


def linen_layers():
    module = LinenLayers()
    variables = module.init(jax.random.key(0), rows())
    module, variables, _ = jaxq.nn.linen.quantize_model(
        module, variables, "int4", example=rows()
    )
    return lambda x, variables: module.apply(variables, x), variables


@pytest.mark.parametrize("make", [nnx_layers, linen_layers])
def test_flax(make):
    call, weights = make()
    x = rows()
    actual = jax.jit(scan_in_place(call))(x, weights)
    np.testing.assert_array_equal(actual, jax.jit(call)(x, weights))
    assert SLICED_CODES.search(lowered_for("tpu", call, x, weights))
    text = lowered_for("tpu", scan_in_place(call), x, weights)
    assert not SLICED_CODES.search(text)
    assert "tpu_custom_call" in text


# What cannot be read in place.


def unrolled(x, stack):
    for i in range(L):
        x = x @ jax.tree.map(lambda leaf, i=i: leaf[i], stack)
    return x


def computed(x, stack):
    """The codes are changed in the loop."""

    def layer(x, weight):
        return x @ jax.tree.map(lambda leaf: leaf + leaf, weight), None

    return lax.scan(layer, x, stack)[0]


def conditional(x, stack):
    def layer(x, weight):
        return lax.cond(x[0, 0] > 0, lambda x: x @ weight, lambda x: x, x), None

    return lax.scan(layer, x, stack)[0]


@pytest.mark.parametrize(
    ("f", "reason"),
    [(unrolled, "no scan"), (computed, "from add"), (conditional, "from cond")],
)
def test_what_is_copied_gives_a_warning(f, reason):
    args = rows(), stack_of("int4", L)
    with pytest.warns(kernels.FallbackWarning, match=reason):
        actual = jax.make_jaxpr(scan_in_place(f))(*args)
    assert "'index'" not in str(actual)


def expert_layers(x, stacks):
    sizes = jnp.array([2, 6], jnp.int32)

    def layer(x, weights):
        weight, experts = weights
        return jaxq.ops.ragged_dot(x @ weight, experts, sizes), None

    return lax.scan(layer, x, stacks)[0]


def with_groups():
    spec = jaxq.QuantSpec("int8", jaxq.PerGroup(32))
    w = jnp.ones((L, D, D), jnp.bfloat16)
    return jaxq.quantize(w, spec, contracting=-2, batch=0).with_activation(spec)


@pytest.mark.parametrize(
    ("f", "make", "reason"),
    [
        (
            expert_layers,
            lambda: (stack_of("int4", L), stack_of("int4", L, 2)),
            "ragged_dot",
        ),
        (layers, with_groups, "codes with scales in groups"),
    ],
)
def test_a_kernel_that_gets_a_copy_gives_a_warning(f, make, reason):
    """Also if another product of the scan reads its stack in place."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", kernels.FallbackWarning)
        jaxpr = jax.make_jaxpr(scan_in_place(f))(rows(), make())
    messages = [str(w.message) for w in caught if w.category is kernels.FallbackWarning]
    assert len(messages) == 1
    assert f"cannot read a stack ({reason})" in messages[0]
    assert ("'index'" in str(jaxpr)) == (f is expert_layers)


def test_no_warning_if_all_is_read_in_place():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(scan_in_place(nested), rows(), stack_of("int4", L, E))


def test_attention_over_a_cache_stays_as_it_is():
    cache = jaxq.ops.KVCache.empty(
        "int8", batch=2, num_heads=1, length=256, head_dim=128, dtype=jnp.bfloat16
    )
    caches = jax.tree.map(lambda leaf: jnp.stack([leaf] * L), cache)
    q = jnp.ones((2, 1, 1, 128), jnp.bfloat16)

    def attend(q, caches):
        return lax.scan(lambda q, cache: (q, cache.attend(q)), q, caches)[1]

    with pytest.warns(kernels.FallbackWarning, match="no scan"):
        jaxpr = jax.make_jaxpr(scan_in_place(attend))(q, caches)
    assert "quantized_attention" in str(jaxpr)


def test_only_functions():
    with pytest.raises(TypeError, match="fn must be a function"):
        scan_in_place(3)
