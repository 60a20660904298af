"""`matmul` and `einsum` with QTensors, reduced to `dot_general`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxq import sharding
from jaxq.ops._dot_general import Operand, align_matmul, as_operands, dot_general
from jaxq.ops._plan import DimensionNumbers, accumulate_dtype, result_dtype
from jaxq.qtensor import QTensor


def matmul(a: Operand, b: Operand, *, preferred_element_type: Any = None) -> jax.Array:
    """`a @ b` as numpy defines it, where either may be a QTensor; accumulates in int32 or float32.

    Args:
      a: `[..., m, k]` or `[k]`.
      b: `[..., k, n]` or `[k]`. Leading axes match from the right and have equal sizes (a 1 is not stretched); those of
        a QTensor are its batch axes.
      preferred_element_type: dtype of the result; None takes what the operands' dtypes promote to.

    Returns:
      `[..., m, n]`.

    Raises:
      TypeError: the sizes do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> jaxq.matmul(jnp.ones((3, 5, 64)), jaxq.quantize(jnp.ones((64, 16)), "int8")).shape
      (3, 5, 16)
    """
    lhs, rhs, dims = align_matmul(*as_operands(a, b))
    y = dot_general(lhs, rhs, dims, preferred_element_type=preferred_element_type)
    shared = len(dims[1][0])
    rows = 1 if lhs.ndim > 1 else 0
    extra_a, extra_b = max(lhs.ndim - 2 - shared, 0), max(rhs.ndim - 2 - shared, 0)
    # [shared, extra of a, m, extra of b, n] -> [extra, shared, m, n]; only one of the two has extra axes
    y = jnp.moveaxis(y, range(shared, shared + extra_a), range(extra_a))
    first_b = shared + extra_a + rows
    return jnp.moveaxis(y, range(first_b, first_b + extra_b), range(extra_b))


def einsum(
    subscripts: str,
    *operands: Operand,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jnp.einsum` of two operands, where either may be a QTensor; accumulates in int32 or float32.

    Args:
      subscripts: like "bk,kn->bn"; one ellipsis for leading axes of the operand that is not quantized. An index must
        not repeat within an operand, nor be summed in one operand alone.
      *operands: two arrays or QTensors.
      precision: passed on where all operands are arrays.
      preferred_element_type: dtype of the result; None takes what the operands' dtypes promote to.
      out_sharding: how the result lies over a mesh, as in `dot_general`.

    Raises:
      ValueError: subscripts that do not fit the operands, or go beyond the above.
      TypeError: the sizes do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.ones((64, 4, 8)), "int8", contracting=(-3,))
      >>> jaxq.einsum("btd,dhk->bthk", jnp.ones((2, 3, 64)), qt).shape
      (2, 3, 4, 8)
    """
    if not isinstance(subscripts, str):
        raise TypeError(
            f"einsum: subscripts must be a text like 'bk,kn->bn', got {type(subscripts).__name__}."
        )
    operands = as_operands(*operands)
    if not any(isinstance(v, QTensor) for v in operands):
        arrays: list[Any] = list(operands)
        wide = accumulate_dtype(*arrays)
        y = jnp.einsum(
            subscripts,
            *arrays,
            precision=precision,
            preferred_element_type=wide,
            out_sharding=out_sharding,
        )
        return y.astype(preferred_element_type or result_dtype(*arrays))
    if len(operands) != 2:
        raise ValueError(
            f"einsum: QTensors multiply two at a time, got {len(operands)} operands in {subscripts!r}."
        )
    a, b = operands
    dims, order = einsum_numbers(subscripts, a.ndim, b.ndim)
    y = dot_general(a, b, dims, preferred_element_type=preferred_element_type)
    return sharding.lay_out(jnp.transpose(y, order), out_sharding)


def einsum_numbers(
    subscripts: str, left_ndim: int, right_ndim: int
) -> tuple[DimensionNumbers, list[int]]:
    """The dimension numbers of an einsum's product, and the order in which its result has that product's axes.

    Raises:
      ValueError: subscripts as in `einsum`.
    """
    left, right, out = _parse(subscripts, left_ndim, right_ndim)
    batch = [i for i in left if i in right and i in out]
    summed = [i for i in left if i in right and i not in out]
    dims = (
        (tuple(left.index(i) for i in summed), tuple(right.index(i) for i in summed)),
        (tuple(left.index(i) for i in batch), tuple(right.index(i) for i in batch)),
    )
    produced = (
        batch
        + [i for i in left if i not in batch + summed]
        + [i for i in right if i not in batch + summed]
    )
    return dims, [produced.index(i) for i in out]


def _parse(
    subscripts: str, left_ndim: int, right_ndim: int
) -> tuple[list[str], list[str], list[str]]:
    """The three index lists; an ellipsis becomes capital indices of its own."""
    text = subscripts.replace(" ", "")
    inputs, arrow, out = text.partition("->")
    if inputs.count(",") != 1:
        raise ValueError(f"einsum: {subscripts!r} must name two operands.")
    left, right = inputs.split(",")
    dots = max(
        (
            n - len(part) + 3
            for part, n in ((left, left_ndim), (right, right_ndim))
            if "..." in part
        ),
        default=0,
    )
    extra = [f"...{i}" for i in range(dots)]

    def expand(part: str) -> list[str]:
        before, ellipsis, after = part.partition("...")
        return [*before, *(extra if ellipsis else []), *after]

    indices = [expand(left), expand(right)]
    if not arrow:
        counted = indices[0] + indices[1]
        out_indices = extra + sorted(
            i for i in set(counted) - set(extra) if counted.count(i) == 1
        )
    else:
        out_indices = expand(out)
    for part, ndim in zip(indices, (left_ndim, right_ndim), strict=True):
        if len(part) != ndim:
            more = (
                " An ellipsis may stand in one operand, the float one." if dots else ""
            )
            raise ValueError(
                f"einsum: {subscripts!r} names {len(part)} axes of an operand that has {ndim}.{more}"
            )
        if len(set(part)) != len(part):
            raise ValueError(
                f"einsum: {subscripts!r} repeats an index within an operand; take the diagonal first."
            )
    everything = set(indices[0]) | set(indices[1])
    if set(out_indices) - everything or len(set(out_indices)) != len(out_indices):
        raise ValueError(
            f"einsum: the result of {subscripts!r} must name indices of the operands, each once."
        )
    alone = (set(indices[0]) ^ set(indices[1])) - set(out_indices)
    if alone:
        raise ValueError(
            f"einsum: {subscripts!r} sums {sorted(alone)} in one operand alone; sum it beforehand."
        )
    return indices[0], indices[1], out_indices
