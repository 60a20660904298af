"""Models from Hugging Face directories, and back.

A directory holds `config.json`, the weights in one or more safetensors files, and the
tokenizer. Tensors are read one by one. `_tensor_map.py` says where each parameter is.
The weights of a model that jaxq quantized are in a
file of `jaxq.save` (`_quantized_weights.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
from jaxq.models._naming import Naming, naming_of
from jaxq.models._parts import read_on_mesh, read_whole
from jaxq.models._quantized import filled_with_quantized, headers_of
from jaxq.models._quantized_weights import (
    is_quantized,
    own_quantization,
    quantization_entries,
    read_quantized,
    transforms_are_known,
)
from jaxq.models._tensor_map import Parts, shapes_of, tensor_map
from jaxq.models.decoder import Decoder, DecoderConfig
from jaxq.models.encoder import Encoder, EncoderConfig
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
_ROWS = 1024
_HEAD = "lm_head.weight"
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_cls_token": "cls",
}
_POOLING_FOLDER = "1_Pooling"
_EMBEDDING_PATH = ("embed_tokens", "embedding")


def load(
    path: str | Path,
    *,
    dtype: Any = None,
    scan_layers: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = None,
    verify: bool = True,
) -> tuple[Any, Any]:
    """Reads a Hugging Face directory of a model.

    `jaxq.models.model_types()` lists the families of decoders. A directory with the
    `model_type` "bert" gives an `Encoder`.

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
        scan_layers: stack the layers and run them by one scan, see `DecoderConfig`.
        mesh: puts the parameters on this mesh of devices. Of each tensor, only the
            parts of this process's devices are read, one by one. Weights that another
            library quantized are read whole, one by one, and then put on the mesh. If
            the mesh has devices of several processes, all of them must make this call.
            If one of them cannot read its parts, all of them raise.
        rules: the mesh axes of parameters by pattern, as in `jaxq.sharding.place`:
            `{"**/up_proj/kernel": PartitionSpec(None, "t"), "**": PartitionSpec()}`.
            Paths are those of the model, for example "layers/0/mlp/up_proj/kernel", or
            "layers/mlp/up_proj/kernel" if layers are stacked. None replicates all.
        verify: compare the checksums of weight files that `save` wrote. Other files
            have none.

    Returns:
        The model, a `Decoder` or an `Encoder`, and a `tokenizers.Tokenizer`. The
        tokenizer is None if the directory has no `tokenizer.json`.

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
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                        num_hidden_layers=1, num_attention_heads=2,
        ...                        num_key_value_heads=1, head_dim=16)
        >>> save("my_model", Decoder(config, rngs=nnx.Rngs(0)))
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
) -> tuple[Any, Any]:
    """`load` after the checks of its arguments."""
    if has_quantized_weights(path, _LOAD):
        return _load_quantized(path, stored_dtype, scan_layers, mesh, rules, verify)
    config_text = read_text(require_file(path, CONFIG, _LOAD), _LOAD)
    model_type, config = _parse_config(path / CONFIG, config_text, scan_layers)
    # The tokenizer comes before the weights, because it fails sooner.
    tokenizer = _load_tokenizer(path / "tokenizer.json")
    with contextlib.ExitStack() as stack:
        files = open_weights(path, stack, _LOAD, verify=verify)
        _check_unchanged(path, config_text)
        headers = {name: file.headers[name] for name, file in files.items()}
        tensors = _checked_tensors(path, config, model_type, headers)
        model = _abstract_model(config, stored_dtype)
        if _HEAD in files and _has_tied_head(config):
            _check_stored_head(path, tensors[_EMBEDDING_PATH][()].name, files)
        if mesh is None:
            model = _filled_model(model, tensors, files)
        else:
            model = _model_on_mesh(model, tensors, files, mesh, rules)
    return model, tokenizer


def _load_own(
    path: Path,
    quantization: Mapping[str, Any],
    dtype: Any,
    scan_layers: bool,
    **where: Any,
) -> tuple[Any, Any]:
    """`load` for a directory whose weights jaxq has quantized."""
    config_text = read_text(require_file(path, CONFIG, _LOAD), _LOAD)
    entries = parse_json(path / CONFIG, config_text)
    entries.pop("quantization_config", None)
    _, config = _parse_config(path / CONFIG, entries, scan_layers)
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
    model: Decoder | Encoder,
    *,
    tokenizer: Any = None,
    dtype: Any = jnp.bfloat16,
    **config: Any,
) -> None:
    """Writes a directory that `load` and `transformers` read.

    Writes `config.json` and `model.safetensors`. With a tokenizer it also writes
    `tokenizer.json` and `tokenizer_config.json`, and for an `Encoder` the files of
    sentence-transformers that hold its pooling. The weights of a quantized model are
    written as `jaxq.save` writes them, and `config.json` says so. `load` reads them,
    and `transformers` refuses them. If the write fails, the old files stay as they
    were. If the process is killed while the new files take their places, the
    directory has no `config.json`, and `load` refuses it. New weights are never read
    with an old config.

    Args:
        path: the directory. It is made if it does not exist. Files of these names in
            it are overwritten. A `model.safetensors.index.json` is removed, because it
            names the weights of an earlier model.
        model: a `Decoder` or an `Encoder` with float or quantized weights.
        tokenizer: a `tokenizers.Tokenizer`, or None to write no tokenizer.
        dtype: the tensors are rounded to it. A quantized model keeps its dtypes.
        **config: more entries of `config.json`, such as `eos_token_id=0`.

    Raises:
        ValueError: the parameters are not those of the model's class; no Hugging Face
            architecture has the features of its config; or a layer transforms its
            inputs (`rotate` with `online=`), because the files cannot express that. A
            quantized model can have the transform `jaxq.methods.hadamard`;
            or `dtype` is not a float dtype of at least 16 bits.
        OSError: the directory cannot be made, or a file cannot be written. The error
            names it.

    Example:
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                        num_hidden_layers=1, num_attention_heads=2,
        ...                        num_key_value_heads=1, head_dim=16)
        >>> save("my_model", Decoder(config, rngs=nnx.Rngs(0)), eos_token_id=0)
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
    entries = model.config.to_hf()
    naming = naming_of(entries["model_type"])
    entries |= {"dtype": stored_dtype.name} | config
    metadata = {"format": "pt"}
    if is_quantized(model):
        tensors, metadata = model_as_file(model)
        entries |= quantization_entries(model)
    else:
        tensors = _file_tensors(model, naming, stored_dtype)
    texts = {CONFIG: _json_text(entries)}
    if tokenizer is not None:
        texts["tokenizer.json"] = tokenizer.to_str(pretty=True)
        texts["tokenizer_config.json"] = _json_text(_TOKENIZER_CONFIG)
    if isinstance(model, Encoder):
        texts |= _pooling_files(model.config)
    path = Path(path)
    with naming_errors(path, _SAVE, "the directory cannot be written"):
        for name in texts:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
        write_directory(path, {SINGLE: lambda: tensors}, texts, _SAVE, metadata)


def _load_quantized(
    path: Path,
    dtype: np.dtype,
    scan_layers: bool,
    mesh: Mesh | None,
    rules: Rules,
    verify: bool,
) -> tuple[Any, Any]:
    """`load` for a directory whose weights another library has quantized."""
    with read_checkpoint(path, verify=verify, caller=_LOAD) as checkpoint:
        tokenizer = None
        if checkpoint.tokenizer is not None:
            tokenizer = _parse_tokenizer(path, checkpoint.tokenizer)
        entries = dict(checkpoint.config)
        entries.pop("quantization_config", None)
        file = path / CONFIG if path.is_dir() else path
        model_type, config = _parse_config(file, entries, scan_layers)
        headers = headers_of(checkpoint)
        tensors = _checked_tensors(path, config, model_type, headers)
        model = _abstract_model(config, dtype)
        model = filled_with_quantized(model, tensors, checkpoint, dtype, mesh, rules)
        return model, tokenizer
    raise AssertionError  # the block returns or raises


# The model's side.


def _abstract_model(config: DecoderConfig | EncoderConfig, dtype: np.dtype) -> Any:
    """A model of shapes."""
    make_model: Any = Encoder if isinstance(config, EncoderConfig) else Decoder
    return nnx.eval_shape(
        lambda: make_model(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )


def _filled_model(
    model: Any, tensors: Mapping[tuple, Parts], files: Mapping[str, TensorFile]
) -> Any:
    """A model of shapes with the tensors of open files, read one by one."""
    graphdef, params = nnx.split(model)
    flat = dict(nnx.to_flat_state(params))
    for path, parts in tensors.items():
        value = read_whole(parts, files, flat[path].dtype)
        flat[path] = flat[path].replace(jnp.asarray(value))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _model_on_mesh(
    model: Any,
    tensors: Mapping[tuple, Parts],
    files: Mapping[str, TensorFile],
    mesh: Mesh,
    rules: Rules,
) -> Any:
    """A model of shapes with the tensors of open files, on a mesh of devices."""
    graphdef, params = nnx.split(model)
    flat = dict(nnx.to_flat_state(params))
    for path, value in read_on_mesh(params, tensors, files, mesh, rules).items():
        flat[path] = flat[path].replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _file_tensors(
    model: Decoder | Encoder, naming: Naming, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """The parameters of a model as the tensors of a file.

    Raises:
        ValueError: the parameters are not those of a float model with this config.
    """
    expected = tensor_map(model.config, naming)
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    different = sorted(".".join(map(str, path)) for path in flat.keys() ^ set(expected))
    if different:
        raise ValueError(
            "jaxq.models.save: the parameters differ from those of a float "
            f"{type(model).__name__} in {', '.join(different)}. Use jaxq.save for a "
            "model with other parameters."
        )
    tensors: dict[str, np.ndarray] = {}
    for path, parts in expected.items():
        for index, part in parts.items():
            value = np.asarray(flat[path][index] if index else flat[path][...])
            if value.shape != part.value_shape:
                raise ValueError(
                    f"jaxq.models.save: {'.'.join(map(str, path))} has the shape "
                    f"{list(value.shape)} as tensor {part.name}; the config needs "
                    f"{list(part.value_shape)}."
                )
            part.write(tensors, value, dtype)
    return tensors


# The files' side.


def _parse_config(
    file: Path, entries: Any, scan_layers: bool
) -> tuple[str, DecoderConfig | EncoderConfig]:
    """The family and the config of a directory, with errors that name the file.

    Args:
        file: `config.json`.
        entries: its text, or the JSON that it holds.
        scan_layers: as in `load`.
    """
    try:
        if isinstance(entries, str):
            entries = parse_json(file, entries)
        if isinstance(entries, dict) and entries.get("model_type") == "bert":
            return "bert", _encoder_config(file.parent, entries, scan_layers)
        config = DecoderConfig.from_hf(entries, scan_layers=scan_layers)
        return entries["model_type"], config
    except ValueError as error:
        raise ValueError(f"jaxq.models.load: {file}: {error}") from error


def _encoder_config(
    path: Path, entries: Mapping[str, Any], scan_layers: bool
) -> EncoderConfig:
    """The config of an encoder, with the pooling of a sentence-transformers directory.

    `modules.json` names the steps from tokens to the vector of a text.
    """
    if scan_layers:
        raise ValueError("scan_layers=True is for decoders. Leave it out.")
    modules = _read_optional_json(path / "modules.json") or []
    is_list = isinstance(modules, list)
    if not is_list or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{path / 'modules.json'} is not a JSON list of objects")
    options: dict[str, Any] = {}
    for module in modules:
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Normalize":
            options["normalizes"] = True
        elif kind == "Pooling":
            folder = str(module.get("path"))
            if folder != Path(folder).name:
                raise ValueError(
                    f"modules.json has the path {folder!r}; expected the name of a "
                    "folder in the directory"
                )
            options["pooling"] = _pooling(path / folder / CONFIG)
        elif kind != "Transformer":
            raise ValueError(
                f"modules.json has the step {module.get('type')!r}; expected "
                "Transformer, Pooling and Normalize"
            )
    return EncoderConfig.from_hf(entries, **options)


def _pooling(file: Path) -> str:
    """The pooling that a file of sentence-transformers describes."""
    entries = _read_optional_json(file) or {}
    if not isinstance(entries, dict):
        raise ValueError(f"{file} is not a JSON object")
    modes = [key for key, value in entries.items() if value is True]
    modes = [key for key in modes if key.startswith("pooling_mode_")]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ValueError(
            f"{file} has {', '.join(modes) or 'no pooling mode'}; expected one of "
            f"{', '.join(_POOLINGS)}"
        )
    return _POOLINGS[modes[0]]


def _pooling_files(config: EncoderConfig) -> dict[str, str]:
    """The files of sentence-transformers that say how a text becomes one vector."""
    kinds = {"": "Transformer", _POOLING_FOLDER: "Pooling"}
    if config.normalizes:
        kinds["2_Normalize"] = "Normalize"
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": folder,
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, (folder, kind) in enumerate(kinds.items())
    ]
    pooling: dict[str, Any] = {
        mode: name == config.pooling for mode, name in _POOLINGS.items()
    }
    pooling["word_embedding_dimension"] = config.hidden_size
    return {
        "modules.json": json.dumps(modules, indent=2) + "\n",
        f"{_POOLING_FOLDER}/{CONFIG}": _json_text(pooling),
    }


def _read_optional_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no file."""
    return parse_json(path, read_text(path, _LOAD)) if is_file(path, _LOAD) else None


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


def _naming_in(names: Iterable[str], naming: Naming) -> Naming:
    """The naming of the files, some of which leave out the prefix."""
    has_prefix = any(name.startswith(naming.prefix) for name in names)
    if naming.is_prefix_optional and not has_prefix:
        return dataclasses.replace(naming, prefix="")
    return naming


def _has_tied_head(config: DecoderConfig | EncoderConfig) -> bool:
    return isinstance(config, DecoderConfig) and config.tie_word_embeddings


def _checked_tensors(
    path: Path,
    config: DecoderConfig | EncoderConfig,
    model_type: str,
    headers: Mapping[str, TensorHeader],
) -> dict[tuple, Parts]:
    """Where each parameter is, after a comparison of the files with the config.

    This reads headers only. A config of many layers beside a small file is refused
    before anything is built.

    Raises:
        ValueError: the tensors are not those of the config.
    """
    naming = _naming_in(headers, naming_of(model_type))
    layer_name = re.compile(re.escape(f"{naming.prefix}{naming.layers}.") + r"(\d+)\.")
    matches = [layer_name.match(name) for name in headers]
    num_layers = len({match.group(1) for match in matches if match})
    if config.num_hidden_layers > num_layers:
        raise ValueError(
            f"jaxq.models.load: {path / CONFIG}: num_hidden_layers is "
            f"{config.num_hidden_layers}, and the files have the tensors of "
            f"{num_layers} layers. Use the config.json that belongs to the weights."
        )
    tensors = tensor_map(config, naming)
    redundant = naming.redundant
    if _has_tied_head(config):  # such files may store the head as well
        redundant = (*redundant, _HEAD)
    problems = _mismatches(shapes_of(tensors), headers, redundant)
    if problems:
        raise ValueError(
            f"jaxq.models.load: {path} does not fit its config.json: "
            f"{'; '.join(problems)}. Use the config.json that belongs to the weights."
        )
    return tensors


def _mismatches(
    shapes: Mapping[str, tuple[int, ...]],
    headers: Mapping[str, TensorHeader],
    redundant: tuple[str, ...],
) -> list[str]:
    """One line for each kind of difference between the files and the config.

    Args:
        shapes: of the tensors that the model needs.
        headers: of the tensors in the files.
        redundant: endings of the names of tensors that may be in the files as well.
    """
    missing = sorted(set(shapes) - set(headers))
    unexpected = [
        name
        for name in sorted(set(headers) - set(shapes))
        if not name.endswith(redundant)
    ]
    wrong_shapes, wrong_dtypes = [], []
    for name, expected in sorted(shapes.items()):
        if name not in headers:
            continue
        shape, dtype = headers[name].shape, headers[name].dtype
        if shape != expected:
            wrong_shapes.append(f"{name} is {list(shape)}, expected {list(expected)}")
        if dtype not in _FLOAT_DTYPES:
            wrong_dtypes.append(f"{name} holds {dtype}")
    tensors_of = {
        "missing tensors": missing,
        "unexpected tensors": unexpected,
        "wrong shapes": wrong_shapes,
        f"dtypes other than {', '.join(_FLOAT_DTYPES)}": wrong_dtypes,
    }
    return [f"{kind}: {listed(lines)}" for kind, lines in tensors_of.items() if lines]


def _check_stored_head(
    path: Path, embedding_name: str, files: Mapping[str, TensorFile]
) -> None:
    """Raises a ValueError if a stored head differs from the embedding it is tied to.

    Without this check `load` would drop the head silently.
    """
    head, embedding = files[_HEAD], files[embedding_name]
    shape = embedding.headers[embedding_name].shape
    is_equal = head.headers[_HEAD].shape == shape
    # Both tensors are large, so a few rows are compared at a time.
    for start in range(0, shape[0] if is_equal else 0, _ROWS):
        stop = min(start + _ROWS, shape[0])
        is_equal &= np.array_equal(
            head.read_rows(_HEAD, start, stop),
            embedding.read_rows(embedding_name, start, stop),
        )
    if not is_equal:
        raise ValueError(
            f"jaxq.models.load: the config of {path} has tie_word_embeddings=true, but "
            f"the files hold a {_HEAD} that differs from {embedding_name}. Set "
            "tie_word_embeddings to false in config.json to use this head."
        )


def _json_text(entries: Mapping[str, Any]) -> str:
    return json.dumps(entries, indent=2, sort_keys=True) + "\n"
