"""The metadata of Flax stay in models and variables that are changed, not quantized."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.methods import hadamard
from jaxq.models import Decoder, fold_scales, rotate
from tests.arrays import normal
from tests.models.test_decoder import make

X = normal(4, 32)
INIT = linen.initializers.lecun_normal()


def axes_of(model):
    """The `out_sharding` of each variable, by path."""
    return {
        path: variable.get_metadata().get("out_sharding")
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def name_axes(model):
    """Names the last axis of every variable of the model "t", and the others "d"."""
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        axes = ("d", "t")[-variable.get_value().ndim :]
        variable.set_metadata(out_sharding=axes)
    return model


def named_llama(**changes) -> Decoder:
    return name_axes(make(num_hidden_layers=1, **changes))


def test_rotated_models_and_models_with_moved_scales_keep_the_axes():
    model = named_llama()
    before = axes_of(model)
    assert before[("lm_head", "kernel")] == ("d", "t")
    assert before[("norm", "scale")] == ("t",)
    matrix = hadamard(jnp.eye(32))
    assert axes_of(rotate(model, matrix, online=hadamard)) == before
    assert axes_of(fold_scales(model, {"norm": jnp.full(32, 2.0)})) == before


@pytest.mark.parametrize("is_sharding", [False, True])
def test_a_head_that_was_tied_has_the_axes_of_the_transposed_table(is_sharding):
    model = named_llama(tie_word_embeddings=True)
    if is_sharding:
        mesh = AbstractMesh((1, 1), ("d", "t"))
        sharding = NamedSharding(mesh, P("d", "t"))
        model.embed_tokens.embedding.set_metadata(out_sharding=sharding)
    before = axes_of(model)
    after = axes_of(rotate(model, hadamard(jnp.eye(32))))
    head = after.pop(("lm_head", "kernel"))
    assert (head.spec if is_sharding else head) == P("t", "d")
    assert after == before


class Mlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        init = linen.with_partitioning(INIT, (None, "t"))
        x = linen.relu(linen.Dense(16, kernel_init=init, name="up")(x))
        self.variable("cache", "calls", jnp.zeros, ())
        return linen.Dense(8, kernel_init=init, name="head")(x)


def test_linen_students_keep_their_boxes():
    module = Mlp()
    variables = module.init(jax.random.key(0), X)
    for arrays in (variables, {"params": variables["params"]}):
        apply = module.apply if arrays is variables else _without_cache(module)
        student = (apply, arrays)
        step = jaxq.distillation.make_step(student, None, optax.sgd(0.1), _squares)
        state, _ = step(step.init(), (X, jnp.ones((4, 8))))
        student = step.student(state)
        assert jax.tree.structure(student) == jax.tree.structure(arrays)
        kernel = student["params"]["up"]["kernel"]
        assert kernel.names == (None, "t")
        assert np.any(kernel.value != variables["params"]["up"]["kernel"].value)


def _without_cache(module):
    def apply(variables, x):
        return module.apply(variables, x, mutable=["cache"])[0]

    return apply


class NnxMlp(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(32, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def test_nnx_students_and_measured_models_keep_the_axes():
    model = name_axes(NnxMlp())
    before = axes_of(model)
    assert set(before.values()) == {("d", "t"), ("t",)}
    step = jaxq.distillation.make_step(model, model, optax.sgd(0.1), _squares)
    state, _ = step(step.init(), (X,))
    assert axes_of(step.student(state)) == before
    result = jaxq.nn.sensitivity(model, ["int8"], [X])
    assert set(result.kl) == {"up", "down"}
    assert axes_of(model) == before


def _squares(student, teacher):
    return jnp.mean((student - teacher) ** 2)


def test_the_sensitivity_of_linen_is_that_without_boxes():
    module = Mlp()
    boxed = module.init(jax.random.key(0), X)
    structure = jax.tree.structure(boxed)
    plain = linen.unbox(boxed)
    results = [
        jaxq.nn.linen.sensitivity(module, variables, ["int4"], [X]).kl
        for variables in (boxed, plain)
    ]
    assert results[0] == results[1]
    assert results[0]["up"]["int4"] > 0
    assert jax.tree.structure(boxed) == structure


@pytest.mark.parametrize("boxed", [False, True])
def test_the_report_of_linen_has_a_row_for_every_variable(boxed):
    module = Mlp()
    variables = module.init(jax.random.key(0), X)
    if not boxed:
        variables = linen.unbox(variables)
    _, qvariables, report = jaxq.nn.linen.quantize_model(
        module, variables, "int8", example=X
    )
    paths = [row.path for row in report.rows]
    assert len(paths) == len(set(paths))
    assert set(paths) == {
        "up/kernel",
        "up/bias",
        "head/kernel",
        "head/bias",
        "cache/calls",
    }
    for total, tree in (
        (report.bytes_before, variables),
        (report.bytes_after, qvariables),
    ):
        assert total == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
