"""Adapters in the files of PEFT: `adapter_config.json`, `adapter_model.safetensors`.

A layer named n has the tensors

    base_model.model.<n>.lora_A.weight             [r, K], the transpose of A
    base_model.model.<n>.lora_B.weight             [N, r], the transpose of B
    base_model.model.<n>.lora_magnitude_vector     [N], with DoRA
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.files import (
    NewFile,
    TensorFile,
    check_folder,
    listed,
    parse_json,
    read_text,
    remove_leftovers,
    require_file,
    write_tensors,
)
from jaxq.models import Llama
from jaxq.processes import to_numpy
from jaxq.training.lora._adapter import AdapterAxes
from jaxq.training.lora._add import Options, put_matrices, target_layers
from jaxq.training.lora._merge import find_adapters
from jaxq.training.lora._names import (
    NamedLayer,
    Names,
    named_layers,
    refuse_unsupported,
)
from jaxq.training.lora._product import LoRAProduct

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
# Entries of a config that change what the adapters compute, with the values that jaxq
# can read.
_READABLE = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    # Other starts, such as "pissa", change the frozen weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def save_lora(
    path: Any,
    lora: nnx.Module,
    *,
    base_model: str | None = None,
    names: Names | None = None,
) -> None:
    """Writes the adapters of a model as PEFT does, without the frozen weights.

    The directory then has `adapter_config.json` and `adapter_model.safetensors`. PEFT
    loads them with `PeftModel.from_pretrained(model, path)`.

    If `loftq` with `steps` above 1 started the adapters, the codes differ from those of
    the quantized model. Then save the whole model with `jaxq.save`.

    Args:
      path: a directory. It is created if it does not exist.
      lora: the result of `jaxq.training.add_lora`.
      base_model: the name of the frozen model, for the config.
      names: `names(path, number)` returns the name of a layer in the file. `number` is
        the place of the layer in a stack, or None if it is in no stack. Without
        `names`, the layers of a `jaxq.models.Llama` have the names of Hugging Face.
        Layers of other models, and of families that fuse or rename the projections of
        Llama, have their paths with dots.

    Raises:
      ValueError: the model has no adapter; the adapters differ in dropout, rsLoRA or
        DoRA; a layer has batch axes or transforms its input; or a name is unknown.

    Example:
      >>> import jaxq, os, tempfile
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
      >>> qmodel, _ = jaxq.quantize_model(model, "nf4")
      >>> lora = jaxq.training.add_lora(qmodel, rank=4)
      >>> with tempfile.TemporaryDirectory() as path:
      ...   jaxq.training.save_lora(path, lora)
      ...   print(sorted(os.listdir(path)))
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    caller = "training.save_lora"
    adapters = list(find_adapters(lora))
    if not adapters:
        raise ValueError(
            f"{caller}: the model has no adapter. Call jaxq.training.add_lora first."
        )
    for *layer, _ in adapters:
        refuse_unsupported(layer, lora, caller)
    named = named_layers(lora, names, caller)
    products = {id(layer): product for _, layer, _, product in adapters}
    tensors: dict[str, np.ndarray] = {}
    owners: dict[str, LoRAProduct] = {}
    for item in named:
        product = products.get(id(item.layer[1]))
        if product is not None:
            owners[item.name] = product
            tensors |= _tensors(item, product)
    config = _config(owners, [item.name for item in named], caller)
    config["base_model_name_or_path"] = base_model
    config["task_type"] = "CAUSAL_LM" if isinstance(lora, Llama) else None
    _write(Path(path), tensors, config, caller)


def load_lora(
    path: Any,
    model: nnx.Module,
    *,
    names: Names | None = None,
    key: jax.Array | None = None,
) -> nnx.Module:
    """Returns a copy of a model with adapters from the files of PEFT.

    Args:
      path: a directory with `adapter_config.json` and `adapter_model.safetensors`, from
        `save_lora` or from PEFT.
      model: the frozen model, float or quantized. It does not change.
      names: as in `save_lora`.
      key: PRNG key of dropout. None uses `jax.random.key(0)`.

    Returns:
      A model like the result of `jaxq.training.add_lora`. The adapters have the dtype
      of the file.

    Raises:
      FileNotFoundError: one of the files does not exist.
      ValueError: a file is damaged; it needs something that jaxq does not have, such as
        trained biases; it has adapters for layers that the model does not have, or of
        other sizes; or it lacks adapters for some layers of a stack.

    Example:
      >>> import jaxq, tempfile
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
      >>> lora = jaxq.training.add_lora(model, rank=4)
      >>> with tempfile.TemporaryDirectory() as path:
      ...   jaxq.training.save_lora(path, lora)
      ...   loaded = jaxq.training.load_lora(path, model)
      >>> loaded.layers[0].dot_general.rank
      4
    """
    caller = "training.load_lora"
    folder = Path(path)
    config_path = require_file(folder, CONFIG, caller)
    config = parse_json(config_path, read_text(config_path, caller))
    _check_config(config, config_path, caller)
    with TensorFile(require_file(folder, TENSORS, caller), caller) as file:
        stored = _by_module({name: file.read(name) for name in file.headers}, caller)
    model = nnx.clone(model)
    named = {item.name: item for item in named_layers(model, names, caller)}
    unknown = sorted({*stored} - {*named})
    if unknown:
        raise ValueError(
            f"{caller}: {folder} has adapters for layers that the model does not have: "
            f"{listed(unknown)}. Its layers are: {listed([*named])}. Pass names= if "
            "their names differ."
        )
    names_of: dict[str, list[str]] = {}  # the names of each layer or stack, by path
    for name, item in named.items():
        if name in stored:
            names_of.setdefault(item.layer.path, []).append(name)
    dora = bool(config.get("use_dora"))
    layers = target_layers(model, [*names_of], caller, dora=dora)
    key = jax.random.key(0) if key is None else key
    for index, layer in enumerate(layers):
        refuse_unsupported(layer, model, caller)
        layer_key = jax.random.fold_in(key, index)
        _put(layer, names_of[layer.path], stored, config, layer_key, caller)
    return model


# Writing.


def _tensors(item: NamedLayer, product: LoRAProduct) -> dict[str, np.ndarray]:
    """The tensors of one layer."""
    a, b = product.axes.matrices(product.lora_a[...], product.lora_b[...])
    a, b = to_numpy(a), to_numpy(b)  # [*stack, K, r], [*stack, r, N]
    magnitude = None
    if product.magnitude is not None:
        magnitude = to_numpy(product.magnitude[...]).reshape(*b.shape[:-2], -1)
    if item.number is not None:
        a = a.reshape(-1, *a.shape[-2:])[item.number]
        b = b.reshape(-1, *b.shape[-2:])[item.number]
        if magnitude is not None:
            magnitude = magnitude.reshape(-1, magnitude.shape[-1])[item.number]
    name = f"{_PREFIX}{item.name}"
    tensors = {
        f"{name}.lora_A.weight": np.ascontiguousarray(a.T),
        f"{name}.lora_B.weight": np.ascontiguousarray(b.T),
    }
    if magnitude is not None:
        tensors[f"{name}.lora_magnitude_vector"] = np.ascontiguousarray(magnitude)
    return tensors


def _config(
    owners: Mapping[str, LoRAProduct], all_names: Sequence[str], caller: str
) -> dict[str, Any]:
    """The config of PEFT.

    Args:
      owners: the products with adapters, by the names of their layers in the file.
      all_names: the names of all layers that could have an adapter.
      caller: the name of the public function.

    Raises:
      ValueError: the adapters differ in an option that PEFT has once for all.
    """
    products = owners.values()
    options = {
        "dropout": {product.dropout for product in products},
        "rslora": {product.rslora for product in products},
        "DoRA": {product.magnitude is not None for product in products},
    }
    for option, values in options.items():
        if len(values) > 1:
            raise ValueError(
                f"{caller}: the adapters differ in {option}, and PEFT's config has one "
                "value for all. Save a model whose adapters have the same options."
            )
    first = next(iter(products))
    ranks = {name: product.rank for name, product in owners.items()}
    alphas = {name: _plain(product.alpha) for name, product in owners.items()}
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "use_dora": first.magnitude is not None,
        "target_modules": _target_modules(list(owners), all_names),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _plain(alpha: float) -> float:
    """An integer if the number is whole, because PEFT writes integers."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the other values by a pattern of the layer's name."""
    common = Counter(values.values()).most_common(1)[0][0]
    others = {
        re.escape(name): value for name, value in values.items() if value != common
    }
    return common, others


def _target_modules(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """The ends of the names if these choose the same layers, else the whole names."""
    ends = {name.rpartition(".")[2] for name in names}
    chosen = {name for name in all_names if name.rpartition(".")[2] in ends}
    return sorted(ends if chosen == {*names} else names)


def _write(
    path: Path, tensors: Mapping[str, np.ndarray], config: Any, caller: str
) -> None:
    """Writes both files. Both are whole before the first one replaces an old one."""
    path.mkdir(parents=True, exist_ok=True)
    check_folder(path, caller)
    for name in (TENSORS, CONFIG):
        remove_leftovers(path, name)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with (
        NewFile(path / TENSORS, caller) as tensor_file,
        NewFile(path / CONFIG, caller) as config_file,
    ):
        write_tensors(tensor_file, dict(sorted(tensors.items())), {"format": "pt"})
        tensor_file.sync()
        config_file.write(text.encode())
        config_file.sync()
        tensor_file.replace()
        config_file.replace()


# Reading.


def _check_config(config: Any, path: Path, caller: str) -> None:
    """Raises a ValueError if a config needs something that jaxq does not have."""
    if not isinstance(config, dict):
        raise ValueError(f"{caller}: {path} must be a JSON object.")
    problems = [
        f"  {name}: {config[name]!r}"
        for name, values in _READABLE.items()
        if name in config and config[name] not in values
    ]
    if problems:
        raise ValueError(
            f"{caller}: {path} has entries that jaxq cannot read.\n"
            + "\n".join(problems)
            + "\nMerge the adapters with PEFT, and load the merged model."
        )


def _by_module(
    tensors: Mapping[str, np.ndarray], caller: str
) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of each layer, by the last part of their names.

    Raises:
      ValueError: a tensor is not one of an adapter, or a layer lacks a matrix.
    """
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        match = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            raise ValueError(
                f"{caller}: the tensor {name!r} is not a LoRA matrix of a layer. jaxq "
                "reads lora_A.weight, lora_B.weight and lora_magnitude_vector."
            )
        modules.setdefault(match[1], {})[match[2]] = value
    for name, own in modules.items():
        missing = {"lora_A.weight", "lora_B.weight"} - {*own}
        if missing:
            raise ValueError(f"{caller}: {name} has no {', '.join(sorted(missing))}.")
    return modules


def _put(
    layer: Any,
    names: Sequence[str],
    stored: Mapping[str, Mapping[str, np.ndarray]],
    config: Mapping[str, Any],
    key: jax.Array,
    caller: str,
) -> None:
    """Puts the adapter of one layer or stack into a model, in place.

    Args:
      layer: path, module and kind.
      names: of the layer in the file. A stack has several, in its order.
      stored: the tensors of each layer, by name.
      config: of PEFT.
      key: PRNG key of dropout.
      caller: the name of the public function.

    Raises:
      ValueError: the file lacks layers of the stack, their ranks or alphas differ, or a
        matrix does not fit the layer or the config.
    """
    path, module, kind = layer
    axes = AdapterAxes.of(kind.roles(module))
    stack = axes.stack_of(getattr(module, kind.weight).get_value())
    num_layers = int(np.prod(stack))
    if len(names) != num_layers:
        raise ValueError(
            f"{caller}: the file has adapters for {len(names)} of the {num_layers} "
            f"layers in the stack {path}. Use a model with its layers in a list, for "
            "example jaxq.models.unrolled(model)."
        )
    alphas = {_alpha(config, name) for name in names}
    shapes = {tuple(stored[name]["lora_A.weight"].shape) for name in names}
    if len(alphas) > 1 or len(shapes) > 1:
        raise ValueError(
            f"{caller}: the layers of the stack {path} have different ranks or alphas. "
            "Use a model with its layers in a list, for example "
            "jaxq.models.unrolled(model)."
        )
    rank = next(iter(shapes))[0]
    dora = bool(config.get("use_dora"))
    for name in names:
        _check_shapes(name, stored[name], axes, rank, caller)
        if ("lora_magnitude_vector" in stored[name]) != dora:
            raise ValueError(
                f"{caller}: the config has use_dora={dora}, but {name} has "
                f"{'no' if dora else 'a'} lora_magnitude_vector. Save the adapters "
                "again."
            )

    def stacked(part: str) -> jax.Array:
        """The transposed tensors of all layers, `[*stack, ...]`."""
        values = [stored[name][part].T for name in names]
        value = np.stack(values) if stack else values[0]
        return jnp.asarray(value.reshape(*stack, *values[0].shape))

    a, b = stacked("lora_A.weight"), stacked("lora_B.weight")
    options = Options(
        rank=rank,
        alpha=next(iter(alphas)),
        dropout=config.get("lora_dropout") or 0.0,
        rslora=bool(config.get("use_rslora")),
        dora=dora,
        dtype=a.dtype,
    )
    product = put_matrices(layer, a, b, options, key)
    if product.magnitude is not None:
        magnitude = stacked("lora_magnitude_vector")
        shape = product.magnitude[...].shape
        product.magnitude.set_value(magnitude.astype(jnp.float32).reshape(shape))


def _check_shapes(
    name: str, own: Mapping[str, np.ndarray], axes: AdapterAxes, rank: int, caller: str
) -> None:
    """Raises a ValueError if the matrices of a layer have other sizes."""
    wanted = {
        "lora_A.weight": (rank, axes.size_in),
        "lora_B.weight": (axes.size_out, rank),
        "lora_magnitude_vector": (axes.size_out,),
    }
    for part, value in own.items():
        if tuple(value.shape) != wanted[part]:
            raise ValueError(
                f"{caller}: {name}.{part} is {list(value.shape)}, but the layer of the "
                f"model needs {list(wanted[part])}. Load the model of these adapters."
            )


def _alpha(config: Mapping[str, Any], name: str) -> float:
    """The alpha of a layer: that of the first pattern that matches, as in PEFT."""
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return config.get("lora_alpha", 8)
