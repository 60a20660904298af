"""LLM.int8(): columns of the input with an outlier are multiplied in high precision, all others in int8.

    y = dequantize(q_x q_w) over columns below the threshold  +  x_O w_O over those that reach it

A product of int8 codes alone would spend each row's range on a few columns that hold most of its magnitude.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq import formats, ops
from jaxq.methods import _matrix
from jaxq.methods._method import Method, Solution
from jaxq.methods._options import check_values, number, why_not_stochastic
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, QuantSpec, as_spec, dequantize, quantize

_THRESHOLD = 6.0
_OPTIONS = {"threshold": number("at least 0", least=0)}


class LLMInt8Info(NamedTuple):
    """What calibration says of a layer's input, by `llm_int8`.

    Attributes:
      outliers: bool `[in]`, which columns reached the threshold.
      num_outliers: int32, how many: a `num_outliers=` for `llm_int8_matmul`.
    """

    outliers: jax.Array
    num_outliers: jax.Array


class LLMInt8MatmulInfo(NamedTuple):
    """What one product did.

    Attributes:
      outliers: bool `[in]`, columns that were multiplied in high precision.
      num_outliers: int32, how many columns reached the threshold.
      num_missed: int32, how many of these were left to int8, where `num_outliers=` was too small.
    """

    outliers: jax.Array
    num_outliers: jax.Array
    num_missed: jax.Array


def llm_int8(
    w: jax.typing.ArrayLike,
    spec: str | QuantSpec = "int8",
    *,
    absmax_x: jax.typing.ArrayLike | None = None,
    threshold: float = _THRESHOLD,
    activation: str | QuantSpec = "int8",
    name: str = "w",
) -> tuple[QTensor, LLMInt8Info]:
    """The weight of `llm_int8_matmul`: every row quantized, outlier columns of the input being known only with it.

    Args:
      w: float `[in, out]`, or a stack of such matrices with axes in front.
      spec: preset name or `QuantSpec`: "int8" is one absmax scale for each output ("vector-wise").
      absmax_x: float `[in]` (or stacked like w), largest magnitude of each column over calibration data, or None.
      threshold: a column is an outlier if its largest magnitude is at least this.
      activation: how the other columns of the input are quantized, one scale a token; `QuantSpec("int8",
        symmetric=False)` is the paper's zero-point quantization.
      name: what errors call w, a parameter's path for example.

    Returns:
      `(qt, info)`: a QTensor with the geometry of `jaxq.quantize(w, spec, contracting=-2)`, activation and threshold
      attached, so that `x @ qt` is the product; and an `LLMInt8Info` (no outliers without `absmax_x`).

    Raises:
      TypeError: not float arrays.
      ValueError: sizes that differ, a negative threshold, non-finite numbers.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq.methods import llm_int8
      >>> qt, info = llm_int8(jnp.ones((4, 2)), absmax_x=jnp.array([1.0, 40.0, 2.0, 6.0]))
      >>> int(info.num_outliers)
      2

    References:
      Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022, section 3.
    """
    w = _matrix.as_weight(w, "llm_int8", name)
    check_values("llm_int8", _OPTIONS, threshold=threshold)
    batch = tuple(range(w.ndim - 2))
    qt = quantize(w, as_spec(spec, "llm_int8"), contracting=-2, batch=batch, name=name)
    qt = qt.with_activation(activation, outliers=threshold)
    if absmax_x is None:
        outliers = jnp.zeros((*w.shape[:-2], w.shape[-2]), bool)
    else:
        said = "one magnitude for each input"
        x = _matrix.as_statistic(
            absmax_x, "absmax_x", "llm_int8", shape=w.shape[-2:-1], said=said, w=w
        )
        outliers = jnp.broadcast_to(~(x < threshold), (*w.shape[:-2], w.shape[-2]))
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
    """`x @ w` with the columns of x that hold an outlier, `max_t |x_tj| >= threshold`, in high precision.

    The other columns are quantized row by row, over what is left of each row, multiply the codes of w in int32, and
    are scaled by both scales. With threshold 0 it is the product in high precision.

    As it stands this is `x @ qt.with_activation("int8", outliers=threshold)`, the product of layers, and says which
    columns were outliers. A layer's product has no more settings than that; two are here. Which columns are outliers
    depends on the data, and compiled shapes cannot, so x is cut in two by a mask and both products have all columns;
    `num_outliers=k` gathers the k columns of largest magnitude, so that the second one costs k columns, and counts
    outliers beyond k, which stay in int8, in `info.num_missed`. `keep` gives that product the weight before rounding.

    Args:
      x: float `[..., in]`; outliers are looked for over all leading axes.
      w: `[in, out]`: a QTensor (from `llm_int8`, or any whose scales are shared along the input), or a float
        array, which is quantized here as "int8" and kept for the outlier columns.
      threshold: at least 0; None takes what is attached to the QTensor, or 6.0.
      num_outliers: None, or k at least 0.
      keep: float `[in, out]`, the rows that outlier columns meet; None dequantizes the rows of codes, as bitsandbytes
        does unless it is told to keep float weights.
      activation: how the other columns of x are quantized; None takes what is attached to the QTensor, or "int8".

    Returns:
      `(y, info)`: `[..., out]` in the dtype that x and w promote to, both sums added in float32; and an
      `LLMInt8MatmulInfo`.

    Raises:
      TypeError: x is not a float array.
      ValueError: shapes that do not meet; a QTensor with batch axes; arguments out of range.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq.methods import llm_int8_matmul
      >>> x = jnp.array([[0.5, -40.0, 1.0]])
      >>> y, info = llm_int8_matmul(x, jaxq.quantize(jnp.eye(3), "int8"))
      >>> [round(v, 3) for v in y[0].tolist()], info.outliers.tolist()
      ([0.504, -40.0, 1.0], [False, True, False])

    References:
      Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022, section 3.
    """
    if not isinstance(w, QTensor):
        keep = _matrix.as_weight(w, "llm_int8_matmul") if keep is None else keep
        w, _ = llm_int8(w)
    if threshold is None:
        outliers = w.meta.outliers
        threshold = _THRESHOLD if outliers is None else outliers
    check_values("llm_int8_matmul", _OPTIONS, threshold=threshold)
    geometry = w.meta.geometry
    if w.batch_shape or geometry.order != (-1, -2) or geometry.num_contracted != 1:
        raise ValueError(
            f"llm_int8_matmul: w must be [in, out] quantized with contracting=-2, got {w!r}."
        )
    num_in, _ = w.shape
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"llm_int8_matmul: x must be a float array, got {_matrix.describe(x)}."
        )
    if x.ndim < 1 or x.shape[-1] != num_in:
        raise ValueError(
            f"llm_int8_matmul: x must be [..., {num_in}] to meet w, got x: {_matrix.describe(x)}, {w!r}."
        )
    if keep is not None:
        keep = jnp.asarray(keep)
        if keep.shape != w.shape or not jnp.issubdtype(keep.dtype, jnp.floating):
            raise ValueError(
                f"llm_int8_matmul: keep must be the float weight {list(w.shape)}, got {_matrix.describe(keep)}."
            )
    if num_outliers is not None and num_outliers < 0:
        raise ValueError(
            f"llm_int8_matmul: num_outliers must be None or at least 0, got {num_outliers}."
        )
    activation = activation or w.meta.activation or "int8"

    magnitude = jnp.max(jnp.abs(x.reshape(-1, num_in)), axis=0, initial=0.0)  # [in]
    outliers = reached = ~(magnitude < threshold)  # NaN is an outlier
    if num_outliers is not None:
        _, columns = lax.top_k(magnitude, min(num_outliers, num_in))
        chosen = reached[columns]
        outliers = jnp.zeros(num_in, bool).at[columns].set(chosen)
        taken = _where(chosen, jnp.take(x, columns, axis=-1))
        rows = (
            _rows(w.with_activation(None), columns)
            if keep is None
            else jnp.take(keep, columns, axis=0)
        )
        y = _product(_where(~outliers, x), w.with_activation(activation)) + _product(
            taken, rows
        )
    elif keep is not None:
        y = _product(_where(~outliers, x), w.with_activation(activation)) + _product(
            _where(outliers, x), keep
        )
    else:
        y = _product(x, w.with_activation(activation, outliers=threshold))
    dtype = jnp.promote_types(x.dtype, w.dtype)
    total = jnp.sum(reached, dtype=jnp.int32)
    info = LLMInt8MatmulInfo(
        outliers, total, total - jnp.sum(outliers, dtype=jnp.int32)
    )
    return y.astype(dtype), info


def _where(columns: jax.Array, x: jax.Array) -> jax.Array:
    """The columns of x chosen by bool `[in]`, 0 elsewhere."""
    chosen = columns.reshape((1,) * (x.ndim - 1) + columns.shape)
    return jnp.where(chosen, x, jnp.zeros((), x.dtype))


def _product(x: jax.Array, w: QTensor | jax.Array) -> jax.Array:
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


def _rows(qt: QTensor, columns: jax.Array) -> jax.Array:
    """`dequantize(qt)[columns]` in float32; of codes with one scale for all rows, only those rows are decoded."""
    geometry = qt.meta.geometry
    whole = (
        not geometry.flat
        and geometry.block_shape[-1] is None
        and qt.meta.layout == "rows"
    )
    if (
        not whole
        or qt.meta.packing is not formats.Packing.NONE
        or geometry.num_blocks[-1] != 1
    ):
        return jnp.take(dequantize(qt, dtype=jnp.float32), columns, axis=0)
    taken = dataclasses.replace(geometry, shape=(columns.shape[0], geometry.shape[1]))
    data = jnp.take(qt.data, columns, axis=-1)
    return dequantize(
        dataclasses.replace(
            qt, data=data, meta=dataclasses.replace(qt.meta, geometry=taken)
        ),
        dtype=jnp.float32,
    )


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
