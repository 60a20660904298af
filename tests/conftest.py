"""A strict session: no silent promotion of dtypes or ranks, four CPU devices, the same random examples every run."""

import gc
import os
from pathlib import Path

# Before the first import of jax: the device count is read once. A platform asked for by the caller is kept.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

# Most of the suite's time goes into XLA's compiler: what one process has compiled, the others and the next run load.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example of a shape compiles. Derandomized: a red run is red for everyone.
hypothesis.settings.register_profile("jaxq", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("jaxq")


def pytest_collection_modifyitems(items):
    """Files with heavy tests go first, so that no process is left alone with one at the end."""
    heavy = {item.path for item in items if item.get_closest_marker("heavy")}
    items.sort(key=lambda item: item.path not in heavy)


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """What a file has compiled stays alive, gigabytes by the end: the garbage collector need not walk it again."""
    yield
    gc.freeze()


@pytest.fixture
def standard_promotion():
    """For code of others that promotes silently, as optax's Adam does; jaxq itself must not need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield
