"""What is promised to the bit, compiled as users have it: the rest of a default run is compiled the quick way."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROMISES = {
    "tests/contracts/test_presets.py": "test_jitted_equals_eager_to_the_bit",
    "tests/qtensor/test_quantize.py": "equals_numpy_to_the_bit or equal_numpy_to_the_bit",
}


def test_codes_and_values_are_the_same_bits():
    ours = ("PYTEST_", "XLA_FLAGS", "JAX_COMPILATION_CACHE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *PROMISES,
        "-k",
        " or ".join(PROMISES.values()),
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
