"""`emulate`: trace a function and evaluate it with every number rounded as a policy says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import kernels
from jaxq.emulation import _accumulate
from jaxq.emulation._precision import Policy, Precision, carrier_of

# What comes out is one of the numbers that went in: rounded before, it is rounded still.
_MOVES = frozenset(
    [
        *[
            "broadcast_in_dim",
            "clamp",
            "concatenate",
            "copy",
            "dynamic_slice",
            "dynamic_update_slice",
            "max",
            "min",
        ],
        *[
            "optimization_barrier",
            "reduce_max",
            "reduce_min",
            "reshape",
            "rev",
            "select_n",
            "slice",
            "squeeze",
        ],
        *["stop_gradient", "transpose"],
    ]
)
# Numbers are moved, compared or chosen, none is made: nothing to round.
_EXACT = _MOVES | frozenset(
    [
        *[
            "abs",
            "all_gather",
            "all_gather_invariant",
            "all_to_all",
            "argmax",
            "argmin",
            "bitcast_convert_type",
        ],
        *[
            "cummax",
            "cummin",
            "debug_callback",
            "debug_print",
            "device_put",
            "eq",
            "eq_to",
            "gather",
            "ge",
            "gt",
        ],
        *[
            "is_finite",
            "le",
            "le_to",
            "lt",
            "lt_to",
            "mesh_cast",
            "ne",
            "neg",
            "pad",
            "pbroadcast",
            "pcast",
            "pmax",
        ],
        *[
            "pmin",
            "ppermute",
            "pvary",
            "reduce_precision",
            "reduce_window_max",
            "reduce_window_min",
            "reshard",
        ],
        *[
            "scatter",
            "scatter-max",
            "scatter-min",
            "select_and_gather_add",
            "sharding_constraint",
            "sign",
            "sort",
        ],
        *["split", "tile", "top_k"],
    ]
)
# Sums, and algorithms made of sums, that a narrow accumulator is not written for.
_WIDE_SUMS = frozenset(
    [
        *[
            "addupdate",
            "cholesky",
            "cholesky_update",
            "cumlogsumexp",
            "cumprod",
            "eig",
            "eigh",
            "fft",
            "geqp3",
        ],
        *[
            "geqrf",
            "hessenberg",
            "householder_product",
            "lu",
            "ormqr",
            "psum",
            "psum_invariant",
        ],
        *[
            "psum_invariant_start",
            "psum_start",
            "qr",
            "ragged_dot",
            "ragged_dot_general",
            "reduce",
            "reduce_prod",
        ],
        *[
            "reduce_scatter",
            "reduce_scatter_start",
            "reduce_window",
            "scaled_dot",
            "scaled_matmul",
        ],
        *[
            "scaled_matmul_wrapper",
            "scatter-add",
            "scatter-mul",
            "scatter-sub",
            "schur",
            "select_and_scatter_add",
        ],
        *[
            "svd",
            "symmetric_product",
            "triangular_solve",
            "tridiagonal",
            "tridiagonal_solve",
            "unreduced_psum",
        ],
        *[
            "unreduced_psum_start",
            "unreduced_reduce_scatter",
            "unreduced_reduce_scatter_start",
        ],
    ]
)
# Primitives whose parameters hold a small function that is no call of user code.
_NO_CALLS = frozenset(["argmax", "argmin", "reduce", "reduce_window", "sort"]) | {
    f"scatter{kind}" for kind in ("", "-add", "-max", "-min", "-mul", "-sub")
}


def emulate(fn: Callable, policy: Policy) -> Callable:
    """`fn` in another arithmetic: operands, accumulators and results of every primitive rounded by `policy`.

    `fn` is traced once for its arguments; its dtypes stay as they are and carry the rounded numbers, float32 being the
    natural one. Loops, conditionals, nested jit, remat, shard_map and functions with derivative rules of their own are
    entered. Wrap the result in `jax.jit`: outside it runs primitive by primitive.

    Rounding has a straight-through gradient, so `jax.grad(emulate(fn, policy))` differentiates through the rounded
    forward pass in plain arithmetic, and `emulate(jax.grad(fn), policy)` rounds the backward pass as well. Custom
    derivative rules stay those of `fn`.

    Elementwise chains under two traced precisions that differ (a whole `Policy` as an argument of `jit`) take XLA's CPU
    compiler of jax 0.11 minutes: trace one, or the same number in both, as `Precision(8, m)` for operands and result.

    Args:
      fn: any function of arrays (and pytrees of them) that `jax.jit` accepts.
      policy: what to round to; see `Policy`. Its leaves may be tracers, for a sweep under `jax.vmap`.

    Returns:
      A function with the arguments and results of `fn`. Where `policy` changes nothing, the program is that of `fn`.

    Raises:
      NotImplementedError: (when called) a primitive that calls a function and is not known, or one that has no form
        with a narrow accumulator.
      ValueError: (when called) `policy.primitives` names no primitive of jax.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> policy = jaxq.emulation.Policy(operands="bfloat16", accumulate="float32", result="bfloat16")
      >>> f = jax.jit(jaxq.emulate(lambda x: x + 0.001, policy))
      >>> float(f(1.0)), float(f(0.0))
      (1.0, 0.00099945068359375)
    """
    if not callable(fn):
        raise TypeError(f"emulate: fn must be a function, got {fn!r}.")
    _check(policy, "policy")

    @functools.wraps(fn, updated=())
    def emulated(*args, **kwargs):
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        _raise_if_unknown(policy, closed.jaxpr)
        if not policy.changes(
            jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
        ):  # pyright: ignore[reportAttributeAccessIssue]
            return fn(*args, **kwargs)
        flat = _run(closed, jax.tree.leaves((args, kwargs)), policy)
        return jax.tree.unflatten(jax.tree.structure(shapes), flat)

    return emulated


def _check(policy: Any, name: str) -> None:
    """Raises where a part of a policy is of another type. Not when one is made: jax fills pytrees with anything."""
    if not isinstance(policy, Policy):
        raise TypeError(
            f"emulate: {name} must be a jaxq.emulation.Policy, got {policy!r}."
        )
    for part in ("operands", "accumulate", "result"):
        if not isinstance(getattr(policy, part), Precision | None):
            raise TypeError(
                f"emulate: {name}.{part} must be a format's name, a Precision or None, got {getattr(policy, part)!r}."
            )
    for part in (policy.operands, policy.accumulate, policy.result):
        for field in ("exponent_bits", "mantissa_bits", "bias"):
            if isinstance(number := getattr(part, field, None), float):
                raise TypeError(
                    f"emulate: {name}: {field} must be a whole number, got {number!r}."
                )
    wide = policy.accumulate is None or not policy.accumulate.changes_sums(np.float32)
    if policy.chunk is not None and wide:
        raise ValueError(
            f"emulate: {name}: chunk={policy.chunk} cuts narrow sums; accumulate= is not narrow."
        )
    if not isinstance(policy.primitives, dict | None):
        raise TypeError(
            f"emulate: {name}.primitives must be a dict from names to policies, got {policy.primitives!r}."
        )
    for primitive, inner in (policy.primitives or {}).items():
        _check(inner, f"{name}.primitives[{primitive!r}]")


def _run(closed: Any, args: Sequence, policy: Policy) -> list:
    """Evaluates a closed jaxpr, one equation after the other; what a result was rounded to, no operand is again."""
    jaxpr = closed.jaxpr
    rounded: dict[Any, Precision] = {}
    values: dict[Any, Any] = dict(
        zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True)
    )

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        known = [
            None if isinstance(atom, jex.core.Literal) else rounded.get(atom)
            for atom in equation.invars
        ]
        with equation.ctx.manager:
            outs = _equation(
                equation, [read(atom) for atom in equation.invars], policy, known
            )
        values.update(zip(equation.outvars, outs, strict=True))
        if found := _rounded_to(equation, policy, known):
            rounded.update(
                (v, found)
                for v in equation.outvars
                if v.aval.dtype in (jnp.float32, jnp.float64)
            )
    return [read(atom) for atom in jaxpr.outvars]


def _rounded_to(
    equation: Any, policy: Policy, known: list[Precision | None]
) -> Precision | None:
    """What every result of an equation is rounded to, from what is `known` of its operands; None: nothing sure."""
    name = equation.primitive.name
    if name in _MOVES:
        floats = [
            p
            for p, v in zip(known, equation.invars, strict=True)
            if carrier_of(v.aval.dtype) is not None
        ]
        first = floats[0] if floats else None
        return (
            first
            if first is not None and all(first.is_surely(p) for p in floats)
            else None
        )
    return None if name in _EXACT or name in _CALLS else policy.of(name).result


def _equation(
    equation: Any, args: list, policy: Policy, known: list[Precision | None]
) -> Sequence:
    name = equation.primitive.name
    if name in _CALLS:
        return _CALLS[name](equation, args, policy)
    if name not in _NO_CALLS and any(_inner_jaxprs(equation)):
        raise NotImplementedError(
            f"emulate: the primitive {name!r} calls a function, and how is not known; nothing of it would be rounded. "
            "Known are " + ", ".join(sorted(_CALLS)) + "."
        )
    avals = [v.aval for v in (*equation.invars, *equation.outvars)]
    if any(
        jnp.issubdtype(a.dtype, jnp.complexfloating)
        for a in avals
        if hasattr(a, "dtype")
    ):
        raise NotImplementedError(
            f"emulate: {name!r} computes complex numbers, which have no rounding here."
        )
    if name in _EXACT:
        return _bind(equation, args)
    policy = policy.of(name)
    if policy.operands is not None:
        pairs = zip(map(jnp.asarray, args), known, strict=True)
        args = [
            a if policy.operands.is_surely(p) else policy.operands.round(a)
            for a, p in pairs
        ]
    outs = _sum(equation, args, policy) if name in _accumulate.SUMS else None
    if outs is None:
        if name in _WIDE_SUMS and _is_narrow(policy, avals):
            raise NotImplementedError(
                f"emulate: {name!r} has no form with a narrow accumulator. To let it add in its own dtype, say "
                f"primitives={{{name!r}: Policy(operands=..., result=...)}}."
            )
        outs = _bind(equation, args)
    return [
        _settle(out, v.aval.dtype, policy.result)
        for out, v in zip(outs, equation.outvars, strict=True)
    ]


def _settle(out: jax.Array, dtype: Any, result: Precision | None) -> jax.Array:
    """What a primitive gave, rounded to `result` and to the dtype of its array, by integers where that is narrow."""
    own = Precision.of(dtype.name) if dtype in (jnp.bfloat16, jnp.float16) else None
    steps: list[Precision] = []
    for step in (own if out.dtype == dtype else None, result, own):
        if step is not None and not (steps and step.is_surely(steps[-1])):
            steps.append(step)
    for step in steps:
        out = step.round(out)
    return out.astype(dtype) if out.dtype != dtype else out


def _sum(equation: Any, args: list, policy: Policy) -> list | None:
    """The result of a sum over rounded operands in float32 or wider; None where it is an ordinary operation."""
    name, params = equation.primitive.name, equation.params
    carrier = carrier_of(equation.outvars[0].aval.dtype)
    if carrier is None or not policy.changes(carrier):
        return None
    if _is_narrow(policy, [v.aval for v in (*equation.invars, *equation.outvars)]):
        return [_accumulate.SUMS[name](*args, policy, **params)]
    if "preferred_element_type" in params:
        # Products exact, the sum in float32 on every platform, one rounding after it.
        wide = {
            "precision": (lax.Precision.HIGHEST,) * 2,
            "preferred_element_type": carrier,
        }
        return [equation.primitive.bind(*args, **{**params, **wide})]
    return None


def _is_narrow(policy: Policy, avals: list) -> bool:
    carriers = {carrier_of(a.dtype) for a in avals if hasattr(a, "dtype")} - {None}
    return policy.accumulate is not None and any(
        policy.accumulate.changes_sums(carrier) for carrier in carriers
    )


def _bind(equation: Any, args: Sequence) -> Sequence:
    """The equation as it is."""
    outs = equation.primitive.bind(
        *args, **equation.primitive.get_bind_params(equation.params)
    )
    return outs if equation.primitive.multiple_results else [outs]


# Primitives that call functions. Each is built anew around the emulated function by jax's public interface.


def _jit(equation: Any, args: list, policy: Policy) -> Sequence:
    params = equation.params

    def call(*args):
        return tuple(_run(params["jaxpr"], args, policy))

    call.__name__ = params["name"]
    shardings = {k: params[k] for k in ("in_shardings", "out_shardings")}
    return jax.jit(
        call, keep_unused=params["keep_unused"], inline=params["inline"], **shardings
    )(*args)


def _call(equation: Any, args: list, policy: Policy) -> Sequence:
    return _run(
        _closed(equation.params.get("call_jaxpr") or equation.params["jaxpr"]),
        args,
        policy,
    )


def _remat(equation: Any, args: list, policy: Policy) -> Sequence:
    params = equation.params
    call = functools.partial(_run, _closed(params["jaxpr"]), policy=policy)
    return jax.checkpoint(
        lambda *a: call(a), prevent_cse=params["prevent_cse"], policy=params["policy"]
    )(*args)


def _shard_map(equation: Any, args: list, policy: Policy) -> Sequence:
    params = equation.params
    return jax.shard_map(
        lambda *a: tuple(_run(_closed(params["jaxpr"]), a, policy)),
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(params["newly_manual_axes"]),
    )(*args)


def _scan(equation: Any, args: list, policy: Policy) -> Sequence:
    params = equation.params
    if "ft_in" in params:  # jax 0.11
        consts, carry, xs = map(list, params["ft_in"].update(args).unpack())
    else:
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, carry, xs = args[:first], args[first:last], args[last:]

    def body(carry, x):
        outs = _run(params["jaxpr"], [*consts, *carry, *x], policy)
        return outs[: len(carry)], outs[len(carry) :]

    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, carry, xs, **options)
    return [*carry, *ys]


def _while(equation: Any, args: list, policy: Policy) -> Sequence:
    params = equation.params
    first, last = (
        params["cond_nconsts"],
        params["cond_nconsts"] + params["body_nconsts"],
    )
    return lax.while_loop(
        lambda state: _run(params["cond_jaxpr"], [*args[:first], *state], policy)[0],
        lambda state: _run(params["body_jaxpr"], [*args[first:last], *state], policy),
        args[last:],
    )


def _cond(equation: Any, args: list, policy: Policy) -> Sequence:
    branches = [
        lambda *a, b=branch: _run(b, a, policy)
        for branch in equation.params["branches"]
    ]
    return lax.switch(args[0], branches, *args[1:])


def _custom_jvp(equation: Any, args: list, policy: Policy) -> Sequence:
    arrays, rebuild = _traced_leaves(policy)

    @jax.custom_jvp
    def rounded(arrays, *args):
        return _run(equation.params["call_jaxpr"], args, rebuild(arrays))

    @rounded.defjvp
    def _rule(primals, tangents):
        _, out = jax.jvp(lambda *a: list(_bind(equation, a)), primals[1:], tangents[1:])
        return rounded(*primals), out

    return rounded(arrays, *args)


def _custom_vjp(equation: Any, args: list, policy: Policy) -> Sequence:
    arrays, rebuild = _traced_leaves(policy)

    @jax.custom_vjp
    def rounded(arrays, *args):
        return _run(equation.params["call_jaxpr"], args, rebuild(arrays))

    def forward(arrays, *args):
        _, pullback = jax.vjp(lambda *a: list(_bind(equation, a)), *args)
        return rounded(arrays, *args), pullback

    def backward(pullback, cotangents):
        return None, *pullback(cotangents)

    rounded.defvjp(forward, backward)
    return rounded(arrays, *args)


def _form(equation: Any, args: list, policy: Policy) -> Sequence:
    """A product that kernels compute: its XLA form, whose primitives are rounded like any other."""
    call = functools.partial(
        kernels.FORMS[equation.primitive.name], call=equation.params["call"]
    )
    return _run(jax.make_jaxpr(call)(*args), args, policy)


_CALLS: dict[str, Callable[[Any, list, Policy], Sequence]] = {
    "checkpoint": _remat,
    "closed_call": _call,
    "cond": _cond,
    "core_call": _call,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "jit": _jit,
    "pjit": _jit,
    "quantized_matmul": _form,
    "quantized_matmul_tangent": _form,
    "remat2": _remat,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}


def _traced_leaves(policy: Policy) -> tuple[list, Callable[[list], Policy]]:
    """The array leaves of a policy, and the way back: its plain numbers must stay plain."""
    leaves, structure = jax.tree.flatten(policy)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def rebuild(arrays: list) -> Policy:
        filled = dict(zip(places, arrays, strict=True))
        return jax.tree.unflatten(
            structure, [filled.get(i, leaf) for i, leaf in enumerate(leaves)]
        )

    return [leaves[i] for i in places], rebuild


def _closed(jaxpr: Any) -> Any:
    return (
        jaxpr
        if isinstance(jaxpr, jex.core.ClosedJaxpr)
        else jex.core.ClosedJaxpr(jaxpr, ())
    )


def _inner_jaxprs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, jex.core.ClosedJaxpr | jex.core.Jaxpr):
                yield _closed(part).jaxpr


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in _inner_jaxprs(equation):
            yield from _primitives(inner)


def _raise_if_unknown(policy: Policy, jaxpr: Any) -> None:
    """Raises where `policy.primitives` names what jax does not have or what never rounds: it would do nothing."""
    wanted = set(policy.primitives or {})
    if not wanted:
        return
    for name in sorted(wanted & (_EXACT | set(_CALLS))):
        what = (
            "calls a function, whose primitives have their own policies"
            if name in _CALLS
            else "makes no numbers"
        )
        raise ValueError(
            f"emulate: policy.primitives names {name!r}, which {what}: it never rounds."
        )
    present = set(_primitives(jaxpr))
    known = present | {
        p.name
        for p in vars(jex.core.primitives).values()
        if isinstance(p, jex.core.Primitive)
    }
    for name in sorted(wanted - known):
        raise ValueError(
            f"emulate: policy.primitives names {name!r}, which is no primitive of jax. The function has "
            f"{', '.join(sorted(present))}."
        )
