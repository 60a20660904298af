"""The weights of a quantized model in a model directory.

`model.safetensors` is then a file of `jaxq.save`, with codes and scales. An entry of
`config.json` says so:

    "quantization_config": {"quant_method": "jaxq", "dtype": "float32",
                            "scan_layers": false, "rotated_inputs": []}

`dtype` is that of the float parameters. `scan_layers` says whether the file holds
stacked layers. `rotated_inputs` are the layers whose inputs go through
`jaxq.methods.hadamard` at run time, as in the recipes that rotate the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxq.files import CONFIG, TensorFile, is_file, parse_json, read_text
from jaxq.io import load
from jaxq.methods import hadamard
from jaxq.models._stacking import stacked, unrolled
from jaxq.models.decoder import DecoderConfig
from jaxq.models.encoder import Encoder, EncoderConfig
from jaxq.nn.layers import TransformInput, input_transforms
from jaxq.qtensor import QTensor
from jaxq.sharding import Rules

_METHOD = "jaxq"
_DTYPES = ("float32", "bfloat16")


def is_quantized(model: nnx.Module) -> bool:
    """True if a weight of a model is a QTensor.

    Example:
        >>> import jaxq
        >>> from flax import nnx
        >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        >>> qmodel, _ = jaxq.quantize_model(model, "int8")
        >>> jaxq.models.is_quantized(model), jaxq.models.is_quantized(qmodel)
        (False, True)
    """
    leaves = jax.tree.leaves(nnx.state(model), is_leaf=_is_qtensor)
    return any(_is_qtensor(leaf) for leaf in leaves)


def quantization_entries(model: Any) -> dict[str, Any]:
    """The entries of `config.json` that tell `load` how to read the weights.

    Args:
        model: a quantized model.
    """
    norm: Any = model.embed_norm if isinstance(model, Encoder) else model.norm
    dtype = jnp.dtype(norm.scale.dtype).name
    quantization = {
        "quant_method": _METHOD,
        "dtype": dtype,
        "scan_layers": _has_stacked_layers(model.config),
        "rotated_inputs": [path for path, _ in _transformed_layers(model)],
    }
    return {"dtype": dtype, "quantization_config": quantization}


def transforms_are_known(model: Any) -> bool:
    """True if a directory can say which transforms the layers apply to their inputs."""
    layers = _transformed_layers(model)
    return all(_transforms(layer) == [hadamard] for _, layer in layers)


def own_quantization(path: Path, caller: str) -> dict[str, Any] | None:
    """What the `config.json` of a directory says of weights that jaxq quantized.

    Args:
        path: the directory.
        caller: the name that error messages begin with.

    Returns:
        The entry "quantization_config". None if the weights are floats, if another
        library quantized them, or if there is no `config.json`.

    Raises:
        ValueError: a field of the entry has another type or value than `save` writes.
    """
    file = path / CONFIG
    if not path.is_dir() or not is_file(file, caller):
        return None
    text = read_text(file, caller)
    try:
        entries = parse_json(file, text)
    except ValueError as error:
        raise ValueError(f"{caller}: {error}") from error
    quantization = (
        entries.get("quantization_config") if isinstance(entries, dict) else None
    )
    if not isinstance(quantization, dict):
        return None
    if quantization.get("quant_method") != _METHOD:
        return None
    dtype, scan_layers = quantization.get("dtype"), quantization.get("scan_layers")
    rotated = quantization.get("rotated_inputs")
    has_names = isinstance(rotated, list) and all(isinstance(n, str) for n in rotated)
    if dtype not in _DTYPES or not isinstance(scan_layers, bool) or not has_names:
        raise ValueError(
            f"{caller}: {file}: quantization_config is {quantization!r:.200}; expected "
            f"dtype {' or '.join(_DTYPES)}, scan_layers true or false, and a list "
            "rotated_inputs of layers. Save the model again."
        )
    return quantization


def read_quantized(
    path: Path,
    config: Any,
    quantization: Mapping[str, Any],
    abstract_model: Callable[[Any, Any], Any],
    dtype: Any,
    *,
    mesh: Mesh | None,
    rules: Rules,
    verify: bool,
) -> Any:
    """The model of a weight file of `save`.

    Args:
        path: the file.
        config: the config of the model to return.
        quantization: what `own_quantization` returned.
        abstract_model: `abstract_model(config, dtype)` is a float model of shapes.
        dtype: the dtype that the caller wants, or None.
        mesh: as in `jaxq.load`.
        rules: as in `jaxq.load`.
        verify: as in `jaxq.load`.

    Raises:
        ValueError: the caller wants another dtype than that of the file, or another
            arrangement of layers on a mesh; the file is damaged, or is not that of the
            config.
    """
    stored_dtype = jnp.dtype(quantization["dtype"])
    if dtype is not None and jnp.dtype(dtype) != stored_dtype:
        raise ValueError(
            f"jaxq.models.load: {path} was quantized in {stored_dtype.name}, and dtype "
            f"is {jnp.dtype(dtype).name}. Leave dtype out, or quantize the float model "
            "again in the other dtype."
        )
    is_stacked, wants_stack = quantization["scan_layers"], _has_stacked_layers(config)
    if mesh is not None and wants_stack != is_stacked:
        raise ValueError(
            f"jaxq.models.load: {path} was saved with scan_layers={is_stacked}. On a "
            f"mesh, load it with scan_layers={is_stacked}."
        )
    own_config = config
    if wants_stack != is_stacked:
        own_config = dataclasses.replace(config, scan_layers=is_stacked)
    _check_num_layers(path, own_config)
    template = abstract_model(own_config, stored_dtype)
    _transform_inputs(template, quantization["rotated_inputs"], path)
    model = load(path, into=template, mesh=mesh, rules=rules, verify=verify)
    if wants_stack == is_stacked:
        return model
    return unrolled(model) if is_stacked else stacked(model)


def _has_stacked_layers(config: DecoderConfig | EncoderConfig) -> bool:
    """Whether one scan runs the layers. Those of an `Encoder` are always in a list."""
    return isinstance(config, DecoderConfig) and config.scan_layers


def _check_num_layers(path: Path, config: Any) -> None:
    """Raises if the config has more layers than the file can hold.

    A config of a stranger with very many layers must not take memory.
    """
    with TensorFile(path, "jaxq.models.load", verify=False) as file:
        num_tensors = len(file.headers)
    is_list = not _has_stacked_layers(config)
    if is_list and config.num_hidden_layers > num_tensors:
        raise ValueError(
            f"jaxq.models.load: num_hidden_layers is {config.num_hidden_layers} in "
            f"config.json, and {path} has {num_tensors} tensors. Use the config.json "
            "that belongs to the weights."
        )


def _transform_inputs(model: Any, paths: Sequence[str], file: Path) -> None:
    """Adds the rotation of their inputs to layers of a model."""
    layers: dict[str, Any] = {
        "/".join(map(str, path)): layer for path, layer in nnx.iter_modules(model)
    }
    for path in paths:
        layer = layers.get(path)
        if layer is None or not hasattr(layer, "promote_dtype"):
            raise ValueError(
                f"jaxq.models.load: config.json beside {file} names {path!r:.80} in "
                "rotated_inputs, which is not a linear layer of the model. Save the "
                "model again."
            )
        layer.promote_dtype = TransformInput(hadamard, layer.promote_dtype)


def _transformed_layers(model: nnx.Module) -> list[tuple[str, Any]]:
    """The layers with a transform of their inputs, by path."""
    transformed = input_transforms(model)
    layers = []
    for keys, layer in nnx.iter_modules(model):
        path = "/".join(map(str, keys))
        if path in transformed:
            layers.append((path, layer))
    return sorted(layers, key=lambda item: item[0])


def _transforms(layer: Any) -> list[Callable[..., Any]]:
    """The transforms of a layer's input, the last one first."""
    transforms, hook = [], layer.promote_dtype
    while hook is not None:  # the hook of a quantized weight wraps the others
        if isinstance(hook, TransformInput):
            transforms.append(hook.transform)
        hook = getattr(hook, "original", None)
    return transforms


def _is_qtensor(value: Any) -> bool:
    return isinstance(value, QTensor)
