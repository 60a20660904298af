"""Damaged checkpoints: each is read, or refused by an error that names it."""

import pytest

from jaxq.io.layouts._tensors import Settings
from tests.io import fuzz_checkpoints
from tests.io.fuzz_checkpoints import KINDS
from tests.tables import thinned

FEW = [
    *("gptq 4", "nf4 nested", "compressed-tensors pack 4 asymmetric", "fp8 block"),
    *("GGUF Q4_1", "GGUF Q4_K", "shards", "quantized model", "statistics"),
]


@pytest.mark.parametrize("kind", thinned(KINDS, FEW))
def test_every_mutant_is_read_or_refused_by_name(tmp_path, kind):
    whole = fuzz_checkpoints.whole_checkpoint(kind, tmp_path)
    results, failures = fuzz_checkpoints.run([whole], 40, tmp_path)
    assert not failures, "\n".join(failures)
    assert results[kind, "refused"] > 10


@pytest.mark.parametrize("size", [2**31, 2**63, 10**30, 0, 1.0, True])
def test_a_group_size_that_no_matrix_has(size):
    with pytest.raises(ValueError, match="group_size"):
        Settings("gptq", {"group_size": size}).size("group_size", 128)
