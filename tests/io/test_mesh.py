"""`load(mesh=, rules=)`: a file is read straight onto a mesh, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import files, sharding
from jaxq.files import _checksums
from tests.arrays import normal, normal_with_outliers
from tests.io.test_placement import assert_same


def devices(*sizes):
    sizes = sizes or (2, 2)
    names = ("d", "t")[: len(sizes)]
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=kinds)


def tree_of(preset="int4"):
    w = normal_with_outliers(256, 64)
    params = {"up": {"kernel": w, "bias": jnp.zeros(64)}, "down": {"kernel": w.T}}
    return jaxq.quantize_params(params, preset)[0]


RULES = {"up/kernel": P("d", "t"), "down/*": P("t"), "**": P()}


@pytest.mark.parametrize("preset", ["int8", "uint4", "int3", "nvfp4", "mxfp4"])
def test_a_tree_is_where_place_puts_it(preset, tmp_path):
    # Groups of 32 codes fit in the halves of 64.
    spec = jaxq.presets()[preset]
    if isinstance(spec.granularity, jaxq.PerGroup) and spec.granularity.size > 32:
        spec = spec.replace(granularity=jaxq.PerGroup(32))
    tree, mesh = tree_of(spec), devices()
    jaxq.save(tmp_path / "tree", tree)
    loaded = jaxq.load(tmp_path / "tree", mesh=mesh, rules=RULES)
    assert_same(loaded, sharding.place(tree, mesh, RULES))
    assert loaded["up"]["kernel"].meta == tree["up"]["kernel"].with_meta(name="").meta


def test_arrays_without_rules_are_replicated(tmp_path):
    tree = {
        "w": tree_of()["up"]["kernel"],
        "parts": [jnp.ones((2, 3), jnp.bfloat16), jax.random.key(1)],
        "step": 3,
        "none": None,
        "wide": np.arange(4, dtype=np.float64),
    }
    mesh, path = devices(), tmp_path / "tree"
    jaxq.save(path, tree)
    loaded = jaxq.load(path, mesh=mesh)
    assert loaded.pop("step") == tree.pop("step")
    # jax has no such numbers, so no device can have them.
    wide = loaded.pop("wide")
    assert isinstance(wide, np.ndarray)
    np.testing.assert_array_equal(wide, tree.pop("wide"))
    assert_same(loaded, sharding.place(tree, mesh))


def test_one_weight_takes_one_spec(tmp_path):
    qt, mesh, path = tree_of()["up"]["kernel"], devices(), tmp_path / "w"
    jaxq.save(path, qt)
    loaded = jaxq.load(path, mesh=mesh, rules=P(None, "t"))
    assert_same(loaded, sharding.place(qt, mesh, P(None, "t")))


class Mlp(nnx.Module):
    """`up` has metadata, and `down` has none."""

    def __init__(self, seed=0):
        rngs, init = nnx.Rngs(seed), nnx.initializers.lecun_normal()
        columns = nnx.with_partitioning(init, (None, "t"))
        self.up = nnx.Linear(64, 256, kernel_init=columns, rngs=rngs)
        self.down = nnx.Linear(256, 32, rngs=rngs)


def test_a_model_is_loaded_by_rules_or_by_its_metadata(tmp_path):
    mesh, path = devices(), tmp_path / "model"
    with jax.set_mesh(mesh):
        model, into = Mlp(), nnx.eval_shape(lambda: Mlp(1))
    qmodel, _ = jaxq.quantize_model(model, "int8")
    jaxq.save(path, qmodel)
    rules = {"up/kernel": P("t"), "**": P()}
    loaded = jaxq.load(path, into=into, mesh=mesh, rules=rules)
    assert_same(nnx.state(loaded), nnx.state(sharding.place(qmodel, mesh, rules)))
    loaded = jaxq.load(path, into=into, mesh=mesh)
    assert loaded.up.kernel[...].data.sharding == NamedSharding(mesh, P("t", None))
    assert loaded.down.kernel[...].data.sharding.is_fully_replicated
    # Arrays without metadata are sharded as those of the target.
    rows = NamedSharding(mesh, P("d"))
    kernel = jax.device_put(model.down.kernel[...], rows)
    model.down.kernel.set_value(kernel)
    loaded = jaxq.load(path, into=model, mesh=mesh)
    assert loaded.down.kernel[...].data.sharding == NamedSharding(mesh, P(None, "d"))


def test_errors_are_those_of_place(tmp_path):
    path, mesh = tmp_path / "tree", devices()
    jaxq.save(path, tree_of("ternary"))
    with pytest.raises(ValueError, match=r"load: the shards.*\n  down/kernel \(tern"):
        jaxq.load(path, mesh=mesh, rules={"down/kernel": P("t"), "**": P()})
    with pytest.raises(ValueError, match=r"load: the rules \['left'\] match no array"):
        jaxq.load(path, mesh=mesh, rules={"left": P(), "**": P()})
    with pytest.raises(TypeError, match=r"load: rules= needs mesh="):
        jaxq.load(path, rules=RULES)
    with pytest.raises(TypeError, match=r"mesh of devices|Mesh of devices"):
        jaxq.load(path, mesh=AbstractMesh((2,), ("t",)), rules=RULES)
    with pytest.raises(ValueError, match="up/kernel"):
        jaxq.load(path, into={"w": jnp.ones(3)}, mesh=mesh)


class Reads:
    """Counts what is read of the tensors of files."""

    def __init__(self, monkeypatch):
        self.num_bytes, self.largest_part = 0, 0
        read_into, read_parts = files.TensorFile._read_into, files.TensorFile.read_parts

        def counted_bytes(file, data, position):
            # The header is read before the file has checksums.
            if hasattr(file, "_checksums"):
                self.num_bytes += data.size
            read_into(file, data, position)

        def counted_parts(file, name, indices):
            for place, part in read_parts(file, name, indices):
                self.largest_part = max(self.largest_part, part.nbytes)
                yield place, part

        monkeypatch.setattr(files.TensorFile, "_read_into", counted_bytes)
        monkeypatch.setattr(files.TensorFile, "read_parts", counted_parts)


def test_each_part_is_read_once_and_none_is_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(_checksums, "CHUNK", 1 << 10)
    path, mesh = tmp_path / "w", devices(4)
    qt = jaxq.quantize(normal(256, 256), "int8")
    jaxq.save(path, qt)
    reads = Reads(monkeypatch)
    monkeypatch.setattr(files.TensorFile, "read", None)
    for rules, part, num_bytes in (
        # Whole rows of codes, and parts of rows that share each chunk.
        (P(None, "d"), 1 << 14, (1 << 16) + qt.scale.nbytes),
        (P("d", None), 1 << 14, (1 << 16) + qt.scale.nbytes),
        # The devices have the same part.
        (P(), 1 << 16, (1 << 16) + qt.scale.nbytes),
    ):
        reads.num_bytes = reads.largest_part = 0
        jaxq.load(path, mesh=mesh, rules=rules)
        assert reads.largest_part == part
        assert reads.num_bytes == num_bytes


def test_chunks_of_other_devices_are_not_read(tmp_path, monkeypatch):
    """Three of four devices belong to other processes."""
    monkeypatch.setattr(_checksums, "CHUNK", 1 << 10)
    path, mesh = tmp_path / "w", devices(4)
    jaxq.save(path, {"w": normal(64, 64)})  # four rows are a chunk
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the part of the last device
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"bytes 15360 to 16383 of w do not have"):
        jaxq.load(path, mesh=mesh, rules={"w": P("d")})
    reads = Reads(monkeypatch)
    first = mesh.devices[0]
    monkeypatch.setattr(
        NamedSharding,
        "addressable_devices_indices_map",
        lambda at, shape: {first: at.devices_indices_map(shape)[first]},
    )
    made = []
    monkeypatch.setattr(
        jax,
        "make_array_from_single_device_arrays",
        lambda shape, at, arrays, dtype: made.extend(arrays) or arrays[0],
    )
    jaxq.load(path, mesh=mesh, rules={"w": P("d")})
    assert reads.num_bytes == 1 << 12
    np.testing.assert_array_equal(made[0], normal(64, 64)[:16])
    assert len(made) == 1


def test_damage_in_a_part_is_found(tmp_path):
    path, mesh = tmp_path / "w", devices(4)
    jaxq.save(path, {"w": jaxq.quantize(normal(64, 64), "ternary")})
    content = bytearray(path.read_bytes())
    content[-1] = 0b10101010  # no code of the format
    path.write_bytes(bytes(content))
    rules = {"w": P(None, "d")}
    with pytest.raises(ValueError, match=r"data has codes that ternary does not have"):
        jaxq.load(path, mesh=mesh, rules=rules, verify=False)
