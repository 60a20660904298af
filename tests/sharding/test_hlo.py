"""The collectives of compiled programs: codes move between devices, never floats.

Each row of a table lists the bytes that a device receives or adds up, by the kind of
collective, for a program with two layers `up` and `down`. XLA:CPU gathers bfloat16 as
float32, so scales are float32 here.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import sharding
from tests.arrays import normal_with_outliers

KINDS = (AxisType.Auto, AxisType.Explicit)
ROWS, K, N = 32, 256, 512
SPECS = {
    "int4": jaxq.QuantSpec("int4", jaxq.PerGroup(64), scale="float32"),
    "int8": jaxq.presets()["int8"],
    "nf4": jaxq.presets()["nf4"],
}
# The layouts of `up` [K, N] and `down` [N, K].
TENSOR = (P(None, "t"), P("t", None))
FSDP = {"rows": (P("d", None), P("d", None)), "columns": (P(None, "d"), P(None, "d"))}

_COLLECTIVE = re.compile(
    r"= (?P<shapes>\([^=]*?\)|\S+) (?P<kind>all-gather|all-reduce|reduce-scatter"
    r"|all-to-all|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"(?P<dtype>[a-z]+\d+\w*)\[(?P<sizes>[\d,]*)\]")
_BYTES = {"s8": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "pred": 1}


def collectives(f, *args, **options):
    """The (kind, dtype, bytes of the result) of each collective of a program."""
    text = jax.jit(f, **options).lower(*args).compile().as_text()
    found = []
    for match in _COLLECTIVE.finditer(text):
        for shape in _SHAPE.finditer(match["shapes"]):
            sizes = [int(size) for size in shape["sizes"].split(",") if size]
            num_bytes = math.prod(sizes) * _BYTES[shape["dtype"]]
            found.append((match["kind"], shape["dtype"], num_bytes))
    return found


def total(found, kind, dtypes=tuple(_BYTES)):
    return sum(size for k, dtype, size in found if k == kind and dtype in dtypes)


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("d", "t"), axis_types=(kind, kind))


def layers(name, mesh, where):
    up = jaxq.quantize(normal_with_outliers(K, N), SPECS[name])
    down = jaxq.quantize(normal_with_outliers(N, K), SPECS[name])
    return sharding.place(up, mesh, where[0]), sharding.place(down, mesh, where[1])


def block(x, up, down):
    return jax.nn.relu(x @ up) @ down


def loss(x, up, down):
    return (block(x, up, down) ** 2).sum()


def leaf_bytes(*qts):
    """(bytes of codes, bytes of scales that are sharded)."""
    codes = sum(qt.data.nbytes for qt in qts)
    scales = [qt.scale for qt in qts]
    sharded = [s.nbytes for s in scales if not s.sharding.is_fully_replicated]
    return codes, sum(sharded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_tensor_parallel_layers_sum_activations_once(name, kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        up, down = layers(name, mesh, TENSOR)
        x = sharding.place(normal_with_outliers(ROWS, K), mesh, P("d"))
        forward = collectives(block, x, up, down)
        both = collectives(jax.grad(loss), x, up, down)
    activation = ROWS // 2 * K * 4  # one device's rows of the result
    if kind is AxisType.Explicit:
        assert forward == [("all-reduce", "f32", activation)]
        assert both == [("all-reduce", "f32", activation)] * 2
    for found, times in ((forward, 1), (both, 2)):
        # XLA may sum the two halves of a result apart.
        assert {kind for kind, _, _ in found} == {"all-reduce"}
        assert total(found, "all-reduce", ("f32",)) == times * activation


@pytest.mark.parametrize("where", FSDP)
@pytest.mark.parametrize("name", SPECS)
def test_fully_sharded_layers_gather_codes(name, where):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        up, down = layers(name, mesh, FSDP[where])
        x = sharding.place(normal_with_outliers(ROWS, K), mesh, P("d"))
        forward = collectives(block, x, up, down)
        both = collectives(jax.grad(loss), x, up, down)
    codes, scales = leaf_bytes(up, down)
    integers, floats = ("s8", "u8"), ("f32", "bf16")
    for found, most in ((forward, 1), (both, 2)):
        assert {kind for kind, _, _ in found} == {"all-gather"}
        # The backward pass may use the codes of the forward pass.
        times = total(found, "all-gather", integers) / codes
        assert times in range(1, most + 1)
        assert total(found, "all-gather", floats) <= most * scales


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_layers_with_quantized_activations_move_no_floats_of_weights(name):
    """Each device quantizes its rows. A row-parallel layer needs maxima of rows."""
    mesh = mesh_of(AxisType.Explicit)
    found = {}
    with jax.set_mesh(mesh):
        x = sharding.place(normal_with_outliers(ROWS, K), mesh, P("d"))
        for where, specs in (("tensor", TENSOR), ("fsdp", FSDP["rows"])):
            up, down = (qt.with_activation("int8") for qt in layers(name, mesh, specs))
            found[where] = collectives(block, x, up, down)
            found[f"{where}, backward"] = collectives(jax.grad(loss), x, up, down)
        codes, scales = leaf_bytes(up, down)
    activation, maxima = ROWS // 2 * K * 4, ROWS // 2 * 4
    sums = "s32" if name == "int8" else "f32"  # int4 has scales in groups
    assert sorted(found["tensor"]) == sorted(
        [("all-reduce", "u32", maxima), ("all-reduce", sums, activation)]
    )
    both = found["tensor, backward"]
    assert {kind for kind, _, _ in both} == {"all-reduce"}
    assert total(both, "all-reduce") == 2 * activation + maxima
    for where, most in (("fsdp", 1), ("fsdp, backward", 2)):
        assert {kind for kind, _, _ in found[where]} == {"all-gather"}
        times = total(found[where], "all-gather", ("s8", "u8")) / codes
        assert times in range(1, most + 1)
        assert total(found[where], "all-gather", ("f32", "bf16")) <= most * scales


def test_the_backward_pass_gathers_codes_again():
    """With explicit axes no device keeps the gathered codes for the backward pass."""
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        up, down = layers("int4", mesh, FSDP["rows"])
        x = sharding.place(normal_with_outliers(ROWS, K), mesh, P("d"))
        both = collectives(jax.grad(loss), x, up, down)
        saved = jax.eval_shape(lambda *args: jax.vjp(block, *args)[1], x, up, down)
    assert total(both, "all-gather", ("u8",)) == 2 * leaf_bytes(up, down)[0]
    codes = [leaf for leaf in jax.tree.leaves(saved) if leaf.dtype == jnp.uint8]
    assert codes
    assert all("d" in leaf.sharding.spec for leaf in codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_experts_stay_where_they_are(name, kind):
    mesh, num_experts = mesh_of(kind), 4
    experts = jaxq.quantize(
        normal_with_outliers(num_experts, K, N), SPECS[name], contracting=-2, batch=0
    )
    x = normal_with_outliers(num_experts, ROWS, K)
    with jax.set_mesh(mesh):
        experts = sharding.place(experts, mesh, P("t"))
        rows = sharding.place(x, mesh, P("t", "d"))
        found = collectives(
            lambda x, w: jaxq.einsum("ebk,ekn->ebn", x, w), rows, experts
        )
        assert found == []
        sorted_rows = sharding.place(x[0], mesh, P())
        sizes = sharding.place(jnp.full(num_experts, ROWS // num_experts), mesh, P())
        ragged = collectives(jaxq.ops.ragged_dot, sorted_rows, experts, sizes)
    # The sizes of the experts and the sums of the rows, and nothing of the weights.
    if kind is AxisType.Explicit:
        assert ragged == [("all-reduce", "f32", ROWS * N * 4)]
    assert {kind for kind, _, _ in ragged} <= {"all-gather", "all-reduce"}
    assert total(ragged, "all-gather", ("s8", "u8", "f32", "bf16")) == 0
    # On automatic axes the halves of a byte are added up apart.
    fields = 1 if name == "int8" or kind is AxisType.Explicit else 2
    assert total(ragged, "all-reduce") == fields * ROWS * N * 4


def test_attention_over_a_sharded_cache_has_no_collective():
    mesh = mesh_of(AxisType.Explicit)
    cache = jaxq.ops.KVCache.empty(
        "int4", batch=2, num_heads=2, length=256, head_dim=64, dtype=jnp.float32
    )

    def put(leaf):
        spec = P("d", "t") if leaf.ndim > 1 else P("d")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        cache = jax.tree.map(put, cache)
        q = sharding.place(normal_with_outliers(2, 1, 4, 64), mesh, P("d", None, "t"))
        assert collectives(lambda cache, q: cache.attend(q), cache, q) == []


# Quantization of weights that are sharded already.

WHERE = {"row": P("t", None), "column": P(None, "t"), "fsdp": P(("d", "t"), None)}
QUANTIZED = ("int4", "int8", "nf4", "mxfp4", "nvfp4", "fp8", "uint8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WHERE)
def test_quantization_exchanges_only_extremes(where, kind):
    mesh = mesh_of(kind)
    params = {name: normal_with_outliers(N, K) for name in QUANTIZED}
    recipe = jaxq.Recipe([jaxq.Rule(name, weight=name) for name in QUANTIZED])
    sharding_of_weight = NamedSharding(mesh, WHERE[where])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding_of_weight)
        found = collectives(lambda p: jaxq.quantize_params(p, recipe)[0], params)
    # A maximum for each of K columns, a minimum and a maximum for uint8, and one number
    # for the scales of nvfp4.
    limit = {"row": 5 * K * 4 + 4, "column": 4, "fsdp": 5 * K * 4 + 4}[where]
    assert {kind for kind, _, _ in found} <= {"all-reduce"}
    assert 0 < total(found, "all-reduce") <= limit
