"""Decides whether a Pallas kernel or the XLA form computes a `Call`.

`decide` is what `matmul_p` asks when a program is lowered. It chooses a kernel as
`_choice.py` does, with two additions. If the caller names a kernel, it chooses that
kernel. It also sets the size of the blocks in which the XLA form decodes a weight.
`bypasses_primitive` decides whether a call uses the primitive at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxq.kernels._call import Call, problem_of
from jaxq.kernels._choice import kernel_on
from jaxq.kernels._platform_primitive import Target
from jaxq.kernels._problem import Problem
from jaxq.kernels._registry import (
    EFFECTFUL_INTERPRETERS,
    PLATFORMS,
    kernel_module,
    kernels_for,
    platform_of,
)

# Size in bytes of the decoded rows that the XLA form holds on an accelerator.
_ACCELERATOR_BLOCK_BYTES = 256 * 2**20
# A block size that no weight reaches. In a program for several devices a weight is
# decoded in one block, because XLA cannot partition a loop over blocks of rows. Each
# device decodes its part.
_WHOLE_WEIGHT = 2**62


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


def decide(call: Call, x: Any, leaves: Sequence[Any], target: Target) -> Decision:
    """Decides what computes a call in a program that is being lowered.

    Args:
      call: static facts of the product.
      x: abstract value `[e, m, k]`, or `[e, m, n]` if `call.transposed`.
      leaves: abstract values of the rows, in the order of `call.leaves`.
      target: what the program is lowered for.

    Raises:
      ValueError: `call.backend` names a kernel that does not run on the platform, and
        `call.interpret` is False.
    """
    if call.backend not in ("auto", "xla"):
        return _named_kernel(call, x, leaves, target)
    if call.backend == "auto":
        problem = problem_of(call, x, leaves)
        product = f"a product of {call.meta.fmt.name} codes with k = {call.meta.k}"
        # A user cannot act on a warning about a derivative.
        kernel = kernel_on(target, problem, "product", product, quiet=call.backward)
        if kernel is not None:
            assert isinstance(problem, Problem), problem
            return Decision(call, kernel, problem)
    block_bytes = block_bytes_on(target, x.shape[0], default=call.meta.block_bytes)
    meta = dataclasses.replace(call.meta, block_bytes=block_bytes)
    return Decision(dataclasses.replace(call, meta=meta))


def _named_kernel(
    call: Call, x: Any, leaves: Sequence[Any], target: Target
) -> Decision:
    """The decision if the caller names a kernel of the forward product."""
    platform, device_kind, _ = target
    own_kernels = kernels_for(platform, "product")
    if not call.interpret and call.backend not in own_kernels:
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
        for name in kernels_for(platform_of(call.backend), "transposed"):
            if kernel_module(name).why_not(problem, device_kind) is None:
                return Decision(call, name, problem)
    return Decision(call)


def block_bytes_on(target: Target, e: int, default: int | None = None) -> int | None:
    """Returns the size of the blocks in which the XLA form decodes a weight.

    Args:
      target: what the program is lowered for.
      e: number of stacked products.
      default: the size on one device of a platform without kernels. None is the size
        for a CPU.
    """
    if target.num_devices > 1:
        return _WHOLE_WEIGHT
    if target.platform not in PLATFORMS:
        return default
    return _ACCELERATOR_BLOCK_BYTES // max(e, 1)
