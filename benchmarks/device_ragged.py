"""Programs of device.py for rows sorted by expert: their results and their speed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from kernels import loop
from timing import interleaved, summary

import jaxq
from jaxq.kernels import Call
from jaxq.kernels._call import with_leaves
from jaxq.kernels._ragged_primitive import ragged_kernel_form
from jaxq.ops._weight_rows import row_meta, weight_rows

Row = dict[str, Any]
# Rows of each expert. The first has experts without rows, as a decode step has. The
# second has many rows. In the third the last rows of x belong to no expert.
SIZES = {
    "decode": [0, 3, 0, 1, 0, 0, 8, 4],
    "prefill": [300, 7, 0, 129, 64, 500, 1, 23],
    "rows of no expert": [5, 0, 0, 20, 0, 0, 0, 0],
}
NUM_SPARE_ROWS = 7
PRESETS = ("int4", "nf4", "int8", "uint4")


class Product(NamedTuple):
    """A product and its exact result: `into(out, x, sizes)` overwrites `out`."""

    into: Callable[..., jax.Array]
    operands: tuple
    exact: np.ndarray
    is_poisoned: bool
    out_dtype: str = "bfloat16"


def cases(rehearse: bool) -> list[tuple[str, str]]:
    """Presets and names of sizes."""
    names = ["decode", "rows of no expert"] if rehearse else list(SIZES)
    presets = PRESETS[:2] if rehearse else PRESETS
    return [(preset, name) for preset in presets for name in names]


def compile_product(
    preset: str, sizes_name: str, kernel: str, rehearse: bool
) -> Product:
    """Compiles a product whose kernel is interpreted if `rehearse` is True."""
    sizes = SIZES[sizes_name]
    e, m, k, n = len(sizes), sum(sizes) + NUM_SPARE_ROWS, 1024, 1000
    if rehearse:
        k, n = 256, 136
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((e, k, n)), jnp.bfloat16)
    weights = jaxq.quantize(w, preset, contracting=-2, batch=0)
    x = jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16)
    exact = np.zeros((m, n))
    decoded = np.asarray(jaxq.dequantize(weights, dtype=jnp.float32), np.float64)
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        exact[rows] = np.asarray(x, np.float64)[rows] @ decoded[expert]
        start += size
    operands = (x, weights, jnp.asarray(sizes, jnp.int32))
    if rehearse:
        interpreted = functools.partial(_interpreted, kernel)
        return Product(
            lambda out, *operands: interpreted(*operands), operands, exact, False
        )
    plan = jaxq.explain(x, weights, group_sizes=operands[2])
    if plan.kernel != kernel:
        raise ValueError(f"no kernel runs: {plan.why_no_kernel}")
    # The result is written to the memory of `out`, which is full of NaN.
    out = jax.ShapeDtypeStruct(exact.shape, x.dtype)
    program = jax.jit(
        lambda out, *operands: jaxq.ops.ragged_dot(*operands),
        donate_argnums=0,
        keep_unused=True,
    )
    compiled = program.lower(out, *operands).compile()
    memory = compiled.memory_analysis()
    is_poisoned = memory is not None and memory.alias_size_in_bytes > 0
    return Product(compiled, operands, exact, is_poisoned)


def _interpreted(
    kernel: str, x: jax.Array, weights: jaxq.QTensor, sizes: jax.Array
) -> jax.Array:
    """The product by the kernel's interpreter."""
    rows = jax.vmap(lambda weight: weight_rows(weight)[0])(weights)
    call, leaves = with_leaves(Call(row_meta(weights.meta), (), "float32"), rows)
    operands = [array[None] for array in (x, sizes, *leaves)]
    y = ragged_kernel_form(*operands, call=call, kernel=kernel, interpret=True)
    return y[0].astype(x.dtype)


def compile_speed(rehearse: bool) -> tuple[dict[str, Callable], Row]:
    """Programs of a decode step: 16 rows reach 8 of 32 experts.

    Returns:
      (calls, facts). XLA's own product of bfloat16 weights is the call "bfloat16".
    """
    e, k, n, count, loops = (4, 256, 136, 1, 1) if rehearse else (32, 4096, 1536, 2, 8)
    sizes = jnp.zeros(e, jnp.int32).at[:: e // 4].set(4)
    x = jax.random.normal(jax.random.key(0), (16, k), jnp.bfloat16)
    if not rehearse:
        sizes = jnp.zeros(e, jnp.int32).at[::4].set(2)
    keys = jax.random.split(jax.random.key(1), count)
    dense = [jax.random.normal(key, (e, k, n), jnp.bfloat16) for key in keys]
    calls = {
        "bfloat16": loop(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, dense, loops)
    }
    kernel = ""
    for preset in ("int4", "nf4"):
        weights = [jaxq.quantize(w, preset, contracting=-2, batch=0) for w in dense]
        kernel = jaxq.explain(x, weights[0], group_sizes=sizes).kernel
        calls[preset] = loop(
            lambda x, w: jaxq.ops.ragged_dot(x, w, sizes), x, weights, loops
        )
    return calls, {"kernel": kernel, "m": 16, "n": n, "per_call": count * loops}


def measure_speed(compiled: tuple[dict[str, Callable], Row]) -> Iterator[Row]:
    calls, facts = compiled
    per_call = facts.pop("per_call")
    times_of = interleaved(calls, rounds=15, seconds=10.0)
    for name, times in summary(times_of, "bfloat16").items():
        row = {
            "what": f"experts {name}",
            **facts,
            "us": 1e3 * times["median_ms"] / per_call,
            "speedup": 1 / times["time_over_base"],
        }
        yield row | ({"kernel": "dense"} if name == "bfloat16" else {})
