"""Finds weights that a traced function changes before it multiplies by them.

`mark` writes the name of a weight next to its value into a trace. `changed_weights`
follows each marked value back to the inputs of the trace. Most values are an input
itself, or one element of a stack that `scan` goes through. Nothing is computed for
these values. Any other value is computed from random weights, and compared with these
weights. The function itself never runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

_PREFIX = "jaxq weight "
# These primitives keep the numbers and their order.
_SAME_NUMBERS = (
    "copy",
    "name",
    "pcast",
    "pvary",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "stop_gradient",
)
# Some integers of a trace are unknown, for example the counter of a loop. A value is
# computed once with each of these numbers in place of all unknown integers.
_INDICES = (0, 1)
# Most weights of a layer have magnitudes between 2**_USUAL[0] and 2**_USUAL[1].
_USUAL = (-10, 4)


def mark(array: jax.Array, name: str) -> jax.Array:
    """Returns the array, and writes its name into the trace."""
    # Under vmap, a reshape moves the mapped axis to the front. A stack that is mapped
    # along another axis therefore does not keep its order.
    row = jnp.reshape(array, (1, *array.shape))
    return checkpoint_name(row, _PREFIX + name).reshape(array.shape)


def changed_weights(jaxpr: Any, sources: Sequence[str]) -> list[str]:
    """The names of marked arrays that are not the input of the same name.

    A cast to another float dtype is not a change. An array that is one element of its
    input along leading axes is not changed either.

    Args:
      jaxpr: of the traced function, a `jax.extend.core.ClosedJaxpr`.
      sources: the name of each input of the function. Empty for inputs that are not
        weights.
    """
    inputs = [
        _Weight(name, var.aval) if name else _Unknown(var.aval)
        for name, var in zip(sources, jaxpr.jaxpr.invars, strict=True)
    ]
    changed: dict[str, None] = {}

    def check(name: str, value: _Node) -> None:
        if not _is_unchanged(value, name):
            changed[name] = None

    _follow(jaxpr, inputs, check)
    return list(changed)


# The values of a trace. Each is an input, or says how it is computed from others.


class _Node:
    """A value of a trace. `known` is True if it can be computed from the weights."""

    known = True


class _Weight(_Node):
    def __init__(self, name: str, aval: Any):
        self.name, self.aval = name, aval


class _Constant(_Node):
    def __init__(self, value: Any):
        self.value = value


class _Unknown(_Node):
    """A value that depends on data. Integers can be indices, see `_INDICES`."""

    def __init__(self, aval: Any):
        self.aval = aval
        dtype = getattr(aval, "dtype", np.float32)
        is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
        self.known = not is_key and not jnp.issubdtype(dtype, jnp.inexact)


class _Element(_Node):
    """Element `loop.index` of a stack along axis 0, in the body of a scan."""

    def __init__(self, stack: _Node, loop: _Loop):
        self.stack, self.loop, self.known = stack, loop, stack.known


class _Loop:
    """A scan. `index` is the element that is computed."""

    def __init__(self, length: int):
        self.length, self.index = length, 0


class _Result(_Node):
    """Result `position` of an equation."""

    def __init__(self, equation: Any, inputs: Sequence[_Node], position: int):
        self.equation, self.inputs, self.position = equation, inputs, position
        self.known = all(node.known for node in inputs)


# Following values through a trace.


def _follow(
    closed: Any, inputs: Sequence[_Node], check: Callable[[str, _Node], None]
) -> list[_Node]:
    """Calls `check(name, value)` for each mark, and returns the results' values."""
    jaxpr = closed.jaxpr
    values: dict[Any, _Node] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, constant in zip(jaxpr.constvars, closed.consts, strict=True):
        values[var] = _Constant(constant)

    def value_of(atom: Any) -> _Node:
        return _Constant(atom.val) if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        arguments = [value_of(atom) for atom in equation.invars]
        results: Sequence[_Node] = [
            _Result(equation, arguments, position)
            for position in range(len(equation.outvars))
        ]
        name = _marked_name(equation)
        if name:
            check(name, arguments[0])
        inner = [part for part in _inner_jaxprs(equation) if _has_marks(part)]
        for part in inner:
            inner_results = _follow(
                part, _inner_inputs(equation, arguments, part), check
            )
            if len(inner) == 1 and _is_plain_call(equation, part):
                results = inner_results
        values.update(zip(equation.outvars, results, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _marked_name(equation: Any) -> str:
    """The name that `mark` wrote. Empty for other equations."""
    name = str(equation.params.get("name", ""))
    if equation.primitive.name != "name" or not name.startswith(_PREFIX):
        return ""
    return name.removeprefix(_PREFIX)


def _inner_jaxprs(equation: Any) -> Iterator[Any]:
    """Yields the closed jaxprs of the functions that an equation calls."""
    for value in equation.params.values():
        parts = value if isinstance(value, tuple | list) else (value,)
        for part in parts:
            if isinstance(part, jex.core.ClosedJaxpr):
                yield part
            elif isinstance(part, jex.core.Jaxpr) and not part.constvars:
                yield jex.core.ClosedJaxpr(part, ())


def _has_marks(closed: Any) -> bool:
    for equation in closed.jaxpr.eqns:
        if _marked_name(equation) or any(map(_has_marks, _inner_jaxprs(equation))):
            return True
    return False


def _is_plain_call(equation: Any, inner: Any) -> bool:
    """True if an equation only calls the inner function, as jit and remat do."""
    return (
        equation.primitive.name not in ("cond", "scan", "while")
        and len(equation.invars) == len(inner.jaxpr.invars)
        and len(equation.outvars) == len(inner.jaxpr.outvars)
    )


def _inner_inputs(
    equation: Any, arguments: Sequence[_Node], inner: Any
) -> Sequence[_Node]:
    """The values of the inputs of a function that an equation calls."""
    params = equation.params
    unknown = [_Unknown(var.aval) for var in inner.jaxpr.invars]
    if equation.primitive.name == "cond":
        return arguments[1:]
    if equation.primitive.name == "scan":
        if "ft_in" in params:  # jax 0.11
            consts, carry, stacks = map(
                list, params["ft_in"].update(arguments).unpack()
            )
        else:
            first = params["num_consts"]
            last = first + params["num_carry"]
            consts, carry, stacks = (
                list(arguments[:first]),
                arguments[first:last],
                arguments[last:],
            )
        loop = _Loop(params["length"])
        middle = unknown[len(consts) : len(consts) + len(carry)]
        return [*consts, *middle, *(_Element(stack, loop) for stack in stacks)]
    if equation.primitive.name == "while":
        first = params["cond_nconsts"]
        last = first + params["body_nconsts"]
        is_body = inner.jaxpr is params["body_jaxpr"].jaxpr
        consts = arguments[first:last] if is_body else arguments[:first]
        return [*consts, *unknown[len(consts) :]]
    return arguments if len(arguments) == len(unknown) else unknown


# Comparing values with the weights.


def _is_unchanged(value: _Node, name: str) -> bool:
    origin = _origin(value)
    if isinstance(origin, _Weight):
        return origin.name == name
    if not value.known:
        return False
    loops = _loops(value)
    indices = [range(loop.length) for loop in loops]
    weights: dict[str, jax.Array] = {}
    for elements in itertools.product(*indices):
        for loop, index in zip(loops, elements, strict=True):
            loop.index = index
        for number in _INDICES:
            try:
                array = _compute(value, weights, number, {})
            except Exception:  # for example a collective, which needs its mesh
                return False
            if name not in weights or not _is_element(array, weights[name]):
                return False
    return True


def _origin(value: _Node) -> _Node:
    """The earliest value of the trace that has the same numbers in the same order.

    One cast to a float dtype is skipped. Two casts may lose digits that one cast keeps.
    """
    num_casts = 0
    while True:
        if isinstance(value, _Element):
            value = value.stack
            continue
        if not isinstance(value, _Result):
            return value
        primitive = value.equation.primitive.name
        if primitive == "convert_element_type" and num_casts == 0:
            if not jnp.issubdtype(value.equation.params["new_dtype"], jnp.inexact):
                return value
            num_casts = 1
        elif primitive not in _SAME_NUMBERS:
            return value
        value = value.inputs[0]


def _loops(value: _Node) -> list[_Loop]:
    """All scans that have an element on which a value depends."""
    loops: dict[_Loop, None] = {}
    visited: set[int] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, _Element):
            loops[node.loop] = None
            pending.append(node.stack)
        elif isinstance(node, _Result) and id(node.inputs) not in visited:
            visited.add(id(node.inputs))
            pending.extend(node.inputs)
    return list(loops)


def _compute(
    value: _Node, weights: dict[str, jax.Array], number: int, done: dict[int, Any]
) -> Any:
    """Computes a value from random weights.

    Args:
      value: to compute.
      weights: the random weights so far, by name. New ones are added.
      number: takes the place of unknown integers.
      done: the results of equations so far, by the `id` of their inputs.
    """
    if isinstance(value, _Constant):
        return value.value
    if isinstance(value, _Unknown):
        return jnp.full(value.aval.shape, number, value.aval.dtype)
    if isinstance(value, _Weight):
        if value.name not in weights:
            weights[value.name] = _random(value.aval, len(weights))
        return weights[value.name]
    if isinstance(value, _Element):
        return _compute(value.stack, weights, number, done)[value.loop.index]
    assert isinstance(value, _Result)
    # All results of an equation share the list of inputs.
    key = id(value.inputs)
    if key not in done:
        equation = value.equation
        arguments = [_compute(node, weights, number, done) for node in value.inputs]
        params = equation.primitive.get_bind_params(equation.params)
        results = equation.primitive.bind(*arguments, **params)
        is_list = equation.primitive.multiple_results
        done[key] = results if is_list else [results]
    return done[key][value.position]


def _random(aval: Any, seed: int) -> jax.Array:
    """Random numbers of a dtype and a shape."""
    generator = np.random.default_rng(seed)
    if jnp.issubdtype(aval.dtype, jnp.integer):
        info = jnp.iinfo(aval.dtype)
        numbers = generator.integers(int(info.min), int(info.max), aval.shape)
        return jnp.asarray(numbers.astype(aval.dtype))
    # A function may change only some magnitudes (pruning, clipping). So the magnitudes
    # cover the range of the dtype, and half of them are usual ones of weights.
    # Subnormals are left out, because devices may flush them to zero.
    info = jnp.finfo(aval.dtype)
    low, high = 0.9 * np.log2([float(info.smallest_normal), float(info.max)])
    # The range is divided into one step for each number, so there are no large gaps.
    size = int(np.prod(aval.shape))
    positions = (generator.permutation(size) + generator.random(size)) / max(size, 1)
    exponents = [low, max(low, _USUAL[0]), min(high, _USUAL[1]), high]
    numbers = np.exp2(np.interp(positions, [0, 0.25, 0.75, 1], exponents))
    numbers = numbers.reshape(aval.shape)
    if float(info.min) < 0:
        numbers *= generator.choice([-1, 1], aval.shape)
    return jnp.asarray(numbers.astype(aval.dtype))


def _is_element(array: jax.Array, weight: jax.Array) -> bool:
    """True if an array is the weight or one element of it along leading axes."""
    if array.size == 0:
        return weight.size == 0
    both_floats = jnp.issubdtype(array.dtype, jnp.inexact) and jnp.issubdtype(
        weight.dtype, jnp.inexact
    )
    if weight.size % array.size or (array.dtype != weight.dtype and not both_floats):
        return False
    rows = weight.astype(array.dtype).reshape(-1, array.size)
    row = array.reshape(1, -1)
    # A cast gives NaN for numbers that are too large for a dtype without infinities.
    both_nan = (rows != rows) & (row != row)
    return bool(((rows == row) | both_nan).all(1).any())
