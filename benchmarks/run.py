"""Runs benchmarks, and prints tables. `--write` writes them to benchmarks/results.

    python benchmarks/run.py                      # lists the subjects
    python benchmarks/run.py quantize matmul      # runs some subjects
    python benchmarks/run.py all --write          # all but kernels, and keeps figures
    python benchmarks/run.py methods --keep       # only rows that the last results lack
    python benchmarks/run.py all --durations      # keeps only how long each one took
    python benchmarks/run.py kernels              # on an accelerator

Each subject runs in a process of its own, and its cases run in turns (see timing.py).
Times depend on the machine, so compare ratios. Run on a machine that does nothing else.
Programs are compiled with JAX's default settings, as those of users are.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
EXAMPLES = Path(__file__).parents[1] / "examples"
# How long each subject took when it was last recorded, for the list of subjects.
DURATIONS = "durations.json"
SUBJECTS = (
    "cast",
    "gptq",
    "import_time",
    "kernels",
    "kmeans",
    "kv_cache",
    "kv_steps",
    "low_precision",
    "matmul",
    "memory",
    "methods",
    "observers",
    "optimizers",
    "qlora",
    "quantize",
    "recipes",
    "static_ranges",
    "stream",
    "training",
)
# Environment variables of single subjects. They are settings of glibc's malloc.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}
ENVIRONMENT: dict[str, dict[str, str]] = {
    # Otherwise new pages take most of the time to write 64 MB, in jaxq and in other
    # libraries.
    "cast": KEEP_FREED_MEMORY,
    # The process returns freed memory immediately, so that resident memory is memory in
    # use.
    "memory": {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"},
    # Otherwise new pages take a part of every training step.
    "training": KEEP_FREED_MEMORY,
}
PACKAGES = ("bitsandbytes", "gguf", "jax", "jaxlib", "numpy", "scikit-learn", "torch")
# Extensions of a CPU for narrow types, which the figures depend on.
CPU_FLAGS = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}


def device() -> dict[str, Any]:
    """What the figures depend on: the processor, its extensions, and versions."""
    import jax

    first_device = jax.devices()[0]
    description: dict[str, Any] = {
        "platform": first_device.platform,
        "kind": first_device.device_kind,
        "python": platform.python_version(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if first_device.platform == "cpu" and cpuinfo.exists():
        description |= _cpu(cpuinfo.read_text())
    modules = {name: {"scikit-learn": "sklearn"}.get(name, name) for name in PACKAGES}
    description["versions"] = {
        name: importlib.metadata.version(name)
        for name in PACKAGES
        if importlib.util.find_spec(modules[name])
    }
    return description


def _cpu(cpuinfo: str) -> dict[str, Any]:
    """The kind, the number of cores and the extensions that /proc/cpuinfo names."""
    kind = re.search(r"model name\s*: (.*)", cpuinfo)
    flags = re.search(r"flags\s*: (.*)", cpuinfo)
    assert kind, "/proc/cpuinfo has no model name"
    assert flags, "/proc/cpuinfo has no flags"
    return {
        "kind": kind[1],
        "cores": cpuinfo.count("processor\t"),
        "flags": sorted(CPU_FLAGS & set(flags[1].split())),
    }


def run_subject(name: str, keep: bool, write: bool, durations: bool = False) -> None:
    """Runs one subject in this process, and prints its table.

    Args:
        name: of the subject.
        keep: whether to keep the rows of the last results.
        write: whether to replace the figures and the table in `RESULTS`.
        durations: whether to record how long the subject took. `write` does so too.
    """
    start = time.perf_counter()
    sys.path.append(str(EXAMPLES))  # some subjects import library_text
    subject = importlib.import_module(name)
    description = device()
    place = "cpu"
    if description["platform"] != "cpu":
        place = re.sub(r"\W+", "-", description["kind"].lower())
    figures = RESULTS / f"{name}-{place}.json"
    if keep and figures.exists():
        result = subject.run(json.loads(figures.read_text()))
    else:
        result = subject.run()
    result["device"] = description
    if not keep and (write or durations):
        _record_duration(name, time.perf_counter() - start)
    text = _page(subject, result)
    if write:
        figures.write_text(json.dumps(result, indent=1) + "\n")
        figures.with_suffix(".md").write_text(text)
    print(text)


def listing() -> str:
    """The subjects, what they measure, and how long they took."""
    durations = _durations()
    lines = []
    for name in SUBJECTS:
        module = ast.parse((Path(__file__).parent / f"{name}.py").read_text())
        summary = (ast.get_docstring(module) or "").partition("\n")[0]
        if name in durations:
            duration = f"{durations[name] / 60:.1f} min"
        else:
            duration = _duration_of_rows(name)
        lines.append(f"  {name:14} {duration:>12}  {summary}")
    return "\n".join(lines)


def _durations() -> dict[str, int]:
    """The seconds that the last recorded run of each subject took."""
    path = RESULTS / DURATIONS
    return json.loads(path.read_text()) if path.exists() else {}


def _duration_of_rows(name: str) -> str:
    """The least time of a subject, from the seconds that its results have by row."""
    path = RESULTS / f"{name}-cpu.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    rows = result.get("rows", [])
    if not all("seconds" in row for row in rows):
        return "not recorded"
    # A row of several seeds has the mean of their seconds, and each seed's perplexity.
    seconds = [row["seconds"] * len(row.get("perplexities", [0])) for row in rows]
    return f"over {sum(seconds) / 60:.0f} min" if seconds else "not recorded"


def _record_duration(name: str, seconds: float) -> None:
    """Records how long a subject took on this machine, in whole seconds."""
    durations = _durations() | {name: round(seconds)}
    text = json.dumps(durations, indent=1, sort_keys=True)
    (RESULTS / DURATIONS).write_text(text + "\n")


def _page(subject: Any, result: dict[str, Any]) -> str:
    """The docstring of a subject, the device and the table, as markdown."""
    description = result["device"]
    flags = ", ".join(description.get("flags", []))
    versions = ", ".join(
        f"{name} {version}" for name, version in description["versions"].items()
    )
    text = (
        f"{subject.__doc__.strip()}\n\n{description['kind']}, {flags}; {versions}.\n\n"
        f"{subject.table(result)}\n"
    )
    if result["missing"]:
        missing = "; ".join(result["missing"])
        text += f"\nNot installed, so not compared: {missing}.\n"
    # A remark is written into the figures by hand. The next measurement drops it.
    if "remark" in result:
        text += f"\n{result['remark']}\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "subjects",
        nargs="*",
        choices=[*SUBJECTS, "all", []],
        help="all: all but kernels; default: list the subjects and run nothing",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="replace the figures and tables in benchmarks/results",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="measure only what the last results lack (methods)",
    )
    parser.add_argument(
        "--durations",
        action="store_true",
        help="record how long each subject took, and no figures",
    )
    # In the process of one subject.
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    subjects = [args.one] if args.one else args.subjects
    if args.keep and subjects != ["methods"]:
        parser.error("--keep works with the subject methods alone.")
    if args.one:
        run_subject(args.one, args.keep, args.write, args.durations)
        return
    if not subjects:
        print(
            "Subjects, and about how long each takes on two busy CPU cores:\n"
            + listing()
        )
        return
    if "all" in subjects:
        subjects = [name for name in SUBJECTS if name != "kernels"]
    RESULTS.mkdir(exist_ok=True)
    for name in subjects:
        print(f"== {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--one", name]
        if args.keep:
            command.append("--keep")
        if args.write:
            command.append("--write")
        if args.durations:
            command.append("--durations")
        environment = os.environ | ENVIRONMENT.get(name, {})
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
