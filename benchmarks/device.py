"""A few minutes on an accelerator: are the kernels right there, and how fast are they?

    python benchmarks/device.py OUT                          # all stages, 8 minutes
    python benchmarks/device.py OUT --stages A C --seconds 240
    python benchmarks/device.py OUT --rehearse               # on any machine

Each stage has a limit in seconds:

- A (90 s): products of the kernels compared with float64, then products of rows sorted
  by expert, and then products with quantized activations and attention. The output is
  filled with NaN before each of 20 runs, and all runs must return the same bits.
- B (30 s): what the device reaches in a copy and in a large dense product.
- C (150 s): products with int4, nf4 and int8 weights compared with bfloat16, products
  of the backward pass, and a decode step of experts.
- D (45 s): the same products in PyTorch.
- E (120 s): other tiles, compared with the kernel's own tiles.
- F (45 s): counters of the hardware, by NVIDIA's ncu.

A stage runs in a process of its own, so a crash of the device ends only one task. The
stage then goes on with the next task. OUT/rows.jsonl gets a row as soon as a task is
finished. A task that fails gets a row with its error. OUT/device.md has the tables.

`--rehearse` runs every stage with small shapes and interpreted kernels, and ten times
the limits. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

# The stages, and their limits in seconds.
STAGES = {"A": 90, "B": 30, "C": 150, "D": 45, "E": 120, "F": 45}
# A process that does not end by itself is killed this many seconds after its limit.
GRACE = 5
# A stage does not go on after a crash if fewer seconds are left.
LEAST_SECONDS = 12
COMPILING_THREADS = 12
Row = dict[str, Any]


class Rows:
    """The file of rows. Every row is on the disk before the next task starts."""

    def __init__(self, path: Path):
        self._path = path

    def add(self, stage: str, task: str, **figures: Any) -> None:
        row = {"stage": stage, "task": task, **figures}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(json.dumps(row), flush=True)

    def read(self) -> list[Row]:
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def seen(self, stage: str) -> set[str]:
        """The tasks of a stage that were started."""
        return {row["task"] for row in self.read() if row["stage"] == stage}

    def unfinished(self, stage: str) -> list[str]:
        """The tasks of a stage that were started, but neither finished nor failed."""
        started: dict[str, None] = {}
        for row in self.read():
            if row["stage"] == stage:
                if row.get("started"):
                    started[row["task"]] = None
                else:
                    started.pop(row["task"], None)
        return list(started)


# The process of one stage.


def run_tasks(stage: str, rows: Rows, until: float, rehearse: bool) -> None:
    """Runs the tasks of a stage that no earlier process started.

    Args:
      stage: its letter.
      rows: where the figures go.
      until: no task starts after this time, in seconds since the epoch.
      rehearse: whether to use small shapes and interpreted kernels.
    """
    import device_stages

    seen = rows.seen(stage)
    tasks = [
        task
        for task in device_stages.tasks(stage, rehearse=rehearse)
        if task.name not in seen
    ]
    pool = ThreadPoolExecutor(COMPILING_THREADS)
    programs = [pool.submit(task.compile) for task in tasks]
    try:
        for task, program in zip(tasks, programs, strict=True):
            if time.time() >= until:
                rows.add(stage, task.name, failure="not started: the time was up")
                continue
            rows.add(stage, task.name, started=True)
            _run_task(stage, task, program, rows, until)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _run_task(
    stage: str, task: Any, program: Future[Any], rows: Rows, until: float
) -> None:
    # Whatever goes wrong in a task is a row. The next task may still work.
    try:
        compiled = program.result(timeout=max(1.0, until - time.time()))
        for figures in task.run(compiled):
            rows.add(stage, task.name, **figures)
    except TimeoutError:
        rows.add(stage, task.name, failure="not compiled in time")
    except Exception as error:
        rows.add(stage, task.name, failure=f"{type(error).__name__}: {error}"[:500])


# The process that starts the stages.


def run_stage(
    stage: str, rows: Rows, seconds: float, out: Path, rehearse: bool
) -> None:
    """Starts processes for a stage until its tasks are done or the time is up."""
    until = time.time() + seconds
    while True:
        command = [sys.executable, __file__, str(out), "--one", stage, str(until)]
        if rehearse:
            command.append("--rehearse")
        num_seen = len(rows.seen(stage))
        problem = _wait_for(command, until + GRACE - time.time())
        if problem is None:
            return
        for task in rows.unfinished(stage):
            rows.add(stage, task, failure=problem)
        # A process that starts no task would do the same again.
        made_progress = len(rows.seen(stage)) > num_seen
        if not made_progress:
            rows.add(stage, "the whole stage", failure=problem)
        if not made_progress or until - time.time() < LEAST_SECONDS:
            return


def _wait_for(command: list[str], seconds: float) -> str | None:
    """Runs a process. Returns what went wrong, or None."""
    process = subprocess.Popen(command)
    try:
        code = process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "stopped: it took too long"
    except BaseException:
        process.kill()
        raise
    return None if code == 0 else f"the process ended with code {code}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="limit for all stages together"
    )
    parser.add_argument("--rehearse", action="store_true", help="small and interpreted")
    # In the process of one stage: its letter, and when it has to end.
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / "rows.jsonl")
    if args.one:
        run_tasks(args.one[0], rows, float(args.one[1]), args.rehearse)
        return
    factor = 10 if args.rehearse else 1
    end = time.time() + factor * args.seconds
    for stage in args.stages:
        seconds = min(factor * STAGES[stage], end - time.time())
        if seconds < LEAST_SECONDS:
            rows.add(stage, "the whole stage", failure="not started: the time was up")
            continue
        print(f"== stage {stage}, at most {seconds:.0f} s", flush=True)
        run_stage(stage, rows, seconds, args.out, args.rehearse)
        import device_tables  # needs no accelerator

        page = device_tables.page(rows.read(), args.rehearse)
        (args.out / "device.md").write_text(page)


if __name__ == "__main__":
    main()
