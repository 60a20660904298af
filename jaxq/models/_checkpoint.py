"""Llama-family models from Hugging Face directories, and back.

A directory holds `config.json`, the weights in one or more safetensors files, and the
tokenizer. Tensors are read one by one. A weight of a projection is [out, in] in the
file and [in, out] in the model. The weights of a model that jaxq quantized are in a
file of `jaxq.save` (`_quantized_weights.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxq.files import (
    CONFIG,
    SINGLE,
    TensorFile,
    TensorHeader,
    is_file,
    listed,
    naming_errors,
    open_weights,
    parse_json,
    read_text,
    require_file,
    write_directory,
)
from jaxq.io import is_quantized as has_quantized_weights
from jaxq.io import model_as_file, read_checkpoint
from jaxq.models._parts import Source, Sources, read_on_mesh
from jaxq.models._quantized import filled_with_quantized, headers_of
from jaxq.models._quantized_weights import (
    is_quantized,
    own_quantization,
    quantization_entries,
    read_quantized,
    transforms_are_known,
)
from jaxq.models.llama import Llama, LlamaConfig
from jaxq.nn.layers import input_transforms
from jaxq.processes import Agreement
from jaxq.sharding import Rules, check_mesh

_FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
_SAVED_DTYPES = ("float64", "float32", "float16", "bfloat16")
_SAVE = "jaxq.models.save"
_LOAD = "jaxq.models.load"
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")
_ROWS = 1024
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


class _Destination(NamedTuple):
    """The place in the model of a tensor of a file.

    Attributes:
        path: the parameter's path, for example ("layers", 0, "mlp", "up_proj",
            "kernel").
        layer: the index on the leading axis if layers are stacked; None otherwise.
        shape: the shape of the tensor in the file.
    """

    path: tuple
    layer: int | None
    shape: tuple[int, ...]


def load(
    path: str | Path,
    *,
    dtype: Any = None,
    scan_layers: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = None,
    verify: bool = True,
) -> tuple[Llama, Any]:
    """Reads a Hugging Face directory of a Llama-family model.

    Reads `config.json`, `tokenizer.json` and `model.safetensors`. If there is a
    `model.safetensors.index.json`, it names the weight files instead. Tensors are read
    one by one, so host memory peaks at the model plus its largest tensor.

    The weights are floats, or quantized by another library, as in
    `jaxq.io.read_checkpoint`, or by jaxq, as `save` writes them. A quantized weight
    stays quantized in the model. A GGUF file is read too.

    Args:
        path: the directory, or a file whose name ends with ".gguf".
        dtype: float32 or bfloat16. Parameters are stored in it, and matrix products
            read it. Products accumulate in float32 in both cases. A bfloat16 checkpoint
            is exact in float32. None means float32. For weights that jaxq quantized, it
            means the dtype that the model had.
        scan_layers: stack the layers and run them by one scan, see `LlamaConfig`.
        mesh: puts the parameters on this mesh of devices. Of each tensor, only the
            parts of this process's devices are read, one by one. If the mesh has
            devices of several processes, all of them must make this call. If one of
            them cannot read its parts, all of them raise. The weights must be floats.
        rules: the mesh axes of parameters by pattern, as in `jaxq.sharding.place`:
            `{"**/up_proj/kernel": PartitionSpec(None, "t"), "**": PartitionSpec()}`.
            Paths are those of the model, for example "layers/0/mlp/up_proj/kernel", or
            "layers/mlp/up_proj/kernel" if layers are stacked. None replicates all.
        verify: compare the checksums of weight files that `save` wrote. Other files
            have none.

    Returns:
        The model and a `tokenizers.Tokenizer`. The tokenizer is None if the directory
        has no `tokenizer.json`.

    Raises:
        FileNotFoundError: the directory has no `config.json`, or a weight file is
            missing.
        TypeError: there are rules and no mesh, or the mesh has no devices.
        ValueError: a rule matches nothing, or the shards do not divide an axis, as in
            `jaxq.sharding.place`.
        ValueError: `dtype` is not float32 or bfloat16, or not that of weights that jaxq
            quantized; a file is damaged; the config is
            not supported; the index names a file outside the directory; or tensors are
            missing, unexpected, of the wrong shape or without floats. One message lists
            such tensors. Headers are compared with the config before layers are built.
        ImportError: there is a `tokenizer.json`, and the `tokenizers` package is not
            installed.

    Example:
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                      num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=1, head_dim=16)
        >>> save("my_model", Llama(config, rngs=nnx.Rngs(0)))
        >>> model, tokenizer = load("my_model", dtype=jnp.bfloat16)
        >>> model(jnp.array([[1, 2, 3]])).shape, tokenizer
        ((1, 3, 64), None)
    """
    path = Path(path)
    stored_dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    if stored_dtype.name not in ("float32", "bfloat16"):
        raise ValueError(
            "jaxq.models.load: dtype must be float32 or bfloat16, got "
            f"{stored_dtype.name}."
        )
    if mesh is not None:
        check_mesh(mesh, "jaxq.models.load")
    elif rules is not None:
        raise TypeError("jaxq.models.load: rules= needs mesh=, the mesh of devices.")
    devices = () if mesh is None else mesh.devices.flat
    with Agreement(devices, f"jaxq.models.load: {path} cannot be read"):
        quantization = own_quantization(path, _LOAD)
        if quantization is None:
            return _load(path, stored_dtype, scan_layers, mesh, rules, verify)
        wanted = None if dtype is None else stored_dtype
        where = {"mesh": mesh, "rules": rules, "verify": verify}
        return _load_own(path, quantization, wanted, scan_layers, **where)


def _load(
    path: Path,
    stored_dtype: jnp.dtype,
    scan_layers: bool,
    mesh: Mesh | None,
    rules: Rules,
    verify: bool,
) -> tuple[Llama, Any]:
    """`load` after the checks of its arguments."""
    if has_quantized_weights(path, _LOAD):
        if mesh is not None:
            raise ValueError(
                f"jaxq.models.load: {path} is quantized, and mesh= is for float "
                "checkpoints. Load it without mesh=, and call jaxq.sharding.place."
            )
        return _load_quantized(path, stored_dtype, scan_layers, verify)
    config_text = read_text(require_file(path, CONFIG, _LOAD), _LOAD)
    config = _parse_config(path / CONFIG, config_text, scan_layers)
    # The tokenizer comes before the weights, because it fails sooner.
    tokenizer = _load_tokenizer(path / "tokenizer.json")
    with contextlib.ExitStack() as stack:
        tensors = open_weights(path, stack, _LOAD, verify=verify)
        _check_unchanged(path, config_text)
        headers = {name: file.headers[name] for name, file in tensors.items()}
        destinations = _checked_destinations(path, config, headers)
        model = _abstract_model(config, stored_dtype)
        if _HEAD in tensors and _HEAD not in destinations:
            _check_stored_head(path, tensors)
        if mesh is None:
            model = _filled_model(model, destinations, tensors)
        else:
            model = _model_on_mesh(model, destinations, tensors, mesh, rules)
    return model, tokenizer


def _load_own(
    path: Path,
    quantization: Mapping[str, Any],
    dtype: Any,
    scan_layers: bool,
    **where: Any,
) -> tuple[Llama, Any]:
    """`load` for a directory whose weights jaxq has quantized."""
    config_text = read_text(require_file(path, CONFIG, _LOAD), _LOAD)
    entries = parse_json(path / CONFIG, config_text)
    entries.pop("quantization_config", None)
    config = _parse_config(path / CONFIG, entries, scan_layers)
    tokenizer = _load_tokenizer(path / "tokenizer.json")
    weights = require_file(path, SINGLE, _LOAD)
    model = read_quantized(
        weights, config, quantization, _abstract_model, dtype, **where
    )
    _check_unchanged(path, config_text)
    return model, tokenizer


def _check_unchanged(path: Path, config_text: str) -> None:
    """Raises if a save replaced the directory meanwhile: it wrote another config."""
    if read_text(require_file(path, CONFIG, _LOAD), _LOAD) != config_text:
        raise ValueError(
            f"jaxq.models.load: {path} changed while it was read. Load it again."
        )


def save(
    path: str | Path,
    model: Llama,
    *,
    tokenizer: Any = None,
    dtype: Any = jnp.bfloat16,
    **config: Any,
) -> None:
    """Writes a directory that `load` and `transformers` read.

    Writes `config.json` and `model.safetensors`. With a tokenizer it also writes
    `tokenizer.json` and `tokenizer_config.json`. The weights of a quantized model are
    written as `jaxq.save` writes them, and `config.json` says so. `load` reads them,
    and `transformers` refuses them. If the write fails, the old files stay as they
    were. If the process is killed while the new files take their places, the
    directory has no `config.json`, and `load` refuses it. New weights are never read
    with an old config.

    Args:
        path: the directory. It is made if it does not exist. Files of these names in
            it are overwritten. A `model.safetensors.index.json` is removed, because it
            names the weights of an earlier model.
        model: a `Llama` with float or quantized weights.
        tokenizer: a `tokenizers.Tokenizer`, or None to write no tokenizer.
        dtype: the tensors are rounded to it. A quantized model keeps its dtypes.
        **config: more entries of `config.json`, such as `eos_token_id=0`.

    Raises:
        ValueError: the parameters are not those of a `Llama`; no Hugging Face
            architecture has the features of its config; or a layer transforms its
            inputs (`rotate` with `online=`), because the files cannot express that. A
            quantized model can have the transform `jaxq.methods.hadamard`;
            or `dtype` is not a float dtype of at least 16 bits.
        OSError: the directory cannot be made, or a file cannot be written. The error
            names it.

    Example:
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                      num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=1, head_dim=16)
        >>> save("my_model", Llama(config, rngs=nnx.Rngs(0)), eos_token_id=0)
        >>> sorted(path.name for path in Path("my_model").iterdir())
        ['config.json', 'model.safetensors']
    """
    transforms = input_transforms(model)
    if transforms and not (is_quantized(model) and transforms_are_known(model)):
        layer, name = next(iter(transforms.items()))
        raise ValueError(
            f"jaxq.models.save: {len(transforms)} layers transform their inputs, for "
            f"example {layer} by {name}. A Hugging Face directory cannot express that. "
            "Call rotate without online=, or use jaxq.save."
        )
    stored_dtype = jnp.dtype(dtype)
    if stored_dtype.name not in _SAVED_DTYPES:
        raise ValueError(
            f"jaxq.models.save: dtype must be one of {', '.join(_SAVED_DTYPES)}, got "
            f"{stored_dtype.name}."
        )
    entries = model.config.to_hf() | {"dtype": stored_dtype.name} | config
    metadata = {"format": "pt"}
    if is_quantized(model):
        tensors, metadata = model_as_file(model)
        entries |= quantization_entries(model)
    else:
        tensors = _file_tensors(model, stored_dtype)
    texts = {CONFIG: _json_text(entries)}
    if tokenizer is not None:
        texts["tokenizer.json"] = tokenizer.to_str(pretty=True)
        texts["tokenizer_config.json"] = _json_text(_TOKENIZER_CONFIG)
    path = Path(path)
    with naming_errors(path, _SAVE, "the directory cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
        write_directory(path, {SINGLE: lambda: tensors}, texts, _SAVE, metadata)


def _load_quantized(
    path: Path, dtype: np.dtype, scan_layers: bool, verify: bool
) -> tuple[Llama, Any]:
    """`load` for a directory whose weights another library has quantized."""
    with read_checkpoint(path, verify=verify, caller=_LOAD) as checkpoint:
        tokenizer = None
        if checkpoint.tokenizer is not None:
            tokenizer = _parse_tokenizer(path, checkpoint.tokenizer)
        entries = dict(checkpoint.config)
        entries.pop("quantization_config", None)
        file = path / CONFIG if path.is_dir() else path
        config = _parse_config(file, entries, scan_layers)
        headers = headers_of(checkpoint)
        destinations = _checked_destinations(path, config, headers)
        model = _abstract_model(config, dtype)
        return filled_with_quantized(model, destinations, checkpoint, dtype), tokenizer
    raise AssertionError  # the block returns or raises


# The model's side.


def _abstract_model(config: LlamaConfig, dtype: np.dtype) -> Llama:
    """A model of shapes."""
    return nnx.eval_shape(
        lambda: Llama(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )


def _filled_model(
    model: Llama,
    destinations: Mapping[str, _Destination],
    tensors: Mapping[str, TensorFile],
) -> Llama:
    """A model of shapes with the tensors of open files, read one by one."""
    graphdef, params = nnx.split(model)
    flat = dict(nnx.to_flat_state(params))
    stacks: dict[tuple, np.ndarray] = {}
    for name, file in tensors.items():
        if name not in destinations:
            continue
        param_path, layer, _ = destinations[name]
        dtype = flat[param_path].dtype
        tensor = file.read(name)
        if param_path[-1] == "kernel":
            tensor = tensor.T  # [in, out]
        if layer is None:
            flat[param_path] = flat[param_path].replace(jnp.asarray(tensor, dtype))
            continue
        if param_path not in stacks:
            stacks[param_path] = np.empty(flat[param_path].shape, dtype)
        stacks[param_path][layer] = tensor.astype(dtype)
    for param_path in list(stacks):
        # pop frees each stack on the host once it is copied.
        stack = stacks.pop(param_path)
        flat[param_path] = flat[param_path].replace(jnp.asarray(stack))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _model_on_mesh(
    model: Llama,
    destinations: Mapping[str, _Destination],
    tensors: Mapping[str, TensorFile],
    mesh: Mesh,
    rules: Rules,
) -> Llama:
    """A model of shapes with the tensors of open files, on a mesh of devices."""
    graphdef, params = nnx.split(model)
    sources: dict[tuple, Sources] = {}
    for name, (param_path, layer, _) in destinations.items():
        source = Source(tensors[name], name, param_path[-1] == "kernel")
        sources.setdefault(param_path, {})[layer] = source
    flat = dict(nnx.to_flat_state(params))
    for param_path, value in read_on_mesh(params, sources, mesh, rules).items():
        flat[param_path] = flat[param_path].replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def destinations_of(config: LlamaConfig) -> dict[str, _Destination]:
    """Where each tensor of a file goes in the model, by the tensor's name.

    `model.layers.0.self_attn.q_proj.weight [out, in]` of the file is
    `layers.0.self_attn.q_proj.kernel [in, out]` of the model.
    """
    # All layers have the shapes of one. To build one takes the same time for any depth.
    one_layer = dataclasses.replace(config, num_hidden_layers=1, scan_layers=False)
    model = nnx.eval_shape(lambda: Llama(one_layer, rngs=nnx.Rngs(0)))
    destinations = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        last = "bias" if path[-1] == "bias" else "weight"
        name = ".".join(map(str, (*path[:-1], last)))
        shape = param.shape[::-1] if path[-1] == "kernel" else param.shape
        if path[0] != "layers":
            full_name = name if path[0] == "lm_head" else f"model.{name}"
            destinations[full_name] = _Destination(path, None, shape)
            continue
        for layer in range(config.num_hidden_layers):
            layer_name = name.replace("layers.0.", f"model.layers.{layer}.", 1)
            if config.scan_layers:
                stacked_path = ("layers", *path[2:])
                destinations[layer_name] = _Destination(stacked_path, layer, shape)
            else:
                layer_path = ("layers", layer, *path[2:])
                destinations[layer_name] = _Destination(layer_path, None, shape)
    return destinations


def _file_tensors(model: Llama, dtype: np.dtype) -> dict[str, np.ndarray]:
    """The parameters of a model as the tensors of a file.

    Raises:
        ValueError: the parameters are not those of a float Llama with this config.
    """
    destinations = destinations_of(model.config)
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    expected = {destination.path for destination in destinations.values()}
    different = sorted(".".join(map(str, path)) for path in flat.keys() ^ expected)
    if different:
        raise ValueError(
            "jaxq.models.save: the parameters differ from those of a float Llama in "
            f"{', '.join(different)}. Use jaxq.save for a model with other parameters."
        )
    tensors = {}
    for name, (path, layer, shape) in destinations.items():
        param = flat[path]
        value = np.asarray(param[...] if layer is None else param[layer])
        if path[-1] == "kernel":
            value = value.T  # [out, in]
        if value.shape != shape:
            raise ValueError(
                f"jaxq.models.save: {'.'.join(map(str, path))} has the shape "
                f"{list(value.shape)} as tensor {name}; the config needs {list(shape)}."
            )
        tensors[name] = np.ascontiguousarray(value.astype(dtype))
    return tensors


# The files' side.


def _parse_config(file: Path, entries: Any, scan_layers: bool) -> LlamaConfig:
    """The config of a directory, with errors that name the file.

    Args:
        file: `config.json`.
        entries: its text, or the JSON that it holds.
        scan_layers: as in `load`.
    """
    try:
        if isinstance(entries, str):
            entries = parse_json(file, entries)
        return LlamaConfig.from_hf(entries, scan_layers=scan_layers)
    except ValueError as error:
        raise ValueError(f"jaxq.models.load: {file}: {error}") from error


def _load_tokenizer(path: Path) -> Any:
    """The tokenizer of a file, or None if there is no file."""
    if not is_file(path, _LOAD):
        return None
    return _parse_tokenizer(path, read_text(path, _LOAD))


def _parse_tokenizer(path: Path, text: str) -> Any:
    """The tokenizer of the text of `tokenizer.json`."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            f"jaxq.models.load: {path} needs the tokenizers package: "
            "pip install jaxq[hf]"
        ) from error
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(
            f"jaxq.models.load: {path} is damaged: {error}. Download it again."
        ) from error


def _checked_destinations(
    path: Path, config: LlamaConfig, headers: Mapping[str, TensorHeader]
) -> dict[str, _Destination]:
    """Where each tensor goes, after a comparison of the files with the config.

    This reads headers only. A config of many layers beside a small file is refused
    before anything is built.

    Raises:
        ValueError: the tensors are not those of the config.
    """
    matches = [_LAYER_NAME.match(name) for name in headers]
    num_layers = len({match.group(1) for match in matches if match})
    if config.num_hidden_layers > num_layers:
        raise ValueError(
            f"jaxq.models.load: {path / CONFIG}: num_hidden_layers is "
            f"{config.num_hidden_layers}, and the files have the tensors of "
            f"{num_layers} layers. Use the config.json that belongs to the weights."
        )
    destinations = destinations_of(config)
    problems = _mismatches(destinations, headers, config)
    if problems:
        raise ValueError(
            f"jaxq.models.load: {path} does not fit its config.json: "
            f"{'; '.join(problems)}. Use the config.json that belongs to the weights."
        )
    return destinations


def _mismatches(
    destinations: Mapping[str, _Destination],
    headers: Mapping[str, TensorHeader],
    config: LlamaConfig,
) -> list[str]:
    """One line for each kind of difference between the files and the config."""
    missing = sorted(set(destinations) - set(headers))
    unexpected = [
        name
        for name in sorted(set(headers) - set(destinations))
        if not _is_redundant(name, config)
    ]
    wrong_shapes, wrong_dtypes = [], []
    for name, destination in sorted(destinations.items()):
        if name not in headers:
            continue
        shape, dtype = headers[name].shape, headers[name].dtype
        if shape != destination.shape:
            expected = list(destination.shape)
            wrong_shapes.append(f"{name} is {list(shape)}, expected {expected}")
        if dtype not in _FLOAT_DTYPES:
            wrong_dtypes.append(f"{name} holds {dtype}")
    tensors_of = {
        "missing tensors": missing,
        "unexpected tensors": unexpected,
        "wrong shapes": wrong_shapes,
        f"dtypes other than {', '.join(_FLOAT_DTYPES)}": wrong_dtypes,
    }
    return [f"{kind}: {listed(lines)}" for kind, lines in tensors_of.items() if lines]


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    """Whether a tensor that the model does not have may be in a file.

    Old checkpoints store their rotary tables. Checkpoints with tied embeddings may
    store the head as well.
    """
    is_rotary_table = name.endswith(".rotary_emb.inv_freq")
    is_tied_head = config.tie_word_embeddings and name == _HEAD
    return is_rotary_table or is_tied_head


def _check_stored_head(path: Path, tensors: Mapping[str, TensorFile]) -> None:
    """Raises a ValueError if a stored head differs from the embedding it is tied to.

    Without this check `load` would drop the head silently.
    """
    head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
    shape = embedding.headers[_EMBEDDING].shape
    is_equal = head.headers[_HEAD].shape == shape
    # Both tensors are large, so a few rows are compared at a time.
    for start in range(0, shape[0] if is_equal else 0, _ROWS):
        stop = min(start + _ROWS, shape[0])
        is_equal &= np.array_equal(
            head.read_rows(_HEAD, start, stop),
            embedding.read_rows(_EMBEDDING, start, stop),
        )
    if not is_equal:
        raise ValueError(
            f"jaxq.models.load: the config of {path} has tie_word_embeddings=true, but "
            f"the files hold a {_HEAD} that differs from {_EMBEDDING}. Set "
            "tie_word_embeddings to false in config.json to use this head."
        )


def _json_text(entries: Mapping[str, Any]) -> str:
    return json.dumps(entries, indent=2, sort_keys=True) + "\n"
