"""`stochastic_rounding`: keeps small updates of bfloat16 parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxq import formats

_CALLER = "stochastic_rounding"


class StochasticRoundingState(NamedTuple):
    """The state of `stochastic_rounding`.

    Attributes:
      step: the number of updates so far, int32. The random numbers depend on it.
      inner_state: the state of the wrapped transformation.

    Example:
      >>> import jax.numpy as jnp, jaxq, optax
      >>> tx = jaxq.optim.stochastic_rounding(optax.sgd(0.1))
      >>> int(tx.init({"w": jnp.ones(3, jnp.bfloat16)}).step)
      0
    """

    step: jax.Array
    inner_state: Any


def stochastic_rounding(
    tx: optax.GradientTransformation, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optax transformation so that bfloat16 parameters round stochastically.

    bfloat16 has 8 significant bits. If the sum of a parameter and its update is rounded
    to nearest, an update that is smaller than 1/512 of the parameter is lost.
    Stochastic rounding keeps it on average.

    `tx` gets float32 copies of bfloat16 parameters and of their gradients, so its state
    is float32. The updates are float32 too. `optax.apply_updates` adds them exactly,
    and returns bfloat16 parameters. Parameters of other dtypes are not changed.

    Args:
      tx: the transformation, for example `adamw8bit(1e-3)`. It must contain all other
        transformations: an update that is changed later is rounded to nearest.
      seed: the seed of the random numbers.

    Returns:
      A transformation with extra arguments. Its `update` needs `params`.

    Raises:
      TypeError: `tx` is not an optax transformation.
      ValueError: (from `update`) `params` is None.

    Example:
      >>> import jax.numpy as jnp, jaxq, optax
      >>> tx = jaxq.optim.stochastic_rounding(optax.sgd(1e-4))
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.ones_like(params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> params.dtype.name, round(float(params.astype(jnp.float32).mean()), 4)
      ('bfloat16', 0.9999)

    References:
      Gupta et al., "Deep Learning with Limited Numerical Precision", 2015; Zamirai et
      al., "Revisiting BFloat16 Training", 2020.
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"{_CALLER}: tx must be an optax transformation, got {type(tx).__name__}. "
            "Pass for example optax.adamw(1e-3)."
        )
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> StochasticRoundingState:
        inner_state = inner.init(jax.tree.map(_to_float32, params))
        return StochasticRoundingState(jnp.zeros((), jnp.int32), inner_state)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StochasticRoundingState]:
        if params is None:
            raise ValueError(
                f"{_CALLER}: update needs the parameters, because it rounds the sums "
                "of parameters and updates. Call update(grads, state, params)."
            )
        wide_params = jax.tree.map(_to_float32, params)
        wide_updates = jax.tree.map(_to_float32, updates)
        wide_updates, inner_state = inner.update(
            wide_updates, state.inner_state, wide_params, **extra_args
        )
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        leaves, treedef = jax.tree.flatten(wide_updates)
        rounded = [
            _rounded(update, param, jax.random.fold_in(key, i))
            for i, (update, param) in enumerate(
                zip(leaves, treedef.flatten_up_to(params), strict=True)
            )
        ]
        step = jnp.asarray(optax.safe_increment(state.step))
        return treedef.unflatten(rounded), StochasticRoundingState(step, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _to_float32(leaf: Any) -> Any:
    """A bfloat16 array as float32, any other leaf as it is."""
    return leaf.astype(jnp.float32) if _is_bfloat16(leaf) else leaf


def _rounded(update: jax.Array, param: Any, key: jax.Array) -> jax.Array:
    """The float32 update after which a bfloat16 `param` is a bfloat16 number again."""
    if not _is_bfloat16(param):
        return update
    start = param.astype(jnp.float32)
    bfloat16 = formats.get("bfloat16")
    end = bfloat16.round(start + update, rounding="stochastic", saturate=False, key=key)
    return end - start


def _is_bfloat16(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) == jnp.bfloat16
