"""benchmarks/run.py lists its subjects, and writes results only if it is asked."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def runner(monkeypatch, tmp_path):
    """The module `run` with its results in a temporary folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("run")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


class Subject:
    """A subject that measures nothing."""

    __doc__ = "A number."

    @staticmethod
    def run():
        return {"rows": [1], "missing": []}

    @staticmethod
    def table(result):
        return f"rows: {result['rows']}"


def test_without_arguments_the_subjects_are_listed(runner, monkeypatch, capsys):
    (runner.RESULTS / "durations.json").write_text(json.dumps({"cast": 90}))
    rows = [{"seconds": 60}, {"seconds": 90, "perplexities": [7, 8]}]
    (runner.RESULTS / "training-cpu.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    runner.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(runner.SUBJECTS)
    assert "1.5 min" in lines[0]
    assert "not recorded" in lines[1]
    assert "over 4 min" in lines[-1]


def test_only_write_replaces_the_results(runner, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cast", Subject)
    runner.run_subject("cast", keep=False, write=False)
    assert "rows: [1]" in capsys.readouterr().out
    assert not list(runner.RESULTS.iterdir())
    runner.run_subject("cast", keep=False, write=True)
    names = sorted(path.suffix for path in runner.RESULTS.iterdir())
    assert names == [".json", ".json", ".md"]


def test_durations_are_recorded_without_figures(runner, monkeypatch):
    (runner.RESULTS / "durations.json").write_text(json.dumps({"cast": 90, "gptq": 7}))
    monkeypatch.setitem(sys.modules, "cast", Subject)
    runner.run_subject("cast", keep=False, write=False, durations=True)
    (path,) = runner.RESULTS.iterdir()
    assert json.loads(path.read_text()) == {"cast": 0, "gptq": 7}
