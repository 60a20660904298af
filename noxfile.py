"""The test suite on the oldest and the newest supported Python and jax.

pip install nox
nox -s tests
nox -s tests -- -k formats        # what follows -- goes to pytest
"""

import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True

# (Python, jax): the oldest supported pair and the newest.
PAIRS = (("3.11", "0.10.2"), ("3.13", "0.12.0.1"))


def is_python(executable: str, version: str) -> bool:
    """Whether `executable` starts and is that version of Python.

    pyenv has shims for versions that are not active. Such a shim does not start.
    """
    expected = tuple(map(int, version.split(".")))
    code = f"import sys; sys.exit(sys.version_info[:2] != {expected})"
    process = subprocess.run([executable, "-c", code], capture_output=True, check=False)
    return process.returncode == 0


def add_to_path(version: str) -> None:
    """Puts a folder with `python<version>` first on PATH, where nox looks for it."""
    name = f"python{version}"
    shim = shutil.which(name)
    if shim and is_python(shim, version):
        return
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for python in sorted(pyenv.glob(f"versions/{version}*/bin/{name}"), reverse=True):
        if is_python(str(python), version):
            os.environ["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
            return


for _version, _ in PAIRS:
    add_to_path(_version)


@nox.session
@nox.parametrize("python,jax", PAIRS)
def tests(session: nox.Session, jax: str) -> None:
    """Installs jaxq with this version of jax, and runs pytest."""
    session.install("-e", ".[test,hf,plots]", f"jax=={jax}", f"jaxlib=={jax}")
    arguments = session.posargs or ("-n", "2", "--dist", "loadfile")
    session.run("python", "-m", "pytest", *arguments)
