"""The module that quantize_model returns: the module it was given, run so that its layers multiply codes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from flax import linen

from jaxq.nn.layers._linen import use_codes
from jaxq.qtensor import QTensor


class Quantized(linen.Module):
    """A linen module whose layers multiply by codes where the variables hold QTensors.

    Made as `Quantized(module, weights)`. It has the parameters of `module`, under the same names, and is used like it:
    `apply` with `method=`, `rngs=` and `mutable=`, `bind`, as part of other modules. Methods and attributes of `module`
    are reached through it. Nothing of the module is changed, and everything that differs between one quantization and
    another is in the variables, so `jax.jit` and `nn.jit` compile again when they must.

    Args:
      module: with float parameters or, in its variables, QTensors.
      weights: paths of parameters that must be QTensors; floats there are an error, not a slow float model. `init`
        gives floats all the same, the parameters of `module`, to be given to `quantize_model`.

    Raises:
      ValueError: when called: parameters named in `weights` are floats.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> kernel = jaxq.quantize(variables["params"]["kernel"], "int8")
      >>> qvariables = {"params": {**variables["params"], "kernel": kernel}}
      >>> jaxq.nn.linen.Quantized(module).apply(qvariables, x).shape
      (2, 8)
    """

    # Names that no module inside has for a submodule, a field or a method of its own.
    _jaxq_module: linen.Module
    _jaxq_weights: tuple[str, ...] = ()

    def setup(self):
        linen.share_scope(self, self._jaxq_module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jaxq_enter(None, *args, **kwargs)

    def _jaxq_enter(
        self, method: str | Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls a method of the module, by name or as a function of it; None calls the module itself."""
        self._jaxq_check()
        inner = self._jaxq_module
        with linen.intercept_methods(use_codes):
            if callable(method):
                return method(inner, *args, **kwargs)
            return (inner if method is None else getattr(inner, method))(
                *args, **kwargs
            )

    @linen.nowrap
    def _jaxq_check(self) -> None:
        if self.is_initializing():
            return
        params: Any = self.variables.get("params", {})
        floats = [
            path for path in self._jaxq_weights if _is_array(params, path.split("/"))
        ]
        if floats:
            raise ValueError(
                f"Quantized: {floats} are floats where QTensors are expected. Pass the variables that quantize_model "
                "returned with this module, or quantize these."
            )

    # As flax has them, with methods of the inner module.

    @linen.nowrap
    def apply(
        self, variables: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> Any:
        return super().apply(
            variables, *args, method=_entering(method), **_of_inner(kwargs)
        )

    @linen.nowrap
    def init_with_output(
        self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> Any:
        return super().init_with_output(
            rngs, *args, method=_entering(method), **_of_inner(kwargs)
        )

    @linen.nowrap
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_jaxq_module" not in vars(self):
                raise
        value = getattr(self._jaxq_module, name)
        return value if self.scope is None else _inside(value)


class _Method:
    """A function of a `Quantized` that calls one of the module inside."""

    def __init__(self, method: Any):
        self.method = method

    def __call__(self, outer: Quantized, *args: Any, **kwargs: Any) -> Any:
        return outer._jaxq_enter(self.method, *args, **kwargs)


class _Inside:
    """A bound module or method of the module inside a bound `Quantized`; calling it multiplies codes."""

    def __init__(self, value: Any):
        self._value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with linen.intercept_methods(use_codes):
            return self._value(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _inside(getattr(self._value, name))


def _inside(value: Any) -> Any:
    if isinstance(value, linen.Module) or (
        inspect.ismethod(value) and isinstance(value.__self__, linen.Module)
    ):
        return _Inside(value)
    if type(value) is tuple:  # as flax keeps lists
        return tuple(_inside(v) for v in value)
    return value


def _entering(method: Any) -> Any:
    """What flax is to call on the wrapper for a `method=` of the module inside."""
    if method is None:
        return None
    if inspect.ismethod(method) and isinstance(method.__self__, linen.Module):
        if isinstance(method.__self__, Quantized):
            return method
        method = method.__func__
    return (
        method
        if method in (Quantized.__call__, Quantized._jaxq_enter)
        else _Method(method)
    )


def _of_inner(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `apply` by which results of the module inside are captured, not the wrapper's beside them."""
    wanted = arguments.get("capture_intermediates", False)
    if not wanted:
        return arguments

    def inner_alone(module: linen.Module, method: str) -> bool:
        of_flax = method == "__call__" if wanted is True else wanted(module, method)
        return of_flax and not isinstance(module, Quantized)

    return {**arguments, "capture_intermediates": inner_alone}


def _is_array(params: Any, path: list[str]) -> bool:
    """True if there is something at the path, and it is no QTensor."""
    for name in path:
        if name not in params:
            return False
        params = params[name]
    return not isinstance(params, QTensor)
