"""Speed of rounding: float8 casts beside torch's, and what stochastic rounding costs beside a plain cast.

16 M float32 numbers. "cast" gives float32, "encode" one-byte codes, "quantize" codes and one scale a tensor (for
torch: absolute maximum, division, clamp, cast, as one writes it). Freed memory is kept by the process on both sides.
A plain encode is bound by memory: reading alone takes most of its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, summary

import jaxq
from jaxq import formats

SIZE = 1 << 24
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
TARGETS = {"float8": 3.0, "stochastic": 2.0}


def run() -> dict[str, Any]:
    """Times everything, checks the numbers against torch, and returns the figures."""
    x = np.random.default_rng(0).standard_normal(SIZE, np.float32)
    array, key = jnp.asarray(x), jax.random.key(0)
    functions: dict[str, Callable[[], Any]] = {}
    for name in FLOAT8:
        fmt = formats.get(name)
        cast, encode = jax.jit(lambda x, n=name: jaxq.cast(x, n)), jax.jit(fmt.encode)
        functions[f"jaxq cast {name}"] = lambda cast=cast: cast(
            array
        ).block_until_ready()
        functions[f"jaxq encode {name}"] = lambda encode=encode: encode(
            array
        ).block_until_ready()
        spec = jaxq.QuantSpec(name, jaxq.PerTensor())
        quantize = jax.jit(lambda x, spec=spec: jaxq.quantize(x, spec))
        functions[f"jaxq quantize {name}"] = lambda quantize=quantize: (
            jax.block_until_ready(quantize(array))
        )
    missing = []
    try:
        import torch

        tensor = torch.from_numpy(x)
        for name in FLOAT8:
            dtype = getattr(torch, name)
            functions[f"torch to {name}"] = lambda dtype=dtype: tensor.to(dtype)
            functions[f"torch to {name} and back"] = lambda dtype=dtype: tensor.to(
                dtype
            ).to(torch.float32)
            largest = formats.get(name).max
            functions[f"torch scale, to {name}"] = lambda dtype=dtype, largest=largest: (
                (tensor / (tensor.abs().amax() / largest))
                .clamp(-largest, largest)
                .to(dtype)
            )
            ours = np.asarray(jaxq.cast(array, name))
            np.testing.assert_array_equal(
                ours, tensor.to(dtype).to(torch.float32).numpy()
            )
    except ImportError as error:
        missing.append(f"torch ({error})")
    plain = jax.jit(lambda x: jaxq.cast(x, "bfloat16"))
    stochastic = jax.jit(
        lambda x, key: jaxq.cast(x, "bfloat16", rounding="stochastic", key=key)
    )
    functions["jaxq cast bfloat16"] = lambda: plain(array).block_until_ready()
    functions["jaxq cast bfloat16, stochastic"] = lambda: stochastic(
        array, key
    ).block_until_ready()
    times = interleaved(functions, rounds=15, seconds=60)
    rows = []
    for name in FLOAT8:
        for ours, theirs in (
            (f"jaxq cast {name}", f"torch to {name} and back"),
            (f"jaxq encode {name}", f"torch to {name}"),
            (f"jaxq quantize {name}", f"torch scale, to {name}"),
        ):
            if theirs in times:
                rows.append(_row(times, ours, theirs, "at least", TARGETS["float8"]))
    rows.append(
        _row(
            times,
            "jaxq cast bfloat16",
            "jaxq cast bfloat16, stochastic",
            "at most",
            TARGETS["stochastic"],
        )
    )
    return {"elements": SIZE, "rows": rows, "missing": missing}


def _row(times, ours: str, theirs: str, relation: str, target: float) -> dict[str, Any]:
    found = summary({name: times[name] for name in (ours, theirs)}, ours)
    return {
        "function": ours,
        "beside": theirs,
        "ms": found[ours]["median_ms"],
        "beside_ms": found[theirs]["median_ms"],
        "ratio": found[theirs]["time_over_base"],
        "target": f"{relation} {target:g}x",
    }


def table(result: dict[str, Any]) -> str:
    """The figures as markdown."""
    lines = [
        "| function | ms | beside | ms | ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['function']} | {row['ms']:.1f} | {row['beside']} | {row['beside_ms']:.1f} | {row['ratio']:.2f}x "
            f"| {row['target']} |"
        )
    return "\n".join(lines)
