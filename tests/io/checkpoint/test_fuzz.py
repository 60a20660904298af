"""Damaged checkpoints: each is read, or refused by an error that names it."""

import pytest

from tests.io import fuzz_checkpoints


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    return fuzz_checkpoints.sources(tmp_path_factory.mktemp("wholes"))


def test_every_mutant_is_read_or_refused_by_name(wholes, tmp_path):
    count = 15 * len(wholes)
    results, failures = fuzz_checkpoints.run(wholes, count, tmp_path)
    assert not failures, "\n".join(failures)
    for source in wholes:
        assert results[source.kind, "refused"] > 2, source.kind
    # A mutation can change numbers only, or a name that nothing reads.
    assert sum(results[source.kind, "read"] for source in wholes) > count // 20
