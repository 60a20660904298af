"""Optax optimizers with quantized states.

Adam keeps two float32 numbers for each parameter. `quantize_state` stores each of them
in 8 or 4 bits. `adamw8bit` and the other shorthands are optax optimizers with such
states. `stochastic_rounding` keeps small updates of bfloat16 parameters.
"""

from jaxq.optim._quantize_state import quantize_state
from jaxq.optim._shorthands import (
    adam8bit,
    adamw4bit,
    adamw8bit,
    lion8bit,
    momentum8bit,
    muon8bit,
)
from jaxq.optim._stochastic_rounding import (
    StochasticRoundingState,
    stochastic_rounding,
)

__all__ = [
    "StochasticRoundingState",
    "adam8bit",
    "adamw4bit",
    "adamw8bit",
    "lion8bit",
    "momentum8bit",
    "muon8bit",
    "quantize_state",
    "stochastic_rounding",
]
