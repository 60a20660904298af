"""A strict session: no silent promotion of dtypes or ranks, four CPU devices, the same random examples every run."""

import gc
import os
from pathlib import Path

# Before the first import of jax: the device count is read once. A platform asked for by the caller is kept.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
    )

# Most of the suite's time goes into XLA's compiler: what one process has compiled, the others and the next run load.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example of a shape compiles. Derandomized: a red run is red for everyone.
hypothesis.settings.register_profile(
    "jaxq", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("jaxq")


def quickly(config) -> bool:
    """Whether programs are compiled the quick way, not as users have them."""
    return (
        config.option.markexpr == "not heavy"
        and os.environ.get("JAXQ_COMPILE") != "as_users"
    )


def pytest_configure(config):
    """Programs are compiled the quick way: most of the suite's time was XLA's compiler.

    The older of jax 0.10's two code generators takes half the time of the one users have; later versions have no
    choice. Runs with `-m heavy` compile as users do, and so does one with JAXQ_COMPILE=as_users.
    """
    if not quickly(config):
        return
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ < (
        0,
        11,
    ):  # XLA refuses to start with a flag it does not know
        flags.append("--xla_cpu_use_fusion_emitters=false")
    given = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = " ".join(
        [given, *(flag for flag in flags if flag not in given)]
    )


# The files that take longest.
FIRST = (
    "project/test_examples.py",
    "nn/test_layers.py",
    "project/test_docstrings.py",
    "contracts/test_presets.py",
    "ops/test_weight_only.py",
    "ops/test_codes.py",
    "ops/test_dot_general.py",
    "qtensor/test_quantize.py",
    "qtensor/test_qtensor.py",
)


def pytest_collection_modifyitems(items):
    """The dearest files go first, so that no process is left alone with one at the end."""
    tests = Path(__file__).parent
    place = {tests / name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(FIRST)))


# Half of a compilation is LLVM's optimizer, which fuses multiplications with additions. Where single bits are all that
# counts it is at work; elsewhere tables need it not, and `test_compiled.py` and `-m heavy` run them as users do.
OPTIMIZED = ("emulation", "formats")


@pytest.fixture(autouse=True, scope="module")
def _unoptimized(request):
    tests = Path(__file__).parent
    optimized = any(request.path.is_relative_to(tests / name) for name in OPTIMIZED)
    if not optimized and quickly(request.config):
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
