"""The error of a layer's output on held-out rows, and what a static range clips.

The layer runs as it will run in the quantized model: with the quantized weight, and
with quantized inputs if its rule says so.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import metrics, ops
from jaxq.observers import LayerStats
from jaxq.processes import to_numpy
from jaxq.qtensor import QTensor, dequantize, quantize

# The squared norm of a row counts as at least this share of the mean squared norm.
# Otherwise one row that is nearly zero could dominate the mean.
_LEAST_ROW = 1e-3


class LayerErrors(NamedTuple):
    """What calibration shows about a quantized layer.

    Attributes:
      output_sqnr: the error of its output on held-out rows, in dB. None if it was not
        measured.
      input_range: the smallest low end and the largest high end of its static ranges.
        None without static ranges.
      input_clipped: the share of calibration inputs outside their static range. None
        without static ranges.
    """

    output_sqnr: float | None = None
    input_range: tuple[float, float] | None = None
    input_clipped: float | None = None


class Inputs(NamedTuple):
    """How a layer reads its inputs.

    Attributes:
      windowed: the layer is a convolution.
      channel: the axis of a convolution's input channels in the kernel, as a negative
        number. None if it is not known, and for other layers.
      patches: calibration has kept the patches of a convolution's input.
    """

    windowed: bool
    channel: int | None = None
    patches: bool = False


class _Rows(NamedTuple):
    """The rows of `LayerStats`. All observers share the programs that read them."""

    samples: jax.Array
    sample_ranks: jax.Array
    held_out: jax.Array
    held_out_ranks: jax.Array

    @classmethod
    def of(cls, stats: LayerStats) -> _Rows:
        return cls(*(getattr(stats, name) for name in cls._fields))

    def all(self) -> tuple[jax.Array, jax.Array]:
        """The sampled and the held-out rows together, and their ranks."""
        return (
            jnp.concatenate([self.samples, self.held_out], axis=-2),
            jnp.concatenate([self.sample_ranks, self.held_out_ranks], axis=-1),
        )


def layer_errors(
    floats: jax.Array, qt: QTensor, stats: LayerStats, inputs: Inputs
) -> LayerErrors:
    """Measures a quantized layer on calibration inputs.

    Args:
      floats: the float weight.
      qt: the quantized weight, with the activation quantization of the layer.
      stats: statistics of the layer's inputs.
      inputs: how the layer reads its inputs.
    """
    output_sqnr = None
    if can_measure_output(qt, stats, inputs):
        output_sqnr = float(output_sqnr_of(floats, qt, stats, inputs))
    if qt.input_range is None:
        return LayerErrors(output_sqnr)
    low, high = np.moveaxis(to_numpy(qt.input_range), -1, 0)
    clipped = _clipped_inputs(qt.input_range, _Rows.of(stats))
    return LayerErrors(
        output_sqnr, (float(low.min()), float(high.max())), float(clipped)
    )


def can_measure_output(qt: QTensor, stats: LayerStats, inputs: Inputs) -> bool:
    """True if held-out rows show the error of a layer's output.

    The range of a convolution's dynamic activation quantization depends on the whole
    input, and calibration keeps single positions of inputs.
    """
    is_dynamic = qt.meta.activation is not None and qt.input_range is None
    has_channels = not is_dynamic and inputs.channel is not None
    if not qt.size or (inputs.windowed and not has_channels):
        return False
    return bool(np.any(to_numpy(stats.num_held_out) > 0))


def output_sqnr_of(
    floats: jax.Array, qt: QTensor, stats: LayerStats, inputs: Inputs
) -> jax.Array:
    """The error of a layer's output on all held-out rows together, in dB.

    Args:
      floats: the float weight.
      qt: the quantized weight, with the activation quantization of the layer.
      stats: statistics of the layer's inputs.
      inputs: how the layer reads its inputs.

    Returns:
      float32 scalar. A stack has one error.
    """
    rows = stats.patches.held_out if inputs.patches else stats.held_out
    return _jit_output_sqnr(floats, qt, rows, inputs)


@functools.partial(jax.jit, static_argnames="inputs")
def _jit_output_sqnr(
    floats: jax.Array, qt: QTensor, rows: jax.Array, inputs: Inputs
) -> jax.Array:
    exact, approximate = _outputs(floats, qt, rows, inputs)
    return metrics.sqnr(exact, approximate)


def row_sqnr_of(
    floats: jax.Array, qt: QTensor, stats: LayerStats, inputs: Inputs
) -> jax.Array:
    """The error of a layer's output in dB, with less weight for rows of large outputs.

    The squared error of a row is divided by the norm of the row's exact output. Then
    the mean over the sampled and the held-out rows is taken, relative to the mean
    squared norm.

    Without the division, a few rows with very large outputs would dominate the mean.
    Transformers have such rows at separator tokens, and the norm after the layer
    removes their size. With a division by the squared norm, the rows with the smallest
    outputs would dominate the mean.

    Args:
      floats: the float weight.
      qt: the quantized weight, with the activation quantization of the layer.
      stats: statistics of the layer's inputs, `[*batch]` for a stack.
      inputs: how the layer reads its inputs.

    Returns:
      float32 `[*batch]`.
    """
    # A range is one of channels, so the channels of all positions judge it.
    inputs = inputs._replace(patches=False)
    return _jit_row_sqnr(floats, qt, _Rows.of(stats), inputs)


@functools.partial(jax.jit, static_argnames="inputs")
def _jit_row_sqnr(
    floats: jax.Array, qt: QTensor, sampled: _Rows, inputs: Inputs
) -> jax.Array:
    # Few numbers lie beyond a range. The held-out rows alone may have none of them.
    rows, ranks = sampled.all()
    exact, approximate = _outputs(floats, qt, rows, inputs)
    shape = (*ranks.shape, -1)
    exact, approximate = exact.reshape(shape), approximate.reshape(shape)
    # With one unit for each element of a stack, no square overflows or is lost.
    largest = jnp.max(jnp.abs(exact), axis=(-2, -1), keepdims=True, initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    signal = jnp.sum((exact / unit) ** 2, axis=-1)  # [*batch, rows]
    noise = jnp.sum(((exact - approximate) / unit) ** 2, axis=-1)
    is_filled = ranks >= 0
    mean = jnp.mean(signal, axis=-1, keepdims=True, where=is_filled)
    mean = jnp.where(mean > 0, mean, 1)
    quotients = noise / jnp.sqrt(jnp.maximum(signal, _LEAST_ROW * mean) * mean)
    return -10 * jnp.log10(jnp.mean(quotients, axis=-1, where=is_filled))


def _outputs(
    floats: jax.Array, qt: QTensor, rows: jax.Array, inputs: Inputs
) -> tuple[jax.Array, jax.Array]:
    """The exact and the quantized outputs of rows, `[*batch, rows, ...]`.

    Without patches, each tap of a convolution's kernel gives a separate product,
    because calibration keeps single positions of the inputs.
    """
    if inputs.patches:
        return _products_of_patches(floats, qt, rows)
    if inputs.channel is None:
        return _products(floats, qt, rows)
    return _products_of_taps(floats, qt, rows, inputs.channel)


def _products(
    floats: jax.Array, qt: QTensor, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The products of rows with the float and the quantized weight of a linear layer.

    Args:
      floats: the float weight.
      qt: the quantized weight.
      rows: float32 `[*batch, rows, K]`.
    """
    num_batch = len(qt.batch_shape)
    batch = tuple(range(num_batch))
    along = tuple(axis + qt.ndim for axis in qt.meta.geometry.contracted)
    x = rows.reshape(*rows.shape[:-1], *(qt.shape[axis] for axis in along))
    dims = ((tuple(range(num_batch + 1, x.ndim)), along), (batch, batch))
    exact = jax.lax.dot_general(
        x, floats.astype(jnp.float32), dims, precision=jax.lax.Precision.HIGHEST
    )
    approximate = ops.dot_general(x, qt, dims, preferred_element_type=jnp.float32)
    return exact, approximate


def _products_of_taps(
    floats: jax.Array, qt: QTensor, rows: jax.Array, channel: int
) -> tuple[jax.Array, jax.Array]:
    """The products of rows with each tap of a convolution's kernel.

    Args:
      floats: the float kernel.
      qt: the quantized kernel. Its inputs have a static range or stay in floats.
      rows: float32 `[*batch, rows, channels]`.
      channel: the axis of the kernel's input channels, as a negative number.
    """
    geometry = qt.meta.geometry
    along = geometry.contracted
    num_channels = qt.shape[channel]  # of one group of channels
    num_groups = rows.shape[-1] // num_channels

    def products(x: jax.Array, kernel: jax.Array) -> jax.Array:
        taps = geometry.to_storage(geometry.to_view(kernel))  # [*batch, *kept, in]
        lead = (*qt.batch_shape, num_groups, -1)
        taps = taps.reshape(*lead, *(qt.shape[axis] for axis in along))
        taps = jnp.moveaxis(taps, along.index(channel) - len(along), -1)
        taps = taps.reshape(*taps.shape[: len(lead)], -1, num_channels)
        x = x.reshape(*x.shape[:-1], num_groups, num_channels)
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("...rgc,...gotc->...rtgo", x, taps, precision=highest)

    x = _quantized_rows(qt, rows)
    rounded = dequantize(qt.with_activation(None), dtype=jnp.float32)
    return products(rows, floats.astype(jnp.float32)), products(x, rounded)


def _products_of_patches(
    floats: jax.Array, qt: QTensor, patches: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The products of patches with a convolution's kernel as a matrix.

    Args:
      floats: the float kernel.
      qt: the quantized kernel. Its inputs have a static range or stay in floats.
      patches: float32 `[*batch, groups, rows, K]`.
    """
    geometry, num_groups = qt.meta.geometry, patches.shape[-3]

    def products(x: jax.Array, kernel: jax.Array) -> jax.Array:
        rows = geometry.to_storage(geometry.to_view(kernel))  # [*batch, *kept, K]
        rows = rows.reshape(*qt.batch_shape, num_groups, -1, x.shape[-1])
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("...grk,...gok->...rgo", x, rows, precision=highest)

    x = _quantized_rows(qt, patches)
    rounded = dequantize(qt.with_activation(None), dtype=jnp.float32)
    return products(patches, floats.astype(jnp.float32)), products(x, rounded)


def _quantized_rows(qt: QTensor, rows: jax.Array) -> jax.Array:
    """Rows `[*batch, ...]` as the layer quantizes them by its static range."""
    spec = qt.meta.activation
    if spec is None:
        return rows
    assert qt.input_range is not None
    num_batch = len(qt.batch_shape)
    codes = quantize(
        rows,
        spec,
        contracting=tuple(range(num_batch, rows.ndim)),
        batch=tuple(range(num_batch)),
        bounds=(qt.input_range[..., 0], qt.input_range[..., 1]),
        on_nonfinite="propagate",
    )
    return dequantize(codes, dtype=jnp.float32)


@jax.jit
def _clipped_inputs(input_range: jax.Array, sampled: _Rows) -> jax.Array:
    """The share of sampled and held-out inputs outside their static range.

    Args:
      input_range: `[*batch, 2]`.
      sampled: rows of the inputs.
    """
    rows, ranks = sampled.all()
    low, high = (input_range[..., i, None, None] for i in (0, 1))
    is_filled = jnp.broadcast_to(ranks[..., None] >= 0, rows.shape)
    is_clipped = is_filled & ((rows < low) | (rows > high))
    num_filled = jnp.maximum(jnp.sum(is_filled, dtype=jnp.float32), 1)
    return jnp.sum(is_clipped, dtype=jnp.float32) / num_filled
