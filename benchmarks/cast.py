"""Speed of rounding: float8 casts beside torch, and stochastic rounding beside nearest.

The array has 16 M float32 numbers. "cast" gives float32. "encode" gives one-byte codes.
"quantize" gives codes and one scale per tensor. In torch this is the usual sequence:
absolute maximum, division, clamp, cast. The process keeps freed memory. A plain encode
is limited by memory: most of its time is the time to read the array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Times, interleaved, summary

import jaxq
from jaxq import formats

SIZE = 1 << 24
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
TARGETS = {"float8": 3.0, "stochastic": 2.0}
Functions = dict[str, Callable[[], Any]]


def run() -> dict[str, Any]:
    """Times all functions, and checks the numbers against torch."""
    x = np.random.default_rng(0).standard_normal(SIZE, np.float32)
    functions = _jaxq_functions(jnp.asarray(x))
    missing = []
    try:
        functions |= _torch_functions(x)
    except ImportError as error:
        missing.append(f"torch ({error})")
    times = interleaved(functions, rounds=15, seconds=60)
    rows = []
    for name in FLOAT8:
        for function, peer in (
            (f"jaxq cast {name}", f"torch to {name} and back"),
            (f"jaxq encode {name}", f"torch to {name}"),
            (f"jaxq quantize {name}", f"torch scale, to {name}"),
        ):
            if peer in times:
                target = f"at least {TARGETS['float8']:g}x"
                rows.append(_row(times, function, peer, target))
    nearest, stochastic = "jaxq cast bfloat16", "jaxq cast bfloat16, stochastic"
    target = f"at most {TARGETS['stochastic']:g}x"
    rows.append(_row(times, nearest, stochastic, target))
    return {"elements": SIZE, "rows": rows, "missing": missing}


def _jaxq_functions(x: jax.Array) -> Functions:
    functions: Functions = {}

    def add(name: str, function: Callable[..., Any], *arguments: Any) -> None:
        compiled = jax.jit(function)
        functions[name] = lambda: jax.block_until_ready(compiled(*arguments))

    for name in FLOAT8:
        spec = jaxq.QuantSpec(name, jaxq.PerTensor())
        add(f"jaxq cast {name}", lambda x, name=name: jaxq.cast(x, name), x)
        add(f"jaxq encode {name}", formats.get(name).encode, x)
        add(f"jaxq quantize {name}", lambda x, spec=spec: jaxq.quantize(x, spec), x)
    add("jaxq cast bfloat16", lambda x: jaxq.cast(x, "bfloat16"), x)
    add(
        "jaxq cast bfloat16, stochastic",
        lambda x, key: jaxq.cast(x, "bfloat16", rounding="stochastic", key=key),
        x,
        jax.random.key(0),
    )
    return functions


def _torch_functions(x: np.ndarray) -> Functions:
    """The same in torch. Checks that both libraries cast to the same numbers."""
    import torch

    tensor = torch.from_numpy(x)
    functions: Functions = {}
    for name in FLOAT8:
        dtype, largest = getattr(torch, name), formats.get(name).max

        def to(dtype=dtype):
            return tensor.to(dtype)

        def to_and_back(dtype=dtype):
            return tensor.to(dtype).to(torch.float32)

        def scale_to(dtype=dtype, largest=largest):
            scale = tensor.abs().amax() / largest
            return (tensor / scale).clamp(-largest, largest).to(dtype)

        functions[f"torch to {name}"] = to
        functions[f"torch to {name} and back"] = to_and_back
        functions[f"torch scale, to {name}"] = scale_to
        values = np.asarray(jaxq.cast(jnp.asarray(x), name))
        np.testing.assert_array_equal(values, to_and_back().numpy())
    return functions


def _row(times: Times, function: str, peer: str, target: str) -> dict[str, Any]:
    figures = summary({name: times[name] for name in (function, peer)}, function)
    return {
        "function": function,
        "beside": peer,
        "ms": figures[function]["median_ms"],
        "beside_ms": figures[peer]["median_ms"],
        "ratio": figures[peer]["time_over_base"],
        "target": target,
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    lines = [
        "| function | ms | beside | ms | ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['function']} | {row['ms']:.1f} | {row['beside']} "
            f"| {row['beside_ms']:.1f} | {row['ratio']:.2f}x | {row['target']} |"
        )
    return "\n".join(lines)
