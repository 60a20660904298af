"""The module that `jaxq.nn.linen.quantize_model` returns.

It holds the module it was given, and runs it so that its layers multiply codes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from flax import linen

from jaxq.nn.layers._linen_interceptor import use_codes
from jaxq.qtensor import QTensor


class Quantized(linen.Module):
    """A linen module whose layers multiply codes where the variables hold QTensors.

    Create it with `Quantized(module, weights)`. It has the parameters of `module` under
    the same names, and is used like `module`: `apply` with `method=`, `rngs=` and
    `mutable=`, `bind`, and as a part of other modules. The methods and attributes of
    `module` are available on it. The module itself is not changed. Two quantizations
    differ only in their variables, so `jax.jit` and `nn.jit` compile again when they
    must.

    Args:
      module: a linen module. Its variables may hold floats or QTensors.
      weights: paths of parameters that must be QTensors. Floats there are an error,
        because a slow float model would run without notice. `init` still gives the
        float parameters of `module`, which `quantize_model` takes.

    Raises:
      ValueError: in a call, parameters named in `weights` are floats.

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

    # These names differ from all submodules, fields and methods of the module inside.
    _jaxq_module: linen.Module
    _jaxq_weights: tuple[str, ...] = ()

    def setup(self):
        linen.share_scope(self, self._jaxq_module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jaxq_enter(None, *args, **kwargs)

    def _jaxq_enter(
        self, method: str | Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls a method of the module inside.

        Args:
          method: its name, or a function of the module. None calls the module.
          *args: of the method, like **kwargs.
          **kwargs: of the method.
        """
        self._jaxq_check()
        module = self._jaxq_module
        with linen.intercept_methods(use_codes):
            if callable(method):
                return method(module, *args, **kwargs)
            function = module if method is None else getattr(module, method)
            return function(*args, **kwargs)

    @linen.nowrap
    def _jaxq_check(self) -> None:
        """Raises if a weight that must be a QTensor is an array."""
        if self.is_initializing():
            return
        params: Any = self.variables.get("params", {})
        floats = [
            path for path in self._jaxq_weights if _is_array(params, path.split("/"))
        ]
        if floats:
            raise ValueError(
                f"Quantized: {floats} are floats where QTensors are expected. Pass the "
                "variables that quantize_model returned with this module, or quantize "
                "these parameters."
            )

    # Flax's functions, with methods of the module inside.

    @linen.nowrap
    def apply(
        self, variables: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> Any:
        """`nn.Module.apply`; `method` is a method of the module inside."""
        method, kwargs = _wrapper_method(method), _capture_inside(kwargs)
        return super().apply(variables, *args, method=method, **kwargs)

    @linen.nowrap
    def init_with_output(
        self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> Any:
        """`nn.Module.init_with_output`; `method` is a method of the module inside."""
        method, kwargs = _wrapper_method(method), _capture_inside(kwargs)
        return super().init_with_output(rngs, *args, method=method, **kwargs)

    @linen.nowrap
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_jaxq_module" not in vars(self):
                raise
        value = getattr(self._jaxq_module, name)
        return value if self.scope is None else _with_codes(value)


class _Method:
    """A function of a `Quantized` that calls a method of the module inside."""

    def __init__(self, method: Any):
        self.method = method

    def __call__(self, quantized: Quantized, *args: Any, **kwargs: Any) -> Any:
        return quantized._jaxq_enter(self.method, *args, **kwargs)


class _WithCodes:
    """A bound module or method inside a bound `Quantized`. Its calls multiply codes."""

    def __init__(self, value: Any):
        self._value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with linen.intercept_methods(use_codes):
            return self._value(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _with_codes(getattr(self._value, name))


def _with_codes(value: Any) -> Any:
    """An attribute of a bound module; modules and methods in it multiply codes."""
    is_method = inspect.ismethod(value) and isinstance(value.__self__, linen.Module)
    if is_method or isinstance(value, linen.Module):
        return _WithCodes(value)
    if type(value) is tuple:  # flax keeps lists as tuples
        return tuple(_with_codes(element) for element in value)
    return value


def _wrapper_method(method: Any) -> Any:
    """The wrapper's method that flax calls for a `method=` of the module inside."""
    if method is None:
        return None
    if inspect.ismethod(method) and isinstance(method.__self__, linen.Module):
        if isinstance(method.__self__, Quantized):
            return method
        method = method.__func__
    if method in (Quantized.__call__, Quantized._jaxq_enter):
        return method
    return _Method(method)


def _capture_inside(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `apply` that capture results of the module inside only.

    Without this, `capture_intermediates` would also capture those of the wrapper.
    """
    capture = arguments.get("capture_intermediates", False)
    if not capture:
        return arguments

    def is_captured(module: linen.Module, method: str) -> bool:
        if isinstance(module, Quantized):
            return False
        return method == "__call__" if capture is True else capture(module, method)

    return {**arguments, "capture_intermediates": is_captured}


def _is_array(params: Any, path: list[str]) -> bool:
    """True if the parameter at the path exists and is not a QTensor."""
    for name in path:
        if name not in params:
            return False
        params = params[name]
    return not isinstance(params, QTensor)
