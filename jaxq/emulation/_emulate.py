"""`emulate`: traces a function and evaluates it with numbers rounded by a policy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.emulation._accumulate import SUMS
from jaxq.emulation._calls import CALLS
from jaxq.emulation._precision import Policy, Precision, carrier_of
from jaxq.emulation._primitives import EXACT, MOVES, NOT_CALLS, WIDE_SUMS
from jaxq.jaxprs import bind, inner_jaxprs
from jaxq.meshes import call_on_auto_axes


def emulate(fn: Callable, policy: Policy) -> Callable:
    """Returns a function that computes `fn` and rounds every primitive by a policy.

    `fn` is traced once for its arguments. Arrays keep their dtypes, and they hold the
    rounded numbers. Use float32 arrays, unless you need another dtype. `emulate` enters
    loops, conditionals, nested jit, remat, shard_map and functions with custom
    derivative rules. Wrap the result in `jax.jit`. Otherwise it runs one primitive
    after the other.

    Rounding has a straight-through gradient. `jax.grad(emulate(fn, policy))` therefore
    differentiates through the rounded forward pass in plain arithmetic.
    `emulate(jax.grad(fn), policy)` rounds the backward pass as well. Derivative rules
    of `fn` are kept.

    Do not trace two different precisions in one chain of elementwise operations, for
    example with a whole `Policy` as an argument of `jit`. XLA's CPU compiler of jax
    0.11 then needs minutes. Trace one precision, or use the same tracer in both, as in
    `Precision(8, m)` for operands and results.

    Args:
      fn: function of arrays and of pytrees of arrays. `jax.jit` must accept it.
      policy: how to round, see `Policy`. Its leaves may be tracers, for a sweep under
        `jax.vmap`.

    Returns:
      A function with the arguments and results of `fn`. If `policy` changes nothing,
      its program is that of `fn`.

    Raises:
      TypeError: `fn` is not a function, `policy` is not a `Policy`, or a part of
        `policy` has the wrong type.
      ValueError: `policy.chunk` is given and `policy.accumulate` is not narrow. When
        called: `policy.primitives` names a primitive that jax does not have or that
        never rounds.
      NotImplementedError: when called: a primitive calls a function in an unknown way,
        computes complex numbers, or has no form with a narrow accumulator.

    Example:
      >>> import jax, jaxq
      >>> policy = jaxq.emulation.Policy("bfloat16", "float32", "bfloat16")
      >>> f = jax.jit(jaxq.emulate(lambda x: x + 0.001, policy))
      >>> float(f(1.0)), float(f(0.0))
      (1.0, 0.00099945068359375)
    """
    if not callable(fn):
        raise TypeError(f"emulate: fn must be a function, got {fn!r}.")
    _check_policy(policy, "policy")

    @functools.wraps(fn, updated=())
    def emulated(*args, **kwargs):
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        _check_primitive_names(policy, closed.jaxpr)
        x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        if not policy.changes(jnp.float64 if x64 else jnp.float32):
            return fn(*args, **kwargs)
        outs = _evaluate(closed, jax.tree.leaves((args, kwargs)), policy)
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return emulated


def _check_policy(policy: Any, name: str) -> None:
    """Checks the types of a policy's parts.

    A `Policy` cannot check them when it is made, because jax fills pytrees with objects
    of its own.
    """
    if not isinstance(policy, Policy):
        raise TypeError(
            f"emulate: {name} must be a jaxq.emulation.Policy, got {policy!r}."
        )
    for part in ("operands", "accumulate", "result"):
        _check_precision(getattr(policy, part), f"{name}.{part}")
    wide = policy.accumulate is None or not policy.accumulate.changes_sums(np.float32)
    if policy.chunk is not None and wide:
        raise ValueError(
            f"emulate: {name}: chunk={policy.chunk} is for narrow sums, but "
            "accumulate= is not narrow. Give accumulate= a narrower format, or remove "
            "chunk=."
        )
    if not isinstance(policy.primitives, dict | None):
        raise TypeError(
            f"emulate: {name}.primitives must be a dict from names to policies, got "
            f"{policy.primitives!r}."
        )
    for primitive, primitive_policy in (policy.primitives or {}).items():
        _check_policy(primitive_policy, f"{name}.primitives[{primitive!r}]")


def _check_precision(precision: Any, name: str) -> None:
    if not isinstance(precision, Precision | None):
        raise TypeError(
            f"emulate: {name} must be a format's name, a Precision or None, got "
            f"{precision!r}."
        )
    for field in ("exponent_bits", "mantissa_bits", "bias"):
        number = getattr(precision, field, None)
        if isinstance(number, float):
            raise TypeError(
                f"emulate: {name}: {field} must be a whole number, got {number!r}."
            )


def _check_primitive_names(policy: Policy, jaxpr: Any) -> None:
    """Raises if a policy of one primitive would have no effect."""
    names = set(policy.primitives or {})
    if not names:
        return
    for name in sorted(names & (EXACT | set(CALLS))):
        reason = "does not compute new numbers"
        if name in CALLS:
            reason = "calls a function, whose primitives have their own policies"
        raise ValueError(
            f"emulate: policy.primitives names {name!r}, which {reason}. It never "
            "rounds. Remove it."
        )
    present = set(_primitive_names(jaxpr))
    public = {
        primitive.name
        for primitive in vars(jex.core.primitives).values()
        if isinstance(primitive, jex.core.Primitive)
    }
    for name in sorted(names - present - public):
        raise ValueError(
            f"emulate: policy.primitives names {name!r}, which is not a primitive of "
            f"jax. The function has {', '.join(sorted(present))}."
        )


def _primitive_names(jaxpr: Any) -> Iterator[str]:
    """Yields the names of a jaxpr's primitives, and of those of its inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in inner_jaxprs(equation):
            yield from _primitive_names(inner)


def _evaluate(closed: Any, args: Sequence, policy: Policy) -> list:
    """Evaluates a closed jaxpr under a policy, one equation after the other.

    It remembers the grid that each variable was rounded to. An operand that is on the
    grid of `policy.operands` already is not rounded again.
    """
    jaxpr = closed.jaxpr
    variables = (*jaxpr.constvars, *jaxpr.invars)
    values: dict[Any, Any] = dict(zip(variables, (*closed.consts, *args), strict=True))
    grids: dict[Any, Precision] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.core.Literal) else values[atom]

    def grid_of(atom: Any) -> Precision | None:
        return None if isinstance(atom, jex.core.Literal) else grids.get(atom)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        operand_grids = [grid_of(atom) for atom in equation.invars]
        with equation.ctx.manager:
            outs = _evaluate_equation(equation, operands, policy, operand_grids)
        values.update(zip(equation.outvars, outs, strict=True))
        result_grid = _result_grid(equation, policy, operand_grids)
        if result_grid is None:
            continue
        for variable in equation.outvars:
            # A float16 or bfloat16 array is rounded to its dtype as well.
            if variable.aval.dtype in (jnp.float32, jnp.float64):
                grids[variable] = result_grid
    return [read(atom) for atom in jaxpr.outvars]


def _result_grid(
    equation: Any, policy: Policy, operand_grids: list[Precision | None]
) -> Precision | None:
    """The grid of an equation's results, or None if it is not known for sure."""
    name = equation.primitive.name
    if name in MOVES:
        grids = [
            grid
            for grid, variable in zip(operand_grids, equation.invars, strict=True)
            if carrier_of(variable.aval.dtype) is not None
        ]
        if not grids or grids[0] is None:
            return None
        first = grids[0]
        return first if all(first.surely_equals(grid) for grid in grids) else None
    if name in EXACT or name in CALLS:
        return None
    return policy.of(name).result


def _evaluate_equation(
    equation: Any, args: list, policy: Policy, operand_grids: list[Precision | None]
) -> Sequence:
    """Rounds the operands of one equation, computes or sums, and rounds the results."""
    name = equation.primitive.name
    if name in CALLS:
        return CALLS[name](_evaluate, equation, args, policy)
    avals = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    _check_supported(equation, avals)
    if name in EXACT:
        return bind(equation, args)
    policy = policy.of(name)
    if policy.operands is not None:
        args = [
            arg if policy.operands.surely_equals(grid) else policy.operands.round(arg)
            for arg, grid in zip(map(jnp.asarray, args), operand_grids, strict=True)
        ]
    outs = _sum(equation, args, policy) if name in SUMS else None
    if outs is None:
        if name in WIDE_SUMS and _is_narrow(policy, avals):
            raise NotImplementedError(
                f"emulate: {name!r} has no form with a narrow accumulator. To sum in "
                "its own dtype, pass "
                f"primitives={{{name!r}: Policy(operands=..., result=...)}}."
            )
        outs = bind(equation, args)
    return [
        _round_result(out, variable.aval.dtype, policy.result)
        for out, variable in zip(outs, equation.outvars, strict=True)
    ]


def _check_supported(equation: Any, avals: list) -> None:
    """Raises if a primitive calls an unknown function or computes complex numbers."""
    name = equation.primitive.name
    if name not in NOT_CALLS and any(inner_jaxprs(equation)):
        raise NotImplementedError(
            f"emulate: the primitive {name!r} calls a function, and emulate cannot "
            "round what this function computes. The supported primitives that call "
            f"functions are {', '.join(sorted(CALLS))}. Use one of these in fn."
        )
    dtypes = [aval.dtype for aval in avals if hasattr(aval, "dtype")]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        raise NotImplementedError(
            f"emulate: {name!r} computes complex numbers, which emulate cannot round. "
            "Use real numbers."
        )


def _round_result(out: jax.Array, dtype: Any, result: Precision | None) -> jax.Array:
    """Rounds a result to the grid `result` and to the dtype of its array.

    float16 and bfloat16 are rounded by integer arithmetic too, since XLA removes casts
    to them inside one program.
    """
    own = Precision.of(dtype.name) if dtype in (jnp.bfloat16, jnp.float16) else None
    before = own if out.dtype == dtype else None
    steps: list[Precision] = []
    for step in (before, result, own):
        if step is None or (steps and step.surely_equals(steps[-1])):
            continue
        steps.append(step)
    for step in steps:
        out = step.round(out)
    return out.astype(dtype) if out.dtype != dtype else out


def _sum(equation: Any, args: list, policy: Policy) -> list | None:
    """The results of a sum over rounded operands, in float32 or wider.

    None if the primitive itself can compute the sum.
    """
    name, params = equation.primitive.name, equation.params
    carrier = carrier_of(equation.outvars[0].aval.dtype)
    if carrier is None or not policy.changes(carrier):
        return None
    avals = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    if _is_narrow(policy, avals):
        # The steps of a narrow sum do not state shardings.
        out_spec = equation.outvars[0].aval.sharding.spec
        run = functools.partial(SUMS[name], policy=policy, **params)
        return [call_on_auto_axes(run, out_spec, *args)]
    if "preferred_element_type" in params:
        # Exact products and a float32 sum on every platform. It is rounded once after.
        wide = {
            "precision": (lax.Precision.HIGHEST,) * 2,
            "preferred_element_type": carrier,
        }
        return [equation.primitive.bind(*args, **{**params, **wide})]
    return None


def _is_narrow(policy: Policy, avals: list) -> bool:
    """Whether the policy's accumulator is narrower than the arrays' float dtypes."""
    if policy.accumulate is None:
        return False
    carriers = {carrier_of(aval.dtype) for aval in avals if hasattr(aval, "dtype")}
    return any(policy.accumulate.changes_sums(carrier) for carrier in carriers - {None})
