"""Checkpoints of orbax: `describe` and `template` restore QTensors, also on a mesh."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxq
from jaxq.io import describe, template
from tests import tables
from tests.serialization.restored import assert_restored

ocp = pytest.importorskip("orbax.checkpoint")
RULES = {"**/kernel": PartitionSpec(None, "x"), "**": PartitionSpec()}


def save(folder, state) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)


def restore(folder, *shapes):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", *shapes)


def as_json(description):
    return json.loads(json.dumps(description))


def linear(seed=0):
    return nnx.Linear(64, 32, rngs=nnx.Rngs(seed))


def recipe(preset):
    return jaxq.Recipe([jaxq.Rule("**", weight=preset)])


def quantized(kind, preset):
    """What is described, and the state that orbax saves."""
    if kind == "nnx":
        model, _ = jaxq.quantize_model(linear(), recipe(preset))
        return model, nnx.state(model)
    if kind == "linen":
        module = linen.Dense(32)
        variables = module.init(jax.random.key(0), jnp.ones((1, 64)))
        _, variables, _ = jaxq.nn.linen.quantize_model(
            module, variables, recipe(preset), example=jnp.ones((1, 64))
        )
        return variables, variables
    w = jax.random.normal(jax.random.key(0), (64, 32))
    kernel = jaxq.quantize(w, preset).with_activation("int8", bounds=(-1.0, 2.0))
    tree = {"layers": [{"kernel": kernel}, (jnp.arange(3), None)], "step": 3}
    return tree, tree


def mesh_of(place):
    if place == "as saved":
        return None
    kind = AxisType.Auto if place == "automatic" else AxisType.Explicit
    return jax.make_mesh((4,), ("x",), axis_types=(kind,))


KINDS = ("tree", "nnx", "linen")
PLACES = ("as saved", "automatic", "explicit")
ROWS = list(itertools.product(jaxq.presets(), KINDS, PLACES))
# Every pair of kind and place, and every kind of preset.
DEFAULT = [
    (preset, KINDS[i % 3], PLACES[(i + i // 3) % 3])
    for i, preset in enumerate((*tables.REPRESENTATIVES, "int8"))
]


@pytest.mark.parametrize(("preset", "kind", "place"), tables.thinned(ROWS, DEFAULT))
def test_restored_with_the_template_of_a_description(preset, kind, place, tmp_path):
    tree, state = quantized(kind, preset)
    save(tmp_path, state)
    mesh = mesh_of(place)
    onto = {} if mesh is None else {"mesh": mesh, "rules": RULES}
    if kind == "nnx":
        onto["into"] = nnx.eval_shape(linear)
    shapes = template(as_json(describe(tree)), **onto)
    if kind != "nnx":
        restored = restore(tmp_path, shapes)
        assert_restored(restored, state)
    else:
        restored = restore(tmp_path, nnx.state(shapes))
        nnx.update(shapes, restored)
        x = jnp.ones((2, 64))
        expected = tree(x)
        if mesh is None:
            np.testing.assert_array_equal(shapes(x), expected)
        assert_restored(nnx.to_pure_dict(nnx.state(shapes)), nnx.to_pure_dict(state))
    if mesh is not None:
        is_qtensor = jaxq.qtensor.is_qtensor
        (kernel,) = filter(is_qtensor, jax.tree.leaves(restored, is_leaf=is_qtensor))
        expected = NamedSharding(mesh, PartitionSpec("x", None))
        assert kernel.data.sharding.is_equivalent_to(expected, kernel.data.ndim)


def test_a_model_with_static_ranges(tmp_path):
    # A template that is made by quantizing shapes has no static ranges.
    batches = [np.ones((4, 64), np.float32)]
    model, _ = jaxq.quantize_model(linear(), "w8a8_static", calibration=batches)
    save(tmp_path, nnx.state(model))
    shapes = template(as_json(describe(model)), into=linear(seed=1))
    state = restore(tmp_path, nnx.state(shapes))
    restored = nnx.merge(nnx.graphdef(shapes), state)
    np.testing.assert_array_equal(restored(batches[0]), model(batches[0]))


def test_without_a_template_and_with_a_wrong_one(tmp_path):
    # What docs/models.md says about orbax.
    tree = {"w": jaxq.quantize(jnp.eye(64), "int8")}
    save(tmp_path, tree)
    restored = restore(tmp_path)
    assert isinstance(restored["w"], dict)
    np.testing.assert_array_equal(restored["w"]["data"], tree["w"].data)
    other = jax.eval_shape(lambda: {"w": jaxq.quantize(jnp.eye(64), "uint8")})
    assert jax.tree.structure(other) != jax.tree.structure(tree)
    with pytest.raises(ValueError, match="tructure"):  # uint8 has zero points
        restore(tmp_path, other)
    spec = jaxq.presets()["int8"].replace(format="int8_narrow")
    same_shapes = jax.eval_shape(lambda: {"w": jaxq.quantize(jnp.eye(64), spec)})
    restored = restore(tmp_path, same_shapes)
    assert restored["w"].spec == spec  # wrong, and no error of orbax
    assert restore(tmp_path, template(describe(tree)))["w"].spec == tree["w"].spec


def test_descriptions_of_shapes_and_layouts():
    def make():
        qt = jaxq.quantize(jnp.eye(64), "int4")
        return {"rows": qt, "columns": jaxq.relayout(qt, "columns")}

    shapes, arrays = jax.eval_shape(make), make()
    assert describe(shapes) == describe(arrays)
    found = template(as_json(describe(arrays)))
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    for leaf, expected in zip(
        jax.tree.leaves(found), jax.tree.leaves(shapes), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)


def test_errors():
    tree = {"w": jaxq.quantize(jnp.eye(64), "int8")}
    description = describe(tree)

    def refused(description, message, error=ValueError, **arguments):
        with pytest.raises(error, match=f"(?s)^jaxq.io.template: .*{message}"):
            template(description, **arguments)

    refused({}, "it must be a dict with the fields version, kind, structure")
    refused([], "it must be a dict")
    refused({**description, "version": 9}, "the description has version 9")
    shapes = {"w.data": [3, 3], "w.scale": [64, 1]}
    refused({**description, "shapes": shapes}, "w is wrong")
    refused({**description, "shapes": {}}, "the tensor 'w.data' is missing")
    refused(description, "this describes a tree, not a model", into=linear())
    missing = r"v is missing in the description\n  w is only in the description$"
    refused(description, missing, into={"v": tree["w"]})
    other_dtype = r"w is QTensor\(.* in the description, but float32\[64\] in into="
    refused(description, other_dtype, into={"w": jnp.ones(64)})
    model, _ = jaxq.quantize_model(linear(), "int8")
    of_model = describe(model)
    refused(of_model, "Pass a float model of its class as into=, not NoneType")
    other = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    other_shape = r"kernel: float32\[32, 8\] in the model, .* in the description$"
    refused(
        of_model, f"the description does not fit the model:.*{other_shape}", into=other
    )
    refused(description, "rules= needs mesh=", TypeError, rules=RULES)
    refused(description, "linen module Dense", TypeError, into=linen.Dense(3))
    with pytest.raises(TypeError, match="^jaxq.io.describe: Dense is a flax linen mod"):
        describe(linen.Dense(3))
