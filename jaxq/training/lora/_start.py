"""Adapters that start from the quantization error of a weight.

LoftQ finds codes Q and an adapter A B with a small error `W - (Q + A B)`. It repeats
two steps, starting with A B = 0:

    Q = quantize(W - A B)
    A B = the nearest matrix of rank r to W - Q     # truncated SVD

LQER uses the second step alone, after quantization by any method, and does not train.
With statistics of the inputs, it weighs each row of the error by the size of its input.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.nn.transform import find_layers
from jaxq.observers import LayerStats
from jaxq.qtensor import (
    Geometry,
    QTensor,
    QuantSpec,
    dequantize,
    quantize_computed,
)
from jaxq.training.lora._adapter import AdapterAxes


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorStart:
    """How adapters start from quantization errors. `loftq` and `lqer` return it.

    Attributes:
      name: of the function that returned it.
      weights: the float weights, by the path of their layer.
      steps: the number of SVDs. With more than one, weights are quantized again.
      input_sizes: the root mean square of each input, by the path of the layer:
        float32 `[*stack, K]`. If it is empty, all rows of an error count equally.

    Example:
      >>> import jaxq
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
      >>> start = jaxq.training.loftq(model)
      >>> start.name, start.steps, list(start.weights)
      ('loftq', 5, ['layers/0'])
    """

    name: str
    weights: Mapping[str, jax.Array]
    steps: int
    input_sizes: Mapping[str, jax.Array]

    def check(self, paths: Sequence[str], caller: str) -> None:
        """Raises a ValueError if the weights or inputs of some layers are unknown."""
        missing = [path for path in paths if path not in self.weights]
        if missing:
            raise ValueError(
                f"{caller}: initial={self.name}(model): the model has no layers "
                f"{', '.join(missing)}. Pass the float model that was quantized."
            )
        missing = [path for path in paths if path not in self.input_sizes]
        if self.input_sizes and missing:
            raise ValueError(
                f"{caller}: initial={self.name}(statistics=...): there are no "
                f"statistics of {', '.join(missing)}. Collect them with "
                "jaxq.nn.calibrate, or leave statistics= out."
            )

    def matrices(
        self, path: str, weight: Any, axes: AdapterAxes, rank: int
    ) -> tuple[Any, jax.Array, jax.Array]:
        """The weight of one layer, and the matrices A and B for a scale of 1.

        Args:
          path: of the layer.
          weight: the frozen weight, a QTensor or floats.
          axes: of the weight of one layer.
          rank: of A B.

        Returns:
          (the weight, A `[*stack, *batch, K, r]`, B `[*stack, *batch, r, N]`).

        Raises:
          ValueError: the float weight of this layer has another shape.
        """
        floats = self.weights[path]
        if tuple(floats.shape) != tuple(weight.shape):
            raise ValueError(
                f"initial={self.name}(model): {path} is {list(floats.shape)}, but the "
                f"quantized weight is {list(weight.shape)}. Pass the float model that "
                "was quantized."
            )
        floats = floats.astype(jnp.float32)
        input_size = self.input_sizes.get(path)

        def fit_error_of(weight: Any) -> tuple[jax.Array, jax.Array]:
            error = axes.as_matrix(floats - float_weight(weight))
            return nearest_product(error, rank, input_size)

        a, b = fit_error_of(weight)
        for _ in range(self.steps - 1):
            change = axes.product(axes.a_from_matrix(a), axes.b_from_matrix(b))
            weight = quantized_again(weight, floats - change)
            a, b = fit_error_of(weight)
        return weight, a, b


def loftq(model: nnx.Module, *, steps: int = 5) -> ErrorStart:
    """Adapters that start from the quantization error (LoftQ).

    With `steps` above 1, weights with adapters are quantized again, each number alone.
    So the codes of GPTQ or AWQ are lost. `steps=1` keeps the codes.

    Args:
      model: the float model from which the quantized model was made.
      steps: how often quantization and SVD alternate.

    Returns:
      The argument `initial` of `jaxq.training.add_lora`.

    Raises:
      TypeError: `model` is not an nnx module.
      ValueError: `steps` is below 1, or the model has no float weight.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> model, x = nnx.Linear(64, 64, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
      >>> qmodel, _ = jaxq.quantize_model(model, "nf4")
      >>> lora = jaxq.training.add_lora(qmodel, initial=jaxq.training.loftq(model))
      >>> error = lambda other: float(jnp.abs(other(x) - model(x)).mean())
      >>> error(lora) < error(qmodel)
      True

    References:
      Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
      2024, algorithm 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"training.loftq: steps must be an integer above 0, got {steps!r}."
        )
    return ErrorStart("loftq", _float_weights(model, "training.loftq"), steps, {})


def lqer(
    model: nnx.Module, *, statistics: Mapping[str, LayerStats] | None = None
) -> ErrorStart:
    """Adapters that correct the quantization error, without training (LQER).

    The codes stay as they are, so quantization can use any method.

    Args:
      model: the float model from which the quantized model was made.
      statistics: the statistics of the layers' inputs (`jaxq.nn.calibrate`). Errors in
        rows with large inputs then count more (L2QER). None weighs all rows equally.

    Returns:
      The argument `initial` of `jaxq.training.add_lora`.

    Raises:
      TypeError: `model` is not an nnx module.
      ValueError: the model has no float weight.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (32, 64))
      >>> qmodel, _ = jaxq.quantize_model(model, "int3")
      >>> start = jaxq.training.lqer(model, statistics=jaxq.nn.calibrate(model, [x]))
      >>> corrected = jaxq.training.add_lora(qmodel, rank=16, initial=start)
      >>> error = lambda other: float(jnp.abs(other(x) - model(x)).mean())
      >>> error(corrected) < error(qmodel)
      True

    References:
      Zhang et al., "LQER: Low-Rank Quantization Error Reconstruction for LLMs", 2024.
      Zhang et al., "QERA: an Analytical Framework for Quantization Error
      Reconstruction", 2025 (weights from the mean square of each input).
    """
    sizes = {}
    if statistics is not None:
        sizes = {path: _input_size(stats) for path, stats in statistics.items()}
    return ErrorStart("lqer", _float_weights(model, "training.lqer"), 1, sizes)


def start_of(initial: Any, caller: str) -> ErrorStart | None:
    """The start that `initial` of `add_lora` describes. None stands for "zero".

    Raises:
      TypeError: `initial` is unknown.
    """
    if isinstance(initial, ErrorStart):
        return initial
    if isinstance(initial, str) and initial == "zero":
        return None
    raise TypeError(
        f'{caller}: initial must be "zero", jaxq.training.loftq(model) or '
        f"jaxq.training.lqer(model), got {initial!r}."
    )


def nearest_product(
    error: jax.Array, rank: int, input_size: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """A and B of rank r whose product is nearest to an error, by a truncated SVD.

    Args:
      error: float32 `[*lead, K, N]`.
      rank: r. If it is above min(K, N), zeros fill the other columns and rows.
      input_size: float32 `[*lead, K]` or `[K]`, how much each row of the error counts.
        None counts all rows equally.

    Returns:
      (A `[*lead, K, r]`, B `[*lead, r, N]`), float32. Each has the square roots of the
      singular values as factors.
    """
    row_size = None
    if input_size is not None:
        # A is divided by the sizes, so none may be 0, even if an input is always 0.
        smallest = jnp.max(input_size, axis=-1, keepdims=True) * 1e-4
        row_size = jnp.maximum(input_size, smallest)[..., None]  # [*lead, K, 1]
        row_size = jnp.where(row_size > 0, row_size, jnp.ones_like(row_size))
        error = row_size * error
    u, s, vt = jnp.linalg.svd(error, full_matrices=False)
    num = min(rank, s.shape[-1])
    root = jnp.sqrt(s[..., :num])
    a = u[..., :num] * root[..., None, :]
    b = root[..., :, None] * vt[..., :num, :]
    if row_size is not None:
        a = a / row_size
    missing = rank - num
    no_padding = [(0, 0)] * (error.ndim - 1)
    a = jnp.pad(a, [*no_padding, (0, missing)])
    b = jnp.pad(b, [*no_padding[:-1], (0, missing), (0, 0)])
    return a, b


def float_weight(weight: Any) -> jax.Array:
    """A weight as floats, float32."""
    if isinstance(weight, QTensor):
        return dequantize(weight, dtype=jnp.float32)
    return weight.astype(jnp.float32)


def quantized_again(qt: Any, floats: jax.Array) -> Any:
    """Floats quantized with the spec and the input scale of a QTensor.

    Args:
      qt: the QTensor. If it is an array of floats instead, it is returned as it is.
      floats: the new values, of the same shape.

    Raises:
      ValueError: the spec rounds stochastically.
    """
    if not isinstance(qt, QTensor):
        return qt
    if qt.spec.needs_key:
        raise ValueError(
            f"the spec of {qt.meta.name or 'a weight'} rounds stochastically, which "
            "needs a key. Use a spec with rounding='nearest_even'."
        )
    floats = floats.astype(qt.dtype)
    new = _quantize(floats, qt.input_scale, qt.spec, qt.meta.geometry)
    kept = ("activation", "dtype", "outliers", "name")
    new = new.with_meta(**{name: getattr(qt.meta, name) for name in kept})
    return dataclasses.replace(new, input_range=qt.input_range)


def _float_weights(model: nnx.Module, caller: str) -> dict[str, jax.Array]:
    """The float weights of a model's layers, by path."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"{caller}: model must be a flax nnx module, got {type(model).__name__}."
        )
    weights = {}
    for path, layer, kind in find_layers(model):
        value = getattr(layer, kind.weight).get_value()
        if isinstance(value, jax.Array):
            weights[path] = value
    if not weights:
        raise ValueError(
            f"{caller}: the model has no float weight. Pass the float model from which "
            "the quantized model was made."
        )
    return weights


@functools.partial(jax.jit, static_argnums=(2, 3))
def _quantize(
    floats: jax.Array,
    input_scale: jax.Array | None,
    spec: QuantSpec,
    geometry: Geometry,
) -> QTensor:
    return quantize_computed(floats, spec, geometry, input_scale)


def _input_size(stats: LayerStats) -> jax.Array:
    """The root mean square of each input, `[*lead, K]`, times a common factor."""
    if stats.hessian is not None:
        square = jnp.diagonal(stats.hessian, axis1=-2, axis2=-1)
    else:
        square = jnp.sum(stats.samples * stats.samples, axis=-2)
    return jnp.sqrt(square)
