"""Streaming quantization of a checkpoint: GB/s, peak memory, and kills.

A synthetic checkpoint of bfloat16 matrices in shards is quantized to int4 in groups of
128 by `jaxq.io.quantize_checkpoint`. Eager torch does the same shard by shard: it loads
a shard with safetensors, rounds each weight, packs it to int32 and saves the shard.
Both read and write the same disk in turns. GB/s counts bytes of the source.

The peak is the largest resident set of the process while the call runs (VmHWM), less
what was resident before, in units of the largest weight. The target is 4, and a
constant. A process is also killed with SIGKILL at random moments, and started again
each time. Then the files must be those of a run that was not killed.

    python benchmarks/stream.py 10        # GB of the source; the subject takes 1
"""

from __future__ import annotations

import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SIZE = 4096  # each weight is [SIZE, SIZE], 32 MiB
SHARD_BYTES = 10**9
GROUP = 128
KILLS = 20
DEFAULT_GB = 1.0
_MISSING = "torch and safetensors"


def run(size_gb: float = DEFAULT_GB) -> dict[str, Any]:
    """Measures jaxq and torch on one checkpoint, and kills jaxq `KILLS` times."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        num_bytes = _write_source(source, size_gb)
        rows, missing = [], []
        for number in range(3):
            for name in ("jaxq", "torch"):
                out = Path(folder) / f"{name}{number}"
                row = _once(name, source, out)
                if row is None:
                    missing = [_MISSING]
                    continue
                rows.append(
                    {"by": name, "gb_per_s": num_bytes / 1e9 / row.pop("s"), **row}
                )
        same, kills = _killed(source, Path(folder) / "killed", Path(folder) / "jaxq0")
    return {
        "subject": "stream",
        "gb": num_bytes / 1e9,
        "weight_mb": 2 * SIZE * SIZE / 1e6,
        "rows": rows,
        "kills": kills,
        "same_files_after_kills": same,
        "missing": missing,
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    lines = ["| by | GB/s of the source | peak / largest weight |", "|---|---|---|"]
    for row in result["rows"]:
        peak = f"{row['peak_weights']:.2f}"
        lines.append(f"| {row['by']} | {row['gb_per_s']:.3f} | {peak} |")
    same = "the same files" if result["same_files_after_kills"] else "OTHER FILES"
    lines.append("")
    lines.append(
        f"{result['gb']:.2f} GB, weights of {result['weight_mb']:.1f} MB. "
        f"{result['kills']} kills, then {same}."
    )
    return "\n".join(lines)


def _write_source(path: Path, size_gb: float) -> int:
    """Writes a float checkpoint, and returns the bytes of its weights."""
    from safetensors.numpy import save_file

    path.mkdir()
    rng = np.random.default_rng(0)
    num_weights = max(1, round(size_gb * 1e9 / (2 * SIZE * SIZE)))
    per_shard = max(1, SHARD_BYTES // (2 * SIZE * SIZE))
    files = {}
    for start in range(0, num_weights, per_shard):
        file = f"model-{start}.safetensors"
        tensors = {}
        for number in range(start, min(start + per_shard, num_weights)):
            name = f"model.layers.{number}.mlp.up_proj.weight"
            weight = rng.standard_normal((SIZE, SIZE), np.float32)
            tensors[name] = weight.astype(ml_dtypes.bfloat16)
            files[name] = file
        save_file(tensors, path / file)
    index = {"weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    return num_weights * 2 * SIZE * SIZE


def _once(name: str, source: Path, out: Path) -> dict[str, float] | None:
    """Seconds and peak of one process; None if a package is missing."""
    process = subprocess.run(
        [sys.executable, __file__, "--once", name, str(source), str(out)],
        stdout=subprocess.PIPE,
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
    # The first weight compiles, and loads libraries.
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

    jaxq.io.quantize_checkpoint(source, out, "int4", shard_bytes=SHARD_BYTES)


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


def _killed(source: Path, out: Path, whole: Path) -> tuple[bool, int]:
    """Whether the files are those of a whole run, and the number of kills."""
    rng, kills = random.Random(0), 0
    command = [sys.executable, __file__, "--stream", str(source), str(out)]
    while kills < KILLS:
        process = subprocess.Popen(command)
        try:
            process.wait(rng.uniform(3, 12))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    else:
        subprocess.run(command, check=True)
    names = sorted(os.listdir(whole))
    same = names == sorted(os.listdir(out))
    return same and not filecmp.cmpfiles(whole, out, names, shallow=False)[1], kills


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS is now, VmHWM is the largest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    if sys.argv[1] == "--once":
        name, source, out = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
        print(json.dumps(_measure(name, source, out)))
    elif sys.argv[1] == "--stream":
        _jaxq(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(table(run(float(sys.argv[1]))))


if __name__ == "__main__":
    main()
