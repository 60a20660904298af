"""Attention over the quantized groups of a KV cache, as a jax primitive.

The primitive gives the state of an online softmax after all quantized groups. The
caller adds the tokens in full precision to this state. When jax lowers a program for a
platform, the primitive becomes a Pallas kernel of this platform or the XLA form. The
caller supplies the XLA form.

| transformation | rule |
|---|---|
| lowering | a kernel of the platform, or the XLA form if no kernel is chosen |
| vmap | the mapped axis joins the slots |
| derivatives | those of the XLA form |
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from jaxq.kernels._attention_problem import AttentionProblem
from jaxq.kernels._devices import assumed_gpu, lowering_devices
from jaxq.kernels._dispatch import Choice, FallbackWarning
from jaxq.kernels._operands import varying_alike

# The kernel of each platform, and the module that contains it.
_KERNELS = {"tpu": "attention_tpu", "cuda": "attention_triton"}

# (top, total, sums), float32: `[b, m, n]`, the same, and `[b, m, n, h]`.
State = tuple[jax.Array, jax.Array, jax.Array]

# `attention_p(q, positions, tokens, num_places, *leaves)`.
attention_p = Primitive("quantized_attention")
attention_p.multiple_results = True


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """Static facts of one attention over quantized groups.

    Attributes:
      form: the XLA form, `form(q, positions, tokens, num_places, *leaves) -> State`. It
        is compared by value.
      problem: the attention as kernels see it, or the reason why no kernel computes it.
        Its leaves are then the codes and scales of keys, and those of values.
    """

    form: Callable[..., State]
    problem: AttentionProblem | str


def call_attention(*operands: jax.Array, call: AttentionCall) -> State:
    """Computes the softmax state of queries over the quantized groups of a cache.

    Args:
      *operands: q `[b, m, n, h]`; positions int32 `[b, n]` of the queries; tokens int32
        `[b, groups, group]`, the position of each stored token, negative for tokens
        that are not read; num_places int32 `[b]`, such that later places of a slot have
        no tokens to read; and the leaves of the cache, each `[b, m, groups, ...]`.
      call: static facts.
    """
    meshes = [jax.typeof(operand).sharding.mesh for operand in operands]
    if any(AxisType.Explicit in mesh.axis_types for mesh in meshes if not mesh.empty):
        # The XLA form states the sharding of each of its results.
        return call.form(*operands)
    top, total, sums = attention_p.bind(*varying_alike(operands), call=call)
    return top, total, sums


def choose_attention(
    problem: AttentionProblem | str, platform: str, num_devices: int = 1
) -> Choice:
    """Chooses the kernel for a platform, by static facts alone.

    Args:
      problem: the attention, or the reason why no kernel computes it.
      platform: "cpu", "tpu", "cuda", ...
      num_devices: number of devices over which XLA partitions the program.
    """
    if platform not in _KERNELS:
        return Choice("xla", f"there are no attention kernels for {platform}")
    if isinstance(problem, str):
        return Choice("xla", problem)
    if num_devices > 1:
        return Choice(
            "xla",
            f"XLA partitions this program for {num_devices} devices and cannot "
            "partition a kernel; inside jax.shard_map a kernel runs on each device",
        )
    name = _KERNELS[platform]
    reason = _kernel_module(name).why_not(problem)
    return Choice("xla" if reason else name, reason)


def attention_kernel_form(
    *operands: jax.Array,
    call: AttentionCall,
    kernel: str,
    interpret: bool = False,
    **tiles: int,
) -> State:
    """Computes what `call_attention` computes by a kernel.

    Args:
      *operands: as for `call_attention`.
      call: static facts. `call.problem` must be a problem that the kernel accepts.
      kernel: name of the kernel.
      interpret: True to run the kernel's interpreter, on any platform.
      **tiles: sizes that replace those of the kernel's `default_tiles`.
    """
    q, positions, tokens, num_places, *leaves = operands
    keys, key_scale, values, value_scale = leaves
    problem, module = call.problem, _kernel_module(kernel)
    assert isinstance(problem, AttentionProblem), problem
    p = problem
    top, total, sums = module.read_groups(
        q,
        positions,
        tokens,
        num_places,
        keys.reshape(p.b, p.m, p.groups, p.rows, p.h),
        key_scale.reshape(p.b, p.m, p.groups, p.h),
        values.reshape(p.b, p.m, p.groups, p.rows, p.h),
        value_scale.reshape(p.b, p.m, p.groups, p.rows, p.parts),
        problem=p,
        tiles=module.default_tiles(p) | tiles,
        interpret=interpret,
    )
    return _merge_splits(top, total, sums)


def _merge_splits(top: jax.Array, total: jax.Array, sums: jax.Array) -> State:
    """Merges the softmax states of the splits, which are on axis 2."""
    largest = jnp.max(top, axis=2)
    share = jnp.exp(top - largest[:, :, None])  # [b, m, splits, n]
    merged_total = jnp.sum(total * share, axis=2)
    return largest, merged_total, jnp.sum(sums * share[..., None], axis=2)


def _kernel_module(name: str) -> ModuleType:
    """The module of a kernel. The import is late because Pallas is slow to import."""
    return importlib.import_module(f"jaxq.kernels._{name}")


def attention_xla_form(*operands: jax.Array, call: AttentionCall) -> State:
    """Computes what `call_attention` computes in plain XLA."""
    return call.form(*operands)


# Rules of the primitive.


def _abstract(q, *operands, call: AttentionCall):
    del operands, call
    b, m, n, h = q.shape
    per_query, per_channel = (
        q.update(shape=shape, dtype=jnp.dtype(jnp.float32), weak_type=False)
        for shape in ((b, m, n), (b, m, n, h))
    )
    return [per_query, per_query, per_channel]


@functools.partial(jax.jit, static_argnames="call")
def _run(*operands, call: AttentionCall):
    return attention_p.bind(*operands, call=call)


def _evaluate(*operands, call: AttentionCall):
    # The primitive can only be lowered and compiled.
    with jax.disable_jit(False):
        return _run(*operands, call=call)


def _lower(ctx, *operands, call: AttentionCall, platform: str | None):
    """Lowers the primitive for one platform; None is every platform without kernels."""
    with assumed_gpu(platform, ctx.avals_in), warnings.catch_warnings():
        form = functools.partial(attention_xla_form, call=call)
        if platform is not None:
            _, num_devices = lowering_devices(ctx, platform)
            choice = choose_attention(call.problem, platform, num_devices)
            if choice.reason is None:
                form = functools.partial(
                    attention_kernel_form, call=call, kernel=choice.backend
                )
            else:
                _warn(platform, choice.reason)
        # A user who reads a cache cannot act on this warning.
        warnings.filterwarnings(
            "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
        )
        return mlir.lower_fun(form, multiple_results=True)(ctx, *operands)


def _warn(platform: str, reason: str) -> None:
    warnings.warn(
        f"No kernel runs for attention over a quantized KV cache on {platform}, so XLA "
        f"computes it: {reason}.",
        FallbackWarning,
        stacklevel=3,
    )


def _jvp(primals, tangents, *, call: AttentionCall):
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    primals_out, tangents_out = jax.jvp(call.form, tuple(primals), tuple(tangents))
    return list(primals_out), list(tangents_out)


def _batch(operands: Sequence[jax.Array], dims, *, call: AttentionCall):
    size = next(
        x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None
    )

    def merge(x: jax.Array, dim: int | None) -> jax.Array:
        """`[v, b, ...]` as `[v * b, ...]`."""
        if dim is None:
            front = jnp.broadcast_to(x[None], (size, *x.shape))
        else:
            front = jnp.moveaxis(x, dim, 0)
        return front.reshape(-1, *front.shape[2:])

    merged = [merge(x, dim) for x, dim in zip(operands, dims, strict=True)]
    problem = call.problem
    if isinstance(problem, AttentionProblem):
        problem = dataclasses.replace(problem, b=problem.b * size)
    call = dataclasses.replace(call, problem=problem)
    state = attention_p.bind(*varying_alike(merged), call=call)
    return [x.reshape(size, -1, *x.shape[1:]) for x in state], [0, 0, 0]


attention_p.def_abstract_eval(_abstract)
attention_p.def_impl(_evaluate)
batching.primitive_batchers[attention_p] = _batch
ad.primitive_jvps[attention_p] = _jvp
mlir.register_lowering(attention_p, functools.partial(_lower, platform=None))
for _platform in _KERNELS:
    mlir.register_lowering(
        attention_p, functools.partial(_lower, platform=_platform), platform=_platform
    )
