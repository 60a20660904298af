"""The collectives of compiled programs: codes move between devices, never floats.

Each row of a table lists the bytes that a device receives or adds up, by the kind of
collective, for a program with two layers `up` and `down`. XLA:CPU gathers bfloat16 as
float32, so scales are float32 here.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import sharding
from tests.arrays import assert_close, normal_with_outliers
from tests.sharding.hlo import BYTES, collectives_in

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


def collectives(f, *args, **options):
    """The (kind, dtype, bytes of the result) of each collective of a program."""
    return collectives_in(jax.jit(f, **options).lower(*args).compile().as_text())


def total(found, kind, dtypes=tuple(BYTES)):
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


def gathered(qt, mesh):
    """The QTensor, whose codes and scales every device gets."""
    whole = sharding.specs(qt, P(), mesh=mesh)
    return jax.lax.with_sharding_constraint(qt, whole)


@pytest.mark.parametrize("name", SPECS)
def test_a_constraint_gathers_codes_on_automatic_axes(name):
    """XLA otherwise moves decoded floats in fully sharded layers."""
    mesh = mesh_of(AxisType.Auto)

    def constrained(x, up, down):
        return block(x, gathered(up, mesh), gathered(down, mesh))

    def constrained_loss(x, up, down):
        return (constrained(x, up, down) ** 2).sum()

    with jax.set_mesh(mesh):
        up, down = layers(name, mesh, FSDP["rows"])
        x = sharding.place(normal_with_outliers(ROWS, K), mesh, P("d"))
        forward = collectives(constrained, x, up, down)
        both = collectives(jax.grad(constrained_loss), x, up, down)
    codes, scales = leaf_bytes(up, down)
    for found in (forward, both):
        assert {kind for kind, _, _ in found} == {"all-gather"}
        assert total(found, "all-gather", ("s8", "u8")) == codes
        assert total(found, "all-gather", ("f32", "bf16")) <= scales


def test_every_preset_can_be_constrained():
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        for preset in jaxq.presets():
            qt = jaxq.quantize(normal_with_outliers(64, 128), preset)
            result = jax.eval_shape(lambda qt: gathered(qt, mesh), qt)
            assert jax.tree.structure(result) == jax.tree.structure(qt), preset


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


TOKENS = 512
GROUPS = jaxq.QuantSpec("int4", jaxq.PerGroup(32))
METHODS = {
    "gptq": lambda w, hessian, x: jaxq.methods.gptq(w, hessian, GROUPS),
    "awq": lambda w, hessian, x: jaxq.methods.awq(w, x, GROUPS),
}


@pytest.mark.parametrize(
    ("name", "where"), [("gptq", "column"), ("awq", "column"), ("awq", "row")]
)
def test_calibrated_methods_gather_no_weight(name, where):
    """GPTQ has a column of the weight on one device. AWQ adds up outputs of tokens."""
    mesh, k, n = mesh_of(AxisType.Explicit), 64, 256
    x = normal_with_outliers(TOKENS, k)
    with jax.set_mesh(mesh):
        w = jax.device_put(
            normal_with_outliers(k, n), NamedSharding(mesh, WHERE[where])
        )
        hessian = jax.device_put(x.T @ x, NamedSharding(mesh, P()))
        x = jax.device_put(x, NamedSharding(mesh, P("d")))
        found = collectives(METHODS[name], w, hessian, x)
    if name == "gptq":
        assert found == [("all-reduce", "f32", 4)]  # the error of the layer
        return
    # A factor for each input, which is gathered if the weight is sharded along inputs.
    assert total(found, "all-gather") <= 2 * k * 4
    outputs = TOKENS // 2 * n * 4  # of one device's tokens
    most = {"column": 2 * k * k * 4, "row": 4 * outputs}[where]
    assert {kind for kind, _, _ in found} <= {"all-reduce", "all-gather"}
    assert total(found, "all-reduce") <= most


class Layers(nnx.Module):
    """A column-parallel and a row-parallel layer."""

    def __init__(self, mesh):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(K, N, rngs=rngs, use_bias=False)
        self.down = nnx.Linear(N, K, rngs=rngs, use_bias=False)
        for layer, spec in zip((self.up, self.down), TENSOR, strict=True):
            kernel = layer.kernel.get_value()
            layer.kernel.set_value(jax.device_put(kernel, NamedSharding(mesh, spec)))


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_a_model_is_quantized_in_jit_without_gathered_floats(recipe):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(Layers(mesh))

        def quantized(state):
            model = nnx.merge(graph, state)
            return nnx.state(jaxq.quantize_model(model, recipe)[0])

        found = collectives(quantized, state)
    # int8 needs the extremes of the columns of `down`. Groups of int4 are not cut.
    assert {kind for kind, _, _ in found} <= {"all-reduce"}
    assert total(found, "all-reduce") == (K * 4 if recipe == "int8" else 0)


def test_calibration_adds_up_the_moments_of_data_parallel_rows():
    mesh, k, tokens = mesh_of(AxisType.Explicit), 64, 4096

    def statistics(x, counts, parts):
        stats = jaxq.observers.empty_stats(k)
        return jaxq.observers.update_stats(stats, x, counts, parts)

    rows = (normal_with_outliers(tokens, k), jnp.ones(tokens, bool))
    rows = (*rows, jnp.arange(tokens) % 8)
    expected = jax.jit(statistics)(*rows)
    with jax.set_mesh(mesh):
        rows = jax.device_put(rows, NamedSharding(mesh, P("d")))
        found = collectives(statistics, *rows)
        stats = jax.jit(statistics)(*rows)
    assert_close(stats, expected, 1e-5)
    assert total([row for row in found if row[2] == k * k * 4], "all-reduce") > 0
    # Kept samples move. The tokens of a device do not.
    kept = sum(x.nbytes for x in (expected.samples, expected.held_out))
    assert total(found, "all-reduce") <= kept + k * k * 4 + 8 * k * 4
    assert total(found, "all-gather") <= 5 * tokens * 4  # random ranks of rows
    assert max(size for _, _, size in found) < tokens // 2 * k * 4
