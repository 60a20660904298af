"""`describe` and `template`: QTensors in the checkpoints of other libraries.

orbax stores the arrays of a QTensor, and not its spec. `describe` is the spec and the
structure as JSON, and `template` is what orbax needs to restore the QTensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jaxq.io._into_tree import into_tree
from jaxq.io._placement import plan_like, plan_on_mesh
from jaxq.io._saving import check_into, contents_of
from jaxq.qtensor import is_nnx_module
from jaxq.serialization import describe_contents, shapes_of
from jaxq.sharding import Rules

_DESCRIBE, _TEMPLATE = "jaxq.io.describe", "jaxq.io.template"
# The words of errors about a description that does not fit `into`.
_NAMES = {
    "caller": _TEMPLATE,
    "source": "the description",
    "place": "description",
}


def describe(tree: Any) -> dict[str, Any]:
    """The structure of a tree or a model, and the specs of its QTensors, as JSON.

    Save it next to the arrays, as JSON. Without it, orbax restores QTensors as dicts of
    arrays, and into a template with another spec if the shapes are equal.

    Args:
      tree: a model or a tree, as in `jaxq.save`. Arrays may be
        `jax.ShapeDtypeStruct`s.

    Returns:
      A dict that JSON can store. The same tree gives the same dict in every process.

    Raises:
      TypeError: the tree holds a value that `jaxq.save` cannot save.
      ValueError: two parameters of a model have the same path.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> tree = {"w": jaxq.quantize(jnp.eye(64), "nf4")}
      >>> jaxq.io.template(jaxq.io.describe(tree))["w"].spec == tree["w"].spec
      True
    """
    return describe_contents(contents_of(tree, _DESCRIBE), caller=_DESCRIBE)


def template(
    description: Mapping[str, Any],
    *,
    into: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = None,
) -> Any:
    """The tree or the model that was described, with shapes in place of arrays.

    Args:
      description: what `describe` returned.
      into: for the description of a model, a float model of the same class, or the
        result of `nnx.eval_shape`. For that of a tree, a tree with the same paths, such
        as the state of an optimizer. It is not changed.
      mesh: the shapes have shardings on this mesh of devices. If it is None, they have
        the shardings of `into`.
      rules: the mesh axes of the float weights, as in `jaxq.load`.

    Returns:
      The tree, or a copy of the model with quantized layers. Every array is a
      `jax.ShapeDtypeStruct`. Of a model, give `nnx.state` of it to orbax, and put the
      restored state into it by `nnx.update`.

    Raises:
      TypeError: as `jaxq.load`.
      ValueError: `description` is not from `describe`; it describes a model and `into`
        is not a model; or as `jaxq.load`: it does not fit `into`, or a shard would cut
        a group or a byte.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> tree = {"w": jaxq.quantize(jnp.eye(64), "int8")}
      >>> jaxq.io.template(jaxq.io.describe(tree))["w"].data
      ShapeDtypeStruct(shape=(64, 64), dtype=int8)
    """
    check_into(into, _TEMPLATE)
    plan = plan_on_mesh(into, mesh, rules, _TEMPLATE)
    if into is not None and mesh is None:
        plan, _, _ = plan_like(into, f"{_TEMPLATE}: into=")
    contents = shapes_of(description, caller=_TEMPLATE, plan=plan)
    is_model = contents.kind == "model"
    if is_model and not is_nnx_module(into):
        raise ValueError(
            f"{_TEMPLATE}: this describes a model. Pass a float model of its class as "
            f"into=, not {type(into).__name__}."
        )
    if not is_model and is_nnx_module(into):
        raise ValueError(
            f"{_TEMPLATE}: this describes a tree, not a model. Leave out into=."
        )
    if into is None:
        return contents.value
    if not is_model:
        return into_tree(into, contents.value, **_NAMES)
    from jaxq.io._into_model import into_model

    transforms = contents.notes.get("transforms")
    return into_model(into, contents.value, transforms, **_NAMES)
