"""ProductOperand: what a QTensor and a TrainedWeight have in common.

Both are weights that multiply like arrays. Both have batch axes first in every leaf,
and both refuse every operation that needs an array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import jax
import numpy as np

from jaxq.qtensor._meta import Meta


class ProductOperand:
    """Base of weights that multiply like arrays and refuse every other operation.

    Attributes:
      floats_expression: an expression that gives an array of floats, for errors.
      shape: shape of the weight.
      batch_shape: sizes of the leading batch axes.
      meta: static facts.
    """

    floats_expression: ClassVar[str]
    meta: Meta

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def batch_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    # Batch axes.

    def __getitem__(self, index: Any) -> Self:
        """`w[i]`, `w[a:b]`, `w[...]` on batch axes."""
        entries = index if isinstance(index, tuple) else (index,)
        entries = tuple(entry for entry in entries if entry is not Ellipsis)
        num_batch = len(self.batch_shape)
        if len(entries) > num_batch or any(entry is None for entry in entries):
            raise IndexError(
                f"{type(self).__name__}: only batch axes can be indexed, and "
                f"{self!r} has {num_batch}. For rows of a table, "
                "such as an embedding, use jaxq.ops.take(table, indices). For other "
                f"axes index {self.floats_expression}."
            )
        if not entries:
            return self
        return jax.tree.map(lambda leaf: leaf[entries], self)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self):
        if not self.batch_shape:
            raise TypeError(
                f"{type(self).__name__}: only batch axes can be iterated over, and "
                f"{self!r} has none. Iterate over {self.floats_expression}."
            )
        return (self[i] for i in range(len(self)))

    # Products. `jaxq.ops` registers its `matmul` here, see `register_matmul`.

    # With None, numpy calls `__rmatmul__` for `array @ weight`.
    __array_ufunc__ = None

    def __matmul__(self, other: Any) -> Any:
        return _matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return _matmul(other, self)

    # Every other operation needs floats, and raises.

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # The errors of jax.numpy contain an operand only if the operand has
            # `__jax_array__`. This function does not raise the error, because the
            # operators of jax look for the attribute too. If the attribute gives no
            # array, they leave `x @ w` to `__rmatmul__`.
            if name == "__jax_array__":
                return lambda: _ArrayRefusal(self)
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name.startswith("_"):
                raise AttributeError(message)
            # `repr(self)` may have called this function, so it is not used here.
            size = "x".join(map(str, self.meta.geometry.shape))
            if hasattr(type(self), name):
                # A property raised AttributeError because a leaf is not an array.
                message = f"{name!r} of a {type(self).__name__} is unknown"
                remedy = (
                    "Its leaves are not arrays. If jaxq.partition made it, join the "
                    "two trees with jaxq.combine"
                )
            else:
                remedy = (
                    f"A {type(self).__name__} is a quantized array: get floats with "
                    f"{self.floats_expression}"
                )
            raise AttributeError(
                f"{message}: {self.meta.name or type(self).__name__} "
                f"{self.meta.spec.fmt.name}[{size}]. {remedy}."
            )

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{self!r} does not become an array implicitly. Use "
            f"{self.floats_expression}."
        )

    def _refuse(self, *args: Any) -> NoReturn:
        raise TypeError(
            f"{self!r} multiplies with @, jaxq.matmul, jaxq.einsum and "
            "jaxq.dot_general. Every other operation needs floats: use "
            f"{self.floats_expression}."
        )

    # fmt: off
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _refuse
    __mod__ = __rmod__ = __divmod__ = __rdivmod__ = __pow__ = __rpow__ = _refuse
    __neg__ = __pos__ = __abs__ = __invert__ = __round__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _refuse
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _refuse
    __float__ = __int__ = __complex__ = __bool__ = _refuse
    # fmt: on

    def __eq__(self, other: Any) -> bool:
        """True for the same object. Pytrees and caches need this comparison.

        A comparison with a number or an array needs floats and raises TypeError.
        """
        numbers = jax.Array | np.ndarray | np.generic | int | float | complex
        if isinstance(other, numbers):
            self._refuse()
        return self is other

    __hash__ = object.__hash__


class _ArrayRefusal:
    """Given to jax.numpy in place of an array, so that errors contain the operand."""

    def __init__(self, operand: ProductOperand):
        self.operand = operand

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"expected an array, got {self!r}.")

    def __repr__(self) -> str:
        return (
            f"{self.operand!r} (a quantized array: write x @ qt, jaxq.matmul(x, qt) or "
            f"jaxq.einsum(..., qt), or get floats with "
            f"{self.operand.floats_expression}; a linen module runs with it inside "
            "jaxq.nn.linen.Quantized(module))"
        )


def register_matmul(function: Callable[[Any, Any], Any]) -> None:
    """Registers the function that computes `x @ w` and `w @ x`.

    This package must not import `jaxq.ops`. Instead `jaxq.ops` calls this function when
    it is imported. `import jaxq` imports `jaxq.ops`.

    Args:
      function: `function(lhs, rhs)` returns the product of two operands. At least one
        operand is a QTensor or a `TrainedWeight`.

    Example:
      >>> import jaxq
      >>> jaxq.qtensor.register_matmul(jaxq.matmul)
    """
    global _matmul
    _matmul = function


def _no_matmul(lhs: Any, rhs: Any) -> Any:
    raise RuntimeError("QTensor: `@` needs jaxq.ops. Run `import jaxq` first.")


_matmul: Callable[[Any, Any], Any] = _no_matmul
