"""fake_quant: the values of quantized numbers, with a straight-through gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxq.qtensor._bounds import inside_range
from jaxq.qtensor._dequantize import dequantize
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._inputs import check_input, check_key
from jaxq.qtensor._presets import as_spec
from jaxq.qtensor._quantize import quantize_array
from jaxq.qtensor._spec import QuantSpec


def fake_quant(
    x: jax.typing.ArrayLike,
    spec: str | QuantSpec,
    *,
    contracting: tuple[int, ...] | int | None = None,
    batch: tuple[int, ...] | int = (),
    key: jax.Array | None = None,
) -> jax.Array:
    """`dequantize(quantize(x))` with a straight-through gradient.

    The gradient is 1 for numbers that are rounded and 0 for numbers that are clipped.
    The range of numbers that are rounded ends half a step beyond the smallest and the
    largest number of the format. Scales are treated as constants.

    Args:
      x: float32, bfloat16 or float16 array with at least one axis.
      spec: preset name or `QuantSpec`.
      contracting: as in `quantize`.
      batch: as in `quantize`.
      key: PRNG key, as in `quantize`. Needed if `spec.needs_key`, not allowed
        otherwise.

    Returns:
      Array of the shape and dtype of `x`, bit for bit `dequantize(quantize(x))`. A
      number that is not finite makes its block NaN.

    Raises:
      TypeError: `x` is not a float32, bfloat16 or float16 array.
      ValueError: the preset is unknown; `contracting` or `batch` name axes that do not
        exist, repeat, or contradict the granularity; `contracting` is None and has no
        default; a group or tile size does not divide its axis and `pad` is False; the
        format has no negative numbers and the spec is symmetric without an offset; the
        spec needs a key and `key` is None; or the spec needs no key and `key` is given.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> loss = lambda x: jaxq.fake_quant(x, "int4").sum()
      >>> jax.grad(loss)(jnp.array([0.3, -0.7])).tolist()
      [1.0, 1.0]

    References:
      Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons",
      2013.
    """
    spec = as_spec(spec, "fake_quant")
    x, geometry = check_input(
        x, spec, contracting, batch, caller="fake_quant", name="x"
    )
    check_key(spec.levels, key, "fake_quant")
    return _fake_quant(x, key, spec, geometry)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _fake_quant(
    x: jax.Array, key: jax.Array | None, spec: QuantSpec, geometry: Geometry
) -> jax.Array:
    return dequantize(quantize_array(x, spec, geometry, key))


@_fake_quant.defjvp
def _fake_quant_jvp(spec: QuantSpec, geometry: Geometry, primals, tangents):
    x, key = primals
    qt = quantize_array(x, spec, geometry, key)
    passes = inside_range(x, qt)
    # `_fake_quant` is called again, and its value is not used here, because a second
    # derivative must find this rule again.
    value = _fake_quant(x, key, spec, geometry)
    return value, jnp.where(passes, tangents[0], jnp.zeros((), x.dtype))
