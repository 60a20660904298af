"""One process of a group: what each task does, and the arrays that it is done with.

    python -m tests.sharding.worker TASK INDEX FACTS

`launch.run_group` starts it. Process 0 writes the gathered arrays of the task to one
file. Every process writes its other results, as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from tests.sharding.launch import LIMIT, end_with_parent

RULES = {"up/kernel": P(None, "t"), "down/kernel": P("t", None), "**": P()}
TINY_LLAMA = Path(__file__).parents[2] / "examples" / "tiny_llama"
DECODER_RULES = {"**/*_proj/kernel": P("d", "t"), "**": P()}
TOKENS = np.arange(32, dtype=np.int32).reshape(4, 8) + 1
TREE_RULES = {"w": P("d", "t"), "experts": P("d", None, "t"), "b": P()}
TREE_RECIPE = jaxq.Recipe(
    [jaxq.Rule("experts", weight="int4", batch=(0,)), jaxq.Rule("w", weight="int4")]
)
PRESETS = ("int4", "nf4_dq")


# Shards of 32 codes are whole groups.
INT4 = jaxq.QuantSpec(format="int4", granularity=jaxq.PerGroup(size=32))
START = time.monotonic()
STATIC = jaxq.Recipe(
    [jaxq.Rule("**", weight="int8", activation="int8", observer="absmax")]
)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(64, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def batches() -> list[np.ndarray]:
    return [numbers(32, 64, seed=seed) for seed in range(2)]


def tree() -> dict[str, np.ndarray]:
    return {"w": numbers(256, 64), "experts": numbers(2, 64, 64), "b": numbers(64)}


def mesh_of_all(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("d", "t"), axis_types=(kind, kind))


def sharded(x: np.ndarray, mesh, *spec):
    """An array of all processes, of which each makes its own parts."""
    sharding = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def template(qtree, mesh, rules):
    """The shapes of a quantized model or tree and their shardings, for orbax."""
    specs = jaxq.sharding.specs(qtree, rules, mesh=mesh)
    state = nnx.state(qtree) if isinstance(qtree, nnx.Module) else qtree

    def shape(leaf, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, state, specs)


def abstract_model():
    """The model that `work` saves, of shapes. Nothing is computed."""
    return nnx.eval_shape(lambda: jaxq.quantize_model(Net(nnx.Rngs(0)), INT4)[0])


def abstract_tree():
    """The tree that `work` saves, of shapes."""
    floats = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tree().items()
    }
    return jax.eval_shape(lambda p: jaxq.quantize_params(p, TREE_RECIPE)[0], floats)


class Worker:
    """What the tasks share: the mesh, the paths, and the results so far."""

    def __init__(self, index: int, facts: dict):
        self.index, self.facts = index, facts
        self.folder = Path(facts["folder"])
        self.results: dict = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.mesh = mesh_of_all()

    def keep(self, name: str, value) -> None:
        """Keeps all arrays of a tree, whole."""
        times = (
            f"{time.monotonic() - START:.1f} s, computing {time.process_time():.1f} s"
        )
        print(f"{times}: {name}", flush=True)
        for path, leaf in jax.tree.leaves_with_path(value):
            whole = multihost_utils.process_allgather(leaf, tiled=True)
            kind = whole.dtype.name
            # numpy's files do not have the dtypes of ml_dtypes.
            raw = whole.view(f"u{whole.dtype.itemsize}")
            self.arrays[f"{name}|{jax.tree_util.keystr(path)}|{kind}"] = raw

    def write(self) -> None:
        if self.index == 0:
            np.savez(self.folder / "arrays.npz", **self.arrays)
        file = self.folder / f"result-{self.index}.json"
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(self.results))
        partial.replace(file)

    def error_of(self, call) -> str:
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def work(worker: Worker) -> None:
    """Quantizes a tree and a model without data, runs them, and saves them."""
    mesh = worker.mesh
    floats = {name: sharded(x, mesh, *TREE_RULES[name]) for name, x in tree().items()}
    for preset in PRESETS:
        qt = jaxq.quantize(floats["w"], preset)
        worker.keep(preset, qt)
        worker.results[f"{preset} is sharded"] = not qt.data.is_fully_addressable
    qtree, report = jaxq.quantize_params(floats, TREE_RECIPE)
    worker.keep("tree", qtree)
    worker.results["tree report"] = str(report)
    model = jaxq.sharding.place(Net(nnx.Rngs(0)), mesh, RULES)
    qmodel, _ = jaxq.quantize_model(model, INT4)
    worker.keep("model", nnx.state(qmodel))
    run(worker, "output", qmodel)
    refuse(worker)
    calibrate_and_run(worker)
    save(worker, qtree, qmodel)


def run(worker: Worker, name: str, model) -> None:
    x = sharded(batches()[0], worker.mesh, "d")
    worker.keep(name, nnx.jit(Net.__call__)(model, x))


def refuse(worker: Worker) -> None:
    """Errors that every process must raise, though one of them has the bad number."""
    with_nan = tree()["w"]
    with_nan[200, 3] = np.nan
    bad = sharded(with_nan, worker.mesh, "d", "t")
    worker.results["nan"] = worker.error_of(lambda: jaxq.quantize(bad, "int4"))
    different = {"w": numbers(8, seed=worker.index)}
    worker.results["different"] = worker.error_of(
        lambda: jaxq.sharding.place(different, worker.mesh, {"w": P("t")})
    )
    with_infinity = numbers(64, 8)
    with_infinity[:, 5] = np.inf
    observer = jaxq.observers.absmax(axis=-1)
    x = sharded(with_infinity, worker.mesh, "d", "t")
    state = observer.update(observer.init(x), x)
    worker.results["infinite"] = worker.error_of(
        lambda: observer.bounds(state, "int8", on_nonfinite="raise")
    )


def calibrate(worker: Worker, name: str = "moments", channels: str | None = "t"):
    """Statistics of inputs of which each process holds a part of rows and channels."""
    rules = {"kernel": P(channels, None), "**": P()}
    layer = jaxq.sharding.place(
        nnx.Linear(64, 32, rngs=nnx.Rngs(0)), worker.mesh, rules
    )
    data = [sharded(batch, worker.mesh, "d", channels) for batch in batches()]
    stats = jaxq.nn.calibrate(layer, data, observer=jaxq.observers.absmax())
    worker.keep(name, stats[""].hessian)
    return layer, stats


def calibrate_and_run(worker: Worker) -> None:
    """A layer that needs the statistics, with products of integers."""
    layer, stats = calibrate(worker)
    qlayer, report = jaxq.quantize_model(layer, STATIC, calibration=stats)
    worker.keep("static", nnx.state(qlayer))
    x = sharded(batches()[0], worker.mesh, "d", "t")
    worker.keep("static output", nnx.jit(nnx.Linear.__call__)(qlayer, x))
    worker.results["sqnr"] = report.quantized[0].output_sqnr


def calibrate_gptq(worker: Worker) -> None:
    model = jaxq.sharding.place(Net(nnx.Rngs(0)), worker.mesh, RULES)
    data = [sharded(batch, worker.mesh, "d") for batch in batches()]
    _, report = jaxq.quantize_model(model, "int4_gptq", calibration=data)
    worker.results["rows"] = [[row.output_sqnr, row.loss] for row in report.quantized]


def save(worker: Worker, qtree, qmodel) -> None:
    """jaxq's own file, and checkpoints of orbax."""
    path = worker.folder / "model.safetensors"
    jaxq.save(path, qmodel)
    worker.results["exists after save"] = path.exists()
    worker.results["no folder"] = worker.error_of(
        lambda: jaxq.save(worker.folder / "missing" / "model.safetensors", qmodel)
    )
    loaded = jaxq.load(path, into=qmodel)
    worker.keep("loaded", nnx.state(loaded))
    kernel = loaded.up.kernel[...]
    worker.results["loaded is sharded"] = not kernel.data.is_fully_addressable
    placed = jaxq.load(path, into=Net(nnx.Rngs(1)))
    placed = jaxq.sharding.place(placed, worker.mesh, RULES)
    worker.keep("placed", nnx.state(placed))
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(worker.folder / "tree", qtree)
        checkpointer.save(worker.folder / "model", nnx.state(qmodel))


class Files:
    """Files of arrays that are sharded over the processes."""

    def __init__(self, worker: Worker):
        self.worker, self.folder = worker, worker.folder
        self.w = sharded(numbers(256, 128), worker.mesh, "d")
        self.rules = {"w": P("d")}

    def saved(self, name: str, w=None) -> Path:
        path = self.folder / name
        jaxq.save(path, {"w": self.w if w is None else w})
        return path

    def error_of_load(self, name: str, path: Path) -> None:
        mesh, rules = self.worker.mesh, self.rules
        self.worker.results[name] = self.worker.error_of(
            lambda: jaxq.load(path, mesh=mesh, rules=rules)
        )

    def error_of_save(self, name: str) -> None:
        self.worker.results[name] = self.worker.error_of(lambda: self.saved("kept"))


def work_with_files(worker: Worker) -> None:
    from jaxq.files import _checksums

    _checksums.CHUNK = 1 << 10
    work_with_explicit_axes(worker)
    files = Files(worker)
    load_on_mesh(files)
    load_a_decoder(worker)
    refuse_damage(files)
    refuse_to_save(files)
    count_bytes_on_devices(files)


def work_with_explicit_axes(worker: Worker) -> None:
    """What `work` does, on a mesh with explicit axes that is the current mesh."""
    worker.mesh = mesh = mesh_of_all(AxisType.Explicit)
    with jax.set_mesh(mesh):
        floats = {
            name: sharded(x, mesh, *TREE_RULES[name]) for name, x in tree().items()
        }
        qtree, _ = jaxq.quantize_params(floats, TREE_RECIPE)
        worker.keep("explicit tree", qtree)
        model = jaxq.sharding.place(Net(nnx.Rngs(0)), mesh, RULES)
        qmodel, _ = jaxq.quantize_model(model, INT4)
        worker.keep("explicit model", nnx.state(qmodel))
        run(worker, "explicit output", qmodel)
        # jax does not sum a float product over explicit axes.
        calibrate(worker, "explicit moments", channels=None)
        path = worker.folder / "explicit"
        jaxq.save(path, qmodel)
        into = Net(nnx.Rngs(1))
        loaded = jaxq.load(path, into=into, mesh=mesh, rules=RULES)
        worker.keep("explicit loaded", nnx.state(loaded))
        run(worker, "explicit loaded output", loaded)
        worker.keep("explicit filled", nnx.state(jaxq.load(path, into=qmodel)))
    worker.mesh = mesh_of_all()


def load_on_mesh(files: Files) -> None:
    """Each process reads its own half."""
    from jaxq.files import TensorFile

    path, worker = files.saved("tree"), files.worker
    num_bytes, read_into = [], TensorFile._read_into

    def counted(file, data, position):
        num_bytes.append(data.size)
        read_into(file, data, position)

    TensorFile._read_into = counted
    with open(path, "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    loaded = jaxq.load(path, mesh=worker.mesh, rules=files.rules)
    TensorFile._read_into = read_into
    worker.results["bytes read"] = sum(num_bytes) - header
    worker.keep("loaded on a mesh", loaded)
    worker.results["part"] = list(loaded["w"].addressable_shards[0].data.shape)


def load_a_decoder(worker: Worker) -> None:
    """A Hugging Face directory, of which each process reads its parts."""
    model, _ = jaxq.models.load(TINY_LLAMA, mesh=worker.mesh, rules=DECODER_RULES)
    kernel = model.layers[0].mlp.down_proj.kernel[...]
    worker.results["kernel part"] = list(kernel.addressable_shards[0].data.shape)
    tokens = sharded(TOKENS, worker.mesh, "d")
    worker.keep("logits", nnx.jit(lambda model, tokens: model(tokens))(model, tokens))


def refuse_damage(files: Files) -> None:
    """Files that only one process cannot read, and different files."""
    path, index = files.saved("damaged"), files.worker.index
    multihost_utils.sync_global_devices("saved")
    if index == 0:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # in the half of the last process
        path.write_bytes(bytes(content))
    multihost_utils.sync_global_devices("damaged")
    files.error_of_load("damaged", path)
    other = files.saved("other", -files.w)
    good = files.folder / "tree"
    files.error_of_load("missing", good if index == 0 else files.folder / "missing")
    files.error_of_load("different files", good if index == 0 else other)
    files.error_of_load("good", good)


def refuse_to_save(files: Files) -> None:
    """Errors of one process at different places of `save`."""
    from jaxq.processes import _host_copies
    from jaxq.serialization import _entries

    index = files.worker.index
    files.saved("kept")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if index == 0:  # as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (files.w.nbytes // 2, limits[1]))
    files.error_of_save("full disk")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def without_memory(*_):
        raise MemoryError("no memory")

    for process in range(2):
        describe = _entries.EntryWriter._describe_array
        if index == process:
            _entries.EntryWriter._describe_array = without_memory
        files.error_of_save(f"no memory in process {process}")
        _entries.EntryWriter._describe_array = describe
    whole = _host_copies._whole
    if index == 0:
        _host_copies._whole = without_memory
    files.error_of_save("no memory for an array")
    _host_copies._whole = whole
    files.worker.results["files"] = sorted(p.name for p in files.folder.glob("*kept*"))


def count_bytes_on_devices(files: Files) -> None:
    """The most bytes of an array that jax puts on a device in a save."""
    most = 0
    makers = ("device_put", "make_array_from_callback")
    makers = (*makers, "make_array_from_single_device_arrays", "shard_map")
    originals = {name: getattr(jax, name) for name in makers}

    def counted(make):
        def made(*args, **options):
            nonlocal most
            value = make(*args, **options)
            if callable(value):  # a function to which shard_map was applied
                return counted(value)
            for shard in value.addressable_shards:
                most = max(most, shard.data.size * value.dtype.itemsize)
            return value

        return made

    gc.collect()
    num_before = len(jax.live_arrays())
    for name, make in originals.items():
        setattr(jax, name, counted(make))
    qt = jaxq.quantize(files.w, "int8")
    most = 0
    jaxq.save(files.folder / "counted", {"w": files.w, "qt": qt, "b": files.w > 0})
    for name, make in originals.items():
        setattr(jax, name, make)
    del qt
    gc.collect()
    files.worker.results["most bytes"] = most
    files.worker.results["new arrays"] = len(jax.live_arrays()) - num_before


def restore(worker: Worker) -> tuple:
    """Restores what another number of processes saved, and runs it."""
    import orbax.checkpoint as ocp

    mesh, source = worker.mesh, Path(worker.facts["source"])
    shapes, qmodel = abstract_tree(), abstract_model()
    with ocp.StandardCheckpointer() as checkpointer:
        qtree = checkpointer.restore(
            source / "tree", template(shapes, mesh, TREE_RULES)
        )
        state = checkpointer.restore(source / "model", template(qmodel, mesh, RULES))
    qmodel = nnx.merge(nnx.graphdef(qmodel), state)
    worker.keep("restored tree", qtree)
    worker.keep("restored model", nnx.state(qmodel))
    worker.results["restored is sharded"] = not qtree["w"].data.is_fully_addressable
    run(worker, "restored output", qmodel)
    return qtree, qmodel


def restore_and_work(worker: Worker) -> None:
    qtree, qmodel = restore(worker)
    again = jaxq.quantize(sharded(tree()["w"], worker.mesh, "d", "t"), "int4")
    worker.keep("int4", again)
    refuse(worker)
    calibrate(worker)
    save(worker, qtree, qmodel)


def restore_and_lose_a_process(worker: Worker) -> None:
    """Restores a checkpoint. The last process is killed between two steps."""
    restore(worker)
    worker.write()
    qt = jaxq.quantize(sharded(tree()["w"], worker.mesh, "d", "t"), "int4")
    x = sharded(numbers(8, 256), worker.mesh, None, "d")
    step = jax.jit(lambda x, qt: (x @ qt).sum())
    step(x, qt).block_until_ready()
    print("READY", flush=True)
    if worker.index > 0:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for _ in range(10_000):
        step(x, qt).block_until_ready()
        time.sleep(0.01)


def lose_the_writer(worker: Worker) -> None:
    """The process that writes a file of jaxq is killed before the file is in place."""
    import jaxq.files

    qt = jaxq.quantize(sharded(tree()["w"], worker.mesh, "d", "t"), "int8")
    path = worker.folder / "w.safetensors"
    jaxq.save(path, {"w": qt})
    if worker.index == 0:
        jaxq.files.NewFile.replace = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    print("READY", flush=True)
    jaxq.save(path, {"w": jaxq.quantize(-jaxq.dequantize(qt), "int4")})


def lose_a_process_in_a_checkpoint(worker: Worker) -> None:
    """A process is killed before the second checkpoint gets its name."""
    import orbax.checkpoint as ocp

    qt = jaxq.quantize(sharded(tree()["w"], worker.mesh, "d", "t"), "int8")
    folder = worker.folder / "steps"
    manager = ocp.CheckpointManager(folder)
    manager.save(1, args=ocp.args.StandardSave({"w": qt}))
    manager.wait_until_finished()
    print("READY", flush=True)
    if worker.index == 0:
        # Process 0 names a finished checkpoint. It waits here for the death of the
        # other process.
        os.rename = os.replace = lambda *_, **__: time.sleep(LIMIT)
    manager.save(2, args=ocp.args.StandardSave({"w": qt}))
    if worker.index > 0:
        while not any(path.name.startswith("2") for path in folder.iterdir()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    manager.wait_until_finished()
    print("SAVED", flush=True)


TASKS = {
    task.__name__: task
    for task in (
        work,
        work_with_files,
        calibrate_gptq,
        restore_and_work,
        restore_and_lose_a_process,
        lose_the_writer,
        lose_a_process_in_a_checkpoint,
    )
}


def main() -> None:
    end_with_parent()
    task, index, facts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.distributed.initialize(
        facts["address"],
        facts["num"],
        index,
        initialization_timeout=120,
        # A process on a busy machine sends few heartbeats and is not dead.
        heartbeat_timeout_seconds=facts.get("heartbeat", 100),
    )
    try:
        worker = Worker(index, facts)
        TASKS[task](worker)
        worker.write()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # The exit of jax would wait for a dead process until its heartbeat times out.
        os._exit(1)


if __name__ == "__main__":
    main()
