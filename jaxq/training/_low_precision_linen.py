"""Low-precision training of linen modules.

`low_precision` wraps a module. While the wrapped module runs, the chosen layers run
Flax's own code with a product of low precision. Random numbers come from the stream
"low_precision" of `rngs=`. Histories of largest magnitudes are in the collection
"quant_stats".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import FrozenDict, freeze, unfreeze

from jaxq.nn.layers import QUANT_STATS, Quantized, find_call, find_linen_layers
from jaxq.nn.transform import check_module
from jaxq.training._delayed_scaling import AmaxHistory
from jaxq.training._low_precision_conv import convolve_arrays
from jaxq.training._low_precision_dot import multiply_arrays
from jaxq.training._low_precision_layers import kept_layers, refuse_layers
from jaxq.training._low_precision_product import Bounds
from jaxq.training._precision_recipe import LowPrecision, as_low_precision

CALLER = "training.linen.low_precision"
STREAM = "low_precision"
# Kinds of layers whose code reads its product from a field.
_KINDS = ("Dense", "DenseGeneral", "Conv")


def dot_general_cls(recipe: str | LowPrecision) -> Callable[[], linen.Module]:
    """A `dot_general_cls` of Flax linen layers, for every recipe.

    The layer gets a submodule. It draws random numbers from the stream "low_precision"
    of `rngs=`. Its history is in the collection "quant_stats", which changes if
    `mutable=["quant_stats"]` is passed to `apply`.

    Args:
      recipe: a name of `jaxq.training.low_precision_recipes()`, or a `LowPrecision`.

    Raises:
      TypeError: `recipe` is neither a name nor a `LowPrecision`.
      ValueError: no recipe has this name.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> cls = jaxq.training.linen.dot_general_cls("fp8_delayed")
      >>> layer, x = linen.Dense(8, dot_general_cls=cls), jnp.ones((2, 64))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, changed = layer.apply(variables, x, mutable=["quant_stats"])
      >>> y.shape, list(changed)
      ((2, 8), ['quant_stats'])
    """
    recipe = as_low_precision(recipe, "training.linen.dot_general_cls")
    return functools.partial(LowPrecisionDotGeneral, recipe)


class LowPrecisionDotGeneral(linen.Module):
    """The submodule of a layer with `dot_general_cls`."""

    recipe: LowPrecision

    @linen.compact
    def __call__(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """The product. The arguments are those of `lax.dot_general`."""
        if self.recipe.delayed is not None:
            for name, value in _start(self.recipe, ()).items():
                self.variable(QUANT_STATS, name, lambda value=value: value)
        return _run(multiply_arrays, self, self.recipe, lhs, rhs, *args, **kwargs)


class LowPrecisionModule(Quantized):
    """The module that `low_precision` returns. It is used like the module it wraps.

    Its attributes and methods are those of `jaxq.nn.linen.Quantized`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> module, variables = jaxq.training.linen.low_precision(
      ...   module, variables, "fp8")
      >>> isinstance(module, jaxq.training.linen.LowPrecisionModule)
      True
    """

    _jaxq_recipe: LowPrecision | None = None
    _jaxq_layers: frozenset[tuple[str, ...]] = frozenset()

    @linen.nowrap
    def _jaxq_interceptor(self) -> Callable[..., Any]:
        assert self._jaxq_recipe is not None
        depth = 0 if self.scope is None else len(self.path)
        return functools.partial(
            _use_recipe, self._jaxq_recipe, self._jaxq_layers, depth
        )


def low_precision(
    module: linen.Module,
    variables: Mapping[str, Any],
    recipe: str | LowPrecision,
    *,
    example: Any = None,
    keep: Sequence[str] = (),
    keep_defaults: bool = True,
) -> tuple[LowPrecisionModule, Any]:
    """Returns a linen module whose products are quantized, forward and backward.

    The layers Dense, DenseGeneral and Conv are changed, also inside attention layers
    and lifted transforms such as `nn.scan`. Parameters stay floats.

    Args:
      module: a linen module.
      variables: its variables, a dict or a FrozenDict.
      recipe: a name of `jaxq.training.low_precision_recipes()`, or a `LowPrecision`.
      example: as in `jaxq.nn.linen.quantize_model`.
      keep: as in `jaxq.training.low_precision`.
      keep_defaults: as in `jaxq.training.low_precision`.

    Returns:
      (a module, variables). The module is used like the float module. If the recipe
      rounds stochastically, gradients need `rngs={"low_precision": key}` in `apply`,
      with a new key in each step. With delayed scaling, the variables have a
      collection "quant_stats". It is used like "batch_stats". In an `nn.scan` over
      layers, pass `split_rngs={"low_precision": True}` and
      `variable_axes={"params": 0, "quant_stats": 0}`.

    Raises:
      TypeError: `module` is not a linen module, or is quantized already; `variables`
        has no "params"; `recipe` is neither a name nor a `LowPrecision`.
      ValueError: as in `jaxq.training.low_precision`; or the module cannot be called
        with the example.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> module, variables = jaxq.training.linen.low_precision(
      ...   module, variables, "int8")
      >>> def loss(params, key):
      ...   rngs = {"low_precision": key}
      ...   return jnp.mean((module.apply({"params": params}, x, rngs=rngs) - 1) ** 2)
      >>> grads = jax.grad(loss)(variables["params"], jax.random.key(1))
    """
    recipe = as_low_precision(recipe, CALLER)
    check_module(module, variables, CALLER)
    structure = find_linen_layers(module, variables, example, None, caller=CALLER)
    layers = list(structure.layers.values())
    paths = [(layer.path, layer.kind.name) for layer in layers]
    kept = kept_layers(paths, keep, keep_defaults, CALLER)
    changed = [layer for layer in layers if layer.path not in kept]
    refuse_layers([(layer.path, _problem(layer)) for layer in changed], CALLER)
    scopes = frozenset(layer.scope for layer in changed)
    # `Quantized` checks no weight, because all weights are floats.
    wrapped = LowPrecisionModule(module, (), recipe, scopes)
    if recipe.delayed is None:
        return wrapped, variables
    is_frozen = isinstance(variables, FrozenDict)
    tree: Any = unfreeze(variables) if is_frozen else variables
    stats: dict[str, Any] = dict(tree.get(QUANT_STATS, {}))
    for layer in changed:
        value: Any = tree["params"]
        for name in layer.key:
            value = value[name]
        shape = linen.meta.unbox(value).shape
        stack = shape[: len(shape) - len(layer.roles.shape)]
        _put(stats, layer.scope, _start(recipe, stack))
    tree = {**tree, QUANT_STATS: stats}
    return wrapped, freeze(tree) if is_frozen else tree


def _problem(layer: Any) -> str | None:
    """Why the product of a layer cannot be changed; None if it can."""
    if layer.problem is None and layer.kind.name not in _KINDS:
        return f"jaxq has no low-precision product for linen's {layer.kind.name}"
    return layer.problem


def _put(tree: dict[str, Any], scope: tuple[str, ...], values: dict[str, Any]) -> None:
    """Adds values to the dict at a scope."""
    for name in scope:
        tree[name] = dict(tree.get(name, {}))
        tree = tree[name]
    tree.update(values)


def _use_recipe(
    recipe: LowPrecision,
    layers: frozenset[tuple[str, ...]],
    depth: int,
    call: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    context: Any,
) -> Any:
    """An interceptor that runs the chosen layers in low precision.

    Args:
      recipe: how operands are quantized.
      layers: the scopes of the layers.
      depth: the number of names that lead to the wrapped module.
      call: Flax's method.
      args: its positional arguments.
      kwargs: its named arguments.
      context: the intercepted call.
    """
    layer = context.module
    if find_call(context) is None or tuple(layer.path[depth:]) not in layers:
        return call(*args, **kwargs)
    return context.orig_method.func(_Layer(layer, recipe), *args, **kwargs)


class _Layer:
    """Takes the place of a linen layer, with products of low precision.

    Args:
      layer: the layer. All other attributes are read from the layer.
      recipe: how operands are quantized.
    """

    dot_general_cls = None
    conv_general_dilated_cls = None

    def __init__(self, layer: linen.Module, recipe: LowPrecision):
        self._layer, self._recipe = layer, recipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def dot_general(self, *args: Any, **kwargs: Any) -> jax.Array:
        return _run(multiply_arrays, self._layer, self._recipe, *args, **kwargs)

    def conv_general_dilated(self, *args: Any, **kwargs: Any) -> jax.Array:
        return _run(convolve_arrays, self._layer, self._recipe, *args, **kwargs)


def _run(
    product: Callable[..., jax.Array],
    layer: linen.Module,
    recipe: LowPrecision,
    x: Any,
    w: Any,
    *args: Any,
    **kwargs: Any,
) -> jax.Array:
    """A product of a layer, with the layer's random numbers and history."""
    key = None
    # Without the stream, the forward pass of a stochastic recipe still runs.
    if recipe.uses_random_numbers and layer.has_rng(STREAM):
        key = layer.make_rng(STREAM)
    bounds = None
    if recipe.delayed is not None:
        bounds = Bounds(_bound(layer, recipe, "x", x), _bound(layer, recipe, "w", w))
    return product(recipe, x, w, *args, key=key, bounds=bounds, **kwargs)


def _start(recipe: LowPrecision, stack: tuple[int, ...]) -> dict[str, jax.Array]:
    """The variables of a layer's history before the first step, by name."""
    assert recipe.delayed is not None
    values = {}
    for operand in ("x", "w"):
        for field, value in recipe.delayed.init(stack)._asdict().items():
            values[f"{operand}_{field}"] = value
    return values


def _bound(layer: linen.Module, recipe: LowPrecision, name: str, x: Any) -> jax.Array:
    """The bound of an operand in this call. The history is updated.

    Raises:
      ValueError: the layer cannot see its history.
    """
    scaling = recipe.delayed
    assert scaling is not None
    names = [f"{name}_{field}" for field in AmaxHistory._fields]
    if not layer.has_variable(QUANT_STATS, names[0]):
        path = "/".join((*layer.path, names[0]))
        raise ValueError(
            f"The collection {QUANT_STATS!r} has no {path!r}. Pass the variables that "
            "jaxq.training.linen.low_precision returned. If the layer is inside "
            f"nn.scan or nn.vmap, pass variable_axes={{'params': 0, {QUANT_STATS!r}: "
            "0} to this transform."
        )
    state = AmaxHistory(*(layer.get_variable(QUANT_STATS, field) for field in names))
    amax = scaling.largest_magnitude(jax.lax.stop_gradient(jnp.asarray(x)))
    is_init = layer.is_initializing()
    if layer.is_mutable_collection(QUANT_STATS) and not is_init:
        for field, value in zip(names, scaling.update(state, amax), strict=True):
            layer.put_variable(QUANT_STATS, field, value)
    return scaling.bound(state, amax)
