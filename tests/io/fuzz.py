"""Damaged files: each is loaded, or refused by a ValueError that names it.

    python -m tests.io.fuzz 100000 [seed]

makes as many mutants of small files and recipes, and prints every mutant that is
neither. A QTensor that loads must also dequantize and multiply. `test_fuzz.py` runs
2,000 mutants.
"""

from __future__ import annotations

import collections
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq import files, models
from jaxq.models import Llama, LlamaConfig
from jaxq.qtensor import is_qtensor

NAME = "mutant.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000
# What a field of a damaged or hostile file can hold.
NUMBERS = (0, 1, -1, 2, 3, 7, 64, 256, 2**31, 2**63, 10**30, -(10**12), 0.0, 1.0, 256.0)
NAMES = "int4 int8 float8_e4m3fn float64 float99_e50m48 q9.9 PerGroup PerTensor PerFlat"
WORDS = "absmax mean low_first array qtensor dict list tuple key value w w.data odd"
ODD = ("", "..", "a,b", "f4,(", "\ud800", 1e308, float("inf"), float("nan"), None)
TREES = ([], {}, [1], [[]], [0, 0], [-1, -2], [10**12] * 2, {"is": "array"}, {"x": 1})
SWITCHES = (True, False)
VALUES = [*NUMBERS, *NAMES.split(), *WORDS.split(), *ODD, *TREES, *SWITCHES]


class Mutant(NamedTuple):
    """A damaged file.

    Attributes:
      kind: which mutation made it.
      names: texts of which an error must have one.
      load: reads it.
    """

    kind: str
    names: tuple[str, ...]
    load: Callable[[], Any]


class Fuzz:
    """Mutants of a few files.

    Args:
      folder: where the mutants are written.
      seed: of the random choices.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.random = random.Random(seed)
        self.sources = [self._written(tree) for tree in trees()]
        self.recipes = [recipe.to_dict() for recipe in recipes()]
        self.model = folder / "model"
        models.save(self.model, small_model(), dtype=jnp.float32)
        self.model_files = {
            path.name: path.read_bytes() for path in self.model.iterdir()
        }

    def mutant(self) -> Mutant:
        """The next mutant."""
        kinds = {
            self._flipped: 30,
            self._changed_metadata: 50,
            self._changed_header: 15,
            self._changed_recipe: 20,
            self._changed_config: 1,
        }
        make = self.random.choices(list(kinds), list(kinds.values()))[0]
        return make()

    def _flipped(self) -> Mutant:
        data = bytearray(self.random.choice(self.sources).data)
        for _ in range(self.random.choice((1, 1, 1, 2, 8))):
            position = self.random.randrange(len(data))
            change = self.random.randrange(4)
            if change == 0:
                data[position] ^= 1 << self.random.randrange(8)
            elif change == 1:
                data[position] = self.random.randrange(256)
            elif change == 2:
                del data[position : position + self.random.choice((1, 8, 1000))]
            else:
                data[position:position] = self.random.randbytes(4)
            if not data:
                break
        return self._file("bytes", bytes(data))

    def _changed_metadata(self) -> Mutant:
        """Another structure, with checksums that fit it, or without checksums."""
        source = self.random.choice(self.sources)
        header = copy.deepcopy(source.header)
        for _ in range(self.random.choice((1, 1, 2, 3))):
            self._change(header)
        text = json.dumps(header)
        if self.random.random() < 0.002:
            text = text.replace("null", DEEP, 1)
        writer = Buffer()
        files.write_tensors(writer, source.tensors, {"format": "jaxq", "jaxq": text})
        return self._file("metadata", bytes(writer.data))

    def _changed_header(self) -> Mutant:
        """Other names, dtypes, shapes and offsets of tensors."""
        source = self.random.choice(self.sources)
        length = int.from_bytes(source.data[:8], "little")
        header = json.loads(source.data[8 : 8 + length])
        if self.random.random() < 0.7:  # as a file without checksums
            header["__metadata__"].pop("checksums")
            header["__metadata__"].pop("checksums_crc32")
        names = [name for name in header if name != "__metadata__"]
        if self.random.random() < 0.3 and len(names) > 1:
            first, second = self.random.sample(names, 2)
            header[first], header[second] = header[second], header[first]
        else:
            self._change({name: header[name] for name in names})
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + source.data[8 + length :]
        return self._file("header", data)

    def _changed_recipe(self) -> Mutant:
        recipe = copy.deepcopy(self.random.choice(self.recipes))
        self._change(recipe)
        return Mutant(
            "recipe", ("Recipe.from_dict: ",), lambda: jaxq.Recipe.from_dict(recipe)
        )

    def _changed_config(self) -> Mutant:
        """A model directory with one damaged file."""
        for name, data in self.model_files.items():
            (self.model / name).write_bytes(data)
        config = json.loads(self.model_files["config.json"])
        if self.random.random() < 0.8:
            self._change(config)
            (self.model / "config.json").write_text(json.dumps(config))
        else:
            data = bytearray(self.model_files["model.safetensors"])
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            (self.model / "model.safetensors").write_bytes(data)
        return Mutant("model", (str(self.model),), lambda: models.load(self.model))

    def _change(self, tree: Any) -> None:
        """Changes one random node of a tree of dicts and lists, in place."""
        nodes = list(_nodes(tree))
        parent, key = self.random.choice(nodes)
        change = self.random.randrange(10)
        if change == 0:
            del parent[key]
        elif change == 1:
            other_parent, other_key = self.random.choice(nodes)
            parent[key] = copy.deepcopy(other_parent[other_key])
        elif change == 2 and isinstance(parent, dict):
            parent[self.random.choice(("x", "is", "type", "\ud800"))] = parent[key]
        else:
            parent[key] = copy.deepcopy(self.random.choice(VALUES))

    def _file(self, kind: str, data: bytes) -> Mutant:
        path = self.folder / NAME
        path.write_bytes(data)
        return Mutant(kind, (str(path),), lambda: jaxq.load(path))

    def _written(self, tree: Any) -> _Source:
        path = self.folder / "source.safetensors"
        jaxq.save(path, tree)
        with files.TensorFile(path, "fuzz") as file:
            header = json.loads(file.metadata["jaxq"])
            tensors = {name: file.read(name) for name in file.headers}
        return _Source(path.read_bytes(), header, tensors)


class _Source(NamedTuple):
    """A whole file: its bytes, its JSON header and its tensors."""

    data: bytes
    header: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Buffer:
    """Collects what is written."""

    def __init__(self):
        self.data = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        self.data += data


def trees() -> list[Any]:
    w = jax.random.normal(jax.random.key(0), (32, 2))
    uint3 = jaxq.QuantSpec("uint3", jaxq.PerGroup(16), symmetric=False)
    fmt = jaxq.formats.CodebookFormat("fuzz", (-1.0, -0.25, 0.5, 1.0))
    groups = jaxq.QuantSpec("int8", jaxq.PerGroup(16))
    learned = jaxq.QuantSpec(fmt, jaxq.PerBlock((16, 2)), scale="float16")
    return [
        {"w": jaxq.quantize(w, "nf4_dq"), "b": jnp.ones(2, jnp.bfloat16)},
        {"w": jaxq.quantize(w, uint3), "list": [1, 2.5, None, "text", (True, w)]},
        {"w": jaxq.quantize(w, "int4").with_activation("int8", outliers=6.0)},
        {"w": jaxq.quantize(w, "int8").with_activation("int8", bounds=(-1.0, 1.0))},
        {"w": jaxq.quantize(w, "int8").with_activation(groups)},
        {"w": jaxq.quantize(w, "ternary"), "key": jax.random.key(1), "n": np.ones(1)},
        {"w": jaxq.quantize(w, "mxfp4"), "codebook": jaxq.quantize(w, learned)},
    ]


def recipes() -> list[jaxq.Recipe]:
    rules = [
        jaxq.Rule("**/attn/*", weight="nf4_dq", activation="int8"),
        jaxq.Rule("re:a.*", weight="int4", method="gptq", options={"act_order": True}),
        jaxq.Rule("b", weight="int8", activation="int8", observer="percentile"),
        jaxq.Rule("head", skip=True, kinds=("Linear",), contracting=(-2,), batch=(0,)),
    ]
    return [jaxq.Recipe(rules), jaxq.recipes.get("w8a8_rotated")]


def small_model() -> Llama:
    from flax import nnx

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
    )
    return Llama(config, rngs=nnx.Rngs(0))


def run(
    count: int, folder: Path, seed: int = 0
) -> tuple[collections.Counter, list[str]]:
    """Loads mutants.

    Returns:
      How many mutants of each kind were loaded and refused, and a line for each one
      that was neither.
    """
    fuzz = Fuzz(folder, seed)
    results: collections.Counter = collections.Counter()
    failures = []
    for number in range(count):
        mutant = fuzz.mutant()
        try:
            value = mutant.load()
            if mutant.kind == "metadata":
                _use(value)
            results[mutant.kind, "loaded"] += 1
        except ValueError as error:
            results[mutant.kind, "refused"] += 1
            if not any(name in str(error) for name in mutant.names):
                failures.append(f"{number} {mutant.kind}: no name: {error!r:.300}")
        except Exception as error:
            failures.append(f"{number} {mutant.kind}: {error!r:.300}")
            if mutant.kind in ("metadata", "bytes", "header"):
                saved = (folder / NAME).read_bytes()
                (folder / f"failure{len(failures)}.safetensors").write_bytes(saved)
    return results, failures


def _use(value: Any) -> None:
    """Traces the dequantization and a product of every QTensor. Nothing is compiled."""
    for leaf in jax.tree.leaves(value, is_leaf=is_qtensor):
        if is_qtensor(leaf):
            try:
                jax.eval_shape(jaxq.dequantize, leaf)
                jax.eval_shape(_product, leaf)
            except ValueError as error:
                raise AssertionError(f"loaded, but unusable: {error}") from error


def _product(qt: jaxq.QTensor) -> jax.Array:
    """The product of ones and a QTensor along its contracted axes."""
    batch = tuple(range(len(qt.batch_shape)))
    contracted = tuple(axis + qt.ndim for axis in qt.meta.geometry.contracted)
    sizes = (qt.shape[axis] for axis in contracted)
    x = jnp.ones((*qt.batch_shape, 2, *sizes))
    of_x = tuple(range(len(batch) + 1, x.ndim))
    return jaxq.ops.dot_general(x, qt, ((of_x, contracted), (batch, batch)))


def _nodes(tree: Any):
    """The parent and the key of every node of a tree."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in pairs:
            yield tree, key
            yield from _nodes(value)


def main() -> None:
    count, seed = int(sys.argv[1]), int((*sys.argv, 0)[2])
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results, failures = run(count, Path(folder), seed)
    for (kind, result), number in sorted(results.items()):
        print(f"{kind:10} {result:8} {number}")
    print("\n".join(failures[:40]))
    seconds = time.monotonic() - start
    print(f"{count} mutants, {len(failures)} failures, {seconds:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
