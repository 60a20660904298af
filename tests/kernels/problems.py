"""Products for kernels: facts, shapes, random arrays, float64 results, lowered text."""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from jaxq.kernels import Problem
from jaxq.kernels._registry import READS_SCALES_AS_STORED

# Bits, signed, codebook, zero points.
CODES = {
    "int4": (4, True, False, False),
    "uint4": (4, False, False, True),
    "codebook4": (4, False, True, False),
    "int8": (8, True, False, False),
    "uint8": (8, False, False, True),
}
CUSTOM_CALL = {
    "tpu": "tpu_custom_call",
    "mosaic_gpu": "mosaic_gpu",
    "triton": "triton",
    "triton_int8": "triton",
}


def problem(
    codes: str,
    *,
    m: int = 16,
    group: int | None = 128,
    k: int = 4096,
    n: int = 4096,
    **other,
) -> Problem:
    """A product. `group=None` means one scale per column of the result."""
    bits, signed, codebook, zero_point = CODES[codes]
    facts = {
        "x_dtype": "bfloat16",
        "scale_dtype": "float32",
        "out_dtype": "bfloat16",
        "zero_point": zero_point,
    }
    facts |= {
        "e": 1,
        "bits": bits,
        "signed": signed,
        "codebook": codebook,
        "layout": "rows",
    } | other
    return Problem(m=m, k=k, n=n, group=group or k, **facts)


def specs(p: Problem) -> list[jax.ShapeDtypeStruct | None]:
    """Shapes of x, data, scale, zero_point and codebook."""
    ints = "int8" if p.signed else "uint8"
    width, scales = p.k * p.bits // 8, (p.e, p.num_groups, p.n)
    data = (p.e, p.n, width) if p.layout == "rows" else (p.e, width, p.n)
    return [
        jax.ShapeDtypeStruct((p.e, p.m, p.n if p.transposed else p.k), p.x_dtype),
        jax.ShapeDtypeStruct(data, "uint8" if p.bits == 4 else ints),
        jax.ShapeDtypeStruct(scales, p.scale_dtype) if p.scale_dtype else None,
        jax.ShapeDtypeStruct(scales, ints) if p.zero_point else None,
        jax.ShapeDtypeStruct((p.e, 16), "float32") if p.codebook else None,
    ]


def operands(
    p: Problem, seed: int = 0, *, powers_of_two: bool = False
) -> tuple[list[jax.Array | None], np.ndarray]:
    """Arrays for a kernel, and their product in float64.

    With `powers_of_two` all scales are powers of two, so scaling rounds nothing.
    """
    rng = np.random.default_rng(seed)
    shapes = specs(p)
    low = -(1 << (p.bits - 1)) if p.signed else 0
    integers = functools.partial(rng.integers, low, low + (1 << p.bits))
    codes, scales = integers((p.e, p.k, p.n)), (p.e, p.num_groups, p.n)
    if p.x_dtype == "int8":
        x = jnp.asarray(rng.integers(-128, 128, shapes[0].shape), jnp.int8)
    else:
        x = jnp.asarray(rng.normal(size=shapes[0].shape), p.x_dtype)
    drawn = (
        np.exp2(rng.integers(-1, 2, scales))
        if powers_of_two
        else rng.uniform(0.5, 1.5, scales)
    )
    scale = jnp.asarray(drawn, p.scale_dtype) if p.scale_dtype else None
    zero = integers(scales) if p.zero_point else None
    codebook = (
        rng.normal(size=(p.e, 16)).astype(np.float32) if p.codebook else None
    )  # unsorted, as any table may be

    weights = codes.astype(np.float64)
    if codebook is not None:
        weights = np.stack(
            [
                table.astype(np.float64)[c]
                for table, c in zip(codebook, codes, strict=True)
            ]
        )
    if zero is not None:
        weights -= np.repeat(zero, p.group, 1)[:, : p.k]
    if scale is not None:
        weights *= np.repeat(np.asarray(scale, np.float64), p.group, 1)[:, : p.k]

    data = codes if p.bits == 8 else _packed(codes & 15, p.unit)
    data = data if p.layout == "columns" else data.swapaxes(1, 2)
    arrays = [x, jnp.asarray(data, shapes[1].dtype), scale]
    arrays += [None if zero is None else jnp.asarray(zero, shapes[3].dtype)]
    arrays += [None if codebook is None else jnp.asarray(codebook)]
    weights = weights.swapaxes(1, 2) if p.transposed else weights
    return arrays, np.asarray(x, np.float64) @ weights


def _packed(codes: np.ndarray, unit: int | None) -> np.ndarray:
    """Packs 4-bit codes along axis 1: neighbours, or the two halves of a unit."""
    if unit is None:
        return codes[:, 0::2] | codes[:, 1::2] << 4
    e, k, n = codes.shape
    whole = k // unit * unit
    if whole < k:  # the codes that are left are a shorter unit
        parts = [(codes[:, :whole], unit), (codes[:, whole:], k - whole)]
        return np.concatenate([_packed(*part) for part in parts], axis=1)
    halves = codes.reshape(e, k // unit, 2, unit // 2, n)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(e, k // 2, n)


def for_kernel(kernel, arrays: list) -> list:
    """The operands as a kernel wants them: some want scales as `[e, n, g]`."""
    name = kernel.__name__.rpartition("._")[2]
    if name not in READS_SCALES_AS_STORED:
        return arrays
    x, data, *scales, codebook = arrays

    def swapped(a):
        if a is None:
            return None
        shape = (a.shape[0], a.shape[2], a.shape[1])
        if isinstance(a, jax.ShapeDtypeStruct):
            return a.update(shape=shape)
        return jnp.swapaxes(a, 1, 2)

    return [x, data, *map(swapped, scales), codebook]


def error(y: jax.Array, expected: np.ndarray) -> float:
    """The error relative to the Frobenius norm of the expected result."""
    return float(
        np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
    )


def lowered(kernel, p: Problem, tiles: dict, device: str = "NVIDIA H200") -> str:
    """The program that a kernel lowers to for its platform, on any machine."""
    platform = "tpu" if "._tpu" in kernel.__name__ else "cuda"
    context = contextlib.nullcontext()
    if platform == "cuda" and jax.__version_info__ >= (
        0,
        11,
    ):  # Triton asks for the device
        from jax._src.mesh import AbstractDevice

        device = AbstractDevice(device_kind=device, num_cores=132, platform="gpu")
        context = jax.sharding.use_abstract_mesh(
            AbstractMesh((1,), ("x",), abstract_device=device)
        )
    with context, warnings.catch_warnings():
        # The primitives ignore this warning, and here the kernel is called alone.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        matmul = functools.partial(kernel.matmul, problem=p, tiles=tiles)
        return (
            jax.jit(matmul)
            .trace(*for_kernel(kernel, specs(p)))
            .lower(lowering_platforms=(platform,))
            .as_text()
        )
