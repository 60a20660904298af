"""The primitives that call functions. Each is rebuilt around the emulated function.

`emulate` must also round inside the function that a jit, a loop or a derivative rule
calls. Each function here makes a new call of the same kind by jax's public interface.
Inside this call it evaluates the inner jaxpr under the policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend as jex
from jax import lax

from jaxq import kernels
from jaxq.emulation._precision import Policy

# Evaluates a closed jaxpr on arguments under a policy. `_emulate` passes its own
# function, so that this file does not have to import it.
Evaluate = Callable[[Any, Sequence, Policy], list]
# (evaluate, equation, arguments, policy) -> results of the equation.
Call = Callable[[Evaluate, Any, list, Policy], Sequence]


def bind(equation: Any, args: Sequence) -> Sequence:
    """Evaluates an equation without any rounding."""
    params = equation.primitive.get_bind_params(equation.params)
    outs = equation.primitive.bind(*args, **params)
    return outs if equation.primitive.multiple_results else [outs]


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """Yields the jaxprs among the parameters of an equation."""
    for value in equation.params.values():
        parts = value if isinstance(value, tuple | list) else (value,)
        for part in parts:
            if isinstance(part, jex.core.ClosedJaxpr | jex.core.Jaxpr):
                yield closed_jaxpr(part).jaxpr


def closed_jaxpr(jaxpr: Any) -> Any:
    """A jaxpr as a closed jaxpr. The parameters of equations hold both kinds."""
    if isinstance(jaxpr, jex.core.ClosedJaxpr):
        return jaxpr
    return jex.core.ClosedJaxpr(jaxpr, ())


def scan_operands(equation: Any, operands: list) -> tuple[list, list, list]:
    """Splits one value for each operand of a scan into (constants, carry, xs)."""
    params = equation.params
    if "ft_in" in params:  # jax 0.11
        consts, carry, xs = map(list, params["ft_in"].update(operands).unpack())
        return consts, carry, xs
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    return operands[:first], operands[first:last], operands[last:]


def _jit_call(
    evaluate: Evaluate, equation: Any, args: list, policy: Policy
) -> Sequence:
    params = equation.params

    def call(*args):
        return tuple(evaluate(params["jaxpr"], args, policy))

    call.__name__ = params["name"]
    names = ("in_shardings", "out_shardings", "keep_unused", "inline")
    return jax.jit(call, **{name: params[name] for name in names})(*args)


def _plain_call(
    evaluate: Evaluate, equation: Any, args: list, policy: Policy
) -> Sequence:
    jaxpr = equation.params.get("call_jaxpr") or equation.params["jaxpr"]
    return evaluate(closed_jaxpr(jaxpr), args, policy)


def _remat_call(
    evaluate: Evaluate, equation: Any, args: list, policy: Policy
) -> Sequence:
    params = equation.params
    jaxpr = closed_jaxpr(params["jaxpr"])

    def call(*args):
        return evaluate(jaxpr, args, policy)

    remat = jax.checkpoint(
        call, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    return remat(*args)


def _shard_map_call(
    evaluate: Evaluate, equation: Any, args: list, policy: Policy
) -> Sequence:
    params = equation.params
    jaxpr = closed_jaxpr(params["jaxpr"])

    def call(*args):
        return tuple(evaluate(jaxpr, args, policy))

    mapped = jax.shard_map(
        call,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(params["newly_manual_axes"]),
    )
    return mapped(*args)


def _scan_call(
    evaluate: Evaluate, equation: Any, args: list, policy: Policy
) -> Sequence:
    params = equation.params
    consts, carry, xs = scan_operands(equation, args)

    def body(carry, x):
        outs = evaluate(params["jaxpr"], [*consts, *carry, *x], policy)
        return outs[: len(carry)], outs[len(carry) :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, carry, xs, **options)
    return [*carry, *ys]


def _while_call(
    evaluate: Evaluate, equation: Any, args: list, policy: Policy
) -> Sequence:
    params = equation.params
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]
    cond_consts, body_consts, init = args[:first], args[first:last], args[last:]

    def cond(state):
        return evaluate(params["cond_jaxpr"], [*cond_consts, *state], policy)[0]

    def body(state):
        return evaluate(params["body_jaxpr"], [*body_consts, *state], policy)

    return lax.while_loop(cond, body, init)


def _cond_call(
    evaluate: Evaluate, equation: Any, args: list, policy: Policy
) -> Sequence:
    def emulated(jaxpr):
        return lambda *args: evaluate(jaxpr, args, policy)

    branches = [emulated(jaxpr) for jaxpr in equation.params["branches"]]
    return lax.switch(args[0], branches, *args[1:])


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
    "checkpoint": _remat_call,
    "closed_call": _plain_call,
    "cond": _cond_call,
    "core_call": _plain_call,
    "custom_jvp_call": _custom_jvp_call,
    "custom_vjp_call": _custom_vjp_call,
    "jit": _jit_call,
    "pjit": _jit_call,
    "quantized_attention": _kernel_form_call,
    "quantized_matmul": _kernel_form_call,
    "quantized_matmul_tangent": _kernel_form_call,
    "remat2": _remat_call,
    "scan": _scan_call,
    "shard_map": _shard_map_call,
    "while": _while_call,
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
