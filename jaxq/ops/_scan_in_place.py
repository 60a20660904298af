"""`scan_in_place`: a scan over layers whose kernels read the codes where they lie.

`lax.scan` cuts one layer out of a stack in each step. A kernel is a call that XLA
cannot look into. So XLA copies the codes of the layer before each kernel starts. The
copy reads and writes as many bytes as the kernel reads.

The function is traced, and its jaxpr is evaluated again. In this evaluation a step of a
scan gets a `_Slice`, the whole stack and a number, for each array of codes that a
product reads. A product with a `_Slice` becomes a product with an index
(`kernels.with_index`). All other equations stay as they are.

    scan(body, xs=codes)     y = product(x, codes)                  # before
    scan(body, xs=numbers)   y = product(x, stack, index=number)    # after
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import zero_from_primal
from jax.sharding import PartitionSpec

from jaxq import jaxprs, kernels

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

# Products by a quantized weight. The operands are x, the leaves, and then tangents.
_PRODUCTS = ("quantized_matmul", "quantized_matmul_tangent")
# These change how an array is typed on a mesh, for example before a product.
_VARYING = ("pcast", "pvary")
# These do not reorder elements. If the number of elements stays, they are reshapes.
_RESHAPES = ("broadcast_in_dim", "reshape", "reshard", "slice", "squeeze", *_VARYING)
# Calls whose operands are the inputs of their function.
_PLAIN_CALLS = (
    *("checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"),
    *("jit", "pjit", "remat2"),
)


def scan_in_place(fn: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Returns `fn` with scans that do not copy the codes of stacked weights.

    A scan over layers (`lax.scan`, `nnx.scan`, linen's `nn.scan`) slices each stacked
    QTensor. If a kernel computes the product, XLA copies the codes of the layer first.
    In the result of `scan_in_place` the kernel gets the whole stack and the number of
    the layer. Scales are still sliced. They are a small part of a weight. The kernels
    of `ragged_dot` and of codes with scales in groups still get a copy of their slice.

    The results are the same, bit for bit. So are the derivatives. A product that no
    kernel computes runs in plain XLA and slices its codes, as without `scan_in_place`.

    Args:
      fn: function of arrays and of pytrees of arrays. `jax.jit` must accept it. The
        scans may be inside jit, remat, other loops and shard_map.

    Returns:
      A function with the arguments and results of `fn`. Wrap it in `jax.jit`.

    Warns:
      FallbackWarning: when called, if no scan of `fn` slices codes for a product, if a
        product in a scan gets its codes in another way, or if it has a kernel that gets
        a copy of its slice. The message gives the reason.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> w = jnp.ones((3, 64, 64))
      >>> stack = jaxq.quantize(w, "int4", contracting=-2, batch=0)
      >>> def layers(x, stack):
      ...     return jax.lax.scan(lambda x, layer: (x @ layer, None), x, stack)[0]
      >>> jax.jit(jaxq.ops.scan_in_place(layers))(jnp.ones((2, 64)), stack).shape
      (2, 64)
    """
    if not callable(fn):
        raise TypeError(f"scan_in_place: fn must be a function, got {fn!r}.")

    @functools.wraps(fn, updated=())
    def in_place(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        _warn(_products_of(closed.jaxpr), _copying_products(closed.jaxpr).in_scans)
        outs = _evaluate(closed, jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return in_place


def _warn(products: _Products, copying: Sequence[str]) -> None:
    """Warns if a product in a scan gets codes that are not a slice, or if none does.

    Args:
      products: the products that can read a stack.
      copying: names of products in scans whose kernels read a copy of their slice.
    """
    if copying:
        names = ", ".join(sorted(set(copying)))
        warnings.warn(
            "scan_in_place: the kernels of some products in a scan cannot read a "
            f"stack ({names}), so the codes of each slice are copied first.",
            kernels.FallbackWarning,
            stacklevel=3,
        )
    if products.copied:
        reasons = ", ".join(sorted(set(products.copied)))
        warnings.warn(
            f"scan_in_place: {len(products.copied)} products in a scan get their codes "
            f"from {reasons}, so these codes are written to memory first. Scan over "
            "the stacked weights themselves, and multiply by the slices.",
            kernels.FallbackWarning,
            stacklevel=3,
        )
    elif not products.num_stacks and not copying:
        warnings.warn(
            "scan_in_place: no scan in this function slices a stacked QTensor for a "
            "product that can read a stack, so nothing changes.",
            kernels.FallbackWarning,
            stacklevel=3,
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stack", "number"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Slice:
    """The array `stack[number]`, which has not been cut out of the stack.

    Attributes:
      stack: `[length, *shape]`.
      number: int32 scalar.
    """

    stack: jax.Array
    number: jax.Array

    def copy(self) -> jax.Array:
        return lax.dynamic_index_in_dim(self.stack, self.number, keepdims=False)


def _slice_of(stack: jax.Array | _Slice, number: jax.Array) -> _Slice:
    """`stack[number]`. The stack may be a slice of a stack of stacks."""
    if not isinstance(stack, _Slice):
        return _Slice(stack, number)
    length = stack.stack.shape[1]
    longer = stack.stack.reshape(-1, *stack.stack.shape[2:])
    return _Slice(longer, stack.number * length + number)


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, _Slice) else value


# What can be read in place.


class _Products(NamedTuple):
    """The products of a jaxpr, and where their codes come from.

    Attributes:
      inputs: positions of the inputs that products take as codes, perhaps reshaped.
      num_stacks: number of stacks that scans slice for products.
      computed: the primitives that compute the codes of other products.
      copied: where the codes of such products in scans come from: a primitive, or the
        carry of the scan.
    """

    inputs: frozenset[int]
    num_stacks: int
    computed: tuple[str, ...]
    copied: tuple[str, ...]


def _products_of(jaxpr: Any) -> _Products:
    """Finds the products of a jaxpr, also in the functions that it calls."""
    # The position of the input that each variable is, perhaps reshaped.
    origins = {variable: i for i, variable in enumerate(jaxpr.invars)}
    makers = {}  # the primitive that computes each other variable
    inputs, num_stacks, computed, copied = set(), 0, [], []

    def read(atom: Any) -> None:
        """Notes that a product takes this value as codes."""
        if isinstance(atom, jex.core.Literal):
            return
        if atom in origins:
            inputs.add(origins[atom])
        elif atom in makers:
            computed.append(makers[atom])

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        makers.update(dict.fromkeys(equation.outvars, name))
        if _is_reshape(equation):
            operand, result = equation.invars[0], equation.outvars[0]
            if operand in origins:
                origins[result] = origins[operand]
            # The reason for a copy is what computed the codes, not their new shape.
            makers[result] = makers.get(operand, name)
        if name in _PRODUCTS:
            read(equation.invars[_codes_position(equation)])
        passed = _passed(equation)
        for inner in _functions(equation):
            products = _products_of(inner)
            num_stacks += products.num_stacks
            copied += products.copied
            if name == "scan":
                copied += products.computed
                sliced = products.inputs & _xs_positions(equation)
                num_stacks += len(sliced)
                # A slice of a slice.
                for position in sliced:
                    inputs.update(_origin(origins, equation.invars[position]))
                carried = products.inputs - passed - sliced
                copied += ["the carry"] * len(carried)
            else:
                computed += products.computed
                computed += [name] * len(products.inputs - passed)
            for position in products.inputs & passed:
                read(equation.invars[position])
    return _Products(frozenset(inputs), num_stacks, tuple(computed), tuple(copied))


class _Copying(NamedTuple):
    """The products of a jaxpr that have a kernel which cannot read a stack.

    Attributes:
      inputs: names of such products, by the position of the input that is their codes.
      in_scans: the name of each such product whose codes are a slice of a scan.
    """

    inputs: dict[int, str]
    in_scans: list[str]


def _copying_products(jaxpr: Any) -> _Copying:
    """Finds products whose kernels cannot read a stack, also in inner functions."""
    origins = {variable: [i] for i, variable in enumerate(jaxpr.invars)}
    inputs, in_scans = {}, []

    def read(atom: Any, product: str) -> None:
        """Notes that a product takes this value as codes."""
        if not isinstance(atom, jex.core.Literal):
            inputs.update(dict.fromkeys(origins.get(atom, ()), product))

    for equation in jaxpr.eqns:
        if _is_reshape(equation):
            operand, result = equation.invars[0], equation.outvars[0]
            if not isinstance(operand, jex.core.Literal):
                origins[result] = origins.get(operand, [])
        product = _copying_product(equation)
        if product is not None:
            name, position = product
            read(equation.invars[position], name)
        passed = _passed(equation)
        is_scan = equation.primitive.name == "scan"
        slices = _xs_positions(equation) if is_scan else frozenset()
        for inner in _functions(equation):
            products = _copying_products(inner)
            in_scans += products.in_scans
            for position, name in products.inputs.items():
                if position in slices:
                    in_scans.append(name)
                elif position in passed:
                    read(equation.invars[position], name)
    return _Copying(inputs, in_scans)


def _copying_product(equation: Any) -> tuple[str, int] | None:
    """The name of a product whose kernel reads a copy, and the position of its codes.

    None for other equations, and for products that no kernel computes.
    """
    name = equation.primitive.name
    if name not in ("quantized_ragged_dot", "codes_matmul"):
        return None
    call, avals = equation.params["call"], [atom.aval for atom in equation.invars]
    if name == "codes_matmul":
        problem = call.problem(avals)
        if isinstance(problem, str) or problem.num_groups == 1:
            return None
        position = len(call.a_leaves) + call.b_leaves.index("data")
        return "codes with scales in groups", position
    x, _, *leaves = avals
    stacked = [_without_batch(leaf) for leaf in leaves]
    problem = kernels.ragged_problem(call, x.shape[1], stacked, x.dtype)
    if isinstance(problem, str) or problem.transposed:
        return None
    return "ragged_dot", 2 + call.leaves.index("data")


def _without_batch(leaf: Any) -> jax.ShapeDtypeStruct:
    """`[b, e, ...]` as `[b * e, ...]`."""
    shape = (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


def _origin(origins: dict, atom: Any) -> list[int]:
    is_input = not isinstance(atom, jex.core.Literal) and atom in origins
    return [origins[atom]] if is_input else []


def _functions(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation calls and that can be evaluated again."""
    if equation.primitive.name in _CALLS:
        yield from jaxprs.inner_jaxprs(equation)


def _is_reshape(equation: Any) -> bool:
    """True if the result has the elements of the operand in the same order."""
    if equation.primitive.name not in _RESHAPES or len(equation.invars) != 1:
        return False
    if equation.params.get("dimensions") and equation.primitive.name == "reshape":
        return False
    operand, result = equation.invars[0].aval, equation.outvars[0].aval
    return operand.size == result.size


def _codes_position(equation: Any) -> int:
    """The position of the codes among the operands of a product."""
    return 1 + equation.params["call"].leaves.index("data")


def _xs_positions(equation: Any) -> frozenset[int]:
    """The positions of the stacks that a scan slices."""
    _, _, xs = jaxprs.scan_operands(equation, list(range(len(equation.invars))))
    return frozenset(xs)


def _passed(equation: Any) -> frozenset[int]:
    """The positions of operands that a call may get as a `_Slice`."""
    name, positions = equation.primitive.name, list(range(len(equation.invars)))
    if name == "scan":
        return frozenset(jaxprs.scan_operands(equation, positions)[0])
    if name not in _PLAIN_CALLS:
        return frozenset()
    # A sharding of the slice does not say how the stack is sharded.
    shardings = equation.params.get("in_shardings", (None,) * len(positions))
    return frozenset(
        position
        for position, sharding in zip(positions, shardings, strict=True)
        if not isinstance(sharding, jax.sharding.Sharding)
    )


# Evaluation.


def _evaluate(closed: Any, args: Sequence) -> list:
    """Evaluates a closed jaxpr. Each argument is an array or a `_Slice`."""
    jaxpr = closed.jaxpr
    variables = (*jaxpr.constvars, *jaxpr.invars)
    values = dict(zip(variables, (*closed.consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        with equation.ctx.manager:
            outs = _evaluate_equation(equation, operands)
        values.update(zip(equation.outvars, outs, strict=True))
    return [_copy(read(atom)) for atom in jaxpr.outvars]


def _evaluate_equation(equation: Any, operands: list) -> Sequence:
    name = equation.primitive.name
    if _is_reshape(equation) and isinstance(operands[0], _Slice):
        return [_reshaped(equation, operands[0])]
    if name in _PRODUCTS:
        return [_product(equation, operands)]
    functions = [_products_of(inner) for inner in _functions(equation)]
    read_inside = frozenset().union(*(products.inputs for products in functions))
    if name == "scan":
        sliced = read_inside & _xs_positions(equation)
        kept = sliced | (read_inside & _passed(equation))
    else:
        sliced, kept = frozenset(), read_inside & _passed(equation)
    operands = [
        operand if position in kept else _copy(operand)
        for position, operand in enumerate(operands)
    ]
    has_slices = any(isinstance(operand, _Slice) for operand in operands)
    if sliced:
        return _scan(equation, operands, sliced)
    if has_slices or any(products.num_stacks for products in functions):
        return _CALLS[name](_evaluate, equation, operands)
    return jaxprs.bind(equation, operands)


def _reshaped(equation: Any, layer: _Slice) -> _Slice:
    """The result of an equation that `_is_reshape`."""
    name = equation.primitive.name
    if name in _VARYING:
        stack, number = (
            equation.primitive.bind(array, **equation.params)
            for array in (layer.stack, layer.number)
        )
        return _Slice(stack, number)
    if name != "reshard":
        shape = (layer.stack.shape[0], *equation.outvars[0].aval.shape)
        return _Slice(layer.stack.reshape(shape), layer.number)
    sharding = equation.params["dst_sharding"]

    def reshard(array: jax.Array, *spec: Any) -> jax.Array:
        changed = sharding.update(spec=PartitionSpec(*spec))
        params = equation.params | {"dst_sharding": changed}
        return equation.primitive.bind(array, **params)

    # The axis of layers is not sharded: jax scans over no other stack on such a mesh.
    return _Slice(reshard(layer.stack, None, *sharding.spec), reshard(layer.number))


def _product(equation: Any, operands: list) -> jax.Array:
    """A product, with an index if its codes are a `_Slice`."""
    call, position = equation.params["call"], _codes_position(equation)
    codes = operands[position]
    if not isinstance(codes, _Slice) or call.has_index:
        return equation.primitive.bind(*map(_copy, operands), call=call)
    num_matrices = codes.stack.shape[1]
    stack = codes.stack.reshape(-1, *codes.stack.shape[2:])
    first = codes.number.astype(jnp.int32) * num_matrices
    index = first + jnp.arange(num_matrices, dtype=jnp.int32)
    x, *others = (None if operand is codes else _copy(operand) for operand in operands)
    leaves, tangents = others[: len(call.leaves)], others[len(call.leaves) :]
    call, leaves = kernels.with_index(call, leaves, stack, index)
    return equation.primitive.bind(x, *leaves, *tangents, call=call)


def _scan(equation: Any, operands: list, sliced: frozenset[int]) -> Sequence:
    """A scan over numbers instead of the stacks at the positions `sliced`."""
    stacks = {position: operands[position] for position in sliced}
    numbers = jnp.arange(equation.params["length"], dtype=jnp.int32)

    def evaluate(closed: Any, args: Sequence) -> list:
        values = list(args)
        for position, stack in stacks.items():
            values[position] = _slice_of(stack, values[position])
        return _evaluate(closed, values)

    operands = [
        numbers if position in sliced else operand
        for position, operand in enumerate(operands)
    ]
    return _CALLS["scan"](evaluate, equation, operands)


def _custom_jvp_call(evaluate: jaxprs.Evaluate, equation: Any, args: list) -> Sequence:
    """A call with its own derivative rule. The derivative calls that rule.

    The rule gets copies of slices, which are codes and have no tangents.
    """

    @jax.custom_jvp
    def call(*args):
        return evaluate(equation.params["call_jaxpr"], args)

    @call.defjvp
    def derivative(args, tangents):
        def original(*args):
            return list(jaxprs.bind(equation, args))

        copies = tuple(map(_copy, args))
        tangents = tuple(
            zero_from_primal(copy) if isinstance(arg, _Slice) else tangent
            for arg, copy, tangent in zip(args, copies, tangents, strict=True)
        )
        return call(*args), jax.jvp(original, copies, tangents)[1]

    return call(*args)


def _custom_vjp_call(evaluate: jaxprs.Evaluate, equation: Any, args: list) -> Sequence:
    """A call with its own derivative rule. The backward pass calls that rule.

    Codes have no gradients. The rule gets copies of them.
    """

    @jax.custom_vjp
    def call(*args):
        return evaluate(equation.params["call_jaxpr"], args)

    def forward(*args):
        return call(*args), args

    def backward(args, cotangents):
        def original(*args):
            return list(jaxprs.bind(equation, args))

        _, pull_back = jax.vjp(original, *map(_copy, args))
        gradients = pull_back(cotangents)
        return tuple(
            None if isinstance(arg, _Slice) else gradient
            for arg, gradient in zip(args, gradients, strict=True)
        )

    call.defvjp(forward, backward)
    return call(*args)


_CALLS: dict[str, jaxprs.Call] = {
    **jaxprs.CALLS,
    "custom_jvp_call": _custom_jvp_call,
    "custom_vjp_call": _custom_vjp_call,
}
