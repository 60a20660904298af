"""Models on a mesh of four devices.

Codes are sharded as the floats were, and results as `out_sharding` says.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import Recipe, Rule
from tests import tables
from tests.arrays import normal, normal_with_outliers
from tests.nn.layers.test_nnx import assert_close_and_nonzero

TYPES = (AxisType.Auto, AxisType.Explicit)
KERNELS = {
    "columns": P(None, "model"),
    "rows": P("model", None),
    "both": P("data", "model"),
    "replicated": P(),
}


def mesh_of(*types):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=types)


@functools.partial(nnx.jit, static_argnums=2)
def run(model, x, out):
    return model(x, out_sharding=out)


def is_sharded(x, mesh, *spec):
    return x.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), x.ndim)


def put_on(mesh, layer, x):
    """Replicates the layer on all devices, and shards the rows of its input."""
    graph, state = nnx.split(layer)
    layer = nnx.merge(graph, jax.device_put(state, NamedSharding(mesh, P())))
    return layer, jax.device_put(x, NamedSharding(mesh, P("data")))


CASES = [
    (recipe, kernel, kind)
    for kind in TYPES
    for recipe in ("w8a8", "int4", "mxfp4")
    for kernel in KERNELS
]
FEW = (("w8a8", "columns"), ("int4", "both"))


@pytest.mark.parametrize(
    ("recipe", "kernel", "kind"),
    tables.thinned(CASES, [case for case in CASES if case[:2] in FEW]),
)
def test_codes_and_results_are_sharded_as_floats_and_out_sharding(recipe, kernel, kind):
    model, x = nnx.Linear(64, 64, rngs=nnx.Rngs(0)), normal_with_outliers(8, 64)
    on_one_device, _ = jaxq.quantize_model(model, recipe)
    mesh, spec, expected = mesh_of(kind, kind), KERNELS[kernel], on_one_device(x)
    with jax.set_mesh(mesh):
        model, x = put_on(mesh, model, x)
        sharded = jax.device_put(model.kernel[...], NamedSharding(mesh, spec))
        model.kernel.set_value(sharded)
        qmodel, report = jaxq.quantize_model(model, recipe)
        assert [row.path for row in report.quantized] == ["kernel"]
        qt = qmodel.kernel[...]
        jax.tree.map(np.testing.assert_array_equal, qt, on_one_device.kernel[...])
        k, n = (*spec, None, None)[:2]
        assert is_sharded(qt.data, mesh, n, k)
        # One scale for each row of codes cannot be sharded along the row.
        scale_k = k if qt.scale.shape[-1] > 1 else None
        assert is_sharded(qt.scale, mesh, n, scale_k)
        # Over Auto axes XLA may shard a replicated result along the sum with the bias.
        replicated = () if kind is AxisType.Auto else (P(),)
        for out in (P("data", "model"), P(None, "model"), *replicated):
            y = run(qmodel, x, out)
            assert is_sharded(y, mesh, *out)
            assert_close_and_nonzero(jax.device_get(y), expected)


LAYERS = {
    "general": (
        lambda: nnx.LinearGeneral(32, (4, 8), rngs=nnx.Rngs(0)),
        normal_with_outliers(4, 32),
    ),
    "einsum": (
        lambda: nnx.Einsum("bd,dn->bn", (32, 8), rngs=nnx.Rngs(0)),
        normal_with_outliers(4, 32),
    ),
    "conv": (
        lambda: nnx.Conv(4, 8, (3,), rngs=nnx.Rngs(0)),
        normal_with_outliers(4, 8, 4),
    ),
    "embed": (lambda: nnx.Embed(16, 32, rngs=nnx.Rngs(0)), jnp.arange(4)),
}


# Each layer with each type of axes.
WHOLE = [(name, kind) for name in LAYERS for kind in TYPES]


@pytest.mark.parametrize(
    ("name", "kind"), tables.thinned(WHOLE, [*WHOLE[::4], *WHOLE[3::4]])
)
def test_every_layer_takes_out_sharding(name, kind):
    layer, x = LAYERS[name][0](), LAYERS[name][1]
    layer, _ = jaxq.quantize_model(layer, Recipe([Rule(weight="int8")]))
    mesh, expected = mesh_of(kind, kind), layer(x)
    out = ("data", *[None] * (expected.ndim - 2), "model")
    with jax.set_mesh(mesh):
        layer, x = put_on(mesh, layer, x)
        y = layer(x, out_sharding=P(*out))
        assert is_sharded(y, mesh, *out)
        assert_close_and_nonzero(jax.device_get(y), expected)
        if name == "embed":
            assert is_sharded(layer.attend(y, out_sharding=P("data")), mesh, "data")


def test_float_layers_take_out_sharding():
    mesh = mesh_of(AxisType.Explicit, AxisType.Explicit)
    layer, x = (
        jaxq.nn.QLinear(32, 8, weight=None, rngs=nnx.Rngs(0)),
        normal_with_outliers(4, 32),
    )
    with jax.set_mesh(mesh):
        layer, x = put_on(mesh, layer, x)
        assert is_sharded(
            layer(x, out_sharding=P("data", "model")), mesh, "data", "model"
        )


def test_out_sharding_over_axes_of_both_types_is_an_error():
    q, _ = jaxq.quantize_model(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), "int8")
    with (
        jax.set_mesh(mesh_of(AxisType.Explicit, AxisType.Auto)),
        pytest.raises(
            NotImplementedError, match=r"names the mesh axes \['model'\], which are not"
        ),
    ):
        q(jnp.ones((4, 32)), out_sharding=P("data", "model"))


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_linen_and_trees_keep_their_sharding(kind):
    mesh, module, x = mesh_of(kind, kind), linen.Dense(64), normal_with_outliers(8, 64)
    with jax.set_mesh(mesh):
        columns = NamedSharding(mesh, P(None, "model"))
        variables = {
            "params": {
                "kernel": jax.device_put(normal_with_outliers(64, 64), columns),
                "bias": jnp.zeros(64),
            }
        }
        _, qvariables, _ = jaxq.nn.linen.quantize_model(
            module, variables, "w8a8", example=x
        )
        tree, _ = jaxq.quantize_params(variables, "int8")
    for qt in (qvariables["params"]["kernel"], tree["params"]["kernel"]):
        assert is_sharded(qt.data, mesh, "model")
        assert is_sharded(qt.scale, mesh, "model")


def test_sharded_heads_shard_the_flattened_axis():
    mesh = mesh_of(AxisType.Auto, AxisType.Auto)
    w = jax.device_put(normal_with_outliers(4, 16, 8), NamedSharding(mesh, P("model")))
    tree, _ = jaxq.quantize_params(
        {"out": w}, Recipe([Rule(weight="int8", contracting=(-3, -2))])
    )
    assert is_sharded(tree["out"].data, mesh, None, "model")


def test_leaves_that_describe_the_input_follow_the_rows():
    mesh = mesh_of(AxisType.Auto, AxisType.Auto)
    w = jax.device_put(
        normal_with_outliers(64, 8), NamedSharding(mesh, P("data", "model"))
    )
    qt = jaxq.quantize(w, "int8").with_activation("int8", bounds=(-1.0, 1.0))
    qt = jaxq.qtensor.shard_like(qt.with_input_scale(jnp.ones(64)), w)
    assert is_sharded(qt.data, mesh, "model", "data")
    assert is_sharded(qt.input_scale, mesh, "data")
    # The two ends of a range are no channels, even if there are two devices.
    assert is_sharded(qt.input_range, mesh)


def test_the_report_says_where_shards_cut_groups():
    mesh = jax.make_mesh((4,), ("t",))
    rows = NamedSharding(mesh, P("t", None))
    params = {
        "cut": jax.device_put(normal(384, 64), rows),
        "whole": jax.device_put(normal(512, 64), rows),
    }
    _, report = jaxq.quantize_params(params, "int4")
    notes = {row.path: row.note for row in report.rows}
    assert "not all of it is sharded, because shards would cut groups" in notes["cut"]
    assert "sharded" not in notes["whole"]
