"""low_precision: the products of a whole nnx model by a recipe of low precision.

Each layer calls its product through an attribute, for example `dot_general`. The
attribute becomes a `LowPrecisionProduct`, a module that holds the layer's random
stream and its history of largest magnitudes. Weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.nn.layers import QuantStats, weight_axes
from jaxq.nn.transform import find_layers
from jaxq.qtensor import QUANTIZED
from jaxq.recipes import compile_pattern, default_rules
from jaxq.training._delayed_scaling import AmaxHistory
from jaxq.training._low_precision_attention import attend
from jaxq.training._low_precision_conv import convolve_arrays
from jaxq.training._low_precision_dot import einsum_arrays, multiply_arrays
from jaxq.training._low_precision_product import Bounds
from jaxq.training._precision_recipe import LowPrecision, as_low_precision
from jaxq.training._state_changes import explained_state_change

CALLER = "training.low_precision"
# What a layer changes in train mode, as errors name it.
_STATE = "random stream or its history"
# Hook attribute of a layer -> (its product by a recipe, position of the input among the
# arguments). The weight follows the input.
_PRODUCTS = {
    "dot_general": (multiply_arrays, 0),
    "einsum_op": (einsum_arrays, 1),
    "conv_general_dilated": (convolve_arrays, 0),
    "attention_fn": (attend, 0),
}


def low_precision(
    model: nnx.Module,
    recipe: str | LowPrecision,
    *,
    keep: Sequence[str] = (),
    keep_defaults: bool = True,
    attention: bool = False,
    key: jax.Array | None = None,
) -> nnx.Module:
    """Returns a copy of a model whose products are quantized, forward and backward.

    The layers Linear, LinearGeneral, Einsum and Conv are changed, also inside attention
    layers and in stacks for `nnx.scan`. Weights stay float `nnx.Param`s, so
    optimizers and checkpoints treat them as before.

    Two kinds of Variables are added. Neither is an `nnx.Param`.

    - Recipes that round stochastically have an `nnx.RngStream` in each layer. Each call
      draws a new key. Train the model with `nnx.jit`, `nnx.grad`, `nnx.scan` and
      `nnx.remat`, or return the changed state from your own function.
    - Recipes with delayed scaling have `jaxq.nn.QuantStats` in each layer.

    `model.eval()` stops both: a call then changes no Variable.

    Args:
      model: a flax nnx module. It does not change.
      recipe: a name of `low_precision_recipes()`, or a `LowPrecision`.
      keep: patterns of paths of layers that stay in floats, as in `jaxq.Rule`, for
        example "layers/0/**".
      keep_defaults: True also keeps routers and output heads in floats, as
        `jaxq.quantize_model` does.
      attention: True also quantizes the two products of each
        `nnx.MultiHeadAttention`: queries times keys, and weights times values. The
        recipe must not have delayed scaling.
      key: PRNG key of the random streams. None uses `jax.random.key(0)`.

    Returns:
      A model of the same class.

    Raises:
      TypeError: `model` is not an nnx module; `recipe` is neither a name nor a
        `LowPrecision`.
      ValueError: no recipe has this name; a pattern matches no layer; no layer is left;
        `attention` is True, but the recipe has delayed scaling or the model has no
        `nnx.MultiHeadAttention`; or a layer cannot be changed, for example because its
        weight is quantized or it has a product of its own. The error names all such
        layers.

    Example:
      >>> import jax.numpy as jnp, jaxq, optax
      >>> from flax import nnx
      >>> model, x = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
      >>> model = jaxq.training.low_precision(model, "int8")
      >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
      >>> grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
      >>> _ = optimizer.update(model, grads)

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
      NVIDIA, "Pretraining Large Language Models with NVFP4", 2025.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"{CALLER}: model must be a flax nnx module, got {type(model).__name__}. "
            "For a linen module use jaxq.training.linen.low_precision."
        )
    recipe = as_low_precision(recipe, CALLER)
    model = nnx.clone(model)
    layers = list(find_layers(model))
    paths = [(layer.path, layer.kind.name) for layer in layers]
    attentions = _attentions(model, recipe) if attention else {}
    paths += [(path, "MultiHeadAttention") for path in attentions]
    kept = kept_layers(paths, keep, keep_defaults, CALLER)
    changed = [layer for layer in layers if layer.path not in kept]
    refuse_layers([(layer.path, _problem(*layer[1:])) for layer in changed], CALLER)
    key = jax.random.key(0) if key is None else key
    for index, (_, layer, kind) in enumerate(changed):
        assert kind.hook is not None  # `_problem` checks it
        shape = getattr(layer, kind.weight).get_value().shape
        stack = shape[: len(shape) - len(kind.roles(layer).shape)]
        product = LowPrecisionProduct(
            recipe, kind.hook, jax.random.fold_in(key, index), stack
        )
        # Flax takes a function as static. The module has Variables.
        setattr(layer, kind.hook, nnx.data(product))
    for index, (path, module) in enumerate(attentions.items(), start=len(changed)):
        if path not in kept:
            stack = module.query.kernel.get_value().shape[:-3]
            own_key = jax.random.fold_in(key, index)
            product = LowPrecisionProduct(recipe, "attention_fn", own_key, stack)
            module.attention_fn = nnx.data(product)
    return model


def _attentions(model: nnx.Module, recipe: LowPrecision) -> dict[str, Any]:
    """The attention layers of a model, by path.

    Raises:
      ValueError: there is none; one has an attention function of its own; or the recipe
        has delayed scaling.
    """
    if recipe.delayed is not None:
        raise ValueError(
            f"{CALLER}: attention=True is for recipes without delayed scaling. Use "
            "'fp8', or attention=False."
        )
    attentions = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.MultiHeadAttention)
    }
    if not attentions:
        raise ValueError(
            f"{CALLER}: attention=True, but the model has no nnx.MultiHeadAttention."
        )
    foreign = {
        path: f"its attention_fn is a custom function, {module.attention_fn!r}"
        for path, module in attentions.items()
        if module.attention_fn is not nnx.dot_product_attention
    }
    refuse_layers(foreign.items(), CALLER)
    return attentions


def kept_layers(
    layers: Iterable[tuple[str, str]],
    keep: Sequence[str],
    keep_defaults: bool,
    caller: str,
) -> set[str]:
    """The paths of the layers that stay in floats.

    Args:
      layers: the path and the kind of each layer.
      keep: as in `low_precision`.
      keep_defaults: as in `low_precision`.
      caller: the name of the public function. Errors begin with this name.

    Raises:
      ValueError: a pattern matches no layer, or no layer is left.
    """
    layers = list(layers)
    kept = {path for path, kind in layers if kind == "Embed"}
    if keep_defaults:
        rules = default_rules()
        kept |= {
            path
            for path, kind in layers
            if any(rule.matches(path, kind) for rule in rules)
        }
    for pattern in (keep,) if isinstance(keep, str) else keep:
        matching = {p for p, _ in layers if compile_pattern(pattern).matches(p)}
        if not matching:
            raise ValueError(
                f"{caller}: keep={pattern!r} matches no layer. The layers are: "
                f"{', '.join(path for path, _ in layers)}."
            )
        kept |= matching
    if all(path in kept for path, _ in layers):
        raise ValueError(
            f"{caller}: no layer is left to change: the model has {len(layers)} "
            f"layers, and {len(kept)} are kept in floats. Use fewer patterns in keep=, "
            "or keep_defaults=False."
        )
    return kept


def refuse_layers(problems: Iterable[tuple[str, str | None]], caller: str) -> None:
    """Raises a ValueError that names all layers with a problem.

    Args:
      problems: the path and the problem of each layer, None for no problem.
      caller: the name of the public function. The error begins with this name.
    """
    lines = [f"  {path}: {problem}" for path, problem in problems if problem]
    if lines:
        raise ValueError(
            f"{caller}: some layers cannot be changed.\n" + "\n".join(lines) + "\n"
            "Name them in keep= to leave them in floats."
        )


def _problem(layer: Any, kind: Any) -> str | None:
    """Why the product of a layer cannot be changed; None if it can."""
    if isinstance(getattr(layer, kind.weight).get_value(), QUANTIZED):
        return "its weight is quantized; pass the float model"
    if kind.hook not in _PRODUCTS:
        return f"jaxq has no low-precision product for {kind.name}"
    if isinstance(getattr(layer, kind.hook), LowPrecisionProduct):
        return "it is in low precision already; pass the float model"
    try:
        weight_axes(layer, kind)
    except ValueError as error:
        return str(error)
    return kind.problem(layer)


class LowPrecisionProduct(nnx.Module):
    """The product of one layer, with its random stream and its history.

    Args:
      recipe: how operands are quantized.
      hook: the attribute of the layer that holds this module.
      key: PRNG key of the layer.
      stack: the shape of a stack of layers.

    Attributes:
      stream: the random stream, None if the recipe needs no random numbers.
      x_largest: the largest magnitudes of the input, None without delayed scaling. The
        attributes `x_bound`, `w_largest` and `w_bound` are like it, see `AmaxHistory`.
      use_running_average: True if a call changes no Variable. `model.eval()` and
        `model.train()` set it.
    """

    stream: nnx.RngStream | None
    x_largest: QuantStats | None
    x_bound: QuantStats | None
    w_largest: QuantStats | None
    w_bound: QuantStats | None

    def __init__(
        self, recipe: LowPrecision, hook: str, key: jax.Array, stack: tuple[int, ...]
    ):
        self.recipe = recipe
        self.hook = hook
        self.use_running_average = False
        layer_key = jax.random.split(key, stack) if stack else key
        self.stream = (
            nnx.RngStream(layer_key, tag="low_precision")
            if recipe.uses_random_numbers
            else None
        )
        for name in ("x", "w"):
            history = recipe.delayed and recipe.delayed.init(stack)
            for field in AmaxHistory._fields:
                value = history and QuantStats(getattr(history, field))
                setattr(self, f"{name}_{field}", value)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The product. The arguments are those of the hook."""
        product, position = _PRODUCTS[self.hook]
        bounds = None
        if self.recipe.delayed is not None:
            x, w = args[position : position + 2]
            bounds = Bounds(self._bound("x", x), self._bound("w", w))
        return product(self.recipe, *args, key=self._key(), bounds=bounds, **kwargs)

    def _key(self) -> jax.Array | None:
        """The key of this call."""
        if self.stream is None:
            return None
        if self.use_running_average:
            return jax.random.fold_in(self.stream.key[...], self.stream.count[...])
        with explained_state_change(CALLER, "a layer", _STATE):
            return self.stream()

    def _bound(self, name: str, x: Any) -> jax.Array:
        """The bound of an operand in this call. The history is updated."""
        scaling = self.recipe.delayed
        assert scaling is not None
        largest = getattr(self, f"{name}_largest")
        bound = getattr(self, f"{name}_bound")
        state = AmaxHistory(largest.get_value(), bound.get_value())
        amax = scaling.largest_magnitude(jax.lax.stop_gradient(jnp.asarray(x)))
        if not self.use_running_average:
            updated = scaling.update(state, amax)
            with explained_state_change(CALLER, "a layer", _STATE):
                largest.set_value(updated.largest)
                bound.set_value(updated.bound)
        return scaling.bound(state, amax)
