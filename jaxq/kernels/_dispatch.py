"""Decides whether a Pallas kernel or the XLA form computes a product.

`choose` decides by static facts alone, for any platform, without a device. `decide` is
what the primitive asks when a program is lowered. `decide` does three more things. If
the caller names a kernel, it chooses that kernel. If the platform has kernels and none
of them runs, it warns. It also sets the size of the blocks in which the XLA form
decodes a weight. `bypasses_primitive` decides whether a call uses the primitive at all.

A program for several devices is partitioned by XLA. XLA cannot partition a kernel, so
the XLA form runs there. Inside `jax.shard_map` each device runs its own kernel.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxq.kernels._call import Call, problem_of
from jaxq.kernels._problem import Problem
from jaxq.kernels._registry import (
    EFFECTFUL_INTERPRETERS,
    KERNELS,
    kernel_module,
    kernels_for,
    platform_of,
)

# Number of rows of x from which the whole weight is decoded and multiplied densely. A
# GPU kernel decodes its weights again for every 64 to 256 rows of x. From some number
# of rows on, computing should take longer than reading the decoded weight. The numbers
# are estimates: no device has been measured yet.
_DENSE_FROM = {"mosaic_gpu": 512, "triton": 512, "triton_transposed": 512}
# Triton looks a codebook up by 15 selects. The machine code has 16 integer instructions
# for a weight. Twice that, for more than 64 rows, is predicted to take longer than to
# write and read the decoded weight. (`benchmarks/sass.py` counts the instructions.)
_DENSE_FROM_OF_CODEBOOKS = {"triton": 65, "triton_transposed": 65}
# Size in bytes of the decoded rows that the XLA form holds on an accelerator.
_ACCELERATOR_BLOCK_BYTES = 256 * 2**20
# A block size that no weight reaches. In a program for several devices a weight is
# decoded in one block, because XLA cannot partition a loop over blocks of rows. Each
# device decodes its part.
_WHOLE_WEIGHT = 2**62


class FallbackWarning(UserWarning):
    """A kernel for this platform exists but does not run. The message says why.

    Example:
      >>> import warnings
      >>> from jaxq import kernels
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore", kernels.FallbackWarning)
    """


class Choice(NamedTuple):
    """What computes a product on a platform.

    Attributes:
      backend: "xla" or the name of a kernel.
      reason: why no kernel runs, or None if one runs.
      preferred: True if the XLA form runs because it is expected to be faster, or
        because there is nothing to compute. There is no warning then.
      passed_over: kernels that come before the chosen one, and why they cannot compute
        the product.

    Example:
      >>> from jaxq.kernels import Choice
      >>> Choice("xla", "there are no kernels for cpu").backend
      'xla'
    """

    backend: str
    reason: str | None
    preferred: bool = False
    passed_over: str = ""


def choose(
    problem: Problem | str, platform: str, device_kind: str | None, num_devices: int = 1
) -> Choice:
    """Chooses the kernel that computes a product on a platform, by static facts alone.

    Args:
      problem: the product, or the reason why no kernel computes it, as `problem_of`
        returns it.
      platform: "cpu", "tpu", "cuda", ...
      device_kind: `jax.Device.device_kind`, or None if unknown.
      num_devices: number of devices over which XLA partitions the program.

    Returns:
      A `Choice`.

    Example:
      >>> from jaxq.kernels import Problem, choose
      >>> problem = Problem(e=1, m=16, k=4096, n=4096, bits=4, signed=True,
      ...                   codebook=False, group=128, zero_point=False, layout="rows",
      ...                   x_dtype="bfloat16", scale_dtype="bfloat16",
      ...                   out_dtype="bfloat16")
      >>> choose(problem, "cuda", "NVIDIA H200").backend
      'mosaic_gpu'
      >>> choose(problem, "cpu", None).reason
      'there are no kernels for cpu'
    """
    if platform not in KERNELS:
        return Choice("xla", f"there are no kernels for {platform}")
    if isinstance(problem, str):
        return Choice("xla", problem)
    reason = why_not_partitioned(num_devices)
    if reason is not None:
        return Choice("xla", reason)
    if 0 in (problem.e, problem.m, problem.n, problem.k):
        return Choice("xla", "the product is empty", preferred=True)
    is_int8 = problem.x_dtype == "int8" and problem.bits == 8
    is_int8 = is_int8 and problem.num_groups == 1
    if platform == "cuda" and is_int8 and not problem.transposed:
        reason = "XLA has its own int8 product for int8 x and 8-bit codes"
        return Choice("xla", reason, preferred=True)
    return _first_kernel(problem, platform, device_kind)


def why_not_partitioned(num_devices: int) -> str | None:
    """Returns why no kernel runs in a program for several devices, None for one."""
    if num_devices == 1:
        return None
    return (
        f"XLA partitions this program for {num_devices} devices and cannot partition a "
        "kernel; inside jax.shard_map a kernel runs on each device"
    )


def _first_kernel(problem: Problem, platform: str, device_kind: str | None) -> Choice:
    """Chooses the first kernel of the platform that can compute the problem."""
    names = kernels_for(platform, transposed=problem.transposed)
    reasons = []
    # XLA multiplies float8 codes in groups one group after the other. It writes and
    # reads the sums of each group.
    in_groups = problem.is_exact and problem.num_groups > 1
    for name in names:
        reason = kernel_module(name).why_not(problem, device_kind)
        dense_from = _DENSE_FROM.get(name)
        if problem.codebook:
            dense_from = _DENSE_FROM_OF_CODEBOOKS.get(name, dense_from)
        if reason is not None:
            reasons.append(reason if len(names) == 1 else f"{name}: {reason}")
        elif dense_from is not None and problem.m >= dense_from and not in_groups:
            reason = (
                f"with {dense_from} or more rows of x, the weight is decoded once and "
                "multiplied densely"
            )
            return Choice("xla", reason, preferred=True)
        else:
            return Choice(name, None, passed_over="; ".join(reasons))
    return Choice("xla", "; ".join(reasons))


def bypasses_primitive(call: Call) -> bool:
    """True if the call runs an interpreter that `matmul_p` cannot contain."""
    return call.interpret and call.backend in EFFECTFUL_INTERPRETERS


class Decision(NamedTuple):
    """What the lowering of one call has to do.

    Attributes:
      call: the call, with the block size for the XLA form in `call.meta`.
      backend: "xla" or the name of a kernel.
      problem: the product for the kernel, or None for the XLA form.
    """

    call: Call
    backend: str = "xla"
    problem: Problem | None = None


def decide(
    call: Call,
    x: Any,
    leaves: Sequence[Any],
    *,
    platform: str,
    device_kind: str | None,
    num_devices: int,
) -> Decision:
    """Decides what computes a call in a program that is being lowered.

    Args:
      call: static facts of the product.
      x: abstract value `[e, m, k]`, or `[e, m, n]` if `call.transposed`.
      leaves: abstract values of the rows, in the order of `call.leaves`.
      platform: the platform that the program is lowered for.
      device_kind: `jax.Device.device_kind`, or None if unknown.
      num_devices: number of devices over which XLA partitions the program.

    Raises:
      ValueError: `call.backend` names a kernel that does not run on the platform, and
        `call.interpret` is False.
    """
    if call.backend not in ("auto", "xla"):
        return _named_kernel(call, x, leaves, platform, device_kind)
    if platform not in KERNELS:
        block_bytes = _WHOLE_WEIGHT if num_devices > 1 else call.meta.block_bytes
        return Decision(_with_blocks(call, block_bytes))
    if call.backend == "auto":
        problem = problem_of(call, x, leaves)
        choice = choose(problem, platform, device_kind, num_devices)
        if choice.reason is None:
            assert isinstance(problem, Problem), problem
            return Decision(call, choice.backend, problem)
        # A user cannot act on a warning about a derivative. There is also no warning if
        # the XLA form is expected to be faster.
        if not call.backward and not choice.preferred:
            product = f"a product of {call.meta.fmt.name} codes with k = {call.meta.k}"
            warn_of_fallback(product, platform, choice.reason)
    per_matrix = _ACCELERATOR_BLOCK_BYTES // max(x.shape[0], 1)
    return Decision(
        _with_blocks(call, _WHOLE_WEIGHT if num_devices > 1 else per_matrix)
    )


def _named_kernel(
    call: Call,
    x: Any,
    leaves: Sequence[Any],
    platform: str,
    device_kind: str | None,
) -> Decision:
    """The decision if the caller names a kernel of the forward product."""
    if not call.interpret and call.backend not in KERNELS.get(platform, ()):
        raise ValueError(
            f"quantized_matmul: the {call.backend} kernel runs on "
            f"{platform_of(call.backend)}, and this program is lowered for {platform}. "
            'Use backend="auto", or interpret=True to run the interpreter.'
        )
    problem = problem_of(call, x, leaves)
    if not call.transposed:
        assert isinstance(problem, Problem), problem
        return Decision(call, call.backend, problem)
    # A transposed product is part of a derivative. The platform of the named kernel has
    # other kernels for it.
    if isinstance(problem, Problem):
        for name in kernels_for(platform_of(call.backend), transposed=True):
            if kernel_module(name).why_not(problem, device_kind) is None:
                return Decision(call, name, problem)
    return Decision(call)


def _with_blocks(call: Call, block_bytes: int | None) -> Call:
    """The call with this size of the blocks that the XLA form decodes."""
    meta = dataclasses.replace(call.meta, block_bytes=block_bytes)
    return dataclasses.replace(call, meta=meta)


def block_bytes_on(platform: str, num_devices: int, e: int) -> int | None:
    """Returns the size of blocks in the XLA form, None for the size for a CPU.

    Args:
      platform: the platform that the program is lowered for.
      num_devices: number of devices over which XLA partitions the program.
      e: number of stacked products.
    """
    if num_devices > 1:
        return _WHOLE_WEIGHT
    if platform not in KERNELS:
        return None
    return _ACCELERATOR_BLOCK_BYTES // max(e, 1)


def warn_of_fallback(product: str, platform: str, reason: str) -> None:
    """Warns that XLA computes a product on a platform that has kernels for it."""
    warnings.warn(
        f"No kernel runs for {product} on {platform}, so XLA computes it: {reason}.",
        FallbackWarning,
        stacklevel=3,
    )
