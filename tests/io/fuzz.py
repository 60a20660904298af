"""Damaged files: each is loaded, or refused by a ValueError that names it.

    python -m tests.io.fuzz 100000 [seed]

makes as many mutants of small files and recipes, and prints every mutant that is
neither. A QTensor that loads must also dequantize and multiply. A file with damaged
bytes that loads must hold what it held before. `test_fuzz.py` runs 2,000 mutants.
`fuzz_checkpoints.py` damages model directories and files of other libraries.
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
from tests.io.mutations import DEEP, change_node

NAME = "mutant.safetensors"


class Mutant(NamedTuple):
    """A damaged file.

    Attributes:
      kind: which mutation made it.
      names: texts of which an error must have one.
      load: reads it.
      expected: what the whole file holds, as `leaf_bytes` returns it, if the file has
        checksums that do not fit the mutant. None otherwise.
    """

    kind: str
    names: tuple[str, ...]
    load: Callable[[], Any]
    expected: list[bytes] | None = None


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
        source = self.random.choice(self.sources)
        data = bytearray(source.data)
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
        mutant = self._file("bytes", bytes(data))
        return mutant._replace(expected=source.leaves)

    def _changed_metadata(self) -> Mutant:
        """Another structure, with checksums that fit it, or without checksums."""
        source = self.random.choice(self.sources)
        header = copy.deepcopy(source.header)
        for _ in range(self.random.choice((1, 1, 2, 3))):
            change_node(header, self.random)
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
            change_node({name: header[name] for name in names}, self.random)
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + source.data[8 + length :]
        return self._file("header", data)

    def _changed_recipe(self) -> Mutant:
        recipe = copy.deepcopy(self.random.choice(self.recipes))
        change_node(recipe, self.random)
        return Mutant(
            "recipe", ("Recipe.from_dict: ",), lambda: jaxq.Recipe.from_dict(recipe)
        )

    def _changed_config(self) -> Mutant:
        """A model directory with one damaged file."""
        for name, data in self.model_files.items():
            (self.model / name).write_bytes(data)
        config = json.loads(self.model_files["config.json"])
        if self.random.random() < 0.8:
            change_node(config, self.random)
            (self.model / "config.json").write_text(json.dumps(config))
        else:
            data = bytearray(self.model_files["model.safetensors"])
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            (self.model / "model.safetensors").write_bytes(data)
        return Mutant("model", (str(self.model),), lambda: models.load(self.model))

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
        leaves = leaf_bytes(jaxq.load(path))
        return _Source(path.read_bytes(), header, tensors, leaves)


class _Source(NamedTuple):
    """A whole file: its bytes, its JSON header, its tensors and the leaves it holds."""

    data: bytes
    header: dict[str, Any]
    tensors: dict[str, np.ndarray]
    leaves: list[bytes]


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
            if mutant.expected is not None:
                assert leaf_bytes(value) == mutant.expected, "it holds another tree"
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


def leaf_bytes(tree: Any) -> list[bytes]:
    """The bytes of all leaves of a tree."""
    leaves = jax.tree.leaves(tree)
    arrays = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]
    return [np.asarray(array).tobytes() for array in arrays]


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


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
