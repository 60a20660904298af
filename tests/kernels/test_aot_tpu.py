"""The TPU kernels compile for each generation, with libtpu's compiler and no TPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SERVED = {
    f"codebook4 {layout} {other}"
    for layout in ("rows", "columns")
    for other in ("int8 x m=32", "int8 x m=512", "int32")
}


@pytest.mark.heavy
@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"),
    reason='libtpu is not installed: pip install "jax[tpu]"',
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
    ("product", "not_served", "at_least"),
    [((), NOT_SERVED, 131), (("transposed",), set(), 120)],
)
def test_every_case_compiles(topology, product, not_served, at_least, capsys):
    """In a process of its own, because the compiler ends the process on some errors."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot_tpu", topology, *product],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0, f"{lines[-1:]}\n{run.stderr[-2000:]}"
    failed = [line for line in lines if line.startswith("FAILED")]
    assert not failed, "\n".join(failed)
    assert {
        line.removeprefix("not served ").partition(":")[0]
        for line in lines
        if "not served" in line
    } == not_served
    compiled = sum(line.startswith("ok ") for line in lines)
    assert compiled >= at_least
    assert lines[-1].startswith(f"{compiled} compiled for TPU")
    with capsys.disabled():
        print(f"\n{lines[-1]}")
