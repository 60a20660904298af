"""Quantization of a matrix in numpy, written independently of jaxq.

It uses neither jax nor the blocking code of jaxq, and computes in float32. A matrix has
rows `[n, k]`: the kept axis first, the contracted axis last.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxq import QuantSpec, formats

F32 = np.float32
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    F32,
)  # fmt: skip
# floor(log2(largest element)) in table 1 of the OCP microscaling specification. Its
# int8 elements are code / 64.
EMAX = {
    "float8_e5m2": 15,
    "float8_e4m3fn": 8,
    "float6_e3m2fn": 4,
    "float6_e2m3fn": 2,
    "float4_e2m1fn": 2,
    "int8": 6,
}


class Reference(NamedTuple):
    """The expected result for rows `[n, k]`."""

    codes: np.ndarray  # [n, k], integers
    scale: np.ndarray  # [blocks], float32, dequantized
    zero_point: np.ndarray | None  # [blocks]
    values: np.ndarray  # [n, k], float32


def quantize(rows: np.ndarray, spec: QuantSpec, *, positive: bool = False) -> Reference:
    """Codes, scales and values by definition; `positive`: the rows are scales."""
    rows = rows.astype(F32)
    blocks, true = _blocks(rows, spec)
    low, high = blocks.min(1), blocks.max(1)
    magnitude = np.maximum(high, -low)
    fmt = spec.fmt
    if not spec.symmetric:
        low, high = np.minimum(low, F32(0)), np.maximum(high, F32(0))
        ideal = (high - low) * F32(1 / (fmt.max - fmt.min))
    elif spec.scale_rule == "absmean":
        ideal = np.array(
            [
                np.abs(b[:n].astype(np.float64)).mean()
                for b, n in zip(blocks, true, strict=True)
            ],
            F32,
        )
    elif spec.scale_rule == "signed_extreme":
        ideal = np.where(high >= -low, high, low) * F32(1 / fmt.min)
    elif spec.scale_rule == "mx_floor":
        ideal = np.where(
            magnitude > 0,
            F32(2)
            ** (np.floor(np.log2(magnitude + (magnitude == 0))) - EMAX[fmt.name]),
            0,
        )
    else:
        ideal = magnitude * F32(1 / fmt.max)
    scale = _stored(ideal.astype(F32), spec, rows.shape[0])
    with np.errstate(divide="ignore"):
        inverse = np.where(abs(scale) >= F32(2.0**-126), F32(1) / scale, F32(0))
    y = blocks * inverse[:, None]
    zero = None
    if not spec.symmetric:
        zero = np.clip(fmt.min - np.rint(low * inverse), fmt.min, fmt.max)
        codes = np.clip(np.rint(y) + zero[:, None], fmt.min, fmt.max)
        values = (codes - zero[:, None]).astype(F32) * scale[:, None]
    else:
        if spec.scale_rule == "ttq":
            y = np.where(
                np.abs(blocks) > F32(0.05) * magnitude[:, None], np.sign(blocks), 0
            )
        if positive:
            y = np.where(blocks > 0, np.maximum(y, F32(fmt.smallest_positive)), y)
        codes, numbers = encode(y, fmt, wide=spec.scale_rule == "signed_extreme")
        if spec.scale_rule == "ttq":
            by_sign = [
                np.where(codes == sign, blocks.astype(np.float64), np.nan)
                for sign in (-1, 1)
            ]
            means = np.stack(
                [np.nanmean(h, 1, keepdims=True) * inverse[:, None] for h in by_sign]
            )
            numbers = np.choose(codes.astype(int) + 1, (means[0], 0, means[1])).astype(
                F32
            )
        values = numbers * scale[:, None]
    return Reference(
        _unblock(codes, rows.shape, spec),
        scale,
        zero,
        _unblock(values, rows.shape, spec),
    )


def encode(
    y: np.ndarray, fmt: formats.Format, *, wide: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(code, value) of the format's element nearest to each y.

    `wide`: integers may have their most negative code.
    """
    if fmt.kind == "integer":
        low = fmt.min if wide else -fmt.max if fmt.min < 0 else 0
        numbers = np.clip(np.rint(y), low, fmt.max)
        return numbers, numbers.astype(F32)
    if fmt.kind == "float":
        cast = np.clip(y, -fmt.max, fmt.max).astype(getattr(ml_dtypes, fmt.name))
        return cast.view(np.uint8), cast.astype(F32)
    table = NF4 if fmt.name == "nf4" else fmt.values()
    edges = fmt.boundaries or (table[:-1] + table[1:]) / F32(2)
    codes = np.searchsorted(np.asarray(edges, F32), y, side="left")
    return codes, table[codes]


def _stored(ideal: np.ndarray, spec: QuantSpec, num_rows: int) -> np.ndarray:
    """Scales after they are stored in a dtype or quantized, and read back."""
    if isinstance(spec.scale, QuantSpec):
        return quantize(
            ideal.reshape(num_rows, -1), spec.scale, positive=True
        ).values.reshape(-1)
    if spec.scale == "float32":
        return np.where(ideal == 0, F32(0), np.maximum(ideal, F32(2.0**-126)))
    if spec.scale == "float8_e8m0fnu":
        return np.where(ideal == 0, F32(2.0**-127), ideal)
    dtype = np.dtype(getattr(ml_dtypes, spec.scale, spec.scale))
    return np.minimum(ideal, F32(ml_dtypes.finfo(dtype).max)).astype(dtype).astype(F32)


def _blocks(rows: np.ndarray, spec: QuantSpec) -> tuple[np.ndarray, list[int]]:
    """Blocks `[num_blocks, size]` padded with zeros, and the length of each."""
    kind, size = (
        type(spec.granularity).__name__,
        getattr(spec.granularity, "size", None),
    )
    lines = {"PerTensor": rows.reshape(1, -1), "PerFlat": rows.reshape(1, -1)}.get(
        kind, rows
    )
    size = min(size or lines.shape[1], lines.shape[1])
    cuts = [
        line[i : i + size] for line in lines for i in range(0, lines.shape[1], size)
    ]
    return np.stack([np.pad(c, (0, size - len(c))) for c in cuts]), [
        len(c) for c in cuts
    ]


def _unblock(blocks: np.ndarray, shape: tuple[int, int], spec: QuantSpec) -> np.ndarray:
    lines = (
        1 if type(spec.granularity).__name__ in ("PerTensor", "PerFlat") else shape[0]
    )
    return blocks.reshape(lines, -1)[:, : shape[0] * shape[1] // lines].reshape(shape)
