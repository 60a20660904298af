"""LoRA on linen modules.

`add_lora` wraps a module. While the wrapped module runs, each chosen layer adds
`scale * (x A) B` to its output. A and B are parameters of the layer, with the names
"lora_a" and "lora_b". So they are in stacks where the other parameters are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.core import FrozenDict, freeze

from jaxq.nn.layers import (
    Quantized,
    find_call,
    find_linen_layers,
    params_of,
    with_params,
)
from jaxq.qtensor import QTensor, dequantize
from jaxq.sharding import value_in_box
from jaxq.sharding.boxes import boxed_like
from jaxq.training.lora._adapter import AdapterAxes
from jaxq.training.lora._add import check_numbers, chosen_paths, refuse
from jaxq.training.lora._product import dot_change, lora_scale
from jaxq.training.lora._start import float_weight

CALLER = "training.linen.add_lora"
_NAMES = ("lora_a", "lora_b")
_KINDS = ("Dense", "DenseGeneral")


class Adapter(NamedTuple):
    """The static part of an adapter.

    Attributes:
      scope: the names of the modules that lead to the layer.
      weight: the name of the frozen weight.
      axes: of the weight of one layer.
      scale: the factor of A B.
    """

    scope: tuple[str, ...]
    weight: str
    axes: AdapterAxes
    scale: float


class LoRAModule(Quantized):
    """The module that `add_lora` returns. It is used like the module that it wraps.

    Its attributes and methods are those of `jaxq.nn.linen.Quantized`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> module, variables = jaxq.training.linen.add_lora(module, variables)
      >>> isinstance(module, jaxq.training.linen.LoRAModule)
      True
    """

    _jaxq_adapters: tuple[Adapter, ...] = ()

    @linen.nowrap
    def _jaxq_interceptor(self) -> Callable[..., Any]:
        depth = 0 if self.scope is None else len(self.path)
        adapters = {adapter.scope: adapter for adapter in self._jaxq_adapters}
        base = super()._jaxq_interceptor()
        return functools.partial(_call_with_adapter, base, adapters, depth)


def add_lora(
    module: linen.Module,
    variables: Mapping[str, Any],
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: str | Sequence[str] | None = None,
    rslora: bool = False,
    param_dtype: Any = jnp.float32,
    key: jax.Array | None = None,
    example: Any = None,
) -> tuple[LoRAModule, Any]:
    """Returns a linen module with low-rank adapters (LoRA) on some layers.

    The layers Dense and DenseGeneral can have adapters, also inside attention layers
    and lifted transforms such as `nn.scan`. The parameters of the adapters, "lora_a"
    and "lora_b", are beside the weight of each layer. `partition_lora` separates them
    from the frozen variables.

    Args:
      module: a linen module, or the result of `jaxq.nn.linen.quantize_model`.
      variables: its variables, a dict or a FrozenDict. They do not change.
      rank: the number of columns of A and of rows of B.
      alpha: the scale is `alpha / rank`.
      targets: patterns of the paths of layers, as in `jaxq.training.add_lora`. None
        chooses all Dense and DenseGeneral layers except routers and output heads.
      rslora: True uses the scale `alpha / sqrt(rank)` (rsLoRA).
      param_dtype: dtype of the adapters.
      key: PRNG key of A. None uses `jax.random.key(0)`.
      example: as in `jaxq.nn.linen.quantize_model`.

    Returns:
      (a module, variables). B starts as 0, so the outputs are those of `module` until
      training. A weight `[in, out]` has "lora_a" `[in, rank]` and "lora_b"
      `[rank, out]` beside it.

    Raises:
      TypeError: `module` is not a linen module, or is a wrapper of jaxq that cannot
        have adapters.
      ValueError: a number is out of range; a pattern matches no layer; a layer cannot
        have an adapter; or the module cannot be called with the example.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq, optax
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> module, variables, _ = jaxq.nn.linen.quantize_model(module, variables, "nf4")
      >>> module, variables = jaxq.training.linen.add_lora(module, variables, rank=4)
      >>> adapters, frozen = jaxq.training.linen.partition_lora(variables)
      >>> def loss(adapters):
      ...   y = module.apply(jaxq.combine(adapters, frozen), x)
      ...   return jnp.mean((y - 1) ** 2)
      >>> tx = optax.adam(1e-3)
      >>> state = tx.init(adapters)
      >>> changes, state = tx.update(jax.grad(loss)(adapters), state)
      >>> adapters = optax.apply_updates(adapters, changes)

    References:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022.
    """
    _check_module(module)
    check_numbers(rank, alpha, 0.0, CALLER)
    params = params_of(variables)
    float_module = module._jaxq_module if isinstance(module, Quantized) else module
    abstract = with_params(variables, {k: _abstract(v) for k, v in params.items()})
    structure = find_linen_layers(float_module, abstract, example, None, caller=CALLER)
    layers = list(structure.layers.values())
    if targets is None:
        layers = [layer for layer in layers if layer.kind.name in _KINDS] or layers
    paths = [(layer.path, layer.kind.name) for layer in layers]
    chosen = chosen_paths(paths, targets, CALLER)
    layers = [layer for layer in layers if layer.path in chosen]
    problems = []
    for layer in layers:
        problem = _problem(layer, params)
        if problem:
            problems.append(f"  {layer.path or 'the module'}: {problem}")
    refuse(problems, CALLER)
    key = jax.random.key(0) if key is None else key
    scale = lora_scale(alpha, rank, rslora=rslora)
    adapters = []
    for index, layer in enumerate(layers):
        axes = AdapterAxes.of(layer.roles)
        weight = value_in_box(params[layer.key])
        a, b = axes.new_matrices(weight, rank, jax.random.fold_in(key, index))
        matrices = axes.a_from_matrix(a), axes.b_from_matrix(b)
        for name, matrix in zip(_NAMES, matrices, strict=True):
            params[(*layer.scope, name)] = matrix.astype(param_dtype)
        adapters.append(Adapter(layer.scope, layer.kind.weight, axes, scale))
    weights = module._jaxq_weights if isinstance(module, Quantized) else ()
    wrapped = LoRAModule(float_module, weights, tuple(adapters))
    return wrapped, _rebuilt(variables, params)


def merge_lora(
    module: LoRAModule, variables: Mapping[str, Any]
) -> tuple[linen.Module, Any]:
    """Adds each adapter to its weight, which becomes a float weight.

    Args:
      module: the module from `jaxq.training.linen.add_lora`.
      variables: its variables. They do not change.

    Returns:
      (a module, variables) without adapters. The module is the float module if no
      weight is quantized any more.

    Raises:
      TypeError: `module` is not from `add_lora`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> lora, lora_variables = jaxq.training.linen.add_lora(module, variables)
      >>> merged, merged_variables = jaxq.training.linen.merge_lora(
      ...   lora, lora_variables)
      >>> merged is module, sorted(merged_variables["params"])
      (True, ['bias', 'kernel'])
    """
    if not isinstance(module, LoRAModule):
        raise TypeError(
            "training.linen.merge_lora: module must come from "
            f"jaxq.training.linen.add_lora, got {type(module).__name__}."
        )
    params = params_of(variables)
    merged_paths = set()
    for adapter in module._jaxq_adapters:
        key = (*adapter.scope, adapter.weight)
        a, b = (params.pop((*adapter.scope, name)) for name in _NAMES)
        weight = value_in_box(params[key])
        change = adapter.scale * adapter.axes.product(a, b)
        merged = (float_weight(weight) + change).astype(weight.dtype)
        params[key] = boxed_like(merged, params[key])
        merged_paths.add("/".join(key))
    weights = tuple(w for w in module._jaxq_weights if w not in merged_paths)
    inner = module._jaxq_module
    return Quantized(inner, weights) if weights else inner, _rebuilt(variables, params)


def lora_mask(variables: Any) -> Any:
    """A tree of bools that are True for the parameters of adapters.

    Args:
      variables: variables, or the "params" in them, from
        `jaxq.training.linen.add_lora`.

    Returns:
      A tree like `variables`, for `optax.masked`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module = linen.Dense(8)
      >>> variables = module.init(jax.random.key(0), jnp.ones((2, 64)))
      >>> _, variables = jaxq.training.linen.add_lora(module, variables)
      >>> mask = jaxq.training.linen.lora_mask(variables)
      >>> mask["params"]["lora_a"], mask["params"]["kernel"]
      (True, False)
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) in _NAMES, variables
    )


def partition_lora(variables: Any) -> tuple[Any, Any]:
    """Splits variables into those of the adapters and the frozen variables.

    Args:
      variables: as in `lora_mask`.

    Returns:
      (adapters, frozen). Each has None in the places of the other one.
      `jaxq.combine(adapters, frozen)` joins them again.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module = linen.Dense(8)
      >>> variables = module.init(jax.random.key(0), jnp.ones((2, 64)))
      >>> _, variables = jaxq.training.linen.add_lora(module, variables, rank=4)
      >>> adapters, frozen = jaxq.training.linen.partition_lora(variables)
      >>> adapters["params"]["lora_a"].shape, frozen["params"]["kernel"].shape
      ((64, 4), (64, 8))
    """
    mask = lora_mask(variables)
    adapters = jax.tree.map(lambda is_own, x: x if is_own else None, mask, variables)
    frozen = jax.tree.map(lambda is_own, x: None if is_own else x, mask, variables)
    return adapters, frozen


def _check_module(module: Any) -> None:
    """Raises a TypeError unless a module is plain, or from `quantize_model`."""
    if not isinstance(module, linen.Module):
        raise TypeError(
            f"{CALLER}: module must be a flax linen module, got "
            f"{type(module).__name__}. For nnx models use jaxq.training.add_lora."
        )
    if isinstance(module, Quantized) and type(module) is not Quantized:
        raise TypeError(
            f"{CALLER}: {type(module).__name__} cannot have adapters. Pass the float "
            "module, or the result of jaxq.nn.linen.quantize_model."
        )


def _abstract(value: Any) -> Any:
    """A QTensor as the shape and dtype of its floats. Other values do not change."""
    weight = value_in_box(value)
    if not isinstance(weight, QTensor):
        return value
    return jax.eval_shape(dequantize, weight)


def _problem(layer: Any, params: Mapping[Any, Any]) -> str | None:
    """Why a layer cannot have an adapter; None if it can."""
    if layer.kind.name not in _KINDS:
        return f"jaxq has no adapter for linen's {layer.kind.name}"
    weight = value_in_box(params[layer.key])
    if not isinstance(weight, QTensor | jax.Array | np.ndarray):
        return f"its {layer.kind.weight} is a {type(weight).__name__}"
    return layer.problem


def _rebuilt(variables: Mapping[str, Any], params: Any) -> Any:
    """Variables with other parameters. A FrozenDict stays one."""
    tree = with_params(variables, params)
    return freeze(tree) if isinstance(variables, FrozenDict) else tree


def _call_with_adapter(
    base: Callable[..., Any],
    adapters: Mapping[tuple[str, ...], Adapter],
    depth: int,
    call: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    context: Any,
) -> Any:
    """An interceptor that adds the product with an adapter to the output of a layer.

    Args:
      base: the interceptor that computes the output with the frozen weight.
      adapters: by the scopes of the layers.
      depth: the number of names that lead to the wrapped module.
      call: Flax's method.
      args: its positional arguments.
      kwargs: its named arguments.
      context: the intercepted call.
    """
    y = base(call, args, kwargs, context)
    layer = context.module
    if find_call(context) is None:
        return y
    adapter = adapters.get(tuple(layer.path[depth:]))
    if adapter is None or not layer.has_variable("params", _NAMES[0]):
        return y
    x = args[0] if args else kwargs["inputs"]
    # As in Flax's own code, the contracted axes are in ascending order.
    axis = np.atleast_1d(np.asarray(getattr(layer, "axis", -1), int))
    contracted = tuple(sorted((axis % x.ndim).tolist()))
    batch = adapter.axes.batch
    a, b = (layer.get_variable("params", name).astype(y.dtype) for name in _NAMES)
    change = dot_change(
        adapter.axes,
        x.astype(y.dtype),
        a,
        b,
        ((contracted, adapter.axes.contracting), (batch, batch)),
        precision=layer.precision,
        out_sharding=None,
    )
    return (y.astype(jnp.float32) + adapter.scale * change).astype(y.dtype)
