"""Walking over jaxprs, and calls rebuilt around another evaluation of their function.

A primitive that calls a function (jit, remat, a loop) has the jaxpr of that function
among its parameters. Each function of `CALLS` makes a new call of the same kind by
jax's public interface. Inside this call the caller's own function evaluates the jaxpr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend as jex
from jax import lax

# Evaluates a closed jaxpr on arguments. Arguments may be pytrees.
Evaluate = Callable[[Any, Sequence], list]
# (evaluate, equation, arguments) -> results of the equation.
Call = Callable[[Evaluate, Any, list], Sequence]


def bind(equation: Any, args: Sequence) -> Sequence:
    """Evaluates an equation as it stands, and returns all its results."""
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


def _jit_call(evaluate: Evaluate, equation: Any, args: list) -> Sequence:
    params = equation.params

    def call(*args):
        return tuple(evaluate(params["jaxpr"], args))

    call.__name__ = params["name"]
    names = ("in_shardings", "out_shardings", "keep_unused", "inline")
    return jax.jit(call, **{name: params[name] for name in names})(*args)


def _plain_call(evaluate: Evaluate, equation: Any, args: list) -> Sequence:
    jaxpr = equation.params.get("call_jaxpr") or equation.params["jaxpr"]
    return evaluate(closed_jaxpr(jaxpr), args)


def _remat_call(evaluate: Evaluate, equation: Any, args: list) -> Sequence:
    params = equation.params
    jaxpr = closed_jaxpr(params["jaxpr"])

    def call(*args):
        return evaluate(jaxpr, args)

    remat = jax.checkpoint(
        call, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    return remat(*args)


def _shard_map_call(evaluate: Evaluate, equation: Any, args: list) -> Sequence:
    params = equation.params
    jaxpr = closed_jaxpr(params["jaxpr"])

    def call(*args):
        return tuple(evaluate(jaxpr, args))

    mapped = jax.shard_map(
        call,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(params["newly_manual_axes"]),
    )
    return mapped(*args)


def _scan_call(evaluate: Evaluate, equation: Any, args: list) -> Sequence:
    params = equation.params
    consts, carry, xs = scan_operands(equation, args)

    def body(carry, x):
        outs = evaluate(params["jaxpr"], [*consts, *carry, *x])
        return outs[: len(carry)], outs[len(carry) :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, carry, xs, **options)
    return [*carry, *ys]


def _while_call(evaluate: Evaluate, equation: Any, args: list) -> Sequence:
    params = equation.params
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]
    cond_consts, body_consts, init = args[:first], args[first:last], args[last:]

    def cond(state):
        return evaluate(params["cond_jaxpr"], [*cond_consts, *state])[0]

    def body(state):
        return evaluate(params["body_jaxpr"], [*body_consts, *state])

    return lax.while_loop(cond, body, init)


def _cond_call(evaluate: Evaluate, equation: Any, args: list) -> Sequence:
    def evaluated(jaxpr):
        return lambda *args: evaluate(jaxpr, args)

    branches = [evaluated(jaxpr) for jaxpr in equation.params["branches"]]
    return lax.switch(args[0], branches, *args[1:])


CALLS: dict[str, Call] = {
    "checkpoint": _remat_call,
    "closed_call": _plain_call,
    "cond": _cond_call,
    "core_call": _plain_call,
    "jit": _jit_call,
    "pjit": _jit_call,
    "remat2": _remat_call,
    "scan": _scan_call,
    "shard_map": _shard_map_call,
    "while": _while_call,
}
