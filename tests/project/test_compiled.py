"""What is promised to the bit, compiled as users have it: the rest of a default run is compiled the quick way."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("tests/contracts/test_presets.py", "tests/qtensor/test_quantize.py")
# Zero points, and scales that are quantized themselves, are multiplications with additions.
PROMISES = (
    "test_jitted_equals_eager_to_the_bit and (uint4 or nf4_dq)",
    "test_integers_equal_numpy_to_the_bit and (True-float16 or False-bfloat16)",
)


def test_codes_and_values_are_the_same_bits():
    ours = ("PYTEST_", "XLA_FLAGS", "JAX_COMPILATION_CACHE")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(ours)
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *FILES,
        "-k",
        " or ".join(f"({promise})" for promise in PROMISES),
    ]
    found = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"JAXQ_COMPILE": "as_users"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert "passed" in found.stdout
