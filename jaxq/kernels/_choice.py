"""Chooses a kernel of any family for a platform, or says why none runs.

`choose` decides by static facts alone (shapes, dtypes, formats), for any platform,
without a device. It checks its arguments. `choose_kernel` does the same without checks.
A lowering rule asks `kernel_on`. It also warns if the platform has kernels and none of
them can run.

The "XLA form" of a product is its computation in plain XLA. XLA partitions a program
for several devices, and cannot partition a kernel. So the XLA form runs there. Each
device runs its own kernel inside `jax.shard_map`. `jaxq.ops` enters it for products on
explicit mesh axes.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from jaxq import formats
from jaxq.kernels._activation_problem import ActivationProblem
from jaxq.kernels._attention_problem import AttentionProblem
from jaxq.kernels._codes_problem import CodesProblem
from jaxq.kernels._platform_primitive import Target
from jaxq.kernels._preferences import why_dense, why_native
from jaxq.kernels._problem import Problem
from jaxq.kernels._registry import (
    KERNELS,
    PLATFORMS,
    Family,
    kernel_module,
    kernels_for,
)

AnyProblem = Problem | CodesProblem | ActivationProblem | AttentionProblem
# The families that compute problems of a class. The first one is the default.
_FAMILIES: dict[type, tuple[Family, ...]] = {
    Problem: ("product", "transposed", "ragged"),
    CodesProblem: ("codes",),
    ActivationProblem: ("activation",),
    AttentionProblem: ("attention",),
}


class FallbackWarning(UserWarning):
    """This platform has kernels, but none can run. The message says why.

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
      passed_over: kernels that were tried before the chosen one, and why they cannot
        compute the product.

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
    problem: AnyProblem | str,
    platform: str,
    device_kind: str | None,
    num_devices: int = 1,
    *,
    family: Family | None = None,
) -> Choice:
    """Chooses the kernel that computes a problem on a platform, by static facts alone.

    Args:
      problem: what to compute, or the reason why no kernel computes it, as `problem_of`
        returns it.
      platform: "cpu", "tpu", "cuda", "gpu" (the same as "cuda") or "rocm".
      device_kind: `jax.Device.device_kind`, or None if unknown.
      num_devices: number of devices over which XLA partitions the program.
      family: the kernels to choose from: "product", "transposed", "ragged", "codes",
        "activation" or "attention". None is the family of the problem's class. For
        `Problem` that is "transposed" if `problem.transposed`, or else "product".

    Returns:
      A `Choice`.

    Raises:
      TypeError: the family computes problems of another class.
      ValueError: the family or the platform is unknown; or the family is "transposed"
        and `problem.transposed` is False.

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
    platform = known_platform(platform, "choose")
    family = _checked_family(problem, family)
    return choose_kernel(problem, platform, device_kind, num_devices, family=family)


def known_platform(platform: str, caller: str) -> str:
    """Returns the platform as jax names it when it lowers a program.

    Raises:
      ValueError: the platform is unknown.
    """
    known = ("cpu", "cuda", "gpu", "rocm", "tpu")
    formats.check_choice(f"{caller}: platform", platform, known)
    return "cuda" if platform == "gpu" else platform


def _checked_family(problem: Any, family: Family | None) -> Family:
    """The family, after a check that it computes problems of this class."""
    if family is not None:
        formats.check_choice("choose: family", family, tuple(KERNELS))
    if isinstance(problem, str):
        return family or "product"
    problem_class = type(problem)
    if problem_class not in _FAMILIES:
        raise TypeError(
            "choose: problem must be a Problem or another problem of jaxq.kernels, or "
            f"a reason in words, got {problem_class.__name__}."
        )
    families = _FAMILIES[problem_class]
    if family is None:
        return families[0]
    if family not in families:
        raise TypeError(
            f"choose: the family {family!r} does not compute a "
            f"{problem_class.__name__}. Use family={families[0]!r}, or leave it out."
        )
    if family == "transposed" and not problem.transposed:
        raise ValueError(
            "choose: the family 'transposed' computes problems with transposed=True, "
            f"got {problem}."
        )
    return family


def choose_kernel(
    problem: AnyProblem | str,
    platform: str,
    device_kind: str | None,
    num_devices: int = 1,
    *,
    family: Family = "product",
) -> Choice:
    """`choose` without checks, on any platform that jax lowers for."""
    if platform not in PLATFORMS:
        return Choice("xla", f"there are no kernels for {platform}")
    if isinstance(problem, str):
        return Choice("xla", problem)
    if family == "product" and isinstance(problem, Problem) and problem.transposed:
        family = "transposed"
    if problem.is_empty:
        return Choice("xla", "there is nothing to compute", preferred=True)
    if family == "ragged" and isinstance(problem, Problem) and problem.transposed:
        reason = "the product of rows with transposed weights of experts runs in XLA"
        return Choice("xla", reason, preferred=True)
    reason = why_native(problem, platform, family)
    if reason is not None:
        return Choice("xla", reason, preferred=True)
    if num_devices > 1:
        reason = (
            f"XLA partitions this program for {num_devices} devices and cannot "
            "partition a kernel; a kernel runs on each device inside jax.shard_map and "
            "on explicit mesh axes"
        )
        return Choice("xla", reason)
    return _first_kernel(problem, platform, device_kind, family)


def _first_kernel(
    problem: AnyProblem, platform: str, device_kind: str | None, family: Family
) -> Choice:
    """Chooses the first kernel of the platform that can compute the problem."""
    names = kernels_for(platform, family)
    reasons = []
    for name in names:
        reason = kernel_module(name).why_not(problem, device_kind)
        if reason is not None:
            reasons.append(reason if len(names) == 1 else f"{name}: {reason}")
            continue
        reason = why_dense(problem, name)
        if reason is not None:
            return Choice("xla", reason, preferred=True)
        return Choice(name, None, passed_over="; ".join(reasons))
    return Choice("xla", "; ".join(reasons))


def kernel_on(
    target: Target,
    problem: AnyProblem | str,
    family: Family,
    product: str,
    *,
    quiet: bool = False,
) -> str | None:
    """Returns the kernel that a lowering rule uses, or None for the XLA form.

    It warns if XLA computes the product on a platform that has kernels, unless the XLA
    form is expected to be faster.

    Args:
      target: what the program is lowered for.
      problem: what to compute, or the reason why no kernel computes it.
      family: as for `choose`.
      product: what is computed, in words, for the warning.
      quiet: True to give no warning.
    """
    choice = choose_kernel(problem, *target, family=family)
    if choice.reason is None:
        return choice.backend
    if target.platform in PLATFORMS and not choice.preferred and not quiet:
        warnings.warn(
            f"No kernel runs for {product} on {target.platform}, so XLA computes it: "
            f"{choice.reason}.",
            FallbackWarning,
            stacklevel=3,
        )
    return None
