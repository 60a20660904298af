"""`import jaxq` is light, and every public name resolves."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import jaxq

ROOMS = sorted(
    path.parent.name for path in Path(jaxq.__file__).parent.glob("*/__init__.py")
)
_LOADED = """
import json, sys
import jax
before = set(sys.modules)
import jaxq
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_import_loads_nothing_heavy():
    # This lists the modules. A time on a busy machine would say nothing.
    out = subprocess.run(
        [sys.executable, "-c", _LOADED], capture_output=True, text=True, check=True
    ).stdout
    loaded = set(json.loads(out))
    packages = {name.partition(".")[0] for name in loaded} - set(
        sys.stdlib_module_names
    )
    assert packages <= {"jaxq", "jax", "jaxlib"}, (
        f"import jaxq also imports {sorted(packages)}"
    )
    heavy = {name for name in loaded if name.startswith("jax.experimental.pallas")}
    assert not heavy, f"import jaxq also imports Pallas: {sorted(heavy)}"


def test_public_names_resolve():
    listed = list(getattr(jaxq, "__all__", ()))
    assert len(listed) == len(set(listed)), "jaxq.__all__ repeats a name"
    assert set(listed) <= set(dir(jaxq)), (
        f"dir(jaxq) lacks {sorted(set(listed) - set(dir(jaxq)))}"
    )
    for name in {*listed, *dir(jaxq)}:
        assert getattr(jaxq, name, None) is not None or name in (
            "__builtins__",
            "__doc__",
        ), f"jaxq.{name} is None"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = jaxq.no_such_name


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_list_what_they_hold(room):
    module = importlib.import_module(f"jaxq.{room}")
    assert module.__doc__, f"jaxq.{room} has no overview"
    listed = module.__all__
    assert len(listed) == len(set(listed)), f"jaxq.{room}.__all__ repeats a name"
    for name in listed:
        assert getattr(module, name) is not None
