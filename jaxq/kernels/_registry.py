"""The Pallas kernels for products of floats or int8 codes with a quantized weight.

Each kernel is one module of this folder. The module has three functions:
`why_not(problem, device_kind)`, `default_tiles(problem, device_kind)` and `matmul(x,
data, scale, zero_point, codebook, *, problem, tiles, index, interpret)`.

Experts, attention, codes with scales in groups and the quantization of activations have
kernels too. The file with the primitive of each lists them.
"""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType

# The kernels of each platform, in the order in which `choose` tries them.
KERNELS = {"tpu": ("tpu",), "cuda": ("mosaic_gpu", "triton", "triton_int8")}
KERNEL_NAMES = tuple(itertools.chain.from_iterable(KERNELS.values()))
# The kernels of each platform for products of the backward pass (`Problem.transposed`).
TRANSPOSED_KERNELS = {"tpu": ("tpu_transposed",), "cuda": ("triton_transposed",)}
# The kernels that read codes and scales as they are stored: HALVES units (see
# `Problem.unit`), and scales `[e, n, g]`. Other kernels get x in the order of the codes
# in memory, and scales `[e, g, n]`.
READS_AS_STORED = ("mosaic_gpu", "triton_int8")
# The kernels that also read x as float8. Other kernels get float8 codes as bfloat16.
READS_FLOAT8 = ("tpu",)
# The kernels whose interpreter has effects. `matmul_p` cannot have effects.
EFFECTFUL_INTERPRETERS = ("mosaic_gpu",)


def kernel_module(name: str) -> ModuleType:
    """Returns the module of a kernel.

    The import is late because Pallas is slow to import, and most programs need no
    kernel.
    """
    return importlib.import_module(f"jaxq.kernels._{name}")


def kernels_for(platform: str, *, transposed: bool) -> tuple[str, ...]:
    """Returns the names of a platform's kernels for a product, in their order."""
    kernels = TRANSPOSED_KERNELS if transposed else KERNELS
    return kernels.get(platform, ())


def platform_of(name: str) -> str:
    """Returns the platform that a kernel runs on."""
    return next(platform for platform, names in KERNELS.items() if name in names)
