"""Hadamard rotations: an orthogonal change of basis without outlier channels.

`(x Q) (Q^T w) = x w` for orthogonal Q. Here `Q = diag(signs) H / sqrt(n)`, where the
entries of H are 1 and -1. A spike in one channel becomes n numbers of equal magnitude,
and the product with Q takes n log n additions.

The matrix H of order `2^m K` is the Kronecker product of one of order K and m times
`[[1, 1], [1, -1]]`. K is 1, or its matrix comes from the squares in a finite field of q
elements, where q is a power of an odd prime (Paley, 1933):

| q mod 4 | order | examples |
|---|---|---|
| 3 | q + 1 | 12, 20, 28, 44, 60, 344 |
| 1 | 2 (q + 1) | 36, 52, 76, 108, 148 |

For the orders 156, 172 and 428, H comes from four circulant matrices (Goethals and
Seidel, 1967). The order 428 gives the hidden sizes 13696 = 32 * 428 and 27392. Its
circulant matrices come from four sequences of signs of the lengths 36, 36, 36 and 35
(Kharaghani and Tayfeh-Rezaie, 2005). Of the orders up to 200, the orders 92, 116, 184
and 188 are missing: matrices are known, but not from these constructions.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.methods import _matrix
from jaxq.methods._explicit_axes import on_explicit_axes

# Order -> four numbers. Their bits are the signs (1 for -1) of the first rows of
# circulant matrices A, B, C, D of order n = order / 4, with
# A A^T + B B^T + C C^T + D D^T = 4 n I.
_CIRCULANT = {
    156: (74228022126, 432057256904, 506044792308, 266021435876),
    172: (7905464307918, 3872785226268, 1431347407656, 2231983365636),
    428: (
        119248894060070021979558352815746,
        98959953258289715935848051472765,
        119248894061210615305632627521917,
        63299323569783054129665832089981,
    ),
}
# Larger orders are not searched: the matrix of the odd part is multiplied densely.
_LARGEST_PALEY = 1 << 12
_SYLVESTER = np.array([[1, 1], [1, -1]], np.int8)


@on_explicit_axes
def hadamard(
    x: jax.typing.ArrayLike, axis: int = -1, *, inverse: bool = False
) -> jax.Array:
    """Computes the fast Walsh-Hadamard transform `x H_n / sqrt(n)` along an axis.

    Sums are in float32. They are exact for whole numbers up to 2^24, before the one
    product with `1 / sqrt(n)`.

    Args:
      x: float array.
      axis: the axis to transform. Its size n must be an order of `hadamard_matrix`:
        powers of two, and 12, 20, 28, 36, ... times a power of two.
      inverse: multiply by the transpose (the same matrix for powers of two).

    Returns:
      Array of the shape and dtype of x. The norm along the axis does not change.

    Raises:
      TypeError: x is not a float array.
      ValueError: x has no such axis, or no Hadamard matrix of its size can be built.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import hadamard
      >>> hadamard(jnp.array([8.0, 0.0, 0.0, 0.0])).tolist()
      [4.0, 4.0, 4.0, 4.0]

    References:
      Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024,
      section 3.
      Fino and Algazi, "Unified Matrix Treatment of the Fast Walsh-Hadamard Transform",
      1976.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"hadamard: x must be a float array, got {_matrix.dtype_and_shape(x)}."
        )
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"hadamard: axis {axis} is not an axis of x: {_matrix.dtype_and_shape(x)}."
        )
    return _hadamard(x, axis, _odd_order(x.shape[axis], "hadamard"), inverse)


def hadamard_matrix(n: int) -> np.ndarray:
    """Returns the matrix H of `hadamard`, with `H H^T = n I` exactly.

    Args:
      n: the order, 1 or `2^m K`, where K is 1 or an order that can be constructed (12,
        20, 28, 36, ...).

    Returns:
      int8 `[n, n]` of 1 and -1.

    Raises:
      ValueError: no matrix of order n can be built here. None exists unless n is 1, 2
        or a multiple of 4.

    Example:
      >>> from jaxq.methods import hadamard_matrix
      >>> hadamard_matrix(2).tolist(), hadamard_matrix(12).shape
      ([[1, 1], [1, -1]], (12, 12))

    References:
      Paley, "On Orthogonal Matrices", 1933.
      Goethals and Seidel, "Orthogonal Matrices with Zero Diagonal", 1967.
      Kharaghani and Tayfeh-Rezaie, "A Hadamard Matrix of Order 428", 2005.
    """
    odd = _odd_order(n, "hadamard_matrix")
    matrix = _odd_matrix(odd)
    num_doublings = (n // odd).bit_length() - 1
    for _ in range(num_doublings):
        matrix = np.kron(matrix, _SYLVESTER)
    return matrix


def random_hadamard(key: jax.Array, n: int) -> jax.Array:
    """Draws random signs for `rotate_in` and `rotate_out`.

    With them, `Q = diag(signs) H_n / sqrt(n)` is a random rotation.

    Args:
      key: PRNG key.
      n: the order, as for `hadamard_matrix`.

    Returns:
      float32 `[n]` of 1 and -1. The matrix Q is `hadamard(jnp.diag(signs))`.

    Raises:
      ValueError: no Hadamard matrix of order n can be built.

    Example:
      >>> import jax
      >>> from jaxq.methods import random_hadamard
      >>> random_hadamard(jax.random.key(0), 12).shape
      (12,)
    """
    _odd_order(n, "random_hadamard")
    return jax.random.rademacher(key, (n,), jnp.float32)


@on_explicit_axes
def rotate_in(
    w: jax.typing.ArrayLike, signs: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """Rotates the inputs of a weight: `Q^T w`, with `(x Q) (Q^T w) = x w`.

    Args:
      w: float `[..., in, out]`.
      signs: float `[in]`, from `random_hadamard`. None uses `Q = H / sqrt(in)`.

    Returns:
      The rotated weight, in the dtype of w.

    Raises:
      TypeError: w is not float32, bfloat16 or float16.
      ValueError: `signs` does not have the size `in`, no Hadamard matrix of that order
        can be built, or (outside jit) a number is not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxq.methods import random_hadamard, rotate_in, rotate_out
      >>> signs = random_hadamard(jax.random.key(0), 4)
      >>> x, w = jnp.ones((1, 4)), jnp.ones((4, 2))
      >>> (rotate_out(x, signs) @ rotate_in(w, signs)).tolist()
      [[4.0, 4.0]]
    """
    w = _matrix.as_weight(w, "rotate_in")
    return hadamard(_times_signs(w, signs, -2, "rotate_in"), -2)


@on_explicit_axes
def rotate_out(
    w: jax.typing.ArrayLike, signs: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """Rotates the outputs of a weight: `w Q`.

    The array may also be a bias, an embedding or an activation.

    Args:
      w: float `[..., out]`.
      signs: float `[out]`, from `random_hadamard`. None uses `Q = H / sqrt(out)`.

    Returns:
      The rotated array, in the dtype of w.

    Raises:
      TypeError: w is not a float array.
      ValueError: `signs` does not have the size `out`, or no Hadamard matrix of that
        order can be built.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import rotate_out
      >>> rotate_out(jnp.array([[0.0, 2.0]])).round(3).tolist()
      [[1.4140000343322754, -1.4140000343322754]]
    """
    return hadamard(_times_signs(jnp.asarray(w), signs, -1, "rotate_out"), -1)


def _times_signs(
    w: jax.Array, signs: jax.typing.ArrayLike | None, axis: int, caller: str
) -> jax.Array:
    """Multiplies w by signs along an axis. `axis` is negative."""
    if signs is None:
        return w
    signs = jnp.asarray(signs)
    if w.ndim < -axis or signs.shape != (w.shape[axis],):
        raise ValueError(
            f"{caller}: signs must have one number for each element of axis {axis} of "
            f"w, got signs: {_matrix.dtype_and_shape(signs)}, w: "
            f"{_matrix.dtype_and_shape(w)}."
        )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"{caller}: w must be a float array, got {_matrix.dtype_and_shape(w)}."
        )
    shape = [1] * w.ndim
    shape[axis] = signs.shape[0]
    return w * signs.astype(w.dtype).reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _hadamard(x: jax.Array, axis: int, odd: int, inverse: bool) -> jax.Array:
    sums = _transform_last(jnp.moveaxis(x, axis, -1).astype(jnp.float32), odd, inverse)
    scaled = sums * np.float32(1 / math.sqrt(x.shape[axis]))
    return jnp.moveaxis(scaled, -1, axis).astype(x.dtype)


def _transform_last(x: jax.Array, odd: int, inverse: bool) -> jax.Array:
    """`x H` along the last axis of float32 `[..., n]`, without the division."""
    n, lead = x.shape[-1], x.shape[:-1]
    half = n // odd
    # Butterflies on the factors of two, the last axis of [..., odd, 2, 2, ..., 2]
    # first.
    while half > 1:
        half //= 2
        pairs = x.reshape(*lead, n // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([first + second, first - second], axis=-2).reshape(*lead, n)
    if odd == 1:
        return x
    matrix = _odd_matrix(odd).astype(np.float32)
    matrix = matrix if inverse else matrix.T  # [to, from]
    x = x.reshape(*lead, odd, n // odd)
    # HIGHEST: matrix units would otherwise round x to bfloat16.
    product = jnp.einsum(
        "ba,...as->...bs", jnp.asarray(matrix), x, precision=lax.Precision.HIGHEST
    )
    return product.reshape(*lead, n)


def _odd_order(n: int, caller: str) -> int:
    """Returns K of `n = 2^m K`: the order of a Hadamard matrix without the factor 2^m.

    K is 1 if n is a power of two. Otherwise it is the smallest order above 1 for which
    this file can construct a Hadamard matrix.

    Raises:
      ValueError: there is no such K.
    """
    power = n & -n if n > 0 else 0  # the largest power of two that divides n
    odd = n // power if power else 0
    if odd == 1:
        return 1
    order = 4 * odd  # a Hadamard matrix of an order above 2 has a multiple of 4
    while n > 0 and n % order == 0:
        is_paley = order <= _LARGEST_PALEY and _residue_field(order) is not None
        if order in _CIRCULANT or is_paley:
            return order
        order *= 2
    raise ValueError(
        f"{caller}: no Hadamard matrix of order {n} can be built here. Orders are 2^m "
        "K, where K is 1, q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4) for a power q "
        "of an odd prime, 156, 172 or 428. Pad to such an order, or rotate blocks of a "
        "smaller one."
    )


def _residue_field(order: int) -> tuple[int, int] | None:
    """(p, k) of the field of p^k elements for this order; None if there is none."""
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if q >= 3 and q % 4 == remainder:
            p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
            k = round(math.log(q, p))
            if p**k == q:
                return p, k
    return None


@functools.cache
def _odd_matrix(order: int) -> np.ndarray:
    """The Hadamard matrix of an order that `_odd_order` returns; int8."""
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order in _CIRCULANT:
        return _goethals_seidel(order)
    return _paley(order)


def _goethals_seidel(order: int) -> np.ndarray:
    """The Hadamard matrix of four circulant matrices; int8."""
    n = order // 4
    place = (np.arange(n)[None] - np.arange(n)[:, None]) % n
    rows = [
        np.array([1 - 2 * (code >> i & 1) for i in range(n)], np.int8)
        for code in _CIRCULANT[order]
    ]
    a, b, c, d = (row[place] for row in rows)
    # X R and X^T R, where R reverses the columns.
    br, cr, dr, btr, ctr, dtr = (m[:, ::-1] for m in (b, c, d, b.T, c.T, d.T))
    return np.block(
        [
            [a, br, cr, dr],
            [-br, a, dtr, -ctr],
            [-cr, -dtr, a, btr],
            [-dr, ctr, -btr, a],
        ]
    )


def _paley(order: int) -> np.ndarray:
    """The Hadamard matrix of the squares in a finite field; int8."""
    field = _residue_field(order)
    assert field is not None
    residue = _quadratic_characters(*field)  # [q, q]
    q = len(residue)
    bordered = np.zeros((q + 1, q + 1), np.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = -1 if q % 4 == 3 else 1
    bordered[1:, 1:] = residue
    if q % 4 == 3:  # Paley's first construction; `bordered` is skew-symmetric
        return bordered + np.eye(q + 1, dtype=np.int8)
    # Paley's second construction; `bordered` is symmetric
    diagonal = np.array([[1, -1], [-1, -1]], np.int8)
    identity = np.eye(q + 1, dtype=np.int8)
    return np.kron(bordered, _SYLVESTER) + np.kron(identity, diagonal)


def _quadratic_characters(p: int, k: int) -> np.ndarray:
    """`chi(a - b)` for all elements a, b of the field of p^k; int8 `[q, q]`.

    chi is 1 for squares, 0 for 0, and -1 for all other elements.
    """
    q = p**k
    character = np.zeros(q, np.int8)
    for i, power in enumerate(_generator_powers(p, k)):
        # Even powers of a generator are the squares.
        character[_element_number(power, p)] = 1 if i % 2 == 0 else -1
    # Coefficients of all elements: [q, k].
    digits = np.stack([np.arange(q) // p**i % p for i in range(k)], axis=-1)
    weights = p ** np.arange(k)
    rows = [character[((digits[a] - digits) % p) @ weights] for a in range(q)]
    return np.stack(rows)


def _generator_powers(p: int, k: int) -> list[tuple[int, ...]]:
    """All elements but 0 of the field of p^k, as the powers of a generator.

    Each element is given by k coefficients; powers start with x^0. The generator is x
    modulo the first monic polynomial of degree k for which x has p^k - 1 different
    powers. Only a field has that many powers, so the polynomial is irreducible.
    """
    unity: tuple[int, ...] = (1,) + (0,) * (k - 1)
    # x^k = -(low[0] + low[1] x + ...)
    for low in itertools.product(range(p), repeat=k):
        powers: list[tuple[int, ...]] = [unity]
        element = unity
        while len(powers) < p**k:
            top = element[-1]
            shifted = (0, *element[:-1])
            element = tuple(
                (a - top * c) % p for a, c in zip(shifted, low, strict=True)
            )
            if element == unity or not any(element):
                break
            powers.append(element)
        if len(powers) == p**k - 1 and element == unity:
            return powers
    raise AssertionError(f"every finite field has a generator: {p}^{k}")


def _element_number(element: tuple[int, ...], p: int) -> int:
    """The number whose digits in base p are the coefficients of an element."""
    return sum(c * p**i for i, c in enumerate(element))
