"""merge_lora: adds the adapters of a model to its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.nn.layers import accept_arrays, float_param
from jaxq.nn.report import Report, Row, float_row, other_row, quantized_row
from jaxq.nn.transform import (
    find_layers,
    find_raw_arrays,
    find_variables,
    quantize_model,
)
from jaxq.qtensor import QTensor, QuantSpec, dequantize
from jaxq.recipes import Recipe
from jaxq.training.lora._product import HOOKS, LoRAProduct
from jaxq.training.lora._start import float_weight, quantized_again

CALLER = "training.merge_lora"


@overload
def merge_lora(
    model: nnx.Module, *, requantize: Literal[False] = False
) -> nnx.Module: ...
@overload
def merge_lora(
    model: nnx.Module, *, requantize: Literal[True] | str | QuantSpec | Recipe
) -> tuple[nnx.Module, Report]: ...


def merge_lora(model: nnx.Module, *, requantize: Any = False) -> Any:
    """Returns a copy of a model in which each adapter is added to its weight.

    Without `requantize`, each layer with an adapter gets the float weight
    `W + scale * A B` in the dtype of W. Layers without an adapter do not change, so a
    quantized layer stays quantized.

    With `requantize`, these float weights are quantized again. This loses a part of
    what the adapters learned, because the steps between codes are often larger than the
    change. The report shows the error of each weight. With `requantize=True`, its notes
    compare this error with the change that the adapter made.

    Args:
      model: the result of `jaxq.training.add_lora`, trained or not.
      requantize: True quantizes each weight to nearest with the spec that it had. A
        preset name, `QuantSpec` or `Recipe` quantizes all float layers of the merged
        model, as `jaxq.quantize_model` does.

    Returns:
      A model of the same class. With `requantize`, (this model, a `Report`).

    Raises:
      TypeError: `model` is not an nnx module.
      ValueError: the model has no adapter; `requantize` is True, and a weight with an
        adapter is not quantized; or `requantize` is a recipe, and its rules match a
        layer without an adapter that is quantized already.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> model, x = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
      >>> qmodel, _ = jaxq.quantize_model(model, "nf4")
      >>> lora = jaxq.training.add_lora(qmodel, rank=4)
      >>> merged = jaxq.training.merge_lora(lora)
      >>> bool(jnp.allclose(merged(x), lora(x), atol=1e-5)), merged.kernel.dtype.name
      (True, 'float32')
      >>> qmerged, report = jaxq.training.merge_lora(lora, requantize=True)
      >>> report.quantized[0].format
      'nf4'
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"{CALLER}: model must be a flax nnx module, got {type(model).__name__}."
        )
    model = nnx.clone(model)
    adapters = list(find_adapters(model))
    if not adapters:
        raise ValueError(
            f"{CALLER}: the model has no adapter. Call jaxq.training.add_lora first."
        )
    if requantize is True:
        _refuse_floats(adapters)
        return model, _requantize(model, adapters)
    for _, layer, kind, product in adapters:
        variable = getattr(layer, kind.weight)
        weight = variable.get_value()
        merged = product.merged(float_weight(weight)).astype(weight.dtype)
        _replace_adapter(layer, kind, product, float_param(merged, variable))
    if requantize is False:
        return model
    return quantize_model(model, requantize)


def find_adapters(model: nnx.Module) -> Iterator[tuple[str, Any, Any, LoRAProduct]]:
    """Yields path, module, kind and `LoRAProduct` of each layer with an adapter."""
    for path, layer, kind in find_layers(model):
        product = getattr(layer, kind.hook, None) if kind.hook in HOOKS else None
        if isinstance(product, LoRAProduct):
            yield path, layer, kind, product


def _refuse_floats(adapters: list[Any]) -> None:
    """Raises a ValueError if some weights have no spec to quantize them again."""
    floats = [
        path
        for path, layer, kind, _ in adapters
        if not isinstance(getattr(layer, kind.weight).get_value(), QTensor)
    ]
    if floats:
        raise ValueError(
            f"{CALLER}: requantize=True keeps the spec of each weight, but these "
            f"weights are floats: {', '.join(floats)}. Pass a preset name, a QuantSpec "
            "or a Recipe as requantize=."
        )


def _requantize(model: nnx.Module, adapters: list[Any]) -> Report:
    """Merges and quantizes the weights in place. Returns the report."""
    quantized: dict[str, Row] = {}
    for path, layer, kind, product in adapters:
        variable = getattr(layer, kind.weight)
        weight = variable.get_value()
        before = float_weight(weight)
        merged = product.merged(before)
        qt = quantized_again(weight, merged)
        note = _note(before, merged, qt, product.rank)
        name = "/".join(filter(None, (path, kind.weight)))
        quantized[name] = quantized_row(name, kind.name, merged, qt, None, (note,))
        _replace_adapter(layer, kind, product, variable.replace(qt))
    layers = {layer.path for layer in find_layers(model)}
    rows = []
    for path, variable in find_variables(model):
        rows.append(quantized.get(path) or other_row(path, variable, layers))
    for path, array in find_raw_arrays(model):
        rows.append(float_row(path, "array", array, "in no variable, left as it is"))
    return Report(tuple(rows), ())


def _note(before: jax.Array, merged: jax.Array, qt: QTensor, rank: int) -> str:
    """Compares the error of the new codes with the change by the adapter."""
    change = float(jnp.linalg.norm(jnp.ravel(merged - before)))
    error = jnp.linalg.norm(jnp.ravel(dequantize(qt, dtype=jnp.float32) - merged))
    if change == 0:
        return f"merged with an adapter of rank {rank} that changes nothing"
    ratio = float(error) / change
    return (
        f"merged with an adapter of rank {rank}; the error is {ratio:.2f} times the "
        "change by the adapter"
    )


def _replace_adapter(
    layer: Any, kind: Any, product: LoRAProduct, variable: nnx.Variable
) -> None:
    """Gives a layer its merged weight and the product that it had before, in place."""
    # Other layers may share the frozen weight, so that Variable does not change.
    setattr(layer, kind.weight, variable)
    base = product.base
    is_module = isinstance(base, nnx.Module)
    setattr(layer, kind.hook, nnx.data(base) if is_module else nnx.static(base))
    if not isinstance(variable.get_value(), QTensor):
        accept_arrays(layer)
