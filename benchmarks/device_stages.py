"""The tasks of device.py's stages."""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import device_programs
import device_ragged
import jax
import jax.numpy as jnp
import kernels
import numpy as np
import tune
from timing import interleaved, summary

import jaxq
from jaxq.kernels import Problem
from jaxq.kernels._registry import (
    KERNEL_NAMES,
    KERNELS,
    kernel_module,
    kernels_for,
)

Row = dict[str, Any]
# Stage A. The relative error of a bfloat16 result, as a norm.
LARGEST_ERROR = 5e-3
REPEATS = 20
# Stage C, and the same sizes for stage D. 12 weights do not fit into a cache.
SIZES = list(itertools.product((4096, 14336), (1, 16, 64, 256)))
NUM_WEIGHTS, LOOPS = 12, 8
# Stage E: tiles of the Hopper kernel, in groups that are measured in turns.
TILES = {
    "bk": (128, 256),
    "warpgroups": (2, 3, 4),
    "splits": (2, 4, 8),
    "stages": (4, 6),
}
TILES_AT_ONCE = 6
# Stage F.
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


class Task(NamedTuple):
    """A part of a stage.

    Attributes:
      name: differs from the names of the stage's other tasks.
      compile: prepares programs and arrays. It runs in a thread beside others.
      run: gets what `compile` returns, and yields rows. Tasks run one by one.
    """

    name: str
    compile: Callable[[], Any]
    run: Callable[[Any], Iterator[Row]]


def tasks(stage: str, *, rehearse: bool) -> list[Task]:
    """The tasks of a stage, in their order."""
    make = {
        "A": _right_results,
        "B": _peaks,
        "C": _speed,
        "D": _torch,
        "E": _tiles,
        "F": _counters,
    }[stage]
    return make(rehearse)


def _platform() -> str:
    backend = jax.default_backend()
    return {"gpu": "cuda"}.get(backend, backend)


# Stage A.


def _right_results(rehearse: bool) -> list[Task]:
    if rehearse:
        transposed = itertools.chain.from_iterable(KERNELS["transposed"].values())
        names = (*KERNEL_NAMES, *transposed)
    else:
        names = [
            *kernels_for(_platform(), "product"),
            *kernels_for(_platform(), "transposed"),
        ]
    repeats = 2 if rehearse else REPEATS
    by_platform = {"tpu": "ragged_tpu", "cuda": "ragged_triton"}
    if not rehearse:
        by_platform = {p: k for p, k in by_platform.items() if p == _platform()}
    ragged = [
        Task(
            f"{kernel}: {preset}, {sizes}",
            functools.partial(
                device_ragged.compile_product, preset, sizes, kernel, rehearse
            ),
            functools.partial(_check, repeats),
        )
        for kernel in by_platform.values()
        for preset, sizes in device_ragged.cases(rehearse)
    ]
    products = [
        Task(
            f"{name}: {label}",
            functools.partial(_compile_checked, name, problem, tiles, rehearse),
            functools.partial(_check, repeats),
        )
        for name in names
        for label, problem, tiles in _problems(name, rehearse)
    ]
    programs = [
        Task(
            name,
            functools.partial(device_programs.compile_program, name, rehearse),
            functools.partial(_check, repeats),
        )
        for name in device_programs.names()
    ]
    return products + ragged + programs


def _problems(name: str, rehearse: bool) -> Iterator[tuple[str, Problem, Row]]:
    """Products for stage A: a label, the product, and tiles to use."""
    side = 256 if rehearse else 1024
    if name == "triton_int8":
        yield from _problems_of_int8_x(name, side)
        return

    def problem(
        codes: str,
        group: int | None,
        m: int = 16,
        k: int = side,
        n: int = side,
        **changes: Any,
    ) -> Problem:
        made = tune.make_problem(codes, group, m, k, n, name)
        return dataclasses.replace(made, **changes)

    cases = [
        problem("int4", 128),
        problem("uint4", 128),
        problem("codebook4", 64),
        problem("int8", None),
        problem("uint8", 128),
    ]
    if not rehearse:
        cases += [problem("int4", group) for group in (32, 64, None)]
        cases += [problem("codebook4", group) for group in (32, 128)]
        cases += [problem("int8", group) for group in (32, 128)]
        cases += [problem("int4", 128, m) for m in (1, 5, 64, 300)]
        cases += [problem("codebook4", 64, m) for m in (1, 64, 300)]
        cases += [problem("int8", None, m) for m in (1, 300)]
        cases += [problem("int4", 128, x_dtype="float16", out_dtype="float16")]
    cases += [problem("int4", 128, n=side - 24), problem("int4", 128, e=3)]
    if name.startswith("tpu"):
        layout: Any = "columns"
        cases += [dataclasses.replace(case, layout=layout) for case in cases]
    for case in cases:
        yield _label(case), case, {}
    # The summed axis is no multiple of the steps, and parts are summed at the end.
    axis = "n" if name.endswith("_transposed") else "k"
    for codes in ("int4", "codebook4"):
        case = problem(codes, 64, **{axis: side * 4 + 64})
        splits = {} if name.startswith("tpu") else {"splits": 3}
        yield f"{_label(case)}, 3 parts" if splits else _label(case), case, splits


def _problems_of_int8_x(name: str, side: int) -> Iterator[tuple[str, Problem, Row]]:
    """Products of int8 x for stage A, with the tiles of the kernel."""
    for codes, group, m in (
        ("int8", 128, 16),
        ("int8", 128, 300),
        ("int4", 128, 16),
        ("int4", None, 16),
    ):
        made = tune.make_problem(codes, group, m, side, side - 24, name)
        case = dataclasses.replace(made, x_dtype="int8", out_dtype="float32")
        yield _label(case), case, {}


def _label(p: Problem) -> str:
    return (
        f"{p.codes}, groups of {p.group}, m={p.m}, k={p.k}, n={p.n}, e={p.e}, "
        f"{p.x_dtype}, {p.layout}"
    )


class _Checked(NamedTuple):
    """A compiled product, its operands, and the exact result."""

    into: Callable
    operands: tuple
    exact: np.ndarray
    is_poisoned: bool
    out_dtype: str


def _compile_checked(
    name: str, problem: Problem, tiles: Row, rehearse: bool
) -> _Checked:
    module = kernel_module(name)
    device = None if rehearse else jax.devices()[0].device_kind
    reason = module.why_not(problem, device)
    if reason is not None:
        raise ValueError(f"the kernel refuses: {reason}")
    operands = tune.random_operands(problem, 0)
    exact = tune.exact_product(problem, operands)
    operands = tune.as_kernel_reads(name, operands)
    product = functools.partial(
        module.matmul,
        problem=problem,
        tiles={**module.default_tiles(problem, device), **tiles},
        interpret=rehearse,
    )

    def into(out: jax.Array, *operands: Any) -> jax.Array:
        return product(*operands)

    if rehearse:
        return _Checked(into, operands, exact, False, problem.out_dtype)
    # The result is written to the memory of `out`, which is full of NaN.
    out = jax.ShapeDtypeStruct(exact.shape, problem.out_dtype)
    program = jax.jit(into, donate_argnums=0, keep_unused=True)
    compiled = program.lower(out, *operands).compile()
    memory = compiled.memory_analysis()
    is_poisoned = memory is not None and memory.alias_size_in_bytes > 0
    return _Checked(compiled, operands, exact, is_poisoned, problem.out_dtype)


def _check(
    repeats: int, checked: _Checked | device_ragged.Product | device_programs.Program
) -> Iterator[Row]:
    results = []
    for _ in range(repeats):
        out = jnp.full(checked.exact.shape, jnp.nan, checked.out_dtype)
        results.append(np.asarray(checked.into(out, *checked.operands)))
    y = results[0].astype(np.float64)
    error = np.linalg.norm(y - checked.exact) / np.linalg.norm(checked.exact)
    bits = {result.tobytes() for result in results}
    yield {
        "error": float(error),
        "is_right": bool(error <= LARGEST_ERROR),  # NaN is wrong
        "runs": repeats,
        "has_same_bits": len(bits) == 1,
        "is_poisoned": checked.is_poisoned,
    }


# Stage B.


def _peaks(rehearse: bool) -> list[Task]:
    def run(_: Any) -> Iterator[Row]:
        yield kernels.find_peaks("cpu" if rehearse else _platform())

    def compile_empty(m: int) -> Callable[[], Any]:
        x = jnp.ones((m, kernels.K), jnp.bfloat16)
        return kernels.loop(lambda x, w: x, x, [jnp.ones(())] * NUM_WEIGHTS, LOOPS)

    def run_empty(m: int, call: Callable[[], Any]) -> Iterator[Row]:
        times = summary(interleaved({"empty": call}, rounds=21), "empty")["empty"]
        yield {"m": m, "us": 1e3 * times["median_ms"] / (NUM_WEIGHTS * LOOPS)}

    empty = [
        Task(
            f"the loop without products, m={m}",
            functools.partial(compile_empty, m),
            functools.partial(run_empty, m),
        )
        for m in (1, 16, 64, 256)
    ]
    return [Task("copy and dense product", lambda: None, run), *empty]


# Stages C and D.

_one_at_a_time = threading.Lock()


@functools.cache
def _all_weights(n: int, count: int, platform: str) -> tuple[dict, list]:
    return kernels.make_weights(n, count, platform)


def _weights(n: int, names: tuple[str, ...], count: int) -> tuple[dict, list]:
    """`count` quantized weights of each name, and dense ones."""
    with _one_at_a_time:
        weights, dense = _all_weights(n, count, _platform())
    return {name: weights[name] for name in names}, dense


def _speed(rehearse: bool) -> list[Task]:
    weight_only: tuple[str, ...] = ("int4", "nf4", "int8")
    cases = [(n, m, weight_only) for n, m in SIZES]
    cases.append((4096, 2048, ("int4", "w8a8")))
    if rehearse:
        cases = [(256, 16, weight_only), (256, 64, ("int4", "w8a8"))]
    count, loops = (2, 1) if rehearse else (NUM_WEIGHTS, LOOPS)

    def compiled(n: int, m: int, names: tuple[str, ...]) -> kernels.Products:
        weights, dense = _weights(n, names, count)
        return kernels.Products(m, n, weights, dense, loops)

    experts = Task(
        "16 rows of 8 experts",
        functools.partial(device_ragged.compile_speed, rehearse),
        device_ragged.measure_speed,
    )
    forward = [
        Task(f"n={n}, m={m}", functools.partial(compiled, *case), _measured)
        for case in cases
        for n, m, _ in [case]
    ]
    sizes = [(256, 16)] if rehearse else [(4096, 16), (4096, 256)]
    gradients = [
        Task(
            f"gradient, n={n}, m={m}",
            functools.partial(_compile_gradient, n, m, count, loops),
            _measure_gradient,
        )
        for n, m in sizes
    ]
    return [*forward, *gradients, experts]


def _measured(products: kernels.Products) -> Iterator[Row]:
    yield from products.measure(rounds=15, seconds=10.0)


class _Gradient(NamedTuple):
    """Products of the backward pass, compiled.

    Attributes:
      x: `[m, n]`.
      weights: one weight of each kind.
      calls: functions that run all products of a kind, by kind.
      per_call: products of a call.
    """

    x: jax.Array
    weights: dict[str, jaxq.QTensor]
    calls: dict[str, Callable[[], Any]]
    per_call: int


def _compile_gradient(n: int, m: int, count: int, loops: int) -> _Gradient:
    weights, dense = _weights(n, ("int4", "nf4"), count)
    x = jax.random.normal(jax.random.key(m), (m, n), jnp.bfloat16)
    stacks: dict[str, list] = {"bfloat16": dense, **weights}
    calls = {
        name: kernels.loop(lambda x, w: x @ w.T, x, stack, loops)
        for name, stack in stacks.items()
    }
    first = {name: stack[0] for name, stack in weights.items()}
    return _Gradient(x, first, calls, count * loops)


def _measure_gradient(products: _Gradient) -> Iterator[Row]:
    x, (m, n) = products.x, products.x.shape
    times_of = interleaved(products.calls, rounds=15, seconds=8.0)
    for name, times in summary(times_of, "bfloat16").items():
        row = {
            "what": f"{name}, gradient",
            "kernel": "dense",
            "m": m,
            "n": n,
            "us": 1e3 * times["median_ms"] / products.per_call,
            "speedup": 1 / times["time_over_base"],
        }
        if name in products.weights:
            qt = products.weights[name].T
            w = np.asarray(jaxq.dequantize(qt, dtype=jnp.float32), np.float64)
            exact = np.asarray(x, np.float64) @ w
            y = np.asarray(jax.jit(jaxq.matmul)(x, qt), np.float64)
            row["kernel"] = jaxq.explain(x, qt).kernel
            row["error"] = float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
        yield row


def _torch(rehearse: bool) -> list[Task]:
    sizes = [(256, 16)] if rehearse else [(n, m) for n, m in SIZES if m in (1, 16, 256)]
    count, loops = (2, 1) if rehearse else (NUM_WEIGHTS, LOOPS)

    def compiled(n: int, m: int) -> kernels.Products:
        _, dense = _weights(n, (), count)
        return kernels.Products(m, n, {}, dense, loops)

    def measured(n: int, m: int, products: kernels.Products) -> Iterator[Row]:
        # CUDA graphs are captured here, because nothing else may run meanwhile.
        calls = kernels.others(m, n, count, loops)
        if not calls:
            raise RuntimeError("torch with CUDA is not installed")
        products.calls |= calls
        yield from products.measure(rounds=15, seconds=6.0)

    return [
        Task(
            f"n={n}, m={m}",
            functools.partial(compiled, n, m),
            functools.partial(measured, n, m),
        )
        for n, m in sizes
    ]


# Stage E.


def _tiles(rehearse: bool) -> list[Task]:
    kernel, choices, n = "mosaic_gpu", TILES, 4096
    if rehearse:
        kernel, choices, n = "triton", {"splits": (1, 2)}, 64
    elif kernel not in kernels_for(_platform(), "product"):
        return [Task("other tiles", lambda: None, _no_tiles)]
    candidates = [
        dict(zip(choices, values, strict=True))
        for values in itertools.product(*choices.values())
    ]
    made = []
    for codes, group in (("int4", 128), ("codebook4", 64)):
        problem = tune.make_problem(codes, group, 16, kernels.K, n, kernel)
        for at in range(0, len(candidates), TILES_AT_ONCE):
            some = candidates[at : at + TILES_AT_ONCE]
            name = f"{codes}, tiles {at} to {at + len(some) - 1}"
            compiled = functools.partial(
                _compile_tiles, kernel, problem, some, rehearse
            )
            made.append(Task(name, compiled, _measure_tiles))
    return made


def _no_tiles(_: Any) -> Iterator[Row]:
    yield {"note": "this stage needs a GPU of the Hopper generation"}


@functools.cache
def _operands(
    kernel: str, problem: Problem, count: int
) -> tuple[list[tuple], np.ndarray]:
    """Operands as the kernel reads them, and the exact product of the first ones."""
    operands = [tune.random_operands(problem, seed) for seed in range(count)]
    exact = tune.exact_product(problem, operands[0])
    return [tune.as_kernel_reads(kernel, arrays) for arrays in operands], exact


def _compile_tiles(
    kernel: str, problem: Problem, candidates: list[Row], rehearse: bool
) -> tuple[dict, list[Row]]:
    """Compiled calls by tiles, and rows for tiles that do not work."""
    module = kernel_module(kernel)
    with _one_at_a_time:
        operands, exact = _operands(kernel, problem, 2 if rehearse else NUM_WEIGHTS)
    device = None if rehearse else jax.devices()[0].device_kind
    own = dict(module.default_tiles(problem, device))
    calls, failed = {}, []
    for tiles in (own, *({**own, **change} for change in candidates)):
        product = functools.partial(
            module.matmul, problem=problem, tiles=tiles, interpret=rehearse
        )
        try:
            y = np.asarray(jax.jit(product)(*operands[0]), np.float64)
            error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
            if not error <= LARGEST_ERROR:
                raise ValueError(f"wrong by {error:.2g}")
            calls[str(tiles)] = tune.loop_over(product, operands)
        except Exception as problem_found:
            # The compiler may refuse tiles. The others are measured all the same.
            failed.append({"tiles": tiles, "failure": str(problem_found)[:200]})
    return calls, failed


def _measure_tiles(compiled: tuple[dict, list[Row]]) -> Iterator[Row]:
    calls, failed = compiled
    yield from failed
    if not calls:
        return
    figures = summary(interleaved(calls, rounds=9, seconds=8.0), next(iter(calls)))
    for tiles, times in figures.items():
        ratio = times["time_over_base"]
        yield {"tiles": tiles, "ms": times["median_ms"], "time_over_own": ratio}


# Stage F.


def _counters(rehearse: bool) -> list[Task]:
    return [
        Task(codes, lambda: None, functools.partial(_profile, codes, rehearse))
        for codes in ("int4", "codebook4")
    ]


def _profile(codes: str, rehearse: bool, _: Any) -> Iterator[Row]:
    """Runs a product under ncu, and yields the counters of each of its launches."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise RuntimeError("ncu is not installed")
    own = [sys.executable, __file__, codes]
    options = ["--clock-control", "none", "--csv", "--metrics", ",".join(COUNTERS)]
    result = subprocess.run(
        [ncu, *options, *own], capture_output=True, text=True, timeout=60, check=False
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith('"')]
    if not lines:
        raise RuntimeError((result.stdout + result.stderr)[-400:])
    launches: dict[str, Row] = {}
    for line in csv.DictReader(lines):
        launch = launches.setdefault(line["ID"], {"launch": line["Kernel Name"]})
        launch[line["Metric Name"]] = f"{line['Metric Value']} {line['Metric Unit']}"
    yield from launches.values()


def profiled_product(codes: str) -> None:
    """One product of the Hopper kernel. Its operands come from the host."""
    group = {"int4": 128, "codebook4": 64}[codes]
    problem = tune.make_problem(codes, group, 16, kernels.K, 14336, "mosaic_gpu")
    module = kernel_module("mosaic_gpu")
    tiles = module.default_tiles(problem, jax.devices()[0].device_kind)
    product = jax.jit(functools.partial(module.matmul, problem=problem, tiles=tiles))
    operands = tune.as_kernel_reads("mosaic_gpu", tune.random_operands(problem, 0))
    jax.block_until_ready(product(*operands))


if __name__ == "__main__":
    profiled_product(sys.argv[1])
