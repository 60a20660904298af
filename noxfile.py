"""The test suite on every supported pair of Python and jax: `pip install nox && nox -s tests`.

What follows `--` goes to pytest: `nox -s tests -- -k formats`. The pairs are the oldest and the newest supported ones.
"""

import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"

PAIRS = (("3.11", "0.10.2"), ("3.12", "0.11.2"))


def runs(executable: str, version: str) -> bool:
    """True where `executable` starts and is that Python: the shims of pyenv exist for versions that are not active."""
    code = f"import sys; sys.exit(sys.version_info[:2] != {tuple(map(int, version.split('.')))})"
    return (
        subprocess.run(
            [executable, "-c", code], capture_output=True, check=False
        ).returncode
        == 0
    )


def find(version: str) -> None:
    """Puts a directory with `python<version>` first on PATH, where nox looks for it."""
    name = f"python{version}"
    if (shim := shutil.which(name)) and runs(shim, version):
        return
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for python in sorted(pyenv.glob(f"versions/{version}*/bin/{name}"), reverse=True):
        if runs(str(python), version):
            os.environ["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
            return


@nox.session
@nox.parametrize("python,jax", PAIRS)
def tests(session: nox.Session, jax: str) -> None:
    """Install jaxq with that jax and run pytest."""
    session.install("-e", ".[test,hf,plots]", f"jax=={jax}", f"jaxlib=={jax}")
    session.run(
        "python",
        "-m",
        "pytest",
        *(session.posargs or ("-n", "2", "--dist", "loadfile")),
    )


for _version, _ in PAIRS:
    find(_version)
nox.options.error_on_missing_interpreters = True
