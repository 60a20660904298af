"""Looks for the fastest tiles of the kernels and writes them to jaxq/kernels/tiles.json, with where they are from.

    python benchmarks/tune.py                     # on this machine's accelerator: k = 4096, n = 4096 and 14336
    python benchmarks/tune.py --codes int4 --k 8192 --n 8192 --m 1 16
    python benchmarks/tune.py --topology v6e:2x2  # for a TPU that is not there: needs libtpu, see schedule.py

Entries of other devices stay. On an accelerator every candidate is checked against float64 before it is timed; the time
is that of a loop over enough weights to defeat the caches, the candidates in turns ("measured"). Without one, TPU tiles
are ranked by the compiler's schedule ("schedule"), and never replace measured ones.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from schedule import Schedules
from timing import interleaved, summary

from jaxq import kernels
from jaxq.kernels import _tiles

TABLE = Path(_tiles.__file__).with_name("tiles.json")
CODES = {
    "int4": 128,
    "uint4": 128,
    "codebook4": 64,
    "int8": None,
}  # with the group each is tuned for
BUCKETS = (16, 64, 128, 256)
CACHE_BYTES = 256 * 2**20


def candidates(
    name: str, problem: kernels.Problem, device: str | None
) -> Iterator[dict[str, Any]]:
    """The kernel's own tiles, and what is near them."""
    own = dict(_tiles.kernel(name).default_tiles(problem, device))
    yield own
    bodies = ("select", "gather") if problem.codebook else ("pre", "post")
    choices: dict[str, tuple] = {
        "tpu": {"bk": (1024, 2048, 4096), "bn": (256, 512, 1024), "body": bodies},
        "mosaic_gpu": {
            "bk": (64, 128),
            "warpgroups": (1, 2),
            "stages": (3, 4, 6),
            "splits": (1, 2, 4, 8),
        },
        "triton": {
            "bn": (32, 64, 128),
            "splits": (1, 2, 4, 8),
            "warps": (4, 8),
            "stages": (2, 3, 4),
        },
    }[name]
    seen = [own]
    for values in itertools.product(*choices.values()):
        tiles = own | dict(zip(choices, values, strict=True))
        if set(tiles) == set(own) and tiles not in seen:
            seen.append(tiles)
            yield tiles


def make_problem(
    codes: str, group: int | None, m: int, k: int, n: int, layout: str
) -> kernels.Problem:
    return kernels.Problem(
        e=1,
        m=m,
        k=k,
        n=n,
        bits=8 if codes.endswith("8") else 4,
        signed=codes.startswith("int"),
        codebook=codes.startswith("codebook"),
        group=group or k,
        zero_point=codes.startswith("uint"),
        layout=layout,  # pyright: ignore[reportArgumentType]
        x_dtype="bfloat16",
        scale_dtype="bfloat16",
        out_dtype="bfloat16",
    )


def arrays(problem: kernels.Problem, seed: int) -> tuple[jax.Array, ...]:
    """Random x, data, scale, zero point and codebook for a problem, on the device."""
    p, rng = problem, np.random.default_rng(seed)
    width = p.k * p.bits // 8
    data = rng.integers(
        0, 256, (1, p.n, width) if p.layout == "rows" else (1, width, p.n), np.uint8
    )
    scales = (1, p.num_groups, p.n)
    zero = rng.integers(0, 2**p.bits, scales).astype(np.uint8)
    made = (
        jnp.asarray(rng.standard_normal((1, p.m, p.k)), jnp.bfloat16),
        jnp.asarray(data.view(np.int8) if p.bits == 8 and p.signed else data),
        jnp.asarray(rng.uniform(0.5, 1.5, scales), jnp.bfloat16),
        jnp.asarray(zero) if p.zero_point else None,
        jnp.asarray(np.sort(rng.standard_normal((1, 16))), jnp.float32)
        if p.codebook
        else None,
    )
    return jax.tree.map(jax.device_put, made)


def expected(problem: kernels.Problem, made: tuple) -> np.ndarray:
    """The product in float64."""
    p = problem
    x, data, scale, zero, codebook = (
        None if a is None else np.asarray(a)[0] for a in made
    )
    assert x is not None
    assert data is not None
    assert scale is not None
    data = (
        data.view(np.uint8)
        if p.layout == "rows"
        else np.ascontiguousarray(data.view(np.uint8).T)
    )
    codes = (
        np.stack([data & 15, data >> 4], -1).reshape(p.n, p.k) if p.bits == 4 else data
    )
    codes = codes.astype(np.int32)
    if p.signed:
        codes -= (codes >= 2 ** (p.bits - 1)) * 2**p.bits
    numbers = codebook[codes] if codebook is not None else codes.astype(np.float64)
    if zero is not None:
        numbers = numbers - np.repeat(zero.T.astype(np.float64), p.group, 1)
    return (
        x.astype(np.float64)
        @ (numbers * np.repeat(scale.T.astype(np.float64), p.group, 1)).T
    )


def loop(product: Callable, weights: list[tuple]) -> Callable[[], Any]:
    """All weights, several times, in one program."""

    @jax.jit
    def program(x, weights):
        def body(_, x):
            for w in weights:
                y = product(x, *w)
                y = jnp.pad(y, ((0, 0), (0, 0), (0, max(0, x.shape[2] - y.shape[2]))))[
                    ..., : x.shape[2]
                ]
                x = x + y * jnp.bfloat16(1e-30)
            return x

        return jax.lax.fori_loop(0, 8, body, x)

    x, rest = weights[0][0], [w[1:] for w in weights]
    return lambda: jax.block_until_ready(program(x, rest))


def tune(name: str, problem: kernels.Problem, device: str) -> dict[str, Any] | None:
    """The table's entry for a problem, or None where the kernel does not serve it."""
    module = _tiles.kernel(name)
    if module.why_not(problem, device) is not None:
        return None
    count = max(2, CACHE_BYTES // (problem.k * problem.n * problem.bits // 8))
    weights = [arrays(problem, seed) for seed in range(count)]
    exact, calls, found = expected(problem, weights[0]), {}, {}
    for tiles in candidates(name, problem, device):
        label = json.dumps(tiles)

        def product(*made, tiles=tiles):
            return module.matmul(*made, problem=problem, tiles=tiles)

        try:
            y = np.asarray(jax.jit(product)(*weights[0])[0], np.float64)
        except (
            Exception
        ) as error:  # the compiler refuses: too large, or not for this body
            print(f"  {label}: {str(error).splitlines()[0][:90]}")
            continue
        if np.linalg.norm(y - exact) > 5e-3 * np.linalg.norm(exact):
            print(
                f"  {label}: WRONG by {np.linalg.norm(y - exact) / np.linalg.norm(exact):.2g}"
            )
            continue
        calls[label], found[label] = loop(product, weights), tiles
    if not calls:
        return None
    figures = summary(interleaved(calls, rounds=7, seconds=10.0), next(iter(calls)))
    best = min(figures, key=lambda label: figures[label]["median_ms"])
    us = 1e3 * figures[best]["median_ms"] / 8 / count
    print(
        f"{name} {problem.codes} m={problem.m} n={problem.n}: {best}, {us:.1f} us",
        flush=True,
    )
    return _entry(
        name, device, problem, found[best], {"source": "measured", "us": round(us, 2)}
    )


def rank(
    schedules: Schedules, problem: kernels.Problem, known: dict[str, int]
) -> dict[str, Any] | None:
    """The table's entry for a problem by the compiler's schedule; `known` keeps the bundles of tiles seen before."""
    module, p, device = _tiles.kernel("tpu"), problem, schedules.device_kind
    if module.why_not(p, device) is not None:
        return None
    specs = [
        None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype)
        for a in jax.eval_shape(lambda: arrays(p, 0))
    ]
    figures = {}
    for tiles in candidates("tpu", p, device):
        label = json.dumps(tiles)
        key = f"{p.codes} {p.group} {p.m} {label}"
        if key not in known:
            try:
                known[key] = schedules.bundles(
                    functools.partial(module.matmul, problem=p, tiles=tiles), specs
                )
            except (
                Exception
            ) as error:  # the compiler refuses: too large, or not for this body
                print(f"  {label}: {str(error).splitlines()[0][:90]}")
                known[key] = 0
        if known[key]:
            figures[label] = schedules.cycles(p, tiles, known[key])
    own, best = next(iter(figures)), min(figures, key=lambda label: figures[label])
    (cycles, reading), rule = figures[best], figures[own][0]
    print(
        f"{device} {p.codes} m={p.m} n={p.n}: {best}, {cycles} cycles, {reading} for reading, {rule} by rule",
        flush=True,
    )
    return _entry(
        "tpu",
        device,
        p,
        json.loads(best),
        {"source": "schedule", "cycles": cycles, "hbm_cycles": reading},
    )


def _entry(
    name: str,
    device: str,
    p: kernels.Problem,
    tiles: dict[str, Any],
    found: dict[str, Any],
) -> dict[str, Any]:
    key = {
        "kernel": name,
        "device": device,
        "codes": p.codes,
        "x": p.x_dtype,
        "group": p.group,
    }
    return key | {"m": p.m, "k": p.k, "n": p.n, "tiles": tiles} | found


def _key(entry: dict[str, Any]) -> str:
    return json.dumps(
        [
            entry[name]
            for name in ("kernel", "device", "codes", "x", "group", "m", "k", "n")
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codes", nargs="+", choices=CODES, default=list(CODES))
    parser.add_argument("--m", nargs="+", type=int, default=list(BUCKETS))
    parser.add_argument("--k", nargs="+", type=int, default=[4096])
    parser.add_argument("--n", nargs="+", type=int, default=[4096, 14336])
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=None,
        help="default: the first kernel of this platform",
    )
    parser.add_argument(
        "--topology",
        help="rank tiles for this TPU, such as v6e:2x2, by the compiler's schedule",
    )
    args = parser.parse_args()
    schedules = Schedules(args.topology) if args.topology else None
    platform = (
        {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        if schedules is None
        else "tpu"
    )
    if platform not in kernels.KERNELS:
        parser.exit(
            1,
            f"There are no kernels for {platform}: nothing to time. See --topology.\n",
        )
    device = (
        jax.devices()[0].device_kind if schedules is None else schedules.device_kind
    )
    layout = "columns" if platform == "tpu" else "rows"
    table, known = {_key(entry): entry for entry in _tiles.table()}, {}
    for name in args.kernels or kernels.KERNELS[platform][:1]:
        for codes, m, k, n in itertools.product(args.codes, args.m, args.k, args.n):
            problem = make_problem(codes, CODES[codes], _tiles.bucket(m), k, n, layout)
            entry = (
                tune(name, problem, device)
                if schedules is None
                else rank(schedules, problem, known)
            )
            if entry is None or (
                schedules and table.get(_key(entry), entry)["source"] == "measured"
            ):
                continue
            table[_key(entry)] = entry
            text = ",\n ".join(json.dumps(e) for e in table.values())
            TABLE.write_text(
                f"[{text}]\n"
            )  # after every problem: a run may be cut short
    if schedules:
        schedules.close()


if __name__ == "__main__":
    main()
