"""Damaged checkpoints: each is read, or refused by an error that names it."""

import pytest

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
