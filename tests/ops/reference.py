"""Products in float64, error bounds for float32 sums, and readers of jaxprs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq import QTensor, formats, kernels

# Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# The smallest number kept to full precision; below it rounding errors are absolute.
TINY = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}


def double(x: jax.typing.ArrayLike | QTensor) -> np.ndarray:
    """An array, or a dequantized QTensor, in float64."""
    return np.asarray(
        jaxq.dequantize(x, dtype=jnp.float32) if isinstance(x, QTensor) else x
    ).astype(np.float64)


def assert_product(
    y: jax.typing.ArrayLike,
    product: Callable[[np.ndarray, np.ndarray], np.ndarray],
    a: jax.typing.ArrayLike | QTensor,
    b: jax.typing.ArrayLike | QTensor,
    terms: int,
    *,
    weights: str = "float32",
    dtype: str = "float32",
):
    """`y` is `product(a, b)` up to the error of `terms` float32 additions.

    |y - exact| <= gamma * product(|a|, |b|) with gamma = K u / (1 - K u) (Higham, 2002,
    section 3.1). K is `terms` and 8 more, for the roundings of scales.

    Args:
      y: the result.
      product: computes the exact result from float64 arrays.
      a: left operand.
      b: right operand.
      terms: terms of each sum.
      weights: dtype that the dequantized operand was rounded to before the product.
      dtype: dtype that the sum was rounded to.
    """
    left, right = double(a), double(b)
    exact, size = product(left, right), product(abs(left), abs(right))
    u = ROUNDOFF["float32"]
    gamma = (terms + 8) * u / (1 - (terms + 8) * u)
    bound = gamma * size
    if weights != "float32":
        bound += 1.01 * ROUNDOFF[weights] * size + terms * TINY[weights] * (
            abs(left).max() + abs(right).max()
        )
    if dtype != "float32":
        bound += 1.01 * ROUNDOFF[dtype] * abs(exact)
    y = np.asarray(y)
    assert y.dtype == jnp.dtype(dtype)
    assert y.shape == exact.shape
    error = abs(y.astype(np.float64) - exact)
    assert np.all(error <= bound + 1e-30), (
        f"{np.max(error / (bound + 1e-30)):.3g} times the bound"
    )


def with_codes(
    qt: QTensor, codes: np.ndarray, zero_point: np.ndarray | None = None
) -> QTensor:
    """`qt` with other stored codes (padding included) and scales of one."""
    codes = jnp.asarray(codes, qt.spec.fmt.code_dtype)
    data = formats.pack(
        codes, qt.spec.fmt.bits, qt.meta.packing, unit=qt.meta.pack_unit
    ).astype(qt.data.dtype)
    assert data.shape == qt.data.shape
    zero = (
        None
        if zero_point is None
        else jnp.asarray(zero_point, qt.spec.fmt.code_dtype).reshape(qt.scale.shape)
    )
    return dataclasses.replace(
        qt, data=data, scale=jnp.ones_like(qt.scale), zero_point=zero
    )


def primitives(fn: Callable, *args) -> list[str]:
    """Names of all primitives in `fn`'s jaxpr, inner ones too, in order."""
    return [eqn.primitive.name for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr)]


def dots(fn: Callable, *args) -> list[tuple[str, str, str]]:
    """The dtypes (lhs, rhs, result) of every dot and convolution in a jaxpr."""
    dtypes = []
    for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            variables = (*eqn.invars, *eqn.outvars)
            dtypes.append(tuple(v.aval.dtype.name for v in variables))
    return dtypes


def equations(jaxpr):
    """Every equation of a jaxpr, outer before inner; kernels in their XLA form."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name in kernels.FORMS:
            form = functools.partial(kernels.FORMS[eqn.primitive.name], **eqn.params)
            yield from equations(
                jax.make_jaxpr(form)(*(v.aval for v in eqn.invars)).jaxpr
            )
        for inner in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
        ):
            if hasattr(inner, "jaxpr"):
                inner = inner.jaxpr
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def compiled(fn: Callable, *args):
    """`fn` compiled for arguments given as arrays or shapes."""
    return jax.jit(fn).lower(*args).compile()
