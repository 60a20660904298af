"""The `promote_dtype` hook of a Flax layer, for a weight that is a QTensor.

A hook may cast the weight. If a hook changes the numbers of the weight, quantization
raises an error, because codes cannot be changed in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes

from jaxq.nn.layers._input_transform import TransformInput
from jaxq.nn.layers._quantized_param import FLOAT_STATE, QuantizedParam
from jaxq.nn.layers._trained_param import TrainedParam
from jaxq.nn.layers._weight_marks import changed_weights, mark
from jaxq.qtensor import QUANTIZED


@dataclasses.dataclass(frozen=True)
class PromoteQTensors:
    """A `promote_dtype` that also takes QTensors.

    Flax's function works on arrays. A scalar of the same dtype takes the place of each
    QTensor. The QTensor is then cast to the dtype that the scalar got. Two of these
    objects are equal if `original` is equal, so `nnx.jit` does not compile again.

    Attributes:
      original: the layer's own `promote_dtype`.
      is_quantized: the weight must be a QTensor. Without this check, a float state that
        is merged into a quantized model would run unnoticed.

    Raises:
      ValueError: in a call, `is_quantized` is True and the weight is an array.
    """

    original: Callable[..., Any]
    is_quantized: bool = False

    def __call__(self, arrays: tuple, **kwargs: Any) -> tuple:
        weight = arrays[min(1, len(arrays) - 1)]
        # Another such object may call this one with scalars instead of QTensors.
        is_array = not isinstance(weight, QUANTIZED) and weight.ndim > 0
        if self.is_quantized and is_array:
            raise ValueError(
                "The weight of a quantized layer is "
                f"{weight.dtype}{list(weight.shape)}, not a QTensor. {FLOAT_STATE}"
            )
        scalars = tuple(
            jnp.zeros((), a.dtype) if isinstance(a, QUANTIZED) else a for a in arrays
        )
        promoted = self.original(scalars, **kwargs)
        return tuple(
            a.astype(p.dtype) if isinstance(a, QUANTIZED) else p
            for a, p in zip(arrays, promoted, strict=True)
        )


def accept_qtensors(layer: Any, name: str) -> None:
    """Lets the `promote_dtype` of an nnx layer take QTensors, in place.

    Args:
      layer: an nnx layer.
      name: the attribute that holds the weight.
    """
    is_quantized = isinstance(getattr(layer, name), QuantizedParam | TrainedParam)
    layer.promote_dtype = PromoteQTensors(layer.promote_dtype, is_quantized)


def accept_arrays(layer: Any) -> None:
    """Gives an nnx layer back the `promote_dtype` that it had with floats, in place."""
    hook = getattr(layer, "promote_dtype", None)
    if hook is not None:
        layer.promote_dtype = _without_qtensors(hook)


def _without_qtensors(hook: Any) -> Any:
    if isinstance(hook, PromoteQTensors):
        return _without_qtensors(hook.original)
    if isinstance(hook, TransformInput):
        return dataclasses.replace(hook, original=_without_qtensors(hook.original))
    return hook


def promotion_problem(layer: Any, name: str, shape: tuple[int, ...]) -> str | None:
    """Says why the `promote_dtype` of an nnx layer excludes a QTensor, or None.

    Args:
      layer: an nnx layer.
      name: the attribute that holds the weight.
      shape: of the weight of one layer.
    """
    if layer.promote_dtype is dtypes.promote_dtype:
        return None

    def promote(arrays: tuple) -> Sequence:
        return layer.promote_dtype(arrays, dtype=layer.dtype)

    weight = getattr(layer, name).get_value()
    return changed_by_promotion(
        promote, name, jax.ShapeDtypeStruct(shape, weight.dtype)
    )


def changed_by_promotion(
    promote: Callable[[tuple], Sequence], name: str, weight: jax.ShapeDtypeStruct
) -> str | None:
    """Says that a `promote_dtype` changes the numbers of a weight. None if it does not.

    Args:
      promote: maps (input, weight, bias) to the promoted arrays.
      name: of the weight.
      weight: shape and dtype of the weight.
    """
    sizes = (*weight.shape[-2:-1], *weight.shape[-1:])
    x = jax.ShapeDtypeStruct((1, sizes[0]), weight.dtype)
    bias = jax.ShapeDtypeStruct((sizes[-1],), weight.dtype)

    def run(x: jax.Array, weight: jax.Array, bias: jax.Array) -> None:
        mark(promote((x, weight, bias))[1], name)

    try:
        traced = jax.make_jaxpr(run)(x, weight, bias)
    except Exception as error:  # a hook may raise anything here
        return f"its promote_dtype cannot be checked ({type(error).__name__}: {error})"
    if not changed_weights(traced, ["", name, ""]):
        return None
    return (
        f"its promote_dtype changes its {name}, and codes can only be cast. Store the "
        f"changed {name} in the layer, and use a promote_dtype that only casts"
    )
