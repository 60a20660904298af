"""Fills a copy of a float model with the arrays of a file or a description.

First every parameter of the model is compared with the file. One error names all
problems. Then the arrays of the file are put into a copy of the model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxq.io._model_arrays import (
    array_leaves,
    input_transforms_of,
    is_array,
    path_name,
    value_of,
)
from jaxq.nn import find_layers
from jaxq.nn.layers import (
    put_weight,
    quantized_param,
    replace_variables,
    weight_axes,
)
from jaxq.qtensor import QTensor


def into_model(
    model: Any,
    values: dict[str, Any],
    transforms: dict[str, str] | None,
    *,
    caller: str,
    source: str,
    place: str = "file",
) -> Any:
    """A copy of a model with the arrays of a file or a description.

    A layer becomes a quantized layer if its weight is quantized in the file.

    Args:
      model: an nnx module. It is not changed.
      values: arrays and QTensors of the file by path.
      transforms: the run-time transforms of layer inputs in the saved model, by path.
        None if the file does not name them.
      caller: the public function, at the start of errors.
      source: the path of the file, or "the description", for errors.
      place: "file" or "description", for errors.

    Raises:
      ValueError: model and file do not fit. The error lists all problems.
    """
    copy = nnx.clone(model)
    variables = {path_name(p): leaf for p, leaf in array_leaves(copy)}
    layers = _layers_by_weight(copy)
    problems = [
        *_name_problems(variables, values, place),
        *_transform_problems(copy, transforms, place),
        *_value_problems(variables, values, layers, place),
    ]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{caller}: {source} does not fit the model:\n{lines}")
    _put_variables(copy, variables, values, layers)
    for leaf_path, leaf in array_leaves(copy):
        if is_array(leaf):
            _put_array(copy, leaf_path, values[path_name(leaf_path)])
    return copy


# The layers of each weight, with their layer kinds. The key is the id of the weight's
# Variable. Layers can share one Variable.
_Layers = dict[int, list[tuple[Any, Any]]]


def _layers_by_weight(model: Any) -> _Layers:
    layers: _Layers = {}
    for _, layer, kind in find_layers(model):
        weight = getattr(layer, kind.weight)
        layers.setdefault(id(weight), []).append((layer, kind))
    return layers


def _name_problems(
    variables: dict[str, Any], values: dict[str, Any], place: str
) -> list[str]:
    """Parameters that only the model or only the file has."""
    missing = [name for name in variables if name not in values]
    extra = [name for name in values if name not in variables]
    return [
        *(f"{name}: in the model, missing from the {place}" for name in missing),
        *(f"{name}: in the {place}, not in the model" for name in extra),
    ]


def _transform_problems(
    model: Any, saved: dict[str, str] | None, place: str
) -> list[str]:
    """Layers whose inputs the model transforms in another way than the file says."""
    own = input_transforms_of(model) or {}
    if saved is None:
        return []
    problems = []
    for name in sorted({*own, *saved}):
        in_model, in_file = own.get(name, "nothing"), saved.get(name, "nothing")
        if in_model != in_file:
            problems.append(
                f"{name}: its inputs go through {in_model} in the model and "
                f"through {in_file} in the {place}. Pass a model that "
                "jaxq.models.rotate(..., online=...) made in the same way"
            )
    return problems


def _value_problems(
    variables: dict[str, Any], values: dict[str, Any], layers: _Layers, place: str
) -> list[str]:
    """Parameters of both model and file whose values do not fit."""
    problems = []
    for name, value in values.items():
        if name not in variables:
            continue
        variable = variables[name]
        current = value_of(variable)
        if not _can_replace(current, value):
            problems.append(
                f"{name}: {_text(current)} in the model, {_text(value)} in the {place}"
            )
        elif isinstance(value, QTensor) and not isinstance(current, QTensor):
            texts = _layer_problems(layers.get(id(variable), []), value, place)
            problems += [f"{name}: {text}" for text in texts]
    return problems


def _can_replace(current: Any, value: Any) -> bool:
    """Whether the value of the file can replace the value of the model."""
    if isinstance(current, QTensor):
        same_kind = isinstance(value, QTensor)
        return same_kind and _description(current) == _description(value)
    if isinstance(value, QTensor):
        expected = f"{value.dtype}{list(value.shape)}"
        return is_array(current) and _text(current) == expected
    return _text(current) == _text(value)


def _description(qt: QTensor) -> tuple:
    """What must be equal for one QTensor to replace another. The packing may differ."""
    geometry = dataclasses.replace(qt.meta.geometry, multiple=1)
    spec = qt.spec.replace(packing=None)
    meta = qt.meta
    return qt.shape, spec, geometry, meta.dtype, meta.activation, meta.outliers


def _layer_problems(
    layers: list[tuple[Any, Any]], value: QTensor, place: str
) -> list[str]:
    """Why `value` cannot replace the float weight of these layers."""
    if not layers:
        unknown = "not the weight of a layer that jaxq knows"
        return [f"quantized in the {place}, but {unknown}"]
    problems = [
        kind.problem(layer) or _axes_problem(layer, kind, value)
        for layer, kind in layers
    ]
    return [problem for problem in problems if problem]


def _axes_problem(layer: Any, kind: Any, value: QTensor) -> str | None:
    """Why the axes of a quantized weight do not fit the layer; None if they fit."""
    try:
        contracting, batch = weight_axes(layer, kind)
    except ValueError as error:
        return str(error)
    same_axes = set(contracting) == set(value.meta.geometry.contracted)
    if not same_axes or len(batch) != len(value.batch_shape):
        return f"{value!r} does not contract the layer's axes {list(contracting)}"
    return None


def _text(value: Any) -> str:
    """Dtype and shape of a value, for errors and for the comparison of values."""
    if isinstance(value, QTensor):
        return f"{value!r} of {value.spec.granularity}"
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict | list | tuple):
        return str(jax.tree.map(_text, value, is_leaf=lambda v: isinstance(v, QTensor)))
    return type(value).__name__


def _put_variables(
    model: Any, variables: dict[str, Any], values: dict[str, Any], layers: _Layers
) -> None:
    """Puts the values of the file into Variables and makes quantized layers."""
    replaced: dict[int, Any] = {}
    for name, value in values.items():
        variable = variables[name]
        if is_array(variable):
            continue
        if isinstance(value, QTensor) and not isinstance(variable.get_value(), QTensor):
            weight = quantized_param(value, variable)
            replaced[id(variable)] = weight
            for layer, kind in layers[id(variable)]:
                put_weight(layer, kind, weight)
        else:
            variable.set_value(value)
    # A Variable can also be an attribute outside its layers.
    replace_variables(model, replaced)


def _put_array(node: Any, path: tuple, value: Any) -> Any:
    """`node` with `value` at `path`.

    A tuple or a dataclass is copied. Any other node changes in place.
    """
    if not path:
        return value
    key, has_items = path[0], _has_item(node, path[0])
    child = node[key] if has_items else getattr(node, key)
    new_child = _put_array(child, path[1:], value)
    if new_child is child:
        return node
    if isinstance(node, tuple):
        if has_items:
            return (*node[:key], new_child, *node[key + 1 :])
        named_tuple: Any = node
        return named_tuple._replace(**{key: new_child})
    if dataclasses.is_dataclass(type(node)) and not issubclass(type(node), nnx.Pytree):
        replace: Any = dataclasses.replace
        return replace(node, **{key: new_child})
    if has_items:
        node[key] = new_child
    else:
        setattr(node, key, nnx.data(new_child))
    return node


def _has_item(node: Any, key: Any) -> bool:
    """Whether `key` is an item of `node`; otherwise it is an attribute."""
    return isinstance(key, int) or isinstance(node, dict | nnx.Dict)
