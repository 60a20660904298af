"""Mutants of files and recipes. `python -m tests.io.fuzz 100000` runs more of them."""

from tests.io import fuzz


def test_every_mutant_is_loaded_or_refused_by_name(tmp_path):
    results, failures = fuzz.run(2_000, tmp_path)
    assert not failures, "\n".join(failures)
    for kind in ("bytes", "metadata", "header", "recipe", "model"):
        assert results[kind, "refused"] > 0
    # A mutation can leave a file as it was, or make another valid one.
    assert results["metadata", "loaded"] > 0
