"""Runs benchmarks and writes their figures and tables to benchmarks/results.

    python benchmarks/run.py                      # all subjects but kernels
    python benchmarks/run.py quantize matmul      # some
    python benchmarks/run.py methods --keep       # only rows of the table that the last results lack
    python benchmarks/run.py kernels              # on an accelerator

Each subject runs in a process of its own, its cases in turns (see timing.py). Absolute times are the machine's; the
ratios are what to compare. Run on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
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
    "quantize",
    "recipes",
)
# Freed memory stays with the process: else fresh pages are most of what writing 64 MB costs, ours and others'.
ENVIRONMENT: dict[str, dict[str, str]] = {
    "cast": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
    },
    # Freed memory goes back at once, so that what is resident is what is alive.
    "memory": {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"},
}
# Many programs that run once or twice: jax 0.10's older code generator compiles them in half the time.
if importlib.metadata.version("jax").startswith("0.10."):
    QUICK = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
    ENVIRONMENT |= {"methods": {"XLA_FLAGS": QUICK}, "recipes": {"XLA_FLAGS": QUICK}}
PACKAGES = ("bitsandbytes", "gguf", "jax", "jaxlib", "numpy", "scikit-learn", "torch")


def device() -> dict[str, Any]:
    """What the figures depend on: processor, its vector extensions for narrow types, versions."""
    import jax

    found = jax.devices()[0]
    about: dict[str, Any] = {
        "platform": found.platform,
        "kind": found.device_kind,
        "python": platform.python_version(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if found.platform == "cpu" and cpuinfo.exists():
        text = cpuinfo.read_text()
        about["kind"] = re.search(r"model name\s*: (.*)", text)[1]  # pyright: ignore[reportOptionalSubscript]
        about["cores"] = text.count("processor\t")
        flags = set(re.search(r"flags\s*: (.*)", text)[1].split())  # pyright: ignore[reportOptionalSubscript]
        about["flags"] = sorted(
            flags
            & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}
        )
    modules = {name: {"scikit-learn": "sklearn"}.get(name, name) for name in PACKAGES}
    about["versions"] = {
        p: importlib.metadata.version(p)
        for p in PACKAGES
        if importlib.util.find_spec(modules[p])
    }
    return about


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "subjects", nargs="*", choices=[*SUBJECTS, []], help="default: all"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="measure only what the last results lack (methods)",
    )
    parser.add_argument(
        "--one", help=argparse.SUPPRESS
    )  # in the process of one subject
    args = parser.parse_args()
    if args.keep and [args.one or s for s in args.subjects or [args.one]] != [
        "methods"
    ]:
        parser.error("--keep is for the subject methods alone")
    if args.one:
        subject = importlib.import_module(args.one)
        about = device()
        where = (
            "cpu"
            if about["platform"] == "cpu"
            else re.sub(r"\W+", "-", about["kind"].lower())
        )
        name = f"{args.one}-{where}"
        last = RESULTS / f"{name}.json"
        result = (
            subject.run(json.loads(last.read_text()))
            if args.keep and last.exists()
            else subject.run()
        )
        result["device"] = about
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        head = f"{about['kind']}, {', '.join(about.get('flags', []))}; " + ", ".join(
            f"{k} {v}" for k, v in about["versions"].items()
        )
        text = f"{subject.__doc__.strip()}\n\n{head}.\n\n{subject.table(result)}\n"
        if result["missing"]:
            text += (
                f"\nNot installed, so not compared: {'; '.join(result['missing'])}.\n"
            )
        (RESULTS / f"{name}.md").write_text(text)
        print(text)
        return
    RESULTS.mkdir(exist_ok=True)
    for subject in args.subjects or [name for name in SUBJECTS if name != "kernels"]:
        print(f"== {subject}", file=sys.stderr, flush=True)
        environment = os.environ | ENVIRONMENT.get(subject, {})
        command = [
            sys.executable,
            __file__,
            "--one",
            subject,
            *(["--keep"] if args.keep else []),
        ]
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
