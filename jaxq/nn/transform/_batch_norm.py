"""fold_batch_norm: folds batch norms into the layers in front of them.

`_norm_trace.py` finds the layer in front of a batch norm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxq.nn.calibration import Batch, eval_copy, run_model
from jaxq.nn.layers import (
    FoldedBatchNorm,
    LayerKind,
    find_kind,
    folded_bias,
    folded_kernel,
    norm_factor,
    replace_variables,
    weight_axes,
)
from jaxq.nn.transform._nnx_layers import find_layers
from jaxq.nn.transform._norm_trace import (
    NormTrace,
    chosen_norms,
    find_pairs,
    name_input,
    name_output,
)
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._same_function import output_difference
from jaxq.qtensor import QUANTIZED

CALLER = "nn.fold_batch_norm"

# The classes of layers that compute a product and add `bias` to its last axis.
_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
# During a trace, this attribute of a layer holds its path.
_PATH = "jaxq_path"


def fold_batch_norm(
    model: nnx.Module,
    batch: Any,
    *,
    norms: Sequence[str] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """Returns a copy of a float model with batch norms folded into layers.

    In eval mode, the copy computes the same function with fewer operations. The kernel
    of the layer in front of a batch norm is multiplied by
    `norm.scale / sqrt(norm.var + norm.epsilon)`, and the bias of the layer changes
    accordingly. A layer without a bias gets one. A `jaxq.nn.FoldedBatchNorm` takes the
    place of the batch norm. `jaxq.quantize_model` then quantizes the folded kernels.

    The layer must be an `nnx.Linear`, `nnx.Conv` or `nnx.ConvTranspose`. A trace of the
    batch shows which layer is in front of a batch norm. Nothing else may read the
    output of the layer. The outputs of both models on the batch are compared.

    Do not train the copy in train mode: a folded batch norm does not normalize by the
    statistics of a batch. `jaxq.training.prepare` folds batch norms for training.

    A scale of a batch norm that is smaller than 1e-6 counts as 1e-6.

    Args:
      model: a flax nnx module with float weights. It does not change.
      batch: one input of the model, as in `jaxq.nn.calibrate`. It runs in eval mode.
      norms: patterns for the paths of the batch norms, as in `jaxq.Rule`. None folds
        all of them.
      forward: `forward(model, batch)` runs the batch. None calls the model.

    Returns:
      A model of the same class.

    Raises:
      TypeError: `model` is not an nnx module.
      ValueError: a pattern matches no batch norm; a batch norm cannot be folded, for
        example because no layer is in front of it; or the outputs on the batch change,
        for example because an argument of the call sets train mode.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...   nnx.Linear(64, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)
      >>> folded = jaxq.nn.fold_batch_norm(model, jnp.ones((2, 64)))
      >>> qmodel, report = jaxq.quantize_model(folded, "int8")
      >>> type(qmodel.layers[1]).__name__
      'FoldedBatchNorm'

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, section 3.2.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"{CALLER}: model must be a flax nnx Module, got {type(model).__name__}. "
            "For a linen module, use jaxq.nn.linen.fold_batch_norm."
        )
    options = Options(caller=CALLER, calibration=[batch], forward=forward)
    pairs = find_norms(model, norms, options, argument="norms")
    return fold_norms(model, pairs, options)


def find_norms(
    model: nnx.Module,
    norms: Sequence[str] | None,
    options: Options,
    *,
    argument: str,
) -> dict[str, str]:
    """Finds the layers in front of batch norms.

    Args:
      model: a float model.
      norms: as in `fold_batch_norm`.
      options: with batches. The first one is traced.
      argument: the name of the argument with the patterns, for errors.

    Returns:
      A dict from the path of each batch norm to the path of its layer.

    Raises:
      ValueError: as in `fold_batch_norm`.
    """
    batch_norms = {
        path: module
        for path, module in _modules(model)
        if isinstance(module, nnx.BatchNorm)
    }
    chosen = chosen_norms(norms, list(batch_norms), options.caller)
    layers = {layer.path: layer for layer in find_layers(model)}

    def why_not(norm: str, path: str) -> str:
        layer = layers[path]
        return _problem(path, layer.layer, layer.kind, batch_norms[norm], model)

    trace = _trace(model, options)
    return find_pairs(chosen, trace, why_not, options.caller, argument)


def fold_norms(
    model: nnx.Module, pairs: Mapping[str, str], options: Options
) -> nnx.Module:
    """A copy of a model with folded batch norms.

    Args:
      model: a float model. It does not change.
      pairs: the result of `find_norms`.
      options: with batches. The outputs of both models on the first one are compared.

    Raises:
      ValueError: the outputs on the first batch change.
    """
    folded: Any = nnx.clone(model)
    modules = dict(_modules(folded))
    replaced = {}
    for norm_path, layer_path in pairs.items():
        layer, norm = modules[layer_path], modules[norm_path]
        _fold(layer, norm)
        replaced[id(norm)] = FoldedBatchNorm(norm)
    replace_variables(folded, replaced)
    problem = output_difference(model, folded, options)
    if problem:
        raise ValueError(
            f"{options.caller}: folding the batch norms {list(pairs)} changes what the "
            f"model computes: {problem}. A batch norm must use its running averages, "
            "so pass the arguments of eval mode in the batch or in forward=. A layer "
            "in front of a batch norm must only compute its product and add its bias."
        )
    return folded


def features_axis(layer: Any, kind: LayerKind) -> int:
    """The axis of a kernel that holds the features, a negative number."""
    shape = kind.roles(layer).shape
    (axis,) = set(range(-len(shape), 0)) - set(kind.roles(layer).contracting)
    return axis


def _fold(layer: Any, norm: nnx.BatchNorm) -> None:
    """Folds a batch norm into a layer, in place."""
    kind = find_kind(layer)
    assert kind is not None
    kernel = layer.kernel.get_value()
    bias, dtype, metadata = None, kernel.dtype, {}
    if layer.bias is not None:
        bias = layer.bias.get_value()
        dtype, metadata = bias.dtype, layer.bias.get_metadata()
    new_bias = folded_bias(bias, norm).astype(dtype)
    new_kernel = folded_kernel(kernel, norm_factor(norm), features_axis(layer, kind))
    layer.kernel.set_value(new_kernel)
    layer.bias = nnx.Param(new_bias, **metadata)
    layer.use_bias = True


def _problem(
    path: str, layer: Any, kind: LayerKind, norm: nnx.BatchNorm, model: nnx.Module
) -> str:
    """Why a layer cannot be folded with a batch norm. Empty if it can."""
    if type(norm) is not nnx.BatchNorm:
        return (
            f"{type(norm).__name__} is a subclass of BatchNorm, and may compute "
            "another function"
        )
    if norm.axis != -1:
        return f"it normalizes axis {norm.axis}. Build it with axis=-1"
    kernel = layer.kernel
    if isinstance(kernel.get_value(), QUANTIZED):
        return f"{path} is quantized already. Fold batch norms before quantization"
    users = [
        other.path
        for other in find_layers(model)
        if getattr(other.layer, other.kind.weight) is kernel
    ]
    if len(users) > 1:
        return f"{' and '.join(users)} share their kernel"
    _, batch_axes = weight_axes(layer, kind)
    shape = kernel.get_value().shape
    batch = tuple(shape[axis] for axis in batch_axes)
    expected = (*batch, shape[features_axis(layer, kind)])
    if norm.mean.get_value().shape != expected:
        return (
            f"its statistics have the shape {list(norm.mean.get_value().shape)}, but "
            f"{path} needs {list(expected)}"
        )
    return ""


def _trace(model: nnx.Module, options: Options) -> NormTrace:
    """The trace of the first batch through a model in eval mode."""
    assert options.batches
    copy = eval_copy(model)
    for path, module in _modules(copy):
        is_norm = isinstance(module, nnx.BatchNorm)
        if is_norm or (isinstance(module, _LAYERS) and find_kind(module)):
            module.__class__ = _named_class(type(module), is_norm)
            setattr(module, _PATH, path)
    graph, state = nnx.split(copy)

    def run(state: Any, batch: Batch) -> Any:
        outputs = run_model(nnx.merge(graph, state), batch.whole(), options.forward)
        leaves = jax.tree.leaves(outputs)
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    traced = jax.make_jaxpr(run)(state, Batch.of(options.batches[0]))
    return NormTrace(traced.jaxpr)


@functools.cache
def _named_class(cls: Any, is_norm: bool) -> Any:
    """A subclass that names its input (a batch norm) or its output in a trace."""

    def call_norm(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.__call__(self, name_input(x, getattr(self, _PATH)), *args, **kwargs)

    def call_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return name_output(cls.__call__(self, *args, **kwargs), getattr(self, _PATH))

    return type(
        cls.__name__, (cls,), {"__call__": call_norm if is_norm else call_layer}
    )


def _modules(model: nnx.Module) -> list[tuple[str, Any]]:
    return [
        ("/".join(map(str, path)), module) for path, module in nnx.iter_modules(model)
    ]
