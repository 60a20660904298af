"""Quantization-aware training of Flax models and of plain trees of arrays.

`prepare` puts a `TrainedWeight` in the place of each weight that a recipe quantizes.
The model then trains like any other model: with `jax.grad`, `nnx.Optimizer`, optax and
your own loop. `convert` returns what `jaxq.quantize_model` returns. The prepared model
and the converted model compute the same numbers. `jaxq.training.linen` has the same
functions for Flax linen.
"""

from jaxq.training import linen
from jaxq.training._check import check
from jaxq.training._convert import convert
from jaxq.training._delayed_scaling import AmaxHistory, DelayedScaling
from jaxq.training._labels import labels
from jaxq.training._low_precision_dot import dot_general
from jaxq.training._low_precision_layers import low_precision
from jaxq.training._precision_recipe import (
    LowPrecision,
    ProductSpec,
    low_precision_recipes,
)
from jaxq.training._prepare import prepare
from jaxq.training._ranges import Ranges, ema, lsq, pact
from jaxq.training._schedule import Schedule
from jaxq.training.lora import (
    ErrorStart,
    add_lora,
    load_lora,
    loftq,
    lqer,
    merge_lora,
    save_lora,
)

__all__ = [
    "AmaxHistory",
    "DelayedScaling",
    "ErrorStart",
    "LowPrecision",
    "ProductSpec",
    "Ranges",
    "Schedule",
    "add_lora",
    "check",
    "convert",
    "dot_general",
    "ema",
    "labels",
    "linen",
    "load_lora",
    "loftq",
    "low_precision",
    "low_precision_recipes",
    "lqer",
    "lsq",
    "merge_lora",
    "pact",
    "prepare",
    "save_lora",
]
