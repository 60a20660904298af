"""A jax primitive that becomes a Pallas kernel or plain XLA when jax lowers a program.

jax calls the lowering rule of a primitive when the platform is known.
`lax.platform_dependent` also chooses between functions at lowering. But if one of these
functions has a Pallas kernel, the program cannot be lowered for several platforms
together.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxq.kernels._devices import assumed_gpu, lowering_devices
from jaxq.kernels._registry import PLATFORMS


class Target(NamedTuple):
    """What a program is lowered for.

    Attributes:
      platform: "cpu", "tpu", "cuda", ...
      device_kind: `jax.Device.device_kind`, or None if unknown.
      num_devices: number of devices over which XLA partitions the program.
    """

    platform: str
    device_kind: str | None
    num_devices: int


def platform_primitive(
    name: str,
    abstract: Callable[..., Any],
    form: Callable[..., Callable[..., Any]],
    *,
    multiple_results: bool = False,
) -> Primitive:
    """Returns a primitive with rules for shapes, evaluation and lowering.

    The caller adds the rules for derivatives and batching. Such a primitive has one
    static parameter, `call`, which is compared by value.

    Args:
      name: name of the primitive in jaxprs.
      abstract: `abstract(*avals, call=call)` returns the abstract results.
      form: `form(target, avals, call=call)` returns the function of the operands that
        is lowered for a `Target`. `avals` are the abstract values of the operands.
      multiple_results: True if the primitive returns a list.
    """
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results

    @functools.partial(jax.jit, static_argnames="call")
    def run(*operands, call):
        return primitive.bind(*operands, call=call)

    def evaluate(*operands, call):
        # The primitive can only be lowered and compiled.
        with jax.disable_jit(False):
            return run(*operands, call=call)

    def lower(ctx, *operands, call, platform: str | None):
        """Lowers for one platform. None is every platform without kernels."""
        with assumed_gpu(platform, ctx.avals_in):
            device_kind, num_devices = lowering_devices(ctx, platform)
            target = Target(
                platform or _platform_without_kernels(ctx), device_kind, num_devices
            )
            function = form(target, ctx.avals_in, call=call)
            # Pallas cannot lower the integers of 64 bits that jax_enable_x64 gives.
            x64 = jax.config.jax_enable_x64 and platform is None  # pyright: ignore
            with jax.enable_x64(x64):
                return _lower_quietly(ctx, function, operands, multiple_results)

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(evaluate)
    mlir.register_lowering(primitive, functools.partial(lower, platform=None))
    for platform in PLATFORMS:
        rule = functools.partial(lower, platform=platform)
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


def _platform_without_kernels(ctx: Any) -> str:
    """The first platform of the program that has no kernels."""
    return next(p for p in ctx.module_context.platforms if p not in PLATFORMS)


def _lower_quietly(
    ctx: Any, function: Callable[..., Any], operands: Sequence[Any], multiple: bool
) -> Any:
    """Lowers a function without the warning that Triton is deprecated.

    Newer jax warns at each lowering of a Triton kernel. Some GPUs have no other kernel,
    and a user who multiplies with a QTensor cannot act on the warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
        )
        return mlir.lower_fun(function, multiple_results=multiple)(ctx, *operands)
