"""The GPU kernels compile for an H200, if the compiler is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.heavy
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="needs jax-cuda13-plugin and jax-cuda13-pjrt, see ahead_of_time.py",
)
@pytest.mark.parametrize("kernel", ["mosaic_gpu", "triton", "triton_transposed"])
def test_compiles_for_h200(kernel, capsys):
    """In a process of its own, because a compiler may end the process on an error."""
    command = [sys.executable, "-m", "tests.kernels.aot_gpu", kernel]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in lines if line.startswith("FAILED")] == []
    assert sum(line.startswith("ok ") for line in lines) >= 56
    with capsys.disabled():
        print(f"\n{lines[-1]}")
