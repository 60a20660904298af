"""Models over a mesh of four devices: codes lie where their floats lay, and results where they are asked for."""

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
from tests.nn.layers.test_nnx import assert_close_and_nonzero
from tests.ops.reference import normal

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


def lies(x, mesh, *spec):
    return x.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), x.ndim)


def over(mesh, layer, x):
    """The layer whole on every device, its input cut by rows."""
    graph, state = nnx.split(layer)
    layer = nnx.merge(graph, jax.device_put(state, NamedSharding(mesh, P())))
    return layer, jax.device_put(x, NamedSharding(mesh, P("data")))


CASES = [
    (recipe, where, kind)
    for kind in TYPES
    for recipe in ("w8a8", "int4", "mxfp4")
    for where in KERNELS
]
FEW = (("w8a8", "columns"), ("int4", "both"))


@pytest.mark.parametrize(
    ("recipe", "where", "kind"),
    tables.thinned(CASES, [case for case in CASES if case[:2] in FEW]),
)
def test_a_sharded_kernel_gives_sharded_codes_and_the_result_asked_for(
    recipe, where, kind
):
    model, x = nnx.Linear(64, 64, rngs=nnx.Rngs(0)), normal(8, 64)
    alone, _ = jaxq.quantize_model(model, recipe)
    mesh, spec, wanted = mesh_of(kind, kind), KERNELS[where], alone(x)
    with jax.set_mesh(mesh):
        model, x = over(mesh, model, x)
        model.kernel.set_value(
            jax.device_put(model.kernel[...], NamedSharding(mesh, spec))
        )
        q, report = jaxq.quantize_model(model, recipe)
        assert [row.path for row in report.quantized] == ["kernel"]
        qt = q.kernel[...]
        jax.tree.map(np.testing.assert_array_equal, qt, alone.kernel[...])
        k, n = (*spec, None, None)[:2]
        assert lies(qt.data, mesh, n, k)
        assert lies(
            qt.scale, mesh, n, k if qt.scale.shape[-1] > 1 else None
        )  # one scale a row cannot be cut
        whole = (
            () if kind is AxisType.Auto else (P(),)
        )  # of which XLA may cut the sum with the bias
        for out in (P("data", "model"), P(None, "model"), *whole):
            y = run(q, x, out)
            assert lies(y, mesh, *out)
            assert_close_and_nonzero(jax.device_get(y), wanted)


LAYERS = {
    "general": (lambda: nnx.LinearGeneral(32, (4, 8), rngs=nnx.Rngs(0)), normal(4, 32)),
    "einsum": (
        lambda: nnx.Einsum("bd,dn->bn", (32, 8), rngs=nnx.Rngs(0)),
        normal(4, 32),
    ),
    "conv": (lambda: nnx.Conv(4, 8, (3,), rngs=nnx.Rngs(0)), normal(4, 8, 4)),
    "embed": (lambda: nnx.Embed(16, 32, rngs=nnx.Rngs(0)), jnp.arange(4)),
}


# Each layer, each type.
WHOLE = [(name, kind) for name in LAYERS for kind in TYPES]


@pytest.mark.parametrize(
    ("name", "kind"), tables.thinned(WHOLE, [*WHOLE[::4], *WHOLE[3::4]])
)
def test_every_layer_takes_out_sharding(name, kind):
    layer, x = LAYERS[name][0](), LAYERS[name][1]
    layer, _ = jaxq.quantize_model(layer, Recipe([Rule(weight="int8")]))
    mesh, wanted = mesh_of(kind, kind), layer(x)
    out = ("data", *[None] * (wanted.ndim - 2), "model")
    with jax.set_mesh(mesh):
        layer, x = over(mesh, layer, x)
        y = layer(x, out_sharding=P(*out))
        assert lies(y, mesh, *out)
        assert_close_and_nonzero(jax.device_get(y), wanted)
        if name == "embed":
            assert lies(layer.attend(y, out_sharding=P("data")), mesh, "data")


def test_floats_go_the_way_of_lax():
    mesh = mesh_of(AxisType.Explicit, AxisType.Explicit)
    layer, x = jaxq.nn.QLinear(32, 8, weight=None, rngs=nnx.Rngs(0)), normal(4, 32)
    with jax.set_mesh(mesh):
        layer, x = over(mesh, layer, x)
        assert lies(layer(x, out_sharding=P("data", "model")), mesh, "data", "model")


def test_axes_of_both_types_cannot_be_asked_for():
    q, _ = jaxq.quantize_model(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), "int8")
    with (
        jax.set_mesh(mesh_of(AxisType.Explicit, AxisType.Auto)),
        pytest.raises(
            NotImplementedError, match=r"names \['model'\], whose axes are not explicit"
        ),
    ):
        q(jnp.ones((4, 32)), out_sharding=P("data", "model"))


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_linen_and_trees_keep_places_too(kind):
    mesh, module, x = mesh_of(kind, kind), linen.Dense(64), normal(8, 64)
    with jax.set_mesh(mesh):
        columns = NamedSharding(mesh, P(None, "model"))
        variables = {
            "params": {
                "kernel": jax.device_put(normal(64, 64), columns),
                "bias": jnp.zeros(64),
            }
        }
        _, found, _ = jaxq.nn.linen.quantize_model(module, variables, "w8a8", example=x)
        tree, _ = jaxq.quantize_params(variables, "int8")
    for qt in (found["params"]["kernel"], tree["params"]["kernel"]):
        assert lies(qt.data, mesh, "model")
        assert lies(qt.scale, mesh, "model")


def test_heads_that_are_cut_cut_the_flattened_axis():
    mesh = mesh_of(AxisType.Auto, AxisType.Auto)
    w = jax.device_put(normal(4, 16, 8), NamedSharding(mesh, P("model")))
    tree, _ = jaxq.quantize_params(
        {"out": w}, Recipe([Rule(weight="int8", contracting=(-3, -2))])
    )
    assert lies(tree["out"].data, mesh, None, "model")
