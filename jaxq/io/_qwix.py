"""`to_qwix` and `from_qwix`: between a QTensor and the QArray of qwix, in memory.

| QArray | QTensor |
|---|---|
| `qvalue`, in the shape of the array | codes, packed, `[*batch, *kept, K]` |
| `scale`, floats with the axes of the array | scale, `[*batch, *num_blocks]` |
| `zero_point`, as `scale`, in the dtype of `qvalue` | zero point |
| `qtype`, a dtype or a name such as "nf4" | `spec.format` |

A number of a QArray is `(qvalue - zero_point) * scale`, computed in the dtype of
`scale`. For "nf4", `qvalue` has the index of the number in the table.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.debug_checks import allow_nonfinite
from jaxq.io._scale_axes import from_storage, granularity_of, tile_sizes, to_storage
from jaxq.qtensor import (
    ErrorContext,
    Meta,
    PerGroup,
    PerTensor,
    QTensor,
    QuantSpec,
    is_traced,
    resolve,
    scale_values,
)

_TO, _FROM = "jaxq.io.to_qwix", "jaxq.io.from_qwix"
_EXPONENTS, _FP8 = "float8_e8m0fnu", "float8_e4m3fn"
_SCALES = ("float32", "bfloat16", "float16", _EXPONENTS, _FP8)
_FLOATS = (
    "float4_e2m1fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
)
# qwix has names for these widths. It keeps their codes in int4 or int8.
_NAMED_INTEGERS = ("int2", "int3", "int5", "int6", "int7")
# Names of qwix for a format, the dtype of its scales and the group size.
_MICROSCALING = {
    "mxfp8": ("float8_e4m3fn", _EXPONENTS, 32),
    "mxfp4": ("float4_e2m1fn", _EXPONENTS, 32),
    "nvfp4": ("float4_e2m1fn", _FP8, 16),
}


def to_qwix(qt: QTensor) -> Any:
    """The `qwix.QArray` with the codes and scales of a QTensor.

    The codes do not change. Scales become floats of the dtype of the array, or of a
    wider one if that is needed to keep them exact. So a QArray can have more bytes than
    the QTensor: qwix has no 8-bit scales, and no scales of scales. The activation spec
    of the QTensor is not part of a QArray.

    For a tree, use `jax.tree.map(to_qwix, tree, is_leaf=...)` on its QTensors.

    Args:
      qt: the format is one of `int2` to `int8`, `uint1` to `uint8`, `nf4`,
        `float4_e2m1fn` and the 8-bit floats. The granularity is any but `PerFlat`, and
        its sizes divide the array.

    Returns:
      A `qwix.QArray` of the shape of `qt`. `qwix.dequantize` of it returns the same
      numbers as `jaxq.dequantize`. They are equal to the bit if both compute in
      float32, so if `qt.dtype` is float32.

    Raises:
      ImportError: qwix is not installed.
      TypeError: `qt` is not a QTensor.
      ValueError: a QArray cannot hold `qt`. The error says why.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.ones((64, 8)), "int4")
      >>> qarray = jaxq.io.to_qwix(qt)  # doctest: +SKIP
      >>> qarray.qvalue.dtype, qarray.scale.shape  # doctest: +SKIP
      (dtype(int4), (1, 8))
    """
    if not isinstance(qt, QTensor):
        raise TypeError(f"{_TO}: expected a QTensor, got {type(qt).__name__}.")
    qwix = _import_qwix(_TO)
    qtype, dtype = _qtype_and_dtype(qt)
    for leaf, meaning in (
        (qt.offset, "an offset"),
        (qt.codebook, "a trained codebook"),
        (qt.input_scale, "an input_scale"),
    ):
        if leaf is not None:
            raise _unfit(qt, f"it has {meaning}")
    geometry = qt.meta.geometry
    try:
        tiles = tile_sizes(geometry)
    except ValueError as error:
        raise _unfit(qt, str(error)) from None
    zero_point = qt.zero_point
    if zero_point is not None:
        _check_range(qt, zero_point, dtype)
        zero_point = from_storage(zero_point, geometry, tiles).astype(dtype)
    return qwix.QArray(
        qvalue=_in_dtype(qt.codes(), dtype),
        scale=from_storage(_float_scale(qt), geometry, tiles),
        zero_point=zero_point,
        qtype=qtype,
    )


def from_qwix(
    qarray: Any,
    *,
    contracting: tuple[int, ...] | int | None = None,
    batch: tuple[int, ...] | int = (),
    scale: str | None = None,
) -> QTensor:
    """The QTensor with the codes and scales of a `qwix.QArray`.

    Args:
      qarray: the QArray. Its tiles say which granularity the QTensor has.
      contracting: the contracted axes, as in `jaxq.quantize`. None is axis -2 of a
        matrix.
      batch: leading axes that share no scales, as in `jaxq.quantize`.
      scale: the dtype of the stored scales. The numbers must be exact in it. None is
        "float8_e8m0fnu" for the qtypes "mxfp8" and "mxfp4", "float8_e4m3fn" for
        "nvfp4", and else the dtype of `qarray.scale`. Under jit, the conversion to a
        narrower dtype cannot be checked and raises. Pass the dtype of `qarray.scale`.

    Returns:
      A QTensor of the shape of the QArray. Its dtype is that of `qarray.scale`.
      `scale_rule` of its spec says "absmax", or "mx_round_up" for scales of exponents.
      A QArray does not say how its scales were computed.

    Raises:
      ImportError: qwix is not installed.
      TypeError: `qarray` is not a QArray.
      ValueError: a QTensor cannot hold the QArray; a scale is not finite or not exact
        in its dtype; or axes are wrong, as in `jaxq.quantize`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> import qwix  # doctest: +SKIP
      >>> w = jnp.ones((64, 8))
      >>> qarray = qwix.quantize(w, "int8", channelwise_axes=[1])  # doctest: +SKIP
      >>> jaxq.io.from_qwix(qarray)  # doctest: +SKIP
      QTensor(int8[64x8], PerChannel(along -2), scale=float32, 8.5 bits, float32)
    """
    qwix = _import_qwix(_FROM)
    if not isinstance(qarray, qwix.QArray):
        raise TypeError(
            f"{_FROM}: expected a qwix.QArray, got {type(qarray).__name__}. qwix keeps "
            "the parameters of a quantized model in a WithAux: pass its array."
        )
    fmt = _format_of(qarray)
    shown = f"{qarray.qtype}{list(qarray.shape)} with scales {list(qarray.scale.shape)}"
    sizes = [(n, m) for n, m in zip(qarray.shape, qarray.scale.shape, strict=False)]
    is_tiled = all(m > 0 and n > 0 and n % m == 0 for n, m in sizes)
    if qarray.scale.ndim != len(qarray.shape) or not is_tiled:
        raise ValueError(
            f"{_FROM}: the scales do not divide the QArray, or it has no elements: "
            f"{shown}."
        )
    context = ErrorContext(_FROM, "the QArray", shown)
    # The roles of the axes do not depend on the granularity.
    roles = resolve(
        qarray.shape, PerTensor(), contracting, batch, context=context, multiple=1
    )
    num_batch = len(qarray.shape) - len(roles.shape)
    tiles = [n // m for n, m in sizes]
    try:
        if any(tile != 1 for tile in tiles[:num_batch]):
            raise ValueError("batch elements share a scale")
        granularity = granularity_of(tiles[num_batch:], roles.shape, roles.contracted)
    except ValueError as error:
        raise ValueError(
            f"{_FROM}: no QTensor holds {shown}: {error}. Quantize "
            "qwix.dequantize(qarray) instead."
        ) from None
    stored_scale = _stored_scale(qarray, scale)
    name = stored_scale.dtype.name
    spec = QuantSpec(
        fmt,
        granularity,
        symmetric=qarray.zero_point is None,
        scale=name,
        scale_rule="mx_round_up" if name == _EXPONENTS else "absmax",
    )
    geometry = resolve(
        qarray.shape,
        granularity,
        contracting,
        batch,
        context=context,
        multiple=formats.codes_per_pack(fmt.bits, spec.order),
    )
    meta = Meta(spec, geometry, spec.order, qarray.scale.dtype.name)
    view = geometry.pad(geometry.to_view(_codes(qarray, fmt)))
    codes = geometry.to_storage(view)
    zero_point = _zero_point(qarray, fmt)
    if zero_point is not None:
        zero_point = to_storage(zero_point, geometry)
    return QTensor(
        data=formats.pack(codes, fmt.bits, spec.order, unit=meta.pack_unit),
        scale=to_storage(stored_scale, geometry),
        zero_point=zero_point,
        offset=None,
        codebook=None,
        meta=meta,
    )


# To qwix.


def _qtype_and_dtype(qt: QTensor) -> tuple[Any, np.dtype]:
    """The qtype of a QArray and the dtype of its `qvalue`."""
    fmt, scale = qt.spec.fmt, qt.spec.scale
    if fmt == formats.get("nf4"):
        return "nf4", jnp.dtype("uint4")
    if isinstance(fmt, formats.IntegerFormat):
        width = 4 if fmt.bits <= 4 else 8
        dtype = jnp.dtype(f"{'int' if fmt.signed else 'uint'}{width}")
        name = f"int{fmt.bits}"
        is_named = fmt.signed and name in _NAMED_INTEGERS
        return (name if is_named else dtype), dtype
    if fmt.name in _FLOATS and fmt == formats.get(fmt.name):
        dtype = jnp.dtype(fmt.name)
        granularity = qt.spec.granularity
        size = granularity.size if isinstance(granularity, PerGroup) else None
        for name, parts in _MICROSCALING.items():
            if parts == (fmt.name, scale, size):
                return name, dtype
        return dtype, dtype
    raise _unfit(qt, f"qwix does not have the format {fmt.name}")


def _unfit(qt: QTensor, reason: str) -> ValueError:
    """The error that says why a QArray cannot hold a QTensor."""
    return ValueError(
        f"{_TO}: a QArray cannot hold {qt!r}: {reason}. Quantize with a spec that a "
        "QArray can hold, such as jaxq.QuantSpec('int8'), or pass "
        "jaxq.dequantize(qt) to qwix.quantize."
    )


def _float_scale(qt: QTensor) -> jax.Array:
    """The scales in the dtype of the array, or in a wider one that keeps them exact."""
    if isinstance(qt.scale, QTensor):
        values = scale_values(qt)
        return values.astype(_wider(values.dtype, qt.dtype))
    dtype = qt.scale.dtype
    if dtype.itemsize > 1:
        return qt.scale.astype(_wider(dtype, qt.dtype))
    if dtype == jnp.dtype(_EXPONENTS):  # float16 does not have all of its exponents
        return qt.scale.astype(_wider(jnp.dtype("bfloat16"), qt.dtype))
    return qt.scale.astype(qt.dtype)


def _wider(a: np.dtype, b: np.dtype) -> np.dtype:
    """The narrowest float dtype of at least 16 bits that holds two others."""
    if a == b:
        return a
    return jnp.dtype("float64" if "float64" in (a.name, b.name) else "float32")


def _in_dtype(codes: jax.Array, dtype: np.dtype) -> jax.Array:
    """Codes of a QTensor in the dtype of `qvalue`, with the same bits."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return codes.astype(dtype)
    width = jnp.finfo(dtype).bits
    return lax.bitcast_convert_type(codes.astype(f"uint{width}"), dtype)


def _check_range(qt: QTensor, zero_point: jax.Array, dtype: np.dtype) -> None:
    """Raises if a zero point is outside the range of `dtype`. Not checked under jit."""
    if is_traced(zero_point):
        return
    numbers, limits = np.asarray(zero_point), jnp.iinfo(dtype)
    if numbers.min() < limits.min or numbers.max() > limits.max:
        raise _unfit(
            qt,
            f"its zero points go from {numbers.min()} to {numbers.max()}, outside the "
            f"range of {dtype}",
        )


# From qwix.


def _format_of(qarray: Any) -> formats.Format:
    """The format of the codes of a QArray."""
    qtype = qarray.qtype
    if isinstance(qtype, str):
        name = _MICROSCALING[qtype][0] if qtype in _MICROSCALING else qtype
    else:
        name = jnp.dtype(qtype).name
    is_integer = name.removeprefix("u").removeprefix("int").isdigit()
    if name != "nf4" and name not in _FLOATS and not is_integer:
        raise ValueError(f"{_FROM}: a QTensor does not have the qtype {qtype!r}.")
    try:
        fmt = formats.get(name)
    except ValueError as error:
        raise ValueError(f"{_FROM}: {error}") from None
    if qarray.zero_point is not None and not is_integer:
        raise ValueError(
            f"{_FROM}: a QTensor of {name} has no zero point. Quantize "
            "qwix.dequantize(qarray) instead."
        )
    return fmt


def _codes(qarray: Any, fmt: formats.Format) -> jax.Array:
    """The codes of a QArray in the dtype of the format, with the same bits."""
    qvalue = qarray.qvalue
    if jnp.issubdtype(qvalue.dtype, jnp.floating):
        if qvalue.dtype.name != fmt.name:
            raise ValueError(
                f"{_FROM}: the QArray has the qtype {qarray.qtype!r}, and its qvalue "
                f"is {qvalue.dtype}."
            )
        patterns = lax.bitcast_convert_type(qvalue, f"uint{fmt.bits}")
        return patterns.astype(fmt.code_dtype)
    codes = qvalue.astype(fmt.code_dtype)
    _check_codes(codes, fmt, f"qvalue ({qvalue.dtype})")
    return codes


def _zero_point(qarray: Any, fmt: formats.Format) -> jax.Array | None:
    """The zero points of a QArray, in the shape of its scales."""
    zero_point = qarray.zero_point
    if zero_point is None:
        return None
    codes = zero_point.astype(fmt.code_dtype)
    _check_codes(codes, fmt, f"zero_point ({zero_point.dtype})")
    shape, scales = zero_point.shape, qarray.scale.shape
    if any(n not in (1, m) for n, m in zip(shape, scales, strict=True)):
        raise ValueError(
            f"{_FROM}: zero points {list(shape)} vary where the scales {list(scales)} "
            "do not. Quantize qwix.dequantize(qarray) instead."
        )
    return jnp.broadcast_to(codes, scales)


def _check_codes(codes: jax.Array, fmt: formats.Format, name: str) -> None:
    """Raises if integers are outside the range of the format. Not under jit."""
    if is_traced(codes) or not isinstance(fmt, formats.IntegerFormat) or not codes.size:
        return
    numbers = np.asarray(codes)
    if numbers.min() < fmt.min or numbers.max() > fmt.max:
        raise ValueError(
            f"{_FROM}: {name} has numbers from {numbers.min()} to {numbers.max()}, "
            f"outside the range of {fmt.name}."
        )


def _stored_scale(qarray: Any, dtype: str | None) -> jax.Array:
    """The scales of a QArray in the dtype in which the QTensor stores them."""
    scale, qtype = qarray.scale, qarray.qtype
    if dtype is None:
        dtype = scale.dtype.name
        if isinstance(qtype, str) and qtype in _MICROSCALING:
            dtype = _MICROSCALING[qtype][1]
    formats.check_choice(f"{_FROM}: scale", dtype, _SCALES)
    traced = is_traced(scale)
    if not traced and not np.isfinite(np.asarray(scale, np.float64)).all():
        raise ValueError(f"{_FROM}: a scale is not finite.")
    is_float64 = scale.dtype.name == "float64"
    if scale.dtype.name == dtype or (dtype == "float32" and not is_float64):
        return scale.astype(dtype)
    if traced:
        raise ValueError(
            f"{_FROM}: under jit, the conversion of scales from {scale.dtype} to "
            f"{dtype} cannot be checked. Pass scale={scale.dtype.name!r}."
        )
    with allow_nonfinite():  # float8 has no infinity
        stored = scale.astype(dtype)
        exact = np.asarray(stored.astype(scale.dtype) == scale)
    if not exact.all():
        raise ValueError(
            f"{_FROM}: {int((~exact).sum())} of {exact.size} scales are not exact in "
            f"{dtype}. Pass scale={scale.dtype.name!r}."
        )
    return stored


def _import_qwix(caller: str) -> Any:
    try:
        return importlib.import_module("qwix")
    except ImportError as error:
        raise ImportError(
            f"{caller}: this needs the qwix package: pip install jaxq[qwix]"
        ) from error
