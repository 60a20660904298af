"""add_lora: a model with adapters on the products of some layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxq.nn.layers import QuantizedParam, weight_axes
from jaxq.nn.transform import find_layers, normalized_layers
from jaxq.qtensor import QTensor, TrainedWeight
from jaxq.recipes import compile_pattern, default_rules
from jaxq.sharding import (
    WEIGHT_SHARDING,
    WEIGHT_SHARDING_RULES,
    named_sharding,
    present_spec,
)
from jaxq.training._low_precision_layers import LowPrecisionProduct
from jaxq.training.lora._adapter import AdapterAxes
from jaxq.training.lora._product import HOOKS, LoRAProduct, lora_scale
from jaxq.training.lora._start import ErrorStart, float_weight, start_of

CALLER = "training.add_lora"


class Options(NamedTuple):
    """The options of adapters, as in `add_lora`."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    dtype: Any


def add_lora(
    model: nnx.Module,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: str | Sequence[str] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    initial: str | ErrorStart = "zero",
    param_dtype: Any = jnp.float32,
    key: jax.Array | None = None,
) -> nnx.Module:
    """Returns a copy of a model with low-rank adapters (LoRA) on some layers.

    A layer with the weight W then computes with `W + scale * A B`. W is frozen: floats
    or codes stay as they are. The matrices A and B are `nnx.LoRAParam`s. Train only
    these:

        optimizer = nnx.Optimizer(lora, tx, wrt=nnx.LoRAParam)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(lora)

    The layers Linear, LinearGeneral and Einsum can have adapters, also inside attention
    layers and in stacks for `nnx.scan`. Each layer of a stack has an adapter of its
    own. A layer that is used in several places has one adapter. The backward pass makes
    no float copy of a quantized weight that lasts longer than its product.

    Args:
      model: a flax nnx module, float or quantized. It does not change.
      rank: the number of columns of A and of rows of B.
      alpha: the scale is `alpha / rank`.
      targets: patterns of the paths of layers, as in `jaxq.Rule`, for example
        "**/self_attn/*". None chooses all layers that can have adapters, except routers
        and output heads.
      dropout: the share of the adapters' inputs that train mode sets to 0, from 0 to
        below 1. Each layer then has a random stream. `model.eval()` stops dropout.
      rslora: True uses the scale `alpha / sqrt(rank)` (rsLoRA).
      dora: True also trains the norm of each output (DoRA). This is not possible for
        Einsum layers.
      initial: how adapters start. "zero" starts with B = 0, so that the model computes
        the same as before. `jaxq.training.loftq(float_model)` and
        `jaxq.training.lqer(float_model)` start from the quantization error.
      param_dtype: dtype of the adapters.
      key: PRNG key of A and of dropout. None uses `jax.random.key(0)`.

    Returns:
      A model of the same class. The adapter of a layer is in the attribute that holds
      its product, for example `lora.layers[0].mlp.up_proj.dot_general.lora_a`. A weight
      `[in, out]` has the matrices `lora_a` `[in, rank]` and `lora_b` `[rank, out]`, of
      the dtype `param_dtype`.

    Raises:
      TypeError: `model` is not an nnx module, or `initial` is unknown.
      ValueError: a number is out of range; a pattern matches no layer; or a layer that
        a pattern matches cannot have an adapter. The error names all such layers.

    Example:
      >>> import jax.numpy as jnp, jaxq, optax
      >>> from flax import nnx
      >>> model, x = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
      >>> qmodel, _ = jaxq.quantize_model(model, "nf4_dq")
      >>> lora = jaxq.training.add_lora(qmodel, rank=4)
      >>> bool((lora(x) == qmodel(x)).all())
      True
      >>> optimizer = nnx.Optimizer(lora, optax.adam(1e-3), wrt=nnx.LoRAParam)
      >>> loss = lambda lora: jnp.mean((lora(x) - 1) ** 2)
      >>> grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(lora)
      >>> changes = optimizer.update(lora, grads)

    References:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022.
      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
      Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
      2023.
      Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"{CALLER}: model must be a flax nnx module, got {type(model).__name__}. "
            "For a linen module use jaxq.training.linen.add_lora."
        )
    check_numbers(rank, alpha, dropout, CALLER)
    start = start_of(initial, CALLER)
    model = nnx.clone(model)
    layers = target_layers(model, targets, CALLER, dora=dora)
    if start is not None:
        start.check([layer.path for layer in layers], CALLER)
        _refuse_shared(model, layers, start)
    options = Options(rank, alpha, dropout, rslora, dora, jnp.dtype(param_dtype))
    key = jax.random.key(0) if key is None else key
    for index, layer in enumerate(layers):
        put_adapter(layer, options, start, jax.random.fold_in(key, index))
    return model


def _refuse_shared(model: nnx.Module, layers: Sequence[Any], start: ErrorStart) -> None:
    """Raises a ValueError if a start would quantize a shared weight again."""
    if start.steps == 1:
        return
    users = Counter(
        id(getattr(layer, kind.weight)) for _, layer, kind in find_layers(model)
    )
    problems = [
        f"  {path}: other layers share its weight, and {start.name} with steps above 1 "
        "quantizes it again; use steps=1"
        for path, layer, kind in layers
        if users[id(getattr(layer, kind.weight))] > 1
    ]
    refuse(problems, CALLER)


def check_numbers(rank: int, alpha: float, dropout: float, caller: str) -> None:
    """Raises a ValueError if a number of an adapter is out of range."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{caller}: rank must be an integer above 0, got {rank!r}.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{caller}: alpha must be finite and above 0, got {alpha!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"{caller}: dropout must be in [0, 1), got {dropout!r}.")


def chosen_paths(
    layers: Sequence[tuple[str, str]],
    targets: str | Sequence[str] | None,
    caller: str,
) -> set[str]:
    """The paths of the layers that get adapters.

    Args:
      layers: path and kind of each layer of the model.
      targets: as in `add_lora`.
      caller: the name of the public function. Errors begin with this name.

    Raises:
      ValueError: a pattern matches no layer, or no layer is left.
    """
    layers = [layer for layer in layers if layer[1] != "Embed"]
    names = ", ".join(path for path, _ in layers)
    if targets is None:
        rules = default_rules()
        chosen = {
            path
            for path, kind in layers
            if not any(rule.matches(path, kind) for rule in rules)
        }
        if not chosen:
            raise ValueError(
                f"{caller}: no layer of the model gets an adapter. Name layers in "
                f"targets=. The layers are: {names or 'none'}."
            )
        return chosen
    chosen = set()
    for pattern in (targets,) if isinstance(targets, str) else targets:
        compiled = compile_pattern(pattern)
        matching = {path for path, _ in layers if compiled.matches(path)}
        if not matching:
            raise ValueError(
                f"{caller}: targets={pattern!r} matches no layer that can have an "
                f"adapter. The layers are: {names or 'none'}."
            )
        chosen |= matching
    if not chosen:
        raise ValueError(f"{caller}: targets={targets!r} is empty. Name some layers.")
    return chosen


def target_layers(
    model: nnx.Module,
    targets: str | Sequence[str] | None,
    caller: str,
    *,
    dora: bool,
) -> list[Any]:
    """The layers that get adapters: path, module and kind of each.

    Args:
      model: a flax nnx module.
      targets: as in `add_lora`.
      caller: the name of the public function. Errors begin with this name.
      dora: whether the adapters have magnitudes.

    Raises:
      ValueError: a pattern matches no layer, or a layer cannot have an adapter.
    """
    layers = list(find_layers(model))
    if targets is None:
        # If no layer can have an adapter, all stay, and the error below says why.
        layers = [layer for layer in layers if layer.kind.hook in HOOKS] or layers
    paths = [(layer.path, layer.kind.name) for layer in layers]
    chosen = chosen_paths(paths, targets, caller)
    normalized = normalized_layers(model)
    problems = []
    for path, layer, kind in layers:
        if path not in chosen:
            continue
        problem = normalized.get(id(layer)) or _problem(layer, kind, dora=dora)
        if problem:
            problems.append(f"  {path or 'the model itself'}: {problem}")
    refuse(problems, caller)
    return [layer for layer in layers if layer.path in chosen]


def refuse(problems: Sequence[str], caller: str) -> None:
    """Raises a ValueError that lists the problems of layers, if there are any."""
    if problems:
        raise ValueError(
            f"{caller}: some layers cannot have an adapter.\n"
            + "\n".join(problems)
            + "\nName the other layers in targets=."
        )


def _problem(layer: Any, kind: Any, *, dora: bool) -> str | None:
    """Why a layer cannot have an adapter; None if it can."""
    if kind.hook not in HOOKS:
        return f"jaxq has no adapter for {kind.name}"
    hook = getattr(layer, kind.hook)
    if isinstance(hook, LoRAProduct):
        return "it has an adapter already; call jaxq.training.merge_lora first"
    if getattr(layer, "dot_general_cls", None) is not None:
        return "its dot_general_cls makes the product, so dot_general is not used"
    if dora and kind.hook != "dot_general":
        return f"jaxq has no DoRA for {kind.name}; use dora=False"
    weight = getattr(layer, kind.weight).get_value()
    if isinstance(weight, TrainedWeight):
        return "it is in quantization-aware training; use the float model"
    try:
        weight_axes(layer, kind)
    except ValueError as error:
        return str(error)
    if isinstance(weight, QTensor) or isinstance(hook, LowPrecisionProduct):
        return None
    return kind.problem(layer)


def put_adapter(
    target: Any, options: Options, start: ErrorStart | None, key: jax.Array
) -> None:
    """Puts a new adapter on one layer, in place.

    Args:
      target: the path, the module and the kind of the layer.
      options: of the adapter.
      start: as `initial` of `add_lora`. None stands for "zero".
      key: PRNG key of A and of dropout.
    """
    path, layer, kind = target
    axes = AdapterAxes.of(kind.roles(layer))
    variable = getattr(layer, kind.weight)
    weight = variable.get_value()
    rank = options.rank
    a_key, dropout_key = jax.random.split(key)
    if start is None:
        a, b = axes.new_matrices(weight, rank, a_key)
    else:
        weight, a, b = start.matrices(path, weight, axes, rank)
        variable.set_value(weight)
        b = b / lora_scale(options.alpha, rank, rslora=options.rslora)
    dtype = options.dtype
    put_matrices(target, a.astype(dtype), b.astype(dtype), options, dropout_key)


def put_matrices(
    target: Any, a: jax.Array, b: jax.Array, options: Options, key: jax.Array
) -> LoRAProduct:
    """Puts an adapter with given matrices on one layer, in place.

    Args:
      target: the path, the module and the kind of the layer.
      a: `[*stack, *batch, K, r]`.
      b: `[*stack, *batch, r, N]`.
      options: of the adapter.
      key: PRNG key of dropout.
    """
    _, layer, kind = target
    axes = AdapterAxes.of(kind.roles(layer))
    variable = getattr(layer, kind.weight)
    weight = variable.get_value()
    ndim = len(weight.shape)
    stack = axes.stack_of(weight)
    entries = axes.entries(_weight_entries(variable), ndim)
    a_place, b_place = axes.entries(present_spec(weight), ndim)
    keys = None
    if options.dropout:
        keys = jax.random.split(key, stack) if stack else key
    product = LoRAProduct(
        kind.hook,
        getattr(layer, kind.hook),
        axes,
        _placed(axes.a_from_matrix(a), weight, a_place),
        _placed(axes.b_from_matrix(b), weight, b_place),
        alpha=options.alpha,
        rslora=options.rslora,
        dropout=options.dropout,
        key=keys,
        metadata=(_metadata(variable, entries[0]), _metadata(variable, entries[1])),
    )
    if options.dora:
        rank_axis = len(stack) + axes.num_batch
        # The magnitudes have the axes of B without that of the rank.
        kept_entries = (*entries[1][:rank_axis], *entries[1][rank_axis + 1 :])
        product.start_dora(float_weight(weight), _metadata(variable, kept_entries))
    # Flax treats the attribute as static, because it held a function. A module with
    # Variables must be data.
    setattr(layer, kind.hook, nnx.data(product))
    return product


def _weight_entries(variable: nnx.Variable) -> tuple:
    """The axis names in the metadata of a weight; empty if it has none."""
    metadata = variable.get_metadata()
    name = WEIGHT_SHARDING if isinstance(variable, QuantizedParam) else "out_sharding"
    axes = metadata.get(name)
    if isinstance(axes, NamedSharding):
        axes = axes.spec
    return tuple(axes) if axes else ()


def _metadata(variable: nnx.Variable, entries: tuple) -> Mapping[str, Any]:
    """The metadata of an adapter's Variable, from those of the weight.

    `_placed` has put the value on the mesh of the weight. With `eager_sharding`, Flax
    would move it again, and would need a mesh context for that.

    Args:
      variable: of the weight.
      entries: the mesh axes of each axis of the adapter's matrix.
    """
    if not _weight_entries(variable):
        return {}
    metadata = variable.get_metadata()
    is_quantized = isinstance(variable, QuantizedParam)
    axes_key = WEIGHT_SHARDING if is_quantized else "out_sharding"
    rules_key = WEIGHT_SHARDING_RULES if is_quantized else "sharding_rules"
    axes, rules = metadata.get(axes_key), metadata.get(rules_key)
    adapter_axes: Any = entries
    if isinstance(axes, NamedSharding):
        adapter_axes = NamedSharding(axes.mesh, PartitionSpec(*entries))
    result = {"out_sharding": adapter_axes, "eager_sharding": False}
    if rules:
        result["sharding_rules"] = rules
    return result


def _placed(value: jax.Array, weight: Any, entries: tuple) -> jax.Array:
    """An adapter's matrix on the mesh of its weight, if the weight is on a mesh."""
    leaf = weight.data if isinstance(weight, QTensor) else weight
    sharding = named_sharding(leaf)
    if sharding is None:
        return value
    return jax.device_put(value, NamedSharding(sharding.mesh, PartitionSpec(*entries)))
