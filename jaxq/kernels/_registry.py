"""The Pallas kernels by family and platform.

Each kernel is one module of this folder. All kernels of a family compute the same kind
of product, from a problem of one type:

| family | problem | what is computed |
|---|---|---|
| "product" | `Problem` | floats or int8 codes times a quantized weight |
| "transposed" | `Problem` | likewise, summed over the rows of codes: backward pass |
| "ragged" | `Problem` | rows sorted by expert times a stack of weights |
| "codes" | `CodesProblem` | codes times codes, with scales in groups |
| "activation" | `ActivationProblem` | codes and scales of an activation |
| "attention" | `AttentionProblem` | attention over the groups of a KV cache |

The module of every kernel has a function `why_not(problem, device_kind)`. The modules
of products also have `default_tiles(problem, device_kind)` and `matmul(x, data, scale,
zero_point, codebook, *, problem, tiles, index, interpret)`. The file with the primitive
of another family calls the other functions of its kernels.
"""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType
from typing import Literal

Family = Literal["product", "transposed", "ragged", "codes", "activation", "attention"]

# The platforms that have kernels, as jax names them when it lowers a program.
PLATFORMS = ("tpu", "cuda")
# The kernels of each family and platform, in the order in which `choose` tries them.
KERNELS: dict[Family, dict[str, tuple[str, ...]]] = {
    "product": {"tpu": ("tpu",), "cuda": ("mosaic_gpu", "triton", "triton_int8")},
    "transposed": {"tpu": ("tpu_transposed",), "cuda": ("triton_transposed",)},
    "ragged": {"tpu": ("ragged_tpu",), "cuda": ("ragged_triton",)},
    "codes": {"tpu": ("codes_tpu",), "cuda": ("codes_triton",)},
    "activation": {"tpu": ("activation_tpu",), "cuda": ("activation_triton",)},
    "attention": {"tpu": ("attention_tpu",), "cuda": ("attention_triton",)},
}
# The kernels of the family "product". A caller of `quantized_matmul` can name one.
KERNEL_NAMES = tuple(itertools.chain.from_iterable(KERNELS["product"].values()))
# The kernels that read HALVES units as they are stored (see `Problem.unit`). Other
# kernels get x in the order of the codes in memory.
READS_UNITS = ("mosaic_gpu", "triton_int8", "codes_triton")
# The kernels of products that read scales as they are stored, `[e, n, g]`. Other
# kernels of products get `[e, g, n]`.
READS_SCALES_AS_STORED = ("mosaic_gpu", "triton_int8", "ragged_triton")
# The kernels that also read x as float8. Other kernels get float8 codes as bfloat16.
READS_FLOAT8 = ("tpu", "ragged_tpu")
# The kernels whose interpreter has effects. `matmul_p` cannot have effects.
EFFECTFUL_INTERPRETERS = ("mosaic_gpu",)


def kernel_module(name: str) -> ModuleType:
    """Returns the module of a kernel.

    The import is late because Pallas is slow to import, and most programs need no
    kernel.
    """
    return importlib.import_module(f"jaxq.kernels._{name}")


def kernels_for(platform: str, family: Family) -> tuple[str, ...]:
    """Returns the names of a platform's kernels of a family, in their order."""
    return KERNELS[family].get(platform, ())


def platform_of(name: str) -> str:
    """Returns the platform that a kernel of the family "product" runs on."""
    kernels = KERNELS["product"]
    return next(platform for platform, names in kernels.items() if name in names)
