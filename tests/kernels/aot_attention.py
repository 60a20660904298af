"""Compiles the attention kernels ahead of time, with no TPU and no GPU.

    python -m tests.kernels.aot_attention tpu v6e:2x2
    python -m tests.kernels.aot_attention cuda

The first needs libtpu, which comes with jax[tpu]. For the second see `aot_gpu.py`. It
prints a line for each case, "ok" or "FAILED" with the error. A case fails as well if
XLA writes the codes in another order before the kernel reads them.
"""

import os
import re
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # no search for devices
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxq
from tests.kernels.attention_cases import cache_of

# XLA's own fusions are called triton as well.
CUSTOM_CALL = {"tpu": "tpu_custom_call", "cuda": "xla.gpu.triton"}
# Operations that would write codes in another order. A prefetch into the memory of the
# chip (copy-start, copy-done) keeps the order.
MOVES = ("copy", "transpose", "reshape", "fusion", "pad", "concatenate")
# One scale for each token of a head of 256 channels.
ONE_SCALE = jaxq.QuantSpec("int4", jaxq.PerGroup(256))
# The cache, queries of each slot, and query heads of each key head.
CASES = {
    "int8": ({"spec": "int8", "dtype": "bfloat16"}, 1, 8),
    "int4": ({"spec": "int4", "dtype": "bfloat16"}, 1, 8),
    "int4 32 queries": ({"spec": "int4", "dtype": "bfloat16"}, 32, 8),
    "int4 window": ({"spec": "int4", "dtype": "bfloat16", "window": 1000}, 1, 4),
    "int8 float32": ({"spec": "int8", "dtype": "float32"}, 1, 4),
    "int4 float16": ({"spec": "int4", "dtype": "float16"}, 1, 4),
    "int4 heads of 256": ({"spec": ONE_SCALE, "dtype": "bfloat16", "h": 256}, 1, 2),
    "int8 groups of 128": ({"spec": "int8", "dtype": "bfloat16", "group": 128}, 1, 8),
    "int4 short": ({"spec": "int4", "dtype": "bfloat16", "length": 96}, 1, 8),
}


def device_of(platform: str, topology: str):
    if platform == "tpu":
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology
        ).devices[0]
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    return topologies.get_topology_desc(
        "", "cuda", topology="1x1x1", target_config=target
    ).devices[0]


def problem_of(platform: str, device, name: str) -> str | None:
    """Compiles one case. Returns what is wrong, or None."""
    sizes, t, r = CASES[name]
    sizes = {"length": 8200, "batch": 8, "num_heads": 8} | sizes
    cache = jax.eval_shape(lambda: cache_of(**sizes))
    b, m, _, h = cache.recent_keys.shape
    q = jax.ShapeDtypeStruct((b, t, m * r, h), cache.dtype)
    mesh = Mesh(np.array([device]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (cache, q)
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        attend = jax.jit(lambda cache, q: cache.attend(q))
        text = attend.lower(*arguments).compile().as_text()
    if CUSTOM_CALL[platform] not in text:
        return "no kernel runs"
    codes = {cache.keys.data.size, cache.values.data.size}
    for kind, shape, operation in re.findall(
        r"= ([us]8)\[([\d,]+)\]\S* ([\w-]+)\(", text
    ):
        size = int(np.prod([int(n) for n in shape.split(",")]))
        if size in codes and operation in MOVES:
            return f"codes {kind}[{shape}] are moved by {operation}"
    return None


def main(platform: str, topology: str = "", *names: str) -> None:
    device = device_of(platform, topology)
    compiled = 0
    for name in names or CASES:
        try:
            problem = problem_of(platform, device, name)
        except Exception as error:  # any error of the compiler is the result
            problem = " ".join(str(error).split())[:700]
        compiled += problem is None
        print(f"ok {name}" if problem is None else f"FAILED {name}: {problem}")
        sys.stdout.flush()
    print(f"{compiled} compiled for {device.device_kind}")


if __name__ == "__main__":
    main(*sys.argv[1:])
