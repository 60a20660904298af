"""LoRA in scanned models, on meshes, and in the memory of the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import training
from jaxq.models import stacked
from tests.arrays import assert_close, normal
from tests.training.test_lora import ADAPTERS, with_random_adapters
from tests.training.test_lora_files import TOKENS, llama


def loss_of(model, tokens=TOKENS):
    logits = model(tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train(model, num_steps, mesh=None):
    """The losses of some steps of Adam, and the trained model."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, tokens):
        loss, grads = nnx.value_and_grad(loss_of, argnums=ADAPTERS)(model, tokens)
        optimizer.update(model, grads)
        return loss

    tokens = jnp.tile(TOKENS, (2, 1))
    if mesh is not None:
        tokens = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    return [float(step(model, optimizer, tokens)) for _ in range(num_steps)]


def test_a_scanned_model_trains_as_one_with_a_list(standard_promotion):
    model, _ = jaxq.quantize_model(llama(), "nf4_dq")
    lora = training.add_lora(model, rank=4)
    scanned = stacked(lora)
    assert scanned.layers.mlp.up_proj.dot_general.lora_a.shape == (2, 32, 4)
    losses = train(lora, 4)
    np.testing.assert_allclose(train(scanned, 4), losses, rtol=1e-4)
    assert losses[-1] < losses[0]


def test_dropout_advances_in_a_scanned_model():
    model = llama(scan_layers=True)
    lora = training.add_lora(model, rank=4, dropout=0.5)
    lora = with_random_adapters(lora, 0.3)
    forward = nnx.jit(lambda model, tokens: model(tokens))
    first, second = forward(lora, TOKENS), forward(lora, TOKENS)
    assert (first != second).any()
    stream = lora.layers.mlp.up_proj.dot_general.stream
    np.testing.assert_array_equal(stream.count[...], [2, 2])
    lora.eval()
    again = jax.jit(lambda tokens: lora(tokens))
    np.testing.assert_array_equal(again(TOKENS), again(TOKENS))


def mesh_of_all_devices():
    return jax.make_mesh(
        (jax.device_count() // 4, 2, 2),
        ("data", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )


RULES = {
    "**/down_proj/kernel": P(None, "tensor", "fsdp"),
    "**/o_proj/kernel": P(None, "tensor", "fsdp"),
    "**/*_proj/kernel": P(None, "fsdp", "tensor"),
    "**": P(),
}


def test_a_scanned_model_trains_on_a_mesh(standard_promotion):
    """Data, FSDP and tensor parallel: the losses are those of one device."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64}
    model = llama(scan_layers=True, num_key_value_heads=2, **sizes)
    qmodel, _ = jaxq.quantize_model(model, "nf4_dq")
    expected = train(training.add_lora(qmodel, rank=4), 3)
    mesh = mesh_of_all_devices()
    placed = jaxq.sharding.place(qmodel, mesh, RULES, fit_to_shards=True)
    lora = training.add_lora(placed, rank=4)
    up = lora.layers.mlp.up_proj.dot_general
    assert up.lora_a[...].sharding.spec == P(None, "fsdp", None)
    assert up.lora_b[...].sharding.spec == P(None, None, "tensor")
    np.testing.assert_allclose(train(lora, 3, mesh), expected, rtol=1e-4)


def test_adapters_keep_the_mesh_axes_of_the_metadata():
    model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    model.kernel.set_metadata(out_sharding=("fsdp", "tensor"))
    qmodel, _ = jaxq.quantize_model(model, "int8")
    mesh = mesh_of_all_devices()
    for base in (model, qmodel):
        lora = training.add_lora(base, rank=4)
        product = lora.dot_general
        assert product.lora_a.get_metadata()["out_sharding"] == ("fsdp", None)
        assert product.lora_b.get_metadata()["out_sharding"] == (None, "tensor")
        placed = jaxq.sharding.place(lora, mesh).dot_general
        assert placed.lora_a[...].sharding.spec == P("fsdp", None)
        assert placed.lora_b[...].sharding.spec == P(None, "tensor")
        merged = training.merge_lora(lora)
        assert merged.kernel.get_metadata()["out_sharding"] == ("fsdp", "tensor")


def test_no_float_copy_of_a_weight_is_kept_for_the_backward_pass():
    """The residuals of the forward pass hold codes and activations only."""
    model = nnx.Sequential(*[nnx.Linear(512, 512, rngs=nnx.Rngs(i)) for i in range(3)])
    qmodel, _ = jaxq.quantize_model(model, "nf4_dq")
    lora = with_random_adapters(training.add_lora(qmodel, rank=4))
    graphdef, adapters, rest = nnx.split(lora, nnx.LoRAParam, ...)

    def forward(adapters, x):
        return nnx.merge(graphdef, adapters, rest)(x)

    x = normal(8, 512)
    _, pull_back = jax.vjp(forward, adapters, x)
    floats = [
        leaf.size
        for leaf in jax.tree.leaves(pull_back)
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    # A weight has 512 * 512 numbers; its scales are one for every 64.
    assert max(floats) < 512 * 512 // 16
    gradient = pull_back(jnp.ones((8, 512)))[1]
    y = jnp.ones((8, 512))
    for layer in reversed(lora.layers):
        weight = jaxq.dequantize(layer.kernel[...]) + layer.dot_general.delta()
        y = y @ weight.T
    assert_close(gradient, y, 1e-4)


def test_memory_of_the_backward_pass_does_not_grow_with_the_layers():
    """Compiled: more layers need more codes, but no more space for dequantized ones."""

    def temporary_bytes(num_layers):
        @nnx.split_rngs(splits=num_layers)
        @nnx.vmap
        def layers(rngs):
            return nnx.Linear(256, 256, rngs=rngs)

        qmodel, _ = jaxq.quantize_model(layers(nnx.Rngs(0)), "int8")
        lora = training.add_lora(qmodel, rank=2)
        graphdef, adapters, rest = nnx.split(lora, nnx.LoRAParam, ...)

        def loss(adapters, rest, x):
            def step(x, state):
                return nnx.merge(graphdef, *state)(x), None

            return jax.lax.scan(step, x, (adapters, rest))[0].sum()

        x = jnp.ones((2, 256))
        compiled = jax.jit(jax.grad(loss)).lower(adapters, rest, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    growth = (temporary_bytes(12) - temporary_bytes(4)) / 8
    # The scan stores the codes of a layer once more. A float copy has 4 bytes each.
    assert growth < 2 * 256 * 256
