"""Several processes of `jax.distributed`: results, files, and a process that dies.

Each group of processes runs once, and the tests look at what it left. The numbers are
compared with those of this process on one device.
"""

import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxq
from tests.arrays import assert_same
from tests.sharding import worker
from tests.sharding.launch import run_group

ocp = pytest.importorskip("orbax.checkpoint")
TWO, FOUR = {"num": 2, "devices": 2}, {"num": 4, "devices": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder):
    """Two processes with all checks."""
    return finished(run_group("work", folder / "two", **TWO))


@pytest.fixture(scope="module")
def four(folder, two):
    """Four processes that begin with the checkpoint of two."""
    source = str(folder / "two")
    task = "restore_and_work"
    return finished(run_group(task, folder / "four", source=source, **FOUR))


@pytest.fixture(scope="module")
def killed_in_a_step(folder, four):
    """Two processes that begin with the checkpoint of four. One of them is killed."""
    source = str(folder / "four")
    task = "restore_and_lose_a_process"
    return run_group(task, folder / "killed", source=source, **TWO)


@pytest.fixture(scope="module")
def files(folder):
    """Two processes with explicit axes, damaged files, and errors of one process."""
    return finished(run_group("work_with_files", folder / "files", **TWO))


def finished(group):
    assert not any(group.codes), group.shown()
    return group


@pytest.fixture(params=["two", "four"])
def group(request):
    return request.getfixturevalue(request.param)


def arrays_of(group, name):
    """The arrays that a group kept under a name, by path."""
    arrays = {}
    with np.load(group.folder / "arrays.npz") as file:
        for key in file.files:
            kept_as, path, dtype = key.split("|")
            if kept_as == name:
                arrays[path] = file[key].view(jnp.dtype(dtype))
    assert arrays, name
    return arrays


def by_path(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def assert_kept(group, name, expected):
    """The group kept the arrays of the tree, bit for bit."""
    assert_same(arrays_of(group, name), by_path(expected))


def difference(group, name, expected):
    """The largest difference of an array to that of the tree, relative to its size."""
    kept, expected = arrays_of(group, name), by_path(expected)
    assert kept.keys() == expected.keys()
    return max(
        np.linalg.norm(kept[path] - x) / np.linalg.norm(x)
        for path, x in expected.items()
    )


@functools.cache
def one_device():
    """The model in int4 on one device, and its output."""
    qmodel, _ = jaxq.quantize_model(worker.Net(nnx.Rngs(0)), worker.INT4)
    return qmodel, nnx.jit(worker.Net.__call__)(qmodel, worker.batches()[0])


@functools.cache
def calibrated_on_one_device():
    """The second moments of inputs, the static layer, its output and its report."""
    layer = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    observer = jaxq.observers.absmax()
    stats = jaxq.nn.calibrate(layer, worker.batches(), observer=observer)
    qlayer, report = jaxq.quantize_model(layer, worker.STATIC, calibration=stats)
    y = nnx.jit(nnx.Linear.__call__)(qlayer, worker.batches()[0])
    return stats[""].hessian, qlayer, y, report


def test_arrays_are_quantized_as_on_one_device(two, four):
    for preset in worker.PRESETS:
        qt = jaxq.quantize(worker.tree()["w"], preset)
        assert_kept(two, preset, qt)
        assert all(result[f"{preset} is sharded"] for result in two.results)
        if preset == "int4":
            assert_kept(four, preset, qt)


def test_trees_are_quantized_as_on_one_device(two):
    qtree, report = jaxq.quantize_params(worker.tree(), worker.TREE_RECIPE)
    assert_kept(two, "tree", qtree)
    assert {result["tree report"] for result in two.results} == {str(report)}


def test_models_are_quantized_and_run_as_on_one_device(two):
    qmodel, y = one_device()
    assert_kept(two, "model", nnx.state(qmodel))
    # The sum over processes has another order.
    assert difference(two, "output", y) < 1e-5


def test_every_process_names_the_number_that_is_not_finite(group):
    errors = {result["nan"] for result in group.results}
    assert len(errors) == 1
    assert "w[200, 3] is nan, one of 1 non-finite numbers" in errors.pop()
    for result in group.results:
        assert "infinities were observed in 1 of 8 channels" in result["infinite"]


def test_second_moments_are_those_of_one_device(group):
    assert difference(group, "moments", calibrated_on_one_device()[0]) < 1e-5


def test_static_ranges_and_integer_products_are_those_of_one_device(two):
    _, qlayer, y, report = calibrated_on_one_device()
    assert_kept(two, "static", nnx.state(qlayer))
    assert_kept(two, "static output", y)
    expected = pytest.approx(report.quantized[0].output_sqnr, abs=0.05)
    assert all(result["sqnr"] == expected for result in two.results)


@pytest.mark.heavy
def test_gptq_has_the_layer_errors_of_one_device(folder):
    group = finished(run_group("calibrate_gptq", folder / "gptq", **TWO))
    _, report = jaxq.quantize_model(
        worker.Net(nnx.Rngs(0)), "int4_gptq", calibration=worker.batches()
    )
    for result in group.results:
        for (sqnr, loss), row in zip(result["rows"], report.quantized, strict=True):
            assert sqnr == pytest.approx(row.output_sqnr, abs=0.05)  # 1 % of the error
            assert loss == pytest.approx(row.loss, rel=0.01)


def test_save_writes_one_file_of_all_parts(group):
    assert all(result["exists after save"] for result in group.results)
    qmodel = one_device()[0]
    loaded = jaxq.load(group.folder / "model.safetensors", into=worker.Net(nnx.Rngs(1)))
    assert_same(by_path(nnx.state(loaded)), by_path(nnx.state(qmodel)))
    jaxq.save(group.folder / "one.safetensors", qmodel)
    bytes_of = lambda name: (group.folder / name).read_bytes()  # noqa: E731
    assert bytes_of("model.safetensors") == bytes_of("one.safetensors")


def test_load_places_a_file_on_all_processes(group):
    expected = nnx.state(one_device()[0])
    assert_kept(group, "loaded", expected)
    assert_kept(group, "placed", expected)
    assert all(result["loaded is sharded"] for result in group.results)


def test_every_process_raises_if_the_writer_cannot_write(group):
    first, *others = [result["no folder"] for result in group.results]
    assert first.startswith("FileNotFoundError: save: ")
    for error in others:
        assert error.startswith("OSError: save: ")
        assert "cannot be written in process 0: FileNotFoundError" in error


def test_explicit_axes_and_a_current_mesh_change_nothing(files):
    qtree, _ = jaxq.quantize_params(worker.tree(), worker.TREE_RECIPE)
    qmodel, y = one_device()
    assert_kept(files, "explicit tree", qtree)
    for name in ("model", "loaded", "filled"):
        assert_kept(files, f"explicit {name}", nnx.state(qmodel))
    for name in ("output", "loaded output"):
        assert difference(files, f"explicit {name}", y) < 1e-5
    moments = calibrated_on_one_device()[0]
    assert difference(files, "explicit moments", moments) < 1e-5


def test_load_on_a_mesh_reads_the_parts_of_a_process(files):
    w = worker.numbers(256, 128)
    assert_kept(files, "loaded on a mesh", {"w": w})
    for result in files.results:
        assert result["part"] == [128, 128]
        assert result["bytes read"] == w.nbytes // 2


def test_a_decoder_is_read_by_all_processes(files):
    model, _ = jaxq.models.load(worker.TINY_LLAMA)
    assert difference(files, "logits", model(worker.TOKENS)) < 1e-4
    rows, columns = model.layers[0].mlp.down_proj.kernel.shape
    for result in files.results:
        assert result["kernel part"] == [rows // 2, columns // 2]


def test_every_process_raises_if_one_cannot_read_its_part(files):
    first, second = files.results
    path = str(files.folder / "damaged")
    damage = f"{path} is damaged: bytes 130048 to 131071 of w do not have their"
    assert second["damaged"].startswith(f"RefusedFile: load: {damage}")
    start = f"ValueError: load: {path} cannot be read in process 1: RefusedFile: load: "
    assert first["damaged"].startswith(start + damage)
    assert second["missing"].startswith("FileNotFoundError: load: there is no file")
    assert first["missing"].startswith("OSError: load: ")
    assert "cannot be read in process 1: FileNotFoundError" in first["missing"]
    for result in files.results:
        assert "not the same file in all processes" in result["different files"]
        assert result["good"] == ""


def test_every_process_raises_if_one_has_an_error_in_save(files):
    first, second = files.results
    assert "save: the file cannot be written: File too large" in first["full disk"]
    in_first = "kept cannot be written in process 0: "
    assert second["full disk"].startswith("OSError: save: ")
    assert in_first + first["full disk"] in second["full disk"]
    for name in ("no memory in process 0", "no memory for an array"):
        assert first[name] == "MemoryError: no memory"
        assert f"{in_first}MemoryError: no memory" in second[name]
    assert second["no memory in process 1"] == "MemoryError: no memory"
    assert "in process 1: MemoryError" in first["no memory in process 1"]
    # The file before these errors is there, and no part of another one.
    assert first["files"] == ["kept"]
    saved = jaxq.load(files.folder / "kept")
    assert_same(saved, {"w": worker.numbers(256, 128)})


def test_save_puts_no_whole_array_on_a_device(files):
    w = worker.numbers(256, 128)
    qt = jaxq.quantize(w, "int8")
    expected = {"w": w, "qt": qt, "b": w > 0}
    assert_same(jaxq.load(files.folder / "counted"), expected)
    for result in files.results:
        assert 0 < result["most bytes"] <= w.nbytes // 2
        assert result["new arrays"] == 0


def test_place_refuses_different_numbers(group):
    for result in group.results:
        assert "The processes hold different numbers" in result["different"]


def assert_restored(group):
    qtree, _ = jaxq.quantize_params(worker.tree(), worker.TREE_RECIPE)
    qmodel, y = one_device()
    assert_kept(group, "restored tree", qtree)
    assert_kept(group, "restored model", nnx.state(qmodel))
    assert difference(group, "restored output", y) < 1e-5
    assert all(result["restored is sharded"] for result in group.results)


def test_four_processes_restore_the_checkpoint_of_two(four):
    assert_restored(four)


def test_two_processes_restore_the_checkpoint_of_four(killed_in_a_step):
    assert_restored(killed_in_a_step)


def test_one_process_restores_the_checkpoint_of_four(four):
    qtree, _ = jaxq.quantize_params(worker.tree(), worker.TREE_RECIPE)
    shapes = worker.template(
        worker.abstract_tree(), worker.mesh_of_all(), worker.TREE_RULES
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(four.folder / "tree", shapes)
    assert_same(restored, qtree)


def test_the_others_end_if_a_process_is_killed_in_a_step(killed_in_a_step):
    assert_ended(killed_in_a_step, killed=1)
    assert "Error" in killed_in_a_step.logs[0]


def assert_ended(group, *, killed):
    """One process was killed. The others ended with an error, and soon."""
    for number, (code, seconds) in enumerate(
        zip(group.codes, group.seconds, strict=True)
    ):
        assert "READY" in group.logs[number], group.shown()
        if number == killed:
            assert code == -signal.SIGKILL, group.shown()
        else:
            assert code != 0, group.shown()
            # The limit of a group kills a process after a minute.
            assert seconds < 50, group.shown()


def test_a_killed_writer_leaves_the_old_file(folder):
    group = run_group("lose_the_writer", folder / "writer", **TWO)
    assert_ended(group, killed=0)
    path, qt = group.folder / "w.safetensors", jaxq.quantize(worker.tree()["w"], "int8")
    assert len(list(group.folder.glob(".w.safetensors*.partial"))) == 1
    assert_same(jaxq.load(path)["w"], qt)
    jaxq.save(path, {"w": qt})
    assert not list(group.folder.glob(".w.safetensors*"))


def test_a_process_killed_in_a_checkpoint_leaves_the_previous_one(folder):
    # No collective operation fails here: the missing heartbeats show the death.
    task, heartbeat = "lose_a_process_in_a_checkpoint", 15
    group = run_group(task, folder / "checkpoint", heartbeat=heartbeat, **TWO)
    assert_ended(group, killed=1)
    assert "SAVED" not in group.logs[0]
    manager = ocp.CheckpointManager(group.folder / "steps")
    assert manager.latest_step() == 1
    qt = jaxq.quantize(worker.tree()["w"], "int8")
    shapes = worker.template({"w": qt}, worker.mesh_of_all(), {"w": P("d", "t")})
    restored = manager.restore(1, args=ocp.args.StandardRestore(shapes))
    assert_same(restored["w"], qt)
