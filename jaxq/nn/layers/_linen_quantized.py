"""The module that `jaxq.nn.linen.quantize_model` returns.

`Quantized` wraps the user's module. While the wrapped module runs, layers whose weight
is a QTensor multiply by its codes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen

from jaxq.nn.layers._linen_interceptor import use_codes
from jaxq.nn.layers._linen_tabulate import tabulate
from jaxq.qtensor import QUANTIZED
from jaxq.sharding import value_in_box


class Quantized(linen.Module):
    """Wraps a linen module. Layers whose weight is a QTensor multiply by its codes.

    Create it with `Quantized(module, weights)`. The parameters have the same names as
    in `module`. The wrapper is used like `module`: `apply` with `method=`, `rngs=` and
    `mutable=`, `bind`, and as a part of other modules. The wrapper has the methods and
    attributes of `module`. The module itself is not changed. Two quantizations of a
    module differ in their variables, so `jax.jit` and `nn.jit` compile each of them.

    The module itself does not accept QTensors. `module.apply(qvariables, x)` raises the
    ScopeParamShapeError of Flax ("the given initializer is expected to generate shape
    ..., but the existing parameter it received has shape ..."), because the codes have
    another shape than the kernel. If the shapes are equal, there is a TypeError.

    Args:
      module: a linen module. Its variables may hold floats or QTensors.
      weights: paths of parameters that must be QTensors. A float array at such a path
        is an error. Without this check a slow float model would run unnoticed. `init`
        still returns the float parameters of `module`, for `quantize_model`.

    Raises:
      ValueError: in a call, a parameter named in `weights` is not a QTensor.

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

    # The prefix keeps these names apart from all names of the wrapped module.
    _jaxq_module: linen.Module
    _jaxq_weights: tuple[str, ...] = ()

    def setup(self):
        linen.share_scope(self, self._jaxq_module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jaxq_enter(None, *args, **kwargs)

    def _jaxq_enter(
        self, method: str | Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls a method of the wrapped module.

        Args:
          method: the name of the method, or a function of the module. None calls the
            module.
          *args: positional arguments of the method.
          **kwargs: named arguments of the method.
        """
        self._jaxq_check()
        module = self._jaxq_module
        with linen.intercept_methods(self._jaxq_interceptor()):
            if callable(method):
                return method(module, *args, **kwargs)
            function = module if method is None else getattr(module, method)
            return function(*args, **kwargs)

    @linen.nowrap
    def _jaxq_interceptor(self) -> Callable[..., Any]:
        """What runs in place of the methods of layers."""
        return use_codes

    @linen.nowrap
    def _jaxq_check(self) -> None:
        """Raises a ValueError if a weight that must be a QTensor is an array."""
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

    # Functions of `nn.Module` that also take methods of the wrapped module.

    @linen.nowrap
    def apply(
        self, variables: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> Any:
        """`nn.Module.apply`, where `method` is a method of the wrapped module."""
        method, kwargs = _wrapper_method(method), _capture_inside(kwargs)
        return super().apply(variables, *args, method=method, **kwargs)

    @linen.nowrap
    def init_with_output(
        self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> Any:
        """As `nn.Module.init_with_output`; `method` is one of the wrapped module."""
        method, kwargs = _wrapper_method(method), _capture_inside(kwargs)
        return super().init_with_output(rngs, *args, method=method, **kwargs)

    @linen.nowrap
    def tabulate(self, variables: Any, *args: Any, **kwargs: Any) -> str:
        """`nn.Module.tabulate`, with quantized variables in the place of keys.

        The keys of `init` make float parameters, so they cannot give the sizes of codes
        and scales.

        Args:
          variables: the variables that `quantize_model` returned.
          *args: inputs of the wrapped module.
          **kwargs: as in `nn.Module.tabulate`.

        Raises:
          TypeError: `variables` is not a dict of variables.

        Example:
          >>> import jax, jax.numpy as jnp, jaxq
          >>> from flax import linen
          >>> module, x = linen.Dense(8, use_bias=False), jnp.ones((2, 64))
          >>> variables = module.init(jax.random.key(0), x)
          >>> qmodule, qvariables, _ = jaxq.nn.linen.quantize_model(
          ...   module, variables, "int8")
          >>> "(544 B)" in qmodule.tabulate(qvariables, x)
          True
        """
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise TypeError(
                "Quantized.tabulate: the first argument must be the variables that "
                "quantize_model returned. Keys would give the sizes of float "
                "parameters. Write qmodule.tabulate(qvariables, x)."
            )
        self.bind(variables)._jaxq_check()
        return tabulate(self._jaxq_module, variables, *args, **kwargs)

    @linen.nowrap
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_jaxq_module" not in vars(self):
                raise
        value = getattr(self._jaxq_module, name)
        if self.scope is None:
            return value
        return _intercepted(value, self._jaxq_interceptor())


class _Method:
    """A method of `Quantized` that calls a given method of the wrapped module."""

    def __init__(self, method: Any):
        self.method = method

    def __call__(self, quantized: Quantized, *args: Any, **kwargs: Any) -> Any:
        return quantized._jaxq_enter(self.method, *args, **kwargs)


class _Intercepted:
    """A bound module or method of a bound `Quantized`. Its calls are intercepted."""

    def __init__(self, value: Any, interceptor: Callable[..., Any]):
        self._value = value
        self._interceptor = interceptor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with linen.intercept_methods(self._interceptor):
            return self._value(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _intercepted(getattr(self._value, name), self._interceptor)


def _intercepted(value: Any, interceptor: Callable[..., Any]) -> Any:
    """Wraps a module, a method or a tuple of them. Returns other values unchanged."""
    is_method = inspect.ismethod(value) and isinstance(value.__self__, linen.Module)
    if is_method or isinstance(value, linen.Module):
        return _Intercepted(value, interceptor)
    if type(value) is tuple:  # flax keeps lists as tuples
        return tuple(_intercepted(element, interceptor) for element in value)
    return value


def _wrapper_method(method: Any) -> Any:
    """The method of `Quantized` that Flax calls for `method=` of the wrapped module."""
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
    """Arguments of `apply` that capture results of the wrapped module only.

    Otherwise `capture_intermediates` would also capture the results of the wrapper.
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
    return not isinstance(value_in_box(params), QUANTIZED)
