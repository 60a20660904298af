"""Models from Hugging Face directories, and back.

A directory holds `config.json`, the weights in one or more safetensors files, and the
tokenizer. Tensors are read one by one. `_tensor_map.py` says where each parameter is.
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
    NewFile,
    TensorFile,
    TensorHeader,
    is_file,
    leftovers,
    locked_folder,
    naming_errors,
    remove_leftovers,
    sync_folder,
    write_tensors,
)
from jaxq.models._naming import Naming, naming_of
from jaxq.models._parts import read_on_mesh, read_part
from jaxq.models._tensor_map import Parts, shapes_of, tensor_map
from jaxq.models.decoder import Decoder, DecoderConfig
from jaxq.models.encoder import Encoder, EncoderConfig
from jaxq.nn.layers import input_transforms
from jaxq.sharding import Rules, check_mesh

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
_SAVED_DTYPES = ("float64", "float32", "float16", "bfloat16")
_SAVE = "jaxq.models.save"
_LOAD = "jaxq.models.load"
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
}
_ROWS = 1024
# An error names so many tensors of each kind.
_MOST_LINES = 20
_HEAD = "lm_head.weight"
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_cls_token": "cls",
}
_EMBEDDING_PATH = ("embed_tokens", "embedding")


def load(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    scan_layers: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = None,
    verify: bool = True,
) -> tuple[Any, Any]:
    """Reads a Hugging Face directory of a model with float weights.

    `jaxq.models.model_types()` lists the families of decoders. A directory with the
    `model_type` "bert" gives an `Encoder`.

    Reads `config.json`, `tokenizer.json` and `model.safetensors`. If there is a
    `model.safetensors.index.json`, it names the weight files instead. Tensors are read
    one by one, so host memory peaks at the model plus its largest tensor.

    Args:
        path: the directory.
        dtype: float32 or bfloat16. Parameters are stored in it, and matrix products
            read it. Products accumulate in float32 in both cases. A bfloat16 checkpoint
            is exact in float32.
        scan_layers: stack the layers and run them by one scan, see `DecoderConfig`.
        mesh: puts the parameters on this mesh of devices. Of each tensor, only the
            parts of this process's devices are read, one by one.
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
        ValueError: `dtype` is not float32 or bfloat16; a file is damaged; the config is
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
    stored_dtype = jnp.dtype(dtype)
    if stored_dtype.name not in ("float32", "bfloat16"):
        raise ValueError(
            "jaxq.models.load: dtype must be float32 or bfloat16, got "
            f"{stored_dtype.name}."
        )
    if mesh is not None:
        check_mesh(mesh, "jaxq.models.load")
    elif rules is not None:
        raise TypeError("jaxq.models.load: rules= needs mesh=, the mesh of devices.")
    config_text = _read_text(_require_file(path, _CONFIG))
    model_type, config = _parse_config(path / _CONFIG, config_text, scan_layers)
    make_model: Any = Encoder if isinstance(config, EncoderConfig) else Decoder
    # The tokenizer comes before the weights, because it fails sooner.
    tokenizer = _load_tokenizer(path / "tokenizer.json")
    with contextlib.ExitStack() as stack:
        files = _open_tensors(path, stack, verify)
        # A save that replaced the directory meanwhile wrote another config.
        if _read_text(_require_file(path, _CONFIG)) != config_text:
            raise ValueError(
                f"jaxq.models.load: {path} changed while it was read. Load it again."
            )
        naming = _naming_in(files, naming_of(model_type))
        tensors = _checked_tensors(path, config, naming, files)
        model = nnx.eval_shape(
            lambda: make_model(
                config, dtype=stored_dtype, param_dtype=stored_dtype, rngs=nnx.Rngs(0)
            )
        )
        if _HEAD in files and _has_tied_head(config):
            _check_stored_head(path, tensors[_EMBEDDING_PATH][()].name, files)
        if mesh is None:
            model = _filled_model(model, tensors, files)
        else:
            model = _model_on_mesh(model, tensors, files, mesh, rules)
    return model, tokenizer


def save(
    path: str | Path,
    model: Decoder,
    *,
    tokenizer: Any = None,
    dtype: Any = jnp.bfloat16,
    **config: Any,
) -> None:
    """Writes a directory that `load` and `transformers` read.

    Writes `config.json` and `model.safetensors`. With a tokenizer it also writes
    `tokenizer.json` and `tokenizer_config.json`. If the write fails, the old files stay
    as they were. If the process is killed while the new files take their places, the
    directory has no `config.json`, and `load` refuses it. New weights are never read
    with an old config.

    Args:
        path: the directory. It is made if it does not exist. Files of these names in
            it are overwritten. A `model.safetensors.index.json` is removed, because it
            names the weights of an earlier model.
        model: a `Decoder` with float weights. Use `jaxq.save` for a quantized model.
        tokenizer: a `tokenizers.Tokenizer`, or None to write no tokenizer.
        dtype: the tensors are rounded to it.
        **config: more entries of `config.json`, such as `eos_token_id=0`.

    Raises:
        ValueError: the parameters are not those of a float `Decoder`; no Hugging Face
            architecture has the features of its config; or a layer transforms its
            inputs (`rotate` with `online=`), because the files cannot express that;
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
    if transforms:
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
    tensors = _file_tensors(model, naming_of(entries["model_type"]), stored_dtype)
    entries |= {"dtype": stored_dtype.name} | config
    texts = {_CONFIG: _json_text(entries)}
    if tokenizer is not None:
        texts["tokenizer.json"] = tokenizer.to_str(pretty=True)
        texts["tokenizer_config.json"] = _json_text(_TOKENIZER_CONFIG)
    path = Path(path)
    with naming_errors(path, _SAVE, "the directory cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
        _write_directory(path, tensors, texts)


# The model's side.


def _filled_model(
    model: Any, tensors: Mapping[tuple, Parts], files: Mapping[str, TensorFile]
) -> Any:
    """A model of shapes with the tensors of open files, read one by one."""
    graphdef, params = nnx.split(model)
    flat = dict(nnx.to_flat_state(params))
    for path, parts in tensors.items():
        value = read_part(parts, files, flat[path].dtype, None)
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
    model: Decoder, naming: Naming, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """The parameters of a model as the tensors of a file.

    Raises:
        ValueError: the parameters are not those of a float Decoder with this config.
    """
    expected = tensor_map(model.config, naming)
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    different = sorted(".".join(map(str, path)) for path in flat.keys() ^ set(expected))
    if different:
        raise ValueError(
            "jaxq.models.save: the parameters differ from those of a float Decoder in "
            f"{', '.join(different)}. Use jaxq.save for a model with other parameters."
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
    file: Path, text: str, scan_layers: bool
) -> tuple[str, DecoderConfig | EncoderConfig]:
    """The family and the config of a directory, with errors that name the file."""
    try:
        entries = _parse_json(file, text)
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
    options: dict[str, Any] = {}
    for module in modules:
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Normalize":
            options["normalizes"] = True
        elif kind == "Pooling":
            file = path / str(module.get("path")) / _CONFIG
            options["pooling"] = _pooling(file)
        elif kind != "Transformer":
            raise ValueError(
                f"modules.json has the step {module.get('type')!r}; expected "
                "Transformer, Pooling and Normalize"
            )
    return EncoderConfig.from_hf(entries, **options)


def _pooling(file: Path) -> str:
    """The pooling that a file of sentence-transformers describes."""
    entries = _read_optional_json(file) or {}
    modes = [key for key, value in entries.items() if value is True]
    modes = [key for key in modes if key.startswith("pooling_mode_")]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ValueError(
            f"{file} has {', '.join(modes) or 'no pooling mode'}; expected one of "
            f"{', '.join(_POOLINGS)}"
        )
    return _POOLINGS[modes[0]]


def _read_optional_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no file."""
    return _parse_json(path, _read_text(path)) if is_file(path, _LOAD) else None


def _require_file(path: Path, name: str) -> Path:
    if is_file(path / name, _LOAD):
        return path / name
    if name == _CONFIG and _is_interrupted(path):
        raise FileNotFoundError(
            f"{_LOAD}: {path} has no {name}, because a save was interrupted or still "
            f"runs. {_remaining(path)} Save the model again."
        )
    raise FileNotFoundError(
        f"{_LOAD}: {path} has no {name}; expected a Hugging Face model directory. "
        "Check the path, or download the directory again."
    )


def _is_interrupted(path: Path) -> bool:
    """Whether a directory has the temporary files of a save that did not end."""
    try:
        return bool(leftovers(path))
    except OSError:  # the directory does not exist, or cannot be listed
        return False


def _remaining(path: Path) -> str:
    """What an interrupted save has left in a directory."""
    names = sorted(file.name for file in path.iterdir() if file.name[0] != ".")
    if not names:
        return "The directory has no other file."
    return (
        f"The files that remain are {', '.join(names)}. They may be those of the old "
        "model or those of the new one."
    )


def _read_text(path: Path) -> str:
    try:
        with naming_errors(path, _LOAD, "the file cannot be read"):
            data = path.read_bytes()
        return data.decode()
    except ValueError as error:
        raise ValueError(
            f"jaxq.models.load: {path} is damaged: {error}. Download it again."
        ) from error


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Download it again.") from error


def _load_tokenizer(path: Path) -> Any:
    """The tokenizer of a file, or None if there is no file."""
    if not is_file(path, _LOAD):
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            f"jaxq.models.load: {path} needs the tokenizers package: "
            "pip install jaxq[hf]"
        ) from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(
            f"jaxq.models.load: {path} is damaged: {error}. Download it again."
        ) from error


def _open_tensors(
    path: Path, stack: contextlib.ExitStack, verify: bool
) -> dict[str, TensorFile]:
    """The open file of each tensor, by the tensor's name.

    Raises:
        FileNotFoundError: a weight file is missing.
        ValueError: the index or a weight file is damaged; a tensor is not in the file
            that the index names, or is in two files.
    """
    index_path = path / _INDEX
    index = _read_index(index_path) if is_file(index_path, _LOAD) else None
    names = [_SINGLE] if index is None else sorted(set(index.values()))
    tensors: dict[str, TensorFile] = {}
    for file_name in names:
        file_path = _require_file(path, file_name)
        file = TensorFile(file_path, "jaxq.models.load", verify=verify)
        stack.enter_context(file)
        for name in file.headers:
            if name in tensors:
                raise ValueError(
                    f"jaxq.models.load: {path}: {name} is both in "
                    f"{tensors[name].path.name} and in {file_name}. Remove it from one "
                    "of the files."
                )
            tensors[name] = file
    lost = [
        f"{name} is not in {file_name}"
        for name, file_name in sorted((index or {}).items())
        if name not in tensors or tensors[name].path.name != file_name
    ]
    if lost:
        raise ValueError(
            f"jaxq.models.load: {index_path} is damaged: {_listed(lost)}. Download it "
            "again."
        )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """The file name of each tensor, by the tensor's name."""
    try:
        index = _parse_json(path, _read_text(path))
    except ValueError as error:
        raise ValueError(f"jaxq.models.load: {error}") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not _are_names(files.values()):
        raise ValueError(
            f"jaxq.models.load: {path} is damaged: it has no weight_map that "
            "names the file of each tensor. Download it again."
        )
    for name, file_name in files.items():
        # An index of a stranger must not reach files outside its directory.
        is_plain = file_name == Path(file_name).name and "\\" not in file_name
        if not is_plain or "\0" in file_name or file_name in ("", ".."):
            raise ValueError(
                f"jaxq.models.load: {path} names the file {file_name!r} for {name}. "
                "Weight files must be in the directory of the index. Move the file "
                "there, and correct the index."
            )
    return files


def _are_names(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _naming_in(files: Mapping[str, TensorFile], naming: Naming) -> Naming:
    """The naming of the files, some of which leave out the prefix."""
    has_prefix = any(name.startswith(naming.prefix) for name in files)
    if naming.is_prefix_optional and not has_prefix:
        return dataclasses.replace(naming, prefix="")
    return naming


def _has_tied_head(config: DecoderConfig | EncoderConfig) -> bool:
    return isinstance(config, DecoderConfig) and config.tie_word_embeddings


def _checked_tensors(
    path: Path,
    config: DecoderConfig | EncoderConfig,
    naming: Naming,
    files: Mapping[str, TensorFile],
) -> dict[tuple, Parts]:
    """Where each parameter is, after a comparison of the files with the config.

    This reads headers only. A config of many layers beside a small file is refused
    before anything is built.

    Raises:
        ValueError: the tensors are not those of the config.
    """
    headers = {name: file.headers[name] for name, file in files.items()}
    layer_name = re.compile(re.escape(f"{naming.prefix}{naming.layers}.") + r"(\d+)\.")
    matches = [layer_name.match(name) for name in headers]
    num_layers = len({match.group(1) for match in matches if match})
    if config.num_hidden_layers > num_layers:
        raise ValueError(
            f"jaxq.models.load: {path / _CONFIG}: num_hidden_layers is "
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
    return [f"{kind}: {_listed(lines)}" for kind, lines in tensors_of.items() if lines]


def _listed(lines: list[str]) -> str:
    """The first lines of a list that can be very long."""
    more = len(lines) - _MOST_LINES
    end = f" and {more} more" if more > 0 else ""
    return ", ".join(lines[:_MOST_LINES]) + end


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


def _write_directory(
    path: Path, tensors: Mapping[str, np.ndarray], texts: Mapping[str, str]
) -> None:
    """Writes all files of a directory, so that `load` sees all of them or none.

    The files are written beside their targets first. This is where a disk can be full.
    Then they take their places, which needs a few renames. A directory is read by its
    config, so the old config goes first and the new one comes last. If the process is
    killed between the two, the directory has no config.
    """
    for name in (_SINGLE, *texts):
        remove_leftovers(path, name)
    with contextlib.ExitStack() as stack:
        weights = stack.enter_context(NewFile(path / _SINGLE, _SAVE))
        write_tensors(weights, tensors, {"format": "pt"})
        weights.sync()
        new_texts = {}
        for name, text in texts.items():
            new_texts[name] = stack.enter_context(NewFile(path / name, _SAVE))
            new_texts[name].write(text.encode())
            new_texts[name].sync()
        new_config = new_texts.pop(_CONFIG)
        with locked_folder(path):
            (path / _CONFIG).unlink(missing_ok=True)
            sync_folder(path)
            # The index of an earlier model names other weight files.
            (path / _INDEX).unlink(missing_ok=True)
            for new_file in (weights, *new_texts.values()):
                new_file.replace()
            sync_folder(path)
            new_config.replace()
