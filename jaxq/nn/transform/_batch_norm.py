"""fold_batch_norm: moves batch norms into the layers in front of them.

A trace of one batch shows which layer is in front of a batch norm. In a copy of the
model, each layer names its output, and each batch norm names its input. If the trace
names the same value twice, and nothing else reads it, the two belong together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxq.emulation import inner_jaxprs
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
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._same_function import output_difference
from jaxq.qtensor import QUANTIZED
from jaxq.recipes import compile_pattern

CALLER = "nn.fold_batch_norm"

# The classes of layers that compute a product and add `bias` to its last axis.
_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
_OUTPUT, _INPUT = "jaxq output of ", "jaxq input of "


def fold_batch_norm(
    model: nnx.Module,
    batch: Any,
    *,
    norms: Sequence[str] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """Returns a copy of a float model whose batch norms are a part of its layers.

    In eval mode, the copy computes the same function with fewer operations. The kernel
    of a layer in front of a batch norm is multiplied by
    `norm.scale / sqrt(norm.var + norm.epsilon)`, and its bias changes accordingly. A
    `jaxq.nn.FoldedBatchNorm` takes the place of the batch norm. Layers without a bias
    get one. `jaxq.quantize_model` then quantizes the folded kernels.

    The layers are `nnx.Linear`, `nnx.Conv` and `nnx.ConvTranspose`. A trace of the
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
            f"{CALLER}: model must be a flax nnx Module, got {type(model).__name__}."
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
    found = {path: m for path, m in _modules(model) if isinstance(m, nnx.BatchNorm)}
    if not found:
        raise ValueError(
            f"{options.caller}: the model has no nnx.BatchNorm. Leave out the folding "
            "of batch norms."
        )
    chosen = list(found)
    if norms is not None:
        matched = {norm: _matches(norm, found) for norm in norms}
        unmatched = [norm for norm in norms if not matched[norm]]
        if unmatched or not norms:
            raise ValueError(
                f"{options.caller}: the patterns {unmatched} match no batch norm. The "
                f"batch norms of the model are {list(found)}."
            )
        chosen = [path for path in found if any(path in m for m in matched.values())]
    trace = _Trace.of(model, options)
    layers = {layer.path: layer for layer in find_layers(model)}
    pairs, problems = {}, []
    for path in chosen:
        layer_path, problem = trace.layer_before(path)
        if not problem:
            layer, kind = layers[layer_path].layer, layers[layer_path].kind
            problem = _problem(layer_path, layer, kind, found[path], model)
        if problem:
            problems.append(f"  {path or 'the model itself'}: {problem}")
        else:
            pairs[path] = layer_path
    if problems:
        remedy = "Leave out the folding of batch norms."
        if pairs:
            remedy = f"To fold only the others, pass {argument}={list(pairs)}."
        raise ValueError(
            f"{options.caller}: some batch norms cannot be folded.\n"
            + "\n".join(problems)
            + f"\n{remedy}"
        )
    return pairs


def fold_norms(
    model: nnx.Module, pairs: Mapping[str, str], options: Options
) -> nnx.Module:
    """A copy of a model with folded batch norms.

    Args:
      model: a float model. It does not change.
      pairs: the result of `find_norms`.
      options: with batches. The first one compares the two models.

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
    """Moves a batch norm into a layer, in place."""
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
            f"its statistics are {list(norm.mean.get_value().shape)}, and {path} "
            f"needs {list(expected)}"
        )
    return ""


class _Trace:
    """What a trace shows about layers and batch norms.

    Attributes:
      pairs: the path of the layer that computes the input of each batch norm, by the
        path of the batch norm.
      calls: how often the trace calls each layer and batch norm, by the name that it
        gives to its output or input.
      shared: the layers whose outputs are read more than once.
    """

    def __init__(self, jaxpr: Any):
        self.pairs: dict[str, str] = {}
        self.calls: dict[str, int] = {}
        self.shared: set[str] = set()
        self._visit(jaxpr)

    @classmethod
    def of(cls, model: nnx.Module, options: Options) -> _Trace:
        """The trace of the first batch through a model in eval mode."""
        assert options.batches
        copy = eval_copy(model)
        for path, module in list(_modules(copy)):
            is_norm = isinstance(module, nnx.BatchNorm)
            if is_norm or (isinstance(module, _LAYERS) and find_kind(module)):
                module.__class__ = _named_class(type(module), is_norm)
                module.trace_name = (_INPUT if is_norm else _OUTPUT) + path
        graph, state = nnx.split(copy)

        def run(state: Any, batch: Batch) -> Any:
            outputs = run_model(nnx.merge(graph, state), batch.whole(), options.forward)
            leaves = jax.tree.leaves(outputs)
            return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

        traced = jax.make_jaxpr(run)(state, Batch.of(options.batches[0]))
        return cls(traced.jaxpr)

    def layer_before(self, norm: str) -> tuple[str, str]:
        """The path of the layer in front of a batch norm, and why there is none."""
        num_calls = self.calls.get(_INPUT + norm, 0)
        if num_calls == 0:
            return "", "the batch does not reach it"
        if num_calls > 1:
            return "", f"the batch reaches it {num_calls} times"
        layer = self.pairs.get(norm)
        if layer is None:
            names = ", ".join(cls.__name__ for cls in _LAYERS)
            return "", f"its input is not the output of a layer ({names})"
        num_calls = self.calls[_OUTPUT + layer]
        if num_calls > 1:
            return "", f"{layer} in front of it is called {num_calls} times"
        if layer in self.shared:
            return "", f"other computations read the output of {layer} too"
        return layer, ""

    def _visit(self, jaxpr: Any) -> None:
        layers: dict[Any, str] = {}
        num_reads: dict[Any, int] = {}
        atoms = [atom for equation in jaxpr.eqns for atom in equation.invars]
        for atom in (*atoms, *jaxpr.outvars):
            if not hasattr(atom, "val"):  # not a constant
                num_reads[atom] = num_reads.get(atom, 0) + 1
        for equation in jaxpr.eqns:
            for inner in inner_jaxprs(equation):
                self._visit(inner)
            name = str(equation.params.get("name", ""))
            if equation.primitive.name != "name" or not _is_ours(name):
                continue
            self.calls[name] = self.calls.get(name, 0) + 1
            if name.startswith(_OUTPUT):
                output, path = equation.outvars[0], name.removeprefix(_OUTPUT)
                layers[output] = path
                if num_reads.get(output, 0) > 1:
                    self.shared.add(path)
            elif equation.invars[0] in layers:
                self.pairs[name.removeprefix(_INPUT)] = layers[equation.invars[0]]


def _is_ours(name: str) -> bool:
    return name.startswith((_OUTPUT, _INPUT))


@functools.cache
def _named_class(cls: Any, is_norm: bool) -> Any:
    """A subclass that names its input (a batch norm) or its output in a trace."""

    def call_norm(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.__call__(self, checkpoint_name(x, self.trace_name), *args, **kwargs)

    def call_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint_name(cls.__call__(self, *args, **kwargs), self.trace_name)

    return type(
        cls.__name__, (cls,), {"__call__": call_norm if is_norm else call_layer}
    )


def _matches(pattern: str, paths: Mapping[str, Any]) -> list[str]:
    compiled = compile_pattern(pattern)
    return [path for path in paths if compiled.fullmatch(path)]


def _modules(model: nnx.Module) -> list[tuple[str, Any]]:
    return [
        ("/".join(map(str, path)), module) for path, module in nnx.iter_modules(model)
    ]
