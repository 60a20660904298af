"""x made of float8 codes: no kernel rounds the product with integer codes."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import kernels
from jaxq.kernels import _mosaic_gpu, _tpu, _triton
from jaxq.ops._weight_rows import weight_rows
from tests.arrays import normal_with_outliers
from tests.kernels.problems import error, for_kernel, operands, problem
from tests.tables import thinned

KERNELS = {"tpu": _tpu, "mosaic_gpu": _mosaic_gpu, "triton": _triton}
DEVICE = {"tpu": "TPU v6 lite", "mosaic_gpu": "NVIDIA H200", "triton": "NVIDIA L4"}
INTEGERS = ("int4", "uint4", "int8")


def exact_problem(codes: str, m: int = 16, group: int = 64, **other):
    facts = {
        "k": 256,
        "n": 128,
        "out_dtype": "float32",
        "x_codes": "float8_e4m3fn",
    } | other
    return problem(codes, m=m, group=group, **facts)


@pytest.mark.parametrize(
    ("name", "codes", "m"),
    thinned(
        itertools.product(KERNELS, INTEGERS, (16, 40)),
        [("tpu", "int4", 16), ("mosaic_gpu", "int4", 40), ("triton", "uint4", 16)],
    ),
)
def test_kernels_against_float64(name, codes, m):
    kernel, p = KERNELS[name], exact_problem(codes, m)
    assert kernel.why_not(p, DEVICE[name]) is None
    (x, *leaves), _ = operands(p)
    x = x.astype(jnp.float8_e4m3fn).astype(jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ weight_of(p)
    y = kernel.matmul(
        *for_kernel(kernel, [x, *leaves]),
        problem=p,
        tiles=kernel.default_tiles(p, DEVICE[name]),
        interpret=True,
    )
    assert error(y, expected) < 1e-6


@pytest.mark.parametrize("group", [32, 128, 256])
@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("codes", thinned(["int4", "uint4"], ["uint4"]))
def test_a_float8_matrix_unit(codes, fmt, group):
    """TPU v7x multiplies float8 by float8. Neither operand is rounded."""
    p = exact_problem(codes, 20, group, x_codes=fmt)
    (x, *leaves), _ = operands(p)
    x = x.astype(fmt)
    tiles = _tpu.default_tiles(p, "TPU7x")
    assert (tiles["body"], tiles["bm"]) == ("float8", 32)
    y = _tpu.matmul(x, *leaves, problem=p, tiles=tiles, interpret=True)
    assert error(y, np.asarray(x, np.float64) @ weight_of(p)) < 1e-6
    product = functools.partial(_tpu.matmul, problem=p, tiles=tiles)
    text = str(jax.make_jaxpr(product)(x, *leaves))
    assert re.search(r"f8_e4m3fn\[\d+,128\]", text)  # a tile of the weight


def weight_of(p) -> np.ndarray:
    """The decoded weight `[e, k, n]` in float64."""
    (_, data, scale, zero, _), _ = operands(p)
    codes = np.asarray(data, np.int32).swapaxes(1, 2)
    if p.bits == 4:
        pairs = np.stack([codes & 15, codes >> 4], axis=2)
        codes = pairs.reshape(p.e, p.k, p.n)
        codes = (codes ^ 8) - 8 if p.signed else codes
    weight = codes.astype(np.float64)
    if zero is not None:
        weight -= np.repeat(np.asarray(zero, np.float64), p.group, 1)
    return weight * np.repeat(np.asarray(scale, np.float64), p.group, 1)


@pytest.mark.parametrize("group", [64, 128, 256])
@pytest.mark.parametrize("m", [1, 16, 512])
def test_no_tiles_round_weights(group, m):
    """bfloat16 activations would use other tiles and other bodies."""
    for device in ("TPU v5 lite", "TPU v6 lite", "TPU7x", None):
        p = exact_problem("int4", m, group)
        body = "float8" if device == "TPU7x" else "post"
        assert _tpu.default_tiles(p, device)["body"] == body
    sizes = _mosaic_gpu._block_sizes(p, _mosaic_gpu.default_tiles(p, None))
    assert sizes.scaling == ("result" if group == 256 else "sums")
    arrays, _ = operands(p)
    tiles = {"bm": 16, "bk": 4096, "bn": 512, "body": "pre"}
    with pytest.raises(ValueError, match='Use "post"'):
        _tpu.matmul(*arrays, problem=p, tiles=tiles, interpret=True)


@pytest.mark.parametrize(
    ("preset", "fmt"),
    thinned(
        itertools.product(
            ("int4", "uint4", "int3", "uint5"), ("float8_e4m3fn", "float8_e4m3fnuz")
        ),
        [("uint4", "float8_e4m3fn"), ("int4", "float8_e4m3fnuz")],
    ),
)
@pytest.mark.parametrize("granularity", [jaxq.PerGroup(64), jaxq.PerChannel()])
def test_plain_xla_on_an_accelerator(preset, fmt, granularity):
    """It multiplies float8, or bfloat16 if float8 does not hold the codes."""
    spec = jaxq.QuantSpec(preset, granularity, symmetric=preset.startswith("int"))
    qt = jaxq.quantize(normal_with_outliers(256, 128), spec)
    rows, meta = weight_rows(qt)
    x = normal_with_outliers(20, 256).astype(fmt)
    call, leaves = kernels._call.with_leaves(
        kernels.Call(dataclasses.replace(meta, block_bytes=2**28), (), "float32"), rows
    )
    leaves = [leaf[None] for leaf in leaves]
    y = kernels.xla_form(x[None], *leaves, call=call)[0]
    weight = np.asarray(jaxq.dequantize(qt, dtype=jnp.float32), np.float64)
    assert error(y, np.asarray(x, np.float64) @ weight) < 1e-6
    text = str(
        jax.make_jaxpr(lambda *a: kernels.xla_form(*a, call=call))(x[None], *leaves)
    )
    is_native = fmt == "float8_e4m3fn" and preset != "uint5"
    name = "f8_e4m3fn" if is_native else "bf16"
    assert f":{name}[" in text
    assert "bf16" not in text or not is_native
