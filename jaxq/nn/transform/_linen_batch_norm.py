"""fold_batch_norm for Flax linen: folds batch norms into the layers in front of them.

A linen module cannot change, so each batch norm stays in the module. Its variables
become those of the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxq.nn.calibration import Batch, LinenFunction
from jaxq.nn.layers import Forward, folded_kernel
from jaxq.nn.transform._linen import check_module
from jaxq.nn.transform._model_error import Run
from jaxq.nn.transform._norm_trace import (
    NormTrace,
    chosen_norms,
    find_pairs,
    name_input,
    name_output,
)
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._same_function import run_difference

CALLER = "nn.linen.fold_batch_norm"

_LAYERS = (linen.Dense, linen.Conv, linen.ConvTranspose)


def fold_batch_norm(
    module: linen.Module,
    variables: Mapping[str, Any],
    batch: Any,
    *,
    norms: Sequence[str] | None = None,
    forward: Forward | None = None,
) -> Any:
    """Returns variables with batch norms folded into layers.

    With the new variables, the module computes the same function in eval mode. Kernels
    are multiplied by `scale / sqrt(var + epsilon)`. The statistics and scales of the
    batch norms become those of the identity. The folded bias becomes the bias of the
    layer, or that of the batch norm if the layer has none.
    `jaxq.nn.linen.quantize_model` then quantizes the folded kernels.

    The layer must be a Dense, Conv or ConvTranspose. A trace of the batch shows which
    layer is in front of a batch norm, as in `jaxq.nn.fold_batch_norm`. The batch must
    run in eval mode: pass the arguments of eval mode in the batch or in `forward`. Do
    not train with the new variables.

    Args:
      module: a linen module.
      variables: its float variables, with "params" and "batch_stats".
      batch: one input of the module, as in `jaxq.nn.linen.calibrate`.
      norms: patterns for the paths of the batch norms. None folds all of them.
      forward: `forward(module, variables, batch)` runs the batch. None uses
        `module.apply`.

    Returns:
      Variables with the same structure.

    Raises:
      TypeError: `module` is not a float linen module, or `variables` has no "params".
      ValueError: a pattern matches no batch norm; a batch norm cannot be folded, for
        example because no layer is in front of it; or the outputs on the batch change.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module = linen.Sequential(
      ...   [linen.Dense(8), linen.BatchNorm(use_running_average=True)])
      >>> x = jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> folded = jaxq.nn.linen.fold_batch_norm(module, variables, x)
      >>> bool(jnp.allclose(module.apply(folded, x), module.apply(variables, x)))
      True

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, section 3.2.
    """
    check_module(module, variables, CALLER)
    options = Options(caller=CALLER, calibration=[batch], forward=forward)
    run = LinenFunction(module, forward)
    modules: dict[str, Any] = {}
    trace = _trace(run, variables, batch, modules)
    batch_norms = [
        path for path, m in modules.items() if isinstance(m, linen.BatchNorm)
    ]
    flat = flatten_dict(dict(variables), sep="/")

    def why_not(norm: str, layer: str) -> str:
        return _problem(modules[norm], modules[layer], norm, layer, flat)

    chosen = chosen_norms(norms, batch_norms, CALLER)
    pairs = find_pairs(chosen, trace, why_not, CALLER, "norms")
    for norm, layer in pairs.items():
        flat |= _folded(modules[norm], modules[layer], norm, layer, flat)
    folded = unflatten_dict(flat, sep="/")
    problem = run_difference(Run(run, dict(variables)), Run(run, folded), options)
    if problem:
        raise ValueError(
            f"{CALLER}: folding the batch norms {list(pairs)} changes what the module "
            f"computes: {problem}. A batch norm must use its running averages, so pass "
            "the arguments of eval mode in the batch or in forward=."
        )
    return freeze(folded) if isinstance(variables, FrozenDict) else folded


def _trace(
    run: Callable[[Any, Any], Any], variables: Any, batch: Any, modules: dict[str, Any]
) -> NormTrace:
    """The trace of a batch. It adds the layers and batch norms to `modules`."""

    def name(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        path = "/".join(module.path)
        if context.method_name != "__call__" or not args:
            return call(*args, **kwargs)
        if isinstance(module, linen.BatchNorm):
            modules[path] = module
            x, *rest = args
            return call(name_input(x, path), *rest, **kwargs)
        if isinstance(module, _LAYERS):
            modules[path] = module
            return name_output(call(*args, **kwargs), path)
        return call(*args, **kwargs)

    def outputs(variables: Any, batch: Batch) -> Any:
        with linen.intercept_methods(name):
            leaves = jax.tree.leaves(run(variables, batch.whole()))
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    traced = jax.make_jaxpr(outputs)(dict(variables), Batch.of(batch))
    return NormTrace(traced.jaxpr)


def _problem(
    norm: Any, layer: Any, norm_path: str, path: str, flat: Mapping[str, Any]
) -> str:
    """Why a layer cannot be folded with a batch norm. Empty if it can."""
    if norm.axis != -1:
        return f"it normalizes axis {norm.axis}. Build it with axis=-1"
    if not (norm.use_bias or layer.use_bias):
        return f"neither {path} nor the batch norm has a bias. Use use_bias=True"
    kernel = flat.get(_name("params", path, "kernel"))
    if not isinstance(kernel, jax.Array):
        return f"{path} has no float kernel of its own"
    mean = flat[_name("batch_stats", norm_path, "mean")]
    *batch, num_features = mean.shape
    axis = _features_axis(layer)
    if (*kernel.shape[: len(batch)], kernel.shape[axis]) != (*batch, num_features):
        return (
            f"its statistics have the shape {list(mean.shape)}, which does not fit the "
            f"kernel {list(kernel.shape)} of {path}"
        )
    return ""


def _folded(
    norm: Any, layer: Any, norm_path: str, path: str, flat: Mapping[str, Any]
) -> dict[str, Any]:
    """The variables that change, by path."""
    mean_name = _name("batch_stats", norm_path, "mean")
    var_name = _name("batch_stats", norm_path, "var")
    scale_name = _name("params", norm_path, "scale")
    norm_bias_name = _name("params", norm_path, "bias")
    kernel_name, bias_name = (
        _name("params", path, part) for part in ("kernel", "bias")
    )
    mean, var = flat[mean_name], flat[var_name]
    factor = 1 / jnp.sqrt(var.astype(jnp.float32) + norm.epsilon)
    new: dict[str, Any] = {}
    if norm.use_scale:
        scale = flat[scale_name]
        factor = factor * scale.astype(jnp.float32)
        new[scale_name] = jnp.ones_like(scale)
    bias = -mean.astype(jnp.float32) * factor
    if layer.use_bias:
        bias = bias + flat[bias_name].astype(jnp.float32) * factor
    if norm.use_bias:
        bias = bias + flat[norm_bias_name].astype(jnp.float32)
        new[norm_bias_name] = jnp.zeros_like(flat[norm_bias_name])
    place = bias_name if layer.use_bias else norm_bias_name
    new[place] = bias.astype(flat[place].dtype)
    new[kernel_name] = folded_kernel(flat[kernel_name], factor, _features_axis(layer))
    new[mean_name] = jnp.zeros_like(mean)
    # With this variance, `var + epsilon` is 1.
    new[var_name] = jnp.full_like(var, 1 - norm.epsilon)
    return new


def _features_axis(layer: Any) -> int:
    return -2 if getattr(layer, "transpose_kernel", False) else -1


def _name(collection: str, path: str, part: str) -> str:
    return "/".join(filter(None, (collection, path, part)))
