"""Batch norms of a prepared model, which are trained together with kernels.

`prepare` first folds the batch norms, and then quantizes the folded model by the
recipe. So calibration, GPTQ and the report see the folded kernels. After that,
`start_norms` gives each trained kernel its batch norm back. At the end of training,
`finish_norms` folds the batch norms permanently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxq.nn.layers import (
    FoldedBatchNorm,
    FoldedTrainedParam,
    TrainedBatchNorm,
    TrainedParam,
    folded_kernel,
    replace_variables,
)
from jaxq.nn.transform import Options, features_axis, find_layers, find_norms
from jaxq.training._weights import trained_params


class NormedLayer(NamedTuple):
    """A layer whose kernel is trained together with a batch norm.

    Attributes:
      layer: the layer.
      kernel: its kernel.
    """

    layer: Any
    kernel: FoldedTrainedParam


def norms_to_fold(
    model: Any, fold_batch_norm: bool | Sequence[str], options: Options
) -> dict[str, str]:
    """Finds the batch norms that `prepare` folds, and the layers in front of them.

    Returns:
      A dict from the path of each batch norm to the path of its layer.

    Raises:
      TypeError: `model` is not an nnx module.
      ValueError: there is no batch; or a batch norm cannot be folded.
    """
    if fold_batch_norm is False:
        return {}
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"{options.caller}: fold_batch_norm= needs a flax nnx Module, got "
            f"{type(model).__name__}. Multiply the kernels of a tree by the factors of "
            "their batch norms yourself."
        )
    if not options.batches:
        raise ValueError(
            f"{options.caller}: fold_batch_norm= traces a batch to find the layer in "
            "front of each batch norm. Pass calibration=[batch]."
        )
    norms = None if fold_batch_norm is True else list(fold_batch_norm)
    return find_norms(model, norms, options, argument="fold_batch_norm")


def start_norms(
    prepared: nnx.Module, model: nnx.Module, pairs: Mapping[str, str]
) -> None:
    """Gives the trained kernels of a prepared model their batch norms, in place.

    A layer that the recipe leaves in floats gets its old kernel, bias and batch norm
    back.

    Args:
      prepared: the prepared model, with folded batch norms.
      model: the float model.
      pairs: the result of `norms_to_fold`.
    """
    old, new = _modules(model), _modules(prepared)
    kinds = {layer.path: layer.kind for layer in find_layers(model)}
    replaced: dict[int, Any] = {}
    for norm_path, path in pairs.items():
        norm, layer = old[norm_path], new[path]
        if not isinstance(layer.kernel, TrainedParam):
            replaced[id(layer)] = nnx.clone(old[path])
            replaced[id(new[norm_path])] = nnx.clone(norm)
            continue
        bias = layer.bias.get_value()
        trained_norm = TrainedBatchNorm.of(norm, old[path], bias.dtype)
        axis = features_axis(layer, kinds[path])
        kernel = layer.kernel
        weight = dataclasses.replace(
            kernel.get_value(),
            floats=_unfolded(kernel, old[path].kernel, trained_norm, axis),
        )
        metadata = kernel.float_param().get_metadata()
        layer.kernel = FoldedTrainedParam(weight, trained_norm, axis, **metadata)
        # Bias correction may have changed the bias of the folded layer. The bias of the
        # batch norm keeps this change.
        start = trained_norm.folded_bias().astype(bias.dtype)
        _add_to_bias(trained_norm, bias - start)
        layer.bias, layer.use_bias = nnx.data(None), False
        replaced[id(new[norm_path])] = trained_norm
    replace_variables(prepared, replaced)


def normed_layers(model: nnx.Module) -> Iterator[NormedLayer]:
    """Yields the layers of a prepared model that are trained with a batch norm."""
    kernels = {
        id(param): param
        for _, param in trained_params(model)
        if isinstance(param, FoldedTrainedParam)
    }
    for layer in find_layers(model):
        kernel = getattr(layer.layer, layer.kind.weight)
        if id(kernel) in kernels:
            yield NormedLayer(layer.layer, kernel)


def finish_norms(model: nnx.Module) -> None:
    """Folds the batch norms of a prepared model permanently, in place.

    The trained kernels do not change. Quantize them before this call, because it
    replaces their batch norms.
    """
    replaced: dict[int, Any] = {}
    for layer, kernel in normed_layers(model):
        layer.bias = nnx.Param(kernel.norm.folded_bias())
        layer.use_bias = True
        replaced[id(kernel.norm)] = FoldedBatchNorm(kernel.norm)
    replace_variables(model, replaced)


def restore_norms(model: nnx.Module) -> None:
    """Gives a prepared model its `nnx.BatchNorm`s back, in place.

    The caller must also replace the kernels of their layers by `kernel.floats`.
    """
    norms = [kernel.norm for _, kernel in normed_layers(model)]
    replace_variables(model, {id(norm): norm.restored() for norm in norms})


def _unfolded(
    kernel: TrainedParam, old_kernel: Any, norm: TrainedBatchNorm, axis: int
) -> Any:
    """The floats with which training starts, without the factors of the batch norm.

    These are the floats of the model. The exception are weights that the method of the
    recipe has changed, as GPTQ does.
    """
    floats, old_floats = kernel.floats.get_value(), old_kernel.get_value()
    factor = norm.factor()
    is_same = folded_kernel(old_floats, factor, axis) == floats
    return jnp.where(is_same, old_floats, folded_kernel(floats, 1 / factor, axis))


def _add_to_bias(norm: nnx.BatchNorm, change: Any) -> None:
    """Adds a change to the bias of a batch norm, which may have none."""
    if not jnp.any(change != 0):
        return
    if norm.bias is None:
        norm.bias, norm.use_bias = nnx.Param(change.astype(norm.param_dtype)), True
        return
    bias = norm.bias.get_value()
    norm.bias.set_value((bias + change.astype(bias.dtype)).astype(bias.dtype))


def _modules(model: nnx.Module) -> dict[str, Any]:
    """All modules of a model, by path."""
    return {
        "/".join(map(str, path)): module for path, module in nnx.iter_modules(model)
    }
