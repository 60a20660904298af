"""Programs of device.py that quantize activations or read a quantized KV cache.

Each program is what a user writes. It also runs on the machine's CPU, in plain XLA, and
the two results are compared. The tests of jaxq compare plain XLA with float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq import PerBlock, PerGroup, PerToken, QuantSpec


class Program(NamedTuple):
    """A compiled program, and the result that it should have.

    Attributes:
      into: `into(out, *operands)` computes the result into the memory of `out`.
      operands: the operands on the device.
      exact: the expected result. The same program computed it on the CPU.
      is_poisoned: the result uses the memory of `out`, which is full of NaN. So a
        number that the kernel does not write is NaN.
      out_dtype: the dtype of the result.
    """

    into: Callable[..., jax.Array]
    operands: tuple
    exact: np.ndarray
    is_poisoned: bool
    out_dtype: str = "float32"


# By name: the spec of the weight, and the spec of the activation.
PRODUCTS: dict[str, tuple[str | QuantSpec, QuantSpec]] = {
    "int8 by int8, one scale per row": ("int8", QuantSpec("int8", PerToken())),
    "int4 by int8, groups of the weight": ("int4", QuantSpec("int8", PerToken())),
    "float8 by float8, blocks": (
        QuantSpec("float8_e4m3fn", PerBlock((128, 128))),
        QuantSpec("float8_e4m3fn", PerGroup(128)),
    ),
    "int4 by float8, groups": ("int4", QuantSpec("float8_e4m3fn", PerGroup(128))),
    "int4 by float8, one scale per row": (
        "int4",
        QuantSpec("float8_e4m3fn", PerToken()),
    ),
    "nf4 by float8, one scale per row": (
        "nf4",
        QuantSpec("float8_e4m3fn", PerToken()),
    ),
}
# The format of the cache, and the number of queries: 1 as in a decode step, 64 as in a
# prompt.
CACHES = [(name, t) for name in ("int8", "int4") for t in (1, 64)]


def names() -> list[str]:
    """The names of all programs."""
    attention = [f"attention over {name}, {t} queries" for name, t in CACHES]
    return [*PRODUCTS, *attention]


def compile_program(name: str, rehearse: bool) -> Program:
    """Compiles a program for the device, and runs it on the CPU.

    Raises:
      ValueError: no kernel runs on the device. The message says why.
    """
    function, operands, plan = _program(name, rehearse)
    cpu = jax.devices("cpu")[0]
    exact = jax.jit(function)(*jax.device_put(operands, cpu))
    if rehearse:
        return Program(
            lambda out, *operands: function(*operands), operands, _floats(exact), False
        )
    # XLA multiplies some codes itself. Then a kernel only quantizes the activation.
    if plan.kernel == "xla" and plan.activation_kernel in ("xla", None):
        raise ValueError(f"no kernel runs: {plan}")
    # The result is written to the memory of `out`, which is full of NaN.
    out = jax.ShapeDtypeStruct(exact.shape, exact.dtype)
    program = jax.jit(
        lambda out, *operands: function(*operands), donate_argnums=0, keep_unused=True
    )
    compiled = program.lower(out, *operands).compile()
    memory = compiled.memory_analysis()
    is_poisoned = memory is not None and memory.alias_size_in_bytes > 0
    return Program(compiled, operands, _floats(exact), is_poisoned)


def _program(name: str, rehearse: bool) -> tuple[Callable, tuple, jaxq.Plan]:
    """The function, its operands on the device, and the plan of its product."""
    if name in PRODUCTS:
        return _product(*PRODUCTS[name], rehearse)
    fmt, num_queries = CACHES[names().index(name) - len(PRODUCTS)]
    return _attention(fmt, num_queries, rehearse)


def _product(
    weight: str | QuantSpec, activation: QuantSpec, rehearse: bool
) -> tuple[Callable, tuple, jaxq.Plan]:
    size = 256 if rehearse else 2048
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((size, size)), jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((24, size)), jnp.bfloat16)
    qt = jaxq.quantize(w, weight).with_activation(activation)
    dims = (((1,), (0,)), ((), ()))

    def product(x: jax.Array, qt: jaxq.QTensor) -> jax.Array:
        return jaxq.dot_general(x, qt, dims, preferred_element_type=jnp.float32)

    return product, (x, qt), jaxq.explain(x, qt)


def _attention(
    fmt: str, num_queries: int, rehearse: bool
) -> tuple[Callable, tuple, jaxq.Plan]:
    length = 128 if rehearse else 4096
    rng = np.random.default_rng(0)
    cache = jaxq.ops.KVCache.empty(
        fmt, batch=2, num_heads=2, length=length, head_dim=128
    )
    k, v = jnp.asarray(rng.standard_normal((2, 2, length, 2, 128)), jnp.bfloat16)
    cache = cache.append(k, v, count=jnp.array([length, length // 2]))
    q = jnp.asarray(rng.standard_normal((2, num_queries, 8, 128)), jnp.bfloat16)

    def attend(q: jax.Array, cache: jaxq.ops.KVCache) -> jax.Array:
        return cache.attend(q).astype(jnp.float32)

    return attend, (q, cache), cache.explain(q)


def _floats(y: jax.Array) -> np.ndarray:
    return np.asarray(y, np.float64)
