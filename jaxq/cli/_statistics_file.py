"""Calibration statistics of a model in one file.

The file is a tree of `jaxq.save`:

    {"kind": "statistics", "model": digest of the config, "sources": [texts],
     "tokens": 4096, "observer": JSON of an observer or "", "layers": {path: stats}}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from jaxq import io, models, observers
from jaxq.observers import LayerStats, Observer, as_stats, empty_stats, merge_stats
from jaxq.serialization import open_dict

_KIND = "statistics"
_FIELDS = {"kind", "model", "sources", "tokens", "observer", "layers"}
# The arrangement of layers does not change what they compute.
_IGNORED = ("scan_layers",)


class Statistics(NamedTuple):
    """What a file of statistics holds.

    Attributes:
        model: the digest of the config of the model.
        sources: the texts.
        num_tokens: how many tokens the model read.
        observer: the observer of static ranges, or None.
        layers: the statistics of each layer by its path.
    """

    model: str
    sources: tuple[str, ...]
    num_tokens: int
    observer: Observer | None
    layers: dict[str, LayerStats]


def digest(model: Any) -> str:
    """A digest of the config of a model."""
    return _digest_of(model.config)


def _digest_of(config: Any) -> str:
    config = dataclasses.asdict(config)
    for name in _IGNORED:
        config.pop(name, None)
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, statistics: Statistics) -> None:
    """Writes a file of statistics. It is complete or not there."""
    observer = statistics.observer
    tree = {
        "kind": _KIND,
        "model": statistics.model,
        "sources": list(statistics.sources),
        "tokens": statistics.num_tokens,
        "observer": "" if observer is None else json.dumps(observer.to_dict()),
        "layers": statistics.layers,
    }
    io.save(path, tree)


def read(path: Path) -> Statistics:
    """Reads a file of statistics.

    Raises:
        ValueError: the file holds something else.
    """
    tree = io.load(path)
    if not isinstance(tree, dict) or set(tree) != _FIELDS or tree["kind"] != _KIND:
        raise _no_statistics(path)
    try:
        return _from_tree(tree)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the statistics are damaged: {error}") from error


def _from_tree(tree: dict[str, Any]) -> Statistics:
    """The statistics of the tree of a file.

    Raises:
        TypeError: an entry is of another type.
        ValueError: the statistics of a layer have unknown fields.
    """
    kinds = {"model": str, "sources": list, "tokens": int, "observer": str}
    for name, kind in (kinds | {"layers": dict}).items():
        if not isinstance(tree[name], kind):
            raise TypeError(f"{name} is not of the type {kind.__name__}.")
    observer = None
    if tree["observer"]:
        observer = observers.from_dict(json.loads(tree["observer"]))
    like = empty_stats(1, observer=observer)
    like = like._replace(patches=empty_stats(1))
    layers = {name: as_stats(value, like) for name, value in tree["layers"].items()}
    sources = tuple(map(str, tree["sources"]))
    return Statistics(tree["model"], sources, tree["tokens"], observer, layers)


def merge(parts: Sequence[Statistics], paths: Sequence[Path]) -> Statistics:
    """The statistics of all parts.

    Raises:
        click.UsageError: the parts are of different models, observers or layers.
    """
    merged = parts[0]
    for part, path in zip(parts[1:], paths[1:], strict=True):
        if part.model != merged.model:
            raise click.UsageError(f"{path} is of another model than {paths[0]}.")
        if part.observer != merged.observer:
            raise click.UsageError(f"{path} has another observer than {paths[0]}.")
        if set(part.layers) != set(merged.layers):
            raise click.UsageError(f"{path} has other layers than {paths[0]}.")
        merged = Statistics(
            model=merged.model,
            sources=(*merged.sources, *part.sources),
            num_tokens=merged.num_tokens + part.num_tokens,
            observer=merged.observer,
            layers={
                name: merge_stats(stats, part.layers[name], merged.observer)
                for name, stats in merged.layers.items()
            },
        )
    return merged


def check_model(statistics: Statistics, path: Path, model: Any) -> None:
    """Raises click.UsageError if the statistics are of another model."""
    if statistics.model != digest(model):
        raise _other_model(path)


def check_source(path: Path, source: Path) -> None:
    """As `check_model`, for a file and a model that are too large for the memory.

    Args:
        path: of the file. Its layers are not read.
        source: the path of the model, of which only the config is read.

    Raises:
        click.UsageError: the statistics are of another model.
        ValueError: the file holds something else.
    """
    with open_dict(path, "jaxq") as contents:
        if set(contents) != _FIELDS or contents["kind"] != _KIND:
            raise _no_statistics(path)
        model_digest = contents["model"]
    with io.read_checkpoint(source) as checkpoint:
        config = dict(checkpoint.config)
    config.pop("quantization_config", None)
    if model_digest != _digest_of(models.DecoderConfig.from_hf(config)):
        raise _other_model(path)


def _no_statistics(path: Path) -> ValueError:
    return ValueError(
        f"{path} has no calibration statistics. Make such a file with "
        "`jaxq statistics collect`."
    )


def _other_model(path: Path) -> click.UsageError:
    return click.UsageError(
        f"--statistics {path}: these are statistics of a model with another config. "
        "Collect them for this model."
    )
