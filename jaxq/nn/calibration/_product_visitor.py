"""Evaluates a function, and visits the products of its parameters with data.

`Products.evaluate` evaluates a jaxpr, and knows for each array which parameter it
holds (`_origins.py`). It enters the functions that jit, remat and derivative rules
call, and the bodies of scan, while_loop and cond. The step of a scan over stacked
layers is an index into the stack. The state of the visitor is a value of the loop, so
it can leave the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.extend as jex
import jax.numpy as jnp
from jax import lax

from jaxq.emulation import NOT_CALLS
from jaxq.jaxprs import bind, closed_jaxpr, inner_jaxprs, scan_operands
from jaxq.nn.calibration._origins import (
    Changed,
    Origin,
    Other,
    View,
    combined,
    is_bias,
    is_data,
    is_parameter,
)
from jaxq.nn.calibration._product import (
    PRODUCTS,
    NotAProduct,
    Product,
    contracts,
    product_of,
)

# These primitives return their operand. Some of them round it to another dtype.
_SAME = frozenset([
    "convert_element_type", "copy", "device_put", "mesh_cast", "name",
    "optimization_barrier", "pcast", "pvary", "quantized_product", "reduce_precision",
    "reshard", "sharding_constraint", "stop_gradient",
])  # fmt: skip

# Products whose rows calibration does not read.
_UNSEEN_PRODUCTS = frozenset(["ragged_dot", "ragged_dot_general", "scaled_dot"])

# Primitives that call one function. The parameter of this name holds the function.
_CALLS = {
    "checkpoint": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "jit": "jaxpr",
    "pjit": "jaxpr", "remat2": "jaxpr",
}  # fmt: skip


class Products:
    """Evaluates a function, and visits the products of its parameters with data.

    Args:
      shapes: the shape of each parameter, by its position among the leaves.
      visit: `visit(product, state)` returns the next state. The body of a loop is
        traced, and may be traced several times.
      state: the first state, a tree of arrays.

    Attributes:
      state: the state after the last product.
      changed: by parameter: why the products do not multiply by the parameter as it is.
      readers: by parameter: the primitives other than products that read it, each with
        a key that identifies the equation.
      biases: by parameter: the parameter that is added to the output, for each product.
    """

    def __init__(
        self,
        shapes: Mapping[int, tuple[int, ...]],
        visit: Callable[[Product, Any], Any],
        state: Any,
    ):
        self._shapes = shapes
        self._visit = visit
        self.state = state
        self.changed: dict[int, str] = {}
        self.readers: dict[int, set[tuple[str, Any]]] = {}
        self.biases: dict[int, dict[Any, int]] = {}
        # The equations around the present one. A jitted function that is called twice
        # is one jaxpr, but its products are different ones.
        self._around: list[int] = []

    def evaluate(
        self, closed: Any, args: Sequence, origins: Sequence[Origin]
    ) -> tuple[list, list[Origin]]:
        """The results of a closed jaxpr, and their origins."""
        jaxpr = closed.jaxpr
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))
        origin_of: dict[Any, Origin] = dict(zip(jaxpr.invars, origins, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.core.Literal) else values[atom]

        def origin(atom: Any) -> Origin:
            is_literal = isinstance(atom, jex.core.Literal)
            return Other.CONSTANT if is_literal else origin_of.get(atom, Other.CONSTANT)

        for equation in jaxpr.eqns:
            self._around.append(id(equation))
            operands = [read(atom) for atom in equation.invars]
            operand_origins = [origin(atom) for atom in equation.invars]
            with equation.ctx.manager:
                outs, out_origins = self._equation(equation, operands, operand_origins)
            values.update(zip(equation.outvars, outs, strict=True))
            origin_of.update(zip(equation.outvars, out_origins, strict=True))
            self._around.pop()
        return [read(atom) for atom in jaxpr.outvars], list(map(origin, jaxpr.outvars))

    def _equation(
        self, equation: Any, args: list, origins: list[Origin]
    ) -> tuple[Sequence, Sequence[Origin]]:
        """The results of an equation, and their origins."""
        name = equation.primitive.name
        has_parameter = any(map(_holds_parameter, origins))
        if has_parameter and name in _CALLS:
            inner = closed_jaxpr(equation.params[_CALLS[name]])
            return self.evaluate(inner, args, origins)
        if has_parameter and name in _LOOPS:
            outs = _LOOPS[name](self, equation, args, origins)
            return outs, [Other.DATA] * len(outs)
        outs = bind(equation, args)
        if has_parameter and name in PRODUCTS:
            return outs, [self._product(equation, args, origins)]
        if name in _SAME:
            is_float = jnp.issubdtype(outs[0].dtype, jnp.floating)
            if is_float and len(outs) == len(origins):
                return outs, origins
        move = _MOVES.get(name)
        if move is not None and isinstance(origins[0], View):
            view = move(origins[0], equation.params, args)
            if view is not None:
                return outs, [view]
        if name == "add":
            self._add(*origins)
        self._read(name, origins)
        if name in _UNSEEN_PRODUCTS:
            self._lose(origins, f"forward multiplies it with {name}")
        if name not in NOT_CALLS and any(inner_jaxprs(equation)):
            self._lose(origins, f"forward reads it inside {name}")
        return outs, [combined(origins, name)] * len(outs)

    def _product(self, equation: Any, args: list, origins: list[Origin]) -> Origin:
        """Visits a product, and returns the origin of its output."""
        name = equation.primitive.name
        if not any(map(is_data, origins)):
            return combined(origins, name)  # a product of parameters changes them
        if not contracts(equation):
            self._read(name, origins)  # such as an outer product
            return Other.DATA
        side = 0 if _holds_parameter(origins[0]) else 1
        origin = origins[side]
        if isinstance(origin, Changed):
            reason = f"forward changes it by {origin.by} before a product"
            if origin.by in PRODUCTS:
                reason = "forward multiplies it by a parameter before it reads data"
            for leaf in origin.leaves:
                self.changed.setdefault(leaf, reason)
            return Other.DATA
        assert isinstance(origin, View)
        leaf, key = origin.leaf, tuple(self._around)
        shape = self._shapes[leaf]
        try:
            product = product_of(equation, args, side, origin, shape, key)
        except NotAProduct as reason:
            self.changed.setdefault(leaf, str(reason))
            return Other.DATA
        self.state = self._visit(product, self.state)
        return product.output or Other.DATA

    def _add(self, left: Origin, right: Origin) -> None:
        """Records a parameter that is added to the output of a product."""
        for output, bias in ((left, right), (right, left)):
            if is_data(output) and isinstance(output, View) and is_parameter(bias):
                assert isinstance(bias, View)
                if is_bias(output, bias, self._shapes[bias.leaf]):
                    biases = self.biases.setdefault(output.leaf, {})
                    biases[output.product] = bias.leaf

    def _read(self, name: str, origins: Sequence[Origin]) -> None:
        """Records the parameters that a primitive other than a product reads."""
        for origin in origins:
            if is_parameter(origin):
                assert isinstance(origin, View)
                self.readers.setdefault(origin.leaf, set()).add(
                    (name, tuple(self._around))
                )

    def _lose(self, origins: Sequence[Origin], reason: str) -> None:
        """Records that products of parameters cannot be visited."""
        reason = f"{reason}, where calibration cannot see its input"
        for origin in origins:
            if is_parameter(origin):
                assert isinstance(origin, View)
                self.changed.setdefault(origin.leaf, reason)
            elif isinstance(origin, Changed):
                for leaf in origin.leaves:
                    self.changed.setdefault(leaf, reason)

    # The loops. Their carries depend on the steps, so the origin of a carry is `DATA`.

    def _scan(self, equation: Any, args: list, origins: list[Origin]) -> list:
        consts, carry, xs = scan_operands(equation, args)
        const_origins, carry_origins, x_origins = scan_operands(equation, origins)
        self._read("scan", carry_origins)
        closed, params = closed_jaxpr(equation.params["jaxpr"]), equation.params

        def body(state_and_carry: Any, step_and_x: Any) -> Any:
            self.state, carry = state_and_carry
            step, x = step_and_x
            inner_origins = [
                *const_origins,
                *[Other.DATA] * len(carry),
                *[_at_step(origin, step) for origin in x_origins],
            ]
            outs, _ = self.evaluate(closed, [*consts, *carry, *x], inner_origins)
            return (self.state, outs[: len(carry)]), outs[len(carry) :]

        steps = jnp.arange(params["length"], dtype=jnp.int32)
        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        state_and_carry = (self.state, list(carry))
        (state, carry), ys = lax.scan(
            body, state_and_carry, (steps, list(xs)), **options
        )
        self.state = state
        return [*carry, *ys]

    def _while(self, equation: Any, args: list, origins: list[Origin]) -> list:
        params = equation.params
        first = params["cond_nconsts"]
        last = first + params["body_nconsts"]
        self._lose(origins[:first], "forward reads it in the condition of a while_loop")
        self._read("while", origins[last:])
        condition = closed_jaxpr(params["cond_jaxpr"])
        closed = closed_jaxpr(params["body_jaxpr"])
        inner_origins = [*origins[first:last], *[Other.DATA] * len(args[last:])]

        def cond(state_and_carry: Any) -> Any:
            values = [*args[:first], *state_and_carry[1]]
            return jex.core.jaxpr_as_fun(condition)(*values)[0]

        def body(state_and_carry: Any) -> Any:
            self.state, carry = state_and_carry
            outs, _ = self.evaluate(closed, [*args[first:last], *carry], inner_origins)
            return self.state, outs

        self.state, carry = lax.while_loop(cond, body, (self.state, list(args[last:])))
        return list(carry)

    def _cond(self, equation: Any, args: list, origins: list[Origin]) -> list:
        def visited(closed: Any) -> Callable[..., Any]:
            def branch(state: Any, *operands: Any) -> Any:
                self.state = state
                outs, _ = self.evaluate(closed, operands, origins[1:])
                return self.state, outs

            return branch

        branches = [visited(closed_jaxpr(b)) for b in equation.params["branches"]]
        self.state, outs = lax.switch(args[0], branches, self.state, *args[1:])
        return list(outs)


_LOOPS = {"cond": Products._cond, "scan": Products._scan, "while": Products._while}


def _holds_parameter(origin: Origin) -> bool:
    return is_parameter(origin) or isinstance(origin, Changed)


def _at_step(origin: Origin, step: Any) -> Origin:
    """The origin of the slice that a scan reads at a step."""
    if is_data(origin):
        return Other.DATA
    return origin.at(0, step) if isinstance(origin, View) else origin


# What becomes of a view when its array is moved. None if the result is no view.


def _transposed_view(view: View, params: dict[str, Any], args: Sequence) -> View | None:
    return view.transposed(params["permutation"])


def _reshaped_view(view: View, params: dict[str, Any], args: Sequence) -> View | None:
    if params["dimensions"] is not None:
        return None
    return view.reshaped(params["new_sizes"])


def _broadcast_view(view: View, params: dict[str, Any], args: Sequence) -> View | None:
    return view.broadcast(params["shape"], tuple(params["broadcast_dimensions"]))


def _squeezed_view(view: View, params: dict[str, Any], args: Sequence) -> View | None:
    for axis in sorted(params["dimensions"], reverse=True):
        view = view.at(axis, 0)
    return view


def _slice_view(view: View, params: dict[str, Any], args: Sequence) -> View | None:
    strides = params["strides"]
    if strides is not None and set(strides) != {1}:
        return None
    starts = params["start_indices"]
    limits = params["limit_indices"]
    sizes = [limit - start for start, limit in zip(starts, limits, strict=True)]
    return _view_of_positions(view, args[0].shape, starts, sizes)


def _dynamic_slice_view(
    view: View, params: dict[str, Any], args: Sequence
) -> View | None:
    shape, sizes = args[0].shape, params["slice_sizes"]
    starts = [
        jnp.clip(start, 0, whole - size)
        for start, whole, size in zip(args[1:], shape, sizes, strict=True)
    ]
    return _view_of_positions(view, shape, starts, sizes)


def _view_of_positions(
    view: View, shape: Sequence[int], starts: Sequence[Any], sizes: Sequence[int]
) -> View | None:
    """The view of one position of some axes and of all positions of the others."""
    for axis, size in enumerate(sizes):
        if size == shape[axis]:
            continue
        if size != 1:
            return None
        axes = list(view.at(axis, starts[axis]).axes)
        axes.insert(axis, ())
        view = view.at(axis, starts[axis]).with_axes(axes)
    return view


_MOVES: dict[str, Callable[[View, dict[str, Any], Sequence], View | None]] = {
    "broadcast_in_dim": _broadcast_view,
    "dynamic_slice": _dynamic_slice_view,
    "reshape": _reshaped_view,
    "slice": _slice_view,
    "squeeze": _squeezed_view,
    "transpose": _transposed_view,
}
