"""benchmarks/device.py: whatever goes wrong on a device becomes a row."""

import importlib
import sys
import time
import types
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def device(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("device")


@pytest.fixture
def rows(device, tmp_path):
    return device.Rows(tmp_path / "rows.jsonl")


def fake_task(name, ran, compile_error=None, run_error=None):
    def compile_it():
        if compile_error:
            raise compile_error
        return name

    def run(compiled):
        ran.append(compiled)
        yield {"us": 1.0}
        if run_error:
            raise run_error

    return types.SimpleNamespace(name=name, compile=compile_it, run=run)


def finished(rows):
    return [
        (row["task"], row.get("us", row.get("failure")))
        for row in rows.read()
        if not row.get("started")
    ]


def test_a_failed_task_does_not_end_the_stage(device, rows, monkeypatch):
    ran = []
    tasks = [
        fake_task("not compiled", ran, compile_error=ValueError("too many registers")),
        fake_task("stops", ran, run_error=RuntimeError("illegal address")),
        fake_task("good", ran),
    ]
    stages = types.SimpleNamespace(tasks=lambda stage, *, rehearse: tasks)
    monkeypatch.setitem(sys.modules, "device_stages", stages)
    device.run_tasks("A", rows, time.time() + 60, rehearse=False)
    assert finished(rows) == [
        ("not compiled", "ValueError: too many registers"),
        ("stops", 1.0),
        ("stops", "RuntimeError: illegal address"),
        ("good", 1.0),
    ]
    # A second process of the stage starts only what is new.
    tasks.append(fake_task("late", ran))
    device.run_tasks("A", rows, time.time() + 60, rehearse=False)
    assert ran == ["stops", "good", "late"]
    tasks.append(fake_task("too late", ran))
    device.run_tasks("A", rows, time.time() - 1, rehearse=False)
    assert finished(rows)[-1] == ("too late", "not started: the time was up")


def test_a_stage_goes_on_after_a_crash(device, rows, monkeypatch):
    crashes = iter(["the process ended with code -11", None])

    def process(command, seconds):
        rows.add("A", "first" if not rows.read() else "second", started=True)
        problem = next(crashes)
        if problem is None:
            rows.add("A", "second", us=2.0)
        return problem

    monkeypatch.setattr(device, "_wait_for", process)
    device.run_stage("A", rows, 60.0, Path("out"), rehearse=False)
    assert finished(rows) == [
        ("first", "the process ended with code -11"),
        ("second", 2.0),
    ]


def test_a_stage_that_starts_nothing_ends(device, rows, monkeypatch):
    monkeypatch.setattr(device, "_wait_for", lambda command, seconds: "it broke")
    device.run_stage("B", rows, 60.0, Path("out"), rehearse=False)
    assert finished(rows) == [("the whole stage", "it broke")]


def test_a_process_that_hangs_is_stopped(device):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    begin = time.monotonic()
    assert device._wait_for(command, 1.0) == "stopped: it took too long"
    assert time.monotonic() - begin < 30
    assert device._wait_for([sys.executable, "-c", "raise SystemExit(3)"], 60.0) == (
        "the process ended with code 3"
    )


def test_the_page_has_figures_and_failures(device, rows):
    tables = importlib.import_module("device_tables")
    rows.add("C", "n=1", what="int4", us=12.3456, error=1e-3)
    rows.add("C", "n=2", failure="out of memory | on the device")
    page = tables.page(rows.read(), rehearse=False)
    assert page.startswith("# Measured\n")
    assert "| int4 | - | - | - | 12.3 |" in page
    assert "- n=2: out of memory / on the device" in page
