"""The table of a quantized linen module: `nn.tabulate` with codes and scales.

Flax runs `init` of a module, which makes float parameters, and lists what it returns.
Here `init` runs the module with quantized variables, and returns their arrays.
"""

from __future__ import annotations

from typing import Any

from flax import linen
from flax.core.scope import DenyList

from jaxq.nn.layers._linen_interceptor import use_codes
from jaxq.nn.layers._linen_trace import params_of, with_params
from jaxq.qtensor import LEAVES, QTensor
from jaxq.sharding import value_in_box


def tabulate(module: linen.Module, variables: Any, *args: Any, **kwargs: Any) -> str:
    """The table of a module with quantized variables.

    Args:
      module: the float module.
      variables: floats or QTensors. A QTensor is shown as its codes and scales.
      *args: the inputs of the module.
      **kwargs: arguments of `nn.Module.tabulate`, and named inputs.
    """

    def init(
        variables: Any,
        *inputs: Any,
        mutable: Any = DenyList("intermediates"),  # noqa: B008 (a constant)
        **named_inputs: Any,
    ) -> Any:
        with linen.intercept_methods(use_codes):
            module.apply(variables, *inputs, mutable=mutable, **named_inputs)
        params = {
            key: _parts(value_in_box(value))
            for key, value in params_of(variables).items()
        }
        return with_params(variables, params)

    # Flax reads `init` and the name of the class, which is the title of the table.
    shown: Any = type("Quantized", (), {"init": staticmethod(init)})()
    return linen.Module.tabulate(shown, variables, *args, **kwargs)


def _parts(value: Any) -> Any:
    """The arrays of a QTensor by name; other values as they are."""
    if not isinstance(value, QTensor):
        return value
    leaves = {name: getattr(value, name) for name in LEAVES}
    return {name: _parts(leaf) for name, leaf in leaves.items() if leaf is not None}
