"""Shorthands: optax optimizers with quantized states.

Their arguments are those of the optax functions. For other formats, block sizes or a
choice of leaves call `quantize_state`.
"""

from __future__ import annotations

from typing import Any

import optax
from optax import contrib

from jaxq.optim._quantize_state import quantize_state


def adam8bit(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adam` whose two moments take 8 bits each.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      eps_root: added to the second moment.
      mu_dtype: the dtype in which the first moment is computed. None takes that of the
        parameters.
      nesterov: whether to use Nesterov momentum.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> state = jaxq.optim.adam8bit(1e-3).init(jnp.ones((64, 256)))
      >>> state[0].nu.spec.fmt.name, state[0].nu.bits_per_element
      ('udynamic8', 8.125)

    References:
      Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.
    """
    tx = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return quantize_state(tx, "dynamic8")


def adamw8bit(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` whose two moments take 8 bits each.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      eps_root: added to the second moment.
      mu_dtype: the dtype in which the first moment is computed. None takes that of the
        parameters.
      weight_decay: strength of the weight decay.
      mask: which parameters decay: a tree of bools, or a function that returns one.
      nesterov: whether to use Nesterov momentum.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> state = jaxq.optim.adamw8bit(1e-3).init(jnp.ones((64, 256)))
      >>> state[0].mu.spec.fmt.name, state[0].mu.bits_per_element
      ('dynamic8', 8.125)

    References:
      Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.
    """
    tx = _adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov
    )
    return quantize_state(tx, "dynamic8")


def adamw4bit(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` whose two moments take 4 bits each.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      eps_root: added to the second moment.
      mu_dtype: the dtype in which the first moment is computed. None takes that of the
        parameters.
      weight_decay: strength of the weight decay.
      mask: which parameters decay: a tree of bools, or a function that returns one.
      nesterov: whether to use Nesterov momentum.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> state = jaxq.optim.adamw4bit(1e-3).init(jnp.ones((64, 256)))
      >>> state[0].nu.spec.fmt.name, state[0].nu.bits_per_element
      ('ulinear4', 4.25)

    References:
      Li et al., "Memory Efficient Optimizers with 4-bit States", 2023.
    """
    tx = _adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov
    )
    return quantize_state(tx, "dynamic4")


def lion8bit(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    mu_dtype: Any = None,
    weight_decay: Any = 1e-3,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.lion` whose momentum takes 8 bits.

    Args:
      learning_rate: a number or a schedule.
      b1: share of the momentum in an update.
      b2: decay of the momentum.
      mu_dtype: the dtype in which the momentum is computed. None takes that of the
        parameters.
      weight_decay: strength of the weight decay.
      mask: which parameters decay: a tree of bools, or a function that returns one.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> state = jaxq.optim.lion8bit(1e-4).init(jnp.ones((64, 256)))
      >>> state[0].mu.spec.fmt.name
      'dynamic8'

    References:
      Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023.
    """
    tx = optax.lion(learning_rate, b1, b2, mu_dtype, weight_decay, mask)
    return quantize_state(tx, "dynamic8")


def momentum8bit(
    learning_rate: Any,
    momentum: Any = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.sgd` whose momentum takes 8 bits.

    Args:
      learning_rate: a number or a schedule.
      momentum: decay of the momentum.
      nesterov: whether to use Nesterov momentum.
      accumulator_dtype: the dtype in which the momentum is computed. None takes that of
        the parameters.

    Raises:
      ValueError: `momentum` is None.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> state = jaxq.optim.momentum8bit(0.1).init(jnp.ones((64, 256)))
      >>> state[0].trace.spec.fmt.name
      'dynamic8'

    References:
      Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.
    """
    if momentum is None:
        raise ValueError(
            "momentum8bit: momentum is None, so there is no state to quantize. Pass a "
            "number, or use optax.sgd."
        )
    tx = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    return quantize_state(tx, "dynamic8")


def muon8bit(
    learning_rate: Any,
    ns_coeffs: Any = "standard",
    ns_steps: int = 5,
    beta: Any = 0.95,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Any = "frobenius",
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.999,
    adam_eps_root: Any = 0.0,
    adam_weight_decay: Any = 0.0,
    adam_learning_rate: Any = None,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.muon` whose momentum takes 8 bits.

    Parameters that Muon leaves to AdamW have two moments of 8 bits.

    Args:
      learning_rate: a number or a schedule.
      ns_coeffs: coefficients of the Newton-Schulz iterations, or "standard" or "dion".
      ns_steps: the number of Newton-Schulz iterations.
      beta: decay of the momentum.
      eps: added to denominators.
      weight_decay: strength of the weight decay.
      weight_decay_mask: which parameters decay: a tree of bools, or a function that
        returns one.
      mu_dtype: the dtype in which the momentum is computed. None takes that of the
        parameters.
      nesterov: whether to use Nesterov momentum.
      adaptive: whether to scale updates by their dual norm.
      preconditioning: "frobenius", "spectral", "aol" or "schatten".
      adam_b1: decay of AdamW's first moment.
      adam_b2: decay of AdamW's second moment.
      adam_eps_root: added to AdamW's second moment.
      adam_weight_decay: AdamW's weight decay.
      adam_learning_rate: AdamW's learning rate. None takes `learning_rate`.
      muon_weight_dimension_numbers: which parameters are Muon's, and along which axes.
        None takes all matrices.
      consistent_rms: the root mean square of updates, independent of their shape. None
        scales updates by the width of a matrix.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> state = jaxq.optim.muon8bit(0.02).init({"w": jnp.ones((64, 256))})
      >>> state.inner_states["muon"].inner_state[0].mu["w"].spec.fmt.name
      'dynamic8'

    References:
      Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024;
      Gupta et al., "Effective Quantization of Muon Optimizer States", 2025.
    """
    tx = contrib.muon(
        learning_rate,
        ns_coeffs,
        ns_steps,
        beta,
        eps,
        weight_decay,
        weight_decay_mask,
        mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        preconditioning=preconditioning,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps_root=adam_eps_root,
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
        muon_weight_dimension_numbers=muon_weight_dimension_numbers,
        consistent_rms=consistent_rms,
    )
    return quantize_state(tx, "dynamic8")


def _adamw(
    learning_rate: Any,
    b1: Any,
    b2: Any,
    eps: Any,
    eps_root: Any,
    mu_dtype: Any,
    weight_decay: Any,
    mask: Any,
    nesterov: bool,
) -> optax.GradientTransformationExtraArgs:
    return optax.adamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        weight_decay,
        mask,
        nesterov=nesterov,
    )
