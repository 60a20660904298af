"""convert: makes a quantized model from a prepared model."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxq.methods import Solved
from jaxq.nn.layers import QuantizedParam, quantized_param, replace_variables
from jaxq.nn.report import (
    Report,
    Row,
    float_row,
    other_row,
    quantized_row,
    why_not_weight,
)
from jaxq.nn.transform import find_layers, find_raw_arrays, find_variables
from jaxq.qtensor import QTensor, TrainedWeight
from jaxq.training._averages import check_averages
from jaxq.training._batch_norm import finish_norms
from jaxq.training._weights import (
    is_trained,
    no_trained_weight,
    path_of,
    trained_params,
    trained_weights,
)

CALLER = "training.convert"


def convert(model: Any) -> tuple[Any, Report]:
    """Returns the quantized model of a prepared model.

    The quantized model computes the same numbers as the prepared model in eval mode. A
    batch norm that is trained together with a kernel becomes a part of the layer, and a
    `jaxq.nn.FoldedBatchNorm` takes its place.

    Args:
      model: the result of `jaxq.training.prepare`, trained or not.

    Returns:
      (a model of the same class or a tree, a `Report`), as `jaxq.quantize_model` and
      `jaxq.quantize_params` return them. The rows compare the quantized weights with
      their trained floats.

    Raises:
      ValueError: the model has no trained weight, or no batch has set a moving average
        (`jaxq.training.ema`).

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> params = {"w": jnp.eye(64)}
      >>> qparams, report = jaxq.training.convert(jaxq.training.prepare(params, "int4"))
      >>> qparams["w"].spec.fmt.name, report.rows[0].method
      ('int4', 'trained')
    """
    if isinstance(model, nnx.Module):
        return _convert_nnx(model)
    return _convert_tree(model)


def trained_row(path: str, kind: str, weight: TrainedWeight, qt: QTensor) -> Row:
    """The row of the report on a trained weight."""
    solved = Solved(qt, "trained", "", None)
    return quantized_row(path, kind, weight.floats, qt, solved)


def _convert_nnx(model: nnx.Module) -> tuple[nnx.Module, Report]:
    check_averages(trained_weights(model, CALLER), CALLER)
    model = nnx.clone(model)
    kinds = {layer.path: layer.kind.name for layer in find_layers(model)}
    rows = []
    quantized: dict[int, QuantizedParam] = {}
    # `id` identifies a module, so the modules must stay alive.
    params = list(trained_params(model))
    for path, param in params:
        weight = param.get_value()
        qt = weight.quantize()
        quantized[id(param)] = quantized_param(qt, param.floats)
        kind = kinds.get(path.rpartition("/")[0], "Param")
        rows.append(trained_row(path, kind, weight, qt))
    finish_norms(model)
    replace_variables(model, quantized)
    for path, variable in find_variables(model):
        if not isinstance(variable, QuantizedParam):
            rows.append(other_row(path, variable, set(kinds)))
    for path, array in find_raw_arrays(model):
        rows.append(float_row(path, "array", array, "in no variable, left as it is"))
    return model, Report(tuple(rows), ())


def _convert_tree(tree: Any) -> tuple[Any, Report]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_trained)
    rows, values = [], []
    for keys, leaf in leaves:
        path = path_of(keys)
        if isinstance(leaf, TrainedWeight):
            qt = leaf.quantize()
            rows.append(trained_row(path, "Array", leaf, qt))
            values.append(qt)
            continue
        values.append(leaf)
        if hasattr(leaf, "dtype"):
            note = why_not_weight(leaf, in_layer=False) or "not prepared"
            rows.append(float_row(path, "Array", leaf, note))
    if not any(isinstance(leaf, TrainedWeight) for _, leaf in leaves):
        raise no_trained_weight(CALLER)
    return jax.tree.unflatten(structure, values), Report(tuple(rows), ())
