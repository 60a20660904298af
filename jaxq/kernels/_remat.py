"""Policies of `jax.checkpoint` treat products with quantized weights as dot products.

Policies such as `dots_saveable` look at each equation, and save it if its primitive is
`dot_general`. A product with a quantized weight is another primitive, so a policy would
never save it. The rules here ask the policy about a `dot_general` of the same sizes.

jax does not ask a policy about the equations inside a function with its own derivative
(`jax.custom_jvp`, `jax.custom_vjp`). So the derivative marks the result.
`mark_product(y)` is `y`, and policies treat it as a dot product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive, primitives
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

# `product_p(y, has_batch=, num_terms=)` is y.
product_p = Primitive("quantized_product")


def mark_product(y: jax.Array, *, has_batch: bool, num_terms: int) -> jax.Array:
    """Returns `y`. Policies of `jax.checkpoint` treat it as a dot product.

    Args:
      y: the result of a product with a quantized weight.
      has_batch: the product has batch axes.
      num_terms: the contracted length k. A policy is asked about operands
        `[e, m, k]` and `[e, n, k]` whose product has the size of `y`.
    """
    return product_p.bind(y, has_batch=has_batch, num_terms=num_terms)


def save_like_dots(primitive: Primitive, has_batch: Callable[[Any], bool]) -> None:
    """Lets policies of `jax.checkpoint` treat a primitive as a dot product.

    A policy that offloads dot products to the host does not offload these products.
    They are computed again.

    Args:
      primitive: a primitive that computes products.
      has_batch: says for an equation of the primitive whether it has batch axes.
    """

    def rule(
        policy: Callable[..., Any],
        unknown_in: Sequence[bool],
        in_backward: Sequence[bool],
        equation: Any,
    ) -> tuple[Any, Any, list[bool], list[bool], list[Any]]:
        """See `partial_eval_jaxpr_custom` in jax.

        Returns:
          (equation of the forward pass or None, equation of the backward pass or None,
          whether the results are unknown in the forward pass, whether the backward pass
          computes them, values that the backward pass reads).
        """
        num_out = len(equation.outvars)
        if not any(unknown_in) and _is_saved(policy, equation, has_batch(equation)):
            return equation, None, [False] * num_out, [False] * num_out, []
        operands = zip(equation.invars, in_backward, strict=True)
        missing = [var for var, is_there in operands if not is_there]
        if any(unknown_in):
            return None, equation, [True] * num_out, [True] * num_out, missing
        return equation, equation, [False] * num_out, [True] * num_out, missing

    pe.partial_eval_jaxpr_custom_rules[primitive] = rule


def has_stack(equation: Any) -> bool:
    """True if the first operand `[e, m, k]` of an equation is a stack of matrices."""
    return equation.invars[0].aval.shape[0] != 1


def _is_saved(policy: Callable[..., Any], equation: Any, has_batch: bool) -> bool:
    """True if a policy saves an equation, or would save it as a dot product."""
    avals = [var.aval for var in equation.invars]
    if _means_save(policy(equation.primitive, *avals, **equation.params)):
        return True
    e, m, n, k = _sizes(equation)
    dtype = avals[0].dtype
    if has_batch:
        x, weight = ShapedArray((e, m, k), dtype), ShapedArray((e, n, k), dtype)
        dimension_numbers = (((2,), (2,)), ((0,), (0,)))
    else:
        x, weight = ShapedArray((e * m, k), dtype), ShapedArray((n, k), dtype)
        dimension_numbers = (((1,), (1,)), ((), ()))
    as_dot = policy(
        primitives.dot_general_p,
        x,
        weight,
        dimension_numbers=dimension_numbers,
        precision=None,
        preferred_element_type=None,
        out_sharding=None,
    )
    return _means_save(as_dot)


def _sizes(equation: Any) -> tuple[int, int, int, int]:
    """The sizes (e, m, n, k) of the product that an equation computes or marks."""
    first, y = equation.invars[0].aval, equation.outvars[0].aval
    if equation.primitive is not product_p:
        return *first.shape[:2], y.shape[-1], first.shape[-1]
    *rows, n = (1, 1, *y.shape)
    e = y.shape[0] if equation.params["has_batch"] and y.ndim > 1 else 1
    return e, math.prod(rows) // max(e, 1), n, equation.params["num_terms"]


def _means_save(answer: Any) -> bool:
    """True for the answers of a policy that mean "save": True, or jax's `Saveable`."""
    return answer is True or type(answer).__name__ == "SaveableType"


def _batch(args, dims, **params):
    return product_p.bind(args[0], **params), dims[0]


def _jvp(primals, tangents, **params):
    return product_p.bind(primals[0], **params), tangents[0]


product_p.def_impl(lambda y, **params: y)
product_p.def_abstract_eval(lambda y, **params: y)
mlir.register_lowering(product_p, lambda ctx, y, **params: [y])
batching.primitive_batchers[product_p] = _batch
ad.primitive_jvps[product_p] = _jvp
save_like_dots(product_p, lambda equation: equation.params["has_batch"])
