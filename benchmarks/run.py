"""Runs benchmarks, and prints tables. `--write` writes them to benchmarks/results.

    python benchmarks/run.py                      # lists the subjects
    python benchmarks/run.py quantize matmul      # runs some subjects
    python benchmarks/run.py all --write          # all but kernels, and keeps figures
    python benchmarks/run.py methods --keep       # only rows that the last results lack
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
SUBJECTS = (
    "cast",
    "gptq",
    "import_time",
    "kernels",
    "kmeans",
    "kv_cache",
    "kv_steps",
    "matmul",
    "memory",
    "methods",
    "observers",
    "optimizers",
    "quantize",
    "recipes",
    "static_ranges",
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


def run_subject(name: str, keep: bool, write: bool) -> None:
    """Runs one subject in this process, and prints its table.

    Args:
        name: of the subject.
        keep: whether to keep the rows of the last results.
        write: whether to replace the figures and the table in `RESULTS`.
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
    if not keep:
        result["seconds"] = round(time.perf_counter() - start)
    text = _page(subject, result)
    if write:
        figures.write_text(json.dumps(result, indent=1) + "\n")
        figures.with_suffix(".md").write_text(text)
    print(text)


def listing() -> str:
    """The subjects, what they measure, and how long their last runs took."""
    lines = []
    for name in SUBJECTS:
        module = ast.parse((Path(__file__).parent / f"{name}.py").read_text())
        summary = (ast.get_docstring(module) or "").partition("\n")[0]
        lines.append(f"  {name:14} {_duration(name):>12}  {summary}")
    return "\n".join(lines)


def _duration(name: str) -> str:
    """How long the last written run of a subject took, on any device."""
    seconds = []
    for path in RESULTS.glob(f"{name}-*.json"):
        result = json.loads(path.read_text())
        if isinstance(result, dict) and "seconds" in result:
            seconds.append(result["seconds"])
    return f"{max(seconds) / 60:.1f} min" if seconds else "not recorded"


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
    # In the process of one subject.
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    subjects = [args.one] if args.one else args.subjects
    if args.keep and subjects != ["methods"]:
        parser.error("--keep works with the subject methods alone.")
    if args.one:
        run_subject(args.one, args.keep, args.write)
        return
    if not subjects:
        print("Subjects, and how long their last runs took:\n" + listing())
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
        environment = os.environ | ENVIRONMENT.get(name, {})
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
