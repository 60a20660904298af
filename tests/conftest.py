"""Settings of a test session: strict promotion, four CPU devices, fixed examples.

Programs are compiled with jax's default settings, as users' programs are.
"""

import gc
import os
from collections import Counter
from pathlib import Path

# jax reads the device count once, at its first import. A platform that the caller chose
# is kept.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
DEVICE_COUNT = "--xla_force_host_platform_device_count"
if DEVICE_COUNT not in os.environ.get("XLA_FLAGS", ""):
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DEVICE_COUNT}=4"
    os.environ["XLA_FLAGS"] = flags.strip()

# XLA's compiler takes most of the suite's time. The cache shares compiled programs
# between the processes of a run, and with the next run.
CACHE = Path(__file__).parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example of a shape compiles. Derandomized: every run sees the
# same examples.
hypothesis.settings.register_profile(
    "jaxq", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("jaxq")

# The files that take longest.
FIRST = (
    "project/test_examples.py",
    "nn/layers/test_nnx.py",
    "project/test_docstrings.py",
    "contracts/test_presets.py",
    "ops/test_weight_only.py",
    "ops/test_codes.py",
    "ops/test_dot_general.py",
    "qtensor/test_quantize.py",
    "qtensor/test_qtensor.py",
)


# How many heavy tests each file has. test_documents.py compares with the documents.
NUM_HEAVY = pytest.StashKey[Counter]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Runs the longest files first, so that no process works alone at the end."""
    config.stash[NUM_HEAVY] = Counter(
        item.path for item in items if item.get_closest_marker("heavy")
    )
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(FIRST)))


# Linux gives a process 65,530 memory maps, and a compiled program takes several.
# Without a free map the compiler ends in a segmentation fault.
MOST_MAPS = 40_000


def num_memory_maps() -> int:
    """The number of memory maps of this process. 0 where it cannot be read."""
    try:
        with open("/proc/self/maps") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return 0


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Keeps the garbage collector away from compiled programs, and drops old ones.

    The programs of all tests together reach gigabytes.
    """
    yield
    if num_memory_maps() > MOST_MAPS:
        gc.unfreeze()
        jax.clear_caches()
        gc.collect()
    gc.freeze()


@pytest.fixture
def standard_promotion():
    """For other libraries' code that promotes dtypes silently, such as optax's Adam.

    jaxq itself must work without it.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield
