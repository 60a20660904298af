"""LLM.int8(): columns of the input with an outlier are multiplied in high precision.

    y = dequantize(q_x q_w)  over columns below the threshold      # int8, int32 sums
        + x_O w_O            over columns that reach it            # high precision

If all columns were int8, a few columns with large numbers would determine the scale of
every row. The codes of all other columns would then be close to zero.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq import formats, ops
from jaxq.methods import _matrix
from jaxq.methods._explicit_axes import on_explicit_axes
from jaxq.methods._method import Method, Solution
from jaxq.methods._method_options import check_values, number, why_not_stochastic
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, QuantSpec, as_spec, dequantize, quantize

_THRESHOLD = 6.0  # section 3.2 of the paper
_OPTIONS = {"threshold": number("at least 0", least=0)}


class LLMInt8Info(NamedTuple):
    """Diagnostics of `llm_int8`: what calibration says about the layer's input.

    Attributes:
      outliers: bool `[in]`, True for columns that reached the threshold.
      num_outliers: int32, the number of these columns. It can be passed to
        `llm_int8_matmul(num_outliers=)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import llm_int8
      >>> _, info = llm_int8(jnp.ones((2, 2)), absmax_x=jnp.array([1.0, 40.0]))
      >>> info.outliers.tolist()
      [False, True]
    """

    outliers: jax.Array
    num_outliers: jax.Array


class LLMInt8MatmulInfo(NamedTuple):
    """Diagnostics of one product by `llm_int8_matmul`.

    Attributes:
      outliers: bool `[in]`, True for columns that were multiplied in high precision.
      num_outliers: int32, the number of columns that reached the threshold.
      num_missed: int32, the number of outlier columns that stayed in int8, because
        `num_outliers=` was too small.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import llm_int8_matmul
      >>> x = jnp.array([[9.0, 0.5, -40.0]])
      >>> _, info = llm_int8_matmul(x, jnp.eye(3), num_outliers=1)
      >>> info.outliers.tolist(), int(info.num_outliers), int(info.num_missed)
      ([False, False, True], 2, 1)
    """

    outliers: jax.Array
    num_outliers: jax.Array
    num_missed: jax.Array


@on_explicit_axes
def llm_int8(
    w: jax.typing.ArrayLike,
    spec: str | QuantSpec = "int8",
    *,
    absmax_x: jax.typing.ArrayLike | None = None,
    threshold: float = _THRESHOLD,
    activation: str | QuantSpec = "int8",
    name: str = "w",
) -> tuple[QTensor, LLMInt8Info]:
    """Quantizes the weight of `llm_int8_matmul`.

    Every row of the weight is quantized, because the outlier columns are only known
    when there is an input.

    Args:
      w: float `[in, out]`, or a stack of such matrices with axes in front.
      spec: preset name or `QuantSpec`. "int8" has one absmax scale for each output
        ("vector-wise" in the paper).
      absmax_x: float `[in]` (or stacked like w), largest magnitude of each column over
        the calibration batches, or None.
      threshold: at least 0. A column is an outlier if its largest magnitude is at least
        this.
      activation: how the other columns of the input are quantized, with one scale for
        each token. `QuantSpec("int8", symmetric=False)` is the paper's zero-point
        quantization.
      name: the name of the weight in errors.

    Returns:
      `(qt, info)`: a QTensor with the geometry of `jaxq.quantize(w, spec,
      contracting=-2)`, and an `LLMInt8Info` (no outliers without `absmax_x`). The
      QTensor has the activation and the threshold attached, so `x @ qt` is the product
      of `llm_int8_matmul`.

    Raises:
      TypeError: an argument is not a float array.
      ValueError: the threshold is negative, sizes differ, or (outside jit) a number is
        not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.methods import llm_int8
      >>> absmax_x = jnp.array([1.0, 40.0, 2.0, 6.0])
      >>> qt, info = llm_int8(jnp.ones((4, 2)), absmax_x=absmax_x)
      >>> int(info.num_outliers)
      2

    References:
      Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
      Scale", 2022, section 3.
    """
    w = _matrix.as_weight(w, "llm_int8", name)
    check_values("llm_int8", _OPTIONS, threshold=threshold)
    batch = tuple(range(w.ndim - 2))
    qt = quantize(w, as_spec(spec, "llm_int8"), contracting=-2, batch=batch, name=name)
    qt = qt.with_activation(activation, outliers=threshold)
    outliers = jnp.zeros(w.shape[:-1], bool)
    if absmax_x is not None:
        magnitude = _matrix.as_statistic(
            absmax_x,
            "absmax_x",
            "llm_int8",
            shape=w.shape[-2:-1],
            meaning="one magnitude for each input",
            w=w,
        )
        outliers = jnp.broadcast_to(~(magnitude < threshold), w.shape[:-1])
    return qt, LLMInt8Info(outliers, jnp.sum(outliers, axis=-1, dtype=jnp.int32))


def llm_int8_matmul(
    x: jax.typing.ArrayLike,
    w: QTensor | jax.typing.ArrayLike,
    *,
    threshold: float | None = None,
    num_outliers: int | None = None,
    keep: jax.typing.ArrayLike | None = None,
    activation: str | QuantSpec | None = None,
) -> tuple[jax.Array, LLMInt8MatmulInfo]:
    """Computes `x @ w`. Columns of x with an outlier stay in high precision.

    A column is an outlier if `max_t |x_tj| >= threshold`. The other columns are
    quantized with one scale for each row, computed without the outliers. Their codes
    are multiplied with the codes of w, accumulate in int32, and are scaled by both
    scales. With threshold 0 the whole product is in high precision.

    Without further arguments the result is that of
    `x @ qt.with_activation("int8", outliers=threshold)`, the product of quantized
    layers. This function also says which columns were outliers, and has two settings
    that layers do not have:

    - `num_outliers=k`. The set of outlier columns depends on the data, but compiled
      shapes must not depend on the data. So by default a mask splits x into two arrays,
      and both products have all columns. With `num_outliers=k`, the k columns of
      largest magnitude are gathered, and the product in high precision has only k
      columns. Further outliers stay in int8; `info.num_missed` counts them.
    - `keep=`, the weight before rounding, for the product in high precision.

    Args:
      x: float `[..., in]`. A column is over all leading axes.
      w: `[in, out]`: a QTensor (from `llm_int8`, or any whose scales are shared along
        the input), or a float array. A float array is quantized here as "int8", and its
        float rows are used for the outlier columns.
      threshold: at least 0. None uses the threshold attached to the QTensor, or 6.0.
      num_outliers: None, or k, at least 0.
      keep: float `[in, out]`, a weight. The outlier columns are multiplied by its
        rows. None dequantizes these rows of `w`, as bitsandbytes does by default.
      activation: how the other columns of x are quantized. None uses the activation
        attached to the QTensor, or "int8".

    Returns:
      `(y, info)`: `[..., out]` in the dtype that x and w promote to, and an
      `LLMInt8MatmulInfo`. The two products are added in float32.

    Raises:
      TypeError: x is not a float array.
      ValueError: shapes do not match, w has batch axes or was not quantized with
        `contracting=-2`, or `threshold` or `num_outliers` is negative.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq.methods import llm_int8_matmul
      >>> x = jnp.array([[0.5, -40.0, 1.0]])
      >>> y, info = llm_int8_matmul(x, jaxq.quantize(jnp.eye(3), "int8"))
      >>> [round(v, 3) for v in y[0].tolist()], info.outliers.tolist()
      ([0.504, -40.0, 1.0], [False, True, False])

    References:
      Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
      Scale", 2022, section 3.
    """
    if not isinstance(w, QTensor):
        keep = _matrix.as_weight(w, "llm_int8_matmul") if keep is None else keep
        w, _ = llm_int8(w)
    if threshold is None:
        weight_threshold = w.meta.outliers
        threshold = _THRESHOLD if weight_threshold is None else weight_threshold
    check_values("llm_int8_matmul", _OPTIONS, threshold=threshold)
    x = jnp.asarray(x)
    keep = None if keep is None else jnp.asarray(keep)
    _check_operands(x, w, keep, num_outliers)
    activation = activation or w.meta.activation or "int8"

    num_in = w.shape[0]
    magnitude = jnp.max(jnp.abs(x.reshape(-1, num_in)), axis=0, initial=0.0)  # [in]
    reached = ~(magnitude < threshold)  # [in]; NaN is an outlier
    outliers = reached
    if num_outliers is not None:
        _, columns = lax.top_k(magnitude, min(num_outliers, num_in))  # [k]
        is_outlier = reached[columns]
        outliers = jnp.zeros(num_in, bool).at[columns].set(is_outlier)
        x_outliers = _only(is_outlier, jnp.take(x, columns, axis=-1))  # [..., k]
        if keep is None:
            rows = _dequantized_rows(w.with_activation(None), columns)  # [k, out]
        else:
            rows = jnp.take(keep, columns, axis=0)
        y = _float32_product(_only(~outliers, x), w.with_activation(activation))
        y = y + _float32_product(x_outliers, rows)
    elif keep is not None:
        y = _float32_product(_only(~outliers, x), w.with_activation(activation))
        y = y + _float32_product(_only(outliers, x), keep)
    else:
        y = _float32_product(x, w.with_activation(activation, outliers=threshold))
    num_reached = jnp.sum(reached, dtype=jnp.int32)
    num_missed = num_reached - jnp.sum(outliers, dtype=jnp.int32)
    info = LLMInt8MatmulInfo(outliers, num_reached, num_missed)
    return y.astype(jnp.promote_types(x.dtype, w.dtype)), info


def _check_operands(
    x: jax.Array, w: QTensor, keep: jax.Array | None, num_outliers: int | None
) -> None:
    """Raises for operands of `llm_int8_matmul` that do not fit together."""
    geometry = w.meta.geometry
    if w.batch_shape or geometry.order != (-1, -2) or geometry.num_contracted != 1:
        raise ValueError(
            "llm_int8_matmul: w must be [in, out] quantized with contracting=-2, got "
            f"{w!r}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            "llm_int8_matmul: x must be a float array, got "
            f"{_matrix.dtype_and_shape(x)}."
        )
    if x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"llm_int8_matmul: x must be [..., {w.shape[0]}] to match w, got x: "
            f"{_matrix.dtype_and_shape(x)}, w: {w!r}."
        )
    if keep is not None and (
        keep.shape != w.shape or not jnp.issubdtype(keep.dtype, jnp.floating)
    ):
        raise ValueError(
            f"llm_int8_matmul: keep must be the float weight {list(w.shape)}, got "
            f"{_matrix.dtype_and_shape(keep)}."
        )
    if num_outliers is not None and num_outliers < 0:
        raise ValueError(
            "llm_int8_matmul: num_outliers must be None or at least 0, got "
            f"{num_outliers}."
        )


def _only(columns: jax.Array, x: jax.Array) -> jax.Array:
    """x with 0 in the columns for which the mask, bool `[in]`, is False."""
    mask = columns.reshape((1,) * (x.ndim - 1) + columns.shape)
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _float32_product(x: jax.Array, w: QTensor | jax.Array) -> jax.Array:
    """`x @ w` in float32."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    if isinstance(w, QTensor):
        return ops.dot_general(x, w, dims, preferred_element_type=jnp.float32)
    if x.dtype != w.dtype:
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    # HIGHEST: matrix units would otherwise read float32 as bfloat16.
    return lax.dot_general(
        x, w, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _dequantized_rows(qt: QTensor, columns: jax.Array) -> jax.Array:
    """`dequantize(qt)[columns]` in float32.

    If the codes are stored in whole bytes and all rows share one scale, only the
    requested rows are decoded.
    """
    meta, geometry = qt.meta, qt.meta.geometry
    shares_scale = (
        not geometry.flat
        and geometry.block_shape[-1] is None
        and geometry.num_blocks[-1] == 1
    )
    stores_rows = meta.layout == "rows" and meta.packing is formats.Packing.NONE
    if not (shares_scale and stores_rows):
        return jnp.take(dequantize(qt, dtype=jnp.float32), columns, axis=0)
    shape = (columns.shape[0], geometry.shape[1])
    geometry = dataclasses.replace(geometry, shape=shape)
    data = jnp.take(qt.data, columns, axis=-1)
    rows = dataclasses.replace(qt, data=data, meta=meta.with_geometry(geometry))
    return dequantize(rows, dtype=jnp.float32)


def _solve_llm_int8(
    w: jax.Array,
    stats: LayerStats | None,
    spec: QuantSpec,
    *,
    key: jax.Array,
    nearest: QTensor,
    threshold: float = _THRESHOLD,
) -> Solution:
    """Attaches the threshold for the inputs to the rounded weight."""
    return Solution(nearest.with_activation("int8", outliers=threshold))


METHOD = Method(
    "llm_int8",
    _solve_llm_int8,
    options=_OPTIONS,
    why_not=why_not_stochastic,
    matrices_only=True,
    own_activation=True,
    takes_nearest=True,
)
