"""`matmul` and `einsum` with QTensors. Both call `dot_general`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.meshes import apply_out_sharding
from jaxq.ops._decision import accumulate_dtype, result_dtype
from jaxq.ops._dimension_numbers import DimensionNumbers, align_matmul
from jaxq.ops._dot_general import dot_general
from jaxq.ops._operands import Operand, as_operands
from jaxq.qtensor import QUANTIZED


def matmul(a: Operand, b: Operand, *, preferred_element_type: Any = None) -> jax.Array:
    """`a @ b` as numpy defines it; either operand may be a QTensor.

    Args:
      a: `[..., m, k]` or `[k]`.
      b: `[..., k, n]` or `[k]`. Leading axes are matched from the right and must have
        equal sizes (an axis of size 1 is not broadcast). The leading axes of a QTensor
        are its batch axes.
      preferred_element_type: dtype of the result, as in `dot_general`.

    Returns:
      `[..., m, n]`, accumulated in int32 or float32.

    Raises:
      TypeError: contracted or leading axes differ in size, or `dot_general` does not
        accept a dtype.
      ValueError: an operand has no axes; or a QTensor, or an operand with one axis,
        would have to be broadcast to the leading axes of the other operand.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.ones((64, 16)), "int8")
      >>> jaxq.matmul(jnp.ones((3, 5, 64)), qt).shape
      (3, 5, 16)
    """
    lhs, rhs, dims = align_matmul(*as_operands(a, b, caller="matmul"))
    y = dot_general(lhs, rhs, dims, preferred_element_type=preferred_element_type)
    shared = len(dims[1][0])
    num_m = 1 if lhs.ndim > 1 else 0
    extra_a = max(lhs.ndim - 2 - shared, 0)
    extra_b = max(rhs.ndim - 2 - shared, 0)
    # [shared, extra of a, m, extra of b, n] -> [extra, shared, m, n]. Only one of the
    # two operands has extra axes.
    y = jnp.moveaxis(y, range(shared, shared + extra_a), range(extra_a))
    first_b = shared + extra_a + num_m
    return jnp.moveaxis(y, range(first_b, first_b + extra_b), range(extra_b))


def einsum(
    subscripts: str,
    *operands: Operand,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jnp.einsum` of two operands; either may be a QTensor.

    If no operand is a QTensor, this is `jnp.einsum` of any number of operands. The sums
    then have the dtype that `dot_general` accumulates in.

    Args:
      subscripts: for example "bk,kn->bn". Three rules apply if an operand is a QTensor.
        Only the float operand may have an ellipsis. An index must not repeat within an
        operand. An index that only one operand has must be in the result.
      *operands: two arrays or QTensors.
      precision: passed to jax if all operands are arrays; ignored otherwise.
      preferred_element_type: dtype of the result, as in `dot_general`.
      out_sharding: how the result is sharded over a mesh, as in `dot_general`.

    Returns:
      The axes of the result in the order of `subscripts`; accumulated in int32 or
      float32.

    Raises:
      ValueError: `subscripts` name more or fewer axes than an operand has, or break a
        rule above; or an operand is a QTensor and there are not two operands.
      TypeError: `subscripts` is not a string; or `dot_general` does not accept an axis
        size or a dtype.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.ones((64, 4, 8)), "int8", contracting=(-3,))
      >>> jaxq.einsum("btd,dhk->bthk", jnp.ones((2, 3, 64)), qt).shape
      (2, 3, 4, 8)
    """
    if not isinstance(subscripts, str):
        raise TypeError(
            "einsum: subscripts must be a string such as 'bk,kn->bn', got "
            f"{type(subscripts).__name__}."
        )
    values = as_operands(*operands, caller="einsum")
    if not any(isinstance(value, QUANTIZED) for value in values):
        y = jnp.einsum(
            subscripts,
            *values,
            precision=precision,
            preferred_element_type=accumulate_dtype(*values),
            out_sharding=out_sharding,
        )
        return y.astype(preferred_element_type or result_dtype(*values))
    if len(values) != 2:
        raise ValueError(
            "einsum: a product with a QTensor has two operands, got "
            f"{len(values)} in {subscripts!r}. Multiply two at a time."
        )
    a, b = values
    dims, order = einsum_numbers(subscripts, a.ndim, b.ndim)
    y = dot_general(a, b, dims, preferred_element_type=preferred_element_type)
    return apply_out_sharding(jnp.transpose(y, order), out_sharding)


def einsum_numbers(
    subscripts: str, left_ndim: int, right_ndim: int
) -> tuple[DimensionNumbers, list[int]]:
    """The arguments of the `dot_general` that computes an einsum of two operands.

    Args:
      subscripts: as in `einsum`.
      left_ndim: number of axes of the left operand.
      right_ndim: number of axes of the right operand.

    Returns:
      (dims, order): the dimension numbers of the product, and the permutation of the
      product's axes that gives the result.

    Raises:
      ValueError: `subscripts` name more or fewer axes than an operand has, or break a
        rule of `einsum`.

    Example:
      >>> from jaxq.ops import einsum_numbers
      >>> einsum_numbers("bk,kn->nb", 2, 2)
      ((((1,), (0,)), ((), ())), [1, 0])
    """
    left, right, out = _parse(subscripts, left_ndim, right_ndim)
    batch = [index for index in left if index in right and index in out]
    summed = [index for index in left if index in right and index not in out]

    def axes(operand: list[str], indices: list[str]) -> tuple[int, ...]:
        return tuple(operand.index(index) for index in indices)

    dims = (
        (axes(left, summed), axes(right, summed)),
        (axes(left, batch), axes(right, batch)),
    )
    bound = batch + summed
    product = list(batch)  # the indices of the product's axes
    product += [index for index in left if index not in bound]
    product += [index for index in right if index not in bound]
    return dims, [product.index(index) for index in out]


def _parse(
    subscripts: str, left_ndim: int, right_ndim: int
) -> tuple[list[str], list[str], list[str]]:
    """The indices of the left operand, the right operand and the result.

    An ellipsis becomes indices "...0", "...1" and so on.
    """
    text = subscripts.replace(" ", "")
    inputs, arrow, out = text.partition("->")
    if inputs.count(",") != 1:
        raise ValueError(
            f"einsum: {subscripts!r} must name two operands, as in 'bk,kn->bn'."
        )
    left, right = inputs.split(",")
    ellipsis = _ellipsis_indices((left, right), (left_ndim, right_ndim))

    def expand(part: str) -> list[str]:
        before, dots, after = part.partition("...")
        return [*before, *(ellipsis if dots else []), *after]

    left_indices, right_indices = expand(left), expand(right)
    if arrow:
        out_indices = expand(out)
    else:
        # As in numpy: the indices that occur once, in alphabetical order.
        used = left_indices + right_indices
        single = {index for index in used if used.count(index) == 1}
        out_indices = ellipsis + sorted(single - set(ellipsis))
    _check_indices(
        subscripts,
        (left_indices, right_indices),
        (left_ndim, right_ndim),
        has_ellipsis=bool(ellipsis),
    )
    _check_result(subscripts, left_indices, right_indices, out_indices)
    return left_indices, right_indices, out_indices


def _ellipsis_indices(parts: tuple[str, str], ndims: tuple[int, int]) -> list[str]:
    """One index for each axis that an ellipsis replaces."""
    num_axes = 0
    for part, ndim in zip(parts, ndims, strict=True):
        if "..." in part:
            num_axes = max(num_axes, ndim - (len(part) - len("...")))
    return [f"...{i}" for i in range(num_axes)]


def _check_indices(
    subscripts: str,
    operands: tuple[list[str], list[str]],
    ndims: tuple[int, int],
    *,
    has_ellipsis: bool,
) -> None:
    """Raises unless each operand has one index for each axis and repeats no index."""
    for indices, ndim in zip(operands, ndims, strict=True):
        if len(indices) != ndim:
            remedy = (
                " Only one operand, the float one, may have an ellipsis."
                if has_ellipsis
                else ""
            )
            raise ValueError(
                f"einsum: {subscripts!r} names {len(indices)} axes of an operand that "
                f"has {ndim}.{remedy}"
            )
        if len(set(indices)) != len(indices):
            raise ValueError(
                f"einsum: {subscripts!r} repeats an index within an operand. Take the "
                "diagonal of that operand first."
            )


def _check_result(
    subscripts: str, left: list[str], right: list[str], out: list[str]
) -> None:
    """Raises unless the indices of the result are valid.

    The result may name an index only once. It must name every index that only one
    operand has.
    """
    unknown = set(out) - set(left) - set(right)
    if unknown or len(set(out)) != len(out):
        raise ValueError(
            f"einsum: the result of {subscripts!r} must name indices of the operands, "
            "each once."
        )
    unshared = (set(left) ^ set(right)) - set(out)
    if unshared:
        raise ValueError(
            f"einsum: {subscripts!r} sums over {sorted(unshared)}, which only one "
            "operand has. Sum that operand first; dequantize it if it is a QTensor."
        )
