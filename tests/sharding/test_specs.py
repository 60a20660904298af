"""`specs`, `place`, `fit_to_shards`, `read_rules`: arrays and models on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import sharding
from tests.arrays import normal, normal_with_outliers

SIZES = AbstractMesh((2, 4), ("d", "t"))


def devices():
    return jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)


def assert_same_values(qt, other):
    np.testing.assert_array_equal(jaxq.dequantize(qt), jaxq.dequantize(other))


# One QTensor.


def test_leaves_have_the_mesh_axes_of_the_axis_they_come_from():
    qt = jaxq.quantize(normal_with_outliers(3, 256, 64), "uint4", batch=(0,))
    at = sharding.specs(qt, P(None, "t", "d"), mesh=AbstractMesh((2, 2), ("d", "t")))
    assert isinstance(at, jaxq.QTensor)
    assert at.data == at.scale == at.zero_point == P(None, "d", "t")
    columns = sharding.specs(jaxq.relayout(qt, "columns"), P(None, "d"), mesh=SIZES)
    assert columns.data == P(None, "d", None)
    assert columns.scale == P(None, None, "d")


def test_a_batch_axis_shards_every_leaf():
    qt = jaxq.quantize(normal_with_outliers(4, 256, 64), "nf4_dq", batch=(0,))
    qt = qt.with_input_scale(jnp.ones(256)).with_activation("int8", bounds=(-1.0, 1.0))
    at = sharding.specs(qt, P("t"), mesh=SIZES)
    leaves = jax.tree.leaves(at)
    assert len(leaves) == len(jax.tree.leaves(qt)) == 5
    assert all(leaf[0] == "t" and not any(leaf[1:]) for leaf in leaves)


def test_leaves_without_the_axis_are_not_sharded():
    per_channel = jaxq.quantize(normal_with_outliers(64, 32), "int8")
    at = sharding.specs(per_channel, P("t", "d"), mesh=SIZES)
    assert (at.data, at.scale) == (P("d", "t"), P("d", None))
    trained = jaxq.quantize(normal_with_outliers(64, 32), "ttq")
    at = sharding.specs(trained, P(None, "t"), mesh=SIZES)
    assert not any(at.scale)
    assert not any(at.codebook)


def test_every_level_of_scales_has_specs():
    qt = jaxq.quantize(normal_with_outliers(256, 64), "nvfp4")
    at = sharding.specs(qt, P("t", "d"), mesh=SIZES)
    assert at.data == at.scale.data == P("d", "t")
    assert not any(at.scale.scale)
    # Flat blocks of 256 scales: 4 scales a channel, 32 channels a shard.
    flat = jaxq.quantize(normal_with_outliers(256, 128), "nf4_dq")
    at = sharding.specs(flat, P(None, "d"), mesh=SIZES)
    assert at.scale.data == at.scale.scale == P("d")


def test_several_contracted_axes_are_sharded_along_the_first():
    w = normal_with_outliers(4, 16, 8)
    qt = jaxq.quantize(w, "int8", contracting=(-3, -2))
    assert sharding.specs(qt, P("t"), mesh=SIZES).data == P(None, "t")
    with pytest.raises(ValueError, match=r"only its first axis, -3"):
        sharding.specs(qt, P(None, "d"), mesh=SIZES)


def test_factors_of_the_input_follow_the_contracted_axes():
    flat = jaxq.QuantSpec("int8", jaxq.PerFlat(64))
    for spec, along_k in (("int8", "d"), (flat, None)):
        qt = jaxq.quantize(normal_with_outliers(64, 32), spec)
        qt = qt.with_input_scale(jnp.ones(64))
        at = sharding.specs(qt, P(along_k, "t"), mesh=SIZES)
        assert at.data[0] == "t"
        assert at.input_scale == P(along_k)


CUTS = {
    "group": (("int4", 448, 8), P("t"), r"112 codes.*groups of 128 .*groups of 16 fit"),
    "row": (("ternary", 256, 8), P("d"), r"'halves' puts the 256 codes of a row"),
    "byte": (("int3", 4, 8), P("d"), r"2 codes of a shard are not whole bytes"),
    "axis": (("int8", 64, 6), P(None, "t"), r"4 shards do not divide the 6 entries"),
    "scales": (("nf4_dq", 256, 64), P("d"), r"scales along axis -1 in 2 shards"),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_shard_that_would_cut_is_an_error(name):
    (preset, *shape), spec, message = CUTS[name]
    qt = jaxq.quantize(normal_with_outliers(*shape), preset, name="block/up")
    with pytest.raises(ValueError, match=message) as error:
        sharding.specs(qt, spec, mesh=SIZES)
    assert "block/up (" in str(error.value)


def test_the_error_lists_the_numbers_of_shards_that_work():
    qt = jaxq.quantize(normal_with_outliers(512, 8), "int4")
    with pytest.raises(ValueError, match=r"Possible are 1, 2, 4 shards\."):
        sharding.specs(qt, P(("d", "t")), mesh=SIZES)


# The spec of each array, the possible shards, and whether smaller groups can help.
REMEDIES = {
    "float": (jnp.ones((63, 33)), P(None, "d"), "Possible are 1, 3, 11, 33 shards", 0),
    "one": (jnp.ones((64, 1)), P(None, "d"), "This axis cannot be sharded", 0),
    "axis": (CUTS["axis"], P(None, "t"), "Possible are 1, 2, 3, 6 shards", 0),
    "byte": (CUTS["byte"], P("d"), "This axis cannot be sharded", 0),
    "group": (CUTS["group"], P("t"), "This axis cannot be sharded", 1),
    "row": (CUTS["row"], P("d"), "This axis cannot be sharded", 1),
    "scales": (CUTS["scales"], P("d"), "This axis cannot be sharded", 1),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_the_error_advises_smaller_groups_only_if_they_help(name):
    source, spec, possible, can_fit = REMEDIES[name]
    array = source
    if isinstance(source, tuple):
        (preset, *shape), _, _ = source
        array = jaxq.quantize(normal_with_outliers(*shape), preset)
    with pytest.raises(ValueError, match="do not fit the arrays") as error:
        sharding.specs(array, spec, mesh=SIZES)
    assert possible in str(error.value)
    assert ("fit_to_shards" in str(error.value)) == bool(can_fit)
    if isinstance(array, jaxq.QTensor) and can_fit:
        fit = sharding.fit_to_shards(array, spec, mesh=SIZES)
        assert_same_values(fit, array)
    elif isinstance(array, jaxq.QTensor):
        with pytest.raises(ValueError, match="^fit_to_shards: the shards do not fit"):
            sharding.fit_to_shards(array, spec, mesh=SIZES)


@pytest.mark.parametrize("preset", [None, "int8"])
def test_rules_by_pattern_for_one_array_are_an_error(preset):
    w = normal(64, 32)
    array = w if preset is None else jaxq.quantize(w, preset)
    with pytest.raises(ValueError, match=r"\['up'\] to match\. Pass its Part") as error:
        sharding.place(array, devices(), {"up": P("t")})
    assert str(error.value).startswith("place: one QTensor or array has no path")


def test_a_spec_must_fit_array_and_mesh():
    qt = jaxq.quantize(normal_with_outliers(64, 8), "int8")
    with pytest.raises(ValueError, match=r"names \['model'\], but the mesh has"):
        sharding.specs(qt, P("model"), mesh=SIZES)
    with pytest.raises(ValueError, match=r"3 entries, and int8\[64x8\] has 2 axes"):
        sharding.specs(qt, P(None, None, "t"), mesh=SIZES)
    with pytest.raises(ValueError, match=r"Pass mesh=, or call jax.set_mesh"):
        sharding.specs(qt, P("t"))
    with pytest.raises(TypeError, match=r"got dict\. For a tree or a model"):
        sharding.specs({"w": qt}, P("t"), mesh=SIZES)
    with pytest.raises(ValueError, match=r"int8\[64x8\] names \['t'\] more than once"):
        sharding.specs(qt, P("t", ("d", "t")), mesh=SIZES)
    with pytest.raises(ValueError, match=r"UNCONSTRAINED, but specs needs.*Write None"):
        sharding.specs(qt, P(P.UNCONSTRAINED, "t"), mesh=SIZES)


def test_the_mesh_is_that_of_set_mesh_or_of_the_arrays():
    qt = jaxq.quantize(normal_with_outliers(64, 8), "int8")
    mesh = devices()
    with jax.set_mesh(mesh):
        assert sharding.specs(qt, P(None, "t")).data == P("t", None)
    on_mesh = sharding.place(qt, mesh, P(None, "t"))
    assert sharding.specs(on_mesh, P("d")).data == P(None, "d")
    assert sharding.specs(on_mesh).data == P("t", None)


# The same values in smaller groups.

FITS = [
    ("int4", 448, P("t"), "PerGroup(size=16"),
    ("uint4", 320, P("d"), "PerGroup(size=32"),
    ("int2", 160, P("t"), "PerGroup(size=8"),
    ("ttq", 256, P("t", "d"), "PerTensor()"),
    ("vsq4", 256, P("t"), "PerGroup(size=16"),
    ("nf4_dq", 256, P("t"), "PerGroup(size=64"),
    ("nvfp4", 96, P("t"), "PerGroup(size=8"),
]


@pytest.mark.parametrize(("preset", "rows", "spec", "granularity"), FITS)
def test_smaller_groups_have_the_same_values(preset, rows, spec, granularity):
    qt = jaxq.quantize(normal_with_outliers(rows, 8), preset)
    with pytest.raises(ValueError, match=r"fit_to_shards"):
        sharding.specs(qt, spec, mesh=SIZES)
    fit = sharding.fit_to_shards(qt, spec, mesh=SIZES)
    assert_same_values(fit, qt)
    assert sharding.specs(fit, spec, mesh=SIZES).data[-1] == spec[0]
    assert repr(fit.spec.granularity).startswith(granularity)
    assert fit.meta.geometry.follows(fit.spec.granularity)
    w = jaxq.dequantize(qt)
    np.testing.assert_array_equal(fit.codes(), jaxq.qtensor.requantize(w, fit).codes())


def test_blocks_in_two_axes_and_flat_blocks_become_smaller():
    tiles = jaxq.QuantSpec("int4", jaxq.PerBlock((32, 16)))
    qt = jaxq.quantize(normal_with_outliers(64, 48), tiles)
    mesh = AbstractMesh((4, 4), ("d", "t"))
    fit = sharding.fit_to_shards(qt, P("d", "t"), mesh=mesh)
    assert fit.spec.granularity.shape == (16, 4)
    assert_same_values(fit, qt)
    flat = jaxq.QuantSpec("int8", jaxq.PerFlat(96))
    qt = jaxq.quantize(normal_with_outliers(48, 8), flat)
    fit = sharding.fit_to_shards(qt, P(None, "t"), mesh=SIZES)
    assert fit.meta.geometry.block_shape == (96,)
    fit = sharding.fit_to_shards(qt, P(None, ("d", "t")), mesh=SIZES)
    assert fit.meta.geometry.block_shape == (48,)
    assert_same_values(fit, qt)


def test_what_fits_stays_as_it_is_and_what_never_fits_is_an_error():
    qt = jaxq.quantize(normal_with_outliers(512, 8), "int4")
    assert sharding.fit_to_shards(qt, P("t"), mesh=SIZES) is qt
    qt = jaxq.quantize(normal_with_outliers(6, 8), "int4")
    with pytest.raises(ValueError, match=r"4 shards do not divide the 6 entries"):
        sharding.fit_to_shards(qt, P("t"), mesh=SIZES)


# Trees and models.


def tree_of(preset="int4"):
    w = normal_with_outliers(256, 64)
    params = {"up": {"kernel": w, "bias": jnp.zeros(64)}, "down": {"kernel": w.T}}
    return jaxq.quantize_params(params, preset)[0]


RULES = {"**/up/kernel": P(None, "t"), "down/kernel": P("t", None)}


def test_rules_give_specs_for_a_tree():
    at = sharding.specs(tree_of("int8"), RULES, mesh=SIZES)
    assert at["up"]["kernel"].data == P("t", None)
    assert at["down"]["kernel"].data == P(None, "t")
    assert at["up"]["bias"] == P()


def test_the_first_rule_that_matches_counts():
    rules = {"up/*": P(), "**": P("t")}
    with pytest.raises(ValueError, match=r"names \['x'\]"):
        sharding.specs(tree_of(), {"up/kernel": P("x"), **rules}, mesh=SIZES)
    at = sharding.specs(tree_of("int8"), rules, mesh=SIZES)
    assert not any(at["up"]["kernel"].data)
    assert at["down"]["kernel"].data == P(None, "t")


def test_rules_without_arrays_and_arrays_without_rules_are_errors():
    with pytest.raises(
        ValueError, match=r"\['middle/kernel'\] match no array"
    ) as error:
        sharding.specs(tree_of(), {"middle/kernel": P()}, mesh=SIZES)
    assert "no rule matches down/kernel, up/kernel" in str(error.value)
    with pytest.raises(ValueError, match="not a regular expression"):
        sharding.specs(tree_of(), {"re:(": P()}, mesh=SIZES)
    with pytest.raises(TypeError, match=r"'\*\*': \(None, 't'\)"):
        sharding.specs(tree_of(), {"**": (None, "t")}, mesh=SIZES)


def test_one_error_names_all_arrays_that_a_shard_would_cut():
    with pytest.raises(ValueError, match="up/kernel") as error:
        sharding.specs(
            tree_of(), {"up/kernel": P(("d", "t")), "**": P("t")}, mesh=SIZES
        )
    assert "down/kernel" in str(error.value)


def test_place_shards_a_tree_and_keeps_its_values():
    tree, mesh = tree_of(), devices()
    placed = sharding.place(tree, mesh, {"up/kernel": P("d", "t"), "**": P()})
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    kernel = placed["up"]["kernel"]
    assert kernel.data.sharding == NamedSharding(mesh, P("t", "d"))
    # Each device has a quarter of the codes and scales.
    for leaf in (kernel.data, kernel.scale):
        (shard, *_) = leaf.addressable_shards
        assert shard.data.nbytes * 4 == leaf.nbytes
    assert placed["up"]["bias"].sharding.is_fully_replicated


def test_place_fits_groups_to_shards_when_asked():
    tree = {"w": jaxq.quantize(normal_with_outliers(320, 8), "int4")}
    mesh = devices()
    with pytest.raises(ValueError, match=r"place: the shards.*\n  w \(int4"):
        sharding.place(tree, mesh, {"w": P("t")})
    placed = sharding.place(tree, mesh, {"w": P("t")}, fit_to_shards=True)
    assert_same_values(placed["w"], tree["w"])
    assert placed["w"].scale.sharding.spec == P(None, "t")


class Mlp(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        columns = nnx.with_partitioning(init, (None, "t"))
        rows = nnx.with_partitioning(init, ("mlp", None), sharding_rules=[("mlp", "t")])
        self.up = nnx.Linear(64, 256, kernel_init=columns, rngs=rngs)
        self.down = nnx.Linear(256, 32, kernel_init=rows, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def test_an_nnx_model_is_placed_by_rules():
    with jax.set_mesh(devices()):
        model = Mlp(nnx.Rngs(0))
    qmodel, _ = jaxq.quantize_model(model, "int8")
    x = jnp.ones((2, 64))
    expected = qmodel(x)
    rules = {"up/kernel": P(None, "t"), "down/kernel": P("t")}
    placed = sharding.place(qmodel, devices(), rules)
    assert type(placed) is Mlp
    assert placed.up.kernel[...].data.sharding.spec == P("t", None)
    assert placed.down.kernel[...].data.sharding.spec == P(None, "t")
    np.testing.assert_allclose(placed(x), expected, atol=1e-5)


def test_the_metadata_of_nnx_give_the_specs_of_the_float_model():
    mesh = devices()
    with jax.set_mesh(mesh):
        model = Mlp(nnx.Rngs(0))
    at = sharding.specs(model)
    assert at["up"]["kernel"].get_value() == P(None, "t")
    assert at["down"]["kernel"].get_value() == P("t", None)
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(jnp.asarray, jax.device_get(state)))
    placed = sharding.place(model, mesh)
    assert placed.up.kernel[...].sharding == NamedSharding(mesh, P(None, "t"))
    rules = sharding.read_rules(model)
    assert rules["down/kernel"] == P("t", None)
    assert rules["down/bias"] == P()


def test_linen_variables_are_placed_by_their_boxes():
    init = linen.with_logical_partitioning(
        linen.initializers.lecun_normal(), ("embed", "mlp")
    )
    module, x = linen.Dense(64, kernel_init=init), jnp.ones((2, 32))
    variables = module.init(jax.random.key(0), x)
    mesh = devices()
    with linen.logical_axis_rules([("embed", None), ("mlp", "t")]):
        assert sharding.specs(variables, mesh=mesh)["params"]["kernel"] == P(None, "t")
        placed = sharding.place(variables, mesh)["params"]["kernel"]
        assert type(placed) is type(variables["params"]["kernel"])
        assert placed.value.sharding.spec == P(None, "t")
        rules = sharding.read_rules(variables)
        _, qvariables, _ = jaxq.nn.linen.quantize_model(
            module, variables, "int8", example=x
        )
        quantized = sharding.place(qvariables, mesh)["params"]["kernel"]
    assert quantized.value.data.sharding.spec == P("t", None)
    unboxed = sharding.place(linen.unbox(qvariables), mesh, rules)["params"]["kernel"]
    assert unboxed.data.sharding.spec == P("t", None)
    with pytest.raises(ValueError, match=r"flax.linen.logical_axis_rules"):
        sharding.specs(variables, mesh=mesh)


def test_weights_in_training_are_refused():
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    w = model.kernel[...]
    trained = jaxq.qtensor.TrainedWeight.start(w, jaxq.quantize(w, "int8"))
    with pytest.raises(TypeError, match=r"up is a weight in quantization-aware"):
        sharding.specs({"up": trained}, {"up": P("t")}, mesh=SIZES)
    with pytest.raises(TypeError, match=r"w is a weight in quantization-aware"):
        sharding.specs(trained, P("t"), mesh=SIZES)


def test_quantized_weights_keep_the_metadata_of_nnx(tmp_path):
    mesh = devices()
    with jax.set_mesh(mesh):
        model = Mlp(nnx.Rngs(0))
        qmodel, _ = jaxq.quantize_model(model, "int8")
    # On one device only the metadata know the mesh axes.
    graph, state = nnx.split(qmodel)
    qmodel = nnx.merge(graph, jax.tree.map(jnp.asarray, jax.device_get(state)))
    jaxq.save(tmp_path / "model", qmodel)
    loaded = jaxq.load(tmp_path / "model", into=model)
    for one_device in (qmodel, loaded):
        placed = sharding.place(one_device, mesh)
        assert placed.up.kernel[...].data.sharding.spec == P("t", None)
        assert placed.down.kernel[...].data.sharding.spec == P(None, "t")
        assert placed.down.kernel[...].scale.sharding.is_fully_replicated


def test_place_needs_devices():
    mesh = jax.sharding.AbstractMesh((2,), ("t",))
    with pytest.raises(TypeError, match=r"place: mesh must be a jax\.sharding\.Mesh"):
        sharding.place(normal(8, 8), mesh, P("t", None))
