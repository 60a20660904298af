"""Starts a group of processes of `jax.distributed` on this machine.

Nothing outlives a test: a group has a time limit, and every process of a group has one
of its own and ends with its parent.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 1500  # seconds


class Group:
    """The outcome of a group.

    Attributes:
      folder: the folder of its files.
      codes: the exit code of each process.
      seconds: how long each process ran after the first of them had ended.
      results: what each process wrote to its file of results, None if it wrote nothing.
      logs: what each process printed.
    """

    def __init__(self, folder, codes, seconds, results, logs):
        self.folder = folder
        self.codes, self.seconds = codes, seconds
        self.results, self.logs = results, logs

    def shown(self) -> str:
        """The ends of the logs, for a failure."""
        parts = zip(self.codes, self.logs, strict=True)
        return "\n".join(
            f"process {number}: exit code {code}\n{log[-4000:]}"
            for number, (code, log) in enumerate(parts)
        )


def run_group(task: str, folder: Path, *, num: int, devices: int, **facts) -> Group:
    """Runs `tests/sharding/worker.py` in `num` processes, and waits for all of them.

    Args:
      task: the name of a function of the worker.
      folder: the folder of logs and results. `facts` name other paths.
      num: the number of processes.
      devices: the number of devices of each.
      **facts: texts for the task.
    """
    folder.mkdir(parents=True)
    # The port is bound here until the end, so no other program gets it. The coordinator
    # of jax shares it, because both set SO_REUSEPORT, and it alone listens on it.
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        facts = {"folder": str(folder), "address": address, "num": num, **facts}
        processes = [_start(task, i, devices, facts, folder) for i in range(num)]
        try:
            ends = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    codes = [process.returncode for process in processes]
    results = [_read_json(folder / f"result-{i}.json") for i in range(num)]
    logs = [(folder / f"log-{i}.txt").read_text(errors="replace") for i in range(num)]
    return Group(folder, codes, [end - min(ends) for end in ends], results, logs)


def _start(task, index, devices, facts, folder) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-m", "tests.sharding.worker", task, str(index)]
    with open(folder / f"log-{index}.txt", "w") as log:
        return subprocess.Popen(
            [*command, json.dumps(facts)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


def _wait(processes) -> list[float]:
    """Waits for all processes. Returns when each of them ended.

    If a process ends with an error, the others have one minute to notice it.
    """
    start, ends = time.monotonic(), {}
    limit = start + LIMIT
    while len(ends) < len(processes) and time.monotonic() < limit:
        for number, process in enumerate(processes):
            if number not in ends and process.poll() is not None:
                ends[number] = time.monotonic()
                if process.returncode:
                    limit = min(limit, ends[number] + 60)
        time.sleep(0.05)
    return [ends.get(number, time.monotonic()) for number in range(len(processes))]


def _read_json(path: Path):
    return json.loads(path.read_text()) if path.exists() else None


def end_with_parent() -> None:
    """In a worker: ends the process at its time limit, or if its parent has died."""
    parent = os.getppid()
    signal.alarm(LIMIT + 10)  # also ends a process that waits in compiled code

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
