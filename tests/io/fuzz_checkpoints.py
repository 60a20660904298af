"""Damaged model directories and files: each is read, or refused by name.

    python -m tests.io.fuzz_checkpoints 100000 [seed]

reads 100000 mutants. A mutant is a small checkpoint with damage in one of its files.
There are checkpoints of every layout of other libraries, GGUF files with every type of
blocks, shards with an index, models that jaxq saved, and files of statistics. Reading a
mutant may raise only a ValueError or an OSError that names the path, and memory may not
grow. A damaged byte in a file of jaxq is an error, or changes nothing.
`checkpoint/test_fuzz.py` reads a few mutants of each kind.
"""

from __future__ import annotations

import collections
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxq
from jaxq import models, nn
from jaxq.cli import _statistics_file
from jaxq.files import NewFile, NewTensor, write_gguf
from jaxq.io import read_checkpoint
from jaxq.qtensor import is_qtensor, scale_values
from tests.io import mutations
from tests.io.checkpoint import directories
from tests.io.checkpoint.directories import ROWS
from tests.io.fuzz import leaf_bytes, small_model
from tests.io.layouts.test_gguf import BLOCKS, random_blocks

# The memory that mutants may add to that of the process, and the time for one mutant.
_MOST_BYTES = 1 << 30
_MOST_SECONDS = 20.0
# The command shows its progress each time after so many mutants.
_PART = 1000
_FLOAT_TYPES = {"F32": np.float32, "F16": np.float16}
_GGUF = "GGUF "
_OTHERS = ("shards", "float model", "quantized model", "statistics")
KINDS = [*ROWS, *(_GGUF + name for name in (*_FLOAT_TYPES, *BLOCKS)), *_OTHERS]


class Source(NamedTuple):
    """A whole checkpoint.

    Attributes:
      kind: of the checkpoint.
      files: the bytes of each file by name.
      read: reads the checkpoint at a path.
      is_checked: whether jaxq wrote it, with checksums. If the bytes of its weights are
        damaged, `read` must then raise an error, or return what it returned before.
    """

    kind: str
    files: dict[str, bytes]
    read: Callable[[Path], Any]
    is_checked: bool = False


def whole_checkpoint(kind: str, folder: Path) -> Source:
    """The whole checkpoint of a kind. `folder` is used to write it."""
    if kind in ROWS:
        return _layout_source(folder / "layout", kind)
    if kind.startswith(_GGUF):
        return _gguf_source(folder, kind.removeprefix(_GGUF))
    if kind == "shards":
        return _sharded_source()
    if kind == "statistics":
        return _statistics_source(folder)
    return _model_source(folder, kind)


def run(
    wholes: list[Source], count: int, folder: Path, seed: int = 0
) -> tuple[collections.Counter, list[str]]:
    """Reads mutants of whole checkpoints, in turns.

    Args:
      wholes: the checkpoints.
      count: how many mutants.
      folder: where they are written.
      seed: of the random choices.

    Returns:
      The number of mutants by (kind, "read", "refused" or "failed"), and a line for
      each one that failed.
    """
    rng = random.Random(seed)
    results: collections.Counter = collections.Counter()
    failures: list[str] = []
    expected = [leaf_bytes(_written(source, folder)) for source in wholes]
    for number in range(count):
        place = number % len(wholes)
        source = wholes[place]
        name = rng.choice(list(source.files))
        files = source.files | {name: _damaged(name, source, rng)}
        start = time.process_time()
        try:
            value = _written(source._replace(files=files), folder)
            outcome = "read"
            if source.is_checked and name.endswith(".safetensors"):
                assert leaf_bytes(value) == expected[place], "another model"
        except (ValueError, OSError) as error:
            outcome = "refused" if str(folder) in str(error) else repr(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the tokenizers package raises some of these
            outcome = repr(error)
        seconds = time.process_time() - start
        if seconds > _MOST_SECONDS:
            outcome = f"took {seconds:.0f} s"
        has_failed = outcome not in ("read", "refused")
        results[source.kind, "failed" if has_failed else outcome] += 1
        if has_failed:
            failures.append(f"{number} {source.kind} {name}: {outcome:.300}")
            # The files are kept, to look at them.
            _write_all(folder / f"failure_{seed}_{number}", files)
    return results, failures


def _damaged(name: str, source: Source, rng: random.Random) -> bytes:
    data = source.files[name]
    if name.endswith(".json"):
        return mutations.changed_json(data, rng)
    if name.endswith(".safetensors") and not source.is_checked:
        return mutations.changed_safetensors(data, rng)
    return mutations.changed_bytes(data, rng)


def _written(source: Source, folder: Path) -> Any:
    """Writes the files of a checkpoint, and reads it."""
    if len(source.files) == 1:
        (name,) = source.files
        path = folder / name
        path.write_bytes(source.files[name])
        return source.read(path)
    path = folder / "mutant"
    path.mkdir(exist_ok=True)
    for file in path.iterdir():
        if file.name not in source.files:
            file.unlink()
    _write_all(path, source.files)
    return source.read(path)


def _write_all(path: Path, files: dict[str, bytes]) -> None:
    """Writes files into a directory."""
    path.mkdir(exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)


def _read_all(path: Path) -> dict[str, Any]:
    """All parameters of a checkpoint. Quantized ones are traced, and then read."""
    values = {}
    with read_checkpoint(path) as checkpoint:
        for name in checkpoint:
            checkpoint.eval_shape(name)
        for name in checkpoint:
            values[name] = checkpoint[name]
            if is_qtensor(values[name]):
                scale = np.asarray(scale_values(values[name]), np.float32)
                assert np.isfinite(scale).all(), "a scale is not finite"
    return values


def _layout_source(folder: Path, row: str) -> Source:
    """A directory with one weight of a layout."""
    qt = directories.quantized(row, shape=(128, 32))
    tensors, settings = directories.tensors_of(row, "m.up", qt)
    directories.write(folder, tensors, settings)
    return Source(row, _files(folder), _read_all)


def _gguf_source(folder: Path, kind: str) -> Source:
    """A GGUF file with a weight of one type of blocks."""
    num_rows = 8
    if kind in _FLOAT_TYPES:
        array = np.ones((num_rows, 32), _FLOAT_TYPES[kind])
        shape = array.shape
    else:
        array = random_blocks(kind, num_rows)
        shape = (num_rows, 2 * BLOCKS[kind][2])
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": shape[1],
        "llama.feed_forward_length": 8,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 8,
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.huggingface.json": "{}",
    }
    tensors = {
        "token_embd.weight": NewTensor(kind, shape, lambda: array),
        "blk.0.attn_q.weight": NewTensor(kind, shape, lambda: array),
        "output_norm.weight": NewTensor("F32", (32,), lambda: np.ones(32, np.float32)),
    }
    path = folder / "source.gguf"
    with NewFile(path, "fuzz") as file:
        write_gguf(file, metadata, tensors)
    return Source(f"{_GGUF}{kind}", {"mutant.gguf": path.read_bytes()}, _read_all)


def _sharded_source() -> Source:
    """Floats in two files, with an index."""
    files, names = {}, {}
    for number in (1, 2):
        file = f"model-{number}.safetensors"
        entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
        tensors = mutations.Tensors({f"w{number}.weight": entry}, bytes(16))
        files[file] = tensors.to_file()
        names[f"w{number}.weight"] = file
    index = {"metadata": {"total_size": 32}, "weight_map": names}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files["config.json"] = b'{"model_type": "llama"}'
    return Source("shards", files, _read_all)


def _model_source(folder: Path, kind: str) -> Source:
    """A float model or a quantized one, with a tokenizer and a chat template."""
    model = small_model()
    if kind == "quantized model":
        model, _ = jaxq.quantize_model(model, "int8")
    path = folder / kind
    models.save(path, model, tokenizer=_tokenizer(), eos_token_id=1)
    template = '{"chat_template": "{{ messages[0].content }}", "bos_token": "<s>"}'
    (path / "tokenizer_config.json").write_text(template)
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return Source(kind, _files(path), _read_model, True)


def _read_model(path: Path) -> Any:
    models.load_stop_tokens(path)
    models.load_chat_template(path)
    return nnx.state(models.load(path)[0])


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def _statistics_source(folder: Path) -> Source:
    """A file of calibration statistics."""
    model = small_model()
    statistics = _statistics_file.Statistics(
        model=_statistics_file.digest(model),
        sources=("a.txt",),
        num_tokens=8,
        observer=None,
        layers=nn.calibrate(model, [jnp.arange(8)[None]]),
    )
    path = folder / "statistics.safetensors"
    _statistics_file.write(path, statistics)

    def read(path: Path) -> Any:
        return _statistics_file.read(path).layers

    return Source("statistics", {path.name: path.read_bytes()}, read, True)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _limit_memory() -> None:
    """Makes the system refuse memory that no mutant needs."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 4 * _MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak() -> int:
    """The largest memory that the process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    wholes = [whole_checkpoint(kind, folder) for kind in KINDS]
    run(wholes, 4 * len(wholes), folder, seed + 1)  # compiles most programs
    before = _peak()
    _limit_memory()
    results: collections.Counter = collections.Counter()
    failures: list[str] = []
    for done in range(0, count, _PART):
        part = min(_PART, count - done)
        new_results, new_failures = run(wholes, part, folder, seed + done)
        results += new_results
        failures += new_failures
        print(f"{done + part} mutants, {len(failures)} failures", file=sys.stderr)
    for kind in sorted({kind for kind, _ in results}):
        numbers = [results[kind, outcome] for outcome in ("read", "refused", "failed")]
        print(f"{kind:40} read {numbers[0]:6}  refused {numbers[1]:6}", end="")
        print(f"  failed {numbers[2]}")
    print("\n".join(failures[:60]))
    growth = _peak() - before
    seconds = time.monotonic() - start
    print(f"{count} mutants, {len(failures)} failures, {seconds:.0f} s, in {folder}")
    print(f"peak memory grew by {growth / 1e6:.0f} MB")
    sys.exit(bool(failures) or growth > _MOST_BYTES)


if __name__ == "__main__":
    main()
