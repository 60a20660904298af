"""`load(into=...)` puts each array on the devices of the array whose place it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.qtensor import QTensor
from tests import tables
from tests.arrays import normal

TYPES = (AxisType.Explicit, AxisType.Auto)
PRESETS = ("int4", "int8", "nf4_dq", "w8a8")
CASES = [(kind, preset) for kind in TYPES for preset in PRESETS]
FEW = [(AxisType.Explicit, "int4"), (AxisType.Auto, "nf4_dq")]


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


class Net(nnx.Module):
    """Two layers, and arrays in other places."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(64, 256, rngs=rngs)
        self.second = nnx.Linear(256, 128, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.both = nnx.Variable({"step": jnp.zeros(4), "table": [jnp.ones(8)]})
        self.bare = nnx.data(jnp.ones(8))


def on_mesh(model, mesh):
    """A copy of the model whose arrays have three different shardings."""
    state = jax.device_put(nnx.state(model), NamedSharding(mesh, P()))
    copy = nnx.merge(nnx.graphdef(model), state)
    both = NamedSharding(mesh, P(("data", "model")))
    columns = NamedSharding(mesh, P(None, "model"))
    copy.first.kernel.set_value(jax.device_put(model.first.kernel[...], columns))
    copy.second.bias.set_value(
        jax.device_put(model.second.bias[...], NamedSharding(mesh, P("model")))
    )
    tree = copy.both.get_value()
    copy.both.set_value({**tree, "table": jax.device_put(tree["table"], both)})
    copy.bare = nnx.data(jax.device_put(model.bare, both))
    return copy


def assert_same(result, expected):
    """Same bits and same shardings."""

    def compare(path, a, b):
        place = f"{jax.tree_util.keystr(path)}: {a.sharding} is not {b.sharding}"
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), place
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree_util.tree_map_with_path(compare, result, expected)


@pytest.mark.parametrize(("kind", "preset"), tables.thinned(CASES, FEW))
def test_a_model_on_a_mesh(kind, preset, tmp_path):
    path, mesh = tmp_path / "model", mesh_of(kind)
    on_one_device = nnx.clone(jaxq.quantize_model(Net(), preset)[0])
    with jax.set_mesh(mesh):
        floats = on_mesh(Net(1), mesh)
        qmodel, _ = jaxq.quantize_model(on_mesh(Net(), mesh), preset)
    kernel = qmodel.first.kernel[...]
    assert kernel.data.sharding.spec[0] == "model"
    # A file does not know where its arrays were.
    jaxq.save(path, on_one_device)
    # Codes follow the axes of a float weight, and each leaf that of a QTensor.
    for into in (floats, qmodel):
        for context in (jax.set_mesh(mesh), jax.default_device(jax.devices()[0])):
            with context:
                loaded = jaxq.load(path, into=into)
            assert_same(nnx.state(loaded), nnx.state(qmodel))
            assert_same(loaded.bare, qmodel.bare)
            assert isinstance(loaded.first.kernel[...], QTensor)
    jaxq.save(path, Net(2))
    loaded = jaxq.load(path, into=floats)
    assert_same(nnx.state(loaded), nnx.state(on_mesh(Net(2), mesh)))


@pytest.mark.parametrize("kind", TYPES)
def test_shapes_on_a_mesh(kind, tmp_path):
    path, mesh = tmp_path / "model", mesh_of(kind)
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    jaxq.save(path, jaxq.quantize_model(model, "int8")[0])
    init = nnx.initializers.lecun_normal()
    columns = nnx.with_partitioning(init, (None, "model"))
    with jax.set_mesh(mesh):
        shapes = nnx.eval_shape(
            lambda: nnx.Linear(64, 8, kernel_init=columns, rngs=nnx.Rngs(0))
        )
        loaded = jaxq.load(path, into=shapes)
    codes = loaded.kernel[...].data
    assert codes.sharding.is_equivalent_to(NamedSharding(mesh, P("model")), 2)
    with pytest.raises(ValueError, match=r"is a shape on .*with jax\.set_mesh\(mesh"):
        jaxq.load(path, into=shapes)
    other = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    with jax.set_mesh(other), pytest.raises(ValueError, match="with the mesh in which"):
        jaxq.load(path, into=shapes)
    # Shapes with devices need no current mesh.
    rows = NamedSharding(mesh, P("data", None))
    jaxq.save(path, {"w": normal(8, 4)})
    shape = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=rows)
    assert jaxq.load(path, into={"w": shape})["w"].sharding == rows


@pytest.mark.parametrize("kind", TYPES)
def test_trees_on_a_mesh(kind, tmp_path):
    path, mesh = tmp_path / "tree", mesh_of(kind)
    rows = NamedSharding(mesh, P("data", "model"))
    params = {"w": normal(64, 32), "b": jnp.zeros(4)}
    tree = {"params": jaxq.quantize_params(params, "int4")[0], "step": 3}
    tree["state"] = optax.adam(1e-3).init(params)
    jaxq.save(path, tree)
    with jax.set_mesh(mesh):
        moments = jax.device_put(tree["state"], NamedSharding(mesh, P()))
        params = jax.device_put(params, {"w": rows, "b": NamedSharding(mesh, P())})
        qparams, _ = jaxq.quantize_params(params, "int4")
        into = {"params": qparams, "step": 0, "state": moments}
        loaded = jaxq.load(path, into=into)
    assert qparams["w"].data.sharding.spec == P("model", "data")
    assert loaded["step"] == 3
    assert_same(loaded["params"], qparams)
    assert_same(loaded["state"], moments)


@pytest.mark.parametrize("kind", TYPES)
def test_variables_of_linen_on_a_mesh(kind, tmp_path):
    path, mesh = tmp_path / "variables", mesh_of(kind)
    module, x = linen.Dense(64), normal(2, 32)
    variables = module.init(jax.random.key(0), x)
    _, qvariables, _ = jaxq.nn.linen.quantize_model(module, variables, "int8")
    jaxq.save(path, qvariables)
    with jax.set_mesh(mesh):
        variables["params"]["kernel"] = jax.device_put(
            variables["params"]["kernel"], NamedSharding(mesh, P(None, "model"))
        )
        _, into, _ = jaxq.nn.linen.quantize_model(module, variables, "int8")
    assert into["params"]["kernel"].data.sharding.spec[0] == "model"
    assert_same(jaxq.load(path, into=into), into)


def test_another_device_and_no_device(tmp_path):
    path, device = tmp_path / "model", jax.devices()[1]
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    jaxq.save(path, jaxq.quantize_model(model, "int8")[0])
    # Arrays that were put nowhere stay free to move.
    free = jaxq.load(path, into=model).kernel[...]
    assert not free.data.committed
    state = jax.device_put(nnx.state(model), device)
    loaded = jaxq.load(path, into=nnx.merge(nnx.graphdef(model), state))
    for leaf in jax.tree.leaves(nnx.state(loaded)):
        assert leaf.committed
        assert leaf.devices() == {device}


def test_codes_in_another_order_have_the_shards_of_their_axes(tmp_path):
    path, mesh = tmp_path / "w", mesh_of(AxisType.Auto)
    w = normal(64, 32)
    jaxq.save(path, {"w": jaxq.quantize(w, "int4")})
    sharded = jax.device_put(w, NamedSharding(mesh, P("data", "model")))
    columns = jaxq.relayout(jaxq.quantize(sharded, "int4"), "columns")
    assert_same(jaxq.load(path, into={"w": columns}), {"w": columns})


def test_a_device_gets_no_more_than_its_part(tmp_path, monkeypatch):
    from jaxq.serialization import _entries

    path, mesh = tmp_path / "tree", mesh_of(AxisType.Auto)
    rows = NamedSharding(mesh, P("data", "model"))
    tree = {str(i): normal(8, 8, seed=i) for i in range(3)}
    jaxq.save(path, tree)
    shapes = []
    put = _entries.EntryReader._on_device

    def counted(self, name, stored, device=None):
        shapes.append(stored.shape)
        return put(self, name, stored, device)

    monkeypatch.setattr(_entries.EntryReader, "_on_device", counted)
    into = jax.device_put(tree, rows)
    assert_same(jaxq.load(path, into=into), into)
    assert shapes == [(4, 4)] * 12
