"""Hugging Face directories in and out, one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxq.models.llama import Llama, LlamaConfig
from jaxq.nn.layers import input_transforms

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = ("BF16", "F16", "F32", "F64")


def load(
    path: str | Path, *, dtype: Any = jnp.float32, scan_layers: bool = False
) -> tuple[Llama, Any]:
    """Reads a Hugging Face directory of a Llama-family model.

    Reads `config.json`, `model.safetensors` (or the shards named by `model.safetensors.index.json`) and
    `tokenizer.json`. Tensors are read one by one, so host memory peaks at the model plus the largest tensor.

    Args:
        path: the directory.
        dtype: float32 or bfloat16: what parameters are stored in, and what matrix products read (they accumulate
            in float32 either way). A bfloat16 checkpoint is exact in float32.
        scan_layers: stack the layers and run them by one scan, see `LlamaConfig`.

    Returns:
        The model and a `tokenizers.Tokenizer`; the tokenizer is None if the directory has no `tokenizer.json`.

    Raises:
        FileNotFoundError: no config.json or no safetensors in the directory.
        ValueError: another dtype, a damaged file, an unsupported config, or one message with every missing,
            unexpected or mis-shaped tensor and those that hold no floats.
        ImportError: there is a tokenizer.json but the `tokenizers` package is not installed.

    Example:
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        >>> save("my_model", Llama(config, rngs=nnx.Rngs(0)))
        >>> model, tokenizer = load("my_model", dtype=jnp.bfloat16)
        >>> model(jnp.array([[1, 2, 3]])).shape, tokenizer
        ((1, 3, 64), None)
    """
    path = Path(path)
    if jnp.dtype(dtype).name not in ("float32", "bfloat16"):
        raise ValueError(
            f"jaxq.models.load: dtype must be float32 or bfloat16, got {jnp.dtype(dtype).name}."
        )
    try:
        config = LlamaConfig.from_hf(
            _read_json(_existing(path, "config.json")), scan_layers=scan_layers
        )
    except ValueError as error:
        raise ValueError(
            f"jaxq.models.load: {path / 'config.json'}: {error}"
        ) from error
    tokenizer = _load_tokenizer(
        path / "tokenizer.json"
    )  # before the weights: it is the quicker one to fail
    model = nnx.eval_shape(
        lambda: Llama(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )
    graphdef, params = nnx.split(model)
    wanted = _names(config, params)
    files = _tensor_files(path)
    problems = _check(wanted, _headers(path, files), config)
    if problems:
        raise ValueError(
            f"jaxq.models.load: {path} does not fit its config.json: "
            + "; ".join(problems)
            + "."
        )

    flat = dict(nnx.to_flat_state(params))
    stacks: dict[tuple, np.ndarray] = {}
    for name, tensor in _read(path, files):
        if name not in wanted:
            _check_tied(name, tensor, path, files)
            continue
        key, layer, _ = wanted[name]
        tensor = tensor.T if key[-1] == "kernel" else tensor
        if layer is None:
            flat[key] = flat[key].replace(jnp.asarray(tensor, dtype))
            continue
        if key not in stacks:
            stacks[key] = np.empty(flat[key].shape, jnp.dtype(dtype))
        stacks[key][layer] = tensor.astype(dtype)
    for key in list(stacks):
        flat[key] = flat[key].replace(jnp.asarray(stacks.pop(key)))
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), tokenizer


def save(
    path: str | Path,
    model: Llama,
    *,
    tokenizer: Any = None,
    dtype: Any = jnp.bfloat16,
    **config: Any,
) -> None:
    """Writes a directory that `load` and `transformers` read: config.json, model.safetensors, tokenizer files.

    Args:
        path: the directory, made if it is not there; files of these names are overwritten.
        model: a float `Llama` (a quantized one goes through `jaxq.save`).
        tokenizer: a `tokenizers.Tokenizer`, or None to write no tokenizer.
        dtype: what the tensors are rounded to.
        **config: more entries of config.json, such as `eos_token_id=0`.

    Raises:
        ValueError: the parameters are not those of a float `Llama`; layers transform their inputs (`rotate` with
            `online=`), which such a directory cannot say.

    Example:
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        >>> save("my_model", Llama(config, rngs=nnx.Rngs(0)), eos_token_id=0)
        >>> sorted(path.name for path in Path("my_model").iterdir())
        ['config.json', 'model.safetensors']
    """
    if transforms := input_transforms(model):
        layer, name = next(iter(transforms.items()))
        raise ValueError(
            f"save: inputs of {layer} go through {name}, one of {len(transforms)} layers, and a Hugging Face directory "
            "cannot say so. Rotate without online=, or use jaxq.save."
        )
    entries = model.config.to_hf() | {"dtype": jnp.dtype(dtype).name} | config
    params = nnx.state(model, nnx.Param)
    flat = dict(nnx.to_flat_state(params))
    tensors: dict[str, np.ndarray] = {}
    for name, (key, layer, shape) in _names(model.config, params).items():
        value = (
            np.asarray(flat[key][...])
            if layer is None
            else np.asarray(flat[key][layer])
        )
        value = value.T if key[-1] == "kernel" else value
        tensors[name] = np.ascontiguousarray(value.astype(jnp.dtype(dtype)))
        if tensors[name].shape != shape:
            raise ValueError(
                f"save: {'.'.join(map(str, key))} is {list(value.shape)}; the config asks {list(shape)}."
            )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    _replace(
        path / _SINGLE, lambda file: save_file(tensors, file, metadata={"format": "pt"})
    )
    text = json.dumps(entries, indent=2, sort_keys=True) + "\n"
    _replace(path / "config.json", lambda file: file.write_text(text))
    if tokenizer is not None:
        _replace(path / "tokenizer.json", lambda file: tokenizer.save(str(file)))
        extra = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        _replace(
            path / "tokenizer_config.json",
            lambda file: file.write_text(json.dumps(extra, indent=2) + "\n"),
        )


def _names(
    config: LlamaConfig, params: Any
) -> dict[str, tuple[tuple, int | None, tuple[int, ...]]]:
    """Hugging Face name -> (our path, layer of a stack or None, shape in the file).

    `layers.0.self_attn.q_proj.kernel [in, out]` is `model.layers.0.self_attn.q_proj.weight [out, in]`.
    """
    expected = nnx.state(
        nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param
    )
    shapes = {key: param.shape for key, param in nnx.to_flat_state(expected)}
    got = {key for key, _ in nnx.to_flat_state(params)}
    if got != set(shapes):
        odd = sorted(".".join(map(str, key)) for key in got ^ set(shapes))
        raise ValueError(
            f"jaxq.models: the parameters differ from those of a float Llama in {', '.join(odd)}."
        )
    names = {}
    for key, shape in shapes.items():
        last = "bias" if key[-1] == "bias" else "weight"
        stem = ".".join(map(str, (*key[:-1], last)))
        stacked = config.scan_layers and key[0] == "layers"
        shape = shape[1:] if stacked else shape
        shape = shape[::-1] if key[-1] == "kernel" else shape
        if stacked:
            for i in range(config.num_hidden_layers):
                names["model." + stem.replace("layers.", f"layers.{i}.", 1)] = (
                    key,
                    i,
                    shape,
                )
        else:
            names[stem if key[0] == "lm_head" else "model." + stem] = (key, None, shape)
    return names


def _existing(path: Path, name: str) -> Path:
    if not (path / name).is_file():
        raise FileNotFoundError(
            f"jaxq.models.load: {path} has no {name}; expected a Hugging Face model directory."
        )
    return path / name


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file, with errors that name it."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"jaxq.models.load: {path} is damaged: {error}") from error


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside `path` and moves it there, so that a crash leaves the old one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load_tokenizer(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            f"jaxq.models.load: {path} needs the tokenizers package: pip install jaxq[hf]"
        ) from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"jaxq.models.load: {path} is damaged: {error}") from error


def _tensor_files(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    if not (path / _INDEX).is_file():
        with _open(_existing(path, _SINGLE)) as file:
            return dict.fromkeys(file.keys(), _SINGLE)
    index = _read_json(path / _INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(shard, str) for shard in files.values()
    ):
        raise ValueError(
            f"jaxq.models.load: {path / _INDEX} is damaged: it holds no weight_map of tensors to files."
        )
    for shard in sorted(set(files.values())):
        _existing(path, shard)
    return dict(files)


def _headers(
    path: Path, files: Mapping[str, str]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of all tensors that are really there, from the files' headers.

    Raises:
        ValueError: a tensor is not in the file the index names, or in two files.
    """
    headers, places = {}, {}
    for shard in sorted(set(files.values())):
        with _open(path / shard) as file:
            for name in file.keys():  # noqa: SIM118
                if name in places:
                    raise ValueError(
                        f"jaxq.models.load: {path}: {name} is both in {places[name]} and in {shard}."
                    )
                view = file.get_slice(name)
                headers[name], places[name] = (
                    (tuple(view.get_shape()), view.get_dtype()),
                    shard,
                )
    lost = [
        f"{name} is not in {shard}"
        for name, shard in sorted(files.items())
        if places.get(name) != shard
    ]
    if lost:
        raise ValueError(
            f"jaxq.models.load: {path / _INDEX} is damaged: {', '.join(lost)}."
        )
    return headers


def _check(
    wanted: Mapping[str, tuple],
    found: Mapping[str, tuple[tuple[int, ...], str]],
    config: LlamaConfig,
) -> list[str]:
    missing = sorted(set(wanted) - set(found))
    extra = sorted(
        name for name in set(found) - set(wanted) if not _derived(name, config)
    )
    both = [
        (name, shape, *found[name])
        for name, (_, _, shape) in sorted(wanted.items())
        if name in found
    ]
    shapes = [
        f"{name} is {list(got)}, expected {list(shape)}"
        for name, shape, got, _ in both
        if got != shape
    ]
    dtypes = [
        f"{name} holds {dtype}" for name, _, _, dtype in both if dtype not in _FLOATS
    ]
    listed = {
        "missing tensors": missing,
        "unexpected tensors": extra,
        "wrong shapes": shapes,
        f"dtypes other than {', '.join(_FLOATS)}": dtypes,
    }
    return [f"{what}: {', '.join(names)}" for what, names in listed.items() if names]


def _derived(name: str, config: LlamaConfig) -> bool:
    """Tensors that repeat what is known: old checkpoints' rotary tables, and the head of a tied model."""
    return name.endswith(".rotary_emb.inv_freq") or (
        config.tie_word_embeddings and name == "lm_head.weight"
    )


def _check_tied(
    name: str, tensor: np.ndarray, path: Path, files: Mapping[str, str]
) -> None:
    """A head stored beside a tied embedding must repeat it, or one of the two would be dropped unseen."""
    if name != "lm_head.weight":
        return
    embedding = "model.embed_tokens.weight"
    with _open(path / files[embedding]) as file:
        if not np.array_equal(tensor, file.get_tensor(embedding)):
            raise ValueError(
                f"jaxq.models.load: {path} says tie_word_embeddings but holds a lm_head.weight that differs from "
                f"{embedding}. Set tie_word_embeddings to false in config.json to use it."
            )


def _read(path: Path, files: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    for shard in sorted(set(files.values())):
        with _open(path / shard) as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
