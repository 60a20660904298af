"""Run a language model on eight devices: tensor parallel, and fully sharded (FSDP).

    pip install "jaxq[hf]"
    python examples/08_on_a_mesh.py

On a CPU the script runs on eight virtual devices. It saves the small Llama in
examples/tiny_llama in int8 and in int4. Then it loads the float model and both
quantized models straight onto a mesh of devices. Each device gets its own part of each
weight. A row of the table has:

- the bytes of weights on one device. Tensor parallel replicates the embedding table.
- the perplexity on held-out text. The number in brackets is that of the same model on
  one device.
- whether the model continues prompts with the same tokens as on one device. The
  continuation uses a KV cache in int8, and the devices share the cache too.
"""

# %% Eight devices
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq

jax.config.update("jax_num_cpu_devices", 8)  # before jax looks for devices
HERE = Path(__file__).parent
# One model on little text. This shows that the example runs.
FAST = "--fast" in sys.argv
FORMATS = ("int4",) if FAST else ("int8", "int4")
NUM_ROWS, NUM_TOKENS = (8, 64) if FAST else (32, 256)

# %% Two ways to shard a model
# A weight is [in, out]. Tensor parallel: the first matrices of a block are split by
# their outputs, and the next matrix by its inputs. So one sum over devices for each
# block is enough.
TENSOR_PARALLEL = {
    "**/q_proj/kernel": P(None, "tensor"),
    "**/k_proj/kernel": P(None, "tensor"),
    "**/v_proj/kernel": P(None, "tensor"),
    "**/o_proj/kernel": P("tensor", None),
    "**/gate_proj/kernel": P(None, "tensor"),
    "**/up_proj/kernel": P(None, "tensor"),
    "**/down_proj/kernel": P("tensor", None),
    "lm_head/kernel": P(None, "tensor"),
    "**": P(),
}
# Fully sharded: every device has a part of every matrix, and gets the other parts when
# it needs them. The outputs are split, so no shard cuts a group of int4 codes.
FULLY_SHARDED = {
    "**/kernel": P(None, "data"),
    "**/embedding": P(None, "data"),
    "**": P(),
}


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    """A mesh with the axes "data" and "tensor". XLA chooses shardings inside a jit."""
    return jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


LAYOUTS = {
    "tensor parallel": (mesh_of(4, 2), TENSOR_PARALLEL),
    "fully sharded": (mesh_of(8, 1), FULLY_SHARDED),
}

# %% The model on one device, and the files
float_model, tokenizer = jaxq.models.load(HERE / "tiny_llama")
text = (HERE / "heldout.txt").read_text()
tokens = np.asarray(tokenizer.encode(text).ids, np.int32)
tokens = tokens[: NUM_ROWS * NUM_TOKENS].reshape(NUM_ROWS, NUM_TOKENS)
prompts = tokens[:8, :16]
folder = Path(tempfile.mkdtemp())
on_one_device = {"float32": float_model}
for name in FORMATS:
    on_one_device[name], _ = jaxq.quantize_model(float_model, name)
    jaxq.save(folder / f"{name}.safetensors", on_one_device[name])


def load_onto(name: str, mesh: jax.sharding.Mesh, rules: dict[str, P]) -> nnx.Module:
    """The model from its file. Each device gets its own part of each weight."""
    if name == "float32":
        return jaxq.models.load(HERE / "tiny_llama", mesh=mesh, rules=rules)[0]
    # The file has the numbers. The model says how its layers compute.
    path = folder / f"{name}.safetensors"
    return jaxq.load(path, into=float_model, mesh=mesh, rules=rules)


# %% What is measured
@nnx.jit
def loss_of(model: nnx.Module, tokens: jax.Array) -> jax.Array:
    """The mean loss of the next token, in nats."""
    logits = model(tokens[:, :-1])
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)
    return -picked.mean()


def bytes_on_one_device(model: nnx.Module) -> int:
    leaves = [x for x in jax.tree.leaves(nnx.state(model)) if isinstance(x, jax.Array)]
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


def continued(model: nnx.Module, prompts: jax.Array) -> np.ndarray:
    """Sixteen more tokens for each prompt."""
    return np.asarray(jaxq.models.generate(model, prompts, 16, cache="int8"))


# %% Every model in every layout
print(f"{'model':8s} {'layout':16s} {'bytes':>10s} {'perplexity':>19s}  same tokens")
for name, model in on_one_device.items():
    expected_perplexity = float(jnp.exp(loss_of(model, tokens)))
    expected_tokens = continued(model, prompts)
    num_bytes = bytes_on_one_device(model)
    print(f"{name:8s} {'one device':16s} {num_bytes:10,d} {expected_perplexity:10.3f}")
    for layout, (mesh, rules) in LAYOUTS.items():
        sharded = load_onto(name, mesh, rules)
        rows = NamedSharding(mesh, P("data"))
        perplexity = float(jnp.exp(loss_of(sharded, jax.device_put(tokens, rows))))
        new_tokens = continued(sharded, jax.device_put(prompts, rows))
        is_same = "yes" if (new_tokens == expected_tokens).all() else "no"
        num_bytes = bytes_on_one_device(sharded)
        shown = f"{perplexity:10.3f} ({expected_perplexity:.3f})"
        print(
            f"{name:8s} {layout:16s} {num_bytes:10,d} {shown:>19s}  {is_same}",
            flush=True,
        )
