"""Models in files: what of a model is saved, and how a float model becomes the quantized one of a file.

Flax is imported only where a model is at hand.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.qtensor import QTensor


def is_module(value: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module | nnx.State)


def parameters(model: Any) -> dict[str, Any]:
    """Path and value of every array of a model or of a state, in a Variable or not; shared Variables once."""
    found: dict[str, Any] = {}
    for path, value in _leaves(model):
        name = "/".join(map(str, path))
        if name in found:
            raise ValueError(
                f"save: two parameters have the path {name!r}. Rename an attribute."
            )
        found[name] = _value(value)
    return found


def _leaves(model: Any) -> list[tuple[tuple, Any]]:
    """Path and Variable, or array where a model holds one without: `nnx.data`, a table of frequencies."""
    from flax import nnx

    if isinstance(model, nnx.State):
        return [(path, leaf) for path, leaf in nnx.to_flat_state(model)]
    found = [
        (path, leaf)
        for path, leaf in nnx.iter_graph(model)
        if isinstance(leaf, nnx.Variable) or _is_array(leaf)
    ]
    inside = {path for path, leaf in found if isinstance(leaf, QTensor)}
    return [
        (path, leaf)
        for path, leaf in found
        if not any(path[:i] in inside for i in range(len(path)))
    ]


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct | QTensor)


def transforms(model: Any) -> dict[str, str] | None:
    """What inputs of layers go through at run time, by path; None of a state, which cannot tell."""
    from flax import nnx

    from jaxq.nn.layers._input_transform import input_transforms

    return input_transforms(model) if isinstance(model, nnx.Module) else None


def into_model(
    model: Any, found: dict[str, Any], path: Path, theirs: dict[str, str] | None
) -> Any:
    """A copy of a float model with the arrays of a file, and jaxq's hooks where they are quantized.

    Args:
      model: an nnx module, which stays as it is.
      found: arrays and QTensors by path.
      path: of the file, for errors.
      theirs: what inputs of layers went through where the file was written; None of a file that cannot tell.
    """
    from flax import nnx

    from jaxq import nn

    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"load: into= must be a flax nnx module, got {type(model).__name__}."
        )
    copy = nnx.clone(model)
    variables = {"/".join(map(str, p)): v for p, v in _leaves(copy)}
    problems = [
        f"  {name}: in the model, missing from the file"
        for name in variables
        if name not in found
    ]
    problems += [
        f"  {name}: in the file, not in the model"
        for name in found
        if name not in variables
    ]
    own = transforms(copy) or {}
    theirs = own if theirs is None else theirs
    for name in sorted({*own, *theirs}):
        mine, saved = own.get(name, "nothing"), theirs.get(name, "nothing")
        if mine != saved:
            remedy = "Pass a model of the same jaxq.models.rotate(..., online=...)"
            problems.append(
                f"  {name}: its inputs go through {mine} in the model, {saved} in the file. {remedy}"
            )
    layers: dict[int, list[tuple[Any, Any, str]]] = {}
    for layer_path, layer, kind in nn.find_layers(copy):
        layers.setdefault(id(getattr(layer, kind.weight)), []).append(
            (layer, kind, layer_path)
        )
    for name, value in found.items():
        if name not in variables:
            continue
        current = _value(variables[name])
        if isinstance(current, QTensor):
            if not isinstance(value, QTensor) or _as_used(current) != _as_used(value):
                problems.append(
                    f"  {name}: {_short(current)} in the model, {_short(value)} in the file"
                )
        elif not isinstance(value, QTensor):
            if _short(current) != _short(value):
                problems.append(
                    f"  {name}: {_short(current)} in the model, {_short(value)} in the file"
                )
        elif (current.shape, current.dtype) != (value.shape, value.dtype):
            problems.append(
                f"  {name}: {_short(current)} in the model, {_short(value)} in the file"
            )
        elif id(variables[name]) not in layers:
            problems.append(
                f"  {name}: quantized in the file, but in no layer jaxq knows"
            )
        else:
            for layer, kind, _ in layers[id(variables[name])]:
                problem = kind.problem(layer) or _axes_problem(layer, kind, value)
                problems += [f"  {name}: {problem}"] if problem else []
    if problems:
        raise ValueError(
            f"load: {path} does not fit the model:\n" + "\n".join(problems)
        )
    replaced: dict[int, Any] = {}
    for name, value in found.items():
        variable = variables[name]
        if _is_array(variable):
            continue
        if isinstance(value, QTensor) and not isinstance(variable.get_value(), QTensor):
            quantized = replaced[id(variable)] = nn.QuantizedParam(value)
            for layer, kind, _ in layers[id(variable)]:
                nn.put_weight(layer, kind, quantized)
        else:
            variable.set_value(value)
    nn.replace_variables(copy, replaced)
    for leaf_path, leaf in _leaves(copy):
        if _is_array(leaf):
            _put(copy, leaf_path, found["/".join(map(str, leaf_path))])
    return copy


def _put(node: Any, path: tuple, value: Any) -> Any:
    """`node` with `value` at `path`: changed in place, or made anew if it is a tuple."""
    from flax import nnx

    if not path:
        return value
    key, keyed = path[0], isinstance(path[0], int) or isinstance(node, dict | nnx.Dict)
    child = node[key] if keyed else getattr(node, key)
    new = _put(child, path[1:], value)
    if new is child:
        return node
    if isinstance(node, tuple):
        remade = getattr(node, "_replace", None)  # of a named tuple
        return (
            remade(**{key: new})
            if remade and not keyed
            else (*node[:key], new, *node[key + 1 :])
        )
    if dataclasses.is_dataclass(type(node)) and not issubclass(type(node), nnx.Pytree):
        return dataclasses.replace(node, **{key: new})  # pyright: ignore[reportArgumentType]
    if keyed:
        node[key] = new
    else:
        setattr(node, key, nnx.data(new))
    return node


def _value(leaf: Any) -> Any:
    return leaf if _is_array(leaf) else leaf.get_value()


def _axes_problem(layer: Any, kind: Any, value: QTensor) -> str | None:
    from jaxq import nn

    try:
        contracting, batch = nn.weight_axes(layer, kind)
    except ValueError as error:
        return str(error)
    if set(contracting) != set(value.meta.geometry.contracted) or len(batch) != len(
        value.batch_shape
    ):
        return f"{value!r} does not contract the layer's axes {list(contracting)}"
    return None


def _as_used(qt: QTensor) -> tuple:
    """What two QTensors must share to take each other's place: all but the order of packing."""
    geometry = dataclasses.replace(qt.meta.geometry, multiple=1)
    return (
        qt.shape,
        qt.spec.replace(packing=None),
        geometry,
        qt.meta.dtype,
        qt.meta.activation,
        qt.meta.outliers,
    )


def _short(value: Any) -> str:
    if isinstance(value, QTensor):
        return f"{value!r} of {value.spec.granularity}"
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict | list | tuple):
        return str(
            jax.tree.map(_short, value, is_leaf=lambda v: isinstance(v, QTensor))
        )
    return type(value).__name__
