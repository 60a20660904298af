"""Streaming quantization of a checkpoint: GB/s, peak memory, and kills.

A synthetic checkpoint of bfloat16 matrices in shards is quantized to int4 in groups of
128 by `jaxq.io.quantize_checkpoint`. Eager torch does the same shard by shard: it loads
a shard with safetensors, rounds each weight, packs it to int32 and saves the shard.
Both read and write the same disk, in turns. GB/s counts bytes of the source. The ratio
of jaxq to torch is that of the medians, and its target is 1.5. Only jaxq waits until
the disk has the bytes (fsync), and writes checksums.

The peak is the largest resident set of the process while the call runs (VmHWM), less
what was resident before, in units of the largest weight. The target is at most 4 for a
checkpoint of any size.

A process is also killed with SIGKILL at random moments after its start, and started
again each time. If it ends before it is killed, the next one begins in an empty folder.
In the end, all files must be those of a run that was not killed.

    python benchmarks/stream.py 0.2       # GB of the source; the subject takes 10

The temporary folder (TMPDIR) needs twice the size of the source. Ctrl-C or SIGTERM
stops the measurement and removes all files.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SIZE = 4096  # each weight is [SIZE, SIZE], 32 MiB
SHARD_BYTES = 10**9  # of the source
OUT_SHARD_BYTES = 10**8  # so much of the source can be lost by a kill
GROUP = 128
ROUNDS = 3
KILLS = 20
# A kill comes within this part of the time of a whole run.
KILL_WITHIN = 0.25
DEFAULT_GB = 10.0
DISK = 2.0  # bytes of the folder for each byte of the source
# The process returns freed memory immediately, so that resident memory is memory in
# use. These are settings of glibc's malloc.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
}
_MISSING = "torch and safetensors"
_BEGINS = "begins"


def run(size_gb: float = DEFAULT_GB) -> dict[str, Any]:
    """Measures jaxq and torch on one checkpoint, and kills jaxq `KILLS` times."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        _check_disk(Path(folder), size_gb)
        source, whole = Path(folder) / "source", Path(folder) / "whole"
        _show(f"writes a checkpoint of {size_gb:g} GB")
        num_bytes = _write_source(source, size_gb)
        rows, missing = _measured(source, num_bytes, Path(folder), whole)
        seconds = [row["seconds"] for row in rows if row["by"] == "jaxq"]
        limit = KILL_WITHIN * statistics.median(seconds)
        same, kills, ends = _killed(source, Path(folder) / "killed", whole, limit)
    return {
        "subject": "stream",
        "gb": num_bytes / 1e9,
        "weight_mb": 2 * SIZE * SIZE / 1e6,
        "rows": rows,
        "kills": kills,
        "ends_between_kills": ends,
        "same_files_after_kills": same,
        "missing": missing,
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    lines = ["| by | GB/s of the source | peak / largest weight |", "|---|---|---|"]
    for row in result["rows"]:
        peak = f"{row['peak_weights']:.2f}"
        lines.append(f"| {row['by']} | {row['gb_per_s']:.3f} | {peak} |")
    rates = {
        name: [row["gb_per_s"] for row in result["rows"] if row["by"] == name]
        for name in ("jaxq", "torch")
    }
    same = "the same files" if result["same_files_after_kills"] else "OTHER FILES"
    lines.append("")
    if rates["torch"]:
        ratio = statistics.median(rates["jaxq"]) / statistics.median(rates["torch"])
        lines.append(f"jaxq has {ratio:.2f} times the GB/s of torch (medians).")
    lines.append(
        f"{result['gb']:.2f} GB, weights of {result['weight_mb']:.1f} MB. "
        f"{result['kills']} kills, then {same}."
    )
    return "\n".join(lines)


def _show(text: str) -> None:
    print(f"stream: {text}", file=sys.stderr, flush=True)


def _check_disk(folder: Path, size_gb: float) -> None:
    """Exits if the folder does not have enough space."""
    free, needed = shutil.disk_usage(folder).free / 1e9, DISK * size_gb
    if free < needed:
        sys.exit(
            f"stream: {folder} has {free:.0f} GB, and {needed:.0f} GB are needed. Set "
            "TMPDIR to another folder, or run stream.py with a smaller size."
        )


def _measured(
    source: Path, num_bytes: int, folder: Path, whole: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs jaxq and torch in turns.

    Args:
      source: the checkpoint.
      num_bytes: of its weights.
      folder: for results that are removed again.
      whole: a new folder, which keeps the first result of jaxq.

    Returns:
      A row for each run, and the packages that are not installed.
    """
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for number in range(ROUNDS):
        for name in ("jaxq", "torch"):
            out = whole if name == "jaxq" and number == 0 else folder / "out"
            os.sync()  # otherwise this run waits for what the last one wrote
            row = _once(name, source, out)
            if row is None:
                missing = [_MISSING]
                continue
            rate = num_bytes / 1e9 / row["seconds"]
            rows.append({"by": name, "gb_per_s": rate, **row})
            _show(
                f"{name}, round {number + 1} of {ROUNDS}: {rate:.3f} GB/s, peak of "
                f"{row['peak_weights']:.2f} weights"
            )
            if out != whole:
                shutil.rmtree(out)
    return rows, missing


def _write_source(path: Path, size_gb: float) -> int:
    """Writes a float checkpoint, and returns the bytes of its weights."""
    from safetensors.numpy import save_file

    path.mkdir()
    numbers = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    weight = numbers.astype(ml_dtypes.bfloat16)
    num_weights = max(1, round(size_gb * 1e9 / (2 * SIZE * SIZE)))
    per_shard = max(1, SHARD_BYTES // (2 * SIZE * SIZE))
    files = {}
    for start in range(0, num_weights, per_shard):
        file = f"model-{start}.safetensors"
        tensors = {}
        for number in range(start, min(start + per_shard, num_weights)):
            name = f"model.layers.{number}.mlp.up_proj.weight"
            # New random numbers would take longer than their quantization.
            tensors[name] = np.roll(weight, number, axis=0)
            files[name] = file
        save_file(tensors, path / file)
    index = {"weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    return num_weights * 2 * SIZE * SIZE


def _once(name: str, source: Path, out: Path) -> dict[str, float] | None:
    """Seconds and peak of a run in a new process; None if a package is missing."""
    process = subprocess.run(
        [sys.executable, __file__, "--once", name, str(source), str(out)],
        stdout=subprocess.PIPE,
        env=os.environ | ENVIRONMENT,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def _measure(name: str, source: Path, out: Path) -> dict[str, float] | None:
    """As `_once`, in this process."""
    if name == "torch":
        try:
            import safetensors  # noqa: F401
            import torch  # noqa: F401
        except ImportError:
            return None
    quantize = _jaxq if name == "jaxq" else _torch
    # A run with one weight compiles the programs and loads the libraries.
    with tempfile.TemporaryDirectory() as folder:
        _write_source(Path(folder) / "one", 0)
        quantize(Path(folder) / "one", Path(folder) / "out")
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    quantize(source, out)
    seconds = time.perf_counter() - start
    peak = (_resident("VmHWM") - before) / (2 * SIZE * SIZE)
    return {"seconds": seconds, "peak_weights": peak}


def _jaxq(source: Path, out: Path) -> None:
    import jaxq

    jaxq.io.quantize_checkpoint(source, out, "int4", shard_bytes=OUT_SHARD_BYTES)


def _torch(source: Path, out: Path) -> None:
    """The same by eager torch, with a scale of absmax / 7 for each group."""
    import torch
    from safetensors.torch import load_file, save_file

    out.mkdir()
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    for file in sorted(source.glob("*.safetensors")):
        tensors = {}
        for name, weight in load_file(file).items():
            groups = weight.float().reshape(weight.shape[0], -1, GROUP)
            scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-12)
            codes = torch.clamp(torch.round(groups / scale), -8, 7).int() + 8
            words = codes.reshape(weight.shape[0], -1, 8) << shifts
            module = name.removesuffix(".weight")
            tensors[f"{module}.weight_packed"] = words.sum(-1, dtype=torch.int32)
            tensors[f"{module}.weight_scale"] = scale.squeeze(-1).bfloat16()
        save_file(tensors, out / file.name)


def _killed(
    source: Path, out: Path, whole: Path, limit: float
) -> tuple[bool, int, int]:
    """Kills a run at random moments, and starts it again.

    Args:
      source: the checkpoint.
      out: a new folder.
      whole: the result of a run that was not killed.
      limit: each kill comes at most so many seconds after the start.

    Returns:
      Whether the files are those of a whole run, the number of kills, and how often a
      run ended before it was killed.
    """
    rng, kills, ends, same = random.Random(0), 0, 0, True
    while kills < KILLS:
        with _started(source, out) as process:
            try:
                process.wait(rng.uniform(0, limit))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
                _show(f"kill {kills} of {KILLS}, {len(_weights(out))} shards so far")
                continue
            if process.returncode:
                raise RuntimeError(f"a run ended with code {process.returncode}")
        ends += 1
        same &= _are_equal(out, whole)
        shutil.rmtree(out)
    with _started(source, out) as process:
        if process.wait():
            raise RuntimeError(f"the last run ended with code {process.returncode}")
    return same and _are_equal(out, whole), kills, ends


@contextlib.contextmanager
def _started(source: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun to quantize. It is killed at the end of the block."""
    command = [sys.executable, __file__, "--stream", str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it prints `_BEGINS` after its imports
            yield process
        finally:
            process.kill()


def _weights(out: Path) -> list[Path]:
    return list(out.glob("model*.safetensors"))


def _are_equal(out: Path, whole: Path) -> bool:
    """Whether two folders have the same files with the same bytes."""
    names = sorted(os.listdir(whole))
    if names != sorted(os.listdir(out)):
        return False
    _, different, unreadable = filecmp.cmpfiles(whole, out, names, shallow=False)
    return not different and not unreadable


def _resident(field: str) -> int:
    """The resident bytes of this process: VmRSS now, or VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    if sys.argv[1] == "--once":
        name, source, out = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
        print(json.dumps(_measure(name, source, out)))
    elif sys.argv[1] == "--stream":
        import jaxq.io  # noqa: F401

        print(_BEGINS, flush=True)
        _jaxq(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(table(run(float(sys.argv[1]))))


if __name__ == "__main__":
    main()
