"""A folder with a teacher's most probable classes, in one file for each batch of data.

    manifest.json            k, vocabulary size, temperature, number of batches, the
                             digest of the teacher's arrays
    00000000.safetensors     indices, log_probs and log_tail of the first batch
    00000001.safetensors     ...

Each file is first written under another name and then renamed. So a file with its final
name is always complete. The metadata of a file has the SHA-256 digest of the inputs
that the teacher read. After the last batch, the number of batches is added to the
manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.distillation._cached_teacher import CachedTeacher
from jaxq.distillation._model import split_batch
from jaxq.distillation._top_k import TopK, checked_top_k
from jaxq.files import (
    NewFile,
    TensorFile,
    naming_errors,
    remove_leftovers,
    write_tensors,
)
from jaxq.progress import with_progress

FORMAT = "jaxq.distillation.logits"
VERSION = 1
# Kinds of the dtypes of indices, log_probs and log_tail.
_KINDS = ("uff", "iff")
_MANIFEST_FIELDS = {"k", "vocab_size", "temperature", "dtype", "num_batches"}
_MANIFEST = "manifest.json"


class LogitsCache:
    """A teacher's k most probable classes for each batch of a data set, on disk.

    `LogitsCache.write` makes the folder, and `LogitsCache(folder)` opens it. `cache[i]`
    is the `TopK` of batch i. `len(cache)` is the number of batches.

    Args:
      folder: a folder with a cache that `LogitsCache.write` has finished.

    Attributes:
      folder: the folder of the cache.
      k: the number of classes that are stored for each row.
      vocab_size: the number of classes of the teacher.
      temperature: the temperature of the softmax. The loss must use the same.

    Raises:
      FileNotFoundError: the folder has no cache.
      ValueError: the cache is not finished, or was written in another format.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxq
      >>> teacher = lambda tokens: jnp.eye(8)[tokens]
      >>> batches = [jnp.array([[1, 2, 3]]), jnp.array([[4, 5, 6]])]
      >>> folder = tempfile.mkdtemp()
      >>> cache = jaxq.distillation.LogitsCache.write(folder, teacher, batches, k=2)
      >>> len(cache), cache[1].indices[0, :, 0].tolist()
      (2, [4, 5, 6])
      >>> cache = jaxq.distillation.LogitsCache(folder)
      >>> for tokens, top in cache.batches(batches):
      ...     loss = jaxq.distillation.kd_loss(teacher(tokens), top)
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder, "LogitsCache")
        if manifest is None:
            raise FileNotFoundError(
                f"LogitsCache: {self.folder} has no {_MANIFEST}. LogitsCache.write "
                "makes a cache."
            )
        if manifest["num_batches"] is None:
            raise ValueError(
                f"LogitsCache: the cache in {self.folder} is not finished. Call "
                "LogitsCache.write with the same arguments again. It continues the run."
            )
        self._manifest = manifest
        self._num_batches: int = manifest["num_batches"]
        self.k: int = manifest["k"]
        self.vocab_size: int = manifest["vocab_size"]
        self.temperature: float = manifest["temperature"]

    @classmethod
    def write(
        cls,
        folder: str | os.PathLike[str],
        teacher: Any,
        batches: Iterable[Any],
        *,
        k: int,
        temperature: float = 2.0,
        dtype: str = "float32",
        progress: bool | None = None,
    ) -> LogitsCache:
        """Runs a teacher over a data set, and stores its most probable classes.

        If a run was stopped, the same call continues it. Batches that are on disk are
        not computed again. The exceptions are the first and the last one, which show
        whether the teacher is the same. A row takes `2 k + 4 (k + 1)` bytes if the
        vocabulary has at most 65,536 classes.

        A teacher with arrays (a module or a pair) must have exactly the arrays of the
        teacher that began the cache. A function has no arrays that can be compared.
        Its probabilities of the first and the last stored batch are compared instead.
        In each row, the differences may add up to 3e-4, or to 0.03 (0.09) if the logits
        or the cache are float16 (bfloat16). This covers the float noise of another
        compilation. A teacher that differs by less, or only on other batches, is not
        detected.

        Args:
          folder: the folder of the cache. It is created if it does not exist. Its
            parent must exist.
          teacher: maps inputs to logits [*rows, vocab_size]. It is an nnx module, a
            pair `(apply, params)` or a function of the inputs. Modules and pairs are
            compiled, and modules run in eval mode. A function is not compiled. States
            of random number generators are not compared.
          batches: each is the inputs, or a tuple or list `(inputs, *rest)`. The order
            must be the same in every run.
          k: from 1 to the size of the vocabulary.
          temperature: the temperature of the loss that will read the cache, positive
            and finite.
          dtype: "float32", or "float16" for 2 bytes less per stored class. Float16
            rounds log-probabilities to about three digits. This is too coarse for
            temperatures above 10.
          progress: show a progress line. None shows the line if stderr is a terminal.

        Returns:
          The finished cache.

        Raises:
          FileNotFoundError: the parent of the folder does not exist.
          TypeError: `batches` is a single batch, k is not an integer, or the
            temperature is not one number.
          ValueError: the folder holds a cache for other data, of another teacher, or
            with another k, temperature or dtype; the folder holds other files; there is
            no batch, or an empty tuple in place of one; the logits have a NaN; or k or
            the temperature is out of range.
        """
        caller = "LogitsCache.write"
        k, temperature = checked_top_k(k, temperature, caller)
        if dtype not in ("float32", "float16"):
            raise ValueError(
                f"{caller}: dtype is {dtype!r}; expected 'float32' or 'float16'."
            )
        if isinstance(batches, jax.Array | np.ndarray | str | dict):
            raise TypeError(
                f"{caller}: batches must be an iterable of batches, got a single "
                f"{type(batches).__name__}. Pass a list: [batch]."
            )
        folder = Path(folder)
        cached_teacher = CachedTeacher(teacher, k, temperature, caller)
        options = {"k": k, "temperature": temperature, "dtype": dtype}
        manifest = _prepare_folder(folder, options, cached_teacher.sha256, caller)
        compared = (0, _last_stored(folder))
        num_batches = 0
        for number, batch in enumerate(with_progress(batches, "teacher", progress)):
            inputs, _ = split_batch(batch, caller)
            digest = digest_of(inputs)
            problem = None
            if not _shard(folder, number).exists():
                top = cached_teacher.top_k(inputs, number)
                if manifest is None:
                    manifest = options | {
                        "vocab_size": top.vocab_size,
                        "teacher_sha256": cached_teacher.sha256,
                    }
                    _write_manifest(folder, manifest, None)
                if top.vocab_size == manifest["vocab_size"]:
                    _write_shard(_shard(folder, number), top, digest, dtype)
                else:
                    problem = f"it has {manifest['vocab_size']} classes"
            else:
                assert manifest is not None
                stored, stored_digest = _read_top(folder, number, manifest)
                if stored_digest != digest:
                    raise ValueError(_other_data(folder, number, caller))
                if number in compared:
                    digests = (manifest["teacher_sha256"], cached_teacher.sha256)
                    has_same_arrays = None not in digests
                    problem = cached_teacher.problem(
                        stored, inputs, number, has_same_arrays=has_same_arrays
                    )
            if problem is not None:
                raise ValueError(_another_teacher(folder, problem, caller))
            num_batches += 1
        _finish(folder, manifest, num_batches, caller)
        return cls(folder)

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, number: int) -> TopK:
        top, _ = _read_top(self.folder, range(len(self))[number], self._manifest)
        return top

    def batches(self, batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
        """Yields the batches with the teacher's classes: `(inputs, top, *rest)`.

        Args:
          batches: the data of `LogitsCache.write`, in the same order. It may end
            earlier.

        Raises:
          ValueError: a batch has other inputs than the cache was written for.
        """
        for number, batch in enumerate(batches):
            inputs, rest = split_batch(batch, "LogitsCache.batches")
            if number >= len(self):
                raise ValueError(
                    f"LogitsCache.batches: the cache in {self.folder} has {len(self)} "
                    "batches, and the data has more. To add the others, call "
                    "LogitsCache.write with all batches."
                )
            top, digest = _read_top(self.folder, number, self._manifest)
            if digest != digest_of(inputs):
                raise ValueError(
                    _other_data(self.folder, number, "LogitsCache.batches")
                )
            yield (inputs, top, *rest)


def digest_of(inputs: Any) -> str:
    """SHA-256 of the numbers of a tree of arrays.

    Equal values have equal digests, whether they are int32 or int64, and whether the
    arrays are of numpy or of jax.
    """
    digest = hashlib.sha256()
    leaves, structure = jax.tree.flatten(inputs)
    digest.update(str(structure).encode())
    for leaf in leaves:
        array = np.asarray(leaf)
        wide = np.int64 if array.dtype.kind in "iub" else np.float64
        array = np.ascontiguousarray(array.astype(wide))
        digest.update(f"{wide.__name__}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# Files.


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


def _write_shard(path: Path, top: TopK, digest: str, dtype: str) -> None:
    index_dtype = np.uint16 if top.vocab_size <= 1 << 16 else np.int32
    # A log-probability below the lowest float16 number becomes -inf. Both mean 0.
    with np.errstate(over="ignore"):
        tensors = {
            "indices": np.asarray(top.indices).astype(index_dtype),
            "log_probs": np.asarray(top.log_probs).astype(dtype),
            "log_tail": np.asarray(top.log_tail).astype(dtype),
        }
    with NewFile(path, "LogitsCache.write") as file:
        write_tensors(file, tensors, {"inputs_sha256": digest})


def _read_top(folder: Path, number: int, manifest: dict[str, Any]) -> tuple[TopK, str]:
    """The classes of a batch, and the digest of its inputs."""
    path = _shard(folder, number)
    try:
        with TensorFile(path, "LogitsCache") as file:
            digest = file.metadata["inputs_sha256"]
            names = ("indices", "log_probs", "log_tail")
            indices, log_probs, log_tail = (file.read(name) for name in names)
        _check_shapes(indices, log_probs, log_tail, manifest["k"])
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"LogitsCache: {path} is damaged or missing: {error}. Delete the file, and "
            "call LogitsCache.write again. It writes this file again."
        ) from error
    top = TopK(
        jnp.asarray(indices.astype(np.int32)),
        jnp.asarray(log_probs),
        jnp.asarray(log_tail),
        manifest["vocab_size"],
        manifest["temperature"],
    )
    return top, digest


def _check_shapes(
    indices: np.ndarray, log_probs: np.ndarray, log_tail: np.ndarray, k: int
) -> None:
    """Raises ValueError unless the arrays are those of a `TopK` of k classes."""
    shape = (*log_tail.shape, k)
    kinds = indices.dtype.kind + log_probs.dtype.kind + log_tail.dtype.kind
    if indices.shape != shape or log_probs.shape != shape or kinds not in _KINDS:
        raise ValueError(f"its arrays are not those of {k} classes")


def _last_stored(folder: Path) -> int:
    """The number of the last batch on disk; -1 if there is none."""
    numbers = [int(path.stem) for path in folder.glob("[0-9]*.safetensors")]
    return max(numbers, default=-1)


def _write_manifest(
    folder: Path, manifest: dict[str, Any], num_batches: int | None
) -> None:
    names = ("k", "vocab_size", "temperature", "dtype", "teacher_sha256")
    contents = {
        "format": FORMAT,
        "version": VERSION,
        **{name: manifest[name] for name in names},
        "num_batches": num_batches,
    }
    text = json.dumps(contents, indent=2) + "\n"
    with NewFile(folder / _MANIFEST, "LogitsCache.write") as file:
        file.write(text.encode())


def _finish(
    folder: Path, manifest: dict[str, Any] | None, num_batches: int, caller: str
) -> None:
    """Adds the number of batches to the manifest, after the last batch.

    Raises:
      ValueError: there was no batch, or the folder has more of them.
    """
    if manifest is None or num_batches == 0:
        raise ValueError(
            f"{caller}: there is no batch. An iterator that was read before is empty. "
            "Pass a list."
        )
    if _last_stored(folder) >= num_batches:
        raise ValueError(
            f"{caller}: the cache in {folder} was written for other data: it has more "
            f"than the {num_batches} batches given. Choose another folder, or delete "
            "this one."
        )
    _write_manifest(folder, manifest, num_batches)


def _read_manifest(folder: Path, caller: str) -> dict[str, Any] | None:
    """The manifest, or None if there is none."""
    path = folder / _MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        is_known = manifest["format"] == FORMAT and manifest["version"] == VERSION
        is_known = is_known and {"teacher_sha256", *_MANIFEST_FIELDS} <= set(manifest)
    except (ValueError, KeyError, TypeError, RecursionError):
        is_known = False
    if not is_known:
        raise ValueError(
            f"{caller}: {path} is not the manifest of a cache of format version "
            f"{VERSION}. Choose another folder."
        )
    return manifest


def _prepare_folder(
    folder: Path, options: dict[str, Any], teacher_sha256: str | None, caller: str
) -> dict[str, Any] | None:
    """Makes the folder, or checks that a cache in it has the same options and teacher.

    Returns:
      The manifest of the cache in the folder, or None if there is none.
    """
    if not folder.exists():
        if not folder.parent.is_dir():
            raise FileNotFoundError(
                f"{caller}: the folder {folder.parent} does not exist. Create it first."
            )
        folder.mkdir()
        return None
    with naming_errors(folder, caller, "the folder cannot be read"):
        remove_leftovers(folder)
    manifest = _read_manifest(folder, caller)
    if manifest is None:
        others = [path.name for path in folder.iterdir() if path.suffix != ".partial"]
        if others:
            raise ValueError(
                f"{caller}: {folder} has no {_MANIFEST}, but other files, such as "
                f"{others[0]}. Choose an empty folder."
            )
        return None
    different = [
        f"{name}={manifest[name]!r} (now {value!r})"
        for name, value in options.items()
        if manifest[name] != value
    ]
    if different:
        raise ValueError(
            f"{caller}: the cache in {folder} was written with "
            f"{', '.join(different)}. Choose another folder, or delete this one."
        )
    stored_sha256 = manifest["teacher_sha256"]
    # A plain function has no digest. It may be a teacher that was a pair before.
    has_digests = None not in (stored_sha256, teacher_sha256)
    if has_digests and stored_sha256 != teacher_sha256:
        problem = "its arrays have another digest"
        raise ValueError(_another_teacher(folder, problem, caller))
    return manifest


# Errors.


def _another_teacher(folder: Path, problem: str, caller: str) -> str:
    return (
        f"{caller}: the cache in {folder} was written by another teacher: {problem}. "
        "Choose another folder, or delete this one."
    )


def _other_data(folder: Path, number: int, caller: str) -> str:
    return (
        f"{caller}: the cache in {folder} was written for other data: the inputs of "
        f"batch {number} have another digest. Pass the batches in the order in which "
        "they were written, or write the new cache to another folder."
    )
