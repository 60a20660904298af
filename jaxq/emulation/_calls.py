"""The primitives that call functions. Each is rebuilt around the emulated function.

`emulate` must also round inside the function that a jit, a loop or a derivative rule
calls. `jaxq.jaxprs` rebuilds most calls. Calls with derivative rules are rebuilt here,
because the leaves of the policy may be tracers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxq import jaxprs, kernels
from jaxq.emulation._precision import Policy
from jaxq.jaxprs import bind

# Evaluates a closed jaxpr on arguments under a policy. `_emulate` passes its own
# function, so that this file does not have to import it.
Evaluate = Callable[[Any, Sequence, Policy], list]
# (evaluate, equation, arguments, policy) -> results of the equation.
Call = Callable[[Evaluate, Any, list, Policy], Sequence]


def _under_policy(rebuild: jaxprs.Call) -> Call:
    """A call of `jaxq.jaxprs` with its function evaluated under a policy."""

    def call(evaluate: Evaluate, equation: Any, args: list, policy: Policy) -> Sequence:
        def evaluate_inner(closed: Any, args: Sequence) -> list:
            return evaluate(closed, args, policy)

        return rebuild(evaluate_inner, equation, args)

    return call


def _custom_jvp_call(
    evaluate: Evaluate, equation: Any, args: list, policy: Policy
) -> Sequence:
    arrays, rebuild = _traced_leaves(policy)

    @jax.custom_jvp
    def rounded(arrays, *args):
        return evaluate(equation.params["call_jaxpr"], args, rebuild(arrays))

    @rounded.defjvp
    def _rule(primals, tangents):
        # The value is the rounded one. The tangent comes from the rule of the function.
        _, out = jax.jvp(lambda *a: list(bind(equation, a)), primals[1:], tangents[1:])
        return rounded(*primals), out

    return rounded(arrays, *args)


def _custom_vjp_call(
    evaluate: Evaluate, equation: Any, args: list, policy: Policy
) -> Sequence:
    arrays, rebuild = _traced_leaves(policy)

    @jax.custom_vjp
    def rounded(arrays, *args):
        return evaluate(equation.params["call_jaxpr"], args, rebuild(arrays))

    def forward(arrays, *args):
        _, pullback = jax.vjp(lambda *a: list(bind(equation, a)), *args)
        return rounded(arrays, *args), pullback

    def backward(pullback, cotangents):
        return None, *pullback(cotangents)  # the policy has no gradient

    rounded.defvjp(forward, backward)
    return rounded(arrays, *args)


def _kernel_form_call(
    evaluate: Evaluate, equation: Any, args: list, policy: Policy
) -> Sequence:
    """Evaluates the XLA form of a kernel's primitive, and rounds its operations."""
    form = kernels.FORMS[equation.primitive.name]
    call = functools.partial(form, call=equation.params["call"])
    return evaluate(jax.make_jaxpr(call)(*args), args, policy)


CALLS: dict[str, Call] = {
    **{name: _under_policy(call) for name, call in jaxprs.CALLS.items()},
    "custom_jvp_call": _custom_jvp_call,
    "custom_vjp_call": _custom_vjp_call,
    "codes_matmul": _kernel_form_call,
    "quantize_activation": _kernel_form_call,
    "quantized_attention": _kernel_form_call,
    "quantized_matmul": _kernel_form_call,
    "quantized_matmul_tangent": _kernel_form_call,
    "quantized_ragged_dot": _kernel_form_call,
    "quantized_ragged_dot_tangent": _kernel_form_call,
}


def _traced_leaves(policy: Policy) -> tuple[list, Callable[[list], Policy]]:
    """The array leaves of a policy, and a function that puts such leaves back.

    A function with derivative rules must take tracers as arguments. The plain numbers
    of the policy must stay plain, because they decide what is traced.
    """
    leaves, structure = jax.tree.flatten(policy)
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def rebuild(arrays: list) -> Policy:
        filled = list(leaves)
        for i, array in zip(positions, arrays, strict=True):
            filled[i] = array
        return jax.tree.unflatten(structure, filled)

    return [leaves[i] for i in positions], rebuild
