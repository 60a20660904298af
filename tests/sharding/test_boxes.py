"""Metadata of Flax through quantization, and the bytes that each device then has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx, serialization
from flax.core import meta
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import sharding
from jaxq.nn.linen import QuantizedBox, quantize_model
from tests.arrays import normal
from tests.io.test_placement import assert_same

INIT = linen.initializers.lecun_normal()
LOGICAL = (("embed", None), ("mlp", "t"), ("layers", "d"))
X = normal(4, 64)


def devices():
    return jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)


class Net(linen.Module):
    """A layer, a stack of layers and a layer. `box` gives their kernels names."""

    box: object
    axes: tuple

    @linen.compact
    def __call__(self, x):
        embed, mlp, layers = self.axes
        up, down = self.box(INIT, (embed, mlp)), self.box(INIT, (mlp, embed))
        x = linen.Dense(256, kernel_init=up, name="up")(x)
        run = linen.scan(
            lambda layer, x, _: (jax.nn.relu(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={linen.PARTITION_NAME: layers},
        )
        x, _ = run(linen.Dense(256, kernel_init=down, name="stack"), x, None)
        return linen.Dense(128, kernel_init=down, name="down")(x)


MESH_AXES = Net(linen.with_partitioning, (None, "t", "d"))
LOGICAL_AXES = Net(linen.with_logical_partitioning, ("embed", "mlp", "layers"))


@pytest.fixture(scope="module", params=["mesh", "logical"])
def quantized(request):
    """A quantized module and its variables, and the float variables."""
    module = MESH_AXES if request.param == "mesh" else LOGICAL_AXES
    variables = module.init(jax.random.key(0), X)
    qmodule, qvariables, report = quantize_model(module, variables, "int4", example=X)
    assert len(report.quantized) == 3
    return qmodule, qvariables, variables


def test_quantized_weights_keep_their_names(quantized):
    _, qvariables, variables = quantized
    for name in ("up", "stack", "down"):
        box = qvariables["params"][name]["kernel"]
        float_box = variables["params"][name]["kernel"]
        assert type(box) is QuantizedBox
        assert type(box.box) is type(float_box)
        assert box.box.names == float_box.names
        assert isinstance(linen.unbox(box), jaxq.QTensor)


def test_specs_and_shardings_follow_the_boxes(quantized):
    _, qvariables, variables = quantized
    mesh = devices()
    with linen.logical_axis_rules(LOGICAL):
        expected = sharding.place(
            linen.unbox(qvariables), mesh, sharding.read_rules(variables)
        )
        assert_same(linen.unbox(sharding.place(qvariables, mesh)), expected)
        at = sharding.specs(qvariables, mesh=mesh)
        from_flax = linen.get_partition_spec(qvariables)
        if qvariables["params"]["up"]["kernel"].box.names == ("embed", "mlp"):
            from_flax = linen.logical_to_mesh(from_flax)
    assert jax.tree.structure(at) == jax.tree.structure(from_flax)
    for specs in (at, from_flax):
        assert specs["params"]["stack"]["kernel"].value.data == P("d", None, "t")
        assert specs["params"]["up"]["kernel"].value.scale == P("t", None)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), at)
    placed = jax.jit(lambda tree: tree, out_shardings=shardings)(qvariables)
    assert_same(linen.unbox(placed), expected)


@pytest.mark.parametrize("with_mesh", [False, True])
def test_apply_and_scan_take_the_boxes(quantized, with_mesh):
    qmodule, qvariables, _ = quantized
    expected, mesh = qmodule.apply(qvariables, X), devices()
    with linen.logical_axis_rules(LOGICAL):
        placed = sharding.place(qvariables, mesh)
        apply = jax.jit(qmodule.apply)
        if with_mesh:
            with jax.set_mesh(mesh):
                y = apply(placed, X)
        else:
            y = apply(placed, X)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(qmodule.apply(linen.unbox(qvariables), X), expected)


def test_files_keep_the_boxes(quantized, tmp_path):
    _, qvariables, _ = quantized
    mesh, path = devices(), tmp_path / "variables"
    jaxq.save(path, qvariables)
    loaded = jaxq.load(path)
    assert jax.tree.structure(_unnamed(loaded)) == jax.tree.structure(
        _unnamed(qvariables)
    )
    with linen.logical_axis_rules(LOGICAL):
        placed = sharding.place(loaded, mesh)
        for into in (None, qvariables):
            assert_same(jaxq.load(path, into=into, mesh=mesh), placed)
    assert_same(jaxq.load(path, into=placed), placed)
    again = serialization.from_bytes(qvariables, serialization.to_bytes(qvariables))
    jax.tree.map(np.testing.assert_array_equal, again, qvariables)


def _unnamed(variables):
    """Variables whose QTensors have no name. Files do not have it."""
    return jax.tree.map(
        lambda leaf: (
            leaf.with_meta(name="") if isinstance(leaf, jaxq.QTensor) else leaf
        ),
        variables,
        is_leaf=lambda node: isinstance(node, jaxq.QTensor),
    )


def test_rules_of_a_box_and_several_mesh_axes_are_kept(tmp_path):
    w = normal(64, 256)
    box = linen.LogicallyPartitioned(
        w, ("embed", ("mlp", "heads")), rules=(("embed", ("d", "t")), ("mlp", None))
    )
    jaxq.save(tmp_path / "w", {"w": box, "other": Pair(w)})
    loaded = jaxq.load(tmp_path / "w")
    assert loaded["w"].names == box.names
    assert loaded["w"].rules == box.rules
    # A class that is not Flax's is a dict in a file.
    np.testing.assert_array_equal(loaded["other"]["value"], w)


class Pair(linen.Partitioned):
    """A box of a user."""

    def __init__(self, value, names=(None, None), mesh=None):
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "mesh", mesh)


def test_a_file_with_a_wrong_box_is_damaged(tmp_path):
    path = tmp_path / "w"
    jaxq.save(path, {"w": linen.Partitioned(normal(4, 4), (None, "t"))})
    content = path.read_bytes()
    for old, new in (
        (b"Partitioned", b"Particioned"),
        (b'null, \\"t\\"', b"null,  777 "),
    ):
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
        with pytest.raises(ValueError, match=r"metadata of w are wrong"):
            jaxq.load(path, verify=False)


def test_trees_have_boxes():
    box = linen.Partitioned(normal(64, 256), (None, "t"))
    (qparams, _) = jaxq.quantize_params({"up": box, "bias": jnp.zeros(8)}, "int8")
    assert type(qparams["up"]) is QuantizedBox
    placed = sharding.place(qparams, devices())["up"].value
    assert placed.data.sharding.spec == P("t", None)
    floats = jaxq.dequantize_params(qparams)["up"]
    assert floats.get_partition_spec() == P(None, "t")
    np.testing.assert_allclose(linen.unbox(floats), box.value, atol=0.05)


def test_nnx_modules_of_linen_keep_the_box():
    module = linen.Dense(256, kernel_init=linen.with_partitioning(INIT, (None, "t")))
    variables = module.init(jax.random.key(0), X)
    qmodule, qvariables, _ = quantize_model(module, variables, "int8")
    bridged = nnx.bridge.ToNNX(qmodule, nnx.Rngs(0))
    attributes = nnx.bridge.variables.linen_vars_to_nnx_attrs(qvariables)
    back = nnx.bridge.variables.nnx_attrs_to_linen_vars(attributes)
    assert jax.tree.structure(back) == jax.tree.structure(qvariables)
    assert attributes["kernel"].get_metadata()[sharding.WEIGHT_SHARDING] == (None, "t")
    assert isinstance(bridged, nnx.Module)


def test_weights_in_training_keep_the_boxes(quantized, tmp_path):
    _, expected, variables = quantized
    axes = variables["params"]["up"]["kernel"].names
    module = MESH_AXES if axes == (None, "t") else LOGICAL_AXES
    qat, prepared = jaxq.training.linen.prepare(module, variables, "int4", example=X)
    for name in ("up", "stack", "down"):
        box = prepared["params"][name]["kernel"]
        assert type(box) is QuantizedBox
        assert box.box.names == variables["params"][name]["kernel"].names
        assert isinstance(linen.unbox(box), jaxq.qtensor.TrainedWeight)
        specs = box.get_partition_spec().value
        assert specs.floats == P(*box.box.names)
    # The scan adds and removes the name of its axis.
    y = qat.apply(prepared, X)
    np.testing.assert_array_equal(y, qat.apply(linen.unbox(prepared), X))
    kinds = jaxq.training.labels(prepared["params"])["up"]["kernel"]
    assert kinds.value.floats == "weight"
    _, converted, _ = jaxq.training.linen.convert(qat, prepared)
    assert jax.tree.structure(converted) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, converted, expected)
    jaxq.save(tmp_path / "prepared", prepared)
    loaded = jaxq.load(tmp_path / "prepared", into=prepared)
    assert jax.tree.structure(loaded) == jax.tree.structure(prepared)
    jax.tree.map(np.testing.assert_array_equal, loaded, prepared)
    # Preparing again starts from the floats in their boxes of Flax.
    _, again = jaxq.training.linen.prepare(qat, prepared, "int4", example=X)
    jax.tree.map(np.testing.assert_array_equal, again, prepared)
    assert jax.tree.structure(again) == jax.tree.structure(prepared)


def test_moving_averages_and_trees_keep_the_boxes():
    init = linen.with_partitioning(INIT, (None, "t"))
    module = linen.Dense(128, kernel_init=init)
    recipe = jaxq.Recipe([jaxq.Rule(weight="int8", activation="int8")])
    variables = module.init(jax.random.key(0), X)
    results = []
    for floats in (variables, linen.unbox(variables)):
        qat, prepared = jaxq.training.linen.prepare(
            module, floats, recipe, ranges=jaxq.training.ema()
        )
        _, stats = qat.apply(prepared, X, mutable=["quant_stats"])
        qmodule, converted, _ = jaxq.training.linen.convert(qat, {**prepared, **stats})
        results.append((converted["params"]["kernel"], qmodule.apply(converted, X)))
    (box, y), (qt, expected) = results
    assert box.box.names == (None, "t")
    jax.tree.map(np.testing.assert_array_equal, linen.unbox(box), qt)
    np.testing.assert_array_equal(y, expected)

    tree = {"w": linen.Partitioned(normal(64, 8), (None, "t"))}
    trained = jaxq.training.prepare(tree, "int4")
    assert isinstance(trained["w"].value, jaxq.qtensor.TrainedWeight)
    converted, _ = jaxq.training.convert(trained)
    expected, _ = jaxq.quantize_params(tree, "int4")
    assert jax.tree.structure(converted) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, converted, expected)


def test_boxes_of_other_classes_are_kept():
    class Note(meta.AxisMetadata):
        def __init__(self, value, text):
            self.value, self.text = value, text

        def unbox(self):
            return self.value

        def replace_boxed(self, val):
            return Note(val, self.text)

        def add_axis(self, index, params):
            return self

        def remove_axis(self, index, params):
            return self

    jax.tree_util.register_pytree_node(
        Note,
        lambda box: ((box.value,), box.text),
        lambda text, leaves: Note(*leaves, text),
    )
    params, _ = jaxq.quantize_params({"w": Note(normal(64, 8), "hello")}, "int8")
    box = params["w"]
    assert type(box) is QuantizedBox
    assert box.box.text == "hello"
    assert not any(box.get_partition_spec().value.data)
    placed = sharding.place(params, devices())["w"]
    assert placed.value.data.sharding.is_fully_replicated


# Bytes.


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        columns = nnx.with_partitioning(INIT, (None, "t"))
        both = nnx.with_partitioning(INIT, ("t", "d"))
        self.up = nnx.Linear(64, 256, kernel_init=columns, rngs=rngs)
        self.down = nnx.Linear(256, 128, kernel_init=both, rngs=rngs)


def num_shards(leaf):
    """The number of parts along each axis."""
    (shard, *_) = leaf.addressable_shards
    sizes = zip(leaf.shape, shard.data.shape, strict=True)
    return [whole // part for whole, part in sizes]


def assert_same_fraction(qt, weight):
    """Each device has the same fraction of codes and scales as of the float weight.

    A scale for a whole column is on all devices that share the column.
    """
    *batch, rows, columns = num_shards(weight)
    assert num_shards(qt.data) == [*batch, columns, rows]
    of_blocks = [*batch, columns, rows if qt.scale.shape[-1] > 1 else 1]
    scale = qt.scale
    if isinstance(scale, jaxq.QTensor):
        assert num_shards(scale.scale)[: len(batch)] == batch
        scale = scale.data
    assert num_shards(scale) == of_blocks
    if qt.zero_point is not None:
        assert num_shards(qt.zero_point) == of_blocks


def nnx_weights(recipe, mesh):
    with jax.set_mesh(mesh):
        model = NnxNet(nnx.Rngs(0))
    kept, _ = jaxq.quantize_model(model, recipe)
    # On one device only the metadata know the mesh axes.
    graph, state = nnx.split(kept)
    state = jax.tree.map(jnp.asarray, jax.device_get(state))
    placed = sharding.place(nnx.merge(graph, state), mesh)
    return [[net.up.kernel[...], net.down.kernel[...]] for net in (model, kept, placed)]


def linen_weights(recipe, mesh):
    variables = MESH_AXES.init(jax.random.key(0), X)
    on_mesh = sharding.place(variables, mesh)
    _, kept, _ = quantize_model(MESH_AXES, on_mesh, recipe, example=X)
    _, placed, _ = quantize_model(MESH_AXES, variables, recipe, example=X)
    placed = sharding.place(placed, mesh)
    return [
        [
            linen.unbox(tree["params"][name]["kernel"])
            for name in ("up", "stack", "down")
        ]
        for tree in (on_mesh, kept, placed)
    ]


@pytest.mark.parametrize("recipe", ["int8", "uint4", "nvfp4"])
@pytest.mark.parametrize("weights_of", [nnx_weights, linen_weights])
def test_nothing_that_was_sharded_is_replicated(weights_of, recipe):
    floats, kept, placed = weights_of(recipe, devices())
    for weight, *qtensors in zip(floats, kept, placed, strict=True):
        assert max(num_shards(weight)) == 2
        for qt in qtensors:
            assert_same_fraction(qt, weight)
