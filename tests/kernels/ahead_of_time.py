"""Compiles programs for a TPU or a GPU on a machine that has none.

The modules `aot_*.py` of this folder compile the cases of one kind of kernel. With more
words on the command line, only cases run whose name has all of the words:

    python -m tests.kernels.aot_ragged tpu v6e:2x2
    python -m tests.kernels.aot_ragged cuda int4 decode

For TPU this needs libtpu, which comes with jax[tpu]. For GPU it needs jax-cuda13-plugin
and jax-cuda13-pjrt of the same version as jax, installed with `--no-deps`. They contain
the compiler. CUDA and a driver are not needed. The file h200.txtpb, a GpuTargetConfig
of XLA, describes the target.

Each case prints a line: "ok", "not served" with the reason, or "FAILED" with the error.
The last line says how many compiled.
"""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

jax.config.update("jax_platforms", "cpu")  # no search for devices


class NotServedError(Exception):
    """No kernel takes the case. The message is the reason."""


class Target(NamedTuple):
    """What cases are compiled for.

    Attributes:
      platform: "tpu" or "cuda".
      device: a device of a topology. It does not exist.
      words: only cases whose name has all of these words are compiled.
    """

    platform: str
    device: Any
    words: tuple[str, ...]


def target_of(arguments: Sequence[str]) -> Target:
    """The target of a command line: "tpu TOPOLOGY [word ...]" or "cuda [word ...]"."""
    platform, *words = arguments
    topology = words.pop(0) if platform == "tpu" else ""
    return Target(platform, device_of(platform, topology), tuple(words))


def device_of(platform: str, topology: str = "") -> Any:
    """The first device of a TPU topology, such as "v6e:2x2", or an H200."""
    if platform == "tpu":
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology
        ).devices[0]
    config = (Path(__file__).parent / "h200.txtpb").read_text()
    return topologies.get_topology_desc(
        "", "cuda", topology="1x1x1", target_config=config
    ).devices[0]


def compile_for(device: Any, function: Callable[..., Any], *shapes: Any) -> str:
    """Compiles a function of arrays for a device. Returns the compiled program.

    Args:
      device: as `device_of` returns it.
      function: the function.
      *shapes: pytrees of `jax.ShapeDtypeStruct`, the arguments of the function.
    """
    mesh = Mesh(np.array([device]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda shape: shape.update(sharding=sharding), shapes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*arguments).compile().as_text() or ""


def compile_kernel(
    kernel: Any,
    p: Any,
    device: Any,
    shapes: Sequence[Any],
    default_tiles: Callable[[Any], dict],
) -> None:
    """Compiles the function `matmul` of a kernel's module for a problem.

    Args:
      kernel: the module.
      p: the problem.
      device: as `device_of` returns it.
      shapes: shapes of the operands. None is an operand that is absent.
      default_tiles: returns the tiles of a problem that the kernel takes.

    Raises:
      NotServedError: the kernel does not take the problem.
    """
    reason = kernel.why_not(p, device.device_kind)
    if reason is not None:
        raise NotServedError(reason)
    matmul = functools.partial(kernel.matmul, problem=p, tiles=default_tiles(p))
    compile_for(device, matmul, *shapes)


def run_cases(
    target: Target, cases: dict[str, Any], compile_case: Callable[[Any], str | None]
) -> None:
    """Compiles each case and prints its line.

    Args:
      target: what the cases are compiled for.
      cases: cases by name.
      compile_case: compiles one case. It returns what is wrong with the program, or
        None. It raises `NotServedError` if no kernel takes the case.
    """
    counts = dict.fromkeys(("ok", "FAILED", "not served"), 0)
    for name, case in cases.items():
        if not all(word in name for word in target.words):
            continue
        try:
            problem = compile_case(case)
            result = "ok" if problem is None else "FAILED"
        except NotServedError as reason:
            result, problem = "not served", str(reason)
        except Exception as error:  # any error of the compiler is the result
            result = "FAILED"
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:700]}"
        counts[result] += 1
        text = name if problem is None else f"{name}: {problem}"
        print(f"{result} {text}", flush=True)
    print(
        f"{counts['ok']} compiled for {target.device.device_kind}, "
        f"{counts['FAILED']} failed, {counts['not served']} not served; "
        f"jax {jax.__version__}"
    )
